//! Which granules of a region are used, by which areas, and where the free runs are.
//!
//! Two bitmaps with a bit per 4-byte granule (`used`; `starts`: the first granule of an area), a record per page of
//! the free runs inside it, and a tree of [`Summary`]s over the pages. Finding, taking and returning an area cost the
//! same however many areas live and however they lie: a search goes down the tree into one page, an update goes from
//! the pages it touches up to the root and stops where nothing changes. Pages without memory stay out of the tree, so
//! that what has memory is used first.
//!
//! Invariants: a set bit in `starts` is set in `used`; every record and node equals what a recount of the bitmaps
//! gives (`runner_up` alone may be too high); the record of a page that is not `Ready` is right too, but the tree sees
//! that page as full. Offsets are in granules from the start of the map, which is page aligned.

use core::ops::Range;

use super::bitmap;
use super::summary::{FANOUT, Summary, TreeShape};
use crate::metadata::{BlockLayout, MetaSlice};

/// Levels that any map can have: 8^8 pages are more than a 32-bit granule number reaches.
const MAX_LEVELS: usize = 9;

/// Pages in which a search may fail for alignment alone before it settles for a run that fits at any alignment.
///
/// It bounds the cost of a request whose alignment the small holes cannot serve. Measured on the recorded traces, a
/// larger bound packs no better.
const MISALIGNED_PAGES: u32 = 8;

/// The free runs of one page, in granules.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageRuns {
    pub(super) start: u16,
    pub(super) end: u16,
    pub(super) longest: u16,
    /// No run but one of the `longest` is longer than this.
    runner_up: u16,
    pub(super) visibility: Visibility,
}

/// Which searches see a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Visibility {
    /// All: it has memory.
    Ready,
    /// `find_growing` only: it has no memory, and no area.
    Vacant,
    /// None: its memory is being populated or given back.
    Hidden,
}

impl PageRuns {
    const fn new(visibility: Visibility) -> Self {
        Self {
            start: 0,
            end: 0,
            longest: 0,
            runner_up: 0,
            visibility,
        }
    }

    fn summary(&self) -> Summary {
        match self.visibility {
            Visibility::Ready => Summary {
                start: u32::from(self.start),
                longest: u32::from(self.longest),
                end: u32::from(self.end),
            },
            Visibility::Vacant | Visibility::Hidden => Summary::FULL,
        }
    }
}

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

/// What must be laid out in metadata memory for a map; see [`AreaMap::new`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct AreaMapLayout {
    pages: u32,
    granules_per_page: u32,
    used_at: usize,
    starts_at: usize,
    runs_at: usize,
    nodes_at: usize,
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
            granules_per_page,
            used_at: block.array::<u64>(words)?,
            starts_at: block.array::<u64>(words)?,
            runs_at: block.array::<PageRuns>(pages as usize)?,
            nodes_at: block.array::<Summary>(TreeShape::new(pages).nodes())?,
        })
    }
}

/// The areas and free runs of one region of a chunk.
#[derive(Debug)]
pub(crate) struct AreaMap {
    pub(super) used: MetaSlice<u64>,
    starts: MetaSlice<u64>,
    pub(super) runs: MetaSlice<PageRuns>,
    nodes: MetaSlice<Summary>,
    /// Index in `nodes` of the first node of each level; level 0 (the pages) has none.
    level_at: [u32; MAX_LEVELS],
    levels: u32,
    pub(super) granules_per_page: u32,
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
        let shape = TreeShape::new(layout.pages);
        let words = (layout.pages * layout.granules_per_page / u64::BITS) as usize;
        // SAFETY: the offsets come from laying these four arrays out in this block (promise of the caller).
        let mut map = unsafe {
            Self {
                used: MetaSlice::new(block, layout.used_at, words, u64::MAX),
                starts: MetaSlice::new(block, layout.starts_at, words, 0),
                runs: MetaSlice::new(
                    block,
                    layout.runs_at,
                    layout.pages as usize,
                    PageRuns::new(visibility),
                ),
                nodes: MetaSlice::new(block, layout.nodes_at, shape.nodes(), Summary::FULL),
                level_at: shape.level_offsets(),
                levels: shape.levels(),
                granules_per_page: layout.granules_per_page,
                free_granules: region.end - region.start,
                region: region.clone(),
            }
        };
        let end = map.end();
        if region.end < end {
            // What lies behind the region is no part of the region's last area.
            bitmap::set(&mut map.starts, region.end..region.end + 1);
        }
        bitmap::clear(&mut map.used, region);
        for page in 0..layout.pages {
            map.recount_page(page);
        }
        for level in 1..=map.levels {
            for index in 0..shape.width(level) {
                map.nodes[(map.level_at[level as usize] + index) as usize] = map.join(level, index);
            }
        }
        map
    }

    /// Granules that are free, hidden ones included.
    pub(crate) fn free_granules(&self) -> u32 {
        self.free_granules
    }

    /// Length of the longest free run in memory that is there, in granules: what [`find`](Self::find) can serve.
    pub(crate) fn longest(&self) -> u32 {
        self.nodes[self.level_at[self.levels as usize] as usize].longest
    }

    /// The granules that can be handed out.
    pub(crate) fn region(&self) -> Range<u32> {
        self.region.clone()
    }

    /// Number of pages in the map.
    pub(crate) fn pages(&self) -> u32 {
        self.runs.len() as u32
    }

    /// Whether no area touches `page`.
    pub(crate) fn is_page_free(&self, page: u32) -> bool {
        u32::from(self.runs[page as usize].start) == self.granules_per_page
    }

    /// The pages that `granules` touches.
    pub(crate) fn pages_of(&self, granules: Range<u32>) -> Range<u32> {
        granules.start / self.granules_per_page..granules.end.div_ceil(self.granules_per_page)
    }

    /// A place for `len` granules aligned to `align` granules (a power of two, at most a page): the lowest, but for
    /// requests whose alignment the holes on the way cannot serve, unless every effort is to be made.
    pub(crate) fn find(&self, len: u32, align: u32, effort: Effort) -> Option<u32> {
        if len > self.longest() {
            return None;
        }
        let mut search = Search {
            map: self,
            len,
            align,
            at_least: len,
            tries: match effort {
                Effort::Bounded => MISALIGNED_PAGES,
                Effort::Exhaustive => u32::MAX,
            },
        };
        search.node(self.levels, 0).or_else(|| {
            search.at_least = len + align - 1;
            search.tries = u32::MAX;
            (search.at_least <= self.longest()).then(|| search.node(self.levels, 0))?
        })
    }

    /// Marks `len` free granules at `start` as one area.
    pub(crate) fn take(&mut self, start: u32, len: u32) {
        debug_assert_eq!(
            bitmap::next_set(&self.used, start..start + len),
            start + len
        );
        bitmap::set(&mut self.starts, start..start + 1);
        self.free_granules -= len;
        let pages = self.pages_of(start..start + len);
        for page in pages.clone() {
            self.take_in_page(page, self.clip(page, start..start + len));
        }
        self.update(pages);
    }

    /// Marks the area that starts at `start` free; returns its granules.
    pub(crate) fn release(&mut self, start: u32) -> Result<Range<u32>, NoArea> {
        let area = self.area_at(start)?;
        bitmap::clear(&mut self.starts, start..start + 1);
        self.free_granules += area.end - area.start;
        let pages = self.pages_of(area.clone());
        for page in pages.clone() {
            self.release_in_page(page, self.clip(page, area.clone()));
        }
        self.update(pages);
        Ok(area)
    }

    /// The granules of the area that starts at `start`.
    pub(crate) fn area_at(&self, start: u32) -> Result<Range<u32>, NoArea> {
        if !self.region.contains(&start) || !bitmap::get(&self.used, start) {
            return Err(NoArea::Free);
        }
        if !bitmap::get(&self.starts, start) {
            return Err(NoArea::Interior(bitmap::run_start(&self.starts, start) - 1));
        }
        Ok(start..self.area_end(start))
    }

    /// All areas, in order.
    pub(crate) fn areas(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let end = self.region.end;
        let mut at = 0;
        core::iter::from_fn(move || {
            let start = bitmap::next_set(&self.starts, at..end);
            (start < end).then(|| {
                at = self.area_end(start);
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
        for page in pages.clone() {
            self.runs[page as usize].visibility = visibility;
        }
        self.update(pages);
    }

    /// Granules in the map, whole pages.
    fn end(&self) -> u32 {
        self.used.len() as u32 * u64::BITS
    }

    /// The end of the area that starts at `start`: the next area's start or the next free granule.
    fn area_end(&self, start: u32) -> u32 {
        bitmap::next_where(start + 1..self.end(), |word| {
            self.starts[word] | !self.used[word]
        })
    }

    /// The part of `granules` inside `page`, counted from the start of the page.
    fn clip(&self, page: u32, granules: Range<u32>) -> Range<u32> {
        let base = page * self.granules_per_page;
        granules.start.max(base) - base..granules.end.min(base + self.granules_per_page) - base
    }

    /// The words of `used` that stand for `page`.
    pub(super) fn words(&self, page: u32) -> Range<usize> {
        let words = (self.granules_per_page / u64::BITS) as usize;
        page as usize * words..(page as usize + 1) * words
    }

    /// Marks `area` of a page used. The record is mended from the run that `area` is taken out of; the page is
    /// recounted only where that run was the longest and its rest may not be.
    fn take_in_page(&mut self, page: u32, area: Range<u32>) {
        let words = self.words(page);
        let len = self.granules_per_page;
        let run = bitmap::run_start(&self.used[words.clone()], area.start)
            ..bitmap::next_set(&self.used[words.clone()], area.end..len);
        bitmap::set(&mut self.used[words], area.clone());
        let left = (area.start - run.start) as u16;
        let right = (run.end - area.end) as u16;
        let runs = &mut self.runs[page as usize];
        if run.start == 0 {
            runs.start = left;
        }
        if run.end == len {
            runs.end = right;
        }
        if run.end - run.start == u32::from(runs.longest) {
            let rest = left.max(right);
            if rest >= runs.runner_up {
                runs.longest = rest;
                runs.runner_up = runs.runner_up.max(left.min(right));
            } else {
                self.recount_page(page);
            }
        }
    }

    /// Marks `area` of a page free, joining it with its free neighbours.
    fn release_in_page(&mut self, page: u32, area: Range<u32>) {
        let words = self.words(page);
        let len = self.granules_per_page;
        bitmap::clear(&mut self.used[words.clone()], area.clone());
        let run = bitmap::run_start(&self.used[words.clone()], area.start)
            ..bitmap::next_set(&self.used[words], area.end..len);
        let joined = (run.end - run.start) as u16;
        let runs = &mut self.runs[page as usize];
        if run.start == 0 {
            runs.start = joined;
        }
        if run.end == len {
            runs.end = joined;
        }
        if joined >= runs.longest {
            runs.runner_up = runs.longest;
            runs.longest = joined;
        } else {
            runs.runner_up = runs.runner_up.max(joined);
        }
    }

    /// Makes the record of `page` from its bits.
    fn recount_page(&mut self, page: u32) {
        let words = &self.used[self.words(page)];
        let len = self.granules_per_page;
        let [longest, runner_up] = bitmap::two_longest_runs(words);
        let start = bitmap::next_set(words, 0..len);
        let end = len - bitmap::run_start(words, len);
        let runs = &mut self.runs[page as usize];
        runs.start = start as u16;
        runs.end = end as u16;
        runs.longest = longest as u16;
        runs.runner_up = runner_up as u16;
    }

    /// Granules in a whole piece of `level`.
    fn piece_len(&self, level: u32) -> u32 {
        self.granules_per_page
            .saturating_mul(FANOUT.saturating_pow(level))
    }

    /// Granules in piece `index` of `level`: the last piece may be shorter than the others.
    fn len_of(&self, level: u32, index: u32) -> u32 {
        let whole = self.piece_len(level);
        whole.min(self.pages() * self.granules_per_page - index * whole)
    }

    /// The summary of piece `index` of `level`.
    fn summary(&self, level: u32, index: u32) -> Summary {
        match level {
            0 => self.runs[index as usize].summary(),
            _ => self.nodes[(self.level_at[level as usize] + index) as usize],
        }
    }

    /// The pieces one level down that piece `index` of `level` joins.
    fn children(&self, level: u32, index: u32) -> Range<u32> {
        let width = match level {
            1 => self.pages(),
            _ => self.level_at[level as usize] - self.level_at[level as usize - 1],
        };
        index * FANOUT..((index + 1) * FANOUT).min(width)
    }

    fn join(&self, level: u32, index: u32) -> Summary {
        let children = self.children(level, index);
        Summary::join(children.map(|child| {
            (
                self.len_of(level - 1, child),
                self.summary(level - 1, child),
            )
        }))
    }

    /// Brings the nodes above `pages` up to date.
    fn update(&mut self, pages: Range<u32>) {
        let mut touched = pages;
        for level in 1..=self.levels {
            touched = touched.start / FANOUT..touched.end.div_ceil(FANOUT);
            let mut changed = false;
            for index in touched.clone() {
                let joined = self.join(level, index);
                let node = &mut self.nodes[(self.level_at[level as usize] + index) as usize];
                changed |= *node != joined;
                *node = joined;
            }
            if !changed {
                return;
            }
        }
    }
}

/// One search through the tree.
struct Search<'m> {
    map: &'m AreaMap,
    len: u32,
    align: u32,
    /// Pieces whose longest run is shorter are not entered: `len`, or enough for `len` at any place.
    at_least: u32,
    /// How many more pages may disappoint.
    tries: u32,
}

impl Search<'_> {
    /// The first fit in piece `index` of `level`.
    fn node(&mut self, level: u32, index: u32) -> Option<u32> {
        if level == 0 {
            return self.page(index);
        }
        let mut base = index * self.map.piece_len(level);
        // Free granules just before `base`.
        let mut run = 0;
        for child in self.map.children(level, index) {
            let summary = self.map.summary(level - 1, child);
            let len = self.map.len_of(level - 1, child);
            if run > 0 {
                let start = (base - run).next_multiple_of(self.align);
                if base + summary.start >= start + self.len {
                    return Some(start);
                }
            }
            if summary.longest >= self.at_least {
                let found = self.node(level - 1, child);
                if found.is_some() || self.tries == 0 {
                    return found;
                }
            }
            run = if summary.start == len {
                run + len
            } else {
                summary.end
            };
            base += len;
        }
        None
    }

    fn page(&mut self, page: u32) -> Option<u32> {
        let found = bitmap::find(&self.map.used[self.map.words(page)], self.len, self.align);
        if found.is_none() {
            self.tries -= 1;
        }
        Some(found? + page * self.map.granules_per_page)
    }
}

#[cfg(test)]
#[path = "area_map_tests.rs"]
mod tests;
