//! Sets of numbers, a bit for each: of pages of a window, of chunks.

use std::boxed::Box;
use std::ops::Range;
use std::vec;

/// A set of numbers below a limit.
#[derive(Debug)]
pub(super) struct Numbers {
    /// Zeroes come with the first touch, so that a large window costs only what is used of it.
    words: Box<[u64]>,
}

impl Numbers {
    /// None of them.
    pub(super) fn below(limit: usize) -> Self {
        Self {
            words: vec![0; limit.div_ceil(64)].into(),
        }
    }

    pub(super) fn contains(&self, number: usize) -> bool {
        let word = self.words.get(number / 64);
        word.is_some_and(|word| word >> (number % 64) & 1 != 0)
    }

    pub(super) fn insert(&mut self, numbers: Range<usize>) {
        numbers.for_each(|number| self.words[number / 64] |= 1 << (number % 64));
    }

    pub(super) fn remove(&mut self, numbers: Range<usize>) {
        numbers.for_each(|number| self.words[number / 64] &= !(1 << (number % 64)));
    }

    /// The highest one.
    pub(super) fn last(&self) -> Option<usize> {
        let (index, word) = self
            .words
            .iter()
            .enumerate()
            .rfind(|(_, word)| **word != 0)?;
        Some(index * 64 + word.ilog2() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_is_the_highest() {
        let mut numbers = Numbers::below(200);
        assert_eq!(numbers.last(), None);
        for (number, last) in [(3, 3), (63, 63), (64, 64), (199, 199), (128, 199)] {
            numbers.insert(number..number + 1);
            assert_eq!(numbers.last(), Some(last));
        }
        numbers.remove(65..200);
        assert_eq!(numbers.last(), Some(64));
    }
}
