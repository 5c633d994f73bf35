//! Several areas of one length at one go: where they lie one behind the other, and how they are counted and undone.

use core::ptr::NonNull;

use super::State;
use super::placing::Taken;
use crate::chunk::Chunk;
use crate::places::Place;
use crate::request::AllocFlags;

/// The longest row that is taken at one go: the granules of a page of 64 KiB.
const MAX_ROW_GRANULES: u32 = 16 << 10;

impl State {
    /// Takes areas in memory that is there: a row of up to `most`, one behind the other, at the lowest place that has room for
    /// two; or else one, as [`take_ready`](Self::take_ready) does. Returns the row, and how many areas it is.
    pub(in crate::allocator) fn take_row(
        &mut self,
        flags: AllocFlags,
        (len, align): (u32, u32),
        most: usize,
    ) -> Option<(Taken, u32)> {
        let most = most.min((MAX_ROW_GRANULES / len) as usize) as u32;
        // Behind an area of no whole number of alignments no other one is aligned.
        let may_be_row = most > 1 && len & (align - 1) == 0;
        if may_be_row
            && !flags.contains(AllocFlags::RESERVED)
            && let Some(row) = self.take_two_or_more(len, align, most)
        {
            return Some(row);
        }
        self.take_ready(flags, len, align).map(|taken| (taken, 1))
    }

    fn take_two_or_more(&mut self, len: u32, align: u32, most: u32) -> Option<(Taken, u32)> {
        loop {
            let place = self.directory.first_ready(2 * len + align - 1)?;
            let Place::Chunk(chunk) = self.directory.get(place) else {
                return None;
            };
            // If there is none, a bound was too high and is right now.
            let taken = self.edit_area(chunk, |body| body.take_all(len, align, (2, most)));
            if let Some((start, areas)) = taken {
                let area = start..start + areas * len;
                return Some((Taken { chunk, place, area }, areas));
            }
        }
    }

    /// The chunk that areas at `place` are taken from.
    pub(in crate::allocator) fn chunk_at(
        &self,
        flags: AllocFlags,
        place: u32,
    ) -> Option<NonNull<Chunk>> {
        match self.directory.get(place) {
            _ if flags.contains(AllocFlags::RESERVED) => self.reserved,
            Place::Chunk(chunk) => Some(chunk),
            Place::Vacant | Place::Parked(_) | Place::Busy => None,
        }
    }

    /// Counts areas of `bytes` each as asked for, `rounded_bytes` as taken.
    pub(in crate::allocator) fn count_many(
        &mut self,
        areas: usize,
        bytes: usize,
        rounded_bytes: usize,
    ) {
        self.count_run(areas as u32, rounded_bytes, bytes);
        self.stats.count_allocs(areas as u64, rounded_bytes);
    }

    /// Undoes [`count_many`](Self::count_many), but for what says which was the most ever.
    pub(in crate::allocator) fn uncount_many(&mut self, areas: usize, rounded_bytes: usize) {
        self.stats.leave_out(areas as u64, rounded_bytes);
        self.stats.uncount_allocs(areas as u64, rounded_bytes);
    }
}
