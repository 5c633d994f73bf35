//! The operations in a Linux process: by restartable sequences where the system has them, by LOCKed steps elsewhere
//! (an old glibc, another registrar, valgrind, other processors). Which of the two is found out once, when the process's
//! instance is set up, and never changes: the two do not mix on one copy.
//!
//! A thread that is not registered with the kernel (made by a raw `clone`, say) works on a copy of its own kind, the
//! *stray unit*, by LOCKed steps: the unit above those of the CPUs.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{
    Change, FenceError, LocalOps, Pair, Put, RemotePairs, Word, add_within_by_replacing, locked,
    pop_by_taking_all, push_by_replacing,
};
use crate::unit::CpuId;
use rseq::Way;

mod fence;
#[cfg(not(target_arch = "x86_64"))]
#[path = "process/no_rseq.rs"]
mod rseq;
#[cfg(target_arch = "x86_64")]
mod rseq;
mod slots;

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
    /// A LOCKed step on the copy at this address: all steps are LOCKed.
    Locked(usize),
    /// A LOCKed step on the stray unit: the thread is not registered.
    Stray,
}

impl ProcessOps {
    #[cold]
    fn detour(at: usize) -> Detour {
        let method = crate::global::method();
        assert!(
            !crate::static_var::is_without_place(at),
            "a static per-CPU variable is used before it is set up"
        );
        match method {
            Method::Locked => Detour::Locked(crate::global::current_copy(at)),
            Method::RestartableSequences if Self::open_fast_way() => Detour::Retry,
            Method::RestartableSequences => Detour::Stray,
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
            match unsafe { rseq::add_gated(Way::now(), at, value, gate) } {
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
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::fetch(Way::now(), at, change) };
        // SAFETY: the word is live on every unit (promise of the caller), and this copy is changed by LOCKed steps only.
        let on_copy = |copy: *mut u8| unsafe { W::locked(copy.cast(), change) };
        Self::slowly(at, fast, on_copy)
    }

    #[cold]
    #[inline(never)]
    unsafe fn read_slowly<W: Word>(at: usize) -> W {
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::read(Way::now(), at) };
        // SAFETY: the word is live on every unit (promise of the caller), and this copy is changed by LOCKed steps only.
        let on_copy = |copy: *mut u8| unsafe { W::load(copy.cast()) };
        Self::slowly(at, fast, on_copy)
    }

    /// Takes the fast way as soon as it is open, or LOCKed steps on a copy: one that is changed by LOCKed steps only.
    fn slowly<R>(at: usize, fast: impl Fn() -> Option<R>, locked: impl FnOnce(*mut u8) -> R) -> R {
        loop {
            match Self::detour(at) {
                Detour::Retry => {
                    if let Some(result) = fast() {
                        return result;
                    }
                }
                Detour::Locked(copy) => {
                    return locked(core::ptr::with_exposed_provenance_mut(copy));
                }
                Detour::Stray => {
                    let copy = crate::global::stray_copy(at);
                    return locked(core::ptr::with_exposed_provenance_mut(copy));
                }
            }
        }
    }

    #[cold]
    #[inline(never)]
    unsafe fn read_pair_slowly(at: usize) -> Pair {
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::read_pair(Way::now(), at) };
        // SAFETY: the pair is live on every unit (promise of the caller), and this copy is changed by LOCKed steps only.
        // Zeroes are replaced by zeroes.
        let on_copy = |copy: *mut u8| unsafe { locked::replace_pair(copy.cast(), [0; 2], [0; 2]) };
        Self::slowly(at, fast, on_copy)
    }

    #[cold]
    #[inline(never)]
    unsafe fn replace_pair_slowly(at: usize, old: Pair, new: Pair) -> Pair {
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::replace_pair(Way::now(), at, old, new) };
        // SAFETY: the pair is live on every unit (promise of the caller), and this copy is changed by LOCKed steps only.
        let on_copy = |copy: *mut u8| unsafe { locked::replace_pair(copy.cast(), old, new) };
        Self::slowly(at, fast, on_copy)
    }

    #[cold]
    #[inline(never)]
    unsafe fn append_slowly(
        at: usize,
        source: *const u8,
        bytes: usize,
        capacity_bytes: usize,
    ) -> bool {
        // SAFETY: the promise of the caller.
        let fast = || match unsafe { rseq::append(Way::now(), at, source, bytes, capacity_bytes) } {
            Outcome::Done => Some(true),
            Outcome::Refused => Some(false),
            Outcome::NoMemory => None,
        };
        let relax = std::thread::yield_now;
        // SAFETY: the buffer is live on every unit (promise of the caller), and this copy is worked on by LOCKed steps only.
        let on_copy = |copy: *mut u8| unsafe {
            locked::append(copy.cast(), source, bytes, capacity_bytes, relax)
        };
        Self::slowly(at, fast, on_copy)
    }

    #[cold]
    #[inline(never)]
    unsafe fn take_slowly(at: usize, out: *mut u8) -> usize {
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::take(Way::now(), at, out) };
        let relax = std::thread::yield_now;
        // SAFETY: the buffer is live on every unit (promise of the caller), and this copy is worked on by LOCKed steps only.
        let on_copy = |copy: *mut u8| unsafe { locked::take(copy.cast(), out, relax) };
        Self::slowly(at, fast, on_copy)
    }

    /// Takes the lock in the current CPU's copy, whose owner and gate are the first two words, if the gate is 0 and there
    /// is no owner. Results in the copy and in what the owner was: 0 says that it is taken, 1 that the gate is not 0.
    ///
    /// # Safety
    /// A lock lives at the neutral address `at`; its owner is only changed from 0 by this, or by LOCKed steps when the gate
    /// has been raised and [`LocalOps::wait_for_gated`] has returned.
    #[inline]
    pub(crate) unsafe fn acquire(at: usize, owner: u64) -> (*mut u64, u64) {
        // SAFETY: the promise of the caller.
        unsafe {
            rseq::acquire(Way::known(), at, owner)
                .unwrap_or_else(|| Self::acquire_slowly(at, owner))
        }
    }

    #[cold]
    #[inline(never)]
    unsafe fn acquire_slowly(at: usize, owner: u64) -> (*mut u64, u64) {
        // SAFETY: the promise of the caller.
        let fast = || unsafe { rseq::acquire(Way::now(), at, owner) };
        let on_copy = |copy: *mut u8| {
            let copy = copy.cast::<u64>();
            // SAFETY: the lock is live on every unit (promise of the caller). The owner of this copy is changed by LOCKed
            // steps only, so that its gate says nothing.
            let word = unsafe { AtomicU64::from_ptr(copy) };
            let taken = word.compare_exchange(0, owner, Ordering::Acquire, Ordering::Relaxed);
            (copy, taken.unwrap_or_else(|found| found))
        };
        Self::slowly(at, fast, on_copy)
    }

    #[cold]
    #[inline(never)]
    unsafe fn push_slowly(at: usize, link: *mut usize) {
        // SAFETY: the promise of the caller.
        unsafe { push_by_replacing::<Self>(at, link) }
    }

    #[cold]
    #[inline(never)]
    unsafe fn pop_slowly(at: usize) -> *mut usize {
        // SAFETY: the promise of the caller.
        unsafe { pop_by_taking_all::<Self>(at) }
    }
}

// SAFETY: a restartable sequence changes the copy of the CPU that it runs on as one step; where there is none, the copy
// is changed by LOCKed steps only: all copies without restartable sequences, the stray unit's with them. A gated operation
// is a restartable sequence or refused, or a LOCKed step where all steps are; the fence restarts those that have not
// committed, and orders memory as a full barrier of all threads does.
unsafe impl LocalOps for ProcessOps {
    #[inline(always)]
    unsafe fn read<W: Word>(at: usize) -> W {
        // SAFETY: the promise of the caller.
        unsafe { rseq::read(Way::known(), at).unwrap_or_else(|| Self::read_slowly(at)) }
    }

    #[inline(always)]
    unsafe fn change<W: Word>(at: usize, change: Change<W>) {
        // SAFETY: the promise of the caller.
        unsafe {
            if !rseq::change(Way::known(), at, change) {
                let (operation, first, second) = Operation::parts(change);
                Self::fetch_slowly(at, operation, first, second);
            }
        }
    }

    #[inline(always)]
    unsafe fn fetch<W: Word>(at: usize, change: Change<W>) -> W {
        // SAFETY: the promise of the caller.
        unsafe {
            rseq::fetch(Way::known(), at, change).unwrap_or_else(|| {
                let (operation, first, second) = Operation::parts(change);
                Self::fetch_slowly(at, operation, first, second)
            })
        }
    }

    #[inline(always)]
    unsafe fn read_pair(at: usize) -> Pair {
        // SAFETY: the promise of the caller.
        unsafe { rseq::read_pair(Way::known(), at).unwrap_or_else(|| Self::read_pair_slowly(at)) }
    }

    #[inline(always)]
    unsafe fn replace_pair(at: usize, old: Pair, new: Pair) -> Pair {
        // SAFETY: the promise of the caller.
        unsafe {
            rseq::replace_pair(Way::known(), at, old, new)
                .unwrap_or_else(|| Self::replace_pair_slowly(at, old, new))
        }
    }

    #[inline(always)]
    unsafe fn push(at: usize, link: *mut usize) {
        // SAFETY: the promise of the caller.
        unsafe {
            if !rseq::push(Way::known(), at, link) {
                Self::push_slowly(at, link);
            }
        }
    }

    #[inline(always)]
    unsafe fn pop(at: usize) -> *mut usize {
        // SAFETY: the promise of the caller.
        unsafe { rseq::pop(Way::known(), at).unwrap_or_else(|| Self::pop_slowly(at)) }
    }

    #[inline(always)]
    unsafe fn append(at: usize, source: *const u8, bytes: usize, capacity_bytes: usize) -> bool {
        // SAFETY: the promise of the caller.
        unsafe {
            match rseq::append(Way::known(), at, source, bytes, capacity_bytes) {
                Outcome::Done => true,
                Outcome::Refused => false,
                Outcome::NoMemory => Self::append_slowly(at, source, bytes, capacity_bytes),
            }
        }
    }

    #[inline(always)]
    unsafe fn take(at: usize, out: *mut u8) -> usize {
        // SAFETY: the promise of the caller.
        unsafe { rseq::take(Way::known(), at, out).unwrap_or_else(|| Self::take_slowly(at, out)) }
    }

    #[inline(always)]
    unsafe fn add_within(at: usize, value: u64, bound: u64) -> bool {
        // SAFETY: the promise of the caller.
        unsafe {
            match rseq::add_within(Way::known(), at, value, bound) {
                Outcome::Done => true,
                Outcome::Refused => false,
                Outcome::NoMemory => add_within_by_replacing::<Self>(at, value, bound),
            }
        }
    }

    #[inline(always)]
    unsafe fn take_slot(at: usize, class: u64, class_mask: u64, gate: &AtomicU32) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        unsafe {
            rseq::take_slot(Way::known(), at, class, class_mask, gate)
                .unwrap_or_else(|| Self::take_slot_slowly(at, class, class_mask, gate))
        }
    }

    #[inline(always)]
    unsafe fn put_slot(at: usize, run: u64, slot: u64, gate: &AtomicU32) -> Put {
        // SAFETY: the promise of the caller.
        unsafe {
            rseq::put_slot(Way::known(), at, run, slot, gate)
                .unwrap_or_else(|| Self::put_slot_slowly(at, run, slot, gate))
        }
    }

    #[inline(always)]
    unsafe fn replace_pair_gated(at: usize, old: Pair, new: Pair, gate: &AtomicU32) -> bool {
        // SAFETY: the promise of the caller.
        unsafe {
            match rseq::replace_pair_gated(Way::known(), at, old, new, gate) {
                Outcome::Done => true,
                Outcome::Refused => false,
                Outcome::NoMemory => Self::replace_pair_gated_slowly(at, old, new, gate),
            }
        }
    }

    #[inline(always)]
    unsafe fn peek_pair(at: usize) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        unsafe { rseq::read_pair(Way::known(), at).or_else(|| Self::peek_pair_slowly(at)) }
    }

    #[inline(always)]
    unsafe fn peek_word(at: usize) -> Option<u64> {
        // SAFETY: the promise of the caller.
        unsafe { rseq::read(Way::known(), at).or_else(|| Self::peek_word_slowly(at)) }
    }

    #[inline(always)]
    unsafe fn replace_word(at: usize, old: u64, new: u64) -> bool {
        // SAFETY: the promise of the caller.
        unsafe {
            match rseq::fetch(Way::known(), at, Change::Replace(old, new)) {
                Some(found) => found == old,
                None => Self::replace_word_slowly(at, old, new),
            }
        }
    }

    fn remote_pairs() -> RemotePairs {
        match crate::global::method() {
            Method::Locked => RemotePairs::ByLockedStep,
            Method::RestartableSequences if fence::is_granted() => RemotePairs::AfterFence,
            Method::RestartableSequences => RemotePairs::Never,
        }
    }

    #[inline(always)]
    unsafe fn add_gated(at: usize, value: u64, gate: &AtomicU32) -> bool {
        // SAFETY: the promise of the caller.
        unsafe {
            match rseq::add_gated(Way::known(), at, value, gate) {
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

/// Whether the code of the operations may be unmapped: whether they leave nothing behind that the kernel looks at.
pub(crate) const IS_UNLOADABLE: bool = cfg!(feature = "unloadable");

/// Where a thread's rseq area lies, from its thread pointer on; 0 if operations are LOCKed steps.
pub(crate) fn rseq_area() -> isize {
    match crate::global::method() {
        Method::RestartableSequences => rseq::offset(),
        Method::Locked => 0,
    }
}

/// From one CPU's copies to the next one's, in bytes; 0 if operations are LOCKed steps.
pub(crate) fn stride_bytes() -> usize {
    rseq::stride_bytes()
}

/// Does the operations as another copy of this crate in the process does them, given its [`rseq_area`] and
/// [`stride_bytes`]; all of them the slow way if the first is 0.
pub(crate) fn adopt(rseq_area: isize, stride_bytes: usize) {
    rseq::adopt(rseq_area, stride_bytes);
}

/// Finds out how operations are done on units that are `stride_bytes` apart. To be called once, before any operation.
pub(crate) fn detect(stride_bytes: usize) -> Method {
    if rseq::detect(stride_bytes) {
        Method::RestartableSequences
    } else {
        Method::Locked
    }
}
