//! Pages of the system that two pages of a unit have a part of, where units do not begin at pages.
//!
//! ```text
//!  pages of a unit:          |    6    |    7    |    8    |
//!  pages of the system:  |    6    |    7    |    8    |    9    |       6 and 7 share the system's page 7
//! ```
//! What always holds, for every unit that does not begin at a page:
//! - a page of the system goes back only while neither page of the unit that has a part of it has memory;
//! - what a page of the unit has no memory for is zero, also where its neighbour keeps the system's page.
//!
//! Neighbours are populated and given back at the same time, by threads that know nothing of each other. So which pages of
//! a unit have memory is noted here, for all chunks in a row (the last page of one has the first of the next for a
//! neighbour, where chunks touch), and a shared page goes back with the lock held that the note is made under: who
//! populates the neighbour waits, and comes after it. The other pages need no lock.
//!
//! The lock is held during calls of the backing only, never while one waits for another, and by no signal handler:
//! requests that must not wait populate nothing. When an instance is at rest no such call is under way, so that a forked
//! child finds it free.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::numbers::Numbers;

/// What has to be known about shared pages.
#[derive(Debug)]
pub(super) struct SharedPages {
    pages_per_chunk: usize,
    with_memory: Mutex<Numbers>,
}

/// What lies beside some pages: whether it is in use as they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Neighbours {
    pub(super) before: Use,
    pub(super) behind: Use,
}

/// Whether a page has memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Unused,
    Used,
}

impl SharedPages {
    /// For so many chunks, of which the first is there for good, with memory for its first `populated_pages`.
    pub(super) fn new(chunks: usize, pages_per_chunk: usize, populated_pages: usize) -> Self {
        let mut with_memory = Numbers::below(chunks * pages_per_chunk);
        with_memory.insert(0..populated_pages);
        Self {
            pages_per_chunk,
            with_memory: Mutex::new(with_memory),
        }
    }

    /// The pages of a chunk by their numbers in the whole window.
    pub(super) fn in_window(&self, chunk: u32, pages: Range<u32>) -> Range<usize> {
        let first = chunk as usize * self.pages_per_chunk;
        first + pages.start as usize..first + pages.end as usize
    }

    /// Which pages of the window have memory.
    pub(super) fn with_memory(&self) -> MutexGuard<'_, Numbers> {
        self.with_memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Numbers {
    /// What lies directly beside the numbers; nothing is before 0, nor behind the limit.
    pub(super) fn neighbours(&self, numbers: &Range<usize>) -> Neighbours {
        let of = |number: Option<usize>| match number.is_some_and(|number| self.contains(number)) {
            true => Use::Used,
            false => Use::Unused,
        };
        Neighbours {
            before: of(numbers.start.checked_sub(1)),
            behind: of(Some(numbers.end)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_those_directly_beside() {
        let shared = SharedPages::new(3, 64, 7);
        let neighbours = |pages: Range<usize>| {
            let Neighbours { before, behind } = shared.with_memory().neighbours(&pages);
            (before, behind)
        };
        assert_eq!(neighbours(7..8), (Use::Used, Use::Unused));
        assert_eq!(neighbours(8..9), (Use::Unused, Use::Unused));
        assert_eq!(neighbours(0..1), (Use::Unused, Use::Used));
        // The last page of a chunk and the first one of the next.
        assert_eq!(shared.in_window(1, 62..64), 126..128);
        shared.with_memory().insert(127..128);
        assert_eq!(neighbours(128..130), (Use::Used, Use::Unused));
        shared.with_memory().remove(127..128);
        assert_eq!(neighbours(128..130), (Use::Unused, Use::Unused));
        shared.with_memory().insert(191..192);
        assert_eq!(neighbours(192..193), (Use::Used, Use::Unused));
    }
}
