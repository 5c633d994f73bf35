//! What one word says of 32 granules.

use core::ops::Range;

use crate::chunk::bitmap;

/// Granules of a word.
pub(super) const GRANULES: u32 = 32;

/// For each length, the granules of a half that areas of it start at, the first of which starts at the first granule.
pub(super) static EVERY: [u32; GRANULES as usize + 1] = {
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
pub(super) fn locate(granule: u32) -> (usize, u32) {
    ((granule / GRANULES) as usize, granule % GRANULES)
}

/// A word with nothing but the inside of an area.
pub(super) const INSIDE: u64 = u32::MAX as u64;

/// In a word: what `body` says of a granule.
#[inline]
pub(super) fn body_bit(at: u32) -> u64 {
    1 << at
}

/// In a word: all that the granules of a half are.
#[inline]
pub(super) fn both(granules: u32) -> u64 {
    u64::from(granules) << GRANULES | u64::from(granules)
}

/// Some granules of a half.
#[inline]
pub(super) fn some(granules: Range<u32>) -> u32 {
    bitmap::mask(granules) as u32
}

#[inline]
pub(super) fn body(word: u64) -> u32 {
    word as u32
}

#[inline]
pub(super) fn starts(word: u64) -> u32 {
    (word >> GRANULES) as u32
}

/// Granules that are not free.
#[inline]
pub(super) fn occupied(word: u64) -> u32 {
    body(word) | starts(word)
}

/// Where live areas start.
#[inline]
pub(super) fn live(word: u64) -> u32 {
    starts(word) & body(word)
}

/// Where freed areas start.
#[inline]
pub(super) fn freed(word: u64) -> u32 {
    starts(word) & !body(word)
}

/// Granules that an area which goes on until there ends at.
#[inline]
pub(super) fn ends(word: u64) -> u32 {
    starts(word) | !body(word)
}

/// Whether a freed area of `len` granules starts at granule `at` of a word, and ends within it: all of that is what an exchange
/// of the word compares.
#[inline]
pub(super) fn is_freed_area(word: u64, at: u32, len: u32) -> bool {
    freed(word) >> at & 1 != 0 && (ends(word) >> at >> 1).trailing_zeros() + 1 == len
}

/// The words that granules lie in, each with which of its granules they are.
#[inline]
pub(super) fn parts(granules: Range<u32>) -> impl DoubleEndedIterator<Item = (usize, u32)> {
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
