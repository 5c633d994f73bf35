//! Signals that hit the workers anywhere: the handler allocates and frees an area without waiting, and looks at its copies.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use pcpu::{
    AllocError, AllocFlags, FreeError, FreeFlags, Global, PerCpuPtr, Request, alloc_percpu_bytes,
    free_percpu_with, global,
};

use crate::copies::{assert_stamped, assert_zero, stamp};

const BYTES: usize = 64;
const REQUEST: Request = Request::new(BYTES, 8).with_flags(AllocFlags::TRY);

/// Handlers that were given an area.
static SERVED: AtomicU64 = AtomicU64::new(0);

/// Areas that could not be freed, for the lock was taken: for the next to free.
static LEFT: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];

extern "C" fn handler(_signal: libc::c_int) {
    match alloc_percpu_bytes::<Global>(&REQUEST) {
        Ok(area) => {
            SERVED.fetch_add(1, Relaxed);
            for cpu in global().units().materialised().iter() {
                assert_zero(global(), (area.neutral(), BYTES), cpu);
            }
            stamp(global(), (area.neutral(), BYTES));
            try_free(area);
        }
        Err(AllocError::Busy) => {}
        Err(error) => panic!("{error}"),
    }
    free_left();
}

fn try_free(area: PerCpuPtr<u8>) {
    for cpu in global().units().materialised().iter() {
        assert_stamped(global(), (area.neutral(), BYTES), cpu);
    }
    // SAFETY: allocated by a handler, which uses it no more.
    match unsafe { free_percpu_with(area, FreeFlags::TRY) } {
        Ok(()) => {}
        Err(FreeError::Busy) => {
            let leave = |left: &AtomicUsize| {
                left.compare_exchange(0, area.neutral(), Relaxed, Relaxed)
                    .is_ok()
            };
            assert!(LEFT.iter().any(leave), "no room for what is left");
        }
        Err(error) => panic!("{error}"),
    }
}

/// Frees what handlers have left.
pub fn free_left() {
    for left in &LEFT {
        if let Some(area) = PerCpuPtr::from_neutral(left.swap(0, Relaxed)) {
            try_free(area);
        }
    }
}

/// Whether nothing is left.
pub fn is_none_left() -> bool {
    LEFT.iter().all(|left| left.load(Relaxed) == 0)
}

/// How many areas handlers were given.
pub fn served() -> u64 {
    SERVED.load(Relaxed)
}

/// Installs the handler.
pub fn install() -> Result<(), String> {
    // SAFETY: the handler does what may be done in one: it allocates and frees without waiting, and works on atomic words.
    let installed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut())
    };
    match installed {
        0 => Ok(()),
        _ => Err(format!("no handler: {}", std::io::Error::last_os_error())),
    }
}

/// Interrupts a thread of the process, if it is still there.
pub fn interrupt(thread: libc::pid_t) {
    // SAFETY: a signal to the process's own thread, for which there is a handler.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1) };
}
