//! One chunk: a unit's worth of address space per CPU, which areas of it are used, and which of its pages have memory.
//!
//! A [`Chunk`] is shared (lists and the directory point to it); what changes lies in its [`Body`], which only the
//! holder of the allocator's lock touches. A body combines an [`AreaMap`] with a [`PageState`] per page:
//!
//! - a page in a transitional state (`Populating`, `Depopulating`) is hidden from searches: whoever put it into that
//!   state works on its memory without the lock and settles it afterwards;
//! - an area is handed out only once all its pages are populated;
//! - `populated` counts the pages in state `Populated`, `empty` those of them that no area touches, `claimed` the
//!   transitional ones;
//! - granules of a populated page from `clean_from` on are known to be zero on every materialised CPU.

use core::alloc::{Layout, LayoutError};
use core::cell::UnsafeCell;
use core::ops::Range;
use core::ptr::NonNull;

use intrusive_collections::{LinkedListLink, UnsafeRef, intrusive_adapter};

use crate::metadata::{BlockLayout, MetaSlice};
use crate::unit::{Contents, GRANULE_BYTES};
use area_map::{AreaMap, AreaMapLayout, NoArea, Visibility};

pub(crate) mod area_map;
pub(crate) mod bitmap;
pub(crate) mod summary;

/// Pages that one area may touch: as many as a [`PageMask`] can name.
pub(crate) const MAX_AREA_PAGES: u32 = u64::BITS;

/// Whether a page has memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PageState {
    /// No memory.
    Empty,
    /// Memory is on its way.
    Populating,
    /// Memory on every materialised CPU.
    Populated,
    /// Memory is being given back.
    Depopulating,
}

/// What a chunk's pages are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nature {
    /// A region of the first chunk: memory that was there before the allocator and never goes away.
    First,
    /// Pages populated on demand.
    Mapped,
}

/// The list that a chunk is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Membership {
    /// None: a chunk in use without a page to give back, or the first chunk.
    None,
    /// Chunks with neither areas nor memory, ready to be used.
    Spare,
    /// Chunks with populated pages that no area touches.
    Drain,
}

/// Some pages of an area: bit `i` is the `i`-th page that the area touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PageMask(u64);

impl PageMask {
    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The runs of neighbouring pages in the mask, as page numbers from `first` on.
    pub(crate) fn runs(self, first: u32) -> impl Iterator<Item = Range<u32>> {
        let mut at = 0;
        core::iter::from_fn(move || {
            let left = self.0.checked_shr(at).filter(|&left| left != 0)?;
            let start = at + left.trailing_zeros();
            let len = (self.0 >> start).trailing_ones();
            at = start + len;
            Some(first + start..first + at)
        })
    }
}

/// A chunk.
#[derive(Debug)]
pub(crate) struct Chunk {
    link: LinkedListLink,
    /// Its place in the window.
    pub(crate) place: u32,
    /// Its metadata block.
    pub(crate) block: (NonNull<u8>, Layout),
    body: UnsafeCell<Body>,
}

intrusive_adapter!(pub(crate) ChunkAdapter = UnsafeRef<Chunk>: Chunk { link => LinkedListLink });

/// What is laid out in a chunk's metadata block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChunkLayout {
    /// The block to ask for.
    pub(crate) block: Layout,
    chunk_at: usize,
    map: AreaMapLayout,
    states_at: usize,
    clean_at: usize,
    pages: u32,
    granules_per_page: u32,
}

impl ChunkLayout {
    /// The layout of a chunk that keeps track of `pages` pages.
    pub(crate) fn new(pages: u32, granules_per_page: u32) -> Result<Self, LayoutError> {
        let mut block = BlockLayout::new();
        let chunk_at = block.array::<Chunk>(1)?;
        let map = AreaMapLayout::add(&mut block, pages, granules_per_page)?;
        let clean_at = block.array::<u16>(pages as usize)?;
        let states_at = block.array::<PageState>(pages as usize)?;
        Ok(Self {
            block: block.finish(),
            chunk_at,
            map,
            states_at,
            clean_at,
            pages,
            granules_per_page,
        })
    }
}

impl Chunk {
    /// Writes a chunk into `block`. Its region, in granules of the unit, is `region`; pages before the one that the
    /// region starts in are not kept track of.
    ///
    /// # Safety
    /// `block` has the layout `layout.block` and belongs to the chunk until the chunk is given up; the region lies in
    /// the `layout.pages` pages from the one that it starts in.
    pub(crate) unsafe fn new(
        block: NonNull<u8>,
        layout: &ChunkLayout,
        place: u32,
        nature: Nature,
        region: Range<u32>,
    ) -> NonNull<Self> {
        let first_page = region.start / layout.granules_per_page;
        let base = first_page * layout.granules_per_page;
        let pages = layout.pages as usize;
        let (state, visibility, populated) = match nature {
            Nature::First => (PageState::Populated, Visibility::Ready, layout.pages),
            Nature::Mapped => (PageState::Empty, Visibility::Vacant, 0),
        };
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        let body = unsafe {
            Body {
                map: AreaMap::new(
                    block,
                    &layout.map,
                    region.start - base..region.end - base,
                    visibility,
                ),
                states: MetaSlice::new(block, layout.states_at, pages, state),
                clean_from: MetaSlice::new(block, layout.clean_at, pages, 0),
                first_page,
                granules_per_page: layout.granules_per_page,
                nature,
                membership: Membership::None,
                counts: Counts {
                    populated,
                    ..Counts::default()
                },
                largest: 0,
                longest_bound: region.end - region.start,
            }
        };
        // SAFETY: `chunk_at` lies inside the block.
        let chunk = unsafe { block.add(layout.chunk_at) }.cast::<Self>();
        let value = Self {
            link: LinkedListLink::new(),
            place,
            block: (block, layout.block),
            body: UnsafeCell::new(body),
        };
        // SAFETY: the block has room for a chunk there, aligned.
        unsafe { chunk.write(value) };
        chunk
    }

    /// What changes about the chunk; only the holder of the allocator's lock may follow the pointer.
    pub(crate) fn body(&self) -> *mut Body {
        self.body.get()
    }
}

/// Counters of a body; the allocator keeps their sums.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Live areas.
    pub(crate) areas: u32,
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
    states: MetaSlice<PageState>,
    clean_from: MetaSlice<u16>,
    /// The page of the unit that the map starts with.
    first_page: u32,
    granules_per_page: u32,
    nature: Nature,
    pub(crate) membership: Membership,
    pub(crate) counts: Counts,
    /// The largest area ever, in granules.
    pub(crate) largest: u32,
    /// No free run is longer, pages without memory included.
    longest_bound: u32,
}

impl Body {
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
    pub(crate) fn byte_offset(&self, granule: u32) -> usize {
        (self.first_page as usize * self.granules_per_page as usize + granule as usize)
            * GRANULE_BYTES
    }

    /// The granule of the map at `offset` bytes into the unit; `offset` is granule aligned and not before the map.
    pub(crate) fn granule(&self, offset: usize) -> u32 {
        (offset / GRANULE_BYTES) as u32 - self.first_page * self.granules_per_page
    }

    /// Page of the unit that `page` of the map is.
    pub(crate) fn unit_page(&self, page: u32) -> u32 {
        self.first_page + page
    }

    /// What a request could hope for if pages were populated: no run is longer. 0 if every page has memory.
    pub(crate) fn room(&self) -> u32 {
        let vacant = self.map.pages() - self.counts.populated - self.counts.claimed;
        if vacant == 0 { 0 } else { self.longest_bound }
    }

    /// Takes `len` granules aligned to `align` as an area, if there is a place in memory that is there.
    pub(crate) fn take(&mut self, len: u32, align: u32) -> Option<Range<u32>> {
        let start = self.map.find(len, align)?;
        let area = start..start + len;
        self.mark_taken(area.clone());
        Some(area)
    }

    /// Takes `len` granules aligned to `align` as an area, if there is a place in memory that is or could be there.
    /// The pages of it that have none are claimed: the caller populates them and then calls
    /// [`populated`](Self::populated) or [`undo_take`](Self::undo_take).
    pub(crate) fn take_growing(&mut self, len: u32, align: u32) -> Option<(Range<u32>, PageMask)> {
        let start = match self.map.find_growing(len, align) {
            Ok(start) => start,
            Err(longest) => {
                self.longest_bound = longest;
                return None;
            }
        };
        let area = start..start + len;
        let pages = self.map.pages_of(area.clone());
        let mut claimed = PageMask(0);
        for (bit, page) in pages.clone().enumerate() {
            if self.states[page as usize] == PageState::Empty {
                self.states[page as usize] = PageState::Populating;
                claimed.0 |= 1 << bit;
            }
        }
        for run in claimed.runs(pages.start) {
            self.counts.claimed += run.end - run.start;
            self.map.set_visibility(run, Visibility::Hidden);
        }
        self.mark_taken(area.clone());
        Some((area, claimed))
    }

    fn mark_taken(&mut self, area: Range<u32>) {
        if self.nature == Nature::Mapped {
            for page in self.map.pages_of(area.clone()) {
                if self.states[page as usize] == PageState::Populated && self.map.is_page_free(page)
                {
                    self.counts.empty -= 1;
                }
            }
        }
        let len = area.end - area.start;
        self.map.take(area.start, len);
        self.counts.areas += 1;
        self.largest = self.largest.max(len);
    }

    /// The claimed pages of `area` now have memory with `content`.
    pub(crate) fn populated(&mut self, area: Range<u32>, claimed: PageMask, content: Contents) {
        let clean_from = match content {
            Contents::Zeroed => 0,
            Contents::Dirty => self.granules_per_page as u16,
        };
        for run in claimed.runs(self.map.pages_of(area).start) {
            for page in run.clone() {
                self.clean_from[page as usize] = clean_from;
            }
            self.settle(run, PageState::Populated, Visibility::Ready);
        }
    }

    /// The claimed pages of `area` could not be populated: the area is free again, its pages have no memory.
    pub(crate) fn undo_take(&mut self, area: Range<u32>, claimed: PageMask) {
        // The area is there: it was taken and nobody else knows of it.
        let released = self.release(area.start);
        debug_assert_eq!(released, Ok(area.clone()));
        for run in claimed.runs(self.map.pages_of(area).start) {
            self.settle(run, PageState::Empty, Visibility::Vacant);
        }
    }

    /// Frees the area that starts at `start`; returns its granules.
    pub(crate) fn release(&mut self, start: u32) -> Result<Range<u32>, NoArea> {
        let area = self.map.release(start)?;
        self.counts.areas -= 1;
        self.longest_bound = u32::MAX;
        if self.nature == Nature::Mapped {
            for page in self.map.pages_of(area.clone()) {
                if self.states[page as usize] == PageState::Populated && self.map.is_page_free(page)
                {
                    self.counts.empty += 1;
                }
            }
        }
        Ok(area)
    }

    /// Notes that `area` is handed out; returns the part of it that may hold something other than zero.
    pub(crate) fn hand_out(&mut self, area: Range<u32>) -> Range<u32> {
        let mut dirty = area.end..area.start;
        for page in self.map.pages_of(area.clone()) {
            let base = page * self.granules_per_page;
            let start = area.start.max(base);
            let end = area.end.min(base + self.granules_per_page);
            let clean_from = &mut self.clean_from[page as usize];
            let clean = base + u32::from(*clean_from);
            if start < clean {
                dirty.start = dirty.start.min(start);
                dirty.end = dirty.end.max(end.min(clean));
            }
            *clean_from = (*clean_from).max((end - base) as u16);
        }
        dirty
    }

    /// Claims up to `limit` neighbouring pages that have memory and no area, to give their memory back; the highest
    /// ones, for the lowest are filled first. Afterwards the caller calls [`depopulated`](Self::depopulated).
    pub(crate) fn claim_empty(&mut self, limit: u32) -> Option<Range<u32>> {
        let is_empty = |body: &Self, page: u32| {
            body.states[page as usize] == PageState::Populated && body.map.is_page_free(page)
        };
        let last = (0..self.map.pages())
            .rev()
            .find(|&page| is_empty(self, page))?;
        let mut first = last;
        while first > 0 && last - first + 1 < limit && is_empty(self, first - 1) {
            first -= 1;
        }
        let pages = first..last + 1;
        for page in pages.clone() {
            self.states[page as usize] = PageState::Depopulating;
        }
        let len = pages.end - pages.start;
        self.counts.populated -= len;
        self.counts.empty -= len;
        self.counts.claimed += len;
        self.map.set_visibility(pages.clone(), Visibility::Hidden);
        Some(pages)
    }

    /// The claimed `pages` have no memory any more.
    pub(crate) fn depopulated(&mut self, pages: Range<u32>) {
        self.longest_bound = u32::MAX;
        self.settle(pages, PageState::Empty, Visibility::Vacant);
    }

    /// The first run of settled populated pages at `from` or above.
    pub(crate) fn next_populated(&self, from: u32) -> Option<Range<u32>> {
        let is_populated = |page: &u32| self.states[*page as usize] == PageState::Populated;
        let start = (from..self.map.pages()).find(is_populated)?;
        let len = (start..self.map.pages()).take_while(is_populated).count() as u32;
        Some(start..start + len)
    }

    /// Whether `page` of the map has memory that areas can use.
    #[cfg(test)]
    fn is_populated(&self, page: u32) -> bool {
        self.states[page as usize] == PageState::Populated
    }

    /// Ends the transitional state of `pages`.
    fn settle(&mut self, pages: Range<u32>, state: PageState, visibility: Visibility) {
        let len = pages.end - pages.start;
        for page in pages.clone() {
            self.states[page as usize] = state;
        }
        self.counts.claimed -= len;
        if state == PageState::Populated {
            self.counts.populated += len;
        }
        self.map.set_visibility(pages, visibility);
    }

    /// Panics unless the counters equal a recount.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        self.map.check();
        let pages = || 0..self.map.pages();
        let populated = pages().filter(|&page| self.is_populated(page)).count() as u32;
        let empty = pages().filter(|&page| {
            self.nature == Nature::Mapped && self.is_populated(page) && self.map.is_page_free(page)
        });
        let claimed = pages().filter(|&page| {
            matches!(
                self.states[page as usize],
                PageState::Populating | PageState::Depopulating
            )
        });
        let counts = Counts {
            areas: self.map.areas().count() as u32,
            populated,
            empty: empty.count() as u32,
            claimed: claimed.count() as u32,
        };
        assert_eq!(self.counts, counts);
        assert_eq!(self.membership, self.belongs());
    }
}
