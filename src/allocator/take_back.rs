//! How an area is taken back: every address that is not that of a live area is refused, and changes nothing.
//!
//! An area is freed by one mark, without the lock. Its granules become free when its page is swept: by whoever frees there,
//! once enough has been freed and the lock is free, or when a request finds no room.

use core::ptr::NonNull;

use lock_api::RawMutex;

use super::hardened::is_free_told_apart;
use super::{PerCpuAllocator, SWEEP_DUE, WATCHED};
use crate::backing::Backing;
use crate::chunk::Chunk;
use crate::places::Place;
use crate::request::{FreeError, FreeFlags};
use crate::stats::Event;
use crate::unit::GRANULE_BYTES;

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    #[inline]
    pub(super) fn take_back(&self, address: usize, flags: FreeFlags) -> Result<(), FreeError> {
        if let Some((caches, granule)) = self.caches_of(address, flags)
            && let Some(found) = caches.cells.find(granule)
        {
            return self.free_in_run(caches, address, flags, found);
        }
        self.take_back_past_runs(address, flags)
    }

    /// Takes an area back that belongs to no run.
    pub(super) fn take_back_past_runs(
        &self,
        address: usize,
        flags: FreeFlags,
    ) -> Result<(), FreeError> {
        let unknown = flags.bits() & !FreeFlags::all().bits();
        if unknown != 0 {
            return Err(FreeError::UnknownFlags { bits: unknown });
        }
        let (place, offset) = self.locate(address).ok_or(FreeError::Foreign { address })?;
        let is_reserved = place == 0 && self.geometry.regions.reserved.contains(&offset);
        if place == 0 && offset < self.geometry.regions.reserved.start {
            return Err(FreeError::Static { address });
        }
        if is_reserved != flags.contains(FreeFlags::RESERVED) {
            return Err(match is_reserved {
                true => FreeError::Reserved { address },
                false => FreeError::NotReserved { address },
            });
        }
        if place == 0 && offset >= self.geometry.regions.dynamic.end {
            return Err(FreeError::Foreign { address });
        }
        if !offset.is_multiple_of(GRANULE_BYTES) {
            return Err(FreeError::Misaligned { address });
        }
        if self.is_table(address) {
            return Err(FreeError::NotAllocated { address });
        }
        if is_reserved || self.has_sign(WATCHED) {
            return match &self.hardened {
                Some(hardened) if !is_reserved => self.free_hardened(hardened, address, flags),
                _ => self.take_back_at_once(address, flags, (place, offset)),
            };
        }
        match self.places.free(place, (offset / GRANULE_BYTES) as u32) {
            Some(None) => Ok(()),
            Some(Some((chunk, granule))) => {
                self.sweep_page(place, chunk, granule);
                Ok(())
            }
            None => Err(self.why_not_freed(address, flags, (place, offset))),
        }
    }

    /// Sweeps a page if nobody is in the way. There is no need: it is done at the latest when a request finds no room.
    #[inline(never)]
    pub(super) fn sweep_page(&self, place: u32, chunk: NonNull<Chunk>, granule: u32) {
        match self.state.try_lock() {
            Some(mut state) => {
                state.sweep_page(place, chunk, granule);
                self.note_due(&state);
            }
            None => self.set_sign(SWEEP_DUE, true),
        }
    }

    /// The error for an address where no live area starts.
    #[cold]
    fn why_not_freed(&self, address: usize, flags: FreeFlags, at: (u32, usize)) -> FreeError {
        let (place, offset) = at;
        let Some(state) = self.lock(flags.contains(FreeFlags::TRY)) else {
            return FreeError::Busy;
        };
        let start = match state.directory.get(place) {
            Place::Chunk(chunk) => state.area_around(chunk, offset),
            Place::Vacant | Place::Parked(_) | Place::Busy => None,
        };
        // An area that nobody has is none.
        let start = start.filter(|start| !self.is_own(address - (offset - start)));
        no_area(address, offset, start)
    }

    /// Takes an area back and makes its granules free.
    pub(super) fn take_back_at_once(
        &self,
        address: usize,
        flags: FreeFlags,
        (place, offset): (u32, usize),
    ) -> Result<(), FreeError> {
        let is_reserved = flags.contains(FreeFlags::RESERVED);
        let mut state = self
            .lock(flags.contains(FreeFlags::TRY))
            .ok_or(FreeError::Busy)?;
        let chunk = match (is_reserved, state.directory.get(place)) {
            (true, _) => state.reserved.ok_or(FreeError::Foreign { address })?,
            (false, Place::Chunk(chunk)) => chunk,
            (false, Place::Vacant | Place::Parked(_) | Place::Busy) => {
                return Err(FreeError::NotAllocated { address });
            }
        };
        let area = state
            .release(chunk, offset)
            .map_err(|start| no_area(address, offset, start))?;
        state.count_free(area.len() * GRANULE_BYTES);
        if let Some(hook) = state.hook
            && !is_free_told_apart(flags)
        {
            hook.event(&Event::Free {
                bytes: area.len() * GRANULE_BYTES,
                address,
                at: (place, offset),
            });
        }
        self.note_due(&state);
        Ok(())
    }

    /// Place of the chunk and granule of its unit of a granule of the window; whether there is such a place, and the unit is that
    /// long, is not asked.
    #[inline]
    pub(super) fn place_of(&self, granule: u32) -> (u32, u32) {
        match self.geometry.granule_mask {
            0 => self.place_by_division(granule),
            mask => (
                granule >> (self.geometry.granule_bits % u32::BITS),
                granule & mask,
            ),
        }
    }

    /// [`place_of`](Self::place_of) where places lie no power of two apart.
    #[cold]
    #[inline(never)]
    fn place_by_division(&self, granule: u32) -> (u32, u32) {
        let pitch = (self.geometry.window.pitch_bytes / GRANULE_BYTES) as u32;
        (granule / pitch, granule % pitch)
    }

    /// Place of the chunk and offset in its unit of a neutral address, if it lies in a unit of the window.
    pub(super) fn locate(&self, address: usize) -> Option<(u32, usize)> {
        let window = &self.geometry.window;
        let from_base = address.wrapping_sub(window.base);
        let (place, offset) = match self.geometry.pitch_shift {
            Some(shift) => (from_base >> shift, from_base & (window.pitch_bytes - 1)),
            None => (
                from_base / window.pitch_bytes,
                from_base % window.pitch_bytes,
            ),
        };
        (place < window.chunks as usize && offset < self.geometry.sizes.unit_bytes())
            .then_some((place as u32, offset))
    }
}

/// The error for an address at `offset` in its unit that is not the start of an area, but maybe inside the one that starts
/// at the offset `start`.
fn no_area(address: usize, offset: usize, start: Option<usize>) -> FreeError {
    match start {
        None => FreeError::NotAllocated { address },
        Some(start) => FreeError::Interior {
            address,
            start: address - (offset - start),
        },
    }
}
