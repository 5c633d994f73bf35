//! Where an area goes: into memory that is there, at the lowest place of the lowest chunk; otherwise into pages that have
//! no memory yet, of a chunk in use or, at the last, of a spare one.

use core::ops::Range;
use core::ptr::NonNull;

use super::State;
use crate::cache::{Class, MAX_SLOTS};
use crate::chunk::area_map::Effort;
use crate::chunk::{Chunk, PageMask};
use crate::places::Place;
use crate::request::AllocFlags;
use crate::unit::GRANULE_BYTES;

/// Chunks whose holes may be too badly aligned before a search settles for a run that fits anywhere; see
/// `MISALIGNED_PAGES` of the area map.
const MISALIGNED_CHUNKS: u32 = 4;

/// A hole that a run is put into has room for so many granules, or so many of its areas, if there is any such hole: less where
/// about as much is live as ever was.
const LEAST_GRANULES: u32 = 32;
const LEAST_GRANULES_AT_PEAK: u32 = 8;
const LEAST_SLOTS: u32 = 2;

/// An area that has been taken, not handed out yet.
#[derive(Debug)]
pub(in crate::allocator) struct Taken {
    pub(in crate::allocator) chunk: NonNull<Chunk>,
    pub(in crate::allocator) place: u32,
    /// Granules of the chunk's map.
    pub(in crate::allocator) area: Range<u32>,
}

/// An area that has been taken, and what is to be done before it can be handed out.
#[derive(Debug)]
pub(in crate::allocator) struct Placed {
    pub(in crate::allocator) taken: Taken,
    /// Those of its pages that must be populated first, counted in the chunk's map.
    pub(in crate::allocator) claimed: PageMask,
    /// The same pages, counted in the unit.
    pub(in crate::allocator) claimed_in_unit: PageMask,
    /// The chunk was a spare one.
    pub(in crate::allocator) was_spare: bool,
    /// Pages are populated with it that it does not need.
    pub(in crate::allocator) growth: Growth,
}

/// Which pages are populated for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::allocator) enum Growth {
    /// Those that its area touches.
    Needed,
    /// A few behind them too, for requests to come, where there are caches and less is live than ever was: no more than memory
    /// ever had, and not where the chunk's last room for the largest request would go.
    Ahead,
}

/// Pages that are populated ahead of need, at most.
const AHEAD_PAGES: u32 = 3;

impl From<Taken> for Placed {
    /// In memory that is there: nothing is to be done.
    fn from(taken: Taken) -> Self {
        Self {
            taken,
            claimed: PageMask::default(),
            claimed_in_unit: PageMask::default(),
            was_spare: false,
            growth: Growth::Needed,
        }
    }
}

impl State {
    /// Takes an area for a request in memory that is there: from the reserved region, or from the lowest chunk that has
    /// room.
    pub(in crate::allocator) fn take_ready(
        &mut self,
        flags: AllocFlags,
        granules: u32,
        align: u32,
    ) -> Option<Taken> {
        if flags.contains(AllocFlags::RESERVED) {
            return self.take(self.reserved?, granules, align);
        }
        loop {
            let place = self.directory.first_ready(granules)?;
            let taken = self.take_at(place, granules, align);
            if taken.is_some() {
                return taken;
            }
            // A bound that was too high is right now.
            if self.directory.first_ready(granules) == Some(place) {
                return self.take_ready_above(place, granules, align);
            }
        }
    }

    /// [`take_ready`](Self::take_ready) when the chunk at `place`, the first with a run that is long enough, has none for
    /// the alignment.
    #[cold]
    fn take_ready_above(&mut self, place: u32, granules: u32, align: u32) -> Option<Taken> {
        let mut from = place + 1;
        for _ in 1..MISALIGNED_CHUNKS {
            let place = self.directory.find_ready(granules, from)?;
            if let Some(taken) = self.take_at(place, granules, align) {
                return Some(taken);
            }
            from = place + 1;
        }
        // The lowest chunk with room whatever the alignment.
        loop {
            let place = self.directory.first_ready(granules + align - 1)?;
            if let Some(taken) = self.take_at(place, granules, align) {
                return Some(taken);
            }
        }
    }

    /// Takes an area for a request that memory that is there cannot serve: from pages without memory, from a spare chunk
    /// at the last.
    pub(in crate::allocator) fn take_growing(
        &mut self,
        flags: AllocFlags,
        granules: u32,
        align: u32,
        growth: Growth,
    ) -> Option<Placed> {
        // With `TRY`, populating would need the lock a second time.
        if flags.intersects(AllocFlags::RESERVED | AllocFlags::TRY) {
            return None;
        }
        // Frames are for those who cannot wait for any.
        let growth = match flags.contains(AllocFlags::ATOMIC) {
            true => Growth::Needed,
            false => growth,
        };
        if let Some(placed) = self.place_growing(granules, align, growth) {
            return Some(placed);
        }
        let lowest_spare = self.spare.iter().map(|chunk| chunk.place).min()?;
        let placed = self.grow_at(lowest_spare, granules, align, growth)?;
        Some(Placed {
            was_spare: true,
            ..placed
        })
    }

    /// Takes an area for a request from wherever there is one by now.
    pub(in crate::allocator) fn take_anew(
        &mut self,
        flags: AllocFlags,
        granules: u32,
        align: u32,
    ) -> Option<Placed> {
        match self.take_ready(flags, granules, align) {
            Some(taken) => Some(taken.into()),
            None => self.take_growing(flags, granules, align, Growth::Ahead),
        }
    }

    /// From memory that can be populated.
    fn place_growing(&mut self, granules: u32, align: u32, growth: Growth) -> Option<Placed> {
        let (mut from, mut tries) = (0, MISALIGNED_CHUNKS);
        while tries > 0 {
            let place = self.directory.find_growing(granules, from)?;
            if let Some(placed) = self.grow_at(place, granules, align, growth) {
                return Some(placed);
            }
            // A bound that was too high is right now, and does not count: areas that were taken made it so.
            let is_misaligned = self.directory.find_growing(granules, place) == Some(place);
            tries -= u32::from(is_misaligned);
            from = place + 1;
        }
        // The lowest chunk with room whatever the alignment.
        let place = self.directory.find_certain(granules)?;
        self.grow_at(place, granules, align, growth)
    }

    /// From any chunk in use, however long it takes: before a request is refused that no new chunk can be made for.
    pub(in crate::allocator) fn place_anywhere(
        &mut self,
        granules: u32,
        align: u32,
    ) -> Option<Placed> {
        for place in 0..self.directory.used_places().end {
            let Place::Chunk(chunk) = self.directory.get(place) else {
                continue;
            };
            let ready = self.take_with(chunk, granules, align, Effort::Exhaustive);
            let placed = match ready {
                Some(taken) => Some(taken.into()),
                None => self.grow_at(place, granules, align, Growth::Needed),
            };
            if placed.is_some() {
                return placed;
            }
        }
        None
    }

    /// Whether memory that is there has room for `granules`, aligned to `align` granules, for certain.
    pub(in crate::allocator) fn has_ready(&mut self, granules: u32, align: u32) -> bool {
        let len = granules + align - 1;
        while let Some(place) = self.directory.first_ready(len) {
            let Place::Chunk(chunk) = self.directory.get(place) else {
                return false;
            };
            let found = self.edit_area(chunk, |body| body.map.find(len, 1, Effort::Bounded));
            if found.is_some() {
                return true;
            }
        }
        false
    }

    /// Whether the chunks in use have room for `granules`, aligned to `align` granules, as far as is known without a search.
    pub(in crate::allocator) fn has_room(&self, granules: u32, align: u32) -> bool {
        self.directory.longest_ready() >= granules + align - 1
            || self.directory.longest_certain() >= granules
    }

    #[inline]
    fn take_at(&mut self, place: u32, granules: u32, align: u32) -> Option<Taken> {
        match self.directory.get(place) {
            Place::Chunk(chunk) => self.take(chunk, granules, align),
            Place::Vacant | Place::Parked(_) | Place::Busy => None,
        }
    }

    #[inline]
    fn take(&mut self, chunk: NonNull<Chunk>, granules: u32, align: u32) -> Option<Taken> {
        self.take_with(chunk, granules, align, Effort::Bounded)
    }

    #[inline]
    fn take_with(
        &mut self,
        chunk: NonNull<Chunk>,
        granules: u32,
        align: u32,
        effort: Effort,
    ) -> Option<Taken> {
        let start = self.edit_area(chunk, |body| body.take(granules, align, effort))?;
        // SAFETY: chunks in the directory are valid until they are removed from it.
        let place = unsafe { chunk.as_ref() }.place;
        let area = start..start + granules;
        Some(Taken { chunk, place, area })
    }

    fn grow_at(&mut self, place: u32, granules: u32, align: u32, growth: Growth) -> Option<Placed> {
        let Place::Chunk(chunk) = self.directory.get(place) else {
            return None;
        };
        let ahead_pages = match growth {
            Growth::Ahead => self.pages_ahead(chunk, granules),
            Growth::Needed => 0,
        };
        let (area, claimed) = self.edit(chunk, |body| {
            body.take_growing(granules, align, ahead_pages)
        })?;
        let needed = self.body(chunk).map.pages_of(area.clone());
        Some(Placed {
            taken: Taken { chunk, place, area },
            claimed,
            claimed_in_unit: self.body(chunk).unit_pages(claimed),
            was_spare: false,
            growth: match claimed.runs().last() {
                Some(pages) if pages.end > needed.end => Growth::Ahead,
                _ => Growth::Needed,
            },
        })
    }

    /// How many pages of a chunk may be populated ahead of need behind those for so many granules.
    fn pages_ahead(&self, chunk: NonNull<Chunk>, granules: u32) -> u32 {
        let Some(caches) = &self.caches else {
            return 0;
        };
        let body = self.body(chunk);
        let vacant = body.longest_vacant_pages();
        let most = self
            .unused_pages()
            .min(vacant.saturating_sub(caches.largest_pages));
        let needed = body.map.most_pages_of(granules);
        AHEAD_PAGES.min(most.saturating_sub(needed))
    }

    /// Pages that memory once had and has no more; none where about as much is live as ever was.
    fn unused_pages(&self) -> u32 {
        let unused = self.stats.populated_peak_pages - self.stats.populated_pages;
        match self.is_near_peak() {
            true => 0,
            false => unused.min(u32::MAX.into()) as u32,
        }
    }

    /// Notes that a request that must not wait has had pages populated.
    pub(in crate::allocator) fn note_atomic_growth(&mut self) {
        self.pages_wanted = self.caches.is_some() && self.unused_pages() > 0;
    }

    /// Claims pages without memory, to populate them for requests to come: of the lowest chunk that has any, so many that as many
    /// as `target` are empty then, or fewer.
    pub(in crate::allocator) fn claim_ahead(
        &mut self,
        target: u32,
    ) -> Option<(NonNull<Chunk>, PageMask)> {
        let largest_pages = self.caches.as_ref()?.largest_pages;
        let lacking = u64::from(target).saturating_sub(self.stats.empty_pages) as u32;
        let place = self.directory.find_certain(1)?;
        let Place::Chunk(chunk) = self.directory.get(place) else {
            return None;
        };
        let body = self.body(chunk);
        // Where the largest request would go, it still goes.
        let kept = match self.directory.longest_certain() > body.room().certain {
            true => 0,
            false => largest_pages,
        };
        let vacant = body.longest_vacant_pages().saturating_sub(kept);
        let most = lacking.min(vacant).min(self.unused_pages());
        let claimed = self.edit(chunk, |body| body.claim_vacant(most));
        (!claimed.is_empty()).then_some((chunk, claimed))
    }

    /// Undoes [`take_growing`](Self::take_growing).
    pub(in crate::allocator) fn undo(&mut self, placed: &Placed) {
        self.edit(placed.taken.chunk, |body| {
            body.undo_take(placed.taken.area.clone(), placed.claimed)
        });
    }

    /// Takes the areas of a run in memory that is there: of a class, one behind the other, as many as `wanted` or as fit.
    pub(in crate::allocator) fn take_run(
        &mut self,
        class: Class,
        wanted: u32,
    ) -> Option<(Taken, u32)> {
        let (len, align) = (class.len(), class.align());
        let least_granules = match self.is_near_peak() {
            true => LEAST_GRANULES_AT_PEAK,
            false => LEAST_GRANULES,
        };
        loop {
            let longest = self.directory.longest_ready().saturating_sub(align - 1);
            let least = (least_granules / len)
                .clamp(LEAST_SLOTS, MAX_SLOTS)
                .min(longest / len)
                .min(wanted);
            if least < 2 {
                return None;
            }
            let place = self.directory.first_ready(least * len + align - 1)?;
            let Place::Chunk(chunk) = self.directory.get(place) else {
                return None;
            };
            // If there is none, a bound was too high and is right now.
            let taken = self.edit_area(chunk, |body| body.take_all(len, align, (least, wanted)));
            if let Some((start, slots)) = taken {
                let area = start..start + slots * len;
                return Some((Taken { chunk, place, area }, slots));
            }
        }
    }

    /// Whether memory that is there may have room for so many granules.
    #[inline]
    pub(in crate::allocator) fn may_have_ready(&self, granules: u32) -> bool {
        self.directory.longest_ready() >= granules
    }

    /// Takes an area of the first chunk that is the instance's own, and counts as nobody's.
    pub(in crate::allocator) fn take_in_first_chunk(
        &mut self,
        granules: u32,
        align: u32,
    ) -> Option<Taken> {
        let Place::Chunk(chunk) = self.directory.get(0) else {
            return None;
        };
        let largest = self.body(chunk).largest;
        let taken = self.take(chunk, granules, align);
        self.body_mut(chunk).largest = largest;
        taken
    }

    /// Notes that an area is handed out; returns its offset in the unit and the part of it, counted from there, that may
    /// hold something other than zero, all in bytes.
    #[inline]
    pub(in crate::allocator) fn hand_out(&mut self, taken: &Taken) -> (usize, Range<usize>) {
        self.hand_out_area(taken.chunk, taken.area.clone())
    }

    /// [`hand_out`](Self::hand_out) of granules of a chunk's map, or of several areas.
    #[inline]
    pub(in crate::allocator) fn hand_out_area(
        &mut self,
        chunk: NonNull<Chunk>,
        area: Range<u32>,
    ) -> (usize, Range<usize>) {
        let body = self.body_mut(chunk);
        let start = area.start;
        let dirty = body.hand_out(area);
        let offset = body.byte_offset(start);
        if dirty.is_empty() {
            return (offset, 0..0);
        }
        let bytes = |granule: u32| (granule - start) as usize * GRANULE_BYTES;
        (offset, bytes(dirty.start)..bytes(dirty.end))
    }
}
