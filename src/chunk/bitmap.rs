//! Word-level searches in a bitmap of granules.
//!
//! A set bit is a granule in use. Searches work on [`Words`], bit `i` being bit `i % 64` of word `i / 64`; ranges are half
//! open. Nothing here knows of pages or chunks: callers pass the words of one page, or of a whole region.

use core::ops::Range;

/// Bits in a word.
const WORD: u32 = u64::BITS;

/// A bitmap that is read by the word.
pub(crate) trait Words {
    /// How many words there are.
    fn count(&self) -> usize;

    /// One of them.
    fn word(&self, index: usize) -> u64;
}

impl Words for [u64] {
    #[inline]
    fn count(&self) -> usize {
        self.len()
    }

    #[inline]
    fn word(&self, index: usize) -> u64 {
        self[index]
    }
}

#[cfg(test)]
impl<const N: usize> Words for [u64; N] {
    fn count(&self) -> usize {
        N
    }

    fn word(&self, index: usize) -> u64 {
        self[index]
    }
}

/// The bits `range` of a word, `range` lying in `0..=64`.
pub(crate) fn mask(range: Range<u32>) -> u64 {
    debug_assert!(range.start <= range.end && range.end <= WORD);
    if range.is_empty() {
        return 0;
    }
    (u64::MAX >> (WORD - (range.end - range.start))) << range.start
}

/// Calls `apply(word, mask)` for each word that `range` touches.
#[inline]
fn for_each_word(words: &mut [u64], range: Range<u32>, apply: impl Fn(&mut u64, u64)) {
    let mut at = range.start;
    while at < range.end {
        let word = at / WORD;
        let end = range.end.min((word + 1) * WORD);
        apply(
            &mut words[word as usize],
            mask(at % WORD..end - word * WORD),
        );
        at = end;
    }
}

/// Sets every bit of `range`.
#[inline]
pub(crate) fn set(words: &mut [u64], range: Range<u32>) {
    for_each_word(words, range, |word, mask| *word |= mask);
}

/// Clears every bit of `range`.
#[inline]
pub(crate) fn clear(words: &mut [u64], range: Range<u32>) {
    for_each_word(words, range, |word, mask| *word &= !mask);
}

/// Sets bit `at`.
#[inline]
pub(crate) fn set_bit(words: &mut [u64], at: u32) {
    words[(at / WORD) as usize] |= 1 << (at % WORD);
}

/// Clears bit `at`.
#[inline]
pub(crate) fn clear_bit(words: &mut [u64], at: u32) {
    words[(at / WORD) as usize] &= !(1 << (at % WORD));
}

/// Whether bit `at` is set.
pub(crate) fn get(words: &(impl Words + ?Sized), at: u32) -> bool {
    words.word((at / WORD) as usize) >> (at % WORD) & 1 != 0
}

/// The first index in `range` for which the word function `bits` (word index to word) has a set bit, or `range.end`.
pub(crate) fn next_where(range: Range<u32>, bits: impl Fn(usize) -> u64) -> u32 {
    if range.is_empty() {
        return range.end;
    }
    let mut word = range.start / WORD;
    let mut candidates = bits(word as usize) & (u64::MAX << (range.start % WORD));
    while candidates == 0 {
        word += 1;
        if word * WORD >= range.end {
            return range.end;
        }
        candidates = bits(word as usize);
    }
    (word * WORD + candidates.trailing_zeros()).min(range.end)
}

/// The first set bit in `range`, or `range.end`.
pub(crate) fn next_set(words: &(impl Words + ?Sized), range: Range<u32>) -> u32 {
    next_where(range, |word| words.word(word))
}

/// The first clear bit in `range`, or `range.end`.
pub(crate) fn next_clear(words: &(impl Words + ?Sized), range: Range<u32>) -> u32 {
    next_where(range, |word| !words.word(word))
}

/// The start of the run of clear bits that ends just before `range.end`: one past the last set bit of `range`, or
/// `range.start`.
pub(crate) fn run_start(words: &(impl Words + ?Sized), range: Range<u32>) -> u32 {
    start_where(range, |word| words.word(word))
}

/// The start of the run that ends just before `range.end` of bits that the word function `bits` has clear.
pub(crate) fn start_where(range: Range<u32>, bits: impl Fn(usize) -> u64) -> u32 {
    if range.is_empty() {
        return range.end;
    }
    let mut word = (range.end - 1) / WORD;
    let mut stops = bits(word as usize) & (u64::MAX >> (WORD - 1 - (range.end - 1) % WORD));
    while stops == 0 {
        if word * WORD <= range.start {
            return range.start;
        }
        word -= 1;
        stops = bits(word as usize);
    }
    (word * WORD + WORD - stops.leading_zeros()).max(range.start)
}

/// Calls `each` with the start and the length of runs of clear bits, in order, but for the last if it ends with the words:
/// returns its length, or 0. What `each` returns is a length: runs that are no longer are left out from then on.
pub(crate) fn long_runs(
    words: &(impl Words + ?Sized),
    mut each: impl FnMut(u32, u32) -> u32,
) -> u32 {
    let mut least = 0;
    // Clear bits just before the current word.
    let mut run = 0;
    for index in 0..words.count() {
        let word = words.word(index);
        let base = index as u32 * WORD;
        if word == 0 {
            run += WORD;
            continue;
        }
        let lead = word.trailing_zeros();
        if run + lead > least {
            least = each(base - run, run + lead);
        }
        run = word.leading_zeros();
        let mut inside = !word & (u64::MAX << lead) & (u64::MAX >> run);
        if !has_run(inside, least + 1) {
            continue;
        }
        while inside != 0 {
            let start = inside.trailing_zeros();
            let len = (inside >> start).trailing_ones();
            if len > least {
                least = each(base + start, len);
            }
            inside &= inside.wrapping_add(1 << start);
        }
    }
    run
}

/// Whether a word has `len` set bits in a row, at least one.
#[inline]
fn has_run(mut word: u64, len: u32) -> bool {
    if len > WORD {
        return false;
    }
    // After each step bit i says that the `have` bits from i on are set.
    let mut have = 1;
    while have < len {
        let shift = have.min(len - have);
        word &= word >> shift;
        have += shift;
    }
    word != 0
}

/// The bits `start..start + len` of `word`, and how many clear bits lie before and behind them, if the word shows the set
/// bits where these end.
#[inline]
pub(crate) fn enclosed(word: u64, start: u32, len: u32) -> Option<(u64, (u32, u32))> {
    let end = start + len;
    if end >= WORD {
        return None;
    }
    let (below, above) = (word & !(u64::MAX << start), word >> end);
    if below == 0 || above == 0 {
        return None;
    }
    let left = below.leading_zeros() - (WORD - start);
    Some((((1 << len) - 1) << start, (left, above.trailing_zeros())))
}

/// For an alignment of `align` bits (a power of two), which bits of any aligned word may start an area.
///
/// Alignments of a word and more leave bit 0; the caller then skips words.
fn start_mask(align: u32) -> u64 {
    match align {
        1 => u64::MAX,
        2 => 0x5555_5555_5555_5555,
        4 => 0x1111_1111_1111_1111,
        8 => 0x0101_0101_0101_0101,
        16 => 0x0001_0001_0001_0001,
        32 => 0x0000_0001_0000_0001,
        _ => 1,
    }
}

/// The lowest start of `len` clear bits aligned to `align` (a power of two), or `None`.
///
/// Cost: one pass over the words, whatever the number of runs in them.
pub(crate) fn find(words: &(impl Words + ?Sized), len: u32, align: u32) -> Option<u32> {
    debug_assert!(len > 0 && align.is_power_of_two());
    if len <= WORD {
        find_short(words, len, align)
    } else {
        find_long(words, len, align)
    }
}

/// [`find`] for runs that fit two neighbouring words: all 64 starts of a word are tried at once.
fn find_short(words: &(impl Words + ?Sized), len: u32, align: u32) -> Option<u32> {
    let starts = start_mask(align);
    let step = (align / WORD).max(1) as usize;
    let mut next_at = 0;
    let count = words.count();
    while next_at < count {
        let at = next_at;
        let word = words.word(at);
        next_at += step;
        if word == u64::MAX {
            continue;
        }
        // Inside the word: after each step bit i says that the `have` bits from i on are clear.
        let mut free = !word;
        let mut have = 1;
        while have < len {
            let shift = have.min(len - have);
            free &= free >> shift;
            have += shift;
        }
        let fits = free & starts;
        if fits != 0 {
            return Some(at as u32 * WORD + fits.trailing_zeros());
        }
        // Over its end, from the first start in the clear bits there.
        let tail = starts & !(u64::MAX >> word.leading_zeros());
        if tail != 0 {
            let start = tail.trailing_zeros();
            let next = match at + 1 < count {
                true => words.word(at + 1).trailing_zeros(),
                false => 0,
            };
            if WORD - start + next >= len {
                return Some(at as u32 * WORD + start);
            }
        }
    }
    None
}

/// [`find`] for runs longer than a word: every such run touches a word border, so only its ends are looked at.
fn find_long(words: &(impl Words + ?Sized), len: u32, align: u32) -> Option<u32> {
    // Clear bits just before the current word.
    let mut run = 0;
    for index in 0..words.count() {
        let word = words.word(index);
        let base = index as u32 * WORD;
        let start = (base - run).next_multiple_of(align);
        if base + word.trailing_zeros() >= start + len {
            return Some(start);
        }
        run = if word == 0 {
            run + WORD
        } else {
            word.leading_zeros()
        };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// The definition that [`find`] is held to.
    fn find_slowly(words: &[u64], len: u32, align: u32) -> Option<u32> {
        let end = words.len() as u32 * WORD;
        (0..end)
            .step_by(align as usize)
            .find(|&start| start + len <= end && (start..start + len).all(|at| !get(words, at)))
    }

    /// Words of every density from a fixed generator.
    fn samples() -> Vec<[u64; 4]> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut all = std::vec![
            [0; 4],
            [u64::MAX; 4],
            [1 << 63, 1, 0, u64::MAX],
            [u64::MAX, 0, 0, 1]
        ];
        for round in 0..400 {
            let mut words = [0; 4].map(|_: i32| next());
            match round % 5 {
                0 => {}
                1 => words = words.map(|word| word & next() & next()),
                2 => words = words.map(|word| word | next() | next()),
                3 => words = words.map(|word| if word & 1 == 0 { 0 } else { word }),
                _ => words = words.map(|word| u64::MAX << (word % 64)),
            }
            all.push(words);
        }
        all
    }

    #[test]
    fn find_agrees_with_its_definition() {
        for words in samples() {
            for len in [
                1, 2, 3, 7, 8, 31, 33, 63, 64, 65, 90, 127, 128, 129, 192, 255, 256,
            ] {
                for align in [1, 2, 4, 8, 16, 32, 64, 128, 256] {
                    assert_eq!(
                        find(&words[..], len, align),
                        find_slowly(&words, len, align),
                        "{words:x?} len {len} align {align}"
                    );
                }
            }
        }
    }

    #[test]
    fn runs_agree_with_their_definition() {
        for words in samples() {
            for at in 0..=256 {
                for from in [0, 5, 64, 100].into_iter().filter(|&from| from <= at) {
                    let mut start = at;
                    while start > from && !get(&words[..], start - 1) {
                        start -= 1;
                    }
                    assert_eq!(run_start(&words[..], from..at), start);
                }
                assert_eq!(
                    next_set(&words[..], at..256),
                    (at..256).find(|&i| get(&words[..], i)).unwrap_or(256)
                );
            }
        }
    }

    #[test]
    fn long_runs_agree_with_their_definition() {
        for words in samples() {
            for least in [0, 1, 3, 10, 63, 64, 100] {
                let mut all = std::vec![];
                let mut at = 0;
                while at < 256 {
                    let start = next_clear(&words[..], at..256);
                    at = next_set(&words[..], start..256);
                    if start < 256 {
                        all.push((start, at - start));
                    }
                }
                let last = all.pop_if(|(start, len)| *start + *len == 256);
                let mut seen = std::vec![];
                let end = long_runs(&words[..], |start, len| {
                    seen.push((start, len));
                    least
                });
                assert_eq!(end, last.map_or(0, |(_, len)| len));
                // The first is seen however long it is.
                let mut is_first = true;
                all.retain(|(_, len)| core::mem::take(&mut is_first) || *len > least);
                assert_eq!(seen, all, "{words:x?} {least}");
            }
        }
    }

    #[test]
    fn enclosing_runs_agree_with_their_definition() {
        for words in samples() {
            for start in 0..64 {
                for len in [1, 2, 7, 63, 64] {
                    let (mut below, mut above) = (start, start + len);
                    while below > 0 && !get(&words[..], below - 1) {
                        below -= 1;
                    }
                    while above < 64 && !get(&words[..], above) {
                        above += 1;
                    }
                    let mut bits = [0];
                    set(&mut bits, start..(start + len).min(64));
                    let is_shown = below > 0 && above < 64;
                    assert_eq!(
                        enclosed(words[0], start, len),
                        is_shown.then(|| (bits[0], (start - below, above - start - len))),
                        "{:x} {start} {len}",
                        words[0]
                    );
                }
            }
        }
    }

    #[test]
    fn set_and_clear_touch_their_range_only() {
        for start in [0, 1, 63, 64, 65, 130, 192] {
            for end in [start, start + 1, 64, 127, 128, 200, 256] {
                if end < start {
                    continue;
                }
                let mut words = [0; 4];
                set(&mut words, start..end);
                assert!((0..256).all(|at| get(&words[..], at) == (start..end).contains(&at)));
                let mut words = [u64::MAX; 4];
                clear(&mut words, start..end);
                assert!((0..256).all(|at| get(&words[..], at) != (start..end).contains(&at)));
            }
        }
    }
}

#[cfg(test)]
#[path = "bitmap_all_tests.rs"]
mod all_tests;
