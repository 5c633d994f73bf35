//! How an area is taken back: every address that is not that of a live area is refused, and changes nothing.

use lock_api::RawMutex;

use super::PerCpuAllocator;
use crate::backing::Backing;
use crate::directory::Place;
use crate::request::{FreeError, FreeFlags};
use crate::stats::Event;
use crate::unit::GRANULE_BYTES;

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    pub(super) fn take_back(&self, address: usize, flags: FreeFlags) -> Result<(), FreeError> {
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
        let mut state = self
            .lock(flags.contains(FreeFlags::TRY))
            .ok_or(FreeError::Busy)?;
        let chunk = match (is_reserved, state.directory.get(place)) {
            (true, _) => state.reserved.ok_or(FreeError::Foreign { address })?,
            (false, Place::Chunk(chunk)) => chunk,
            (false, Place::Vacant | Place::Busy) => {
                return Err(FreeError::NotAllocated { address });
            }
        };
        let area = state
            .release(chunk, offset)
            .map_err(|no_area| match no_area {
                None => FreeError::NotAllocated { address },
                Some(start) => FreeError::Interior {
                    address,
                    start: address - (offset - start),
                },
            })?;
        state.count_free(area.len() * GRANULE_BYTES);
        if let Some(hook) = state.hook {
            hook.event(&Event::Free {
                bytes: area.len() * GRANULE_BYTES,
                address,
                at: (place, offset),
            });
        }
        self.note_due(&state);
        Ok(())
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
