//! What `fork` does with the process's instance: the child gets one that is at rest.
//!
//! The handlers are registered before `main`, so before most others: they run last before the fork, when handlers of
//! users of the instance are through, and first after it. They are registered after the first memory was had from
//! `malloc`: a `malloc` with handlers of its own stops after the instance, whose work may need it.

use core::sync::atomic::{AtomicU64, Ordering};
use std::io;

/// How many forks lie between the first process with this memory and this one.
static FORKS: AtomicU64 = AtomicU64::new(0);

/// How many forks lie between the first process with this memory and this one.
pub(super) fn count() -> u64 {
    FORKS.load(Ordering::Relaxed)
}

/// Has the handlers called by every `fork` from now on. They wait for the instance to be set up.
///
/// # Errors
/// The system has no memory for it.
pub(super) fn register() -> io::Result<()> {
    // SAFETY: the handlers live as long as the process; the code of a library that is unloaded goes with its handlers.
    match unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

extern "C" fn before() {
    super::global().rest();
}

extern "C" fn in_parent() {
    // SAFETY: `before` ran on this thread just now.
    unsafe { super::global().end_rest() };
}

extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: `before` ran on this thread, in the parent; the child has no other thread.
    unsafe { super::global().end_rest_alone() };
}
