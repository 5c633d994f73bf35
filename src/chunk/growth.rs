//! Where an area could be if pages were populated: searches that see pages without memory too.
//!
//! They look at the stretches of vacant pages of one chunk, each with the free pages and granules beside it. That is for
//! requests that are about to have memory populated on every CPU, which costs far more; what is asked of all chunks
//! stands in the directory.

use core::ops::Range;

use super::area_map::AreaMap;
use super::bitmap;

impl AreaMap {
    /// A place for `len` granules aligned to `align` granules that takes the fewest vacant pages, the lowest of these;
    /// otherwise the length of the longest free run with a vacant page in it, hidden pages being left out.
    pub(crate) fn find_growing(&self, len: u32, align: u32) -> Result<u32, u32> {
        // (vacant pages taken, start)
        let mut best: Option<(u32, u32)> = None;
        let mut longest = 0;
        for run in self.growing_runs() {
            longest = longest.max(run.end - run.start);
            let start = run.start.next_multiple_of(align);
            if start + len > run.end {
                continue;
            }
            let taken = self.vacant_among(self.pages_of(start..start + len));
            if best.is_none_or(|(fewest, _)| taken < fewest) {
                best = Some((taken, start));
            }
            if taken <= 1 {
                break;
            }
        }
        best.map(|(_, start)| start).ok_or(longest)
    }

    /// The longest stretch of vacant pages.
    pub(crate) fn longest_vacant_pages(&self) -> u32 {
        let mut longest = 0;
        let mut from = 0;
        while let Some(pages) = self.runs.next_vacant(from) {
            longest = longest.max(pages.end - pages.start);
            from = pages.end;
        }
        longest
    }

    /// The free runs that have a vacant page, in order.
    fn growing_runs(&self) -> impl Iterator<Item = Range<u32>> + '_ {
        let mut from = 0;
        core::iter::from_fn(move || {
            let vacant = self.runs.next_vacant(from)?;
            let start = self.growing_start(vacant.start);
            let end = self.growing_end(vacant.end - 1);
            from = self.page_len.page(end);
            Some(start..end)
        })
    }

    /// The start of the free run that `page`, a vacant one, lies in.
    fn growing_start(&self, page: u32) -> u32 {
        let first = bitmap::start_where(0..page, |word| !self.runs.loose(word));
        let before = self.page_len.granules(first.saturating_sub(1)..first);
        match first > 0 && self.runs.is_ready(first - 1) {
            true => bitmap::run_start(&self.marks.occupied(), before),
            false => self.page_len.granules(first..first).start,
        }
    }

    /// The end of the free run that `page`, a vacant one, lies in.
    fn growing_end(&self, page: u32) -> u32 {
        let last = bitmap::next_where(page..self.pages(), |word| !self.runs.loose(word));
        let behind = self.page_len.granules(last..last + 1);
        match last < self.pages() && self.runs.is_ready(last) {
            true => bitmap::next_set(&self.marks.occupied(), behind),
            false => behind.start,
        }
    }

    /// How many of `pages` are vacant.
    fn vacant_among(&self, pages: Range<u32>) -> u32 {
        let mut vacant = 0;
        let mut from = pages.start;
        while let Some(run) = self.runs.next_vacant(from) {
            if run.start >= pages.end {
                break;
            }
            vacant += run.end.min(pages.end) - run.start;
            from = run.end;
        }
        vacant
    }
}
