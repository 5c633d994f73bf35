//! How far apart the units of a process lie, and which alignment that leaves.
//!
//! Every unit has a window of `window_bytes`, which holds its part of all chunks; `stride_bytes` is from one unit's window
//! to the next one's. Equal powers of two would put all copies of a variable into one set of each cache: whoever goes
//! over them, to sum up or to zero, would miss. So the stride is longer than the window, by a page, or by a page and
//! [`LINES_BYTES`].

use rustix::param;

/// What lies between units besides a page: the alignment that types have which are padded against lines that are fetched
/// in pairs, and of the sections of static variables.
const LINES_BYTES: usize = 128;

/// How far apart the units of a process lie.
///
/// ```
/// use pcpu::backing::mmap::Geometry;
/// let (lines, pages) = (Geometry::lines(16 << 20), Geometry::pages(16 << 20));
/// assert_eq!(lines.window_bytes(), pages.window_bytes());
/// assert_eq!(lines.stride_bytes() - pages.stride_bytes(), lines.max_align_bytes());
/// assert!(pages.stride_bytes().is_multiple_of(pages.max_align_bytes()));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    window_bytes: usize,
    skew_bytes: usize,
}

impl Geometry {
    /// Units that are a window, a page and 128 bytes apart: the copies of a variable lie in as many sets of the caches as
    /// there are. What is allocated is aligned to 128 bytes at most.
    pub fn lines(window_bytes: usize) -> Self {
        Self {
            window_bytes,
            skew_bytes: param::page_size() + LINES_BYTES,
        }
    }

    /// Units that are a window and a page apart: copies are aligned up to a page. They all lie in the same lines of their
    /// pages, and so in one set of a small cache.
    pub fn pages(window_bytes: usize) -> Self {
        Self {
            window_bytes,
            skew_bytes: param::page_size(),
        }
    }

    /// Units with nothing between them: for simulated machines, whose areas have alignments of their own.
    pub(crate) fn side_by_side(window_bytes: usize) -> Self {
        Self {
            window_bytes,
            skew_bytes: 0,
        }
    }

    /// What one CPU's copies can take at most, in bytes.
    pub fn window_bytes(&self) -> usize {
        self.window_bytes
    }

    /// From one unit to the next, in bytes.
    pub fn stride_bytes(&self) -> usize {
        self.window_bytes.saturating_add(self.skew_bytes)
    }

    /// The greatest alignment that all copies of a variable can have, in bytes, and not more than a page.
    pub fn max_align_bytes(&self) -> usize {
        // A page where nothing is skewed.
        1 << (self.skew_bytes | param::page_size()).trailing_zeros()
    }
}
