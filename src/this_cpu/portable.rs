//! Operations by LOCKed (indivisible) steps on the copy of the CPU that the caller was on a moment ago: right wherever
//! the caller is by then, and slower. For homes without restartable sequences, and for the simulated machine.

use crate::sync::AtomicU32;
use core::marker::PhantomData;

use super::{Change, LocalOps, Pair, Put, RemotePairs, Word, locked, slots};
use crate::alloc_api::Domain;
use crate::backing::Backing;
use crate::unit::CpuId;

/// LOCKed steps on the copies of domain `D`.
#[derive(Debug, Clone, Copy)]
pub struct Portable<D>(PhantomData<D>);

impl<D: Domain> Portable<D> {
    /// The address of the copy that the caller is to work on.
    ///
    /// Where there is no memory for the CPU's own copy (or the CPU is none that is possible, the domain's error) another's
    /// serves, for LOCKed steps are right on any copy that has memory.
    ///
    /// # Panics
    /// If no CPU has memory.
    #[inline]
    fn copy(at: usize) -> usize {
        let cpu = D::current_cpu();
        let offset = D::units().materialised_offset(cpu);
        at.wrapping_add(offset.unwrap_or_else(|| Self::offset_without_memory(cpu)))
    }

    /// What leads to the copy that serves a CPU which has had no memory so far.
    #[cold]
    #[inline(never)]
    fn offset_without_memory(cpu: CpuId) -> usize {
        let units = D::units();
        let offset = if D::bring_up(cpu).is_ok() {
            units.offset(cpu)
        } else {
            let other = units.materialised().iter().next();
            other.and_then(|other| units.offset(other))
        };
        offset.expect("no CPU has memory for its copies")
    }

    /// The copy of the CPU that the caller was on, if it has memory. It gets none here: slots and stashes are worked on by the
    /// allocator itself, with its lock held and in contexts that must not sleep.
    #[inline]
    fn own_copy(at: usize) -> Option<*mut Pair> {
        let cpu = D::current_cpu();
        let offset = D::units().materialised_offset(cpu)?;
        Some(core::ptr::with_exposed_provenance_mut(
            at.wrapping_add(offset),
        ))
    }

    fn relax() {
        D::allocator().backing().relax();
    }
}

// SAFETY: all changes are LOCKed steps, which are right on any copy; and no other operations work on copies of `D`, for
// a domain has one kind of operations.
unsafe impl<D: Domain> LocalOps for Portable<D> {
    const ON_ANY_COPY: bool = true;

    unsafe fn read<W: Word>(at: usize) -> W {
        // SAFETY: the word is live on every possible CPU (promise of the caller).
        unsafe { W::load(core::ptr::with_exposed_provenance(Self::copy(at))) }
    }

    unsafe fn change<W: Word>(at: usize, change: Change<W>) {
        // SAFETY: the promise of the caller.
        unsafe { Self::fetch(at, change) };
    }

    unsafe fn fetch<W: Word>(at: usize, change: Change<W>) -> W {
        // SAFETY: the word is live on every possible CPU, and changed by such steps only (promise of the caller).
        unsafe {
            W::locked(
                core::ptr::with_exposed_provenance_mut(Self::copy(at)),
                change,
            )
        }
    }

    unsafe fn replace_pair(at: usize, old: Pair, new: Pair) -> Pair {
        let copy = core::ptr::with_exposed_provenance_mut(Self::copy(at));
        // SAFETY: the pair is live on every possible CPU, and changed by such steps only (promise of the caller).
        unsafe { locked::replace_pair(copy, old, new) }
    }

    unsafe fn take_slot(at: usize, class: u64, class_mask: u64, _gate: &AtomicU32) -> Option<Pair> {
        let copy = Self::own_copy(at)?;
        // SAFETY: the pair is live on every CPU that has memory (promise of the caller).
        let peek = || Some(unsafe { locked::peek_pair(copy) });
        // SAFETY: as above, and changed by such steps only.
        let replace = |old, new| unsafe { locked::replace_pair(copy, old, new) };
        slots::take_by_replacing(peek, replace, class, class_mask)
    }

    unsafe fn put_slot(at: usize, run: u64, slot: u64, _gate: &AtomicU32) -> Put {
        let Some(copy) = Self::own_copy(at) else {
            return Put::Elsewhere;
        };
        // SAFETY: as in `take_slot`.
        let peek = || Some(unsafe { locked::peek_pair(copy) });
        // SAFETY: as in `take_slot`.
        let replace = |old, new| unsafe { locked::replace_pair(copy, old, new) };
        slots::put_by_replacing(peek, replace, run, slot)
    }

    unsafe fn replace_pair_gated(at: usize, old: Pair, new: Pair, _gate: &AtomicU32) -> bool {
        // SAFETY: as in `take_slot`.
        Self::own_copy(at).is_some_and(|copy| unsafe { locked::is_replaced(copy, old, new) })
    }

    unsafe fn peek_pair(at: usize) -> Option<Pair> {
        // SAFETY: as in `take_slot`.
        Self::own_copy(at).map(|copy| unsafe { locked::peek_pair(copy) })
    }

    unsafe fn peek_word(at: usize) -> Option<u64> {
        // SAFETY: the word is live on every CPU that has memory (promise of the caller).
        Self::own_copy(at).map(|copy| unsafe { u64::load(copy.cast()) })
    }

    unsafe fn replace_word(at: usize, old: u64, new: u64) -> bool {
        let change = Change::Replace(old, new);
        // SAFETY: as in `peek_word`, and changed by such steps only.
        Self::own_copy(at).is_some_and(|copy| unsafe { u64::locked(copy.cast(), change) == old })
    }

    fn remote_pairs() -> RemotePairs {
        RemotePairs::ByLockedStep
    }

    unsafe fn append(at: usize, source: *const u8, bytes: usize, capacity_bytes: usize) -> bool {
        let copy = core::ptr::with_exposed_provenance_mut(Self::copy(at));
        // SAFETY: the buffer is live on every possible CPU, and worked on in this way only (promise of the caller).
        unsafe { locked::append(copy, source, bytes, capacity_bytes, Self::relax) }
    }

    unsafe fn take(at: usize, out: *mut u8) -> usize {
        let copy = core::ptr::with_exposed_provenance_mut(Self::copy(at));
        // SAFETY: as in `append`.
        unsafe { locked::take(copy, out, Self::relax) }
    }
}
