//! Two bits per granule, which say what it is: free, inside an area, the start of a live area, or the start of one that has
//! been freed and not been swept yet.
//!
//! | `body` | `start` | the granule |
//! |---|---|---|
//! | 0 | 0 | is free |
//! | 1 | 0 | lies inside an area, live or freed |
//! | 1 | 1 | starts a live area |
//! | 0 | 1 | starts a freed area, which keeps its granules until it is swept |
//!
//! Freeing an area is to clear one bit, `body` of its first granule, by a LOCKed step: any CPU may do it, without the
//! allocator's lock, and of two that free the same area one finds the bit clear. (That an area starts there is asked before. A
//! wrong free that is held up in between, while others free the area and take what was there, is out of reach.) Nothing else is ever done to the bits
//! without the lock. So whether a granule is occupied (`body` or `start`), and where areas end, stays as it is while
//! somebody holds the lock: all that is known of free runs is known of these.
//!
//! Beside them stands which pages have areas to be swept, and about how many (CPUs that count at the same time may count
//! one for two).

use core::ops::Range;
use core::ptr::NonNull;

use super::bitmap::{self, Words};
use super::page_len::PageLen;
use crate::metadata::{BlockLayout, MetaSlice};
use crate::sync::{AtomicU8, AtomicU64, Ordering, full_fence};

/// What must be laid out in metadata memory for the marks of a region; see [`Marks::new`].
#[derive(Debug, Clone, Copy)]
pub(super) struct MarksLayout {
    pages: u32,
    page_len: PageLen,
    body_at: usize,
    start_at: usize,
    freed_at: usize,
    freed_pages_at: usize,
}

impl MarksLayout {
    pub(super) fn add(
        block: &mut BlockLayout,
        pages: u32,
        page_len: PageLen,
    ) -> Result<Self, core::alloc::LayoutError> {
        let words = page_len.words(0..pages).len();
        Ok(Self {
            pages,
            page_len,
            body_at: block.array::<AtomicU64>(words)?,
            start_at: block.array::<AtomicU64>(words)?,
            freed_at: block.array::<AtomicU8>(pages as usize)?,
            freed_pages_at: block.array::<AtomicU64>(pages.div_ceil(u64::BITS) as usize)?,
        })
    }
}

/// The marks of a region.
#[derive(Debug)]
pub(crate) struct Marks {
    body: MetaSlice<AtomicU64>,
    start: MetaSlice<AtomicU64>,
    /// About how many areas that start in a page were freed since it was swept.
    freed: MetaSlice<AtomicU8>,
    /// Pages with any of these.
    freed_pages: MetaSlice<AtomicU64>,
    page_len: PageLen,
}

/// What the freeing of an area has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Freed {
    /// Sweeping its page is worth the while.
    Ripe,
    /// It can wait.
    Unripe,
}

/// Sets a bit that whoever sweeps clears before looking what there is. It is looked at after the mark was made, by a LOCKed
/// step: if it is still set then, the sweep that clears it sees the mark.
#[inline]
pub(crate) fn note(bits: &[AtomicU64], at: u32) {
    let (word, bit) = place(at);
    full_fence();
    if bits[word].load(Ordering::Relaxed) & bit == 0 {
        bits[word].fetch_or(bit, Ordering::Release);
    }
}

/// Freed areas of a page that make it worth the while to sweep it.
const RIPE: u8 = 16;

/// Which granules are occupied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Occupied<'a> {
    body: &'a [AtomicU64],
    start: &'a [AtomicU64],
}

impl Occupied<'_> {
    /// Those of some words.
    #[inline]
    pub(super) fn words(self, range: Range<usize>) -> Self {
        Self {
            body: &self.body[range.clone()],
            start: &self.start[range],
        }
    }

    /// Whether all granules of some words are free.
    pub(super) fn is_clear(self, range: Range<usize>) -> bool {
        let words = self.words(range);
        (0..words.count()).all(|index| words.word(index) == 0)
    }
}

impl Words for Occupied<'_> {
    #[inline]
    fn count(&self) -> usize {
        self.body.len()
    }

    #[inline]
    fn word(&self, index: usize) -> u64 {
        self.body[index].load(Ordering::Relaxed) | self.start[index].load(Ordering::Relaxed)
    }
}

/// A granule's word, and its bit there.
#[inline]
fn place(granule: u32) -> (usize, u64) {
    ((granule / u64::BITS) as usize, 1 << (granule % u64::BITS))
}

impl Marks {
    /// Marks of a region whose granules are all free.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, and nothing else uses this part of it while
    /// the result lives.
    pub(super) unsafe fn new(block: NonNull<u8>, layout: &MarksLayout) -> Self {
        let words = layout.page_len.words(0..layout.pages).len();
        let pages = layout.pages as usize;
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        unsafe {
            Self {
                body: MetaSlice::filled(block, layout.body_at, words, || AtomicU64::new(0)),
                start: MetaSlice::filled(block, layout.start_at, words, || AtomicU64::new(0)),
                freed: MetaSlice::filled(block, layout.freed_at, pages, || AtomicU8::new(0)),
                freed_pages: MetaSlice::filled(
                    block,
                    layout.freed_pages_at,
                    pages.div_ceil(u64::BITS as usize),
                    || AtomicU64::new(0),
                ),
                page_len: layout.page_len,
            }
        }
    }

    /// The same marks once more: for those who free without the lock.
    ///
    /// # Safety
    /// The memory of the marks stays for as long as the result.
    pub(super) unsafe fn view(&self) -> Self {
        // SAFETY: the arrays are there (promise of the caller), and consist of atomic values.
        unsafe {
            Self {
                body: MetaSlice::view(self.body.as_ptr(), self.body.len()),
                start: MetaSlice::view(self.start.as_ptr(), self.start.len()),
                freed: MetaSlice::view(self.freed.as_ptr(), self.freed.len()),
                freed_pages: MetaSlice::view(self.freed_pages.as_ptr(), self.freed_pages.len()),
                page_len: self.page_len,
            }
        }
    }

    /// Marks the live area that starts at `granule` as freed, without the lock; returns whether it was there. Its granules
    /// are to be made free by the caller then.
    #[inline]
    pub(super) fn end(&self, granule: u32) -> bool {
        let (word, bit) = place(granule);
        let starts = self.start.get(word);
        starts.is_some_and(|starts| starts.load(Ordering::Relaxed) & bit != 0)
            && self.clear_body(word, bit) & bit != 0
    }

    /// Frees the live area that starts at `granule`, without the lock; `None` if there is none.
    ///
    /// The memory is somebody else's once the page has been swept, which the holder of the lock may do at once.
    #[inline]
    pub(crate) fn free(&self, granule: u32) -> Option<Freed> {
        let (word, bit) = place(granule);
        let start = self.start.get(word)?.load(Ordering::Relaxed);
        if start & bit == 0 {
            return None;
        }
        let body = self.clear_body(word, bit);
        if body & bit == 0 {
            return None;
        }
        let page = self.page_len.page(granule);
        let counter = &self.freed[page as usize];
        let count = counter.load(Ordering::Relaxed);
        counter.store(count.saturating_add(1), Ordering::Relaxed);
        note(&self.freed_pages, page);
        let live = start & body & !bit;
        let is_ripe = count >= RIPE || (live == 0 && self.has_no_live_start(page, word));
        Some(if is_ripe { Freed::Ripe } else { Freed::Unripe })
    }

    /// What stood in the word before. Whoever frees has done with the memory, whoever sweeps may hand it out.
    #[inline]
    fn clear_body(&self, word: usize, bit: u64) -> u64 {
        self.body[word].fetch_and(!bit, Ordering::SeqCst)
    }

    /// Whether no live area starts in `page`. Looks at the words behind `word` first: who frees many often does it in order.
    fn has_no_live_start(&self, page: u32, word: usize) -> bool {
        let words = self.page_len.words(page..page + 1);
        let is_live = |word| self.live_starts(word) != 0;
        !(word + 1..words.end).any(is_live) && !(words.start..word).any(is_live)
    }

    /// The lowest of `pages` with an area that was freed and has not been swept.
    #[inline]
    pub(super) fn next_freed_page(&self, pages: Range<u32>) -> Option<u32> {
        let end = pages.end;
        let page = bitmap::next_where(pages, |word| self.freed_pages[word].load(Ordering::Acquire));
        (page < end).then_some(page)
    }

    /// Has the page of `granule` looked at by the next sweep.
    pub(super) fn note_page_of(&self, granule: u32) {
        note(&self.freed_pages, self.page_len.page(granule));
    }

    /// Makes a freed area live again.
    pub(super) fn revive(&self, start: u32) {
        let (word, bit) = place(start);
        self.body[word].fetch_or(bit, Ordering::AcqRel);
    }

    /// Has every page looked at by the next sweep.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(super) fn note_all(&self) {
        (0..self.freed.len() as u32).for_each(|page| note(&self.freed_pages, page));
    }

    /// Notes that `page` is about to be swept: what is freed from now on counts anew.
    pub(super) fn begin_sweep(&self, page: u32) {
        let (word, bit) = place(page);
        self.freed_pages[word].fetch_and(!bit, Ordering::SeqCst);
        // An exchange: the bits of the areas are read after it.
        self.freed[page as usize].swap(0, Ordering::SeqCst);
        full_fence();
    }

    /// Which granules are occupied.
    #[inline]
    pub(super) fn occupied(&self) -> Occupied<'_> {
        Occupied {
            body: &self.body,
            start: &self.start,
        }
    }

    /// What stands at `granule`: (body, start).
    #[inline]
    pub(super) fn at(&self, granule: u32) -> (bool, bool) {
        let (word, bit) = place(granule);
        let [body, start] =
            [&self.body, &self.start].map(|marks| marks[word].load(Ordering::Relaxed));
        (body & bit != 0, start & bit != 0)
    }

    /// Marks free granules as used by nobody, for ever: no area starts there.
    pub(super) fn block(&self, granules: Range<u32>) {
        self.set_body(granules);
    }

    /// Puts an end to the areas before `granule`, a blocked one.
    pub(super) fn end_areas_at(&self, granule: u32) {
        self.set_start(granule);
    }

    /// Marks free granules as one area.
    #[inline]
    pub(super) fn take(&self, area: Range<u32>) {
        let start = area.start;
        self.set_body(area);
        self.set_start(start);
    }

    /// Marks free granules, all in one word with the bits `bits`, as one area that starts at the lowest.
    #[inline]
    pub(super) fn take_in_word(&self, word: usize, bits: u64) {
        self.body[word].fetch_or(bits, Ordering::Relaxed);
        self.add_starts(word, bits & bits.wrapping_neg());
    }

    /// Marks free granules as areas of `len` granules each.
    pub(super) fn take_all(&self, areas: Range<u32>, len: u32) {
        let mut at = areas.start;
        let end = areas.end;
        self.set_body(areas);
        while at < end {
            let (word, _) = place(at);
            let mut bits = 0;
            while at < end && place(at).0 == word {
                bits |= place(at).1;
                at += len;
            }
            self.add_starts(word, bits);
        }
    }

    /// Marks areas free, of which none is live: whoever calls has freed them.
    #[inline]
    pub(super) fn clear(&self, areas: Range<u32>) {
        let mut at = areas.start;
        while at < areas.end {
            let (word, _) = place(at);
            let first = word as u32 * u64::BITS;
            let end = areas.end.min(first + u64::BITS);
            let bits = bitmap::mask(at - first..end - first);
            self.body[word].fetch_and(!bits, Ordering::Relaxed);
            self.remove_starts(word, bits);
            at = end;
        }
    }

    /// The end of the area that starts at `start`, live or freed.
    #[inline]
    pub(super) fn area_end(&self, start: u32) -> u32 {
        let (word, bit) = (start / u64::BITS, start % u64::BITS);
        match self.ends(word as usize) >> bit >> 1 {
            0 => self.area_end_behind(start),
            ends => start + 1 + ends.trailing_zeros(),
        }
    }

    /// [`area_end`](Self::area_end) of an area that reaches the end of its first word.
    pub(super) fn area_end_behind(&self, start: u32) -> u32 {
        let end = self.body.len() as u32 * u64::BITS;
        bitmap::next_where(start + 1..end, |word| self.ends(word))
    }

    /// Where areas start, live and freed ones.
    pub(super) fn starts(&self, word: usize) -> u64 {
        self.start[word].load(Ordering::Relaxed)
    }

    /// Where live areas start.
    pub(super) fn live_starts(&self, word: usize) -> u64 {
        self.start[word].load(Ordering::Relaxed) & self.body[word].load(Ordering::Acquire)
    }

    /// Where freed areas start that have not been swept.
    #[inline]
    pub(super) fn freed_starts(&self, word: usize) -> u64 {
        self.start[word].load(Ordering::Relaxed) & !self.body[word].load(Ordering::Acquire)
    }

    /// Granules that an area which goes on until there ends at.
    #[inline]
    fn ends(&self, word: usize) -> u64 {
        self.start[word].load(Ordering::Relaxed) | !self.body[word].load(Ordering::Relaxed)
    }

    #[inline]
    fn set_body(&self, granules: Range<u32>) {
        let mut at = granules.start;
        while at < granules.end {
            let (word, _) = place(at);
            let first = word as u32 * u64::BITS;
            let end = granules.end.min(first + u64::BITS);
            let bits = bitmap::mask(at - first..end - first);
            self.body[word].fetch_or(bits, Ordering::Relaxed);
            at = end;
        }
    }

    fn set_start(&self, granule: u32) {
        let (word, bit) = place(granule);
        self.add_starts(word, bit);
    }

    /// Only the holder of the lock writes starts. They are published by whoever hands the area out.
    #[inline]
    fn add_starts(&self, word: usize, bits: u64) {
        let starts = self.starts(word) | bits;
        self.start[word].store(starts, Ordering::Relaxed);
    }

    #[inline]
    fn remove_starts(&self, word: usize, bits: u64) {
        let starts = self.starts(word) & !bits;
        self.start[word].store(starts, Ordering::Relaxed);
    }
}
