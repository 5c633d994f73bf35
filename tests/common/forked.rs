//! Children by `fork`, of a process with threads.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a child has time for.
const ALARM_SECONDS: libc::c_uint = 30;

/// Runs `body` in a forked child. The child ends by itself, well or not: that it does is asserted.
pub fn in_forked_child(body: impl FnOnce()) {
    // SAFETY: the child runs `body` only, and no destructor of its parent's.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        // SAFETY: an alarm without a handler ends the process.
        unsafe { libc::alarm(ALARM_SECONDS) };
        let passed = catch_unwind(AssertUnwindSafe(body)).is_ok();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(!passed)) };
    }
    let mut status = 0;
    // SAFETY: the child was not waited for before.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(waited, child);
    let hangs = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGALRM;
    assert!(!hangs, "a child hangs");
    assert_eq!(status, 0, "the child has passed");
}
