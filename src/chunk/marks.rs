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

use super::bitmap::Words;
use super::page_len::PageLen;
use crate::metadata::{BlockLayout, MetaSlice};
use crate::sync::{AtomicU8, AtomicU64, Ordering};
use word::{
    EVERY, GRANULES, INSIDE, body, body_bit, both, ends, freed, is_freed_area, live, locate,
    occupied, parts, some, starts,
};

pub(crate) use sweeping::note;

mod sweeping;
mod word;

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
#[repr(C)]
pub(crate) struct Marks {
    words: MetaSlice<AtomicU64>,
    /// Pages with areas that start there and were freed since they were swept.
    freed_pages: MetaSlice<AtomicU64>,
    page_len: PageLen,
    /// About how many of them.
    freed: MetaSlice<AtomicU8>,
    /// A word of each page that a live area started in when that was looked for last: a hint.
    live_words: MetaSlice<AtomicU8>,
}

/// The word that a live area starts in, as it was found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen<'a> {
    word: &'a AtomicU64,
    found: u64,
}

/// [`Marks::end`] of the area that starts at granule `at` of a word, where somebody has changed the word since it was looked at.
#[cold]
#[inline(never)]
fn end_anew(word: &AtomicU64, at: u32) -> bool {
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

/// Makes the freed areas that start at some granules of a word live again, all at once; which they are.
fn reuse_heads(word: &AtomicU64, heads: u32) -> u32 {
    let mut found = word.load(Ordering::Acquire);
    loop {
        let back = freed(found) & heads;
        if back == 0 {
            return 0;
        }
        let live = found | u64::from(back);
        match word.compare_exchange(found, live, Ordering::SeqCst, Ordering::Acquire) {
            Ok(_) => return back,
            Err(now) => found = now,
        }
    }
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
        exchanged.is_ok() || end_anew(word, granule % GRANULES)
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
        // One that is longer or shorter is another, which is left alone.
        while freed(found) >> at & 1 != 0
            && ends(found) >> at >> 1 == 0
            && self.goes_on_until(granule, granule + len)
        {
            let live = found | body_bit(at);
            match word.compare_exchange(found, live, Ordering::SeqCst, Ordering::Acquire) {
                Ok(_) if self.goes_on_until(granule, granule + len) => return true,
                Ok(_) => {
                    // Its granules have become those of another area while the words behind the first were looked at.
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

    /// Whether the area that starts at `start` and reaches the end of its first word ends at `end`.
    #[inline]
    fn goes_on_until(&self, start: u32, end: u32) -> bool {
        let (last, rest) = locate(end);
        let inside = self.words.get(locate(start).0 + 1..last);
        let is_inside = |word: &AtomicU64| word.load(Ordering::Acquire) == INSIDE;
        inside.is_some_and(|words| words.iter().all(is_inside))
            && match self.words.get(last) {
                Some(word) => ends(word.load(Ordering::Acquire)).trailing_zeros() == rest,
                // The end of all.
                None => rest == 0,
            }
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

    /// Which of so many areas of `len` granules, one behind the other, are freed: bit `i` is area `i`.
    pub(super) fn freed_among(&self, start: u32, len: u32, count: u32) -> u32 {
        let freed = |word: &AtomicU64, heads| freed(word.load(Ordering::Acquire)) & heads;
        self.areas_among((start, len, count), freed)
    }

    /// Makes those of them live again; which they are.
    pub(super) fn reuse_among(&self, start: u32, len: u32, count: u32) -> u32 {
        self.areas_among((start, len, count), reuse_heads)
    }

    /// The areas among so many of `len` granules that `choose` takes of those that start in a word.
    #[inline]
    fn areas_among(
        &self,
        (start, len, count): (u32, u32, u32),
        choose: impl Fn(&AtomicU64, u32) -> u32,
    ) -> u32 {
        let mut areas = 0;
        for (word, heads, first) in self.heads_among(start, len, count) {
            let chosen = choose(word, heads);
            if chosen == 0 {
                continue;
            }
            let (mut area, mut at) = (first, heads.trailing_zeros());
            while at < GRANULES && heads >> at != 0 {
                areas |= (chosen >> at & 1) << area;
                (area, at) = (area + 1, at + len);
            }
        }
        areas
    }

    /// The words that so many areas of `len` granules start in, one behind the other, where in each, and which area is its first.
    fn heads_among(
        &self,
        start: u32,
        len: u32,
        count: u32,
    ) -> impl Iterator<Item = (&AtomicU64, u32, u32)> {
        let mut area = 0;
        core::iter::from_fn(move || {
            let (index, at) = locate(start.wrapping_add(area * len));
            let word = self.words.get(index).filter(|_| area < count)?;
            let (first, here) = (area, (GRANULES - at).div_ceil(len).min(count - area));
            area += here;
            let heads = EVERY[len.min(GRANULES) as usize] & some(0..((here - 1) * len + 1));
            Some((word, heads << at, first))
        })
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
