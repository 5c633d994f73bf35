//! The kinds of counters: ours, and what a program would use otherwise, each as a good engineer writes it.
//!
//! All but the thread's own can be added up from outside while others count.

use std::array;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crossbeam_utils::CachePadded;
use fast_counter::ConcurrentCounter;
use pcpu::{CpuCell, LocalCell, Parts, PerCpu, RemoteCell};
use thread_local::ThreadLocal;

use super::COUNTERS;
use crate::error::CliError;

/// So many counters of a kind.
pub trait Counters: Sync {
    /// Adds 1 to the counter at `index`, which is below [`COUNTERS`]. `inline(always)`: the loop is to have nothing else.
    fn add(&self, index: usize);

    /// What all have counted together; of the calling thread, if each thread has its own.
    fn sum(&mut self) -> u64;
}

/// Ours: a per-CPU variable.
#[derive(Debug)]
pub struct PerCpuCounters(PerCpu<[CpuCell<u64>; COUNTERS]>);

impl PerCpuCounters {
    /// Counters at 0.
    ///
    /// # Errors
    /// One line, if there is no memory.
    pub fn new() -> Result<Self, CliError> {
        let counters = PerCpu::new();
        counters
            .map(Self)
            .map_err(|error| CliError::Failed(format!("a counter: {error}")))
    }
}

impl Counters for PerCpuCounters {
    #[inline(always)]
    fn add(&self, index: usize) {
        self.0.element(index).inc();
    }

    fn sum(&mut self) -> u64 {
        (0..COUNTERS).map(|index| self.0.element(index).sum()).sum()
    }
}

thread_local! {
    static OF_THREAD: [Cell<u64>; COUNTERS] = const { [const { Cell::new(0) }; COUNTERS] };
}

/// The thread's own: nobody else can read them.
#[derive(Debug)]
pub struct OfThread(());

impl OfThread {
    /// The counters of the thread, which are set to 0.
    pub fn new() -> Self {
        OF_THREAD.with(|counters| counters.iter().for_each(|counter| counter.set(0)));
        Self(())
    }
}

impl Counters for OfThread {
    #[inline(always)]
    fn add(&self, index: usize) {
        OF_THREAD.with(|counters| counters[index].update(|count| count + 1));
    }

    fn sum(&mut self) -> u64 {
        OF_THREAD.with(|counters| counters.iter().map(Cell::get).sum())
    }
}

/// Atomics that all threads share.
#[derive(Debug, Default)]
pub struct Atomics([AtomicU64; COUNTERS]);

impl Counters for Atomics {
    #[inline(always)]
    fn add(&self, index: usize) {
        self.0[index].fetch_add(1, Ordering::Relaxed);
    }

    fn sum(&mut self) -> u64 {
        self.0.iter_mut().map(|counter| *counter.get_mut()).sum()
    }
}

/// As many as the threads that hand-made counters are made for.
const SHARDS: usize = 16;

/// The usual hand-made counter: padded atomics, of which each thread has one.
#[derive(Debug, Default)]
pub struct Sharded([[CachePadded<AtomicU64>; SHARDS]; COUNTERS]);

impl Sharded {
    /// The thread's shard.
    #[inline(always)]
    fn shard() -> usize {
        const NONE: usize = usize::MAX;
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static SHARD: Cell<usize> = const { Cell::new(NONE) };
        }
        #[cold]
        fn choose() -> usize {
            let shard = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
            SHARD.set(shard);
            shard
        }
        match SHARD.get() {
            NONE => choose(),
            shard => shard,
        }
    }
}

impl Counters for Sharded {
    #[inline(always)]
    fn add(&self, index: usize) {
        self.0[index][Self::shard() % SHARDS].fetch_add(1, Ordering::Relaxed);
    }

    fn sum(&mut self) -> u64 {
        let shards = self.0.iter_mut().flatten();
        shards.map(|shard| *shard.get_mut()).sum()
    }
}

/// The sharded counter of the crate `fast-counter`.
#[derive(Debug)]
pub struct FastCounters([ConcurrentCounter; COUNTERS]);

impl FastCounters {
    /// Counters at 0.
    pub fn new() -> Self {
        Self(array::from_fn(|_| ConcurrentCounter::new(SHARDS)))
    }
}

impl Counters for FastCounters {
    #[inline(always)]
    fn add(&self, index: usize) {
        self.0[index].add(1);
    }

    fn sum(&mut self) -> u64 {
        let sum: isize = self.0.iter().map(ConcurrentCounter::sum).sum();
        sum.cast_unsigned() as u64
    }
}

/// A variable of the crate `thread_local` for each counter. Only its thread writes to it, so it needs no LOCKed step.
#[derive(Debug, Default)]
pub struct ThreadLocals([ThreadLocal<AtomicU64>; COUNTERS]);

impl Counters for ThreadLocals {
    #[inline(always)]
    fn add(&self, index: usize) {
        let counter = self.0[index].get_or_default();
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    fn sum(&mut self) -> u64 {
        let counters = self.0.iter_mut().flatten();
        counters.map(|counter| *counter.get_mut()).sum()
    }
}

/// A lock around each counter.
#[derive(Debug, Default)]
pub struct Mutexes([Mutex<u64>; COUNTERS]);

impl Counters for Mutexes {
    #[inline(always)]
    fn add(&self, index: usize) {
        // A program that aborts on panic has no poisoned locks.
        *self.0[index].lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    fn sum(&mut self) -> u64 {
        let counters = self.0.iter_mut();
        let read =
            |counter: &mut Mutex<u64>| *counter.get_mut().unwrap_or_else(PoisonError::into_inner);
        counters.map(read).sum()
    }
}

/// The lock of the crate `parking_lot` around each counter.
#[derive(Debug, Default)]
pub struct ParkingLotMutexes([parking_lot::Mutex<u64>; COUNTERS]);

impl Counters for ParkingLotMutexes {
    #[inline(always)]
    fn add(&self, index: usize) {
        *self.0[index].lock() += 1;
    }

    fn sum(&mut self) -> u64 {
        self.0.iter_mut().map(|counter| *counter.get_mut()).sum()
    }
}
