//! The operations in an x86_64 kernel: one instruction with the %gs prefix.
//!
//! The GS base of every CPU is the CPU's unit offset, the distance from the template to its unit. So `gs:[handle]` is
//! the current CPU's copy of a static and of a dynamic variable alike, and no operation asks which CPU it runs on:
//!
//! ```text
//!   inc qword ptr gs:[rip + COUNT]     a static variable: its handle is its address, which the linker knows
//!   add qword ptr gs:[rdi], rax        a dynamic one: its handle is in a register
//! ```
//! An interrupt comes before or after an instruction, a migration too: no operation needs a guard, nor masks
//! interrupts, nor locks the bus. Where no instruction does the whole (an exchange, a fetch-and-or), a `cmpxchg` without
//! LOCK is tried until nothing came in between; `xchg` itself locks the bus, prefix or not. To take a node off a stack, and
//! all that is done to a buffer, takes several steps with interrupts masked: not for NMI handlers.
//!
//! What always holds: one access to the copy per instruction, through %gs; nothing here reads the GS base.

use core::fmt;
use core::hint::spin_loop;
use core::marker::PhantomData;
use core::ptr;

use super::{Change, LocalOps, Pair, Word, locked};
use crate::alloc_api::Domain;

mod irq_lock;
mod masked;
mod pair;
#[macro_use]
mod place;
mod statics;

pub use irq_lock::IrqLock;
pub use masked::Masked;
pub use pair::replace_pair;
pub use place::Place;
pub use statics::{CacheLine, KernelStatic, Page, Plain, Template};

/// A domain of a kernel whose CPUs have their unit's offset in the base of the GS segment.
///
/// ```
/// # use pcpu::backing::sim::Sim;
/// # use pcpu::unit::CpuId;
/// # use pcpu::{Domain, Instance, PerCpuAllocator};
/// use pcpu::this_cpu::gs::{Gs, GsDomain};
///
/// enum Kernel {}
/// # static INSTANCE: Instance<Sim, parking_lot::RawMutex> = Instance::new();
/// // SAFETY: `allocator` is always the same instance.
/// unsafe impl Domain for Kernel {
///     type Ops = Gs<Self>;
///     // ...
/// #   type Backing = Sim;
/// #   type Lock = parking_lot::RawMutex;
/// #   fn allocator() -> &'static PerCpuAllocator<Sim, parking_lot::RawMutex> {
/// #       INSTANCE.get().expect("set up at boot")
/// #   }
/// #   fn current_cpu() -> CpuId {
/// #       CpuId::new(0)
/// #   }
/// }
/// // SAFETY: every CPU loads its GS base before it runs anything else, and entries from user mode change it back.
/// unsafe impl GsDomain for Kernel {}
/// ```
///
/// # Safety
/// Wherever code runs that works on copies of this domain, interrupt and NMI handlers included:
/// - it runs in ring 0;
/// - the GS base is the [unit offset](crate::cpus::Units::offset) of the CPU, in this domain's instance;
/// - the CPU is [materialised](crate::PerCpuAllocator::bring_up): its copies have memory.
///
/// Before the instance exists that holds of the offset in the [`FirstChunk`](crate::unit::FirstChunk). And the linker
/// places the static variables of [`define_per_cpu_in!`](crate::define_per_cpu_in) as that macro says.
pub unsafe trait GsDomain: Domain<Ops = Gs<Self>> {}

/// The operations of a kernel's domain, by %gs.
#[derive(Clone, Copy)]
pub struct Gs<D>(PhantomData<fn() -> D>);

impl<D> fmt::Debug for Gs<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gs")
    }
}

/// A copy whose neutral address is in a register.
#[derive(Debug, Clone, Copy)]
struct At(usize);

// SAFETY: each method is the instruction that it is named after, on the copy at the neutral address.
unsafe impl Place for At {
    crate::gs_place!("gs:[{place}]", |this| in(reg) this.0);
}

// SAFETY: an operation is one instruction on the copy that the GS base of the CPU leads to (promise of `GsDomain`), or
// ends with a `cmpxchg` that changes the copy only if it is as it was.
unsafe impl<D: GsDomain> LocalOps for Gs<D> {
    #[inline(always)]
    unsafe fn read<W: Word>(at: usize) -> W {
        // SAFETY: the promise of the caller.
        unsafe { At(at).load() }
    }

    #[inline(always)]
    unsafe fn change<W: Word>(at: usize, change: Change<W>) {
        // SAFETY: the promise of the caller.
        unsafe { At(at).change(change) }
    }

    #[inline(always)]
    unsafe fn fetch<W: Word>(at: usize, change: Change<W>) -> W {
        // SAFETY: the promise of the caller.
        unsafe { At(at).fetch(change) }
    }

    #[inline(always)]
    unsafe fn inc<W: Word>(at: usize) {
        // SAFETY: the promise of the caller.
        unsafe { At(at).inc::<W>() }
    }

    #[inline(always)]
    unsafe fn dec<W: Word>(at: usize) {
        // SAFETY: the promise of the caller.
        unsafe { At(at).dec::<W>() }
    }

    #[inline(always)]
    unsafe fn replace_pair(at: usize, old: Pair, new: Pair) -> Pair {
        // SAFETY: the promise of the caller.
        match unsafe { replace_pair(at, old, new) } {
            Ok(()) => old,
            Err(found) => found,
        }
    }

    #[inline(always)]
    unsafe fn peek_pair(at: usize) -> Option<Pair> {
        // SAFETY: the promise of the caller. An interrupt, or another CPU, may come in between.
        Some(unsafe { [At(at).load(), At(at + 8).load()] })
    }

    #[inline]
    unsafe fn pop(at: usize) -> *mut usize {
        // Interrupts take nodes off this stack too: one whose link is being read stays.
        // SAFETY: in ring 0 (promise of the domain), and dropped before anything else.
        let _masked = unsafe { Masked::new() };
        // SAFETY: the promise of the caller; the first node's link is the next node.
        unsafe {
            let first = ptr::with_exposed_provenance_mut::<usize>(At(at).load::<u64>() as usize);
            if !first.is_null() {
                At(at).change(Change::Set(first.read() as u64));
            }
            first
        }
    }

    #[inline]
    unsafe fn append(at: usize, source: *const u8, bytes: usize, capacity_bytes: usize) -> bool {
        // SAFETY: in ring 0 (promise of the domain), and dropped before anything else.
        let _masked = unsafe { Masked::new() };
        // SAFETY: the promise of the caller; the buffer is live on every CPU.
        unsafe { locked::append(copy::<D>(at), source, bytes, capacity_bytes, spin_loop) }
    }

    #[inline]
    unsafe fn take(at: usize, out: *mut u8) -> usize {
        // SAFETY: in ring 0 (promise of the domain), and dropped before anything else.
        let _masked = unsafe { Masked::new() };
        // SAFETY: the promise of the caller; the buffer is live on every CPU.
        unsafe { locked::take(copy::<D>(at), out, spin_loop) }
    }
}

/// The copy of the CPU that the caller stays on.
fn copy<D: GsDomain>(at: usize) -> *mut u64 {
    // A CPU that runs is possible.
    let offset = D::units().offset(D::current_cpu()).unwrap_or(0);
    ptr::with_exposed_provenance_mut(at.wrapping_add(offset))
}
