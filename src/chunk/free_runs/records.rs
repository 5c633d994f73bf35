//! What a page's record says of the runs that start in it, and how it is kept: mended from the run that changes, and
//! counted anew from the bits only where the last of the longest runs was cut and what is left of it may not be the
//! longest.

use core::ops::Range;

use super::FreeRuns;
use crate::chunk::bitmap;
use crate::chunk::marks::Occupied;

/// No granule.
pub(super) const NOWHERE: u32 = u32::MAX;

/// What is known of the runs that start in a page besides the length of the longest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record {
    /// Where one of the longest starts; `NOWHERE` if that is not known, or there is none.
    pub(super) longest_at: u32,
    /// How many are as long as the longest.
    pub(super) ties: u32,
    /// None of the others is longer; less than the longest, or 0.
    pub(super) runner_up: u32,
}

impl Record {
    pub(super) const EMPTY: Self = Self {
        longest_at: NOWHERE,
        ties: 0,
        runner_up: 0,
    };
}

impl FreeRuns {
    /// Of the runs that start in `page`, one of the longest, which started at `start`, is no more; what is left of it are
    /// `rests`, each given as (start, length).
    #[inline(never)]
    pub(super) fn cut(
        &mut self,
        used: Occupied<'_>,
        page: u32,
        start: u32,
        rests: [(u32, u32); 2],
    ) {
        let [long, short] = match rests[0].1 >= rests[1].1 {
            true => rests,
            false => [rests[1], rests[0]],
        };
        let record = &mut self.records[page as usize];
        if record.ties > 1 {
            record.ties -= 1;
            record.runner_up = record.runner_up.max(long.1);
            if record.longest_at == start {
                record.longest_at = NOWHERE;
            }
        } else if long.1 > record.runner_up {
            record.longest_at = long.0;
            if short.1 == long.1 {
                record.ties = 2;
            } else {
                record.runner_up = record.runner_up.max(short.1);
            }
            self.longest.set(page, long.1);
        } else if record.runner_up == 0 {
            *record = Record::EMPTY;
            self.longest.set(page, 0);
        } else {
            self.recount(used, page);
        }
    }

    /// Of the runs that start in `page`, those of the lengths `parts` (0: none) are `run` now.
    pub(super) fn grow(&mut self, page: u32, run: Range<u32>, parts: [u32; 2]) {
        let len = run.end - run.start;
        let longest = self.longest.get(page);
        let record = &mut self.records[page as usize];
        if len < longest {
            record.runner_up = record.runner_up.max(len);
        } else if len == longest {
            record.ties += 1;
        } else {
            for part in parts {
                record.ties -= u32::from(part > 0 && part == longest);
            }
            if record.ties > 0 {
                record.runner_up = longest;
            }
            record.ties = 1;
            record.longest_at = run.start;
            self.longest.set(page, len);
        }
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
    fn recount(&mut self, used: Occupied<'_>, page: u32) {
        let (mut longest, mut record) = (0, Record::EMPTY);
        let Range { start: base, end } = self.page_len.granules(page..page + 1);
        let is_continued = self.goes_on_into(used, page);
        let mut at = match self.is_ready(page) {
            false => end,
            true if self.is_open(page) => {
                if !is_continued {
                    longest = self.run_end_behind(used, page) - base;
                    record.longest_at = base;
                    record.ties = 1;
                }
                end
            }
            true if is_continued => bitmap::next_set(&used, base..end),
            true => base,
        };
        loop {
            let start = bitmap::next_clear(&used, at..end);
            if start >= end {
                break;
            }
            at = self.run_end(used, page, start);
            let len = at - start;
            if len > longest {
                record = Record {
                    longest_at: start,
                    ties: 1,
                    runner_up: longest,
                };
                longest = len;
            } else if len == longest {
                record.ties += 1;
            } else {
                record.runner_up = record.runner_up.max(len);
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
    /// Panics unless the records are those of `runs`, all free runs in ready pages in order.
    pub(in crate::chunk) fn check(&self, runs: &[Range<u32>]) {
        self.longest.check();
        for page in 0..self.pages() {
            let is_here = |run: &&Range<u32>| self.page_len.page(run.start) == page;
            let lens = || runs.iter().filter(is_here).map(Range::len);
            let longest = lens().max().unwrap_or(0);
            let record = &self.records[page as usize];
            assert_eq!(self.longest.get(page) as usize, longest, "page {page}");
            let ties = lens().filter(|&len| len == longest).count();
            assert_eq!(record.ties as usize, ties, "page {page}");
            let runner_up = lens().filter(|&len| len < longest).max().unwrap_or(0);
            assert!(record.runner_up as usize >= runner_up, "page {page}");
            assert!(
                record.runner_up == 0 || (record.runner_up as usize) < longest,
                "page {page}"
            );
            let is_at = |run: &Range<u32>| run.start == record.longest_at;
            let at = runs.iter().find(|run| is_at(run));
            assert!(
                record.longest_at == NOWHERE || at.is_some_and(|run| run.len() == longest),
                "page {page}"
            );
        }
    }
}
