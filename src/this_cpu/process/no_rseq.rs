//! Processors that restartable sequences are not written for: all operations take the slow way. In the place of `rseq`.

use core::sync::atomic::AtomicU32;

use super::super::{Change, Pair, Put, Word};
use super::Outcome;

/// There is no such way.
#[derive(Clone, Copy)]
pub(super) struct Way;

impl Way {
    pub(super) fn known() -> Self {
        Self
    }

    pub(super) fn now() -> Self {
        Self
    }
}

pub(super) fn detect(_stride_bytes: usize) -> bool {
    false
}

pub(super) fn stride_bytes() -> usize {
    0
}

pub(super) fn offset() -> isize {
    0
}

pub(super) fn adopt(_offset: isize, _stride_bytes: usize) {}

pub(super) fn raise_high_water(_cpu: u32) {}

pub(super) fn current_cpu() -> Option<u32> {
    None
}

pub(super) unsafe fn change<W: Word>(_way: Way, _at: usize, _change: Change<W>) -> bool {
    false
}

pub(super) unsafe fn fetch<W: Word>(_way: Way, _at: usize, _change: Change<W>) -> Option<W> {
    None
}

pub(super) unsafe fn read<W: Word>(_way: Way, _at: usize) -> Option<W> {
    None
}

pub(super) unsafe fn replace_pair(_way: Way, _at: usize, _old: Pair, _new: Pair) -> Option<Pair> {
    None
}

pub(super) unsafe fn read_pair(_way: Way, _at: usize) -> Option<Pair> {
    None
}

pub(super) unsafe fn push(_way: Way, _at: usize, _link: *mut usize) -> bool {
    false
}

pub(super) unsafe fn pop(_way: Way, _at: usize) -> Option<*mut usize> {
    None
}

pub(super) unsafe fn append(_at: usize, _from: *const u8, _bytes: usize, _room: usize) -> Outcome {
    Outcome::NoMemory
}

pub(super) unsafe fn take(_way: Way, _at: usize, _out: *mut u8) -> Option<usize> {
    None
}

pub(super) unsafe fn acquire(_way: Way, _at: usize, _owner: u64) -> Option<(*mut u64, u64)> {
    None
}

pub(super) unsafe fn add_within(_way: Way, _at: usize, _value: u64, _bound: u64) -> Outcome {
    Outcome::NoMemory
}

pub(super) unsafe fn add_gated(_way: Way, _at: usize, _value: u64, _gate: &AtomicU32) -> Outcome {
    Outcome::NoMemory
}

pub(super) unsafe fn take_slot(
    _way: Way,
    _at: usize,
    _class: u64,
    _class_mask: u64,
    _gate: &AtomicU32,
) -> Option<Option<Pair>> {
    None
}

pub(super) unsafe fn put_slot(
    _way: Way,
    _at: usize,
    _run: u64,
    _slot: u64,
    _gate: &AtomicU32,
) -> Option<Put> {
    None
}

pub(super) unsafe fn replace_pair_gated(
    _way: Way,
    _at: usize,
    _old: Pair,
    _new: Pair,
    _gate: &AtomicU32,
) -> Outcome {
    Outcome::NoMemory
}
