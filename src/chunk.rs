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

use crate::directory::Room;
use crate::metadata::{BlockLayout, MetaSlice};
use crate::unit::{Contents, GRANULE_BYTES};
use area_map::{AreaMap, AreaMapLayout, Effort, NoArea, Visibility};

pub(crate) mod area_map;
pub(crate) mod bitmap;
mod growth;
pub(crate) mod summary;

/// Pages that a [`PageMask`] can name, and so those that one area may touch.
pub(crate) const MAX_MASK_PAGES: u32 = u64::BITS;

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

/// Up to 64 pages of a chunk: bit `i` is page `first + i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PageMask {
    first: u32,
    bits: u64,
}

impl PageMask {
    /// No pages, of those from `first` on.
    const fn none(first: u32) -> Self {
        Self { first, bits: 0 }
    }

    fn insert(&mut self, page: u32) {
        self.bits |= 1 << (page - self.first);
    }

    pub(crate) fn is_empty(self) -> bool {
        self.bits == 0
    }

    pub(crate) fn count(self) -> u32 {
        self.bits.count_ones()
    }

    /// The same pages, counted from a page that lies `pages` before.
    pub(crate) fn shifted(self, pages: u32) -> Self {
        Self {
            first: self.first + pages,
            ..self
        }
    }

    /// The runs of neighbouring pages.
    pub(crate) fn runs(self) -> impl Iterator<Item = Range<u32>> + use<> {
        let mut at = 0;
        core::iter::from_fn(move || {
            let left = self.bits.checked_shr(at).filter(|&left| left != 0)?;
            let start = at + left.trailing_zeros();
            at = start + (self.bits >> start).trailing_ones();
            Some(self.first + start..self.first + at)
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
                longest_vacant_pages: layout.pages - populated,
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
    /// The largest area ever handed out, in granules.
    pub(crate) largest: u32,
    /// The longest stretch of pages in state `Empty`.
    longest_vacant_pages: u32,
    /// No free run is longer, pages without memory included and those in transition not. Taking an area leaves it as it
    /// is; a search that it misled puts it right.
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

    /// Pages of the map as pages of the unit.
    pub(crate) fn unit_pages(&self, pages: PageMask) -> PageMask {
        pages.shifted(self.first_page)
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
    pub(crate) fn take(&mut self, len: u32, align: u32, effort: Effort) -> Option<Range<u32>> {
        let start = self.map.find(len, align, effort)?;
        let area = start..start + len;
        self.mark_taken(area.clone());
        Some(area)
    }

    /// Takes `len` granules aligned to `align` as an area, if there is a place in memory that is or could be there; there
    /// is one if `len` is at most the certain [`room`](Self::room). The pages of it that have no memory are claimed: the caller
    /// populates them and then calls [`populated`](Self::populated) or [`undo_take`](Self::undo_take).
    pub(crate) fn take_growing(&mut self, len: u32, align: u32) -> Option<(Range<u32>, PageMask)> {
        let Some(start) = self.map.find_growing(len, align) else {
            self.longest_bound = self.map.longest_growing();
            return None;
        };
        let area = start..start + len;
        let pages = self.map.pages_of(area.clone());
        let mut claimed = PageMask::none(pages.start);
        for page in pages {
            if self.states[page as usize] == PageState::Empty {
                claimed.insert(page);
            }
        }
        self.claim(claimed, PageState::Populating);
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
        self.settle(claimed, PageState::Populated, Visibility::Ready);
    }

    /// The claimed pages could not be populated: the area is free again, its pages have no memory.
    pub(crate) fn undo_take(&mut self, area: Range<u32>, claimed: PageMask) {
        // The area is there: it was taken and nobody else knows of it.
        let released = self.release(area.start);
        debug_assert_eq!(released, Ok(area));
        self.settle(claimed, PageState::Empty, Visibility::Vacant);
    }

    /// Frees the area that starts at `start`; returns its granules.
    pub(crate) fn release(&mut self, start: u32) -> Result<Range<u32>, NoArea> {
        let area = self.map.release(start)?;
        self.counts.areas -= 1;
        self.longest_bound = self.longest_bound.max(self.map.run_around(area.clone()));
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
        self.largest = self.largest.max(area.end - area.start);
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

    /// Claims up to `limit` pages that have memory and no area, to give their memory back: the highest ones, for the
    /// lowest are filled first, and no more than a mask names. Afterwards the caller calls
    /// [`depopulated`](Self::depopulated).
    pub(crate) fn claim_empty(&mut self, limit: u32) -> PageMask {
        let is_empty = |body: &Self, page: u32| {
            body.states[page as usize] == PageState::Populated && body.map.is_page_free(page)
        };
        let last = (0..self.map.pages())
            .rev()
            .find(|&page| is_empty(self, page));
        let end = last.map_or(0, |last| last + 1);
        let mut claimed = PageMask::none(end.saturating_sub(MAX_MASK_PAGES));
        for page in (claimed.first..end).rev() {
            if claimed.count() < limit && is_empty(self, page) {
                claimed.insert(page);
            }
        }
        self.counts.populated -= claimed.count();
        self.counts.empty -= claimed.count();
        self.claim(claimed, PageState::Depopulating);
        claimed
    }

    /// The claimed pages have no memory any more.
    pub(crate) fn depopulated(&mut self, claimed: PageMask) {
        self.settle(claimed, PageState::Empty, Visibility::Vacant);
    }

    /// The first run of settled populated pages at `from` or above.
    pub(crate) fn next_populated(&self, from: u32) -> Option<Range<u32>> {
        let is_populated = |page: &u32| self.states[*page as usize] == PageState::Populated;
        let start = (from..self.map.pages()).find(is_populated)?;
        let len = (start..self.map.pages()).take_while(is_populated).count() as u32;
        Some(start..start + len)
    }

    /// The settled populated pages among those from `from` on, as many as a mask can name; `None` behind the last page.
    pub(crate) fn populated_pages(&self, from: u32) -> Option<PageMask> {
        let end = from.saturating_add(MAX_MASK_PAGES).min(self.map.pages());
        (from < end).then(|| {
            let mut populated = PageMask::none(from);
            (from..end)
                .filter(|&page| self.states[page as usize] == PageState::Populated)
                .for_each(|page| populated.insert(page));
            populated
        })
    }

    /// Whether `page` of the map has memory that areas can use.
    #[cfg(test)]
    fn is_populated(&self, page: u32) -> bool {
        self.states[page as usize] == PageState::Populated
    }

    /// Puts pages into a transitional state.
    fn claim(&mut self, pages: PageMask, state: PageState) {
        self.counts.claimed += pages.count();
        self.set_state(pages, state, Visibility::Hidden);
    }

    /// Ends the transitional state of pages.
    fn settle(&mut self, pages: PageMask, state: PageState, visibility: Visibility) {
        self.counts.claimed -= pages.count();
        self.set_state(pages, state, visibility);
    }

    /// It looks at every page: pages change their state together with memory, which costs far more.
    fn set_state(&mut self, pages: PageMask, state: PageState, visibility: Visibility) {
        for run in pages.runs() {
            self.states[run.start as usize..run.end as usize].fill(state);
            self.map.set_visibility(run, visibility);
        }
        let stretches = self.states.split(|&state| state != PageState::Empty);
        self.longest_vacant_pages = stretches.map(<[_]>::len).max().unwrap_or(0) as u32;
        self.longest_bound = self.map.longest_growing();
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
        let stretches = self.states.split(|&state| state != PageState::Empty);
        assert_eq!(
            self.longest_vacant_pages,
            stretches.map(<[_]>::len).max().unwrap_or(0) as u32
        );
        assert!(self.longest_bound >= self.map.longest_growing());
        assert_eq!(self.membership, self.belongs());
    }
}
