//! Operations on the current CPU's copy of a variable, without a lock and without a LOCKed instruction where the home has
//! the means.
//!
//! A scalar that is changed this way is a [`CpuCell`]. Each operation is one step as far as its CPU is concerned:
//! neither an interrupt (or a signal), nor a migration to another CPU, nor another thread there can come between its
//! parts. Towards other CPUs it is no atomic operation: they may read the copy ([`CpuCell::read_remote`], which does
//! not tear), but never write it. That is why a `CpuCell` lends nobody a `&T`, and why no safe operation writes to
//! another CPU's copy.
//!
//! Two words that change together are a [`CpuPair`]; nodes that hang on each other a [`CpuStack`]; items that pile up
//! until somebody takes them a [`CpuBuffer`].
//!
//! How it is done depends on the home, which a [`Domain`] names by its [`LocalOps`]: [`process`] for a
//! Linux process, [`gs`] for an x86_64 kernel. Operations on words are relaxed: they order no
//! other memory access. What is pushed or appended was written before it is popped or taken.

use core::fmt;
use core::ptr;
use core::sync::atomic::{Ordering, fence};

use crate::alloc_api::{Domain, Handle};
use crate::sync::AtomicU32;

mod buffer;
mod cell;
#[cfg(target_arch = "x86_64")]
pub mod gs;
pub(crate) mod locked;
mod pair;
pub mod pinned;
pub mod portable;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod process;
pub mod slots;
mod stack;
mod word;

pub use buffer::{CpuBuffer, Full, LocalBuffer, append_all, take};
pub use cell::{
    CpuCell, LocalCell, add, add_return, and, cmpxchg, dec, inc, or, read, sub, write, xchg, xor,
};
pub use pair::{CpuPair, LocalPair, cmpxchg_pair, read_pair};
pub use slots::{Put, RemotePairs};
pub use stack::{Chain, CpuStack, Link, LocalStack, Node, NodePointer, pop, pop_all, push};
pub use word::{Change, Scalar, Word};

/// Two words side by side.
pub type Pair = [u64; 2];

/// How a home works on the current CPU's copy of a word, given its neutral address.
///
/// # Safety
/// Every operation finds the caller's CPU and changes that CPU's copy as one step, or changes a copy that no CPU
/// changes otherwise than by LOCKed steps. Where [`ON_ANY_COPY`](Self::ON_ANY_COPY) is set it is LOCKed steps everywhere, and
/// [`remote_pairs`](Self::remote_pairs) is [`RemotePairs::ByLockedStep`].
pub unsafe trait LocalOps {
    /// Whether every operation is a LOCKed step, right on any copy that has memory: then a request finds the caller's CPU once,
    /// and does all its steps on that CPU's copies ([`LockedSeat`](crate::cache::LockedSeat)), wherever the caller is by then.
    const ON_ANY_COPY: bool = false;

    /// The current CPU's copy.
    ///
    /// # Safety
    /// A word lives at the neutral address `at`, aligned, in the instance of the domain.
    unsafe fn read<W: Word>(at: usize) -> W;

    /// Changes the current CPU's copy, and forgets what it was.
    ///
    /// # Safety
    /// As [`read`](Self::read), and the word is changed by these operations only.
    unsafe fn change<W: Word>(at: usize, change: Change<W>);

    /// Changes the current CPU's copy; returns what it was.
    ///
    /// # Safety
    /// As [`change`](Self::change).
    unsafe fn fetch<W: Word>(at: usize, change: Change<W>) -> W;

    /// Adds 1 to the current CPU's copy, wrapping.
    ///
    /// # Safety
    /// As [`change`](Self::change).
    #[inline]
    unsafe fn inc<W: Word>(at: usize) {
        // SAFETY: the promise of the caller.
        unsafe { Self::change(at, Change::Add(W::narrow(1))) }
    }

    /// Subtracts 1 from the current CPU's copy, wrapping.
    ///
    /// # Safety
    /// As [`change`](Self::change).
    #[inline]
    unsafe fn dec<W: Word>(at: usize) {
        // SAFETY: the promise of the caller.
        unsafe { Self::change(at, Change::Add(W::narrow(1).wrapping_neg())) }
    }

    /// Adds to the current CPU's copy, a signed number, if that leaves it at `bound` or less from 0. False if not; then
    /// nothing has changed.
    ///
    /// # Safety
    /// As [`change`](Self::change).
    #[inline]
    unsafe fn add_within(at: usize, value: u64, bound: u64) -> bool {
        // SAFETY: the promise of the caller.
        unsafe { add_within_by_replacing::<Self>(at, value, bound) }
    }

    /// The current CPU's copy of a pair; not torn.
    ///
    /// # Safety
    /// As [`replace_pair`](Self::replace_pair).
    #[inline]
    unsafe fn read_pair(at: usize) -> Pair {
        // SAFETY: the promise of the caller. Zeroes are replaced by zeroes.
        unsafe { Self::replace_pair(at, [0; 2], [0; 2]) }
    }

    /// Replaces the current CPU's copy of a pair, by one store, if it is `old`; returns what it was.
    ///
    /// # Safety
    /// A pair lives at the neutral address `at`, aligned to 16 bytes, and is changed by these operations only.
    unsafe fn replace_pair(at: usize, old: Pair, new: Pair) -> Pair;

    /// Puts a node onto the current CPU's copy of a stack, a word with the address of the first link. A link holds the
    /// address of the next one, or 0.
    ///
    /// # Safety
    /// As [`change`](Self::change), and the stack is changed by [`push`](Self::push), [`pop`](Self::pop) and `Set(0)` only.
    /// `link` is the caller's, stays where it is, and is only touched by these operations until it is taken off.
    #[inline]
    unsafe fn push(at: usize, link: *mut usize) {
        // SAFETY: the promise of the caller.
        unsafe { push_by_replacing::<Self>(at, link) }
    }

    /// Takes the last node off the current CPU's copy of a stack. Null if there is none to be had now: the stack is empty, or
    /// somebody else is in the middle of taking one, in a home where that takes more than one step.
    ///
    /// # Safety
    /// As [`change`](Self::change), and all links come from [`push`](Self::push).
    #[inline]
    unsafe fn pop(at: usize) -> *mut usize {
        // SAFETY: the promise of the caller.
        unsafe { pop_by_taking_all::<Self>(at) }
    }

    /// Appends bytes to the current CPU's copy of a buffer of so much room: a word, which counts the bytes used, and the
    /// bytes after it. False if there is no room for all; then nothing has changed.
    ///
    /// # Safety
    /// A buffer of so much room lives at the neutral address `at`, and is changed by these operations only; `source` has as
    /// many bytes.
    unsafe fn append(at: usize, source: *const u8, bytes: usize, capacity_bytes: usize) -> bool;

    /// Moves all that the current CPU's copy of a buffer holds to `out`; returns how many bytes it is.
    ///
    /// # Safety
    /// As [`append`](Self::append); `out` has as much room as the buffer.
    unsafe fn take(at: usize, out: *mut u8) -> usize;

    /// Takes the lowest free slot of the current CPU's run, if the second word and `class_mask` make `class`, a slot is free,
    /// the count of slots taken has not overflowed, and `gate` is 0. Results in the pair as it was before; the slot is the
    /// lowest bit of its map. `None` if there is none to be had now, or no such step for the caller's thread; then nothing has
    /// changed. See [`slots`].
    ///
    /// The default looks at the pair first and replaces it then, and does not look at the gate. That is right where nobody
    /// relies on gates: where other CPUs change pairs by LOCKed steps, as the operations do, or not at all.
    ///
    /// ```
    /// use pcpu::this_cpu::slots::{FRESH, MAP};
    /// use pcpu::this_cpu::{LocalOps, Put};
    /// use pcpu::{CpuPair, Domain, Global, Handle, PerCpu};
    /// use std::sync::atomic::AtomicU32;
    ///
    /// type Ops = <Global as Domain>::Ops;
    /// const CLASS: u64 = 7;
    /// const RUN: u64 = 5 << 8 | CLASS;
    /// static GATE: AtomicU32 = AtomicU32::new(0);
    ///
    /// let runs = PerCpu::<CpuPair<u64>>::new()?;
    /// let at = runs.handle().neutral();
    /// // SAFETY: the pair lives, and is changed in these ways only.
    /// unsafe {
    ///     // A run of three free slots.
    ///     let is_open = Ops::replace_pair_gated(at, [0; 2], [FRESH | 0b111, RUN], &GATE);
    ///     // The thread may be on another CPU by now.
    ///     if is_open && let Some([free, run]) = Ops::take_slot(at, CLASS, 0xff, &GATE) {
    ///         assert_eq!((free & MAP, run), (0b111, RUN));
    ///         let put = Ops::put_slot(at, run, 0b001, &GATE);
    ///         assert!(matches!(put, Put::Done | Put::Elsewhere));
    ///     }
    /// }
    /// # Ok::<(), pcpu::AllocError>(())
    /// ```
    ///
    /// # Safety
    /// As [`replace_pair`](Self::replace_pair), and the pair is changed by this, [`put_slot`](Self::put_slot) and
    /// [`replace_pair_gated`](Self::replace_pair_gated) with the same gate only, and from other CPUs as
    /// [`remote_pairs`](Self::remote_pairs) says.
    #[inline(always)]
    unsafe fn take_slot(at: usize, class: u64, class_mask: u64, _gate: &AtomicU32) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        let peek = || unsafe { Self::peek_pair(at) };
        // SAFETY: the promise of the caller.
        let replace = |old, new| unsafe { Self::replace_pair(at, old, new) };
        slots::take_by_replacing(peek, replace, class, class_mask)
    }

    /// Puts a slot, one of the low 32 bits, back into the current CPU's run, if its second word is `run` and `gate` is 0.
    /// Whether the thread has such a step at all is part of the answer. The default is right where that of
    /// [`take_slot`](Self::take_slot) is.
    ///
    /// # Safety
    /// As [`take_slot`](Self::take_slot).
    #[inline(always)]
    unsafe fn put_slot(at: usize, run: u64, slot: u64, _gate: &AtomicU32) -> Put {
        // SAFETY: the promise of the caller.
        let peek = || unsafe { Self::peek_pair(at) };
        // SAFETY: the promise of the caller.
        let replace = |old, new| unsafe { Self::replace_pair(at, old, new) };
        slots::put_by_replacing(peek, replace, run, slot)
    }

    /// Replaces the current CPU's copy of a pair, by one store, if it is `old` and `gate` is 0. False if not, or if there is no
    /// such step for the caller's thread; then nothing has changed. The default is right where that of
    /// [`take_slot`](Self::take_slot) is.
    ///
    /// # Safety
    /// As [`take_slot`](Self::take_slot).
    #[inline]
    unsafe fn replace_pair_gated(at: usize, old: Pair, new: Pair, _gate: &AtomicU32) -> bool {
        // SAFETY: the promise of the caller.
        unsafe { slots::replace_by(|| Self::replace_pair(at, old, new), old) }
    }

    /// Both words of the current CPU's copy of a pair, each read whole; if it is changed meanwhile, one may be from before the
    /// change and the other from after it. `None` where the caller's thread has no copy that
    /// [`take_slot`](Self::take_slot) works on.
    ///
    /// # Safety
    /// As [`replace_pair`](Self::replace_pair).
    #[inline]
    unsafe fn peek_pair(at: usize) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        Some(unsafe { Self::read_pair(at) })
    }

    /// The current CPU's copy of a word. `None` where the caller's thread has no copy that
    /// [`replace_word`](Self::replace_word) works on.
    ///
    /// # Safety
    /// As [`read`](Self::read).
    #[inline]
    unsafe fn peek_word(at: usize) -> Option<u64> {
        // SAFETY: the promise of the caller.
        Some(unsafe { Self::read(at) })
    }

    /// Replaces the current CPU's copy of a word if it is `old`. False if not, or where the caller's thread has none that it
    /// shares with other threads on the CPU only; then nothing has changed.
    ///
    /// # Safety
    /// As [`change`](Self::change).
    #[inline]
    unsafe fn replace_word(at: usize, old: u64, new: u64) -> bool {
        // SAFETY: the promise of the caller.
        unsafe { Self::fetch(at, Change::Replace(old, new)) == old }
    }

    /// How another CPU may change pairs that are changed by [`take_slot`](Self::take_slot) and its kin. The answer never
    /// changes.
    fn remote_pairs() -> RemotePairs {
        RemotePairs::Never
    }

    /// Replaces the copy of a pair at an address, whosever it is, if it is `old`; says whether it was. For homes where
    /// [`remote_pairs`](Self::remote_pairs) is [`RemotePairs::ByLockedStep`].
    ///
    /// # Safety
    /// The home is such a one. `copy` points to a live pair, aligned to 16 bytes, that is changed by this and by the
    /// operations only.
    unsafe fn replace_remote_pair(copy: *mut Pair, old: Pair, new: Pair) -> bool {
        // SAFETY: the promise of the caller: all changes are LOCKed steps.
        unsafe { locked::is_replaced(copy, old, new) }
    }

    /// Whether this home has [`add_gated`](Self::add_gated), and the means to wait for it. The answer never changes, and
    /// follows from [`remote_pairs`](Self::remote_pairs); a home that has none need not implement the other two.
    fn has_gates() -> bool {
        Self::remote_pairs() == RemotePairs::AfterFence
    }

    /// Adds to the current CPU's copy if `gate` is 0, which is tested inside the step. False if it is another number, or if
    /// there is no such step for the caller's thread; then nothing has changed.
    ///
    /// # Safety
    /// As [`change`](Self::change).
    #[inline]
    unsafe fn add_gated(_at: usize, _value: u64, _gate: &AtomicU32) -> bool {
        false
    }

    /// Waits for the gated operations that are in progress. What was stored before, to any gate, is seen by every one that
    /// takes place afterwards; what took place before, with all that its thread did earlier, is seen by the caller.
    ///
    /// # Errors
    /// [`FenceError`]: it is not known whether such operations are in progress.
    fn wait_for_gated() -> Result<(), FenceError> {
        Err(FenceError::Unsupported)
    }
}

/// [`LocalOps::add_within`] of two steps, a read and an exchange.
///
/// # Safety
/// As [`LocalOps::change`].
unsafe fn add_within_by_replacing<O: LocalOps + ?Sized>(at: usize, value: u64, bound: u64) -> bool {
    // SAFETY: the promise of the caller.
    let mut old = unsafe { O::read::<u64>(at) };
    loop {
        let new = old.wrapping_add(value);
        if new.wrapping_add(bound) > bound.wrapping_mul(2) {
            return false;
        }
        // SAFETY: the promise of the caller.
        let found = unsafe { O::fetch(at, Change::Replace(old, new)) };
        if found == old {
            return true;
        }
        old = found;
    }
}

/// [`LocalOps::push`] of two steps, a read and an exchange.
///
/// # Safety
/// As [`LocalOps::push`].
unsafe fn push_by_replacing<O: LocalOps + ?Sized>(at: usize, link: *mut usize) {
    let node = link.expose_provenance() as u64;
    // SAFETY: the promise of the caller.
    let mut first = unsafe { O::read::<u64>(at) };
    loop {
        // SAFETY: the link is the caller's until the exchange has succeeded.
        unsafe { link.write(first as usize) };
        // The link, and what the node holds, is written before others find it.
        fence(Ordering::Release);
        // A stack that has been another meanwhile, or another CPU's, and begins with the same node is as good. SAFETY: the
        // promise of the caller.
        let found = unsafe { O::fetch(at, Change::Replace(first, node)) };
        if found == first {
            return;
        }
        first = found;
    }
}

/// [`LocalOps::pop`] of steps on one word, none of which looks into a node that somebody else could have taken and
/// freed: takes all of them and puts the others back, maybe on another CPU by then.
///
/// # Safety
/// As [`LocalOps::pop`].
unsafe fn pop_by_taking_all<O: LocalOps + ?Sized>(at: usize) -> *mut usize {
    // SAFETY: the promise of the caller.
    let take_all = || unsafe { O::fetch::<u64>(at, Change::Set(0)) } as usize;
    let first = take_all();
    if first == 0 {
        return ptr::null_mut();
    }
    fence(Ordering::Acquire);
    let first = ptr::with_exposed_provenance_mut::<usize>(first);
    // SAFETY: whatever was taken is the caller's, and all of it are links.
    let mut others = unsafe { first.read() };
    while others != 0 {
        fence(Ordering::Release);
        // SAFETY: the promise of the caller.
        let found = unsafe { O::fetch(at, Change::Replace(0, others as u64)) };
        if found == 0 {
            break;
        }
        let newcomers = take_all();
        if newcomers == 0 {
            continue;
        }
        fence(Ordering::Acquire);
        let mut last = ptr::with_exposed_provenance_mut::<usize>(newcomers);
        // SAFETY: as above.
        unsafe {
            while last.read() != 0 {
                last = ptr::with_exposed_provenance_mut(last.read());
            }
            last.write(others);
        }
        others = newcomers;
    }
    first
}

/// Why [`LocalOps::wait_for_gated`] could not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FenceError {
    /// The home has no gated operations.
    Unsupported,
    /// The system granted it when asked first and refuses it now, to this thread at least: a filter of system calls was
    /// put in place meanwhile.
    Refused {
        /// The system's error number.
        errno: i32,
    },
}

impl fmt::Display for FenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported => f.write_str("gated operations do not exist here"),
            Self::Refused { errno } => write!(f, "membarrier is refused: error {errno}"),
        }
    }
}

impl core::error::Error for FenceError {}

/// A handle to a variable that is there for as long as the handle is borrowed: static variables and owners.
///
/// The methods are the domain's [`LocalOps`] at the handle. A variable whose address is a symbol of the linker may do the
/// same in fewer instructions; nobody else need implement them.
///
/// # Safety
/// While a reference to the value exists, the variable is live and initialised on every possible CPU. A method that is
/// implemented does what the domain's operation does.
pub unsafe trait Live: Handle {
    /// [`LocalOps::read`].
    ///
    /// # Safety
    /// The variable is a word of this width.
    #[inline(always)]
    unsafe fn read_word<W: Word>(&self) -> W {
        // SAFETY: the variable is live and aligned; the promise of the caller.
        unsafe { <Self::Domain as Domain>::Ops::read(self.handle().neutral()) }
    }

    /// [`LocalOps::change`].
    ///
    /// # Safety
    /// The variable is a word of this width that is changed by these operations only.
    #[inline(always)]
    unsafe fn change_word<W: Word>(&self, change: Change<W>) {
        // SAFETY: as in `read_word`.
        unsafe { <Self::Domain as Domain>::Ops::change(self.handle().neutral(), change) }
    }

    /// [`LocalOps::fetch`].
    ///
    /// # Safety
    /// As [`change_word`](Self::change_word).
    #[inline(always)]
    unsafe fn fetch_word<W: Word>(&self, change: Change<W>) -> W {
        // SAFETY: as in `read_word`.
        unsafe { <Self::Domain as Domain>::Ops::fetch(self.handle().neutral(), change) }
    }

    /// [`LocalOps::inc`].
    ///
    /// # Safety
    /// As [`change_word`](Self::change_word).
    #[inline(always)]
    unsafe fn inc_word<W: Word>(&self) {
        // SAFETY: as in `read_word`.
        unsafe { <Self::Domain as Domain>::Ops::inc::<W>(self.handle().neutral()) }
    }

    /// [`LocalOps::dec`].
    ///
    /// # Safety
    /// As [`change_word`](Self::change_word).
    #[inline(always)]
    unsafe fn dec_word<W: Word>(&self) {
        // SAFETY: as in `read_word`.
        unsafe { <Self::Domain as Domain>::Ops::dec::<W>(self.handle().neutral()) }
    }
}

/// The methods of `Live` of something that stands for another variable, passed on to it: `$place` makes it of `$this`.
macro_rules! pass_on_words {
    ($this:ident => $place:expr) => {
        #[inline(always)]
        unsafe fn read_word<W: $crate::this_cpu::Word>(&self) -> W {
            let $this = self;
            // SAFETY: the promise of the caller.
            unsafe { $place.read_word() }
        }

        #[inline(always)]
        unsafe fn change_word<W: $crate::this_cpu::Word>(
            &self,
            change: $crate::this_cpu::Change<W>,
        ) {
            let $this = self;
            // SAFETY: the promise of the caller.
            unsafe { $place.change_word(change) }
        }

        #[inline(always)]
        unsafe fn fetch_word<W: $crate::this_cpu::Word>(
            &self,
            change: $crate::this_cpu::Change<W>,
        ) -> W {
            let $this = self;
            // SAFETY: the promise of the caller.
            unsafe { $place.fetch_word(change) }
        }

        #[inline(always)]
        unsafe fn inc_word<W: $crate::this_cpu::Word>(&self) {
            let $this = self;
            // SAFETY: the promise of the caller.
            unsafe { $place.inc_word::<W>() }
        }

        #[inline(always)]
        unsafe fn dec_word<W: $crate::this_cpu::Word>(&self) {
            let $this = self;
            // SAFETY: the promise of the caller.
            unsafe { $place.dec_word::<W>() }
        }
    };
}
pub(crate) use pass_on_words;

// SAFETY: a reference to a live handle keeps it borrowed; all is passed on.
unsafe impl<H: Live + ?Sized> Live for &H {
    pass_on_words!(this => **this);
}
