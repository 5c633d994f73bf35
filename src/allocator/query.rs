//! Questions about an instance: what an address is, what the counters say, what lies where.

use core::ops::Range;
use core::ptr::NonNull;

use lock_api::{MutexGuard, RawMutex};

use super::PerCpuAllocator;
use super::hardened::Hardened;
use super::state::State;
use crate::backing::Backing;
use crate::chunk::{Body, Chunk};
use crate::places::Place;
use crate::stats::{ChunkKind, ChunkStats, MapItem, Stats, visit_map};
use crate::unit::{CpuId, GRANULE_BYTES};

/// A region of the per-CPU memory. There are these three: they are what a unit is divided into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Region {
    /// Static variables of the kernel or program.
    Static,
    /// The reserved region: static variables of modules.
    Reserved,
    /// Dynamic allocations, of the first chunk or a later one.
    Dynamic,
}

/// What an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct AddressInfo {
    /// The CPU whose copy it is; `None` for a neutral address.
    pub cpu: Option<CpuId>,
    /// The neutral address of the same variable.
    pub neutral: usize,
    /// Place of the chunk in the window, 0 being the first chunk.
    pub place: u32,
    /// Offset in the unit, in bytes.
    pub offset_bytes: usize,
    /// The region that it lies in.
    pub region: Region,
}

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// What `address` is: a neutral address or some CPU's copy of one, static, a module's or dynamic. `None` if it is
    /// no per-CPU address of this instance. Whether an area lives there is not asked. Where units lie at their neutral
    /// addresses (an offset of 0) it is taken for the CPU's copy.
    ///
    /// Cost: one comparison per possible CPU.
    pub fn address_info(&self, address: usize) -> Option<AddressInfo> {
        let of_cpu = self.units.possible().iter().find_map(|cpu| {
            let neutral = address.wrapping_sub(self.units.offset(cpu)?);
            self.neutral_info(neutral, Some(cpu))
        });
        of_cpu.or_else(|| self.neutral_info(address, None))
    }

    /// The region that a neutral address lies in, whatever copies lie there; `None` if it is none of this instance. Its cost does not
    /// depend on how many CPUs there are.
    pub(crate) fn region(&self, neutral: usize) -> Option<Region> {
        let info = self.neutral_info(neutral, None)?;
        Some(info.region)
    }

    /// Whether `address` is some CPU's copy of a static variable, and whose.
    pub fn is_static_address(&self, address: usize) -> Option<CpuId> {
        self.address_info(address)
            .filter(|info| info.region == Region::Static)?
            .cpu
    }

    /// Whether `address` is some CPU's copy of a module's variable, and whose.
    pub fn is_module_address(&self, address: usize) -> Option<CpuId> {
        self.address_info(address)
            .filter(|info| info.region == Region::Reserved)?
            .cpu
    }

    /// The physical address behind one CPU's copy, if the backing can tell.
    pub fn physical_address(&self, address: usize) -> Option<u64> {
        self.address_info(address)?.cpu?;
        self.backing.physical_address(address)
    }

    fn neutral_info(&self, neutral: usize, cpu: Option<CpuId>) -> Option<AddressInfo> {
        let (place, offset_bytes) = self.locate(neutral)?;
        let regions = &self.geometry.regions;
        let region = match place {
            0 if offset_bytes < regions.reserved.start => Region::Static,
            0 if offset_bytes < regions.dynamic.start => Region::Reserved,
            0 if offset_bytes >= regions.dynamic.end => return None,
            _ => Region::Dynamic,
        };
        Some(AddressInfo {
            cpu,
            neutral,
            place,
            offset_bytes,
            region,
        })
    }

    /// The size of the area at a neutral address, rounded up to the grain, in bytes; `None` if none starts there. That of an area out
    /// of a cache may be rounded up to its alignment.
    pub fn area_bytes(&self, neutral: usize) -> Option<usize> {
        let (place, offset) = self.locate(neutral)?;
        if !offset.is_multiple_of(GRANULE_BYTES) {
            return None;
        }
        if let Some(hardened) = &self.hardened
            && !self.is_in_reserved(place, offset)
        {
            return Self::hardened_area_bytes(hardened, neutral);
        }
        let state = self.state.lock();
        let chunk = match (
            self.is_in_reserved(place, offset),
            state.directory.get(place),
        ) {
            (true, _) => state.reserved?,
            (false, Place::Chunk(chunk)) => chunk,
            (false, Place::Vacant | Place::Parked(_) | Place::Busy) => return None,
        };
        let body = state.body(chunk);
        if offset < body.byte_offset(0) {
            return None;
        }
        let area = body.map.area_at(body.granule(offset)).ok()?;
        if self.is_own(neutral) {
            return None;
        }
        Some(body.byte_offset(area.end) - body.byte_offset(area.start))
    }

    fn is_in_reserved(&self, place: u32, offset: usize) -> bool {
        place == 0 && self.geometry.regions.reserved.contains(&offset)
    }

    /// The counters. In [hardened mode](crate::hardened), areas in quarantine have been freed; cost: a look at each of them.
    pub fn stats(&self) -> Stats {
        let quarantine = self.hardened.as_ref().map(Hardened::quarantine);
        let state = self.swept();
        let mut stats = state.stats;
        if let Some(quarantine) = &quarantine {
            quarantine.leave_out(&mut stats);
        }
        self.settle_counters(&mut stats);
        stats
    }

    /// Pages of a unit that have memory, over all chunks, the first included. Unlike [`stats`](Self::stats), this changes
    /// nothing: freed areas that have not been swept stay so.
    pub fn populated_pages(&self) -> u64 {
        self.state.lock().stats.populated_pages
    }

    /// The state, with nothing left to be swept.
    fn swept(&self) -> MutexGuard<'_, R, State> {
        let mut state = self.state.lock();
        state.sweep_all();
        self.note_due(&state);
        state
    }

    /// Reports the figures of every chunk, in order of their places. The lock is held meanwhile: `visit` must not call
    /// the instance.
    pub fn visit_chunks(&self, mut visit: impl FnMut(&ChunkStats)) {
        let state = self.swept();
        for (chunk, place, kind) in self.chunks(&state) {
            let body = state.body(chunk);
            visit(&ChunkStats::of(place, kind, body, self.idle(place, body)));
        }
    }

    /// Reports what lies in every chunk: its areas, live ones and those that nobody has, its free runs, its populated pages. The lock is held meanwhile:
    /// `visit` must not call the instance.
    pub fn visit_map(&self, mut visit: impl FnMut(u32, MapItem)) {
        let state = self.swept();
        for (chunk, place, _) in self.chunks(&state) {
            let body = state.body(chunk);
            let page_bytes = self.geometry.sizes.page_bytes();
            visit_map(body, page_bytes, self.idle(place, body), &mut |item| {
                visit(place, item)
            });
        }
    }

    /// Which areas of a chunk nobody has.
    fn idle(&self, place: u32, body: &Body) -> impl Fn(&Range<u32>) -> bool {
        move |area| self.is_own(self.neutral(place) + body.byte_offset(area.start))
    }

    fn chunks<'a>(
        &self,
        state: &'a State,
    ) -> impl Iterator<Item = (NonNull<Chunk>, u32, ChunkKind)> + 'a {
        let reserved = state
            .reserved
            .map(|chunk| (chunk, 0, ChunkKind::FirstReserved));
        reserved
            .into_iter()
            .chain(state.directory.chunks().map(|(place, chunk)| {
                let kind = if place == 0 {
                    ChunkKind::FirstDynamic
                } else {
                    ChunkKind::Dynamic
                };
                (chunk, place, kind)
            }))
    }
}
