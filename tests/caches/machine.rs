//! A simulated machine with caches, what works on its CPUs, and what is seen of it from outside.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::AtomicU32;

use pcpu::backing::Backing;
use pcpu::backing::sim::SimAllocator;
use pcpu::cache::{LockedSeat, Seat};
use pcpu::stats::MapItem;
use pcpu::this_cpu::{FenceError, Pair, Put, RemotePairs};
use pcpu::unit::CpuId;
use pcpu::{FreeError, FreeFlags, Request};

pub use crate::cached::{seat, with_caches};

/// Areas of a run of 64 bytes each, where memory is as small as here.
pub const SLOTS: usize = 8;

/// A request that such runs serve.
pub const REQUEST: Request = Request::new(64, 8);

/// The seats of the first CPUs.
pub fn seats(pcpu: &SimAllocator, cpus: u32) -> Vec<LockedSeat> {
    (0..cpus).map(|cpu| seat(pcpu, cpu)).collect()
}

/// Frees what a test allocated and uses no more; any other address is refused.
pub fn free_at(pcpu: &SimAllocator, seat: &impl Seat, address: usize) -> Result<(), FreeError> {
    // SAFETY: no test frees another's areas, nor looks at the copies of an area that it has freed.
    unsafe { pcpu.free_at(seat, address, FreeFlags::empty()) }
}

/// The length of every live area, by its neutral address.
pub fn live_areas(pcpu: &SimAllocator) -> BTreeMap<usize, usize> {
    items(pcpu, |item| match item {
        MapItem::Area(range) => Some(range),
        _ => None,
    })
}

/// The length of every area that nobody has, by its neutral address.
pub fn idle_areas(pcpu: &SimAllocator) -> BTreeMap<usize, usize> {
    items(pcpu, |item| match item {
        MapItem::Idle(range) => Some(range),
        _ => None,
    })
}

fn items(
    pcpu: &SimAllocator,
    wanted: impl Fn(MapItem) -> Option<Range<usize>>,
) -> BTreeMap<usize, usize> {
    let pitch_bytes = pcpu.backing().window().pitch_bytes;
    let mut found = BTreeMap::new();
    pcpu.visit_map(|place, item| {
        if let Some(range) = wanted(item) {
            let chunk = pcpu.neutral_base() + place as usize * pitch_bytes;
            found.insert(chunk + range.start, range.len());
        }
    });
    found
}

/// What a [`Watched`] seat is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// To take an area out of a run.
    Take,
    /// To put one back.
    Put,
}

/// A seat that counts how many areas were taken out of runs and how often it changed another CPU's run, acts before some of its
/// steps, and does others wrongly if it is told to.
pub struct Watched<F> {
    seat: LockedSeat,
    taken: Cell<u64>,
    changed: Cell<u64>,
    refuses: Cell<bool>,
    misleads: RefCell<Option<fastrand::Rng>>,
    before: F,
}

impl<F: Fn(Step)> Watched<F> {
    pub fn new(seat: LockedSeat, before: F) -> Self {
        Self {
            seat,
            taken: Cell::new(0),
            changed: Cell::new(0),
            refuses: Cell::new(false),
            misleads: RefCell::new(None),
            before,
        }
    }

    /// How many areas came out of runs.
    pub fn taken(&self) -> u64 {
        self.taken.get()
    }

    /// The next change of both words of a pair comes to nothing, as if the caller had come to another CPU.
    pub fn refuse_next(&self) {
        self.refuses.set(true);
    }

    /// From now on a third of the names that are read are anything, and a tenth of the changes of a stash come to nothing, as if
    /// others worked on the CPU at the same time.
    pub fn mislead(&self, numbers: fastrand::Rng) {
        *self.misleads.borrow_mut() = Some(numbers);
    }

    /// Whether it misleads whoever does a step, which it does once in so many times; and to what.
    fn misled(&self, one_in: u32) -> Option<u32> {
        let mut misleads = self.misleads.borrow_mut();
        let numbers = misleads.as_mut()?;
        (numbers.u32(..one_in) == 0).then(|| numbers.u32(..) >> numbers.u32(..20))
    }

    /// How often it changed another CPU's run.
    pub fn changed(&self) -> u64 {
        self.changed.get()
    }
}

// SAFETY: each operation is that of the seat inside.
unsafe impl<F: Fn(Step)> Seat for Watched<F> {
    fn cpu(&self) -> CpuId {
        self.seat.cpu()
    }

    unsafe fn take_slot(
        &self,
        at: usize,
        class: u64,
        class_mask: u64,
        gate: &AtomicU32,
    ) -> Option<Pair> {
        (self.before)(Step::Take);
        // SAFETY: the promise of the caller.
        let taken = unsafe { self.seat.take_slot(at, class, class_mask, gate) };
        self.taken
            .set(self.taken.get() + u64::from(taken.is_some()));
        taken
    }

    unsafe fn put_slot(&self, at: usize, run: u64, slot: u64, gate: &AtomicU32) -> Put {
        (self.before)(Step::Put);
        // SAFETY: the promise of the caller.
        unsafe { self.seat.put_slot(at, run, slot, gate) }
    }

    unsafe fn replace_pair_gated(&self, at: usize, old: Pair, new: Pair, gate: &AtomicU32) -> bool {
        // SAFETY: the promise of the caller.
        !self.refuses.replace(false) && unsafe { self.seat.replace_pair_gated(at, old, new, gate) }
    }

    unsafe fn peek_pair(&self, at: usize) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        unsafe { self.seat.peek_pair(at) }
    }

    unsafe fn peek_word(&self, at: usize) -> Option<u64> {
        // SAFETY: the promise of the caller.
        unsafe { self.seat.peek_word(at) }
    }

    unsafe fn replace_word(&self, at: usize, old: u64, new: u64) -> bool {
        // SAFETY: the promise of the caller.
        self.misled(10).is_none() && unsafe { self.seat.replace_word(at, old, new) }
    }

    unsafe fn read_link(&self, at: usize) -> u32 {
        // SAFETY: the promise of the caller.
        let link = unsafe { self.seat.read_link(at) };
        self.misled(3).unwrap_or(link)
    }

    unsafe fn write_link(&self, at: usize, link: u32) {
        // SAFETY: the promise of the caller.
        unsafe { self.seat.write_link(at, link) }
    }

    fn remote_pairs(&self) -> RemotePairs {
        self.seat.remote_pairs()
    }

    unsafe fn replace_remote_pair(&self, copy: *mut Pair, old: Pair, new: Pair) -> bool {
        self.changed.set(self.changed.get() + 1);
        // SAFETY: the promise of the caller.
        unsafe { self.seat.replace_remote_pair(copy, old, new) }
    }

    fn wait_for_gated(&self) -> Result<(), FenceError> {
        self.seat.wait_for_gated()
    }
}
