//! Pairs: an area allocated and freed at once, with others live; on one thread, and on several at the same time.

use std::ptr;
use std::time::Duration;

use pcpu::unit::CpuId;

use super::Zeroing;
use super::areas::{Heap, Live, PerCpuAreas, Source};
use super::instance::Instance;
use super::rounds::Case;
use super::together;
use crate::error::CliError;

/// Areas that are live beforehand.
pub const LIVE: u32 = 100;

/// What a store touches.
const LINE_BYTES: usize = 64;

/// The cases on one thread.
///
/// # Errors
/// One line, if there is no memory.
pub fn cases(
    instance: &Instance,
    bytes: usize,
    zeroing: Zeroing,
) -> Result<Vec<Box<dyn Case>>, CliError> {
    let ours = PerCpuAreas::new(instance, zeroing);
    let mut cases: Vec<Box<dyn Case>> = vec![
        Box::new(Pairs::new(ours, bytes, 1)?),
        Box::new(Pairs::new(Heap, bytes, 1)?),
    ];
    if zeroing == Zeroing::On {
        cases.push(Box::new(Stores::new(instance, ours, bytes)?));
    }
    Ok(cases)
}

/// The cases on one thread and on two.
///
/// # Errors
/// One line, if there is no memory.
pub fn threaded_cases(
    instance: &Instance,
    bytes: usize,
    zeroing: Zeroing,
) -> Result<Vec<Box<dyn Case>>, CliError> {
    let ours = PerCpuAreas::new(instance, zeroing);
    let mut cases: Vec<Box<dyn Case>> = Vec::new();
    for threads in [1, 2] {
        cases.push(Box::new(Pairs::new(ours, bytes, threads)?));
        cases.push(Box::new(Pairs::new(Heap, bytes, threads)?));
    }
    Ok(cases)
}

/// Pairs of one source.
struct Pairs<S: Source> {
    source: S,
    bytes: usize,
    threads: u32,
    _live: Live<S>,
}

impl<S: Source> Pairs<S> {
    fn new(source: S, bytes: usize, threads: u32) -> Result<Self, CliError> {
        Ok(Self {
            source,
            bytes,
            threads,
            _live: Live::new(source, (0..LIVE).map(|_| bytes))?,
        })
    }
}

impl<S: Source> Case for Pairs<S> {
    fn name(&self) -> &'static str {
        S::NAME
    }

    fn threads(&self) -> u32 {
        self.threads
    }

    fn run(&mut self, iters: u64) -> Result<Duration, CliError> {
        let (source, bytes) = (self.source, self.bytes);
        together::run(self.threads, || pairs(source, bytes, iters))
    }
}

#[inline(never)]
fn pairs<S: Source>(source: S, bytes: usize, iters: u64) -> Result<(), CliError> {
    for _ in 0..iters {
        let area = source.allocate(bytes)?;
        // SAFETY: the area has just been allocated, and nobody uses it.
        unsafe { source.free(area)? };
    }
    Ok(())
}

/// What no zeroing can do without: a store to every line of every CPU's copy of an area.
struct Stores {
    first: *mut u64,
    stride_bytes: usize,
    cpus: u32,
    lines: usize,
    /// The area that is stored to.
    _area: Live<PerCpuAreas>,
}

impl Stores {
    fn new(instance: &Instance, ours: PerCpuAreas, bytes: usize) -> Result<Self, CliError> {
        let lines = bytes.div_ceil(LINE_BYTES);
        let area = Live::new(ours, std::iter::once(lines * LINE_BYTES))?;
        let first = instance
            .pcpu
            .per_cpu_address(area.areas()[0], CpuId::new(0))
            .map_err(|error| CliError::Failed(error.to_string()))?;
        Ok(Self {
            first: ptr::with_exposed_provenance_mut(first),
            stride_bytes: instance.stride_bytes(),
            cpus: instance.cpus,
            lines,
            _area: area,
        })
    }
}

impl Case for Stores {
    fn name(&self) -> &'static str {
        "bare-loop"
    }

    fn run(&mut self, iters: u64) -> Result<Duration, CliError> {
        together::timed(|| {
            for _ in 0..iters {
                for cpu in 0..self.cpus as usize {
                    for line in 0..self.lines {
                        let offset_bytes = cpu * self.stride_bytes + line * LINE_BYTES;
                        // SAFETY: the area is live and has so many lines on each of the CPUs, a stride apart, all brought
                        // up; nobody else uses it.
                        unsafe { self.first.byte_add(offset_bytes).write_volatile(0) };
                    }
                }
            }
            Ok(())
        })
    }
}
