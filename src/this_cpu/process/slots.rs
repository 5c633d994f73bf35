//! The slow way of the operations on slots: on a CPU that has no memory yet, and by LOCKed steps where all steps are LOCKed.
//! A thread that is not registered does without: what is on the stray unit nobody could take away, for no gate closes it.

use core::sync::atomic::AtomicU32;

use super::rseq::{self, Way};
use super::{Detour, Outcome, ProcessOps};
use crate::this_cpu::{Change, Pair, Put, Word, locked, slots};

impl ProcessOps {
    /// Takes the fast way as soon as it is open, or LOCKed steps on a copy of which all others do LOCKed steps too, and
    /// nobody relies on a gate. `None` if the thread is not registered.
    fn slot_slowly<R>(
        at: usize,
        fast: impl Fn() -> Option<R>,
        locked: impl FnOnce(*mut Pair) -> R,
    ) -> Option<R> {
        loop {
            match Self::detour(at) {
                Detour::Retry => {
                    if let Some(result) = fast() {
                        return Some(result);
                    }
                }
                Detour::Locked(copy) => {
                    return Some(locked(core::ptr::with_exposed_provenance_mut(copy)));
                }
                Detour::Stray => return None,
            }
        }
    }

    #[cold]
    #[inline(never)]
    pub(super) unsafe fn peek_pair_slowly(at: usize) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::read_pair(Way::now(), at) };
        // SAFETY: the pair is live on every unit (promise of the caller), and all steps are LOCKed.
        let on_copy = |copy: *mut Pair| unsafe { locked::peek_pair(copy) };
        Self::slot_slowly(at, fast, on_copy)
    }

    #[cold]
    #[inline(never)]
    pub(super) unsafe fn peek_word_slowly(at: usize) -> Option<u64> {
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::read(Way::now(), at) };
        // SAFETY: the word is live on every unit (promise of the caller), and all steps are LOCKed.
        let on_copy = |copy: *mut Pair| unsafe { u64::load(copy.cast()) };
        Self::slot_slowly(at, fast, on_copy)
    }

    #[cold]
    #[inline(never)]
    pub(super) unsafe fn replace_word_slowly(at: usize, old: u64, new: u64) -> bool {
        let change = Change::Replace(old, new);
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::fetch(Way::now(), at, change) };
        // SAFETY: the word is live on every unit (promise of the caller), and all steps are LOCKed.
        let on_copy = |copy: *mut Pair| unsafe { u64::locked(copy.cast(), change) };
        Self::slot_slowly(at, fast, on_copy).is_some_and(|found| found == old)
    }

    #[cold]
    #[inline(never)]
    pub(super) unsafe fn take_slot_slowly(
        at: usize,
        class: u64,
        class_mask: u64,
        gate: &AtomicU32,
    ) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::take_slot(Way::now(), at, class, class_mask, gate) };
        // SAFETY: the pair is live on every unit (promise of the caller), and all steps are LOCKed.
        let on_copy = |copy: *mut Pair| unsafe { take_by_locked_steps(copy, class, class_mask) };
        Self::slot_slowly(at, fast, on_copy).flatten()
    }

    #[cold]
    #[inline(never)]
    pub(super) unsafe fn put_slot_slowly(at: usize, run: u64, slot: u64, gate: &AtomicU32) -> Put {
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::put_slot(Way::now(), at, run, slot, gate) };
        // SAFETY: the pair is live on every unit (promise of the caller), and all steps are LOCKed.
        let on_copy = |copy: *mut Pair| unsafe { put_by_locked_steps(copy, run, slot) };
        Self::slot_slowly(at, fast, on_copy).unwrap_or(Put::Elsewhere)
    }

    #[cold]
    #[inline(never)]
    pub(super) unsafe fn replace_pair_gated_slowly(
        at: usize,
        old: Pair,
        new: Pair,
        gate: &AtomicU32,
    ) -> bool {
        // SAFETY: the promise of the caller.
        let fast = || match unsafe { rseq::replace_pair_gated(Way::now(), at, old, new, gate) } {
            Outcome::Done => Some(true),
            Outcome::Refused => Some(false),
            Outcome::NoMemory => None,
        };
        // SAFETY: the pair is live on every unit (promise of the caller), and all steps are LOCKed.
        let on_copy = |copy: *mut Pair| unsafe { locked::is_replaced(copy, old, new) };
        Self::slot_slowly(at, fast, on_copy).unwrap_or(false)
    }
}

/// [`LocalOps::take_slot`](crate::this_cpu::LocalOps::take_slot) by LOCKed steps on a copy.
///
/// # Safety
/// As [`locked::replace_pair`].
unsafe fn take_by_locked_steps(copy: *mut Pair, class: u64, class_mask: u64) -> Option<Pair> {
    // SAFETY: the promise of the caller.
    let peek = || Some(unsafe { locked::peek_pair(copy) });
    // SAFETY: the promise of the caller.
    let replace = |old, new| unsafe { locked::replace_pair(copy, old, new) };
    slots::take_by_replacing(peek, replace, class, class_mask)
}

/// [`LocalOps::put_slot`](crate::this_cpu::LocalOps::put_slot) by LOCKed steps on a copy.
///
/// # Safety
/// As [`locked::replace_pair`].
unsafe fn put_by_locked_steps(copy: *mut Pair, run: u64, slot: u64) -> Put {
    // SAFETY: the promise of the caller.
    let peek = || Some(unsafe { locked::peek_pair(copy) });
    // SAFETY: the promise of the caller.
    let replace = |old, new| unsafe { locked::replace_pair(copy, old, new) };
    slots::put_by_replacing(peek, replace, run, slot)
}
