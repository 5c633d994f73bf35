//! Threads that work on one variable while another moves them from CPU to CPU and sends them signals, whose handler
//! does some of the same work.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Barrier;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering, compiler_fence};

use crate::crew::Crew;
use crate::storm::{Tally, disturb, one_at_a_time};
use crate::system::{handle_interrupts, step_back, thread_id, unregister};

thread_local! {
    /// For the signal handler.
    static IN_HANDLER: Cell<Option<*const dyn Fn()>> = const { Cell::new(None) };
}

extern "C" fn on_signal(_signal: libc::c_int) {
    if let Some(work) = IN_HANDLER.get() {
        // SAFETY: the thread that is interrupted keeps it alive.
        unsafe { (*work)() };
    }
}

/// Whether there is to be work in signal handlers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handlers {
    /// None: they only interrupt.
    Idle,
    /// They work as well.
    Work,
}

/// How many times each thread of the crew is to do its work: one `part`th of a full storm.
fn operations(crew: Crew, part: u64) -> u64 {
    const DEFAULT_OPERATIONS: u64 = 100_000_000;
    let all = std::env::var("PCPU_STORM_OPS").map_or(DEFAULT_OPERATIONS, |operations| {
        operations.parse().expect("PCPU_STORM_OPS is a number")
    });
    all / part / crew.size() as u64
}

/// One `part`th of a full storm: every thread of the crew does `work`, again and again, and its handler now and then, each
/// with an account of its own, which `account` makes, given a number. Returns the accounts.
pub fn whirl<A: Send>(
    crew: Crew,
    handlers: Handlers,
    part: u64,
    account: impl Fn(usize) -> A + Sync,
    work: impl Fn(&A) + Sync,
) -> Vec<A> {
    let _one = one_at_a_time();
    handle_interrupts(on_signal);
    let crew_size = crew.size();
    let times = operations(crew, part);
    let threads: Vec<_> = (0..crew_size).map(|_| AtomicI32::new(0)).collect();
    let (begin, end) = (Barrier::new(crew_size + 1), Barrier::new(crew_size + 1));
    let finished = AtomicUsize::new(0);
    let run = |worker: usize| {
        step_back();
        // Not every system lets a thread do without.
        let _ = worker >= crew.threads && unregister();
        let of_thread = account(2 * worker);
        let of_handler = account(2 * worker + 1);
        let in_handler = || work(&of_handler);
        let in_handler: &dyn Fn() = &in_handler;
        // SAFETY: only its lifetime is forgotten; it is taken back below, before it ends.
        let in_handler: *const dyn Fn() = unsafe { std::mem::transmute(in_handler) };
        if handlers == Handlers::Work {
            IN_HANDLER.set(Some(in_handler));
        }
        compiler_fence(Ordering::SeqCst);
        threads[worker].store(thread_id(), Ordering::Relaxed);
        begin.wait();
        // The others wait for this one, so it comes to the end whatever happens.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            (0..times).for_each(|_| work(&of_thread))
        }));
        finished.fetch_add(1, Ordering::Release);
        end.wait();
        IN_HANDLER.set(None);
        compiler_fence(Ordering::SeqCst);
        outcome.unwrap_or_else(|panic| resume_unwind(panic));
        [of_thread, of_handler]
    };
    let tally = Tally::default();
    let accounts = std::thread::scope(|scope| {
        let run = &run;
        let handles: Vec<_> = (0..crew_size)
            .map(|worker| scope.spawn(move || run(worker)))
            .collect();
        begin.wait();
        disturb(&threads, &finished, &tally, times);
        end.wait();
        let both = |handle: std::thread::ScopedJoinHandle<'_, [A; 2]>| handle.join();
        handles
            .into_iter()
            .flat_map(|handle| both(handle).expect("the work passes"))
            .collect()
    });
    println!("{times} times on {crew:?}: {tally:?}");
    accounts
}
