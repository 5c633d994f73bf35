//! Where an area could be if pages were populated: searches that see pages without memory too.
//!
//! They look at the record of every page of one chunk. That is for requests that are about to have memory populated on
//! every CPU, which costs far more; what is asked of all chunks stands in the directory.

use core::ops::Range;

use super::area_map::{AreaMap, Visibility};
use super::bitmap;

impl AreaMap {
    /// A place for `len` granules aligned to `align` granules that takes the fewest vacant pages, the lowest of these.
    ///
    /// Cost: a look at each page. It is for requests that are about to have memory populated, which costs far more.
    pub(crate) fn find_growing(&self, len: u32, align: u32) -> Option<u32> {
        let page_len = self.granules_per_page;
        // (vacant pages taken, start)
        let mut best: Option<(u32, u32)> = None;
        let mut run_start = 0_u32;
        for page in 0..=self.pages() {
            let (start, end) = if page < self.pages() {
                self.seen(page)
            } else {
                (0, 0)
            };
            if start == page_len {
                continue;
            }
            let run_end = page * page_len + start;
            let area = run_start.next_multiple_of(align);
            if area + len <= run_end {
                let taken = self
                    .pages_of(area..area + len)
                    .filter(|&page| self.is_vacant(page))
                    .count();
                best = best
                    .filter(|best| best.0 <= taken as u32)
                    .or(Some((taken as u32, area)));
                if taken <= 1 {
                    break;
                }
            }
            run_start = (page + 1) * page_len - end;
        }
        best.map(|(_, start)| start)
    }

    /// Length of the free run that `granules`, which are free, lie in; vacant pages included, hidden ones not.
    pub(crate) fn run_around(&self, granules: Range<u32>) -> u32 {
        let page_len = self.granules_per_page;
        let is_free = |page: u32| {
            self.runs[page as usize].visibility != Visibility::Hidden && self.is_page_free(page)
        };
        let (first, last) = (granules.start / page_len, (granules.end - 1) / page_len);
        let words = |page: u32| &self.used[self.words(page)];
        let mut start =
            first * page_len + bitmap::run_start(words(first), granules.start % page_len);
        if start == first * page_len {
            let mut page = first;
            while page > 0 && is_free(page - 1) {
                page -= 1;
            }
            let tail = page.checked_sub(1).map_or(0, |before| self.seen(before).1);
            start = page * page_len - tail;
        }
        let inside = granules.end - last * page_len;
        let mut end = last * page_len + bitmap::next_set(words(last), inside..page_len);
        if end == (last + 1) * page_len {
            let mut page = last + 1;
            while page < self.pages() && is_free(page) {
                page += 1;
            }
            let head = if page < self.pages() {
                self.seen(page).0
            } else {
                0
            };
            end = page * page_len + head;
        }
        end - start
    }

    /// The longest free run, vacant pages included, hidden ones not.
    pub(crate) fn longest_growing(&self) -> u32 {
        let page_len = self.granules_per_page;
        let (mut longest, mut run) = (0, 0);
        for page in 0..self.pages() {
            let (start, end) = self.seen(page);
            longest = longest.max(run + start);
            if self.runs[page as usize].visibility == Visibility::Ready {
                longest = longest.max(self.runs[page as usize].longest.into());
            }
            run = if start == page_len {
                run + page_len
            } else {
                end
            };
        }
        longest.max(run)
    }

    /// The free granules at the start and at the end of `page` that a growing search sees.
    fn seen(&self, page: u32) -> (u32, u32) {
        let runs = &self.runs[page as usize];
        match runs.visibility {
            Visibility::Ready => (runs.start.into(), runs.end.into()),
            Visibility::Vacant => (self.granules_per_page, self.granules_per_page),
            Visibility::Hidden => (0, 0),
        }
    }

    fn is_vacant(&self, page: u32) -> bool {
        self.runs[page as usize].visibility == Visibility::Vacant
    }
}
