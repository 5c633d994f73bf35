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
//! Both bits of 32 granules stand in one word, so that one LOCKed step changes all that a granule is, and finds out what it
//! was. Freeing an area is such a step, and so is making a freed one live again: any CPU may do either, without the
//! allocator's lock, and of two that want the same area one gets it. All else is done with the lock held.
//!
//! Whoever looks without the lock sees no area longer or shorter than it is: of an area that lies in several words, the word
//! in which it starts is written last when it is taken, and first when its granules become free. So whether a granule is
//! occupied (`body` or `start`), and where areas end, stays as it is while somebody holds the lock: all that is known of
//! free runs is known of these.
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
    words_at: usize,
    freed_at: usize,
    live_words_at: usize,
    freed_pages_at: usize,
}

impl MarksLayout {
    pub(super) fn add(
        block: &mut BlockLayout,
        pages: u32,
        page_len: PageLen,
    ) -> Result<Self, core::alloc::LayoutError> {
        let words = 2 * page_len.words(0..pages).len();
        Ok(Self {
            pages,
            page_len,
            words_at: block.array::<AtomicU64>(words)?,
            freed_at: block.array::<AtomicU8>(pages as usize)?,
            live_words_at: block.array::<AtomicU8>(pages as usize)?,
            freed_pages_at: block.array::<AtomicU64>(pages.div_ceil(u64::BITS) as usize)?,
        })
    }
}

/// The marks of a region.
#[derive(Debug)]
pub(crate) struct Marks {
    words: MetaSlice<AtomicU64>,
    /// About how many areas that start in a page were freed since it was swept.
    freed: MetaSlice<AtomicU8>,
    /// A word of each page that a live area started in when that was looked for last: a hint.
    live_words: MetaSlice<AtomicU8>,
    /// Pages with any of these.
    freed_pages: MetaSlice<AtomicU64>,
    page_len: PageLen,
}

/// The word that a live area starts in, as it was found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen<'a> {
    word: &'a AtomicU64,
    found: u64,
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

/// Freed areas of a page that make it worth the while to sweep it.
const RIPE: u8 = 16;

/// Granules of a word.
const GRANULES: u32 = 32;

/// For each length, the granules of a half that areas of it start at, the first of which starts at the first granule.
static EVERY: [u32; GRANULES as usize + 1] = {
    let mut table = [0; GRANULES as usize + 1];
    let mut len = 1;
    while len < table.len() {
        let mut at = 0;
        while at < GRANULES as usize {
            table[len] |= 1 << at;
            at += len;
        }
        len += 1;
    }
    table
};

/// A granule's word, and which of its granules it is.
#[inline]
fn locate(granule: u32) -> (usize, u32) {
    ((granule / GRANULES) as usize, granule % GRANULES)
}

/// A word with nothing but the inside of an area.
const INSIDE: u64 = u32::MAX as u64;

/// In a word: what `body` says of a granule.
#[inline]
fn body_bit(at: u32) -> u64 {
    1 << at
}

/// In a word: all that the granules of a half are.
#[inline]
fn both(granules: u32) -> u64 {
    u64::from(granules) << GRANULES | u64::from(granules)
}

/// Some granules of a half.
#[inline]
fn some(granules: Range<u32>) -> u32 {
    bitmap::mask(granules) as u32
}

#[inline]
fn body(word: u64) -> u32 {
    word as u32
}

#[inline]
fn starts(word: u64) -> u32 {
    (word >> GRANULES) as u32
}

/// Granules that are not free.
#[inline]
fn occupied(word: u64) -> u32 {
    body(word) | starts(word)
}

/// Where live areas start.
#[inline]
fn live(word: u64) -> u32 {
    starts(word) & body(word)
}

/// Where freed areas start.
#[inline]
fn freed(word: u64) -> u32 {
    starts(word) & !body(word)
}

/// Granules that an area which goes on until there ends at.
#[inline]
fn ends(word: u64) -> u32 {
    starts(word) | !body(word)
}

/// Whether a freed area of `len` granules starts at granule `at` of a word, and ends within it: all of that is what an exchange
/// of the word compares.
#[inline]
fn is_freed_area(word: u64, at: u32, len: u32) -> bool {
    freed(word) >> at & 1 != 0 && (ends(word) >> at >> 1).trailing_zeros() + 1 == len
}

/// [`Marks::reuse`] of such an area where somebody has changed the word since it was looked at.
#[cold]
#[inline(never)]
fn reuse_anew(word: &AtomicU64, at: u32, len: u32) -> bool {
    let mut found = word.load(Ordering::Acquire);
    while is_freed_area(found, at, len) {
        let live = found | body_bit(at);
        match word.compare_exchange(found, live, Ordering::SeqCst, Ordering::Acquire) {
            Ok(_) => return true,
            Err(now) => found = now,
        }
    }
    false
}

/// What two words say of 64 granules.
#[inline]
fn joined(words: &[AtomicU64], index: usize, what: impl Fn(u64) -> u32) -> u64 {
    let [low, high] =
        [2 * index, 2 * index + 1].map(|at| u64::from(what(words[at].load(Ordering::Acquire))));
    high << GRANULES | low
}

/// Which granules are occupied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Occupied<'a> {
    words: &'a [AtomicU64],
}

impl Occupied<'_> {
    /// Those of some words, of 64 granules each.
    #[inline]
    pub(super) fn words(self, range: Range<usize>) -> Self {
        Self {
            words: &self.words[2 * range.start..2 * range.end],
        }
    }

    /// From the first occupied granule of some words to the last, counted from the first of all, and whether all in between
    /// are; `None` if none is.
    pub(super) fn stretch(self, range: Range<usize>) -> Option<(Range<u32>, bool)> {
        let words = self.words(range).words;
        let is_used = |word: &AtomicU64| word.load(Ordering::Relaxed) != 0;
        let first = words.iter().position(is_used)?;
        let last = words.iter().rposition(is_used)?;
        let [head, tail] = [first, last].map(|at| occupied(words[at].load(Ordering::Relaxed)));
        let start = first as u32 * GRANULES + head.trailing_zeros();
        let end = (last as u32 + 1) * GRANULES - tail.leading_zeros();
        // Up to the end of its first word, and from the beginning of its last.
        let filled = head | (head - 1);
        let is_whole = match first == last {
            true => filled & filled.wrapping_add(1) == 0,
            false => {
                let is_full = |word: &AtomicU64| occupied(word.load(Ordering::Relaxed)) == u32::MAX;
                filled == u32::MAX
                    && tail & tail.wrapping_add(1) == 0
                    && words[first + 1..last].iter().all(is_full)
            }
        };
        Some((start..end, is_whole))
    }

    /// Whether all granules of some words are free.
    pub(super) fn is_clear(self, range: Range<usize>) -> bool {
        let words = self.words(range).words;
        words.iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }
}

impl Words for Occupied<'_> {
    #[inline]
    fn count(&self) -> usize {
        self.words.len() / 2
    }

    #[inline]
    fn word(&self, index: usize) -> u64 {
        joined(self.words, index, occupied)
    }
}

/// A granule's bit in a bitmap.
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
        let words = 2 * layout.page_len.words(0..layout.pages).len();
        let pages = layout.pages as usize;
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        unsafe {
            Self {
                words: MetaSlice::filled(block, layout.words_at, words, || AtomicU64::new(0)),
                freed: MetaSlice::filled(block, layout.freed_at, pages, || AtomicU8::new(0)),
                live_words: MetaSlice::filled(block, layout.live_words_at, pages, || {
                    AtomicU8::new(0)
                }),
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
                words: MetaSlice::view(self.words.as_ptr(), self.words.len()),
                freed: MetaSlice::view(self.freed.as_ptr(), self.freed.len()),
                live_words: MetaSlice::view(self.live_words.as_ptr(), self.live_words.len()),
                freed_pages: MetaSlice::view(self.freed_pages.as_ptr(), self.freed_pages.len()),
                page_len: self.page_len,
            }
        }
    }

    /// The length of the live area that starts at `granule`, if there is one: it stays what it is for as long as that is live.
    #[inline]
    pub(super) fn live_len(&self, granule: u32) -> Option<(u32, Seen<'_>)> {
        let (index, at) = locate(granule);
        let word = self.words.get(index)?;
        let found = word.load(Ordering::Acquire);
        (live(found) >> at & 1 != 0).then(|| {
            let len = match ends(found) >> at >> 1 {
                0 => self.end_behind(granule) - granule,
                ends => 1 + ends.trailing_zeros(),
            };
            (len, Seen { word, found })
        })
    }

    /// [`end`](Self::end) for the area that `seen` was found with.
    #[inline]
    pub(super) fn end_seen(&self, granule: u32, seen: &Seen<'_>) -> bool {
        let Seen { word, found } = *seen;
        let ended = found & !body_bit(granule % GRANULES);
        // Whoever frees has done with the memory, whoever makes use of the granules may hand it out.
        let exchanged = word.compare_exchange(found, ended, Ordering::SeqCst, Ordering::Relaxed);
        exchanged.is_ok() || self.end_anew(granule)
    }

    /// Marks the live area that starts at `granule` as freed, without the lock; false if there is none.
    ///
    /// The memory is somebody else's at once. Whoever calls says afterwards that there is something to sweep.
    #[inline]
    pub(super) fn end(&self, granule: u32) -> bool {
        let (index, at) = locate(granule);
        let Some(word) = self.words.get(index) else {
            return false;
        };
        let found = word.load(Ordering::Acquire);
        live(found) >> at & 1 != 0 && self.end_seen(granule, &Seen { word, found })
    }

    /// [`end`](Self::end) where somebody has changed the word since it was looked at.
    #[cold]
    #[inline(never)]
    fn end_anew(&self, granule: u32) -> bool {
        let (index, at) = locate(granule);
        let word = &self.words[index];
        let mut found = word.load(Ordering::Acquire);
        while live(found) >> at & 1 != 0 {
            let ended = found & !body_bit(at);
            match word.compare_exchange(found, ended, Ordering::SeqCst, Ordering::Acquire) {
                Ok(_) => return true,
                Err(now) => found = now,
            }
        }
        false
    }

    /// Counts an area that was freed and starts at `granule`; says whether sweeping its page is worth the while now.
    #[inline]
    pub(super) fn ripen(&self, granule: u32) -> bool {
        let page = self.page_len.page(granule);
        let counter = &self.freed[page as usize];
        let count = counter.load(Ordering::Relaxed);
        counter.store(count.saturating_add(1), Ordering::Relaxed);
        count >= RIPE || self.has_no_live_start(page)
    }

    /// Makes the freed area that starts at `granule` live again, without the lock; false if there is none of that length, and then
    /// there may be something to sweep.
    #[inline]
    pub(super) fn reuse(&self, granule: u32, len: u32) -> bool {
        let (index, at) = locate(granule);
        let Some(word) = self.words.get(index) else {
            return false;
        };
        if at + len >= GRANULES {
            return self.reuse_long(word, granule, len);
        }
        let found = word.load(Ordering::Acquire);
        is_freed_area(found, at, len) && {
            let live = found | body_bit(at);
            let exchanged = word.compare_exchange(found, live, Ordering::SeqCst, Ordering::Relaxed);
            exchanged.is_ok() || reuse_anew(word, at, len)
        }
    }

    /// [`reuse`](Self::reuse) of an area that reaches the end of its first word.
    #[inline(never)]
    fn reuse_long(&self, word: &AtomicU64, granule: u32, len: u32) -> bool {
        let (_, at) = locate(granule);
        let mut found = word.load(Ordering::Acquire);
        // One that ends within the word is another.
        while freed(found) >> at & 1 != 0 && ends(found) >> at >> 1 == 0 {
            let live = found | body_bit(at);
            match word.compare_exchange(found, live, Ordering::SeqCst, Ordering::Acquire) {
                Ok(_) if self.end_behind(granule) == granule + len => return true,
                Ok(_) => {
                    // So is one that is longer or shorter.
                    if self.end(granule) {
                        self.note_page_of(granule);
                    }
                    return false;
                }
                Err(now) => found = now,
            }
        }
        false
    }

    /// Where the area that starts at `start` ends, whose word is `word`.
    #[inline]
    fn end_in(&self, word: u64, start: u32) -> u32 {
        match ends(word) >> (start % GRANULES) >> 1 {
            0 => self.end_behind(start),
            ends => start + 1 + ends.trailing_zeros(),
        }
    }

    /// Where the area that starts at `start` ends, which reaches the end of its first word.
    #[inline(never)]
    fn end_behind(&self, start: u32) -> u32 {
        let first = locate(start).0 + 1;
        let (mut behind, mut found) = (0, INSIDE);
        for word in self.words.get(first..).unwrap_or_default() {
            found = word.load(Ordering::Acquire);
            if found != INSIDE {
                break;
            }
            behind += 1;
        }
        // In the last word looked at, if an area goes on through all of the others.
        let at = match found {
            INSIDE => 0,
            _ => ends(found).trailing_zeros(),
        };
        (first as u32 + behind) * GRANULES + at
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
    pub(super) fn next_freed_page(&self, pages: Range<u32>) -> Option<u32> {
        let end = pages.end;
        let page = bitmap::next_where(pages, |word| self.freed_pages[word].load(Ordering::Acquire));
        (page < end).then_some(page)
    }

    /// Whether the next sweep looks at the page of `granule`; see [`note`].
    #[inline(always)]
    pub(super) fn is_noted(&self, granule: u32) -> bool {
        let (word, bit) = place(self.page_len.page(granule));
        full_fence();
        let pages = self.freed_pages.get(word);
        pages.is_some_and(|pages| pages.load(Ordering::Relaxed) & bit != 0)
    }

    /// Has the page of `granule` looked at by the next sweep.
    #[inline]
    pub(super) fn note_page_of(&self, granule: u32) -> bool {
        note(&self.freed_pages, self.page_len.page(granule))
    }

    /// Has every page looked at by the next sweep.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(super) fn note_all(&self) {
        for page in 0..self.freed.len() as u32 {
            note(&self.freed_pages, page);
        }
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
        Occupied { words: &self.words }
    }

    /// What stands at `granule`: (body, start).
    #[inline]
    pub(super) fn at(&self, granule: u32) -> (bool, bool) {
        let (index, at) = locate(granule);
        let word = self.words[index].load(Ordering::Acquire);
        (body(word) >> at & 1 != 0, starts(word) >> at & 1 != 0)
    }

    /// Marks free granules as used by nobody, for ever: no area starts there.
    pub(super) fn block(&self, granules: Range<u32>) {
        for (index, here) in parts(granules) {
            self.add(index, here.into());
        }
    }

    /// Puts an end to the areas before `granule`, a blocked one.
    pub(super) fn end_areas_at(&self, granule: u32) {
        let (index, at) = locate(granule);
        self.add(index, body_bit(at) << GRANULES);
    }

    /// Marks free granules as areas of `len` granules each, the words from the last to the first.
    #[inline]
    pub(super) fn take_all(&self, areas: Range<u32>, len: u32) {
        for (index, here) in parts(areas.clone()).rev() {
            let first = index as u32 * GRANULES;
            // The first area that starts in the word.
            let start = match first.checked_sub(areas.start) {
                None => areas.start - first,
                Some(from_start) => from_start.next_multiple_of(len) - from_start,
            };
            let heads = EVERY[len.min(GRANULES) as usize].checked_shl(start);
            let heads = heads.unwrap_or(0) & here;
            self.add(index, u64::from(heads) << GRANULES | u64::from(here));
        }
    }

    /// Marks free granules as one area.
    #[inline]
    pub(super) fn take(&self, area: Range<u32>) {
        let (index, at) = locate(area.start);
        let end = at + (area.end - area.start);
        if end > GRANULES {
            self.take_behind(index + 1, area.end);
        }
        let here = some(at..end.min(GRANULES));
        self.add(index, u64::from(here) | body_bit(at) << GRANULES);
    }

    /// Marks what an area that ends at `end` has in the words from `index` on.
    #[inline(never)]
    fn take_behind(&self, index: usize, end: u32) {
        let (last, rest) = locate(end);
        if rest > 0 {
            self.add(last, some(0..rest).into());
        }
        // The area's alone: nobody else writes there.
        for word in &self.words[index..last] {
            word.store(u32::MAX.into(), Ordering::Release);
        }
    }

    #[inline]
    fn add(&self, index: usize, bits: u64) {
        self.words[index].fetch_or(bits, Ordering::Release);
    }

    /// Marks the live area that starts at `start` free, with the lock held; the end of it, or `None` if there is none.
    #[inline]
    pub(super) fn remove(&self, start: u32) -> Option<u32> {
        let (index, at) = locate(start);
        let word = self.words.get(index)?;
        let mut found = word.load(Ordering::Acquire);
        loop {
            if live(found) >> at & 1 == 0 {
                return None;
            }
            let end = self.end_in(found, start);
            let here = some(at..(at + (end - start)).min(GRANULES));
            match word.compare_exchange(
                found,
                found & !both(here),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => {
                    self.clear_behind(start, end);
                    return Some(end);
                }
                Err(now) => found = now,
            }
        }
    }

    /// Marks areas free that lie one behind the other, with the lock held; returns how many of them were not live.
    pub(super) fn clear(&self, areas: Range<u32>) -> u32 {
        let mut wrong = 0;
        for (index, here) in parts(areas) {
            let bits = both(here);
            let was = self.words[index].fetch_and(!bits, Ordering::AcqRel);
            wrong += freed(was & bits).count_ones();
        }
        wrong
    }

    /// Marks the freed areas free that start in one word, with the lock held, but for those that `kept` picks: it is told
    /// the word's first granule and which areas are to go, by where they start. `each` is told the length of every one.
    /// Returns which granules of the word they were, and where the last ends, if there are any.
    #[inline]
    pub(super) fn sweep_word(
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

    /// Which of so many areas of `len` granules, one behind the other, are freed: bit `i` is area `i`.
    #[inline]
    pub(super) fn freed_among(&self, start: u32, len: u32, count: u32) -> u32 {
        let (mut index, mut here, mut found) = (usize::MAX, 0, 0);
        for area in 0..count {
            let (word, at) = locate(start + area * len);
            if word != index {
                index = word;
                here = freed(self.words[word].load(Ordering::Acquire));
            }
            found |= (here >> at & 1) << area;
        }
        found
    }

    /// The words of `page`.
    pub(super) fn words_of(&self, page: u32) -> Range<usize> {
        let pairs = self.page_len.words(page..page + 1);
        2 * pairs.start..2 * pairs.end
    }

    /// The first of some words that a freed area starts in.
    #[inline]
    pub(super) fn next_freed_word(&self, words: Range<usize>) -> Option<usize> {
        let has_freed = |word: &AtomicU64| freed(word.load(Ordering::Acquire)) != 0;
        let first = words.start;
        Some(first + self.words[words].iter().position(has_freed)?)
    }

    /// Marks what an area has in the words behind its first as free, which is free there already.
    #[inline]
    fn clear_behind(&self, start: u32, end: u32) {
        let index = locate(start).0 + 1;
        if end > index as u32 * GRANULES {
            self.clear_from(index, end);
        }
    }

    #[inline(never)]
    fn clear_from(&self, index: usize, end: u32) {
        let (last, rest) = locate(end);
        // The area's alone: nobody else writes there.
        for word in &self.words[index..last] {
            word.store(0, Ordering::Release);
        }
        if rest > 0 {
            self.words[last].fetch_and(!both(some(0..rest)), Ordering::AcqRel);
        }
    }

    /// The end of the area that starts at `start`, live or freed.
    #[inline]
    pub(super) fn area_end(&self, start: u32) -> u32 {
        let word = self.words[locate(start).0].load(Ordering::Acquire);
        self.end_in(word, start)
    }

    /// Where areas start, live and freed ones, in 64 granules.
    pub(super) fn starts(&self, index: usize) -> u64 {
        joined(&self.words, index, starts)
    }

    /// Where live areas start, in 64 granules.
    pub(super) fn live_starts(&self, index: usize) -> u64 {
        joined(&self.words, index, live)
    }
}

/// The words that granules lie in, each with which of its granules they are.
#[inline]
fn parts(granules: Range<u32>) -> impl DoubleEndedIterator<Item = (usize, u32)> {
    let Range { start, end } = granules;
    let words = match start < end {
        true => start / GRANULES..(end - 1) / GRANULES + 1,
        false => 0..0,
    };
    let (first, behind) = (words.start, words.end);
    words.map(move |word| {
        let mut here = u32::MAX;
        if word == first {
            here <<= start % GRANULES;
        }
        if word + 1 == behind {
            here &= u32::MAX >> (GRANULES - 1 - (end - 1) % GRANULES);
        }
        (word as usize, here)
    })
}
