//! A recorded trace of a real kernel, replayed by all CPUs at once. `cargo xtask kernel --trace FILE` passes it as a boot
//! module: records of four words, the number of the area, its size (0: it is freed), its alignment, and the CPU that did it.
//!
//! A record is done by the CPU that the trace names, modulo the CPUs that are here. A CPU waits where it would free what is
//! not there yet, and where it is too far ahead of the others; both end, for the first record that is not done never waits.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pcpu::unit::CpuId;
use pcpu::{Domain, PerCpuPtr, Request, alloc_percpu_bytes, free_percpu, per_cpu_ptr};

use super::{Test, Why, drain_all};
use crate::cpus::work::{nr_online, on_all_cpus};
use crate::machine::machine;
use crate::memory::{PHYSICAL_MAP, areas, frames};
use crate::percpu::{Kernel, frames_held};
use crate::{ensure, println};

pub const TESTS: &[Test] = &[Test::new("a recorded trace on all CPUs", replay)];

/// How far a CPU may be ahead, in records.
const AHEAD: usize = 512;

/// An area that was asked for in vain.
const REFUSED: u64 = u64::MAX;

#[derive(Clone, Copy)]
#[repr(C)]
struct Record {
    area: u32,
    bytes: u32,
    align: u32,
    cpu: u32,
}

/// What the CPUs do together.
struct Replay {
    records: &'static [Record],
    /// The handle of each area, or 0.
    handles: &'static [AtomicU64],
    nr_cpus: usize,
    done: AtomicUsize,
    refused: AtomicUsize,
    wrong: AtomicUsize,
}

fn replay() -> Result<(), Why> {
    let records = records();
    let areas = records.iter().map(|record| record.area as usize + 1).max();
    let replay = Replay {
        records,
        handles: areas::zeroed(areas.unwrap_or(0)),
        nr_cpus: nr_online() as usize,
        done: AtomicUsize::new(0),
        refused: AtomicUsize::new(0),
        wrong: AtomicUsize::new(0),
    };
    let frames_before = frames_at_rest();
    let before = Kernel::allocator().stats();
    on_all_cpus(&|cpu| replay.run(cpu));
    let at_end = Kernel::allocator().stats();
    let left = at_end.live - before.live;
    for handle in replay.handles {
        replay.free(handle.load(Ordering::Relaxed));
    }
    let after = Kernel::allocator().stats();
    let frames_after = frames_at_rest();
    let [done, refused, wrong] =
        [&replay.done, &replay.refused, &replay.wrong].map(|it| it.load(Ordering::Relaxed));
    println!(
        "   {done} records by {} CPUs, {left} areas live at the end in {} chunks",
        replay.nr_workers(),
        at_end.chunks
    );
    ensure!(done == records.len(), "{done} of {} records", records.len());
    ensure!(refused == 0, "{refused} requests were refused");
    ensure!(wrong == 0, "{wrong} areas were not what they should be");
    ensure!(after.live == before.live, "{} areas are left", after.live);
    ensure!(
        frames_after == frames_before,
        "{frames_before:?} frames held and free before, {frames_after:?} after"
    );
    Ok(())
}

/// The frames that the allocator holds without any page that nobody uses, and those that are free.
pub fn frames_at_rest() -> (u64, usize) {
    drain_all();
    Kernel::allocator().trim(0);
    // SAFETY: the other CPUs have played their part.
    unsafe { Kernel::allocator().trim_metadata() };
    (frames_held(), frames::free_count())
}

/// The boot module.
fn records() -> &'static [Record] {
    let Some(module) = machine().start_info.module else {
        return &[];
    };
    let start = core::ptr::with_exposed_provenance(PHYSICAL_MAP + module.start as usize);
    let bytes = (module.end - module.start) as usize;
    // SAFETY: QEMU placed it there, at a page, its frames are kept free of everything else, and any bytes are records.
    unsafe { core::slice::from_raw_parts(start, bytes / size_of::<Record>()) }
}

impl Replay {
    /// The CPU that does a record. All CPUs that are there are online by now, and have the lowest numbers.
    fn worker(&self, record: &Record) -> usize {
        record.cpu as usize % self.nr_cpus
    }

    /// How many CPUs have something to do.
    fn nr_workers(&self) -> usize {
        let does_one = |cpu: &usize| {
            self.records
                .iter()
                .any(|record| self.worker(record) == *cpu)
        };
        (0..self.nr_cpus).filter(does_one).count()
    }

    fn run(&self, cpu: CpuId) {
        for (index, record) in self.records.iter().enumerate() {
            if self.worker(record) != cpu.index() {
                continue;
            }
            let is_free = record.bytes == 0;
            while self.done.load(Ordering::Relaxed) + AHEAD < index {
                core::hint::spin_loop();
            }
            let handle = &self.handles[record.area as usize];
            if is_free {
                while handle.load(Ordering::Acquire) == 0 {
                    core::hint::spin_loop();
                }
                let area = handle.swap(0, Ordering::Relaxed);
                self.wrong
                    .fetch_add(usize::from(area == 0), Ordering::Relaxed);
                self.free(area);
            } else {
                handle.store(self.allocate(record), Ordering::Release);
            }
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Allocates an area, which must be zero on every CPU, and marks its first byte on every CPU.
    fn allocate(&self, record: &Record) -> u64 {
        let (bytes, align) = (record.bytes as usize, record.align as usize);
        let Ok(area) = alloc_percpu_bytes::<Kernel>(&Request::new(bytes, align)) else {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return REFUSED;
        };
        self.change_mark(area, 0, mark(area));
        area.neutral() as u64
    }

    fn free(&self, handle: u64) {
        let area = PerCpuPtr::from_neutral(handle as usize);
        let Some(area) = area.filter(|_| handle != REFUSED) else {
            return;
        };
        self.change_mark(area, mark(area), 0xff);
        // SAFETY: taken out of the table, so that nobody else has it.
        if unsafe { free_percpu(area) }.is_err() {
            self.wrong.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Changes the first byte of every CPU's copy, and counts those that were something else.
    fn change_mark(&self, area: PerCpuPtr<u8, Kernel>, from: u8, to: u8) {
        for cpu in Kernel::allocator().units().materialised().iter() {
            let Ok(copy) = per_cpu_ptr(area, cpu) else {
                continue;
            };
            // SAFETY: the caller alone has the area, of at least a byte, and the CPU has memory.
            let was = unsafe { copy.replace(to) };
            if was != from {
                self.wrong.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// What is in an area: told from its neighbours', and never 0.
fn mark(area: PerCpuPtr<u8, Kernel>) -> u8 {
    (area.neutral() / 4 % 251) as u8 + 1
}
