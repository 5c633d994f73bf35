//! Models of what the allocator does without its lock, on [`crate::models`]' machine: they run its own code.

use core::cell::RefCell;
use std::collections::BTreeSet;
use std::vec::Vec;

use std::sync::Arc;

use crate::backing::Backing;
use crate::models::{Machine, ModelSeat};
use crate::this_cpu::RemotePairs;
use crate::unit::MIN_UNIT_BYTES;
use crate::{AllocError, AllocFlags, FreeError, FreeFlags, Request};

mod caches;
mod chunks;
mod frees;
mod stashes;

/// A machine, and who holds which of its areas.
struct Model {
    machine: Arc<Machine>,
    held: RefCell<BTreeSet<usize>>,
}

// SAFETY: a model's threads take turns on one thread of the system.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Model {
    fn of(machine: Machine) -> Arc<Self> {
        Arc::new(Self {
            machine: Arc::new(machine),
            held: RefCell::default(),
        })
    }

    fn seat(&self, cpu: u32, remote: RemotePairs) -> ModelSeat {
        self.machine.clone().seat(cpu, remote)
    }

    /// Notes that somebody has been given an area, which nobody may hold.
    fn hold(&self, area: usize) -> usize {
        assert!(self.held.borrow_mut().insert(area), "handed out twice");
        area
    }

    /// Notes that whoever holds an area is about to free it.
    fn let_go(&self, area: usize) {
        assert!(
            self.held.borrow_mut().remove(&area),
            "freed by somebody else"
        );
    }

    fn allocate(&self, bytes: usize) -> Result<usize, AllocError> {
        let request = Request::new(bytes, 8).with_flags(AllocFlags::NO_ZERO);
        let area = self.machine.pcpu.allocate(&request)?;
        self.assert_populated(area, bytes);
        Ok(self.hold(area))
    }

    /// Frees what may be another's by now.
    fn try_free(&self, area: usize) -> Result<(), FreeError> {
        // SAFETY: nobody looks at the copies.
        unsafe { self.machine.pcpu.free(area) }
    }

    fn free(&self, area: usize) {
        self.let_go(area);
        assert_eq!(self.try_free(area), Ok(()));
    }

    fn allocate_at(&self, seat: &ModelSeat) -> usize {
        let request = Request::new(CACHED_BYTES, 8).with_flags(AllocFlags::NO_ZERO);
        let area = self.machine.pcpu.allocate_at(seat, &request);
        self.hold(area.expect("there is room"))
    }

    fn allocate_some_at(&self, seat: &ModelSeat, count: usize) -> Vec<usize> {
        (0..count).map(|_| self.allocate_at(seat)).collect()
    }

    /// As [`try_free`](Self::try_free), in the two steps that a process takes.
    fn try_free_at(&self, seat: &ModelSeat, area: usize) -> Result<(), FreeError> {
        let (pcpu, flags) = (&self.machine.pcpu, FreeFlags::empty());
        // SAFETY: nobody looks at the copies.
        unsafe {
            match pcpu.put_own_at(seat, area, flags) {
                Ok(()) => Ok(()),
                Err(why) => pcpu.free_past_own_at(seat, area, flags, why),
            }
        }
    }

    fn free_at(&self, seat: &ModelSeat, area: usize) {
        self.let_go(area);
        assert_eq!(self.try_free_at(seat, area), Ok(()));
    }

    /// What the counters say, which must be what the holders say.
    fn assert_settled(&self) {
        let stats = self.machine.pcpu.stats();
        assert_eq!(stats.live, self.held.borrow().len() as u64);
        assert_eq!(stats.late_errors, 0);
    }

    /// Sweeps while others free.
    fn assert_settled_later(&self) {
        let live = self.machine.pcpu.stats().live;
        assert!(live >= self.held.borrow().len() as u64);
    }

    /// Place of the chunk and first page of an area.
    fn page_of(&self, area: usize) -> (u32, u32) {
        let window = self.machine.pcpu.backing().window();
        let from_base = area - window.base;
        let (chunk, offset) = (
            from_base / window.pitch_bytes,
            from_base % window.pitch_bytes,
        );
        (chunk as u32, (offset / PAGE_BYTES) as u32)
    }

    fn assert_populated(&self, area: usize, bytes: usize) {
        let (chunk, first) = self.page_of(area);
        let (_, last) = self.page_of(area + bytes - 1);
        let mut pages = first..=last;
        let backing = self.machine.pcpu.backing();
        assert!(chunk == 0 || pages.all(|page| backing.is_populated(chunk, page)));
    }

    /// Takes what is left of the first chunk, but for holes of less than `least_bytes`.
    fn fill_first_chunk(&self, least_bytes: usize) {
        let mut bytes = MIN_UNIT_BYTES / 2;
        while bytes >= least_bytes {
            let area = self.allocate(bytes).expect("there is room");
            if self.page_of(area).0 > 0 {
                self.free(area);
                bytes /= 2;
            }
        }
        self.machine.pcpu.upkeep();
    }
}

const PAGE_BYTES: usize = 4096;

/// Two such areas make a run.
const CACHED_BYTES: usize = 256;
