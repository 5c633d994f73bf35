//! The owner of a dynamic per-CPU variable: [`PerCpu`].
//!
//! What always holds of an owner:
//! - its area is allocated, and nobody else frees it;
//! - the copy of every possible CPU is a valid `T`;
//! - the copy of a CPU that is not materialised is all zero bytes, has never been lent, and is never written: only what
//!   [`PerCpu::new`] made has such copies, and a `T` of zero bytes is valid then.
//!
//! The third is why a `&T` is lent only after the CPU has been brought up: a `T` may be changed through it. The allocator
//! zeroes an area on materialised CPUs only, so a change behind its back would be found by the next owner.
//!
//! An owner is `Send` if `T: Send`, for the copies are dropped wherever the owner is; it is `Sync` if `T: Sync`, for
//! whoever has a `&PerCpu<T>` can get a `&T` of any CPU. That is what an owner of boxes on every CPU would be.

use core::fmt;
use core::marker::PhantomData;
use core::mem;
use core::ptr::NonNull;

use zerocopy::FromZeros;

#[cfg(all(feature = "std", target_os = "linux"))]
use crate::alloc_api::Global;
use crate::alloc_api::{Domain, Handle, PerCpuPtr, alloc_percpu_many_in, per_cpu_ptr};
use crate::request::{AllocError, CpuError};
use crate::this_cpu::Live;
use crate::unit::CpuId;
use copies::Copies;

mod copies;
mod remote_cell;
mod shape;
mod slice;
#[cfg(doctest)]
mod type_rules;

pub use copies::InitError;
pub use remote_cell::RemoteCell;
pub use shape::Shape;

/// A dynamic per-CPU variable and the only one who frees it: a copy of `T` for every possible CPU of domain `D`.
///
/// Dropping it drops the copies of all possible CPUs and frees the area. A `T` without size is refused with
/// [`AllocError::ZeroSize`]: nothing would be per CPU about it.
///
/// A scalar that each CPU counts up for itself is a [`CpuCell`](crate::CpuCell), with the operations of
/// [`LocalCell`](crate::LocalCell) and the sums of [`RemoteCell`]:
///
/// ```
/// use pcpu::{CpuCell, LocalCell, PerCpu, RemoteCell};
///
/// let requests = PerCpu::<CpuCell<u64>>::new()?;
/// std::thread::scope(|scope| {
///     for _ in 0..4 {
///         scope.spawn(|| (0..1000).for_each(|_| requests.inc()));
///     }
/// });
/// assert_eq!(requests.sum(), 4000);
/// # Ok::<(), pcpu::AllocError>(())
/// ```
///
/// Any other `T: Sync` is reached by reference, and a slice has a length that is known at run time only
/// ([`PerCpu::new_slice`]):
///
/// ```
/// use pcpu::PerCpu;
/// use std::sync::Mutex;
///
/// let queues = PerCpu::<Mutex<Vec<u32>>>::new_with(|_| Mutex::new(Vec::new()))?;
/// queues.current()?.lock().unwrap().push(7);
/// let queued: usize = queues.iter().map(|(_, queue)| queue.lock().unwrap().len()).sum();
/// assert_eq!(queued, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # CPUs that never ran
/// Memory is given to CPUs that have been *materialised*: those that ever worked on a copy of their own, and those
/// whose copies somebody has asked for. A copy of [`PerCpu::new`] costs the others nothing, and stays zero there.
/// [`PerCpu::new_with`] cannot do without: it materialises all possible CPUs for good, so that from then on every
/// zeroed allocation that is not fresh memory is zeroed on all of them. On a machine with many possible CPUs of which
/// a process uses few, that is the price of an initial value other than zero.
pub struct PerCpu<
    T: ?Sized + Shape,
    #[cfg(all(feature = "std", target_os = "linux"))] D: Domain = Global,
    #[cfg(not(all(feature = "std", target_os = "linux")))] D: Domain,
> {
    first: PerCpuPtr<T::Item, D>,
    len: T::Len,
    owns: PhantomData<T>,
}

impl<T, D: Domain> PerCpu<T, D> {
    /// A variable of zero bytes on every CPU.
    ///
    /// ```
    /// use pcpu::PerCpu;
    /// use pcpu::unit::CpuId;
    /// use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
    ///
    /// let hits = PerCpu::<AtomicU32>::new()?;
    /// assert_eq!(hits.get(CpuId::new(0))?.load(Relaxed), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`AllocError`]; [`AllocError::ZeroSize`] for a type without size; [`AllocError::AlignTooLarge`] for one that is aligned
    /// further than the instance's units ([`max_align_bytes`](crate::PerCpuAllocator::max_align_bytes)): in a process 128
    /// bytes, or a page with [`page_geometry!`](crate::page_geometry!).
    pub fn new() -> Result<Self, AllocError>
    where
        T: FromZeros,
    {
        Ok(Self::owning(copies::zeroed(1)?, ()))
    }

    /// `N` variables of zero bytes on every CPU, all of them or none; cheaper than one by one.
    ///
    /// ```
    /// use pcpu::{CpuCell, LocalCell, PerCpu, RemoteCell};
    ///
    /// let [read, written] = PerCpu::<CpuCell<u64>>::new_many()?;
    /// written.add(512);
    /// assert_eq!((read.sum(), written.sum()), (0, 512));
    /// # Ok::<(), pcpu::AllocError>(())
    /// ```
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn new_many<const N: usize>() -> Result<[Self; N], AllocError>
    where
        T: FromZeros,
    {
        let firsts = alloc_percpu_many_in::<T, D, N>()?;
        Ok(firsts.map(|first| Self::owning(first, ())))
    }

    /// A variable with the copy that `init` makes for each possible CPU, in order of their numbers. All of them are
    /// made now, by the caller; in a process one more is among them, for the threads that the kernel's CPU numbers do
    /// not reach (`global::stray_unit`).
    ///
    /// This materialises all possible CPUs: see [the type](Self#cpus-that-never-ran).
    ///
    /// ```
    /// use pcpu::PerCpu;
    /// use pcpu::unit::CpuId;
    ///
    /// let seeds = PerCpu::<u64>::new_with(|cpu| 0x9e37_79b9 * (u64::from(cpu.get()) + 1))?;
    /// assert_eq!(*seeds.get(CpuId::new(0))?, 0x9e37_79b9);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`AllocError`]; nothing is left behind, but CPUs that have been materialised stay so.
    ///
    /// # Panics
    /// If `init` does; the copies made so far are dropped.
    pub fn new_with(mut init: impl FnMut(CpuId) -> T) -> Result<Self, AllocError> {
        let first = copies::made_by(1, |cpu, _| init(cpu))?;
        Ok(Self::owning(first, ()))
    }

    /// [`new_with`](Self::new_with), where making a copy may fail.
    ///
    /// ```
    /// use pcpu::{InitError, PerCpu};
    ///
    /// let refused = PerCpu::<u8>::try_new_with(|cpu| u8::try_from(cpu.get() + 256));
    /// assert!(matches!(refused, Err(InitError::Init { cpu, .. }) if cpu.get() == 0));
    /// ```
    ///
    /// # Errors
    /// [`InitError`]; the copies made so far are dropped.
    ///
    /// # Panics
    /// As [`new_with`](Self::new_with).
    pub fn try_new_with<E>(
        mut init: impl FnMut(CpuId) -> Result<T, E>,
    ) -> Result<Self, InitError<E>> {
        let first = copies::try_made_by(1, |cpu, _| init(cpu))?;
        Ok(Self::owning(first, ()))
    }

    /// Gives up ownership: neither drops nor frees anything. [`from_ptr`](Self::from_ptr) takes it up again.
    pub fn into_ptr(self) -> PerCpuPtr<T, D> {
        mem::ManuallyDrop::new(self).first
    }

    /// Takes ownership of a variable.
    ///
    /// ```
    /// use pcpu::{CpuCell, LocalCell, PerCpu, RemoteCell};
    ///
    /// let variable = PerCpu::<CpuCell<u32>>::new()?.into_ptr();
    /// // SAFETY: given up in the line before.
    /// let owner = unsafe { PerCpu::from_ptr(variable) };
    /// owner.add(3);
    /// assert_eq!(owner.sum(), 3);
    /// # Ok::<(), pcpu::AllocError>(())
    /// ```
    ///
    /// # Safety
    /// `variable` comes from [`into_ptr`](Self::into_ptr) for these `T` and `D`; or from an allocation for a `T` in `D`, and
    /// every materialised CPU's copy is a valid `T`, and all zero bytes are one if some CPU is not materialised. Nobody
    /// else frees it, or uses a copy in a way that a `&T` forbids.
    pub unsafe fn from_ptr(variable: PerCpuPtr<T, D>) -> Self {
        Self::owning(variable, ())
    }
}

impl<T: ?Sized + Shape, D: Domain> PerCpu<T, D> {
    fn owning(first: PerCpuPtr<T::Item, D>, len: T::Len) -> Self {
        Self {
            first,
            len,
            owns: PhantomData,
        }
    }

    /// The handle, of the first element for a slice. It is good for as long as the owner lives.
    #[inline]
    pub fn as_ptr(&self) -> PerCpuPtr<T::Item, D> {
        self.first
    }

    /// `cpu`'s copy. If `cpu` has no memory of its own yet it is brought up first, for a `T` can be changed through a
    /// shared reference; that may sleep. What only reads cells does without: [`RemoteCell`], [`iter`](Self::iter).
    ///
    /// # Errors
    /// [`CpuError`] if `cpu` is not possible, or is new and has no memory.
    #[inline]
    pub fn get(&self, cpu: CpuId) -> Result<&T, CpuError>
    where
        T: Sync,
    {
        let copy = self.materialised_copy(cpu)?;
        // SAFETY: the copy is a valid `T` for as long as the owner is borrowed, and it is `Sync`.
        Ok(unsafe { copy.as_ref() })
    }

    /// The current CPU's copy. By the time it is used the caller may run on another CPU: it is a copy that hardly anybody
    /// else uses, not one that nobody else uses.
    ///
    /// # Errors
    /// [`CpuError`] if the CPU is new and has no memory.
    #[inline]
    pub fn current(&self) -> Result<&T, CpuError>
    where
        T: Sync,
    {
        self.get(D::current_cpu())
    }

    /// `cpu`'s copy, for the only user of all copies. If `cpu` has no memory of its own yet it is brought up first; that
    /// may sleep.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn get_mut(&mut self, cpu: CpuId) -> Result<&mut T, CpuError> {
        let mut copy = self.materialised_copy(cpu)?;
        // SAFETY: the copy is a valid `T`, and nobody else has a reference to any of the copies.
        Ok(unsafe { copy.as_mut() })
    }

    /// The copies of the CPUs that have memory of their own: that ever worked on a copy, or were asked for. The copies
    /// of the others are what they were from the start: zero. So this is all that there is to add up, and it costs
    /// no memory.
    ///
    /// After [`new_with`](Self::new_with) these are all possible CPUs.
    pub fn iter(&self) -> impl Iterator<Item = (CpuId, &T)>
    where
        T: Sync,
    {
        // A CPU of this set needs no bringing up, and there is no other error.
        D::units()
            .materialised()
            .iter()
            .filter_map(|cpu| Some((cpu, self.get(cpu).ok()?)))
    }

    /// [`iter`](Self::iter), for the only user of all copies.
    ///
    /// ```
    /// use pcpu::{CpuCell, LocalCell, PerCpu, RemoteCell};
    ///
    /// let mut errors = PerCpu::<CpuCell<u64>>::new()?;
    /// errors.add(5);
    /// errors.iter_mut().for_each(|(_, copy)| *copy = CpuCell::new(0));
    /// assert_eq!(errors.sum(), 0);
    /// # Ok::<(), pcpu::AllocError>(())
    /// ```
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (CpuId, &mut T)> {
        let (first, len) = (self.first, self.len);
        D::units().materialised().iter().filter_map(move |cpu| {
            let mut copy = T::copy(per_cpu_ptr(first, cpu).ok()?, len);
            // SAFETY: the copy is a valid `T`; the owner is borrowed mutably, and every CPU's copy is lent once.
            Some((cpu, unsafe { copy.as_mut() }))
        })
    }

    /// The copies of any CPUs: the possible ones, the online ones, a cpuset. CPUs that have no memory of their own yet are
    /// brought up, as by [`get`](Self::get).
    ///
    /// ```
    /// use pcpu::{PerCpu, global};
    /// use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    ///
    /// let stop = PerCpu::<AtomicBool>::new()?;
    /// for copy in stop.iter_on(global().units().possible().iter()) {
    ///     let (_cpu, stop) = copy?;
    ///     stop.store(true, Relaxed);
    /// }
    /// assert!(stop.current()?.load(Relaxed));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Each item is an error where [`get`](Self::get) would return it.
    pub fn iter_on(
        &self,
        cpus: impl IntoIterator<Item = CpuId>,
    ) -> impl Iterator<Item = Result<(CpuId, &T), CpuError>>
    where
        T: Sync,
    {
        cpus.into_iter().map(|cpu| Ok((cpu, self.get(cpu)?)))
    }

    /// `cpu`'s copy, which may be written from now on.
    #[inline]
    fn materialised_copy(&self, cpu: CpuId) -> Result<NonNull<T>, CpuError> {
        if !D::units().materialised().contains(cpu) {
            D::bring_up(cpu)?;
        }
        Ok(T::copy(per_cpu_ptr(self.first, cpu)?, self.len))
    }
}

impl<T: ?Sized + Shape, D: Domain> Drop for PerCpu<T, D> {
    fn drop(&mut self) {
        // SAFETY: all copies are valid, zero where their CPU is not materialised, and not used after this.
        unsafe { Copies::whole(self.first, T::items(self.len)) }.finish();
    }
}

impl<T, D: Domain> Handle for PerCpu<T, D> {
    type Target = T;
    type Domain = D;

    #[inline]
    fn handle(&self) -> PerCpuPtr<T, D> {
        self.first
    }
}

// SAFETY: every possible CPU's copy is valid until the owner is dropped or moved, which no reference to it survives.
unsafe impl<T, D: Domain> Live for PerCpu<T, D> {}

impl<T: ?Sized + Shape, D: Domain> fmt::Debug for PerCpu<T, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerCpu")
            .field("first", &self.first)
            .field("len", &T::items(self.len))
            .finish()
    }
}
