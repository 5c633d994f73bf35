//! Operations by LOCKed (indivisible) steps on the copy of the CPU that the caller was on a moment ago: right wherever
//! the caller is by then, and slower. For homes without restartable sequences, and for the simulated machine.

use core::marker::PhantomData;

use super::{Change, LocalOps, Pair, RemotePairs, Word, locked};
use crate::alloc_api::Domain;
use crate::backing::Backing;

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
    fn copy(at: usize) -> usize {
        let units = D::units();
        let cpu = D::current_cpu();
        let offset = if units.materialised().contains(cpu) || D::bring_up(cpu).is_ok() {
            units.offset(cpu)
        } else {
            let other = units.materialised().iter().next();
            other.and_then(|other| units.offset(other))
        };
        at.wrapping_add(offset.expect("no CPU has memory for its copies"))
    }

    fn relax() {
        D::allocator().backing().relax();
    }
}

// SAFETY: all changes are LOCKed steps, which are right on any copy; and no other operations work on copies of `D`, for
// a domain has one kind of operations.
unsafe impl<D: Domain> LocalOps for Portable<D> {
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

    unsafe fn peek_pair(at: usize) -> Option<Pair> {
        let copy = core::ptr::with_exposed_provenance(Self::copy(at));
        // SAFETY: the pair is live on every possible CPU (promise of the caller).
        Some(unsafe { locked::peek_pair(copy) })
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
