//! Which granules of a region are used, and by which areas.
//!
//! Two bitmaps with a bit per 4-byte granule: `used`, and `starts` with the first granule of each area. Where the free
//! runs are is kept by [`FreeRuns`]. Taking and returning an area changes its bits and the records of the runs beside
//! it, nothing else, however many areas live and however they lie.
//!
//! Invariants: a set bit in `starts` is set in `used`, but for the one behind a region that does not fill its pages;
//! `runs` agrees with `used`. Offsets are in granules from the start of the map, which is page aligned.

use core::ops::Range;

use super::bitmap;
use super::free_runs::{FreeRuns, FreeRunsLayout};
use super::page_len::PageLen;
use crate::metadata::{BlockLayout, MetaSlice};

pub(crate) use super::free_runs::{Neighbours, Visibility};

/// Pages in which a search may fail for alignment alone before it settles for a run that fits at any alignment.
///
/// It bounds the cost of a request whose alignment the small holes cannot serve. Measured on the recorded traces, a
/// larger bound packs no better.
const MISALIGNED_PAGES: u32 = 8;

/// How hard a search looks for a place that suits an alignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// A few disappointments, then only where any alignment is served: for every request.
    Bounded,
    /// Everywhere: before a request is refused.
    Exhaustive,
}

/// Why an offset does not name an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoArea {
    /// The granule is free.
    Free,
    /// The granule is inside the area that starts here.
    Interior(u32),
}

/// What became of a map by [`release`](AreaMap::release).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Released {
    /// The granule behind those that were the area.
    pub(crate) end: u32,
    /// Visible pages that no area touches any more.
    pub(crate) emptied_pages: u32,
    /// What lies beside the free run that they are part of now.
    pub(crate) neighbours: Neighbours,
}

/// What must be laid out in metadata memory for a map; see [`AreaMap::new`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct AreaMapLayout {
    pages: u32,
    page_len: PageLen,
    used_at: usize,
    starts_at: usize,
    runs: FreeRunsLayout,
}

impl AreaMapLayout {
    /// Adds a map of `pages` pages to `block`.
    pub(crate) fn add(
        block: &mut BlockLayout,
        pages: u32,
        granules_per_page: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        let words = (pages * granules_per_page / u64::BITS) as usize;
        Ok(Self {
            pages,
            page_len: PageLen::new(granules_per_page),
            used_at: block.array::<u64>(words)?,
            starts_at: block.array::<u64>(words)?,
            runs: FreeRunsLayout::add(block, pages)?,
        })
    }
}

/// The areas and free runs of one region of a chunk.
#[derive(Debug)]
pub(crate) struct AreaMap {
    pub(super) used: MetaSlice<u64>,
    starts: MetaSlice<u64>,
    pub(super) runs: FreeRuns,
    pub(super) page_len: PageLen,
    free_granules: u32,
    region: Range<u32>,
}

impl AreaMap {
    /// A map in which `region` (granules) is free and all else never will be, of pages of one `visibility`.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, and nothing else uses this part of it while
    /// the map lives.
    pub(crate) unsafe fn new(
        block: core::ptr::NonNull<u8>,
        layout: &AreaMapLayout,
        region: Range<u32>,
        visibility: Visibility,
    ) -> Self {
        let words = layout.page_len.words(0..layout.pages).len();
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        let (mut used, mut starts, mut runs) = unsafe {
            (
                MetaSlice::new(block, layout.used_at, words, 0),
                MetaSlice::new(block, layout.starts_at, words, 0),
                FreeRuns::new(block, &layout.runs, layout.page_len),
            )
        };
        let end = layout.page_len.granules(0..layout.pages).end;
        if region.end < end {
            // What lies behind the region is no part of the region's last area.
            bitmap::set_bit(&mut starts, region.end);
        }
        bitmap::set(&mut used, 0..region.start);
        bitmap::set(&mut used, region.end..end);
        runs.set_visibility(&used, 0..layout.pages, visibility);
        Self {
            used,
            starts,
            runs,
            page_len: layout.page_len,
            free_granules: region.end - region.start,
            region,
        }
    }

    /// Granules that are free, hidden ones included.
    pub(crate) fn free_granules(&self) -> u32 {
        self.free_granules
    }

    /// Length of the longest free run in memory that is there, in granules: what [`find`](Self::find) can serve.
    #[inline]
    pub(crate) fn longest(&self) -> u32 {
        self.runs.longest()
    }

    /// The granules that can be handed out.
    pub(crate) fn region(&self) -> Range<u32> {
        self.region.clone()
    }

    /// Number of pages in the map.
    pub(crate) fn pages(&self) -> u32 {
        self.runs.pages()
    }

    /// Whether `page` has memory and is in no transition.
    pub(crate) fn is_ready(&self, page: u32) -> bool {
        self.runs.is_ready(page)
    }

    /// Whether `page` is ready and no area touches it.
    #[cfg(test)]
    pub(crate) fn is_open(&self, page: u32) -> bool {
        self.runs.is_open(page)
    }

    /// Whether `page` has no memory and is in no transition.
    pub(crate) fn is_vacant(&self, page: u32) -> bool {
        self.runs.is_vacant(page)
    }

    /// The highest page below `below` that is ready and that no area touches.
    pub(crate) fn last_open(&self, below: u32) -> Option<u32> {
        self.runs.last_open(below)
    }

    /// The first run of ready pages at `from` or above.
    pub(crate) fn next_ready(&self, from: u32) -> Option<Range<u32>> {
        self.runs.next_ready(from)
    }

    /// The granules of `page`.
    pub(crate) fn granules_of(&self, page: u32) -> Range<u32> {
        self.page_len.granules(page..page + 1)
    }

    /// The pages that `granules` touches.
    pub(crate) fn pages_of(&self, granules: Range<u32>) -> Range<u32> {
        self.page_len.pages_of(granules)
    }

    /// A place for `len` granules aligned to `align` granules (a power of two, at most a page): the lowest, but for
    /// requests whose alignment the holes on the way cannot serve, unless every effort is to be made.
    #[inline]
    pub(crate) fn find(&self, len: u32, align: u32, effort: Effort) -> Option<u32> {
        let page = self.runs.first(len)?;
        match self.runs.fit_in(&self.used, page, len, align) {
            Some(start) => Some(start),
            None => self.find_above(page, len, align, effort),
        }
    }

    /// [`find`](Self::find) when `page`, the first with a run that is long enough, has none for the alignment.
    #[cold]
    fn find_above(&self, page: u32, len: u32, align: u32, effort: Effort) -> Option<u32> {
        let mut tries = match effort {
            Effort::Bounded => MISALIGNED_PAGES,
            Effort::Exhaustive => u32::MAX,
        };
        let mut from = page + 1;
        while tries > 1 {
            let page = self.runs.find(len, from)?;
            let found = self.runs.fit_in(&self.used, page, len, align);
            if found.is_some() {
                return found;
            }
            tries -= 1;
            from = page + 1;
        }
        let page = self.runs.first(len + align - 1)?;
        self.runs.fit_in(&self.used, page, len, align)
    }

    /// Marks `len` free granules at `start` as one area; returns how many visible pages are touched that no area
    /// touched before.
    #[inline]
    pub(crate) fn take(&mut self, start: u32, len: u32) -> u32 {
        debug_assert_eq!(
            bitmap::next_set(&self.used, start..start + len),
            start + len
        );
        self.free_granules -= len;
        let (word, bit) = ((start / u64::BITS) as usize, start % u64::BITS);
        self.starts[word] |= 1 << bit;
        let used = &mut self.used[word];
        if let Some((bits, (left, right))) = bitmap::enclosed(*used, bit, len) {
            *used |= bits;
            let (page, run) = (self.page_len.page(start), start - left..start + len + right);
            self.runs.took_inside(&self.used, page, run, (left, right));
            return 0;
        }
        bitmap::set(&mut self.used, start..start + len);
        self.runs.took(&self.used, start..start + len)
    }

    /// Marks the area that starts at `start` free.
    #[inline]
    pub(crate) fn release(&mut self, start: u32) -> Result<Released, NoArea> {
        let end = self.area_end(start)?;
        let len = end - start;
        self.free_granules += len;
        let (word, bit) = ((start / u64::BITS) as usize, start % u64::BITS);
        self.starts[word] &= !(1 << bit);
        let used = &mut self.used[word];
        // A hidden page is left alone: no run of it is recorded.
        if let Some((bits, (left, right))) = bitmap::enclosed(*used, bit, len)
            && self.runs.is_ready(self.page_len.page(start))
        {
            *used &= !bits;
            let (page, run) = (self.page_len.page(start), start - left..end + right);
            self.runs.released_inside(page, run, (left, right));
            return Ok(Released {
                end,
                emptied_pages: 0,
                neighbours: Neighbours::NoneVacant,
            });
        }
        bitmap::clear(&mut self.used, start..end);
        let (run, emptied_pages) = self.runs.released(&self.used, start..end);
        Ok(Released {
            end,
            emptied_pages,
            neighbours: self.runs.neighbours(&run),
        })
    }

    /// The granules of the area that starts at `start`.
    pub(crate) fn area_at(&self, start: u32) -> Result<Range<u32>, NoArea> {
        Ok(start..self.area_end(start)?)
    }

    /// The end of the area that starts at `start`: the next area's start or the next free granule.
    #[inline]
    fn area_end(&self, start: u32) -> Result<u32, NoArea> {
        let (word, bit) = ((start / u64::BITS) as usize, start % u64::BITS);
        if !self.region.contains(&start) || self.used[word] >> bit & 1 == 0 {
            return Err(NoArea::Free);
        }
        if self.starts[word] >> bit & 1 == 0 {
            return Err(self.area_around(start));
        }
        let ends = (self.starts[word] | !self.used[word]) >> bit >> 1;
        match ends {
            0 => Ok(self.area_end_behind(start)),
            _ => Ok(start + 1 + ends.trailing_zeros()),
        }
    }

    /// [`area_end`](Self::area_end) of an area that reaches the end of its first word.
    fn area_end_behind(&self, start: u32) -> u32 {
        bitmap::next_where(start + 1..self.end(), |word| {
            self.starts[word] | !self.used[word]
        })
    }

    /// Why `granule`, a used one, starts no area.
    #[cold]
    fn area_around(&self, granule: u32) -> NoArea {
        NoArea::Interior(bitmap::run_start(&self.starts, 0..granule) - 1)
    }

    /// All areas, in order.
    pub(crate) fn areas(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let end = self.region.end;
        let mut at = 0;
        core::iter::from_fn(move || {
            let start = bitmap::next_set(&self.starts, at..end);
            (start < end).then(|| {
                at = self.area_end_behind(start);
                start..at
            })
        })
    }

    /// All free runs, hidden ones included, in order.
    pub(crate) fn free_runs(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let end = self.end();
        let mut at = 0;
        core::iter::from_fn(move || {
            let start = bitmap::next_clear(&self.used, at..end);
            at = bitmap::next_set(&self.used, start..end);
            (start < end).then_some(start..at)
        })
    }

    /// Sets which searches see `pages`.
    pub(crate) fn set_visibility(&mut self, pages: Range<u32>, visibility: Visibility) {
        self.runs.set_visibility(&self.used, pages, visibility);
    }

    /// Granules in the map, whole pages.
    fn end(&self) -> u32 {
        self.used.len() as u32 * u64::BITS
    }
}

#[cfg(test)]
#[path = "area_map_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "area_map_all_tests.rs"]
mod all_tests;
