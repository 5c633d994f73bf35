//! Where the free runs of a region are.
//!
//! A run belongs to the page that it starts in, and counts whole there, however many pages it goes on through. A tree of
//! maxima over the pages, each with a bound for the runs that start in it, finds the lowest page that may have a run that is
//! long enough; the marks of that page tell where, or that there is none, and then its bound is put right. A change touches
//! the records of one or two pages: that of the run beside it, and, where a run is cut or joined at a page border, that of
//! the next one. Most changes leave the bound of the page alone and the tree as it is.
//!
//! Three bits per page say which pages searches see ([`Visibility`]) and which no area touches, so that a run that goes
//! on through many free pages is followed by the word.
//!
//! Invariants: no run that starts in a visible page is longer than its `longest`, which is 0 for other pages; the page's
//! [`Record`] says which is as long, if that is known, and bounds the others; a page is not both `ready` and `vacant`; of the
//! ready pages, `untouched` has those without a used granule. What is used stands in the [marks](super::marks), which
//! the map passes to every call.

use core::ops::Range;
use core::ptr::NonNull;

use super::bitmap;
use super::marks::Occupied;
use super::page_len::PageLen;
use crate::max_tree::{MaxTree, MaxTreeLayout};
use crate::metadata::{BlockLayout, MetaSlice};
use records::{NOWHERE, Record};

mod records;

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

/// What lies at the ends of a free run in memory that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Neighbours {
    /// Used granules, hidden pages, the ends of the map.
    NoneVacant,
    /// A vacant page: the run would be longer if that were populated.
    SomeVacant,
}

/// What must be laid out in metadata memory; see [`FreeRuns::new`].
#[derive(Debug, Clone, Copy)]
pub(super) struct FreeRunsLayout {
    pages: u32,
    longest: MaxTreeLayout,
    records_at: usize,
    page_bits_at: [usize; 3],
}

impl FreeRunsLayout {
    pub(super) fn add(
        block: &mut BlockLayout,
        pages: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        let words = pages.div_ceil(u64::BITS) as usize;
        Ok(Self {
            pages,
            page_bits_at: [
                block.array::<u64>(words)?,
                block.array::<u64>(words)?,
                block.array::<u64>(words)?,
            ],
            longest: MaxTreeLayout::add(block, pages)?,
            records_at: block.array::<Record>(pages as usize)?,
        })
    }
}

/// The free runs of a region.
#[derive(Debug)]
pub(super) struct FreeRuns {
    longest: MaxTree,
    records: MetaSlice<Record>,
    ready: MetaSlice<u64>,
    vacant: MetaSlice<u64>,
    untouched: MetaSlice<u64>,
    page_len: PageLen,
}

impl FreeRuns {
    /// The runs of a region whose pages are hidden.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, and nothing else uses this part of it while
    /// the result lives.
    pub(super) unsafe fn new(
        block: NonNull<u8>,
        layout: &FreeRunsLayout,
        page_len: PageLen,
    ) -> Self {
        let words = layout.pages.div_ceil(u64::BITS) as usize;
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        let [ready, vacant, untouched] = layout
            .page_bits_at
            .map(|at| unsafe { MetaSlice::new(block, at, words, 0) });
        // SAFETY: as above.
        unsafe {
            Self {
                longest: MaxTree::new(block, &layout.longest),
                records: MetaSlice::new(
                    block,
                    layout.records_at,
                    layout.pages as usize,
                    Record::EMPTY,
                ),
                ready,
                vacant,
                untouched,
                page_len,
            }
        }
    }

    /// Number of pages.
    pub(super) fn pages(&self) -> u32 {
        self.records.len() as u32
    }

    /// No run is longer.
    pub(super) fn longest(&self) -> u32 {
        self.longest.max()
    }

    /// Whether `page` has memory and is in no transition.
    pub(super) fn is_ready(&self, page: u32) -> bool {
        bitmap::get(&*self.ready, page)
    }

    /// Whether `page` has no memory and is in no transition.
    pub(super) fn is_vacant(&self, page: u32) -> bool {
        bitmap::get(&*self.vacant, page)
    }

    /// Whether `page` is ready and no area touches it.
    pub(super) fn is_open(&self, page: u32) -> bool {
        bitmap::get(&*self.ready, page) && bitmap::get(&*self.untouched, page)
    }

    /// The pages of a word of page bits that have no used granule and are ready or vacant.
    pub(super) fn loose(&self, word: usize) -> u64 {
        self.vacant[word] | (self.ready[word] & self.untouched[word])
    }

    /// The first run of ready pages at `from` or above.
    pub(super) fn next_ready(&self, from: u32) -> Option<Range<u32>> {
        let pages = self.pages();
        let start = bitmap::next_set(&*self.ready, from..pages);
        (start < pages).then(|| start..bitmap::next_clear(&*self.ready, start..pages))
    }

    /// The first run of vacant pages at `from` or above.
    pub(super) fn next_vacant(&self, from: u32) -> Option<Range<u32>> {
        let pages = self.pages();
        let start = bitmap::next_set(&*self.vacant, from..pages);
        (start < pages).then(|| start..bitmap::next_clear(&*self.vacant, start..pages))
    }

    /// The lowest page that a run of at least `len` granules may start in.
    #[inline]
    pub(super) fn first(&self, len: u32) -> Option<u32> {
        self.longest.first(len)
    }

    /// The lowest page, `from` or above, that a run of at least `len` granules may start in.
    pub(super) fn find(&self, len: u32, from: u32) -> Option<u32> {
        self.longest.find(len, from)
    }

    /// The lowest place for `len` granules aligned to `align` in the runs that start in `page`, which may have as many.
    #[inline]
    pub(super) fn fit_in(
        &self,
        used: Occupied<'_>,
        page: u32,
        len: u32,
        align: u32,
    ) -> Option<u32> {
        let record = &self.records[page as usize];
        if record.runner_up < len && record.longest_at != NOWHERE {
            // No other run will do.
            let start = record.longest_at.next_multiple_of(align);
            let end = record.longest_at + self.longest.get(page);
            return (start + len <= end).then_some(start);
        }
        let Range { start: base, end } = self.page_len.granules(page..page + 1);
        let inside = bitmap::find(&used.words(self.page_len.words(page..page + 1)), len, align);
        match inside {
            Some(start) => Some(base + start),
            None => self.fit_over_end(used, page, base..end, len, align),
        }
    }

    /// [`fit_in`](Self::fit_in) for the run that goes on behind the page, whose granules are `granules`.
    #[inline(never)]
    fn fit_over_end(
        &self,
        used: Occupied<'_>,
        page: u32,
        granules: Range<u32>,
        len: u32,
        align: u32,
    ) -> Option<u32> {
        let start = bitmap::run_start(&used, granules).next_multiple_of(align);
        (self.run_end_behind(used, page) >= start + len).then_some(start)
    }

    /// The highest page below `below` that is ready and that no area touches.
    pub(super) fn last_open(&self, below: u32) -> Option<u32> {
        let end = bitmap::start_where(0..below, |word| self.ready[word] & self.untouched[word]);
        end.checked_sub(1)
    }

    /// What lies beside `run`, a whole one.
    pub(super) fn neighbours(&self, run: &Range<u32>) -> Neighbours {
        let (before, behind) = (self.page_len.page(run.start), self.page_len.page(run.end));
        let borders = self.page_len.granules(before..behind);
        let is_vacant_before =
            run.start == borders.start && before > 0 && self.is_vacant(before - 1);
        let is_vacant_behind =
            run.end == borders.end && behind < self.pages() && self.is_vacant(behind);
        match is_vacant_before || is_vacant_behind {
            true => Neighbours::SomeVacant,
            false => Neighbours::NoneVacant,
        }
    }

    /// Notes that `run`, inside `page` between used granules, has lost the part between `left` granules at its start and
    /// `right` at its end.
    #[inline]
    pub(super) fn took_inside(&mut self, page: u32, run: Range<u32>, (left, right): (u32, u32)) {
        self.cut(
            page,
            run.start,
            [(run.start, left), (run.end - right, right)],
        );
    }

    /// Notes that `run`, inside `page` between used granules, is free, and that not all of it was.
    #[inline]
    pub(super) fn released_inside(&mut self, page: u32, run: Range<u32>) {
        self.grow(page, run);
    }

    /// Notes that the free run that `area` was part of has lost it; its bits are set. Returns how many visible pages no
    /// area touched before.
    #[inline(never)]
    pub(super) fn took(&mut self, used: Occupied<'_>, area: Range<u32>) -> u32 {
        let pages = self.page_len.pages_of(area.clone());
        if !self.are_ready(pages.clone()) {
            return self.took_pages(used, area);
        }
        let start = self.run_start(used, pages.start, area.start);
        let home = self.page_len.page(start);
        let end = match self.records[home as usize].longest_at == start {
            true => start + self.longest.get(home),
            false => self.run_end(used, pages.end - 1, area.end),
        };
        let mut opened = 0;
        for page in pages {
            opened += u32::from(bitmap::get(&*self.untouched, page));
            bitmap::clear_bit(&mut self.untouched, page);
        }
        let next = self.page_len.page(area.end);
        let (left, right) = ((start, area.start - start), (area.end, end - area.end));
        if next == home {
            self.cut(home, start, [left, right]);
        } else {
            self.cut(home, start, [left, (0, 0)]);
            if right.1 > 0 {
                self.grow(next, area.end..end);
            }
        }
        opened
    }

    /// Notes that `area` is free again; its bits are clear. Returns the run that it lies in now, and how many visible
    /// pages no area touches any more.
    #[inline(never)]
    pub(super) fn released(&mut self, used: Occupied<'_>, area: Range<u32>) -> (Range<u32>, u32) {
        let pages = self.page_len.pages_of(area.clone());
        if !self.are_ready(pages.clone()) {
            let emptied = self.released_pages(used, pages.clone());
            let start = self.run_start(used, pages.start, area.start);
            return (start..self.run_end(used, pages.end - 1, area.end), emptied);
        }
        let Record { longest_at, .. } = self.records[pages.start as usize];
        let is_longest_before =
            longest_at < area.start && longest_at + self.longest.get(pages.start) == area.start;
        let start = match is_longest_before {
            true => longest_at,
            false => self.run_start(used, pages.start, area.start),
        };
        let next = self.page_len.page(area.end);
        let end = match self.records.get(next as usize) {
            Some(record) if record.longest_at == area.end => area.end + self.longest.get(next),
            _ => self.run_end(used, pages.end - 1, area.end),
        };
        let home = self.page_len.page(start);
        if next != home && end > area.end {
            // The run behind is a part of this one now.
            self.cut(next, area.end, [(0, 0); 2]);
        }
        self.grow(home, start..end);
        let mut emptied = 0;
        for page in pages {
            let granules = self.page_len.granules(page..page + 1);
            let is_open = start <= granules.start && end >= granules.end;
            if is_open && !bitmap::get(&*self.untouched, page) {
                bitmap::set_bit(&mut self.untouched, page);
                emptied += 1;
            }
        }
        (start..end, emptied)
    }

    /// Whether all of `pages` have memory and are in no transition.
    #[inline]
    fn are_ready(&self, pages: Range<u32>) -> bool {
        pages.into_iter().all(|page| self.is_ready(page))
    }

    /// [`took`](Self::took) for an area with pages that searches do not see.
    fn took_pages(&mut self, used: Occupied<'_>, area: Range<u32>) -> u32 {
        let pages = self.page_len.pages_of(area.clone());
        let opens = pages.clone().filter(|&page| self.is_open(page)).count();
        bitmap::clear(&mut self.untouched, pages.clone());
        let is_hidden = |page: &u32| !self.is_ready(*page);
        let Some(first) = pages.clone().find(is_hidden) else {
            return opens as u32;
        };
        let behind = 1 + pages.clone().rev().find(is_hidden).unwrap_or(first);
        if !(first..behind).all(|page| is_hidden(&page)) {
            self.recount_around(used, pages);
            return opens as u32;
        }
        if pages.start < first {
            // It ended with the page before the first.
            let start = self.run_start(used, pages.start, area.start);
            let rest = (start, area.start - start);
            self.cut(self.page_len.page(start), start, [rest, (0, 0)]);
        }
        if behind < pages.end {
            // It began with the page behind the last.
            let start = self.page_len.granules(behind..pages.end).start;
            let end = self.run_end(used, pages.end - 1, area.end);
            let home = self.page_len.page(area.end);
            if home == behind {
                self.cut(behind, start, [(area.end, end - area.end), (0, 0)]);
            } else {
                self.cut(behind, start, [(0, 0); 2]);
                if end > area.end {
                    self.grow(home, area.end..end);
                }
            }
        }
        opens as u32
    }

    /// Notes that areas which touched all of `pages` are free. Returns how many visible pages no area touches any more.
    fn released_pages(&mut self, used: Occupied<'_>, pages: Range<u32>) -> u32 {
        let mut emptied = 0;
        for page in pages.clone() {
            let is_untouched = bitmap::get(&*self.untouched, page);
            if !is_untouched && used.is_clear(self.page_len.words(page..page + 1)) {
                bitmap::set_bit(&mut self.untouched, page);
                emptied += u32::from(self.is_ready(page));
            }
        }
        self.recount_around(used, pages);
        emptied
    }

    /// Sets which searches see `pages`.
    pub(super) fn set_visibility(
        &mut self,
        used: Occupied<'_>,
        pages: Range<u32>,
        visibility: Visibility,
    ) {
        let (was_ready, is_ready) = (&mut self.ready, visibility == Visibility::Ready);
        let changes = match is_ready {
            true => bitmap::next_clear(&**was_ready, pages.clone()) < pages.end,
            false => bitmap::next_set(&**was_ready, pages.clone()) < pages.end,
        };
        match is_ready {
            true => bitmap::set(was_ready, pages.clone()),
            false => bitmap::clear(was_ready, pages.clone()),
        }
        match visibility {
            Visibility::Vacant => bitmap::set(&mut self.vacant, pages.clone()),
            Visibility::Ready | Visibility::Hidden => {
                bitmap::clear(&mut self.vacant, pages.clone());
            }
        }
        match (changes, is_ready) {
            (false, _) => {}
            (true, true) => self.show(used, pages),
            (true, false) => self.hide(used, pages),
        }
    }

    /// Makes the records of `pages`, which have come into sight, and of those that runs go on from or into.
    fn show(&mut self, used: Occupied<'_>, pages: Range<u32>) {
        let mut start = self.run_start_before(used, pages.start);
        let mut is_counted = true;
        for page in pages.clone() {
            self.forget(page);
            let Some((stretch, is_whole)) = used.stretch(self.page_len.words(page..page + 1))
            else {
                bitmap::set_bit(&mut self.untouched, page);
                continue;
            };
            bitmap::clear_bit(&mut self.untouched, page);
            is_counted &= is_whole;
            let base = self.page_len.granules(page..page + 1).start;
            if start < base + stretch.start {
                self.grow(self.page_len.page(start), start..base + stretch.start);
            }
            start = base + stretch.end;
        }
        let end = self.page_len.granules(pages.clone()).end;
        if start < end {
            let behind = self.run_end_behind(used, pages.end - 1);
            self.grow(self.page_len.page(start), start..behind);
            if behind > end {
                // What began there is a part of it now.
                self.cut(pages.end, end, [(0, 0); 2]);
            }
        }
        if !is_counted {
            pages.for_each(|page| self.recount(used, page));
        }
    }

    /// Makes the records of `pages`, which have gone out of sight, and of those that runs went on from or into.
    fn hide(&mut self, used: Occupied<'_>, pages: Range<u32>) {
        pages.clone().for_each(|page| self.forget(page));
        let Range { start, end } = self.page_len.granules(pages.clone());
        let before = self.run_start_before(used, pages.start);
        let home = self.page_len.page(before);
        if home < pages.start {
            self.cut(home, before, [(before, start - before), (0, 0)]);
        }
        if pages.end < self.pages() {
            let behind = self.run_end_behind(used, pages.end - 1);
            if behind > end {
                self.grow(pages.end, end..behind);
            }
        }
    }

    /// The start of the free run that ends just before `at`, a granule of `page` or the one behind it; `at` if there is
    /// none.
    #[inline]
    fn run_start(&self, used: Occupied<'_>, page: u32, at: u32) -> u32 {
        let base = self.page_len.granules(page..page + 1).start;
        let start = bitmap::run_start(&used, base..at);
        if start > base {
            return start;
        }
        self.run_start_before(used, page)
    }

    /// The end of the free run that starts at `at`, a granule of `page` or the one behind it; `at` if there is none.
    #[inline]
    fn run_end(&self, used: Occupied<'_>, page: u32, at: u32) -> u32 {
        let page_end = self.page_len.granules(page..page + 1).end;
        let end = bitmap::next_set(&used, at..page_end);
        if end < page_end {
            return end;
        }
        self.run_end_behind(used, page)
    }

    /// The start of the run that ends with the last granule before `page`, or the first granule of `page`.
    fn run_start_before(&self, used: Occupied<'_>, page: u32) -> u32 {
        let first = bitmap::start_where(0..page, |word| !(self.ready[word] & self.untouched[word]));
        let Range { start: low, end } = self.page_len.granules(first.saturating_sub(1)..first);
        match first > 0 && self.is_ready(first - 1) {
            true => bitmap::run_start(&used, low..end),
            false => end,
        }
    }

    /// The end of the run that starts with the first granule behind `page`, or that granule.
    fn run_end_behind(&self, used: Occupied<'_>, page: u32) -> u32 {
        let pages = self.pages();
        let last = bitmap::next_where(page + 1..pages, |word| {
            !(self.ready[word] & self.untouched[word])
        });
        let Range { start, end: high } = self.page_len.granules(last..last + 1);
        match last < pages && self.is_ready(last) {
            true => bitmap::next_set(&used, start..high),
            false => start,
        }
    }
}
