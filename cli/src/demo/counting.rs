//! Per-CPU counters that a thread on every CPU adds to, and areas that change hands between threads.
//!
//! A counter is a handle, whether the variable is static or dynamic: the code that adds and sums cannot tell.

use std::ops::Range;

use pcpu::unit::CpuId;
use pcpu::{
    AllocError, CpuCell, CpuError, FreeError, Global, Handle, PerCpuPtr, Request, alloc_percpu,
    alloc_percpu_bytes, define_per_cpu, free_percpu, global, per_cpu_ptr, this_cpu,
};

use super::checks::Checks;
use super::seats;
use crate::error::CliError;

define_per_cpu! {
    /// A counter that starts at 1000 on every CPU.
    static REQUESTS: CpuCell<u64> = CpuCell::new(1000);
    /// A counter that starts at 7 on every CPU.
    static ERRORS: CpuCell<u64> = CpuCell::new(7);
}

/// Additions of each thread to each counter.
const ADDITIONS: u64 = 1_000_000;

/// Areas that each thread allocates, for another to free.
const AREAS: usize = 100;

/// Their sizes, in turn.
const AREA_BYTES: [usize; 8] = [4, 8, 16, 24, 40, 96, 256, 1024];

/// A per-CPU counter. Its variable lives as long as it.
#[derive(Debug)]
pub struct Counter {
    name: &'static str,
    initial: u64,
    handle: PerCpuPtr<CpuCell<u64>>,
}

impl Counter {
    /// The static counters.
    pub fn statics() -> [Self; 2] {
        [
            Self {
                name: "static REQUESTS",
                initial: 1000,
                handle: REQUESTS.handle(),
            },
            Self {
                name: "static ERRORS",
                initial: 7,
                handle: ERRORS.handle(),
            },
        ]
    }

    /// A new dynamic counter, 0 on every CPU.
    ///
    /// # Errors
    /// [`AllocError`].
    pub fn dynamic(name: &'static str) -> Result<Self, AllocError> {
        Ok(Self {
            name,
            initial: 0,
            handle: alloc_percpu()?,
        })
    }

    /// Frees a dynamic counter.
    ///
    /// # Errors
    /// [`FreeError`], also for a static one.
    pub fn free(self) -> Result<(), FreeError> {
        // SAFETY: the counter goes with its variable, and gives no reference to a copy away.
        unsafe { free_percpu(self.handle) }
    }

    /// The variable.
    pub fn handle(&self) -> PerCpuPtr<CpuCell<u64>> {
        self.handle
    }

    /// The neutral address of the variable.
    pub fn neutral(&self) -> usize {
        self.handle.neutral()
    }

    /// Adds 1 to the current CPU's copy, wherever that is by then.
    fn add(&self) {
        // SAFETY: the variable lives as long as `self`.
        unsafe { this_cpu::add(self.handle, 1) }
    }

    /// `cpu`'s copy.
    fn get(&self, cpu: CpuId) -> Result<u64, CpuError> {
        let copy = per_cpu_ptr(self.handle, cpu)?;
        // SAFETY: the variable lives as long as `self`, and a cell may be read from any CPU.
        Ok(unsafe { copy.as_ref() }.read_remote())
    }

    fn sum(&self) -> Result<u64, CpuError> {
        global()
            .units()
            .possible()
            .iter()
            .map(|cpu| self.get(cpu))
            .sum()
    }
}

/// An area of a thread, live until it is freed.
#[derive(Debug, Clone)]
struct Area {
    handle: PerCpuPtr<u8>,
    bytes: usize,
}

impl Area {
    fn range(&self) -> Range<usize> {
        self.handle.neutral()..self.handle.neutral() + self.bytes
    }
}

/// Adds to the counters from a thread on every CPU that takes one and from one that may wander, and checks the sums.
///
/// # Errors
/// One line, if a thread could not do its work.
pub fn count(counters: &[Counter], checks: &mut Checks) -> Result<(), CliError> {
    let possible = global().units().possible();
    let work = seats::on_all(|_| work(counters))?;

    let pinned: Vec<_> = work.iter().filter_map(|&(cpu, _)| cpu).collect();
    let threads = work.len() as u64;
    let cpus = possible.count();
    for counter in counters {
        let want = u64::from(cpus) * counter.initial + threads * ADDITIONS;
        checks.equal(
            format_args!(
                "{}: {cpus} x {} + {threads} threads x {ADDITIONS} = {want}",
                counter.name, counter.initial
            ),
            counter.sum().map_err(failed)?,
            want,
        )?;
    }
    let missed = pinned.iter().find(|&&cpu| {
        counters.iter().any(|counter| {
            counter
                .get(cpu)
                .is_ok_and(|copy| copy < counter.initial + ADDITIONS)
        })
    });
    checks.check(
        format_args!(
            "each of {} pinned threads added to its own CPU's copies",
            pinned.len()
        ),
        missed.map_or(Ok(()), |cpu| Err(format!("CPU {} has less", cpu.get()))),
    )?;
    let areas: Result<Vec<_>, AllocError> = work.into_iter().map(|(_, areas)| areas).collect();
    hand_over(areas.map_err(failed)?.concat(), checks)
}

/// Checks that the threads' areas lie apart, and frees them all from this thread.
fn hand_over(mut areas: Vec<Area>, checks: &mut Checks) -> Result<(), CliError> {
    areas.sort_by_key(|area| area.handle.neutral());
    let shared = areas
        .windows(2)
        .find(|pair| pair[0].range().end > pair[1].range().start);
    checks.check(
        format_args!(
            "{} areas allocated by all threads at once lie apart",
            areas.len()
        ),
        shared.map_or(Ok(()), |pair| Err(format!("{pair:?}"))),
    )?;
    let number = areas.len();
    let freed = areas.into_iter().try_for_each(|area| {
        // SAFETY: the thread that used the area is gone, and left it to this one.
        unsafe { free_percpu(area.handle) }
    });
    checks.check(
        format_args!("{number} areas freed by another thread"),
        freed,
    )
}

/// One thread's work.
fn work(counters: &[Counter]) -> Result<Vec<Area>, AllocError> {
    for _ in 0..ADDITIONS {
        for counter in counters {
            counter.add();
        }
    }
    let areas = (0..AREAS).map(|index| {
        let bytes = AREA_BYTES[index % AREA_BYTES.len()];
        let handle = alloc_percpu_bytes::<Global>(&Request::new(bytes, bytes.min(8)))?;
        Ok(Area { handle, bytes })
    });
    areas.collect()
}

fn failed(error: impl ToString) -> CliError {
    CliError::Failed(error.to_string())
}
