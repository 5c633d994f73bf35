//! Buffers that each CPU appends to and that are taken as a whole: records of events, batches of work.
//!
//! A copy is a word, which counts the bytes in use, and the items. An append writes the items above those in use, where
//! nobody looks, and ends with the store of the new count; so does a take, with a count of 0.

use core::cell::UnsafeCell;
use core::fmt;
use core::mem::{MaybeUninit, align_of, size_of};
use core::slice;

use zerocopy::FromZeros;

use super::{Live, LocalOps};
use crate::alloc_api::{Domain, PerCpuPtr};

/// From a buffer's word to its first byte.
pub(in crate::this_cpu) const DATA_OFFSET_BYTES: usize = 8;

/// A buffer of up to `N` items on every CPU. Each CPU changes its own copy.
///
/// ```
/// use pcpu::{CpuBuffer, LocalBuffer, define_per_cpu};
/// use std::mem::MaybeUninit;
///
/// define_per_cpu! {
///     static EVENTS: CpuBuffer<u64, 128> = CpuBuffer::new();
/// }
///
/// if let Err(full) = EVENTS.append(42) {
///     // Take what this CPU has, and try again.
///     let mut taken = [MaybeUninit::uninit(); 128];
///     println!("{:?}", EVENTS.take(&mut taken));
///     EVENTS.append(full.0).expect("nobody has filled it already");
/// }
/// ```
#[derive(FromZeros)]
#[repr(C)]
pub struct CpuBuffer<T, const N: usize> {
    used_bytes: UnsafeCell<u64>,
    items: UnsafeCell<[MaybeUninit<T>; N]>,
}

// SAFETY: a copy is changed by the CPU that has it, by operations of one step; the items go from one thread to another.
unsafe impl<T: Copy + Send, const N: usize> Sync for CpuBuffer<T, N> {}

/// The item that a buffer has no room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full<T>(pub T);

impl<T> fmt::Display for Full<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the CPU's buffer is full")
    }
}

impl<T: fmt::Debug> core::error::Error for Full<T> {}

impl<T: Copy, const N: usize> CpuBuffer<T, N> {
    const CAPACITY_BYTES: usize = {
        assert!(
            align_of::<T>() <= DATA_OFFSET_BYTES,
            "an item of a per-CPU buffer is aligned to 8 bytes at most"
        );
        assert!(size_of::<T>() > 0, "an item of a per-CPU buffer has a size");
        size_of::<T>() * N
    };

    /// An empty buffer.
    pub const fn new() -> Self {
        const {
            assert!(
                Self::CAPACITY_BYTES > 0,
                "a per-CPU buffer has room for an item"
            );
        }
        Self {
            used_bytes: UnsafeCell::new(0),
            items: UnsafeCell::new([MaybeUninit::uninit(); N]),
        }
    }

    /// The items of this copy, for its only user.
    pub fn items(&mut self) -> &mut [T] {
        const { assert!(Self::CAPACITY_BYTES > 0) };
        let items = *self.used_bytes.get_mut() as usize / size_of::<T>();
        // SAFETY: so many items have been appended.
        unsafe { slice::from_raw_parts_mut(self.items.get().cast(), items) }
    }

    /// Forgets the items of this copy, for its only user.
    pub fn clear(&mut self) {
        *self.used_bytes.get_mut() = 0;
    }
}

impl<T: Copy, const N: usize> Default for CpuBuffer<T, N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T, const N: usize> fmt::Debug for CpuBuffer<T, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuBuffer").finish_non_exhaustive()
    }
}

/// The operations on the current CPU's copy of a [`CpuBuffer`], for static variables and owners.
///
/// Without restartable sequences they take a lock within the copy: not for signal handlers then.
pub trait LocalBuffer<T: Copy + Send, const N: usize>:
    Live<Target = CpuBuffer<T, N>> + Sized
{
    /// Appends an item.
    ///
    /// # Errors
    /// [`Full`], with the item, if the CPU's buffer has no room for it.
    #[inline]
    fn append(&self, item: T) -> Result<(), Full<T>> {
        self.append_all(slice::from_ref(&item))
            .map_err(|Full(_)| Full(item))
    }

    /// Appends items, all of them or none; nobody else's come between them.
    ///
    /// # Errors
    /// [`Full`], with the items, if the CPU's buffer has no room for all of them.
    #[inline]
    fn append_all<'a>(&self, items: &'a [T]) -> Result<(), Full<&'a [T]>> {
        // SAFETY: the variable is live.
        unsafe { append_all(self.handle(), items) }
    }

    /// Takes all items of the current CPU's buffer, in the order in which they were appended.
    #[inline]
    fn take<'a>(&self, room: &'a mut [MaybeUninit<T>; N]) -> &'a mut [T] {
        // SAFETY: the variable is live.
        unsafe { take(self.handle(), room) }
    }
}

impl<T: Copy + Send, const N: usize, H: Live<Target = CpuBuffer<T, N>>> LocalBuffer<T, N> for H {}

/// Appends items to the current CPU's copy of a buffer, all of them or none.
///
/// # Errors
/// [`Full`], with the items, if it has no room for all of them.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn append_all<T: Copy, D: Domain, const N: usize>(
    variable: PerCpuPtr<CpuBuffer<T, N>, D>,
    items: &[T],
) -> Result<(), Full<&[T]>> {
    // SAFETY: live, with room for `N` items after its word (promise of the caller); the items are as many bytes.
    let is_done = unsafe {
        D::Ops::append(
            variable.neutral(),
            items.as_ptr().cast(),
            size_of_val(items),
            CpuBuffer::<T, N>::CAPACITY_BYTES,
        )
    };
    if is_done { Ok(()) } else { Err(Full(items)) }
}

/// Takes all items of the current CPU's copy of a buffer.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn take<T: Copy, D: Domain, const N: usize>(
    variable: PerCpuPtr<CpuBuffer<T, N>, D>,
    room: &mut [MaybeUninit<T>; N],
) -> &mut [T] {
    const { assert!(CpuBuffer::<T, N>::CAPACITY_BYTES > 0) };
    // SAFETY: live (promise of the caller); there is room for as many items as a buffer can have, and what it has are
    // items.
    unsafe {
        let bytes = D::Ops::take(variable.neutral(), room.as_mut_ptr().cast());
        slice::from_raw_parts_mut(room.as_mut_ptr().cast(), bytes / size_of::<T>())
    }
}
