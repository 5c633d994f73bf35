//! What changes about a chunk: its areas, and what is known of its pages' memory. Only the holder of the allocator's lock touches it.
//!
//! - a page whose memory is being populated or given back is claimed, and hidden from searches: whoever claimed it works
//!   on its memory without the lock and settles it afterwards;
//! - an area is handed out only once all its pages are populated;
//! - `populated` counts the pages that have memory, `empty` those of them that no area touches, `claimed` the claimed
//!   ones;
//! - granules of a populated page from `clean_from` on are known to be zero on every materialised CPU.

use core::ops::Range;
use core::ptr::NonNull;

use super::area_map::{AreaMap, Effort, Neighbours, NoArea, Released, Visibility};
use super::{ChunkLayout, MAX_MASK_PAGES, Membership, Nature, PageMask};
use crate::directory::Room;
use crate::metadata::MetaSlice;
use crate::unit::{Contents, GRANULE_BYTES};

/// Counters of a body's pages; the allocator keeps their sums.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Pages with memory, settled.
    pub(crate) populated: u32,
    /// Of these, pages that no area touches and that can be given back.
    pub(crate) empty: u32,
    /// Pages in a transitional state.
    pub(crate) claimed: u32,
}

/// What changes about a chunk. Granules and pages are counted from the first page kept track of.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) map: AreaMap,
    clean_from: MetaSlice<u16>,
    /// The page of the unit that the map starts with.
    first_page: u32,
    granules_per_page: u32,
    nature: Nature,
    pub(crate) membership: Membership,
    /// What the directory knows of the chunk's room.
    pub(crate) entered: Room,
    /// `longest_bound` then.
    entered_bound: u32,
    pub(crate) counts: Counts,
    /// Live areas. Each touches a page that has memory or is claimed.
    pub(crate) areas: u32,
    /// The largest area ever handed out, in granules.
    pub(crate) largest: u32,
    /// The longest stretch of pages without memory, claimed ones not included.
    longest_vacant_pages: u32,
    /// No free run with a page without memory in it is longer; claimed pages count as used. It is the length of the chunk
    /// where such a run may have become longer; a search that this misled puts it right.
    longest_bound: u32,
}

impl Body {
    /// What is to be known of a chunk whose region, in granules of the unit, is `region`.
    ///
    /// # Safety
    /// As [`Chunk::new`](super::Chunk::new).
    pub(super) unsafe fn new(
        block: NonNull<u8>,
        layout: &ChunkLayout,
        nature: Nature,
        region: Range<u32>,
    ) -> Self {
        let first_page = region.start / layout.granules_per_page;
        let base = first_page * layout.granules_per_page;
        let pages = layout.pages as usize;
        let (visibility, populated) = match nature {
            Nature::First => (Visibility::Ready, layout.pages),
            Nature::Mapped => (Visibility::Vacant, 0),
        };
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        unsafe {
            Self {
                map: AreaMap::new(
                    block,
                    &layout.map,
                    region.start - base..region.end - base,
                    visibility,
                ),
                clean_from: MetaSlice::new(block, layout.clean_at, pages, 0),
                first_page,
                granules_per_page: layout.granules_per_page,
                nature,
                membership: Membership::None,
                entered: Room::default(),
                entered_bound: 0,
                counts: Counts {
                    populated,
                    ..Counts::default()
                },
                areas: 0,
                largest: 0,
                longest_vacant_pages: layout.pages - populated,
                longest_bound: region.end - base,
            }
        }
    }

    /// The granule of the unit that the map starts with.
    pub(super) fn first_granule(&self) -> u32 {
        self.first_page * self.granules_per_page
    }

    /// The list that the chunk belongs on.
    pub(crate) fn belongs(&self) -> Membership {
        match self.nature {
            Nature::First => Membership::None,
            Nature::Mapped if self.counts == Counts::default() => Membership::Spare,
            Nature::Mapped if self.counts.empty > 0 => Membership::Drain,
            Nature::Mapped => Membership::None,
        }
    }

    /// Byte offset in the unit of `granule` of the map.
    #[inline]
    pub(crate) fn byte_offset(&self, granule: u32) -> usize {
        (self.first_page as usize * self.granules_per_page as usize + granule as usize)
            * GRANULE_BYTES
    }

    /// The granule of the map at `offset` bytes into the unit; `offset` is granule aligned and not before the map.
    #[inline]
    pub(crate) fn granule(&self, offset: usize) -> u32 {
        (offset / GRANULE_BYTES) as u32 - self.first_page * self.granules_per_page
    }

    /// Page of the unit that `page` of the map is.
    pub(crate) fn unit_page(&self, page: u32) -> u32 {
        self.first_page + page
    }

    /// Pages of the map as pages of the unit.
    pub(crate) fn unit_pages(&self, pages: PageMask) -> PageMask {
        pages.shifted(self.first_page)
    }

    /// Whether [`room`](Self::room) is what the directory knows.
    #[inline]
    pub(crate) fn is_entered(&self) -> bool {
        self.map.longest() == self.entered.ready && self.longest_bound == self.entered_bound
    }

    /// Notes that the directory comes to know `room`.
    pub(crate) fn enter(&mut self, room: Room) {
        self.entered = room;
        self.entered_bound = self.longest_bound;
    }

    /// The longest stretch of pages without memory, claimed ones not included.
    pub(crate) fn longest_vacant_pages(&self) -> u32 {
        self.longest_vacant_pages
    }

    /// What the chunk has to offer.
    pub(crate) fn room(&self) -> Room {
        let certain = self.longest_vacant_pages * self.granules_per_page;
        let growing = if certain == 0 { 0 } else { self.longest_bound };
        Room {
            ready: self.map.longest(),
            growing,
            certain,
        }
    }

    /// Takes `len` granules aligned to `align` as an area, if there is a place in memory that is there.
    /// Returns where it starts.
    #[inline]
    pub(crate) fn take(&mut self, len: u32, align: u32, effort: Effort) -> Option<u32> {
        let start = self.map.find(len, align, effort)?;
        self.mark_taken(start, len);
        Some(start)
    }

    /// Takes `len` granules aligned to `align` as an area, if there is a place in memory that is or could be there; there
    /// is one if `len` is at most the certain [`room`](Self::room). The pages of it that have no memory are claimed, and up to
    /// `ahead_pages` of those behind it: the caller populates them and then calls [`populated`](Self::populated) or
    /// [`undo_take`](Self::undo_take).
    pub(crate) fn take_growing(
        &mut self,
        len: u32,
        align: u32,
        ahead_pages: u32,
    ) -> Option<(Range<u32>, PageMask)> {
        let start = match self.map.find_growing(len, align) {
            Ok(start) => start,
            Err(longest) => {
                self.longest_bound = longest;
                return None;
            }
        };
        let pages = self.map.pages_of(start..start + len);
        let mut claimed = PageMask::none(pages.start);
        for page in pages.clone() {
            if self.map.is_vacant(page) {
                claimed.insert(page);
            }
        }
        let end = (pages.end + ahead_pages)
            .min(pages.start + MAX_MASK_PAGES)
            .min(self.map.pages());
        (pages.end..end)
            .take_while(|&page| self.map.is_vacant(page))
            .for_each(|page| claimed.insert(page));
        self.claim(claimed);
        self.longest_vacant_pages = self.map.longest_vacant_pages();
        self.mark_taken(start, len);
        Some((start..start + len, claimed))
    }

    /// Takes areas of `len` granules each, one behind the other, the first aligned to `align`, at the lowest place in memory
    /// that is there that has room for `least`; as many as there are in its page, `most` at most. Returns where the first
    /// starts, and how many they are.
    pub(crate) fn take_all(
        &mut self,
        len: u32,
        align: u32,
        (least, most): (u32, u32),
    ) -> Option<(u32, u32)> {
        let start = self.map.find(len * least, align, Effort::Bounded)?;
        let slots = (self.map.free_from(start, len * most) / len).max(least);
        let opened_pages = self.map.take_all(start, len, slots);
        if self.nature == Nature::Mapped {
            self.counts.empty -= opened_pages;
        }
        self.areas += slots;
        self.largest = self.largest.max(len);
        Some((start, slots))
    }

    /// Makes areas of `len` granules each, one behind the other and live, free. Returns how many of them were not live: freed
    /// already, by somebody who was not told.
    pub(crate) fn give_back(&mut self, areas: Range<u32>, len: u32) -> u32 {
        self.areas -= (areas.end - areas.start) / len;
        let (released, wrong) = self.map.release_all(areas);
        self.note_released(&released);
        wrong
    }

    #[inline]
    fn mark_taken(&mut self, start: u32, len: u32) {
        let opened_pages = self.map.take(start, len);
        if self.nature == Nature::Mapped {
            self.counts.empty -= opened_pages;
        }
        self.areas += 1;
        self.largest = self.largest.max(len);
    }

    /// The claimed pages now have memory with `contents`.
    pub(crate) fn populated(&mut self, claimed: PageMask, contents: Contents) {
        let clean_from = match contents {
            Contents::Zeroed => 0,
            Contents::Dirty => self.granules_per_page as u16,
        };
        for page in claimed.runs().flatten() {
            self.clean_from[page as usize] = clean_from;
        }
        self.counts.populated += claimed.count();
        self.settle(claimed, Visibility::Ready);
        let is_empty = |page: &u32| self.map.is_open(*page);
        self.counts.empty += claimed.runs().flatten().filter(is_empty).count() as u32;
    }

    /// The claimed pages could not be populated: the area is free again, its pages have no memory.
    pub(crate) fn undo_take(&mut self, area: Range<u32>, claimed: PageMask) {
        // The area is there: it was taken and nobody else knows of it.
        let released = self.release(area.start);
        debug_assert_eq!(released, Ok(area));
        self.settle(claimed, Visibility::Vacant);
    }

    /// Frees the area that starts at `start`; returns its granules.
    #[inline]
    pub(crate) fn release(&mut self, start: u32) -> Result<Range<u32>, NoArea> {
        let released = self.map.release(start)?;
        self.areas -= 1;
        self.note_released(&released);
        Ok(start..released.end)
    }

    #[inline]
    fn note_released(&mut self, released: &Released) {
        if self.nature == Nature::Mapped {
            self.counts.empty += released.emptied_pages;
        }
        if released.neighbours == Neighbours::SomeVacant {
            self.longest_bound = self.map.region().end;
        }
    }

    /// The page of the map that `granule` lies in.
    pub(crate) fn page_of(&self, granule: u32) -> u32 {
        self.map.pages_of(granule..granule + 1).start
    }

    /// Makes the chunk new that was destroyed: it has no areas and no memory.
    pub(crate) fn renew(&mut self) {
        debug_assert!(self.areas == 0 && self.counts == Counts::default());
        self.largest = 0;
    }

    /// Makes the granules of the freed areas free that start in `pages`, but for those that `kept` picks: it is told
    /// of 32 granules of the unit, from which one on, and which freed areas start there. `each` is told the length of each.
    #[inline]
    pub(crate) fn sweep(
        &mut self,
        pages: Range<u32>,
        kept: impl Fn(u32, u32) -> u32,
        mut each: impl FnMut(u32),
    ) {
        let base = self.first_page * self.granules_per_page;
        let mut from = pages.start;
        while let Some(page) = self.map.next_freed_page(from..pages.end) {
            let areas = &mut self.areas;
            let released = self.map.sweep_page(
                page,
                |first, freed| kept(base + first, freed),
                |len| {
                    *areas -= 1;
                    each(len);
                },
            );
            if let Some(released) = released {
                self.note_released(&released);
            }
            from = page + 1;
        }
    }

    /// Notes that `area` is handed out; returns the part of it that may hold something other than zero.
    #[inline]
    pub(crate) fn hand_out(&mut self, area: Range<u32>) -> Range<u32> {
        let pages = self.map.pages_of(area.clone());
        let dirty = self.hand_out_in(pages.start, &area);
        match pages.end - pages.start {
            1 => dirty,
            _ => self.hand_out_more(dirty, pages.start + 1..pages.end, &area),
        }
    }

    /// [`hand_out`](Self::hand_out) of the part of `area` in `pages`, `dirty` being that of the part before.
    #[cold]
    fn hand_out_more(
        &mut self,
        mut dirty: Range<u32>,
        pages: Range<u32>,
        area: &Range<u32>,
    ) -> Range<u32> {
        for page in pages {
            let more = self.hand_out_in(page, area);
            if dirty.is_empty() {
                dirty = more;
            } else if !more.is_empty() {
                dirty.end = more.end;
            }
        }
        dirty
    }

    /// [`hand_out`](Self::hand_out) of the part of `area` that lies in `page`.
    #[inline]
    fn hand_out_in(&mut self, page: u32, area: &Range<u32>) -> Range<u32> {
        let Range { start: base, end } = self.map.granules_of(page);
        let end = area.end.min(end);
        let clean_from = &mut self.clean_from[page as usize];
        let clean = base + u32::from(*clean_from);
        if clean < end {
            *clean_from = (end - base) as u16;
        }
        area.start.max(base)..end.min(clean)
    }

    /// Claims up to `limit` pages that have memory and no area, to give their memory back: the highest ones, for the
    /// lowest are filled first, and no more than a mask names. Afterwards the caller calls
    /// [`depopulated`](Self::depopulated).
    pub(crate) fn claim_empty(&mut self, limit: u32) -> PageMask {
        let mut last = self.map.last_open(self.map.pages());
        let end = last.map_or(0, |last| last + 1);
        let mut claimed = PageMask::none(end.saturating_sub(MAX_MASK_PAGES));
        while let Some(page) = last.filter(|&page| page >= claimed.first)
            && claimed.count() < limit
        {
            claimed.insert(page);
            last = self.map.last_open(page);
        }
        self.counts.populated -= claimed.count();
        self.counts.empty -= claimed.count();
        self.claim(claimed);
        claimed
    }

    /// Claims up to `limit` pages without memory, the lowest ones, to populate them; no more than a mask names. Afterwards the
    /// caller calls [`populated`](Self::populated) or [`depopulated`](Self::depopulated).
    pub(crate) fn claim_vacant(&mut self, limit: u32) -> PageMask {
        let Some(vacant) = self.map.next_vacant(0).filter(|_| limit > 0) else {
            return PageMask::none(0);
        };
        let count = limit.min(MAX_MASK_PAGES).min(vacant.end - vacant.start);
        let mut claimed = PageMask::none(vacant.start);
        (vacant.start..vacant.start + count).for_each(|page| claimed.insert(page));
        self.claim(claimed);
        self.longest_vacant_pages = self.map.longest_vacant_pages();
        claimed
    }

    /// The claimed pages have no memory, or none any more.
    pub(crate) fn depopulated(&mut self, claimed: PageMask) {
        self.settle(claimed, Visibility::Vacant);
    }

    /// The first run of settled populated pages at `from` or above.
    pub(crate) fn next_populated(&self, from: u32) -> Option<Range<u32>> {
        self.map.next_ready(from)
    }

    /// The settled populated pages among those from `from` on, as many as a mask can name; `None` behind the last page.
    pub(crate) fn populated_pages(&self, from: u32) -> Option<PageMask> {
        let end = from.saturating_add(MAX_MASK_PAGES).min(self.map.pages());
        (from < end).then(|| {
            let mut populated = PageMask::none(from);
            (from..end)
                .filter(|&page| self.map.is_ready(page))
                .for_each(|page| populated.insert(page));
            populated
        })
    }

    /// Hides pages from searches while their memory comes or goes.
    fn claim(&mut self, pages: PageMask) {
        self.counts.claimed += pages.count();
        self.set_visibility(pages, Visibility::Hidden);
    }

    /// Shows claimed pages to searches again.
    fn settle(&mut self, pages: PageMask, visibility: Visibility) {
        self.counts.claimed -= pages.count();
        self.set_visibility(pages, visibility);
        self.longest_bound = self.map.region().end;
        if visibility == Visibility::Vacant {
            self.longest_vacant_pages = self.map.longest_vacant_pages();
        }
    }

    fn set_visibility(&mut self, pages: PageMask, visibility: Visibility) {
        for run in pages.runs() {
            self.map.set_visibility(run, visibility);
        }
    }

    /// Panics unless the counters equal a recount.
    #[cfg(all(test, feature = "std"))]
    pub(crate) fn check(&self) {
        self.map.check();
        let pages = || 0..self.map.pages();
        let populated = pages().filter(|&page| self.map.is_ready(page)).count() as u32;
        let empty = pages().filter(|&page| self.nature == Nature::Mapped && self.map.is_open(page));
        let claimed = pages().filter(|&page| !self.map.is_ready(page) && !self.map.is_vacant(page));
        assert_eq!(self.areas, self.map.areas().count() as u32);
        let counts = Counts {
            populated,
            empty: empty.count() as u32,
            claimed: claimed.count() as u32,
        };
        assert_eq!(self.counts, counts);
        assert_eq!(self.longest_vacant_pages, self.map.longest_vacant_pages());
        let longest = self.map.find_growing(u32::MAX / 2, 1);
        assert!(longest.is_err_and(|longest| longest <= self.longest_bound));
        assert_eq!(self.membership, self.belongs());
    }
}
