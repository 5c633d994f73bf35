//! A signal handler that allocates and frees, in threads that are allocating and freeing: it never waits.
//!
//! Each test runs in a process of its own, which its alarm ends if it hangs.

#![cfg(target_os = "linux")]

#[path = "common/child.rs"]
mod child;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use pcpu::stats::{Event, EventHook};
use pcpu::{
    AllocError, AllocFlags, CpuCell, FreeError, FreeFlags, Global, LocalCell, PerCpuPtr,
    RemoteCell, Request, alloc_percpu_bytes, define_per_cpu, free_percpu, free_percpu_with, global,
};

use child::run_in_child;

/// Signals that the threads get, at least.
const SIGNALS: u64 = 5_000;

/// Handlers that must have been served, and that must have found the lock taken.
const ENOUGH: u64 = 50;

/// What caches serve, and what only the holder of the lock does.
const REQUESTS: [Request; 2] = [Request::new(64, 8), Request::new(5000, 8)];

define_per_cpu! {
    static HANDLED: CpuCell<u64> = CpuCell::new(0);
}

/// What became of the handler's calls.
static SERVED: AtomicU64 = AtomicU64::new(0);
static BUSY: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

/// Areas that the handler could not free, to be freed by the next one.
static LEFT: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];

extern "C" fn handler(_signal: libc::c_int) {
    HANDLED.inc();
    if HANDLED.sum() == 0 {
        WRONG.fetch_add(1, Relaxed);
    }
    let [small, large] = REQUESTS;
    let request = match HANDLED.sum() % 2 {
        0 => small,
        _ => large,
    };
    match alloc_percpu_bytes::<Global>(&request.with_flags(AllocFlags::TRY)) {
        Ok(area) => {
            SERVED.fetch_add(1, Relaxed);
            try_free(area);
        }
        Err(AllocError::Busy) => {
            BUSY.fetch_add(1, Relaxed);
        }
        Err(_) => {
            WRONG.fetch_add(1, Relaxed);
        }
    }
    for left in &LEFT {
        if let Some(area) = PerCpuPtr::from_neutral(left.swap(0, Relaxed) as usize) {
            try_free(area);
        }
    }
}

fn try_free(area: PerCpuPtr<u8>) {
    // SAFETY: allocated by the handler, and not used.
    match unsafe { free_percpu_with(area, FreeFlags::TRY) } {
        Ok(()) => {}
        Err(FreeError::Busy) => {
            let leave = |left: &AtomicU64| {
                left.compare_exchange(0, area.neutral() as u64, Relaxed, Relaxed)
                    .is_ok()
            };
            if !LEFT.iter().any(leave) {
                WRONG.fetch_add(1, Relaxed);
            }
        }
        Err(_) => {
            WRONG.fetch_add(1, Relaxed);
        }
    }
}

fn install() {
    // SAFETY: an action without flags and mask; the handler takes one integer. An alarm without a handler ends the process.
    let result = unsafe {
        libc::alarm(100);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut())
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn interrupt(thread: libc::pid_t) {
    // SAFETY: the signal has a handler.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn a_handler_that_interrupts_allocations() {
    if run_in_child("a_handler_that_interrupts_allocations", |_| ()) {
        return;
    }
    install();
    let is_over = AtomicBool::new(false);
    let (sender, threads) = std::sync::mpsc::channel();
    let churn = || {
        let sender = sender.clone();
        // SAFETY: asks for a number.
        sender
            .send(unsafe { libc::gettid() })
            .expect("the test waits");
        while !is_over.load(Relaxed) {
            let areas: Vec<PerCpuPtr<u8>> = (0..20)
                .map(|at| alloc_percpu_bytes::<Global>(&REQUESTS[at % 2]).expect("there is memory"))
                .collect();
            for area in areas {
                // SAFETY: just allocated.
                unsafe { free_percpu(area) }.expect("it is allocated");
            }
            // The lock is left to itself for a while.
            (0..2000).for_each(|_| std::hint::spin_loop());
        }
    };
    thread::scope(|scope| {
        (0..3).for_each(|_| drop(scope.spawn(churn)));
        let threads: Vec<_> = threads.iter().take(3).collect();
        let mut signals = 0;
        while signals < SIGNALS || SERVED.load(Relaxed) < ENOUGH || BUSY.load(Relaxed) < ENOUGH {
            interrupt(threads[signals as usize % threads.len()]);
            signals += 1;
            if signals.is_multiple_of(16) {
                thread::yield_now();
            }
        }
        is_over.store(true, Relaxed);
    });
    let (served, busy) = (SERVED.load(Relaxed), BUSY.load(Relaxed));
    println!("{served} served, {busy} busy");
    assert_eq!(WRONG.load(Relaxed), 0);
    // Signals that come faster than they are handled are one.
    assert_eq!(HANDLED.sum(), served + busy);
    for left in &LEFT {
        if let Some(area) = PerCpuPtr::<u8>::from_neutral(left.swap(0, Relaxed) as usize) {
            // SAFETY: left by a handler, and not used.
            unsafe { free_percpu(area) }.expect("it is allocated");
        }
    }
    assert_eq!(global().stats().live, 0);
}

/// Interrupts the thread that frees, in the middle of it: the lock is held then.
struct InFree;

impl EventHook for InFree {
    fn event(&self, event: &Event) {
        if matches!(event, Event::Free { .. }) {
            // SAFETY: the signal has a handler.
            unsafe { libc::raise(libc::SIGUSR1) };
        }
    }
}

#[test]
fn a_handler_that_interrupts_the_holder_of_the_lock() {
    if run_in_child("a_handler_that_interrupts_the_holder_of_the_lock", |_| ()) {
        return;
    }
    install();
    // Too large for a cache: it is freed with the lock held.
    let large = Request::new(8192, 8);
    let area = alloc_percpu_bytes::<Global>(&large).expect("there is memory");
    let count = || {
        (
            SERVED.load(Relaxed),
            BUSY.load(Relaxed),
            WRONG.load(Relaxed),
        )
    };
    global().set_event_hook(Some(&InFree));
    // SAFETY: just allocated.
    unsafe { free_percpu(area) }.expect("it is allocated");
    global().set_event_hook(None);
    assert_eq!(count(), (0, 1, 0), "served, busy, wrong");
    handler(0);
    assert_eq!(count(), (1, 1, 0), "served, busy, wrong");
    assert_eq!(HANDLED.sum(), 2);
}
