//! Adding to counters: one hot counter, and eight in turn.
//!
//! All cases run the same two loops, inlined into them, with an empty `asm!` block after each addition: the compiler may
//! neither merge two additions nor keep a sum in a register, and nothing else is in a case's way. What a loop leaves is
//! the addition of each kind as an optimised program has it.

use std::time::Duration;

use pcpu_workloads::together;

use super::rounds::Case;
use crate::error::CliError;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod bare;
mod counters;

use counters::{
    Atomics, Counters, FastCounters, Mutexes, OfThread, ParkingLotMutexes, PerCpuCounters, Sharded,
    ThreadLocals,
};

/// How many counters there are: enough that no addition waits for the one before. A power of two, so that the choice of a
/// counter costs an `and`.
pub const COUNTERS: usize = 8;

/// Which counter is next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Always the first.
    Hot,
    /// All in turn.
    InTurn,
}

/// The cases of one order.
///
/// # Errors
/// One line, if there is no memory.
pub fn cases(order: Order) -> Result<Vec<Box<dyn Case>>, CliError> {
    let mut cases: Vec<Box<dyn Case>> = vec![
        Counting::case("pcpu", PerCpuCounters::new()?, order, 1),
        Counting::case("thread-local", OfThread::new(), order, 1),
    ];
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    if let Some(bare) = bare::Bare::new()? {
        cases.push(Counting::case("bare-loop", bare, order, 1));
    }
    let threads = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(2) as u32);
    cases.extend([
        Counting::case("atomic", Atomics::default(), order, 1),
        Counting::case("atomic-contended", Atomics::default(), order, threads),
        Counting::case("sharded", Sharded::default(), order, 1),
        Counting::case("fast-counter", FastCounters::new(), order, 1),
        Counting::case("thread_local", ThreadLocals::default(), order, 1),
        Counting::case("mutex", Mutexes::default(), order, 1),
        Counting::case("parking_lot", ParkingLotMutexes::default(), order, 1),
    ]);
    Ok(cases)
}

/// One kind of counters in a loop.
struct Counting<C> {
    name: &'static str,
    counters: C,
    order: Order,
    threads: u32,
}

impl<C: Counters + 'static> Counting<C> {
    fn case(name: &'static str, counters: C, order: Order, threads: u32) -> Box<dyn Case> {
        Box::new(Self {
            name,
            counters,
            order,
            threads,
        })
    }
}

impl<C: Counters> Case for Counting<C> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn threads(&self) -> u32 {
        self.threads
    }

    fn run(&mut self, iters: u64) -> Result<Duration, CliError> {
        let counters = &self.counters;
        together::run(self.threads, || {
            match self.order {
                Order::Hot => hot(counters, iters),
                Order::InTurn => in_turn(counters, iters),
            }
            Ok(())
        })
    }

    fn check(&mut self, iters: u64) -> Result<(), CliError> {
        let (sum, expected) = (self.counters.sum(), iters * u64::from(self.threads));
        match sum == expected {
            true => Ok(()),
            false => Err(CliError::Failed(format!(
                "{} counted {sum}, where {expected} were added",
                self.name
            ))),
        }
    }
}

#[inline(never)]
fn hot<C: Counters>(counters: &C, iters: u64) {
    for _ in 0..iters {
        counters.add(0);
        barrier();
    }
}

#[inline(never)]
fn in_turn<C: Counters>(counters: &C, iters: u64) {
    for i in 0..iters {
        counters.add(i as usize & (COUNTERS - 1));
        barrier();
    }
}

/// Nothing, of which the compiler must think that it reads and writes memory.
#[inline(always)]
fn barrier() {
    // SAFETY: no instruction.
    unsafe { std::arch::asm!("", options(nostack, preserves_flags)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Counters of which one does not count.
    #[derive(Default)]
    struct Lazy([AtomicU64; COUNTERS]);

    impl Counters for Lazy {
        fn add(&self, index: usize) {
            if index != COUNTERS - 1 {
                self.0[index].fetch_add(1, Ordering::Relaxed);
            }
        }

        fn sum(&mut self) -> u64 {
            self.0.iter_mut().map(|counter| *counter.get_mut()).sum()
        }
    }

    #[test]
    fn a_case_that_miscounts_is_found_out() {
        let mut lazy = Counting::case("lazy", Lazy::default(), Order::InTurn, 2);
        lazy.run(16).unwrap();
        assert_eq!(
            lazy.check(16).unwrap_err().to_string(),
            "lazy counted 28, where 32 were added"
        );
        assert_eq!(lazy.threads(), 2);
    }

    #[test]
    fn a_hot_counter_is_one_counter() {
        let mut lazy = Counting::case("lazy", Lazy::default(), Order::Hot, 1);
        lazy.run(16).unwrap();
        lazy.check(16).unwrap();
    }
}
