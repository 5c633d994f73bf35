//! Summaries of free runs: what a page, eight pages, sixty-four pages ... have free at their start, at most, and at
//! their end.
//!
//! The idea is that of the summaries in Go's page allocator: three lengths per piece are enough to find, from the root
//! down, the lowest place where a run fits, runs over a border between two pieces included. Each level joins
//! [`FANOUT`] pieces; a 256 KiB unit of 4 KiB pages has two levels above its pages.

/// Pieces that a node of the tree joins.
pub(crate) const FANOUT: u32 = 8;

/// The free runs of one piece of a region, in granules.
///
/// Always `start <= longest`, `end <= longest`, and `start == len` exactly if the whole piece is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Summary {
    /// Length of the run at the start of the piece.
    pub(crate) start: u32,
    /// Length of the longest run.
    pub(crate) longest: u32,
    /// Length of the run at the end of the piece.
    pub(crate) end: u32,
}

impl Summary {
    /// Nothing free.
    pub(crate) const FULL: Self = Self {
        start: 0,
        longest: 0,
        end: 0,
    };

    /// The summary of neighbouring pieces, each given as (length in granules, summary).
    pub(crate) fn join(pieces: impl Iterator<Item = (u32, Self)>) -> Self {
        let mut joined = Self::FULL;
        // Granules seen so far: equal to `joined.start` as long as all of them are free.
        let mut seen = 0;
        for (len, piece) in pieces {
            if joined.start == seen {
                joined.start += piece.start;
            }
            joined.longest = joined
                .longest
                .max(joined.end + piece.start)
                .max(piece.longest);
            joined.end = if piece.start == len {
                joined.end + len
            } else {
                piece.end
            };
            seen += len;
        }
        joined
    }
}

/// Where the levels of a tree over `leaves` pieces lie in one array of nodes, lowest level first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TreeShape {
    leaves: u32,
}

impl TreeShape {
    /// A tree over `leaves` pieces (at least one).
    pub(crate) const fn new(leaves: u32) -> Self {
        Self { leaves }
    }

    /// Levels above the leaves: at least one, so that there is always a root.
    pub(crate) fn levels(self) -> u32 {
        let mut levels = 1;
        while self.width(levels) > 1 {
            levels += 1;
        }
        levels
    }

    /// Number of pieces on `level`, the leaves being level 0.
    pub(crate) fn width(self, level: u32) -> u32 {
        let mut width = self.leaves;
        for _ in 0..level {
            width = width.div_ceil(FANOUT);
        }
        width
    }

    /// For each level the index of its first node in the array; level 0 (the leaves) has none. `N` is above the
    /// number of levels.
    pub(crate) fn level_offsets<const N: usize>(self) -> [u32; N] {
        let mut offsets = [0; N];
        for level in 1..self.levels() {
            offsets[level as usize + 1] = offsets[level as usize] + self.width(level);
        }
        offsets
    }

    /// Nodes above the leaves.
    pub(crate) fn nodes(self) -> usize {
        (1..=self.levels())
            .map(|level| self.width(level) as usize)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes() {
        for (leaves, levels, nodes) in [
            (1, 1, 1),
            (8, 1, 1),
            (9, 2, 3),
            (64, 2, 9),
            (65, 3, 12),
            (4096, 4, 585),
        ] {
            let shape = TreeShape::new(leaves);
            assert_eq!(
                (shape.levels(), shape.nodes()),
                (levels, nodes),
                "{leaves} leaves"
            );
        }
    }

    #[test]
    fn join_sees_runs_over_borders() {
        let piece = |start, longest, end| Summary {
            start,
            longest,
            end,
        };
        // Free runs: 2 at the start, 3 + 10 + 4 across, 1 at the end.
        let joined = Summary::join(
            [
                (10, piece(2, 3, 3)),
                (10, piece(10, 10, 10)),
                (10, piece(4, 4, 1)),
            ]
            .into_iter(),
        );
        assert_eq!(joined, piece(2, 17, 1));
        let free = Summary::join([(10, piece(10, 10, 10)), (5, piece(5, 5, 5))].into_iter());
        assert_eq!(free, piece(15, 15, 15));
        let full = Summary::join([(10, Summary::FULL), (10, Summary::FULL)].into_iter());
        assert_eq!(full, Summary::FULL);
    }
}
