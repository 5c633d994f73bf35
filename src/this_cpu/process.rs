//! The operations in a Linux process: by restartable sequences where the system has them, by LOCKed steps elsewhere
//! (an old glibc, another registrar, valgrind, other processors). Which of the two is found out once, when the process's
//! instance is set up, and never changes: the two do not mix on one copy.
//!
//! A thread that is not registered with the kernel (made by a raw `clone`, say) works on a copy of its own kind, the
//! *stray unit*, by LOCKed steps: the unit above those of the CPUs.

use core::sync::atomic::AtomicU32;

use super::{Change, FenceError, LocalOps, Word, add_within_by_replacing};
use crate::unit::CpuId;

mod fence;
#[cfg(target_arch = "x86_64")]
mod rseq;

/// Without restartable sequences: all operations take the slow way.
#[cfg(not(target_arch = "x86_64"))]
mod rseq {
    use core::sync::atomic::AtomicU32;

    use super::super::{Change, Word};
    use super::Outcome;

    pub(super) fn detect() -> bool {
        false
    }

    pub(super) fn raise_high_water(_cpu: u32) {}

    pub(super) fn current_cpu() -> Option<u32> {
        None
    }

    pub(super) unsafe fn change<W: Word>(_at: usize, _change: Change<W>) -> bool {
        false
    }

    pub(super) unsafe fn fetch<W: Word>(_at: usize, _change: Change<W>) -> Option<W> {
        None
    }

    pub(super) unsafe fn read<W: Word>(_at: usize) -> Option<W> {
        None
    }

    pub(super) unsafe fn add_within(_at: usize, _value: u64, _bound: u64) -> Outcome {
        Outcome::NoMemory
    }

    pub(super) unsafe fn add_gated(_at: usize, _value: u64, _gate: &AtomicU32) -> Outcome {
        Outcome::NoMemory
    }
}

/// How the process's operations are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// Restartable sequences: no LOCKed instruction.
    RestartableSequences,
    /// LOCKed steps.
    Locked,
}

/// The operations of a Linux process.
#[derive(Debug, Clone, Copy)]
pub enum ProcessOps {}

/// The kind of a [`Change`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Set,
    Add,
    And,
    Or,
    Xor,
    Replace,
}

impl Operation {
    /// The kind and the operands of a change; the second is the first again where there is only one.
    #[inline(always)]
    fn parts<W: Copy>(change: Change<W>) -> (Self, W, W) {
        match change {
            Change::Set(value) => (Self::Set, value, value),
            Change::Add(value) => (Self::Add, value, value),
            Change::And(value) => (Self::And, value, value),
            Change::Or(value) => (Self::Or, value, value),
            Change::Xor(value) => (Self::Xor, value, value),
            Change::Replace(old, new) => (Self::Replace, old, new),
        }
    }

    /// The change of this kind with these operands.
    fn with<W>(self, first: W, second: W) -> Change<W> {
        match self {
            Self::Set => Change::Set(first),
            Self::Add => Change::Add(first),
            Self::And => Change::And(first),
            Self::Or => Change::Or(first),
            Self::Xor => Change::Xor(first),
            Self::Replace => Change::Replace(first, second),
        }
    }
}

/// What became of an operation with a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It is done.
    Done,
    /// The condition did not hold.
    Refused,
    /// The slow way must be taken: the thread is on no CPU that has memory.
    NoMemory,
}

/// What an operation that could not take the fast way does instead.
enum Detour {
    /// Try the fast way again: the CPU has memory now.
    Retry,
    /// A LOCKed step on the copy at this address.
    Locked(usize),
}

impl ProcessOps {
    #[cold]
    fn detour(at: usize) -> Detour {
        let method = crate::global::method();
        assert!(
            !crate::static_var::is_too_early(at),
            "a static per-CPU variable is used before it is set up"
        );
        match method {
            Method::Locked => Detour::Locked(crate::global::current_copy(at)),
            Method::RestartableSequences if Self::open_fast_way() => Detour::Retry,
            Method::RestartableSequences => Detour::Locked(crate::global::stray_copy(at)),
        }
    }

    /// Gives the CPU that the caller runs on memory, so that the fast way is open. False if the thread is not registered.
    #[cold]
    fn open_fast_way() -> bool {
        match rseq::current_cpu() {
            Some(cpu) if crate::global::materialise_up_to(CpuId::new(cpu)) => {
                rseq::raise_high_water(cpu);
                true
            }
            _ => false,
        }
    }

    #[cold]
    #[inline(never)]
    unsafe fn add_gated_slowly(at: usize, value: u64, gate: &AtomicU32) -> bool {
        while Self::open_fast_way() {
            // SAFETY: the promise of the caller.
            match unsafe { rseq::add_gated(at, value, gate) } {
                Outcome::Done => return true,
                Outcome::Refused => return false,
                Outcome::NoMemory => {}
            }
        }
        // A LOCKed step on the stray unit would be one step, and the test of the gate another.
        false
    }

    /// Operands come one by one, so that a caller need not put them into memory for a call that it hardly ever makes.
    #[cold]
    #[inline(never)]
    unsafe fn fetch_slowly<W: Word>(at: usize, operation: Operation, first: W, second: W) -> W {
        let change = operation.with(first, second);
        loop {
            match Self::detour(at) {
                Detour::Retry => {
                    // SAFETY: the promise of the caller.
                    if let Some(before) = unsafe { rseq::fetch(at, change) } {
                        return before;
                    }
                }
                Detour::Locked(copy) => {
                    let copy = core::ptr::with_exposed_provenance_mut(copy);
                    // SAFETY: the word is live on every unit; this copy is changed by LOCKed steps only.
                    return unsafe { W::locked(copy, change) };
                }
            }
        }
    }

    #[cold]
    #[inline(never)]
    unsafe fn read_slowly<W: Word>(at: usize) -> W {
        loop {
            match Self::detour(at) {
                Detour::Retry => {
                    // SAFETY: the promise of the caller.
                    if let Some(value) = unsafe { rseq::read(at) } {
                        return value;
                    }
                }
                Detour::Locked(copy) => {
                    // SAFETY: the word is live on every unit.
                    return unsafe { W::load(core::ptr::with_exposed_provenance(copy)) };
                }
            }
        }
    }
}

// SAFETY: a restartable sequence changes the copy of the CPU that it runs on as one step; where there is none, the copy
// is changed by LOCKed steps only: all copies without restartable sequences, the stray unit's with them. A gated add is a
// restartable sequence or refused; the fence restarts those that have not committed, and orders memory as a full barrier
// of all threads does.
unsafe impl LocalOps for ProcessOps {
    #[inline(always)]
    unsafe fn read<W: Word>(at: usize) -> W {
        // SAFETY: the promise of the caller.
        unsafe { rseq::read(at).unwrap_or_else(|| Self::read_slowly(at)) }
    }

    #[inline(always)]
    unsafe fn change<W: Word>(at: usize, change: Change<W>) {
        // SAFETY: the promise of the caller.
        unsafe {
            if !rseq::change(at, change) {
                let (operation, first, second) = Operation::parts(change);
                Self::fetch_slowly(at, operation, first, second);
            }
        }
    }

    #[inline(always)]
    unsafe fn fetch<W: Word>(at: usize, change: Change<W>) -> W {
        // SAFETY: the promise of the caller.
        unsafe {
            rseq::fetch(at, change).unwrap_or_else(|| {
                let (operation, first, second) = Operation::parts(change);
                Self::fetch_slowly(at, operation, first, second)
            })
        }
    }

    #[inline(always)]
    unsafe fn add_within(at: usize, value: u64, bound: u64) -> bool {
        // SAFETY: the promise of the caller.
        unsafe {
            match rseq::add_within(at, value, bound) {
                Outcome::Done => true,
                Outcome::Refused => false,
                Outcome::NoMemory => add_within_by_replacing::<Self>(at, value, bound),
            }
        }
    }

    fn has_gates() -> bool {
        crate::global::method() == Method::RestartableSequences && fence::is_granted()
    }

    #[inline(always)]
    unsafe fn add_gated(at: usize, value: u64, gate: &AtomicU32) -> bool {
        // SAFETY: the promise of the caller.
        unsafe {
            match rseq::add_gated(at, value, gate) {
                Outcome::Done => true,
                Outcome::Refused => false,
                Outcome::NoMemory => Self::add_gated_slowly(at, value, gate),
            }
        }
    }

    fn wait_for_gated() -> Result<(), FenceError> {
        fence::restart_all()
    }
}

/// Finds out how operations are done. To be called once, before any operation.
pub(crate) fn detect() -> Method {
    if rseq::detect() {
        Method::RestartableSequences
    } else {
        Method::Locked
    }
}
