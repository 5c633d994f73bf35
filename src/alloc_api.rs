//! The calls that users make: handles, and the functions `alloc_percpu`, `free_percpu`, `per_cpu_ptr` and
//! `this_cpu_ptr`.
//!
//! A handle ([`PerCpuPtr`]) is a neutral address: no pointer to any CPU's copy, but what becomes one by adding a CPU's
//! unit offset. Static, module and dynamic variables are shifted by the same offset, so that one function serves them
//! all. A zero-sized [`Domain`] in its type says which instance a handle belongs to: handles of two instances cannot be
//! mixed up, and a handle needs no room for a pointer to its instance.

use core::cell::UnsafeCell;
use core::fmt;
use core::hash::{Hash, Hasher};
use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::num::NonZeroUsize;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU8, Ordering};

use lock_api::RawMutex;
use zerocopy::FromZeros;

use crate::allocator::{NotPut, PerCpuAllocator, Region};
use crate::backing::Backing;
use crate::cache::{Here, LockedSeat};
use crate::cpus::Units;
use crate::request::{AllocError, AllocFlags, CpuError, FreeError, FreeFlags, Request, SetupError};
use crate::this_cpu::LocalOps;
use crate::unit::CpuId;

mod many;

pub use many::{alloc_percpu_many_in, alloc_percpu_many_with, free_percpu_many};

/// Names an instance at compile time.
///
/// A Linux process has one ready: [`Global`]. A kernel makes its own, over a `static` [`Instance`]; the example makes
/// one over a simulated machine:
///
/// ```
/// use pcpu::backing::sim::{Machine, Sim};
/// use pcpu::unit::CpuId;
/// use pcpu::{Domain, Instance, PerCpuPtr, alloc_percpu_in, free_percpu, per_cpu_ptr};
///
/// static INSTANCE: Instance<Sim, parking_lot::RawMutex> = Instance::new();
///
/// enum Kernel {}
/// // SAFETY: `allocator` is always the same instance; CPU 0 is the only one here.
/// unsafe impl Domain for Kernel {
///     type Backing = Sim;
///     type Lock = parking_lot::RawMutex;
///     type Ops = pcpu::this_cpu::portable::Portable<Self>;
///     fn allocator() -> &'static pcpu::PerCpuAllocator<Sim, parking_lot::RawMutex> {
///         INSTANCE.get().expect("set up at boot")
///     }
///     fn current_cpu() -> CpuId {
///         CpuId::new(0)
///     }
/// }
///
/// INSTANCE.set_up(Machine::new(4).build()?)?;
/// let hits: PerCpuPtr<u64, Kernel> = alloc_percpu_in()?;
/// let copy = per_cpu_ptr(hits, CpuId::new(3))?;
/// // SAFETY: the copy is allocated, aligned and zero; nobody else uses it.
/// unsafe { *copy.as_ptr() += 1 };
/// // SAFETY: nobody uses the variable any more.
/// unsafe { free_percpu(hits)? };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Everything else in the crate reaches the instance through the functions that [`allocator`](Self::allocator) is only the
/// default of: in a library that is loaded at run time there is no allocator of its own, and a host answers them
/// ([`crate::module`](mod@crate::module)).
///
/// # Safety
/// [`allocator`](Self::allocator) always returns the same instance, and no other domain returns that one. `Ops` works on the
/// copies of this instance, and nothing works on them in another way. The functions with a default do for that instance what
/// the default does.
pub unsafe trait Domain: Sized + 'static {
    /// Where the instance's memory comes from.
    type Backing: Backing + 'static;
    /// The instance's lock.
    type Lock: RawMutex + 'static;
    /// How to work on the current CPU's copies; [`Portable`](crate::this_cpu::portable::Portable) always does.
    type Ops: LocalOps;

    /// The instance.
    fn allocator() -> &'static PerCpuAllocator<Self::Backing, Self::Lock>;

    /// The CPU that the caller runs on. It may be another one by the time the caller looks at the answer, unless
    /// something keeps it there.
    fn current_cpu() -> CpuId;

    /// Where the units lie, and which CPUs there are.
    #[inline]
    fn units() -> &'static Units {
        Self::allocator().units()
    }

    /// [`PerCpuAllocator::allocate_at`] the CPU that the caller is on. Where operations are right [on any
    /// copy](LocalOps::ON_ANY_COPY), a request that may sleep gives the CPU memory first if it has none and the instance has caches.
    ///
    /// # Errors
    /// As there.
    fn allocate(request: &Request) -> Result<usize, AllocError> {
        if Self::Ops::ON_ANY_COPY {
            let seat = locked_seat_for::<Self>(request);
            return Self::allocator().allocate_at(&seat, request);
        }
        // SAFETY: this is the domain's instance.
        let here = unsafe { Here::<Self>::new() };
        Self::allocator().allocate_at(&here, request)
    }

    /// [`PerCpuAllocator::allocate_many_at`] the CPU that the caller is on. No address is 0.
    ///
    /// # Errors
    /// As there.
    fn allocate_many(request: &Request, out: &mut [usize]) -> Result<(), AllocError> {
        if Self::Ops::ON_ANY_COPY {
            let seat = locked_seat_for::<Self>(request);
            return Self::allocator().allocate_many_at(&seat, request, out);
        }
        // SAFETY: this is the domain's instance.
        let here = unsafe { Here::<Self>::new() };
        Self::allocator().allocate_many_at(&here, request, out)
    }

    /// [`PerCpuAllocator::free_at`] the CPU that the caller is on.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn free(address: usize, flags: FreeFlags) -> Result<(), FreeError> {
        if Self::Ops::ON_ANY_COPY {
            // SAFETY: the promise of the caller.
            return unsafe { free_by_locked_steps::<Self>(address, flags) };
        }
        // SAFETY: the promise of the caller; this is the domain's instance.
        unsafe {
            let allocator = Self::allocator();
            match allocator.put_own_at(&Here::<Self>::new(), address, flags) {
                Ok(()) => Ok(()),
                Err(why) => free_past_own::<Self>(allocator, address, flags, why),
            }
        }
    }

    /// [`PerCpuAllocator::bring_up`].
    ///
    /// # Errors
    /// As there.
    fn bring_up(cpu: CpuId) -> Result<(), CpuError> {
        Self::allocator().bring_up(cpu)
    }

    /// The region that a neutral address lies in; `None` if it is none of this instance.
    fn region(neutral: usize) -> Option<Region> {
        Self::allocator().region(neutral)
    }
}

/// Frees where all steps are LOCKed.
///
/// # Safety
/// As [`Domain::free`].
#[inline(never)]
unsafe fn free_by_locked_steps<D: Domain>(
    address: usize,
    flags: FreeFlags,
) -> Result<(), FreeError> {
    // SAFETY: the promise of the caller.
    unsafe { D::allocator().free_at(&locked_seat::<D>(), address, flags) }
}

/// Frees what was not put back into a run of the CPU.
///
/// # Safety
/// As [`Domain::free`]; `allocator` is the domain's.
#[inline(never)]
pub(crate) unsafe fn free_past_own<D: Domain>(
    allocator: &PerCpuAllocator<D::Backing, D::Lock>,
    address: usize,
    flags: FreeFlags,
    why: NotPut,
) -> Result<(), FreeError> {
    // SAFETY: the promises of the caller.
    unsafe { allocator.free_past_own_at(&Here::<D>::new(), address, flags, why) }
}

/// The seat of the CPU that the caller is on, for a domain whose operations are right [on any
/// copy](LocalOps::ON_ANY_COPY).
#[inline(always)]
fn locked_seat<D: Domain>() -> LockedSeat {
    // SAFETY: it is for the domain's instance, whose operations are LOCKed steps.
    unsafe { LockedSeat::new(D::units(), D::current_cpu()) }
}

/// [`locked_seat`] for a request, which may have to wait until the CPU has memory.
#[inline(always)]
fn locked_seat_for<D: Domain>(request: &Request) -> LockedSeat {
    let seat = locked_seat::<D>();
    match seat.has_memory() {
        true => seat,
        false => locked_seat_after_bring_up::<D>(request),
    }
}

#[cold]
#[inline(never)]
fn locked_seat_after_bring_up<D: Domain>(request: &Request) -> LockedSeat {
    let hurry = AllocFlags::ATOMIC | AllocFlags::TRY;
    if D::allocator().has_caches() && !request.flags.intersects(hurry) {
        // Without memory it goes without its cache.
        _ = D::bring_up(D::current_cpu());
    }
    locked_seat::<D>()
}

/// The instance of a Linux process, made when it is first used: see [`mod@crate::global`].
#[derive(Debug, Clone, Copy)]
pub enum Global {}

/// A place for an instance in a `static`.
///
/// It is set up once, at run time, when the first chunk has been built. See [`Domain`] for an example.
pub struct Instance<B: Backing, R: RawMutex> {
    state: AtomicU8,
    value: UnsafeCell<MaybeUninit<PerCpuAllocator<B, R>>>,
}

const EMPTY: u8 = 0;
const WRITING: u8 = 1;
const READY: u8 = 2;

// SAFETY: the value is written once, by whoever changed `state` from EMPTY, and read only when `state` is READY.
unsafe impl<B: Backing + Send + Sync, R: RawMutex + Send + Sync> Sync for Instance<B, R> {}

impl<B: Backing, R: RawMutex> Instance<B, R> {
    /// A place without an instance.
    pub const fn new() -> Self {
        Self {
            state: AtomicU8::new(EMPTY),
            value: UnsafeCell::new(MaybeUninit::uninit()),
        }
    }

    /// Puts the instance in its place.
    ///
    /// # Errors
    /// [`SetupError::Again`] if there is one already; `allocator` is dropped then.
    pub fn set_up(&self, allocator: PerCpuAllocator<B, R>) -> Result<(), SetupError> {
        if self
            .state
            .compare_exchange(EMPTY, WRITING, Ordering::Relaxed, Ordering::Relaxed)
            .is_err()
        {
            return Err(SetupError::Again);
        }
        // SAFETY: nobody else writes (the exchange succeeded once), nobody reads before READY.
        unsafe { (*self.value.get()).write(allocator) };
        self.state.store(READY, Ordering::Release);
        Ok(())
    }

    /// The instance, or `None` before it is set up.
    #[inline]
    pub fn get(&self) -> Option<&PerCpuAllocator<B, R>> {
        match self.state.load(Ordering::Acquire) {
            // SAFETY: READY was stored after the value was written, and it is never written again.
            READY => Some(unsafe { (*self.value.get()).assume_init_ref() }),
            _ => None,
        }
    }
}

impl<B: Backing, R: RawMutex> Default for Instance<B, R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<B: Backing, R: RawMutex> Drop for Instance<B, R> {
    fn drop(&mut self) {
        if *self.state.get_mut() == READY {
            // SAFETY: written, and not used any more.
            unsafe { self.value.get_mut().assume_init_drop() };
        }
    }
}

impl<B: Backing, R: RawMutex> fmt::Debug for Instance<B, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Instance").field(&self.get()).finish()
    }
}

/// A handle to a per-CPU variable of type `T`: a nonzero neutral address in the instance of domain `D`.
///
/// It is no pointer, and following it is a fault. [`per_cpu_ptr`] makes one CPU's pointer of it. Like a raw pointer it
/// is `Copy`, may dangle, and carries no promise about `T`; unlike one it may be sent anywhere, for it gives no access.
#[must_use = "a dynamic variable that nobody has a handle to is never freed"]
#[repr(transparent)]
pub struct PerCpuPtr<T, D = Global> {
    address: NonZeroUsize,
    /// Neither owns a `T` nor depends on marker traits; belongs to `D`.
    marker: PhantomData<fn() -> (T, D)>,
}

impl<T, D> PerCpuPtr<T, D> {
    /// The handle at a neutral address, for instance one that [`PerCpuAllocator::allocate`] returned. `None` if it is 0.
    pub const fn from_neutral(address: usize) -> Option<Self> {
        match NonZeroUsize::new(address) {
            Some(address) => Some(Self {
                address,
                marker: PhantomData,
            }),
            None => None,
        }
    }

    /// The handle at a neutral address.
    ///
    /// # Safety
    /// The address is not 0.
    pub const unsafe fn from_neutral_unchecked(address: usize) -> Self {
        // SAFETY: the promise of the caller.
        let address = unsafe { NonZeroUsize::new_unchecked(address) };
        Self {
            address,
            marker: PhantomData,
        }
    }

    /// The neutral address.
    pub const fn neutral(self) -> usize {
        self.address.get()
    }

    /// The same address, taken for a variable of another type.
    pub const fn cast<U>(self) -> PerCpuPtr<U, D> {
        PerCpuPtr {
            address: self.address,
            marker: PhantomData,
        }
    }

    /// The handle `bytes` further, within the same area. `None` if the address space ends before.
    pub fn byte_add(self, bytes: usize) -> Option<Self> {
        self.address.checked_add(bytes).map(|address| Self {
            address,
            marker: PhantomData,
        })
    }
}

impl<T, D> Clone for PerCpuPtr<T, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, D> Copy for PerCpuPtr<T, D> {}

impl<T, D> PartialEq for PerCpuPtr<T, D> {
    fn eq(&self, other: &Self) -> bool {
        self.address == other.address
    }
}

impl<T, D> Eq for PerCpuPtr<T, D> {}

impl<T, D> Hash for PerCpuPtr<T, D> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.address.hash(state);
    }
}

impl<T, D> fmt::Debug for PerCpuPtr<T, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PerCpuPtr({:#x})", self.address)
    }
}

/// What has a handle: a handle itself, and every static per-CPU variable. It is what lets one [`per_cpu_ptr`] take a
/// symbol as well as a pointer.
pub trait Handle {
    /// The type of the variable.
    type Target;
    /// The instance that it belongs to.
    type Domain: Domain;

    /// The handle.
    fn handle(&self) -> PerCpuPtr<Self::Target, Self::Domain>;
}

impl<T, D: Domain> Handle for PerCpuPtr<T, D> {
    type Target = T;
    type Domain = D;

    #[inline]
    fn handle(&self) -> Self {
        *self
    }
}

impl<H: Handle + ?Sized> Handle for &H {
    type Target = H::Target;
    type Domain = H::Domain;

    #[inline]
    fn handle(&self) -> PerCpuPtr<H::Target, H::Domain> {
        (**self).handle()
    }
}

/// Allocates a variable in the instance of domain `D`: a `T` of zero bytes on every materialised CPU.
///
/// # Errors
/// [`AllocError`]; [`AllocError::ZeroSize`] for a type without size; [`AllocError::AlignTooLarge`] for one that is aligned
/// further than [`max_align_bytes`](PerCpuAllocator::max_align_bytes).
pub fn alloc_percpu_in<T: FromZeros, D: Domain>() -> Result<PerCpuPtr<T, D>, AllocError> {
    alloc_percpu_with(AllocFlags::empty())
}

/// [`alloc_percpu_in`] with flags. [`AllocFlags::NO_ZERO`] changes nothing: a `T` needs its zeroes. Memory that may hold anything is to
/// be had by [`alloc_percpu_bytes`].
///
/// # Errors
/// As [`alloc_percpu_in`].
pub fn alloc_percpu_with<T: FromZeros, D: Domain>(
    flags: AllocFlags,
) -> Result<PerCpuPtr<T, D>, AllocError> {
    let bytes = alloc_percpu_bytes::<D>(
        &Request::of::<T>().with_flags(flags.difference(AllocFlags::NO_ZERO)),
    )?;
    Ok(bytes.cast())
}

/// Allocates an area by size, alignment and flags in the instance of domain `D`.
///
/// # Errors
/// [`AllocError`].
pub fn alloc_percpu_bytes<D: Domain>(request: &Request) -> Result<PerCpuPtr<u8, D>, AllocError> {
    let address = D::allocate(request)?;
    // The window's base is no less than the address of the first chunk, and no mapping begins at 0.
    PerCpuPtr::from_neutral(address).ok_or(AllocError::Backing(
        crate::backing::BackingError::OutOfAddressSpace,
    ))
}

/// Frees a dynamic variable.
///
/// # Errors
/// [`FreeError`] if `variable` is none that can be freed, for one because it was freed already; nothing has changed.
///
/// # Safety
/// No copy of the variable is used any more, on any CPU; and it was allocated by the caller's side, not by an owner
/// that will free it itself.
pub unsafe fn free_percpu<T, D: Domain>(variable: PerCpuPtr<T, D>) -> Result<(), FreeError> {
    // SAFETY: the promise of the caller.
    unsafe { D::free(variable.neutral(), FreeFlags::empty()) }
}

/// [`free_percpu`] with flags.
///
/// # Errors
/// As [`free_percpu`].
///
/// # Safety
/// As [`free_percpu`].
pub unsafe fn free_percpu_with<T, D: Domain>(
    variable: PerCpuPtr<T, D>,
    flags: FreeFlags,
) -> Result<(), FreeError> {
    // SAFETY: the promise of the caller.
    unsafe { D::free(variable.neutral(), flags) }
}

/// Empties the caches of all CPUs of domain `D`, so that what was idle in them can be given back: before
/// [`trim`](PerCpuAllocator::trim), or when a CPU is to go. Where other CPUs' caches are out of reach, as in a kernel by %gs, it
/// empties that of the CPU that the caller is on: a CPU that goes offline calls it itself, when nothing allocates there any more.
/// Otherwise what is free in its cache lies idle until the CPU comes again.
///
/// It may sleep.
///
/// ```
/// use pcpu::{Domain, Global, PerCpu, drain_caches};
///
/// drop(PerCpu::<u64>::new()?);
/// drain_caches::<Global>();
/// Global::allocator().trim(0);
/// # Ok::<(), pcpu::AllocError>(())
/// ```
pub fn drain_caches<D: Domain>() {
    if D::Ops::ON_ANY_COPY {
        return D::allocator().drain(&locked_seat::<D>());
    }
    // SAFETY: this is the domain's instance.
    let here = unsafe { Here::<D>::new() };
    D::allocator().drain(&here);
}

/// `cpu`'s copy of a variable, static or dynamic.
///
/// The copy of a CPU that was never brought up ([`PerCpuAllocator::bring_up`]) may be read, and holds the initial value;
/// it must not be written.
///
/// # Errors
/// [`CpuError`] if `cpu` is not possible.
#[inline]
pub fn per_cpu_ptr<H: Handle>(variable: H, cpu: CpuId) -> Result<NonNull<H::Target>, CpuError> {
    // First of all, for it sets a process's instance up: a static variable's handle is right from then on.
    let units = H::Domain::units();
    let handle = variable.handle();
    let address = units.copy_of(handle.neutral(), cpu)?;
    Ok(non_null(address, handle.neutral()))
}

/// The current CPU's copy of a variable. By the time it is used the caller may run on another CPU, unless something keeps
/// it where it is.
///
/// On a CPU that has not been brought up it brings the CPU up, which may sleep (in a process it does not): not from an
/// interrupt then.
///
/// # Errors
/// [`CpuError`] if the CPU is not possible, or is new and has no memory.
#[inline]
pub fn this_cpu_ptr<H: Handle>(variable: H) -> Result<NonNull<H::Target>, CpuError> {
    let cpu = H::Domain::current_cpu();
    if !H::Domain::units().materialised().contains(cpu) {
        H::Domain::bring_up(cpu)?;
    }
    per_cpu_ptr(variable, cpu)
}

/// A pointer to a copy. Backings expose the provenance of their memory.
#[inline]
fn non_null<T>(address: usize, neutral: usize) -> NonNull<T> {
    // A copy at address 0 would need a unit there; a handle is never 0, so the fall-back is never taken.
    NonNull::new(ptr::with_exposed_provenance_mut(address)).unwrap_or(NonNull::without_provenance(
        NonZeroUsize::new(neutral).unwrap_or(NonZeroUsize::MIN),
    ))
}
