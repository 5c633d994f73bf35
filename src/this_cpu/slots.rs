//! Slots of a *run*: up to 32 places of one kind, of which a CPU's own unit holds who is free, so that its CPU takes and puts
//! them without a lock.
//!
//! A run is a pair, aligned to 16 bytes, on every CPU:
//! ```text
//! word 0   bits  0..32   MAP: which slots are free; 1 = free
//!          bit   32      FRESH: none was put since the run was opened
//!          bits 33..63   how many were taken since the run was opened
//!          bit  63       FULL: that count has overflowed; no slot is taken any more
//! word 1                 what run it is, constant while the run is open; 0 if there is none
//! ```
//! Word 0 changes with every slot that is taken or put ([`LocalOps::take_slot`](super::LocalOps::take_slot),
//! [`put_slot`](super::LocalOps::put_slot)); runs are opened and closed by changes of both words
//! ([`replace_pair_gated`](super::LocalOps::replace_pair_gated)). What a thread did with a slot before it put it, happened
//! before whatever is done by the thread that takes it.
//!
//! Here is what a step makes of a pair, and the way that takes it by looking first and replacing then.

use core::sync::atomic::{Ordering, fence};

use super::Pair;

/// In word 0: which slots are free.
pub const MAP: u64 = 0xffff_ffff;

/// In word 0: no slot was put since the run was opened.
pub const FRESH: u64 = 1 << 32;

/// What each slot that is taken adds to word 0.
pub const ONE_TAKEN: u64 = 1 << 33;

/// In word 0: the count of slots taken has overflowed.
pub const FULL: u64 = 1 << 63;

/// What became of a slot that was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Put {
    /// It is free in the current CPU's run.
    Done,
    /// It was free already: whoever puts it does so for the second time. Nothing has changed.
    WasFree,
    /// The run is not the current CPU's, or must be left alone now: the slot has to be given back in another way. Nothing has
    /// changed.
    Elsewhere,
}

/// How a CPU may change another CPU's copy of a pair that its own CPU changes by gated operations.
///
/// ```
/// use pcpu::this_cpu::{LocalOps, RemotePairs};
/// use pcpu::{Domain, Global};
///
/// type Ops = <Global as Domain>::Ops;
/// assert_eq!(Ops::has_gates(), Ops::remote_pairs() == RemotePairs::AfterFence);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RemotePairs {
    /// Not at all.
    Never,
    /// By plain stores, one thread at a time, from when the gate was raised and then
    /// [`wait_for_gated`](super::LocalOps::wait_for_gated) has returned, until the gate is opened by a store that releases.
    AfterFence,
    /// At any time, by [`replace_remote_pair`](super::LocalOps::replace_remote_pair). Gates are not looked at. A CPU that has
    /// no copy of its own works on another's.
    ByLockedStep,
}

/// The pair without its lowest free slot; `None` if it is not of the class or none can be taken.
#[inline(always)]
fn without_lowest([slots, run]: Pair, class: u64, class_mask: u64) -> Option<Pair> {
    let can_take = slots & MAP != 0 && run & class_mask == class && slots & FULL == 0;
    can_take.then(|| [(slots & (slots - 1)) + ONE_TAKEN, run])
}

/// Takes a slot: looks by `peek`, and commits by `replace`, which results in what the pair was.
#[inline(always)]
pub(crate) fn take_by_replacing(
    peek: impl FnOnce() -> Option<Pair>,
    replace: impl Fn(Pair, Pair) -> Pair,
    class: u64,
    class_mask: u64,
) -> Option<Pair> {
    let mut old = peek()?;
    // Most often it is that none is left.
    if old[0] & MAP == 0 {
        return None;
    }
    loop {
        let new = without_lowest(old, class, class_mask)?;
        let found = replace(old, new);
        if found == old {
            // What was done with the slot before it was put.
            fence(Ordering::Acquire);
            return Some(old);
        }
        old = found;
    }
}

/// Puts a slot, in the same way.
#[inline(always)]
pub(crate) fn put_by_replacing(
    peek: impl FnOnce() -> Option<Pair>,
    replace: impl Fn(Pair, Pair) -> Pair,
    run: u64,
    slot: u64,
) -> Put {
    let Some(mut old) = peek() else {
        return Put::Elsewhere;
    };
    // What was done with the slot is seen by whoever takes it.
    fence(Ordering::Release);
    loop {
        if old[1] != run {
            return Put::Elsewhere;
        }
        let was_free = old[0] & slot != 0;
        // The halves of a pair that was only looked at may be of two runs: an error is told of if the pair is really so.
        let new = match was_free {
            true => old,
            false => [(old[0] | slot) & !FRESH, run],
        };
        let found = replace(old, new);
        match (found == old, was_free) {
            (true, false) => return Put::Done,
            (true, true) => return Put::WasFree,
            (false, _) => old = found,
        }
    }
}

/// Whether `replace` has found the pair to be `old`, and so has replaced it. Orders memory as taking and putting slots
/// does: whoever opens a run puts its slots, whoever closes one takes them.
#[inline(always)]
pub(crate) fn replace_by(replace: impl FnOnce() -> Pair, old: Pair) -> bool {
    fence(Ordering::Release);
    let is_replaced = replace() == old;
    fence(Ordering::Acquire);
    is_replaced
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use super::*;

    const RUN: u64 = 7;

    /// Takes what is looked at first from `seen`, and works on `copy` from then on.
    fn put(seen: Pair, copy: &Cell<Pair>, slot: u64) -> Put {
        let replace = |old, new| {
            let found = copy.get();
            if found == old {
                copy.set(new);
            }
            found
        };
        put_by_replacing(|| Some(seen), replace, RUN, slot)
    }

    /// The map of the run before and the name of this one, seen together, say nothing about a slot.
    #[test]
    fn a_slot_was_free_only_if_the_pair_is_so() {
        let copy = Cell::new([FRESH | 0b10, RUN]);
        assert_eq!(put([0b01, RUN], &copy, 0b01), Put::Done);
        assert_eq!(copy.get(), [0b11, RUN]);
        assert_eq!(put([0, RUN], &copy, 0b01), Put::WasFree);
        assert_eq!(put([0b11, RUN], &copy, 0b10), Put::WasFree);
        assert_eq!(put([0b11, RUN + 1], &copy, 0b100), Put::Elsewhere);
        assert_eq!(copy.get(), [0b11, RUN]);
        copy.set([0b100, RUN + 1]);
        assert_eq!(put([0b11, RUN], &copy, 0b10), Put::Elsewhere);
        assert_eq!(copy.get(), [0b100, RUN + 1]);
    }
}
