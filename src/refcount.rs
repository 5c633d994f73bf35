//! A reference count per CPU that can be killed: as fast as a per-CPU counter while the object is in service, exact once
//! it is being shut down. It is what Linux has in `lib/percpu-refcount.c`.
//!
//! A per-CPU count can't tell when it reaches zero: one CPU's copy may be negative while another's is positive. But as
//! long as an object is in service its owner holds a reference anyway, and nobody need ask. [`RefCount::kill`] gives that
//! reference up, refuses new ones, and switches to one shared count, on which zero is seen.
//!
//! ```text
//!            per CPU                                     shared
//!   get/put: copy[cpu] +-= 1  if gate == 0, tested       count +-= 1, LOCKed
//!            inside the section
//!                      kill: gate = 1
//!                            fence: every section in progress commits or begins anew and finds the gate closed
//!                            count |= KILLED             from here on no new references
//!                            count += sum of the copies - BIAS - 1
//! ```
//!
//! # Why no reference is lost and zero is seen once
//! 1. Every get and put is one indivisible step on one of two places: the commit of a section on a copy, or a LOCKed add
//!    on the shared count. Which of the two does not matter to the sum, so a reference may be taken in one and put in the
//!    other. *Number of references = count without KILLED - BIAS + sum of the copies*, until BIAS is taken out.
//! 2. A section commits only if it saw the gate open, in the section. The gate is closed for good before the fence. After
//!    the fence no section that saw it open is in progress, so the copies never change again, and the sum of them
//!    that is taken then is exact. It is added once: by the one killer that sets KILLED, whose own fence came before.
//! 3. Threads that have no sections (not registered with the kernel) could not test the gate and change a copy in one
//!    step. They never touch a copy: from the start they work on the shared count, which by 1 is right before, during and
//!    after the switch. The same holds for all threads where there are no restartable sequences or no fence: a count
//!    made there has no copies at all.
//! 4. BIAS is larger than any number of references. While it is in, no put brings the count to zero, whatever part of the
//!    references the copies hold. It is taken out, and the sum put in, and the first reference given up, by one LOCKed
//!    add: from then on the count is the number of references. It never rises from zero, for a new reference
//!    is refused under KILLED in the same step that tests it (a cmpxchg), and a clone needs a reference that is held. So
//!    exactly one add finds itself to have made it zero: a put or the kill.
//!
//! A failed fence (membarrier granted first, filtered later) leaves the gate closed and BIAS in: the count works on, shared,
//! and can be killed by another call.
//!
//! # Memory ordering
//! What a thread did while it held a reference happens before the release at zero. A put on the shared count is an
//! acquire-release add, and all of these are one release sequence. A put on a copy is ordered by the processor (x86: no
//! access moves below a later store) up to the killer's fence, which is a full barrier in every thread, and by the
//! killer's own add from there. A get orders nothing; a refused one sees what the killer did before the kill.
//!
//! # Cost
//! Get and put together take 2.0 ns on one thread per CPU, 5 ns shared (measured on 2 virtual CPUs, where a LOCKed add is
//! 2.0 ns and a clone and drop of an `Arc` 4.5). A kill is one `membarrier`, 0.5 to 8 us there, and a cache line per CPU
//! that was ever used. Sections read the gate, which lies in the [`RefCount`]: keep what is written often off its
//! cache line.

use core::fmt;

#[cfg(all(feature = "std", target_os = "linux"))]
use crate::alloc_api::Global;
use crate::alloc_api::{Domain, PerCpuPtr};
use crate::counter::deltas::Deltas;
use crate::request::AllocError;
use crate::sync::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed},
};
use crate::this_cpu::{CpuCell, FenceError, LocalOps};

/// Bit of the shared count: new references are refused.
const KILLED: u64 = 1 << 63;

/// In the shared count until it alone is the number of references. No program holds so many: it would take a century to
/// get them.
const BIAS: u64 = 1 << 62;

/// Values of the gate.
const OPEN: u32 = 0;
const CLOSED: u32 = 1;

/// What a kill did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kill {
    /// References are still held; the last put will find the count at zero.
    Held,
    /// No reference was held: the kill brought the count to zero.
    Zero,
    /// The count had been killed before. Nothing has changed.
    Again,
}

/// A reference count that calls a function when it reaches zero.
///
/// It starts with one reference, the owner's, which [`kill`](Self::kill) gives up. References are guards that borrow the
/// count; one that is to go anywhere needs a count that stays: in a `static`, or leaked.
///
/// ```
/// use pcpu::RefCount;
/// use pcpu::refcount::Kill;
/// use std::sync::mpsc;
///
/// let (sender, done) = mpsc::channel();
/// let users = RefCount::new(move || sender.send(()).unwrap())?;
/// let first = users.try_get().expect("in service");
/// let second = first.clone();
///
/// assert_eq!(users.kill()?, Kill::Held);
/// assert!(users.try_get().is_none());
/// drop(first);
/// assert!(done.try_recv().is_err());
/// drop(second);
/// done.try_recv()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Only the guards put, so a put without a get does not compile:
///
/// ```compile_fail
/// let users = pcpu::RefCount::new(|| {}).unwrap();
/// let user = users.try_get().unwrap();
/// drop(user);
/// drop(user);
/// ```
///
/// A count that is dropped unkilled calls nothing, nor does one of which a guard was forgotten.
pub struct RefCount<
    F: Fn(),
    #[cfg(all(feature = "std", target_os = "linux"))] D: Domain = Global,
    #[cfg(not(all(feature = "std", target_os = "linux")))] D: Domain,
> {
    count: RawRefCount<D>,
    on_zero: F,
}

#[cfg(all(feature = "std", target_os = "linux"))]
impl<F: Fn()> RefCount<F> {
    /// A count with one reference, the owner's, in the process's instance. `on_zero` is called once, by whoever brings
    /// the count to zero after a kill.
    ///
    /// # Errors
    /// [`AllocError`].
    pub fn new(on_zero: F) -> Result<Self, AllocError> {
        Self::new_in(on_zero)
    }
}

impl<F: Fn(), D: Domain> RefCount<F, D> {
    /// A count with one reference, the owner's, in the instance of domain `D`. `on_zero` is called once, by whoever brings
    /// the count to zero after a kill.
    ///
    /// # Errors
    /// [`AllocError`].
    pub fn new_in(on_zero: F) -> Result<Self, AllocError> {
        Ok(Self {
            count: RawRefCount::new_in()?,
            on_zero,
        })
    }

    /// Takes a reference, unless the count was killed.
    #[inline]
    #[must_use = "a reference that is dropped at once protects nothing"]
    pub fn try_get(&self) -> Option<Ref<'_, F, D>> {
        self.count.try_get().then(|| Ref { of: self })
    }

    /// Gives the owner's reference up. When this returns, new references are refused. If it was the last, the function
    /// is called.
    ///
    /// # Errors
    /// [`FenceError`] if the grace period can't be had any more; the count is not killed then, and stays shared.
    pub fn kill(&self) -> Result<Kill, FenceError> {
        // SAFETY: borrowed, so live throughout the call.
        let kill = unsafe { RawRefCount::kill(&raw const self.count) }?;
        if kill == Kill::Zero {
            (self.on_zero)();
        }
        Ok(kill)
    }

    /// Whether new references are refused.
    pub fn is_killed(&self) -> bool {
        self.count.is_killed()
    }

    /// Whether the count was killed and all references were put. The function may still be running.
    pub fn is_zero(&self) -> bool {
        self.count.is_zero()
    }

    /// The number of references, the owner's included; exact if none is taken or put meanwhile, and no kill in progress.
    pub fn references(&self) -> u64 {
        self.count.references()
    }
}

impl<F: Fn(), D: Domain> fmt::Debug for RefCount<F, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.count.fmt_as("RefCount", f)
    }
}

/// A reference; put when it is dropped, on whatever thread and CPU. A clone is another reference, also after the kill.
pub struct Ref<
    'a,
    F: Fn(),
    #[cfg(all(feature = "std", target_os = "linux"))] D: Domain = Global,
    #[cfg(not(all(feature = "std", target_os = "linux")))] D: Domain,
> {
    of: &'a RefCount<F, D>,
}

impl<F: Fn(), D: Domain> Clone for Ref<'_, F, D> {
    #[inline]
    fn clone(&self) -> Self {
        // SAFETY: `self` is a reference.
        unsafe { self.of.count.get() };
        Self { of: self.of }
    }
}

impl<F: Fn(), D: Domain> Drop for Ref<'_, F, D> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: borrowed, so live; the guard stands for one reference, which ends here.
        if unsafe { RawRefCount::put(&raw const self.of.count) } {
            (self.of.on_zero)();
        }
    }
}

impl<F: Fn(), D: Domain> fmt::Debug for Ref<'_, F, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ref").field(self.of).finish()
    }
}

/// The count without guards and without a function: for objects that are freed by their last reference.
///
/// `put` and `kill` take a pointer, for another thread may free the object as soon as they have given the reference up.
///
/// ```
/// use pcpu::refcount::{Kill, RawRefCount};
/// use std::ops::Deref;
/// use std::ptr::NonNull;
///
/// struct Inner<T> {
///     count: RawRefCount,
///     value: T,
/// }
///
/// /// As `Arc`, but cloning and dropping are local. The owner's reference must be dropped like any other, by `Owner`.
/// struct Shared<T>(NonNull<Inner<T>>);
/// struct Owner<T>(Shared<T>);
///
/// // SAFETY: as of `Arc`.
/// unsafe impl<T: Send + Sync> Send for Shared<T> {}
///
/// impl<T> Deref for Shared<T> {
///     type Target = T;
///     fn deref(&self) -> &T {
///         // SAFETY: `self` holds a reference, so the object is live.
///         unsafe { &self.0.as_ref().value }
///     }
/// }
///
/// impl<T> Clone for Shared<T> {
///     fn clone(&self) -> Self {
///         // SAFETY: `self` holds a reference.
///         unsafe { self.0.as_ref().count.get() };
///         Self(self.0)
///     }
/// }
///
/// impl<T> Drop for Shared<T> {
///     fn drop(&mut self) {
///         // SAFETY: `self` holds a reference; if it was the last, nobody else can reach the object.
///         unsafe {
///             if RawRefCount::put(&raw const (*self.0.as_ptr()).count) {
///                 drop(Box::from_raw(self.0.as_ptr()));
///             }
///         }
///     }
/// }
///
/// impl<T> Owner<T> {
///     fn new(value: T) -> Result<Self, pcpu::AllocError> {
///         let count = RawRefCount::new()?;
///         Ok(Self(Shared(NonNull::from(Box::leak(Box::new(Inner { count, value }))))))
///     }
/// }
///
/// impl<T> Drop for Owner<T> {
///     fn drop(&mut self) {
///         // The field `self.0` puts a reference of its own afterwards, so the object outlives this call.
///         // SAFETY: the owner holds the first reference; the clone stands for the one that is put after it.
///         unsafe {
///             let inner = self.0.0.as_ref();
///             inner.count.get();
///             let killed = RawRefCount::kill(&raw const inner.count);
///             assert_eq!(killed, Ok(Kill::Held));
///         }
///     }
/// }
///
/// let owner = Owner::new(String::from("settings"))?;
/// let shared = owner.0.clone();
/// let thread = std::thread::spawn(move || shared.len());
/// drop(owner);
/// assert_eq!(thread.join().unwrap(), 8);
/// # Ok::<(), pcpu::AllocError>(())
/// ```
pub struct RawRefCount<
    #[cfg(all(feature = "std", target_os = "linux"))] D: Domain = Global,
    #[cfg(not(all(feature = "std", target_os = "linux")))] D: Domain,
> {
    /// What was taken and put by gated adds; `None` where there are none.
    deltas: Option<Deltas<D>>,
    /// OPEN: gated adds may be made. Never opened again.
    gate: AtomicU32,
    /// KILLED, BIAS and the references that are not in `deltas`.
    shared: AtomicU64,
}

#[cfg(all(feature = "std", target_os = "linux"))]
impl RawRefCount {
    /// A count with one reference, the owner's, in the process's instance.
    ///
    /// # Errors
    /// [`AllocError`].
    pub fn new() -> Result<Self, AllocError> {
        Self::new_in()
    }
}

impl<D: Domain> RawRefCount<D> {
    /// A count with one reference, the owner's, in the instance of domain `D`.
    ///
    /// # Errors
    /// [`AllocError`].
    pub fn new_in() -> Result<Self, AllocError> {
        let deltas = if D::Ops::has_gates() {
            Some(Deltas::new()?)
        } else {
            None
        };
        Ok(Self {
            deltas,
            gate: AtomicU32::new(OPEN),
            shared: AtomicU64::new(BIAS + 1),
        })
    }

    /// Takes a reference, unless the count was killed; says whether it did.
    #[inline]
    #[must_use]
    pub fn try_get(&self) -> bool {
        Self::is_done_per_cpu(self.cells(), &self.gate, 1) || self.try_get_shared()
    }

    /// Takes one more reference.
    ///
    /// # Safety
    /// The caller holds a reference.
    #[inline]
    pub unsafe fn get(&self) {
        if !Self::is_done_per_cpu(self.cells(), &self.gate, 1) {
            self.shared.fetch_add(1, Relaxed);
        }
    }

    /// Gives a reference up. True if it was the last one, after a kill: nobody else knows of the object any more, and
    /// what all holders did happened before.
    ///
    /// # Safety
    /// The caller holds a reference that it has not given up, and so the object is live. Afterwards it may be gone.
    #[inline]
    #[must_use]
    pub unsafe fn put(this: *const Self) -> bool {
        // SAFETY: live (promise of the caller). Nothing but atomic words is borrowed while the reference is given up, and
        // nothing is used afterwards.
        unsafe {
            let cells = (*this).cells();
            !Self::is_done_per_cpu(cells, &(*this).gate, -1) && Self::put_shared(&(*this).shared)
        }
    }

    /// Gives the first reference up. When this returns, new references are refused.
    ///
    /// # Errors
    /// [`FenceError`] if the grace period can't be had any more; the count is not killed then, and stays shared.
    ///
    /// # Safety
    /// The object is live: the count was never killed, so that the first reference keeps it, or something else does during
    /// the call. After [`Kill::Held`] it may be gone.
    pub unsafe fn kill(this: *const Self) -> Result<Kill, FenceError> {
        // SAFETY: live until the first reference is given up (promise of the caller), which the last step does.
        unsafe {
            if (*this).is_killed() {
                return Ok(Kill::Again);
            }
            (*this).gate.store(CLOSED, Relaxed);
            if (*this).deltas.is_some() {
                D::Ops::wait_for_gated()?;
            }
            let shared = &(*this).shared;
            if shared.fetch_or(KILLED, AcqRel) & KILLED != 0 {
                return Ok(Kill::Again);
            }
            // The copies are at rest, and BIAS keeps puts from finding zero until this add.
            let counted = (*this).deltas.as_ref().map_or(0, Deltas::sum);
            let change = (counted as u64).wrapping_sub(BIAS + 1);
            let after = shared.fetch_add(change, AcqRel).wrapping_add(change);
            Ok(if after == KILLED {
                Kill::Zero
            } else {
                Kill::Held
            })
        }
    }

    /// Whether new references are refused.
    pub fn is_killed(&self) -> bool {
        self.shared.load(Acquire) & KILLED != 0
    }

    /// Whether the count was killed and all references were given up.
    pub fn is_zero(&self) -> bool {
        self.shared.load(Acquire) == KILLED
    }

    /// The number of references; exact if none is taken or given up meanwhile, and no kill in progress.
    pub fn references(&self) -> u64 {
        let shared = self.shared.load(Acquire);
        if shared & KILLED != 0 {
            return shared & !KILLED;
        }
        let counted = self.deltas.as_ref().map_or(0, Deltas::sum);
        shared.wrapping_sub(BIAS).wrapping_add(counted as u64)
    }

    #[inline(always)]
    fn cells(&self) -> Option<PerCpuPtr<CpuCell<i64>, D>> {
        self.deltas.as_ref().map(Deltas::cells)
    }

    /// Adds to the current CPU's copy, if there are copies and the gate is open.
    #[inline(always)]
    fn is_done_per_cpu(
        cells: Option<PerCpuPtr<CpuCell<i64>, D>>,
        gate: &AtomicU32,
        amount: i64,
    ) -> bool {
        // SAFETY: the cells are owned by the count, which is live in all callers when the step is made.
        cells
            .is_some_and(|cells| unsafe { D::Ops::add_gated(cells.neutral(), amount as u64, gate) })
    }

    #[inline(never)]
    fn try_get_shared(&self) -> bool {
        let count_one_more = |count| (count & KILLED == 0).then_some(count + 1);
        self.shared
            .fetch_update(Relaxed, Acquire, count_one_more)
            .is_ok()
    }

    #[inline(never)]
    fn put_shared(shared: &AtomicU64) -> bool {
        shared.fetch_sub(1, AcqRel) == KILLED + 1
    }

    fn fmt_as(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(name)
            .field("references", &self.references())
            .field("is_killed", &self.is_killed())
            .finish()
    }
}

impl<D: Domain> fmt::Debug for RawRefCount<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fmt_as("RawRefCount", f)
    }
}

#[cfg(all(loom, test))]
mod models;
