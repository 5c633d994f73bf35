//! Threads that do the same at the same time, each on a CPU of its own where there are as many. Left alone, a scheduler
//! lets threads that live for less than a millisecond take turns on one CPU, where they are in nobody's way.

use std::hint;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// About 1 ms, in which a thread is started.
const SPINS_PER_YIELD: u32 = 1 << 16;

/// Calls `work` on so many threads at once; how long it took a thread, on average. None begins before all are there, and
/// the clock of each begins with its work.
///
/// # Errors
/// That of a thread.
pub fn run<E: Send>(threads: u32, work: impl Fn() -> Result<(), E> + Sync) -> Result<Duration, E> {
    match threads {
        1 => timed(&work),
        _ => run_numbered(threads, |_| work()),
    }
}

/// [`run`], on threads of their own also if it is one, each of which is given its number, from 0.
///
/// # Errors
/// That of a thread.
pub fn run_numbered<E: Send>(
    threads: u32,
    work: impl Fn(u32) -> Result<(), E> + Sync,
) -> Result<Duration, E> {
    let arrived = AtomicU32::new(0);
    let cpus = sched_getaffinity(None).ok();
    let on_thread = |number: u32| {
        if let Some(allowed) = &cpus {
            stay_on(number, allowed);
        }
        arrived.fetch_add(1, Ordering::AcqRel);
        let mut turns: u32 = 0;
        while arrived.load(Ordering::Acquire) < threads {
            // Spinning: whoever gives its CPU away is not back when the last one begins. But on fewer CPUs than threads
            // the others need a turn.
            turns = turns.wrapping_add(1);
            match turns % SPINS_PER_YIELD {
                0 => thread::yield_now(),
                _ => hint::spin_loop(),
            }
        }
        timed(|| work(number))
    };
    thread::scope(|scope| {
        let on_thread = &on_thread;
        let all: Vec<_> = (0..threads)
            .map(|number| scope.spawn(move || on_thread(number)))
            .collect();
        let mut sum = Duration::ZERO;
        for one in all {
            sum += one
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(sum / threads)
    })
}

/// Keeps the calling thread on one of the CPUs that it may run on: the one with that number among them, or any if there
/// are not so many, or it is not let.
fn stay_on(number: u32, allowed: &CpuSet) {
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu));
    if let Some(cpu) = cpus.nth(number as usize) {
        let mut only = CpuSet::new();
        only.set(cpu);
        let _ = sched_setaffinity(None, &only);
    }
}

/// Calls `work`; how long it took.
///
/// # Errors
/// That of `work`.
pub fn timed<E>(work: impl FnOnce() -> Result<(), E>) -> Result<Duration, E> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::{Barrier, Mutex};

    #[test]
    fn all_threads_work_at_once() {
        // It would hang if one thread worked before the other was there.
        let meeting = Barrier::new(2);
        run::<()>(2, || {
            meeting.wait();
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn threads_are_on_different_cpus() {
        let cpus = Mutex::new(HashSet::new());
        run::<()>(2, || {
            cpus.lock().unwrap().insert(rustix::thread::sched_getcpu());
            Ok(())
        })
        .unwrap();
        let allowed = sched_getaffinity(None).unwrap().count();
        assert_eq!(cpus.into_inner().unwrap().len() as u32, allowed.min(2));
    }

    #[test]
    fn an_error_of_any_thread_is_told() {
        let turn = AtomicU32::new(0);
        let result = run(2, || match turn.fetch_add(1, Ordering::Relaxed) {
            0 => Ok(()),
            turn => Err(turn),
        });
        assert_eq!(result, Err(1));
    }
}
