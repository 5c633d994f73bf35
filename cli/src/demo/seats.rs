//! Threads on every CPU that takes one, and one that runs where the system puts it.

use std::thread;

use pcpu::global;
use pcpu::unit::CpuId;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::error::CliError;

/// Where a thread runs.
#[derive(Debug, Clone, Copy)]
enum Seat {
    /// On one CPU.
    Pinned(CpuId),
    /// Where the system puts it.
    Anywhere,
}

/// Runs `work` on a thread on every CPU that takes one, given that CPU, and on one that may wander. Returns what they
/// returned, with their CPUs.
///
/// # Errors
/// One line, if a thread cannot be made, or panicked.
pub fn on_all<R: Send>(
    work: impl Fn(Option<CpuId>) -> R + Sync,
) -> Result<Vec<(Option<CpuId>, R)>, CliError> {
    let possible = global().units().possible();
    let seats = possible.iter().map(Seat::Pinned).chain([Seat::Anywhere]);
    let sit = |seat| match seat {
        Seat::Pinned(cpu) => pin(cpu).then(|| (Some(cpu), work(Some(cpu)))),
        Seat::Anywhere => Some((None, work(None))),
    };
    thread::scope(|scope| {
        let sit = &sit;
        let threads: Vec<_> = seats
            .map(|seat| thread::Builder::new().spawn_scoped(scope, move || sit(seat)))
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                let thread = thread
                    .map_err(|error| CliError::Failed(format!("cannot start a thread: {error}")))?;
                thread
                    .join()
                    .map_err(|_| CliError::Failed("a thread panicked".to_owned()))
            })
            .filter_map(Result::transpose)
            .collect()
    })
}

/// Keeps the thread on a CPU. Whether that is granted: a possible CPU may be offline, or not for this process.
fn pin(cpu: CpuId) -> bool {
    if cpu.index() >= CpuSet::MAX_CPU {
        return false;
    }
    let mut set = CpuSet::new();
    set.set(cpu.index());
    sched_setaffinity(None, &set).is_ok()
}
