//! Several variables of one type at one go: all of them, or none.
//!
//! It is what making a process, a namespace or a device needs: a row of counters, and no half of them.

use core::mem::MaybeUninit;
use core::slice;

use zerocopy::FromZeros;

use super::{Domain, PerCpuPtr};
use crate::allocator::free_each;
use crate::request::{AllocError, AllocFlags, FreeFlags, FreeManyError, Request};

/// Allocates `N` variables in the instance of domain `D`, all of them or none: a `T` of zero bytes on every materialised CPU each.
///
/// It costs less than `N` calls of [`alloc_percpu_in`](crate::alloc_percpu_in):
/// [`allocate_many`](crate::PerCpuAllocator::allocate_many) says what is saved.
///
/// ```
/// use pcpu::{CpuCell, Global, alloc_percpu_many_in, free_percpu_many, this_cpu};
///
/// let counters = alloc_percpu_many_in::<CpuCell<u64>, Global, 4>()?;
/// // SAFETY: the counters are live until they are freed below.
/// counters.iter().for_each(|&counter| unsafe { this_cpu::add(counter, 1) });
/// // SAFETY: nobody uses the counters any more.
/// unsafe { free_percpu_many(&counters)? };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`alloc_percpu_in`](crate::alloc_percpu_in); then none is allocated. Where `N` is 0 there is no error.
pub fn alloc_percpu_many_in<T: FromZeros, D: Domain, const N: usize>()
-> Result<[PerCpuPtr<T, D>; N], AllocError> {
    let mut addresses = [0; N];
    D::allocate_many(&Request::of::<T>(), &mut addresses)?;
    // SAFETY: no area lies at 0 (promise of the domain).
    Ok(addresses.map(|address| unsafe { PerCpuPtr::from_neutral_unchecked(address) }))
}

/// [`alloc_percpu_many_in`] for as many as `out` is long, with flags; returns `out`, filled. [`AllocFlags::NO_ZERO`] changes nothing:
/// a `T` needs its zeroes.
///
/// ```
/// use pcpu::{AllocFlags, CpuCell, Global, alloc_percpu_many_with, free_percpu_many};
///
/// let mut counters = Vec::with_capacity(20);
/// let spare = &mut counters.spare_capacity_mut()[..20];
/// alloc_percpu_many_with::<CpuCell<u64>, Global>(AllocFlags::ATOMIC, spare)?;
/// // SAFETY: so many have just been written.
/// unsafe { counters.set_len(20) };
/// // SAFETY: nobody uses the counters any more.
/// unsafe { free_percpu_many(&counters)? };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`alloc_percpu_many_in`].
pub fn alloc_percpu_many_with<T: FromZeros, D: Domain>(
    flags: AllocFlags,
    out: &mut [MaybeUninit<PerCpuPtr<T, D>>],
) -> Result<&mut [PerCpuPtr<T, D>], AllocError> {
    let (first, len) = (out.as_mut_ptr(), out.len());
    // SAFETY: a handle is laid out as an address; the slots are the caller's to write, and are zero before they are lent.
    let addresses = unsafe {
        first.write_bytes(0, len);
        slice::from_raw_parts_mut(first.cast::<usize>(), len)
    };
    let flags = flags.difference(AllocFlags::NO_ZERO);
    D::allocate_many(&Request::of::<T>().with_flags(flags), addresses)?;
    // SAFETY: all slots hold addresses of areas now, and no area lies at 0 (promise of the domain).
    Ok(unsafe { slice::from_raw_parts_mut(first.cast(), len) })
}

/// Frees dynamic variables, in their order: what [`alloc_percpu_many_in`] and its like have allocated, or any others.
///
/// # Errors
/// [`FreeManyError`] says which one could not be freed; those before it are, those behind it are not.
///
/// # Safety
/// As [`free_percpu`](crate::free_percpu), for each.
pub unsafe fn free_percpu_many<T, D: Domain>(
    variables: &[PerCpuPtr<T, D>],
) -> Result<(), FreeManyError> {
    let addresses = variables.iter().map(|variable| variable.neutral());
    // SAFETY: the promise of the caller.
    free_each(addresses, |address| unsafe {
        D::free(address, FreeFlags::empty())
    })
}
