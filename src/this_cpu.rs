//! Operations on the current CPU's copy of a scalar, without a lock and without a LOCKed instruction.
//!
//! A scalar that is changed this way is a [`CpuCell`]. Each operation is one step as far as its CPU is concerned:
//! neither an interrupt (or a signal), nor a migration to another CPU, nor another thread there can come between its
//! parts. Towards other CPUs it is no atomic operation: they may read the copy ([`CpuCell::read_remote`], which does
//! not tear), but never write it. That is why a `CpuCell` lends nobody a `&T`, and why no safe operation writes to
//! another CPU's copy.
//!
//! How it is done depends on the home, which a [`Domain`] names by its [`LocalOps`]: [`process`] for a
//! Linux process. All operations are relaxed: they order no other memory access.

use core::fmt;
use core::sync::atomic::AtomicU32;

use crate::alloc_api::Handle;

mod cell;
pub mod portable;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod process;
mod word;

pub use cell::{
    CpuCell, LocalCell, add, add_return, and, cmpxchg, or, read, sub, write, xchg, xor,
};
pub use word::{Change, Scalar, Word};

/// How a home works on the current CPU's copy of a word, given its neutral address.
///
/// # Safety
/// Every operation finds the caller's CPU and changes that CPU's copy as one step, or changes a copy that no CPU
/// changes otherwise than by LOCKed steps.
pub unsafe trait LocalOps {
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

    /// Whether this home has [`add_gated`](Self::add_gated), and the means to wait for it. The answer never changes; a home
    /// that has none need not say so, nor implement the other two.
    fn has_gates() -> bool {
        false
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

    /// Waits for the gated adds that are in progress. What was stored before, to any gate, is seen by every add that takes
    /// place afterwards; what took place before, with all that its thread did earlier, is seen by the caller.
    ///
    /// # Errors
    /// [`FenceError`]: it is not known whether such adds are in progress.
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
/// # Safety
/// While a reference to the value exists, the variable is live and initialised on every possible CPU.
pub unsafe trait Live: Handle {}

// SAFETY: a reference to a live handle keeps it borrowed.
unsafe impl<H: Live + ?Sized> Live for &H {}
