//! The fence against restartable sequences: when it has returned, every sequence of the process that was in progress has
//! either committed, visibly, or begun anew and sees what the caller stored before.
//!
//! It is `membarrier` with `MEMBARRIER_CMD_PRIVATE_EXPEDITED_RSEQ` (Linux 5.10): CPUs that run a thread of the process are
//! interrupted, which aborts the sequence there; a thread that is not running was preempted, which aborts its own.
//! The cost is that of the interrupts, some microseconds.

use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::thread::{MembarrierCommand, membarrier};

use crate::this_cpu::FenceError;

/// Announces to the kernel that the process will use the fence.
fn register() -> Result<(), Errno> {
    membarrier(MembarrierCommand::RegisterPrivateExpeditedRseq)
}

/// Whether the system grants the fence; the first answer stands.
pub(super) fn is_granted() -> bool {
    static IS_GRANTED: OnceLock<bool> = OnceLock::new();
    *IS_GRANTED.get_or_init(|| register().is_ok())
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
