//! Staying on a CPU: a guard for what takes longer than one operation, in a kernel that can disable preemption.
//!
//! The operations of [`LocalCell`](super::LocalCell) need no guard: each is one step. A guard is for references: a `&T` to
//! the current CPU's copy is worth something only as long as the CPU stays the current one.
//!
//! | Linux | here |
//! |---|---|
//! | `this_cpu_add(v, n)`, `raw_cpu_add(v, n)` | `V.add(n)`: one instruction, right on whatever CPU it runs |
//! | `__this_cpu_add(v, n)` | `V.checked().add(n)`: the same, and a debug build panics where preemption is enabled |
//! | `get_cpu()`, `put_cpu()` | [`Pinned::new`], its drop |
//! | `get_cpu_ptr(&v)` | [`Pinned::of`] |
//! | `this_cpu_ptr(&v)` | [`this_cpu_ptr`](crate::this_cpu_ptr)`(V.checked())` |
//! | `raw_cpu_ptr(&v)` | [`this_cpu_ptr`](crate::this_cpu_ptr)`(V)` |

use core::fmt;
use core::marker::PhantomData;

use super::{Live, pass_on_words};
use crate::alloc_api::{Domain, Handle, PerCpuPtr};
use crate::unit::CpuId;

/// A domain whose kernel can keep the caller on its CPU.
///
/// # Safety
/// From [`disable_preemption`](Self::disable_preemption) to the matching [`enable_preemption`](Self::enable_preemption) the
/// caller stays on the CPU that [`current_cpu`](Domain::current_cpu) names. That CPU is
/// [materialised](crate::PerCpuAllocator::bring_up).
pub unsafe trait Preemption: Domain {
    /// Keeps the caller on its CPU. Calls nest.
    fn disable_preemption();

    /// Ends what the last [`disable_preemption`](Self::disable_preemption) began.
    ///
    /// # Safety
    /// The caller disabled preemption, and has not enabled it for that yet.
    unsafe fn enable_preemption();

    /// Whether the caller stays on its CPU: preemption is disabled, or the caller is an interrupt handler, or interrupts are
    /// masked.
    fn is_preemption_disabled() -> bool;
}

/// While it lives, the caller stays on its CPU.
///
/// ```
/// use pcpu::this_cpu::pinned::{Pinned, Preemption};
/// use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
/// # use pcpu::backing::sim::{Machine, Sim};
/// # use pcpu::this_cpu::portable::Portable;
/// # use pcpu::unit::CpuId;
/// # use pcpu::{Domain, Instance, PerCpu, PerCpuAllocator};
/// # enum Kernel {}
/// # static INSTANCE: Instance<Sim, parking_lot::RawMutex> = Instance::new();
/// # // SAFETY: `allocator` is always the same instance.
/// # unsafe impl Domain for Kernel {
/// #     type Ops = Portable<Self>;
/// #     type Backing = Sim;
/// #     type Lock = parking_lot::RawMutex;
/// #     fn allocator() -> &'static PerCpuAllocator<Sim, parking_lot::RawMutex> {
/// #         INSTANCE.get().expect("set up at boot")
/// #     }
/// #     fn current_cpu() -> CpuId {
/// #         CpuId::new(1)
/// #     }
/// # }
/// # static DEPTH: AtomicU32 = AtomicU32::new(0);
/// # INSTANCE.set_up(Machine::new(2).build()?)?;
///
/// // SAFETY: this kernel does not migrate a task whose count is not 0.
/// unsafe impl Preemption for Kernel {
///     fn disable_preemption() {
///         DEPTH.fetch_add(1, Relaxed);
///     }
///     unsafe fn enable_preemption() {
///         DEPTH.fetch_sub(1, Relaxed);
///     }
///     fn is_preemption_disabled() -> bool {
///         DEPTH.load(Relaxed) != 0
///     }
/// }
///
/// let hits = PerCpu::<AtomicU32, Kernel>::new()?;
/// let pinned = Pinned::<Kernel>::new();
/// pinned.of(&hits).fetch_add(1, Relaxed);
/// assert_eq!(hits.get(pinned.cpu())?.load(Relaxed), 1);
/// # assert!(Kernel::is_preemption_disabled());
/// # drop(pinned);
/// # assert!(!Kernel::is_preemption_disabled());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A reference ends with the guard, or with the owner:
///
/// ```compile_fail,E0505
/// # use pcpu::PerCpu;
/// # use pcpu::this_cpu::pinned::{Pinned, Preemption};
/// # use std::sync::atomic::AtomicU32;
/// fn too_long<K: Preemption>(pinned: Pinned<K>, hits: &PerCpu<AtomicU32, K>) -> u32 {
///     let here = pinned.of(hits);
///     drop(pinned);
///     here.load(std::sync::atomic::Ordering::Relaxed)
/// }
/// ```
/// ```compile_fail,E0505
/// # use pcpu::PerCpu;
/// # use pcpu::this_cpu::pinned::{Pinned, Preemption};
/// # use std::sync::atomic::AtomicU32;
/// fn too_long<K: Preemption>(pinned: &Pinned<K>, hits: PerCpu<AtomicU32, K>) -> u32 {
///     let here = pinned.of(&hits);
///     drop(hits);
///     here.load(std::sync::atomic::Ordering::Relaxed)
/// }
/// ```
/// The guard stays on its CPU, and a reference is to what CPUs may share:
///
/// ```compile_fail,E0277
/// # use pcpu::this_cpu::pinned::{Pinned, Preemption};
/// fn is_send<T: Send>() {}
/// fn check<K: Preemption>() {
///     is_send::<Pinned<K>>();
/// }
/// ```
/// ```compile_fail,E0277
/// # use pcpu::this_cpu::pinned::{Pinned, Preemption};
/// fn is_sync<T: Sync>() {}
/// fn check<K: Preemption>() {
///     is_sync::<Pinned<K>>();
/// }
/// ```
/// ```compile_fail,E0277
/// # use pcpu::PerCpu;
/// # use pcpu::this_cpu::pinned::{Pinned, Preemption};
/// fn of_cell<K: Preemption>(pinned: &Pinned<K>, cell: &PerCpu<std::cell::Cell<u32>, K>) {
///     pinned.of(cell);
/// }
/// ```
pub struct Pinned<D: Preemption> {
    cpu: CpuId,
    offset: usize,
    /// Neither `Send` nor `Sync`.
    on_this_cpu: PhantomData<*mut D>,
}

impl<D: Preemption> Pinned<D> {
    /// Keeps the caller on the CPU that it runs on.
    ///
    /// # Panics
    /// If the domain names a current CPU that is not possible, against its promise.
    #[inline]
    #[must_use = "the caller stays on its CPU only while the guard lives"]
    pub fn new() -> Self {
        D::disable_preemption();
        let cpu = D::current_cpu();
        let offset = D::allocator().units().offset(cpu);
        Self {
            cpu,
            offset: offset.expect("a CPU that runs is possible"),
            on_this_cpu: PhantomData,
        }
    }

    /// The CPU.
    #[inline]
    pub fn cpu(&self) -> CpuId {
        self.cpu
    }

    /// The CPU's copy of a variable.
    #[inline]
    pub fn of<'a, V>(&'a self, variable: &'a V) -> &'a V::Target
    where
        V: Live<Domain = D> + ?Sized,
        V::Target: Sync,
    {
        let address = variable.handle().neutral().wrapping_add(self.offset);
        // SAFETY: the variable is live as long as it is borrowed, and initialised on every possible CPU; this one is
        // materialised (promise of `Preemption`), so that its copy may be changed; it is only ever shared.
        unsafe { &*core::ptr::with_exposed_provenance(address) }
    }
}

impl<D: Preemption> Default for Pinned<D> {
    fn default() -> Self {
        Self::new()
    }
}

impl<D: Preemption> Drop for Pinned<D> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: disabled in `new`, and enabled for that here only.
        unsafe { D::enable_preemption() };
    }
}

impl<D: Preemption> fmt::Debug for Pinned<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pinned").field(&self.cpu).finish()
    }
}

/// A variable of which the caller says that preemption is disabled when it is used: see [`PreemptionChecked`].
#[derive(Debug)]
pub struct Checked<'a, V: ?Sized>(&'a V);

/// Operations that are meant for code that stays on its CPU, because several of them belong together.
pub trait PreemptionChecked: Live<Domain: Preemption> {
    /// The variable, for operations on the CPU that the caller stays on.
    ///
    /// # Panics
    /// In a debug build, if preemption is enabled.
    #[inline]
    #[track_caller]
    fn checked(&self) -> Checked<'_, Self> {
        debug_assert!(
            Self::Domain::is_preemption_disabled(),
            "an operation for code that stays on its CPU, but preemption is enabled"
        );
        Checked(self)
    }
}

impl<V: Live<Domain: Preemption> + ?Sized> PreemptionChecked for V {}

impl<V: Live + ?Sized> Handle for Checked<'_, V> {
    type Target = V::Target;
    type Domain = V::Domain;

    #[inline]
    fn handle(&self) -> PerCpuPtr<V::Target, V::Domain> {
        self.0.handle()
    }
}

// SAFETY: the variable is borrowed, and live as long; all is passed on to it.
unsafe impl<V: Live + ?Sized> Live for Checked<'_, V> {
    pass_on_words!(this => this.0);
}
