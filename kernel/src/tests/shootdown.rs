//! Shootdowns that several CPUs start at once.
//!
//! Each CPU has a page that it maps to another frame again and again, and looks at the pages of the others. A frame holds the
//! number of its turn. When a shootdown has ended, its turn is made known: whoever sees an older one from then on was not asked,
//! or forgot something else.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pcpu::backing::paging::Stale;
use pcpu::unit::{CpuId, NodeId};
use x86_64::structures::paging::PhysFrame;

use super::{Test, Why};
use crate::cpus::shootdown;
use crate::cpus::work::{nr_online, on_all_cpus};
use crate::memory::paging::{self, Access};
use crate::memory::{PAGE_BYTES, PHYSICAL_MAP, areas, frames};
use crate::{ensure, probe};

pub const TESTS: &[Test] = &[Test::new(
    "CPUs that ask for a shootdown at once all get theirs",
    at_once,
)];

/// CPUs that ask; all answer.
const CPUS: usize = 8;

/// How often each asks; fewer times where more CPUs answer.
const MAX_TURNS: u32 = 60;

/// Answers of each asking CPU's turns together.
const ANSWERS: u32 = 600;

/// Frames of a page, which are used in turn: an old one keeps its number for a while.
const FRAMES: usize = 4;

struct Pages {
    /// The first CPU's page; those of the others follow.
    start: usize,
    frames: [[PhysFrame; FRAMES]; CPUS],
    /// The last turn of each CPU that all others must see.
    known: [AtomicUsize; CPUS],
    /// How many turns each has: a turn's number is a byte.
    turns: u8,
    stale: AtomicU64,
}

impl Pages {
    fn address(&self, cpu: usize) -> usize {
        self.start + cpu * PAGE_BYTES
    }

    fn frame(&self, cpu: usize, turn: u8) -> PhysFrame {
        self.frames[cpu][usize::from(turn) % FRAMES]
    }

    /// Lets a CPU's page show the number of a turn, to this CPU.
    fn show(&self, cpu: usize, turn: u8) {
        let frame = self.frame(cpu, turn);
        let alias = PHYSICAL_MAP + frame.start_address().as_u64() as usize;
        // SAFETY: a frame of this test, not mapped elsewhere now.
        unsafe { core::ptr::with_exposed_provenance_mut::<u8>(alias).write_volatile(turn) };
        // SAFETY: only this test knows of the address.
        let mapped = unsafe { paging::map(self.address(cpu), frame, Access::Read) };
        mapped.unwrap_or_else(|_| panic!("no frame for a page table"));
    }

    fn hide(&self, cpu: usize) {
        // SAFETY: mapped by `show`; who looks at it takes a fault.
        unsafe { paging::unmap(self.address(cpu)) };
    }

    fn flush(&self, cpu: usize) {
        shootdown::flush(Stale::range(self.address(cpu), PAGE_BYTES));
    }

    /// Looks at all pages: none shows less than what was known before. One that is being changed may be missing.
    fn look(&self) {
        for cpu in 0..CPUS {
            let known = self.known[cpu].load(Ordering::Acquire);
            let seen = probe::read(self.address(cpu)).map_or(known, usize::from);
            self.stale
                .fetch_add(u64::from(seen < known), Ordering::Relaxed);
        }
    }

    fn ask(&self, cpu: CpuId) {
        let cpu = cpu.index();
        for turn in 1..=self.turns {
            self.look();
            self.hide(cpu);
            self.show(cpu, turn);
            self.flush(cpu);
            self.known[cpu].store(usize::from(turn), Ordering::Release);
        }
        self.look();
    }
}

fn at_once() -> Result<(), Why> {
    let node = NodeId::new(0);
    let before = frames::free_count();
    let frame = || frames::allocate(node).unwrap_or_else(|| panic!("no frame"));
    let pages = Pages {
        start: areas::addresses(CPUS),
        frames: core::array::from_fn(|_| core::array::from_fn(|_| frame())),
        known: [const { AtomicUsize::new(0) }; CPUS],
        turns: (ANSWERS / nr_online()).min(MAX_TURNS) as u8,
        stale: AtomicU64::new(0),
    };
    (0..CPUS).for_each(|cpu| pages.show(cpu, 0));
    on_all_cpus(&|cpu| {
        if cpu.index() < CPUS {
            pages.ask(cpu);
        }
    });
    let stale = pages.stale.load(Ordering::Relaxed);
    let asked = pages.known.iter().map(|it| it.load(Ordering::Relaxed));
    let asked = asked.sum::<usize>();
    for cpu in 0..CPUS {
        pages.hide(cpu);
        pages.flush(cpu);
    }
    for frame in pages.frames.into_iter().flatten() {
        // SAFETY: allocated above, and not mapped any more.
        unsafe { frames::free(frame) };
    }
    let wanted = CPUS.min(nr_online() as usize) * usize::from(pages.turns);
    ensure!(asked == wanted, "{asked} shootdowns of {wanted}");
    ensure!(stale == 0, "{stale} times a page was seen that had gone");
    let left = frames::free_count();
    // Page tables stay.
    ensure!(before - left <= 3, "{before} frames before, {left} after");
    Ok(())
}
