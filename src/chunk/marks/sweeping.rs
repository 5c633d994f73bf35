//! What has been freed and not been swept: who frees an area notes its page, who sweeps the page makes the granules of such areas
//! free.
//!
//! Invariant: a page with a freed area that nobody keeps is noted, or its area is about to be, by whoever has freed it.

use core::ops::Range;

use super::Marks;
use super::word::{GRANULES, body, both, ends, freed, live, starts};
use crate::chunk::bitmap;
use crate::sync::{AtomicU64, Ordering, full_fence};

/// Freed areas of a page that make it worth the while to sweep it.
const RIPE: u8 = 16;

/// A granule's bit in a bitmap.
#[inline]
fn place(granule: u32) -> (usize, u64) {
    ((granule / u64::BITS) as usize, 1 << (granule % u64::BITS))
}

/// Sets a bit that whoever sweeps clears before looking what there is. It is looked at after the mark was made, by a LOCKed
/// step: if it is still set then, the sweep that clears it sees the mark. Says whether it was clear.
#[inline]
pub(crate) fn note(bits: &[AtomicU64], at: u32) -> bool {
    let (word, bit) = place(at);
    full_fence();
    bits[word].load(Ordering::Relaxed) & bit == 0
        && bits[word].fetch_or(bit, Ordering::Release) & bit == 0
}

impl Marks {
    /// Counts an area that was freed and starts at `granule`; says whether sweeping its page is worth the while now.
    #[inline]
    pub(in crate::chunk) fn ripen(&self, granule: u32) -> bool {
        let page = self.page_len.page(granule);
        let counter = &self.freed[page as usize];
        let count = counter.load(Ordering::Relaxed);
        counter.store(count.saturating_add(1), Ordering::Relaxed);
        count >= RIPE || self.has_no_live_start(page)
    }

    /// Whether no live area starts in `page`.
    #[inline]
    fn has_no_live_start(&self, page: u32) -> bool {
        let words = &self.words[self.words_of(page)];
        let hint = &self.live_words[page as usize];
        let seen = words.get(usize::from(hint.load(Ordering::Relaxed)));
        let is_live = |word: &AtomicU64| live(word.load(Ordering::Relaxed)) != 0;
        if seen.is_some_and(is_live) {
            return false;
        }
        // From the end on: who frees many often does it in order, and takes the last one last.
        let found = words.iter().rposition(is_live);
        if let Some(word) = found {
            hint.store(word.min(u8::MAX.into()) as u8, Ordering::Relaxed);
        }
        found.is_none()
    }

    /// The lowest of `pages` with an area that was freed and has not been swept.
    #[inline]
    pub(in crate::chunk) fn next_freed_page(&self, pages: Range<u32>) -> Option<u32> {
        let end = pages.end;
        let page = bitmap::next_where(pages, |word| self.freed_pages[word].load(Ordering::Acquire));
        (page < end).then_some(page)
    }

    /// Whether the next sweep looks at the page of `granule`; see [`note`].
    #[inline(always)]
    pub(in crate::chunk) fn is_noted(&self, granule: u32) -> bool {
        let (word, bit) = place(self.page_len.page(granule));
        full_fence();
        let pages = self.freed_pages.get(word);
        pages.is_some_and(|pages| pages.load(Ordering::Relaxed) & bit != 0)
    }

    /// Has the page of `granule` looked at by the next sweep.
    #[inline]
    pub(in crate::chunk) fn note_page_of(&self, granule: u32) -> bool {
        note(&self.freed_pages, self.page_len.page(granule))
    }

    /// Has every page looked at by the next sweep.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(in crate::chunk) fn note_all(&self) {
        for page in 0..self.freed.len() as u32 {
            note(&self.freed_pages, page);
        }
    }

    /// Notes that `page` is about to be swept: what is freed from now on counts anew.
    pub(in crate::chunk) fn begin_sweep(&self, page: u32) {
        let (word, bit) = place(page);
        self.freed_pages[word].fetch_and(!bit, Ordering::SeqCst);
        // An exchange: the bits of the areas are read after it.
        self.freed[page as usize].swap(0, Ordering::SeqCst);
        full_fence();
    }

    /// Marks the freed areas free that start in one word, with the lock held, but for those that `kept` picks: it is told
    /// the word's first granule and which areas are to go, by where they start. `each` is told the length of every one.
    /// Returns which granules of the word they were, and where the last ends, if there are any.
    #[inline]
    pub(in crate::chunk) fn sweep_word(
        &self,
        index: usize,
        kept: impl Fn(u32, u32) -> u32,
        mut each: impl FnMut(u32),
    ) -> Option<(u32, u32)> {
        let word = &self.words[index];
        let first = index as u32 * GRANULES;
        let mut found = word.load(Ordering::Acquire);
        let (mut heads, gone) = loop {
            let freed = freed(found);
            if freed == 0 {
                return None;
            }
            let heads = freed & !kept(first, freed);
            if heads == 0 {
                return None;
            }
            // What lies inside an area follows its start: a carry from there runs through it.
            let inside = body(found) & !starts(found);
            let gone = heads | inside & !inside.wrapping_add(heads << 1 & inside);
            let cleared = found & !both(gone);
            match word.compare_exchange(found, cleared, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break (heads, gone),
                // Somebody frees an area, or makes one live.
                Err(now) => found = now,
            }
        };
        let ends = ends(found);
        loop {
            let at = heads.trailing_zeros();
            heads &= heads - 1;
            let behind = ends >> at >> 1;
            if behind != 0 {
                let len = 1 + behind.trailing_zeros();
                each(len);
                if heads == 0 {
                    return Some((gone, first + at + len));
                }
            } else {
                let end = self.end_behind(first + at);
                each(end - (first + at));
                self.clear_behind(first + at, end);
                return Some((gone, end));
            }
        }
    }

    /// The words of `page`.
    pub(in crate::chunk) fn words_of(&self, page: u32) -> Range<usize> {
        let pairs = self.page_len.words(page..page + 1);
        2 * pairs.start..2 * pairs.end
    }

    /// The first of some words that a freed area starts in.
    #[inline]
    pub(in crate::chunk) fn next_freed_word(&self, words: Range<usize>) -> Option<usize> {
        let has_freed = |word: &AtomicU64| freed(word.load(Ordering::Acquire)) != 0;
        let first = words.start;
        Some(first + self.words[words].iter().position(has_freed)?)
    }
}
