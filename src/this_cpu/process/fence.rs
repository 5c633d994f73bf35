//! The fence against restartable sequences: when it has returned, every sequence of the process that was in progress has
//! either committed, visibly, or begun anew and sees what the caller stored before.
//!
//! It is `membarrier` with `MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ` (Linux 5.10): CPUs that run a thread of the process are
//! interrupted, which aborts the sequence there; a thread that is not running was preempted, which aborts its own.
//! The cost is that of the interrupts, some microseconds.

use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

use rustix::io::Errno;
use rustix::thread::{MembarrierCommand, membarrier};

use crate::this_cpu::FenceError;

/// Announces to the kernel that the process will use the fence.
fn register() -> Result<(), Errno> {
    membarrier(MembarrierCommand::RegisterPrivateExpeditedRseq)
}

/// Whether the system grants the fence; the first answer stands.
///
/// No thread waits for another's answer: in a forked child that other thread would not be there.
pub(super) fn is_granted() -> bool {
    const UNKNOWN: u8 = 0;
    const GRANTED: u8 = 1;
    const REFUSED: u8 = 2;
    static ANSWER: AtomicU8 = AtomicU8::new(UNKNOWN);
    let mut answer = ANSWER.load(Relaxed);
    if answer == UNKNOWN {
        let own = if register().is_ok() { GRANTED } else { REFUSED };
        answer = match ANSWER.compare_exchange(UNKNOWN, own, Relaxed, Relaxed) {
            Ok(_) => own,
            Err(first) => first,
        };
    }
    answer == GRANTED
}

/// The fence.
pub(super) fn restart_all() -> Result<(), FenceError> {
    let fence = || membarrier(MembarrierCommand::PrivateExpeditedRseq);
    fence()
        .or_else(|error| match error {
            // Not announced by this process: it is the child of one that did.
            Errno::PERM => register().and_then(|()| fence()),
            _ => Err(error),
        })
        .map_err(|error| FenceError::Refused {
            errno: error.raw_os_error(),
        })
}
