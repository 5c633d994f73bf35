//! Pairs: an area allocated and freed at once, with others live; on one thread, and on several at the same time.

use std::time::Duration;

use pcpu::Domain;
use pcpu_workloads::areas::{Heap, Live, PerCpuAreas, Source, Zeroing, pairs};
use pcpu_workloads::dirty::{AT_ONCE, DirtyPairs};
use pcpu_workloads::home::Home;
use pcpu_workloads::stores::Stores;
use pcpu_workloads::together;

use super::rounds::Case;
use crate::error::CliError;

/// Areas that are live beforehand.
pub const LIVE: u32 = 100;

/// The cases on one thread.
///
/// # Errors
/// One line, if there is no memory.
pub fn cases<D: Domain>(
    home: &Home<D>,
    bytes: usize,
    zeroing: Zeroing,
) -> Result<Vec<Box<dyn Case>>, CliError> {
    let ours = PerCpuAreas::<D>::new(zeroing);
    let mut cases: Vec<Box<dyn Case>> = vec![
        Box::new(Pairs::new(ours, bytes, 1)?),
        Box::new(Pairs::new(Heap, bytes, 1)?),
    ];
    if zeroing == Zeroing::On {
        cases.push(Box::new(BareLoop(Stores::new(home, 1, bytes)?)));
    }
    Ok(cases)
}

/// The cases on one thread where all copies are written to between an allocation and its free.
///
/// # Errors
/// One line, if there is no memory.
pub fn dirty_cases<D: Domain>(
    home: &Home<D>,
    bytes: usize,
    zeroing: Zeroing,
) -> Result<Vec<Box<dyn Case>>, CliError> {
    let mut cases: Vec<Box<dyn Case>> = vec![Box::new(Dirty {
        pairs: DirtyPairs::new(*home, bytes, zeroing),
        _live: live(PerCpuAreas::<D>::new(zeroing), bytes)?,
    })];
    if zeroing == Zeroing::On {
        cases.push(Box::new(BareLoop(Stores::new(home, AT_ONCE, bytes)?)));
    }
    Ok(cases)
}

/// The cases on one thread and on two.
///
/// # Errors
/// One line, if there is no memory.
pub fn threaded_cases<D: Domain>(
    bytes: usize,
    zeroing: Zeroing,
) -> Result<Vec<Box<dyn Case>>, CliError> {
    let ours = PerCpuAreas::<D>::new(zeroing);
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
            _live: live(source, bytes)?,
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
        Ok(together::run(self.threads, || pairs(source, bytes, iters))?)
    }
}

/// Areas that are live beside those that come and go.
fn live<S: Source>(source: S, bytes: usize) -> Result<Live<S>, CliError> {
    Ok(Live::new(source, (0..LIVE).map(|_| bytes))?)
}

/// Pairs of ours that are written to in between.
struct Dirty<D: Domain> {
    pairs: DirtyPairs<D>,
    _live: Live<PerCpuAreas<D>>,
}

impl<D: Domain> Case for Dirty<D> {
    fn name(&self) -> &'static str {
        PerCpuAreas::<D>::NAME
    }

    fn run(&mut self, iters: u64) -> Result<Duration, CliError> {
        Ok(self.pairs.run(iters)?)
    }
}

/// What no zeroing can do without.
struct BareLoop<D: Domain>(Stores<D>);

impl<D: Domain> Case for BareLoop<D> {
    fn name(&self) -> &'static str {
        "bare-loop"
    }

    fn run(&mut self, iters: u64) -> Result<Duration, CliError> {
        together::timed(|| {
            self.0.store(iters);
            Ok(())
        })
    }
}
