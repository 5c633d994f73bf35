//! Which granules of a region are used, and by which areas.
//!
//! What a granule is stands in the [`Marks`]; where the free runs are is kept by [`FreeRuns`]. Taking and returning an area
//! changes its marks and the records of the runs beside it, nothing else, however many areas live and however they lie.
//!
//! An area is freed in two steps: its mark says so at once, which takes no lock; its granules become free when its page is
//! swept, together with others.
//!
//! Invariants: `runs` agrees with what the marks say is occupied. Offsets are in granules from the start of the map, which
//! is page aligned.

use core::ops::Range;

use super::bitmap::{self, Words};
use super::free_runs::{FreeRuns, FreeRunsLayout};
use super::marks::{Marks, MarksLayout};
use super::page_len::PageLen;
use crate::metadata::BlockLayout;

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
    marks: MarksLayout,
    runs: FreeRunsLayout,
}

impl AreaMapLayout {
    /// Adds a map of `pages` pages to `block`.
    pub(crate) fn add(
        block: &mut BlockLayout,
        pages: u32,
        granules_per_page: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        let page_len = PageLen::new(granules_per_page);
        Ok(Self {
            pages,
            page_len,
            marks: MarksLayout::add(block, pages, page_len)?,
            runs: FreeRunsLayout::add(block, pages)?,
        })
    }
}

/// The areas and free runs of one region of a chunk.
#[derive(Debug)]
pub(crate) struct AreaMap {
    pub(super) marks: Marks,
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
        // SAFETY: the promise of the caller.
        let (marks, mut runs) = unsafe {
            (
                Marks::new(block, &layout.marks),
                FreeRuns::new(block, &layout.runs, layout.page_len),
            )
        };
        let end = layout.page_len.granules(0..layout.pages).end;
        if region.end < end {
            // What lies behind the region is no part of the region's last area.
            marks.end_areas_at(region.end);
        }
        marks.block(0..region.start);
        marks.block(region.end..end);
        runs.set_visibility(marks.occupied(), 0..layout.pages, visibility);
        Self {
            marks,
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

    /// No free run in memory that is there is longer, in granules: what [`find`](Self::find) may serve.
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

    /// The first run of vacant pages at `from` or above.
    pub(crate) fn next_vacant(&self, from: u32) -> Option<Range<u32>> {
        self.runs.next_vacant(from)
    }

    /// The granules of `page`.
    pub(crate) fn granules_of(&self, page: u32) -> Range<u32> {
        self.page_len.granules(page..page + 1)
    }

    /// How many pages so many granules may touch, from the start of one or from the middle.
    pub(crate) fn most_pages_of(&self, granules: u32) -> u32 {
        self.page_len.page(granules) + 1
    }

    /// The pages that `granules` touches.
    pub(crate) fn pages_of(&self, granules: Range<u32>) -> Range<u32> {
        self.page_len.pages_of(granules)
    }

    /// A place for `len` granules aligned to `align` granules (a power of two, at most a page): the lowest, but for
    /// requests whose alignment the holes on the way cannot serve, unless every effort is to be made.
    #[inline]
    pub(crate) fn find(&mut self, len: u32, align: u32, effort: Effort) -> Option<u32> {
        loop {
            let page = self.runs.first(len)?;
            let found = self.runs.fit_in(self.marks.occupied(), page, len, align);
            if found.is_some() {
                return found;
            }
            if !self.runs.mend(self.marks.occupied(), page) {
                return self.find_above(page, len, align, effort);
            }
        }
    }

    /// [`find`](Self::find) when `page`, the first with a run that is long enough, has none for the alignment.
    #[cold]
    fn find_above(&mut self, page: u32, len: u32, align: u32, effort: Effort) -> Option<u32> {
        let mut tries = match effort {
            Effort::Bounded => MISALIGNED_PAGES,
            Effort::Exhaustive => u32::MAX,
        };
        let mut from = page + 1;
        while tries > 1 {
            let page = self.runs.find(len, from)?;
            let found = self.runs.fit_in(self.marks.occupied(), page, len, align);
            if found.is_some() {
                return found;
            }
            // A bound that misled is right now, and does not count.
            if !self.runs.mend(self.marks.occupied(), page) {
                tries -= 1;
                from = page + 1;
            }
        }
        loop {
            let page = self.runs.first(len + align - 1)?;
            let found = self.runs.fit_in(self.marks.occupied(), page, len, align);
            if found.is_some() || !self.runs.mend(self.marks.occupied(), page) {
                return found;
            }
        }
    }

    /// Marks `len` free granules at `start` as one area; returns how many visible pages are touched that no area
    /// touched before.
    #[inline]
    pub(crate) fn take(&mut self, start: u32, len: u32) -> u32 {
        debug_assert_eq!(
            bitmap::next_set(&self.marks.occupied(), start..start + len),
            start + len
        );
        self.free_granules -= len;
        let (word, bit) = (start / u64::BITS, start % u64::BITS);
        let occupied = self.marks.occupied();
        let around = bitmap::enclosed(occupied.word(word as usize), bit, len);
        self.marks.take(start..start + len);
        if let Some((_, (left, right))) = around {
            let (page, run) = (self.page_len.page(start), start - left..start + len + right);
            self.runs.took_inside(page, run, (left, right));
            return 0;
        }
        self.runs.took(occupied, start..start + len)
    }

    /// Marks free granules as so many areas of `len` granules, one behind the other; returns how many visible pages are
    /// touched that no area touched before.
    pub(crate) fn take_all(&mut self, start: u32, len: u32, count: u32) -> u32 {
        let areas = start..start + len * count;
        debug_assert_eq!(
            bitmap::next_set(&self.marks.occupied(), areas.clone()),
            areas.end
        );
        self.free_granules -= len * count;
        self.marks.take_all(areas.clone(), len);
        self.runs.took(self.marks.occupied(), areas)
    }

    /// How many granules are free from `start` on in its page, `most` at most.
    pub(crate) fn free_from(&self, start: u32, most: u32) -> u32 {
        let page_end = self.granules_of(self.page_len.page(start)).end;
        let end = page_end.min(start + most);
        bitmap::next_set(&self.marks.occupied(), start..end) - start
    }

    /// Frees the area that starts at `start`, and its granules.
    #[inline]
    pub(crate) fn release(&mut self, start: u32) -> Result<Released, NoArea> {
        self.area_end(start)?;
        let end = self.marks.remove(start).ok_or(NoArea::Free)?;
        Ok(self.note_free(start..end))
    }

    /// Makes the granules of areas that lie one behind the other free, live or not; also returns how many were not.
    pub(crate) fn release_all(&mut self, areas: Range<u32>) -> (Released, u32) {
        let wrong = self.marks.clear(areas.clone());
        (self.note_free(areas), wrong)
    }

    /// Makes the granules of the freed areas free that start in `page`, but for those that `kept` picks; see
    /// [`Marks::sweep_word`]. `each` is told their lengths. `None` if there are none.
    #[inline]
    pub(crate) fn sweep_page(
        &mut self,
        page: u32,
        kept: impl Fn(u32, u32) -> u32,
        mut each: impl FnMut(u32),
    ) -> Option<Released> {
        self.marks.begin_sweep(page);
        // Granules that are free by their marks; areas that lie side by side become free at one go.
        let mut stretch = 0..0;
        let mut all: Option<Released> = None;
        let mut words = self.marks.words_of(page);
        while let Some(index) = self.marks.next_freed_word(words.clone()) {
            words.start = index + 1;
            let Some((mut gone, end)) = self.marks.sweep_word(index, &kept, &mut each) else {
                continue;
            };
            // No area starts inside another.
            let behind = (end / u32::BITS) as usize;
            words.start = behind.clamp(words.start, words.end);
            let first = index as u32 * u32::BITS;
            while gone != 0 {
                let at = gone.trailing_zeros();
                let stop = at + (gone >> at).trailing_ones();
                gone &= gone.wrapping_add(1 << at);
                // The last may go on behind the word.
                let stop = if stop == u32::BITS { end } else { first + stop };
                if stretch.end != first + at {
                    self.note_swept(stretch, &mut all);
                    stretch = first + at..first + at;
                }
                stretch.end = stop;
            }
        }
        self.note_swept(stretch, &mut all);
        all
    }

    /// Notes that granules are free, and adds up what that comes to.
    #[inline]
    fn note_swept(&mut self, granules: Range<u32>, all: &mut Option<Released>) {
        if granules.is_empty() {
            return;
        }
        let released = self.note_free(granules);
        let Some(all) = all else {
            *all = Some(released);
            return;
        };
        all.end = released.end;
        all.emptied_pages += released.emptied_pages;
        if released.neighbours == Neighbours::SomeVacant {
            all.neighbours = Neighbours::SomeVacant;
        }
    }

    /// Notes that granules are free which were areas.
    #[inline]
    fn note_free(&mut self, areas: Range<u32>) -> Released {
        let Range { start, end } = areas;
        let len = end - start;
        self.free_granules += len;
        let (word, bit) = (start / u64::BITS, start % u64::BITS);
        let occupied = self.marks.occupied();
        // A hidden page is left alone: no run of it is recorded.
        if let Some((_, (left, right))) = bitmap::enclosed(occupied.word(word as usize), bit, len)
            && self.runs.is_ready(self.page_len.page(start))
        {
            let (page, run) = (self.page_len.page(start), start - left..end + right);
            self.runs.released_inside(page, run);
            return Released {
                end,
                emptied_pages: 0,
                neighbours: Neighbours::NoneVacant,
            };
        }
        let (run, emptied_pages) = self.runs.released(occupied, areas);
        Released {
            end,
            emptied_pages,
            neighbours: self.runs.neighbours(&run),
        }
    }

    /// The lowest of `pages` with areas that were freed and have not been swept.
    #[inline]
    pub(crate) fn next_freed_page(&self, pages: Range<u32>) -> Option<u32> {
        self.marks.next_freed_page(pages)
    }

    /// Makes the freed area of `len` granules that starts at `start` live again; false if there is none.
    pub(crate) fn reuse(&self, start: u32, len: u32) -> bool {
        self.marks.reuse(start, len)
    }

    /// Whether a freed area starts at `granule`.
    #[inline]
    pub(crate) fn is_freed(&self, granule: u32) -> bool {
        granule < self.end() && self.marks.at(granule) == (false, true)
    }

    /// The granules of the area that starts at `start`.
    pub(crate) fn area_at(&self, start: u32) -> Result<Range<u32>, NoArea> {
        Ok(start..self.area_end(start)?)
    }

    /// The end of the live area that starts at `start`: the next area's start or the next free granule.
    #[inline]
    fn area_end(&self, start: u32) -> Result<u32, NoArea> {
        if !self.region.contains(&start) {
            return Err(NoArea::Free);
        }
        match self.marks.at(start) {
            (true, true) => Ok(self.marks.area_end(start)),
            (true, false) => Err(self.area_around(start)),
            (false, _) => Err(NoArea::Free),
        }
    }

    /// Why `granule`, a used one, starts no area.
    #[cold]
    fn area_around(&self, granule: u32) -> NoArea {
        let start = bitmap::start_where(0..granule, |word| self.marks.starts(word)) - 1;
        match self.is_freed(start) {
            true => NoArea::Free,
            false => NoArea::Interior(start),
        }
    }

    /// All live areas, in order.
    pub(crate) fn areas(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let end = self.region.end;
        let mut at = 0;
        core::iter::from_fn(move || {
            let start = bitmap::next_where(at..end, |word| self.marks.live_starts(word));
            (start < end).then(|| {
                at = self.marks.area_end(start);
                start..at
            })
        })
    }

    /// All free runs, hidden ones included, in order.
    pub(crate) fn free_runs(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let end = self.end();
        let mut at = 0;
        core::iter::from_fn(move || {
            let start = bitmap::next_clear(&self.marks.occupied(), at..end);
            at = bitmap::next_set(&self.marks.occupied(), start..end);
            (start < end).then_some(start..at)
        })
    }

    /// Sets which searches see `pages`.
    pub(crate) fn set_visibility(&mut self, pages: Range<u32>, visibility: Visibility) {
        self.runs
            .set_visibility(self.marks.occupied(), pages, visibility);
    }

    /// Granules in the map, whole pages.
    fn end(&self) -> u32 {
        self.page_len.granules(0..self.pages()).end
    }
}

#[cfg(test)]
#[path = "area_map_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "area_map_all_tests.rs"]
mod all_tests;
