//! What is known of the runs that start in a page: no more than a change tells by the way. A bound that was not kept tight is
//! mended when it misleads a search, by a look at the bits.

use core::ops::Range;

use super::FreeRuns;
use crate::chunk::bitmap;
use crate::chunk::marks::Occupied;

/// No granule.
pub(super) const NOWHERE: u32 = u32::MAX;

/// What is known of the runs that start in a page besides that none is longer than its bound.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record {
    /// Where one starts that is as long as the bound says; `NOWHERE` if that is not known, or there is none.
    pub(super) longest_at: u32,
    /// None of the others is longer, if that one is known.
    pub(super) runner_up: u32,
}

impl Record {
    pub(super) const EMPTY: Self = Self {
        longest_at: NOWHERE,
        runner_up: 0,
    };
}

impl FreeRuns {
    /// Of the runs that start in `page`, that which started at `start` is no more; what is left of it are `rests`, each given
    /// as (start, length).
    #[inline]
    pub(super) fn cut(&mut self, page: u32, start: u32, rests: [(u32, u32); 2]) {
        if self.records[page as usize].longest_at == start {
            self.cut_longest(page, rests);
        }
    }

    fn cut_longest(&mut self, page: u32, rests: [(u32, u32); 2]) {
        let [long, short] = match rests[0].1 >= rests[1].1 {
            true => rests,
            false => [rests[1], rests[0]],
        };
        let record = &mut self.records[page as usize];
        let bound = if long.1 > 0 && long.1 >= record.runner_up {
            record.longest_at = long.0;
            record.runner_up = record.runner_up.max(short.1);
            long.1
        } else {
            record.longest_at = NOWHERE;
            record.runner_up
        };
        self.longest.set(page, bound);
    }

    /// Some of the runs that start in `page`, or none, are `run` now.
    #[inline]
    pub(super) fn grow(&mut self, page: u32, run: Range<u32>) {
        let len = run.end - run.start;
        let bound = self.longest.get(page);
        let record = &mut self.records[page as usize];
        let is_known = record.longest_at != NOWHERE;
        if len > bound {
            if !is_known || !run.contains(&record.longest_at) {
                record.runner_up = bound;
            }
            record.longest_at = run.start;
            self.longest.set(page, len);
        } else if is_known {
            if record.longest_at != run.start {
                record.runner_up = record.runner_up.max(len);
            }
        } else if len == bound {
            record.longest_at = run.start;
            record.runner_up = bound;
        }
    }

    /// Makes the record of a page in which no run starts.
    #[inline]
    pub(super) fn forget(&mut self, page: u32) {
        self.longest.set(page, 0);
        self.records[page as usize] = Record::EMPTY;
    }

    /// Puts the bound of `page`, which has misled a search, right; false if it was right.
    pub(in crate::chunk) fn mend(&mut self, used: Occupied<'_>, page: u32) -> bool {
        let is_bound_only = self.records[page as usize].longest_at == NOWHERE;
        if is_bound_only {
            self.recount(used, page);
        }
        is_bound_only
    }

    /// Recounts the pages whose runs may have changed with something in `pages`.
    pub(super) fn recount_around(&mut self, used: Occupied<'_>, pages: Range<u32>) {
        let before = self.run_start_before(used, pages.start);
        let home = self.page_len.page(before);
        if home < pages.start {
            self.recount(used, home);
        }
        for page in pages.start..(pages.end + 1).min(self.pages()) {
            self.recount(used, page);
        }
    }

    /// Makes the record of `page` from the bits.
    #[inline(never)]
    pub(super) fn recount(&mut self, used: Occupied<'_>, page: u32) {
        let (mut longest, mut record) = (0, Record::EMPTY);
        if self.is_ready(page) {
            let Range { start: base, end } = self.page_len.granules(page..page + 1);
            let is_continued = self.goes_on_into(used, page);
            let mut count = |start: u32, len: u32| {
                if start == 0 && is_continued {
                    // It belongs to a page before.
                } else if len > longest {
                    record = Record {
                        longest_at: base + start,
                        runner_up: longest,
                    };
                    longest = len;
                } else {
                    record.runner_up = record.runner_up.max(len);
                }
                record.runner_up
            };
            let last = match self.is_open(page) {
                true => end - base,
                false => {
                    let words = used.words(self.page_len.words(page..page + 1));
                    bitmap::long_runs(&words, &mut count)
                }
            };
            if last > 0 {
                let start = end - last;
                count(start - base, self.run_end_behind(used, page) - start);
            }
        }
        self.longest.set(page, longest);
        self.records[page as usize] = record;
    }

    /// Whether a run that starts in a page before would go on into `page`.
    fn goes_on_into(&self, used: Occupied<'_>, page: u32) -> bool {
        let base = self.page_len.granules(page..page + 1).start;
        page > 0 && self.is_ready(page - 1) && !bitmap::get(&used, base - 1)
    }
}

#[cfg(test)]
impl FreeRuns {
    /// Panics unless the records hold for `runs`, all free runs in ready pages in order.
    pub(in crate::chunk) fn check(&self, runs: &[Range<u32>]) {
        self.longest.check();
        for page in 0..self.pages() {
            let is_here = |run: &&Range<u32>| self.page_len.page(run.start) == page;
            let record = &self.records[page as usize];
            let bound = self.longest.get(page);
            for run in runs.iter().filter(is_here) {
                let limit = match record.longest_at {
                    at if at == run.start => bound,
                    NOWHERE => bound,
                    _ => record.runner_up,
                };
                assert!(run.len() as u32 <= limit, "page {page}");
            }
            let is_known = |run: &Range<u32>| run.start == record.longest_at;
            let known = runs.iter().find(|run| is_known(run));
            assert!(
                record.longest_at == NOWHERE || known.is_some_and(|run| run.len() as u32 == bound),
                "page {page}"
            );
            assert!(
                record.longest_at == NOWHERE || record.runner_up <= bound,
                "page {page}"
            );
            assert!(self.is_ready(page) || bound == 0, "page {page}");
        }
    }
}
