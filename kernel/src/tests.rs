//! The tests that run in the kernel: a list of names and functions, a line for each, and the tally at the end.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU64, Ordering};

use pcpu::this_cpu::Live;
use pcpu::unit::CpuId;
use pcpu::{CpuCell, Domain, drain_caches};

use crate::cpus::work::{nr_online, on_all_cpus, online};
use crate::exit::Outcome;
use crate::machine::machine;
use crate::percpu::{Kernel, copy};
use crate::println;

mod cache_sweeps;
pub mod death;
mod hotplug;
mod memory;
mod modules;
mod one_op;
mod op_sweeps;
pub mod ops;
mod paging;
mod percpu;
mod placing;
mod shootdown;
mod slot_sweeps;
mod sweep;
mod trace;
mod user;

/// A test.
pub struct Test {
    name: &'static str,
    run: fn() -> Result<(), Why>,
}

impl Test {
    const fn new(name: &'static str, run: fn() -> Result<(), Why>) -> Self {
        Self { name, run }
    }
}

/// As long as an error may be without a heap.
const WHY_BYTES: usize = 112;

/// Why a test failed: a short text. There is no heap to keep a longer one in.
pub struct Why {
    text: [u8; WHY_BYTES],
    bytes: usize,
}

impl Why {
    /// The text; its end is cut off where it is too long.
    pub fn new(text: fmt::Arguments<'_>) -> Self {
        let mut why = Self {
            text: [0; WHY_BYTES],
            bytes: 0,
        };
        // It fails only when the text is full.
        let _ = why.write_fmt(text);
        why
    }
}

impl Write for Why {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            let place = self.text.get_mut(self.bytes).ok_or(fmt::Error)?;
            *place = byte;
            self.bytes += 1;
        }
        Ok(())
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.text[..self.bytes].utf8_chunks() {
            f.write_str(chunk.valid())?;
        }
        Ok(())
    }
}

impl<E: core::error::Error> From<E> for Why {
    fn from(error: E) -> Self {
        Self::new(format_args!("{error}"))
    }
}

/// Ends a test as failed if a condition does not hold.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err($crate::tests::Why::new(format_args!($($why)+)));
        }
    };
}

/// Runs all tests.
pub fn run_all() -> Outcome {
    let (mut passed, mut failed) = (0, 0);
    let sweeps = match machine().start_info.option("icount") {
        Some(_) => [
            op_sweeps::TESTS,
            slot_sweeps::TESTS,
            placing::TESTS,
            cache_sweeps::tests(),
        ],
        None => [&[][..]; 4],
    };
    let trace = match machine().start_info.module {
        Some(_) => trace::TESTS,
        None => &[],
    };
    let [op_sweeps, slot_sweeps, placing, cache_sweeps] = sweeps;
    let tests = [
        memory::TESTS,
        percpu::TESTS,
        hotplug::TESTS,
        shootdown::TESTS,
        paging::TESTS,
        ops::TESTS,
        one_op::TESTS,
        user::TESTS,
        modules::TESTS,
        op_sweeps,
        slot_sweeps,
        placing,
        cache_sweeps,
        trace,
    ];
    for test in tests.into_iter().flatten() {
        match (test.run)() {
            Ok(()) => {
                println!("ok {}", test.name);
                passed += 1;
            }
            Err(why) => {
                println!("FAILED {}: {why}", test.name);
                failed += 1;
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 {
        Outcome::Passed
    } else {
        Outcome::Failed
    }
}

/// A CPU's copy of a number.
fn copy_of(variable: &impl Live<Target = CpuCell<u64>, Domain = Kernel>, cpu: CpuId) -> u64 {
    // SAFETY: the copy is there as long as the variable is.
    unsafe { &*copy(variable, cpu) }.read_remote()
}

/// Runs `work` on all CPUs that are online, and fails unless it says on each that all is right.
fn all_right(work: impl Fn(CpuId) -> bool + Sync) -> Result<(), Why> {
    let right = AtomicU64::new(0);
    on_all_cpus(&|cpu| {
        right.fetch_add(u64::from(work(cpu)), Ordering::Relaxed);
    });
    let (right, all) = (right.into_inner(), u64::from(nr_online()));
    ensure!(right == all, "right on {right} of {all} CPUs");
    Ok(())
}

/// Every CPU that is online empties its cache: what lies idle there is nobody else's to take.
fn drain_all() {
    on_all_cpus(&|_| drain_caches::<Kernel>());
}

/// How many areas are allocated from the chunks and are nobody's: they lie in caches, or the allocator has them for itself.
fn idle_areas() -> u64 {
    let mut areas = 0;
    Kernel::allocator().visit_chunks(|chunk| areas += u64::from(chunk.idle_areas));
    areas
}

/// How many CPUs work at a time in [`by_turns`].
const TURN_CPUS: u32 = 8;

/// Calls `work` once on every CPU that is online, a few CPUs at a time: for work with timers, which QEMU serves in one
/// thread, and which starve where more CPUs spin than the host has.
fn by_turns(work: impl Fn(CpuId) + Sync) {
    let last = online().last().map_or(0, CpuId::get);
    for first in (0..=last).step_by(TURN_CPUS as usize) {
        on_all_cpus(&|cpu| {
            if (first..first + TURN_CPUS).contains(&cpu.get()) {
                work(cpu);
            }
        });
    }
}
