//! Granules to pages and back: the length of a page is a power of two.

use core::ops::Range;

/// The length of a page in granules, a power of two of at least 64.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageLen {
    shift: u32,
}

impl PageLen {
    pub(super) fn new(granules: u32) -> Self {
        debug_assert!(granules.is_power_of_two() && granules >= u64::BITS);
        Self {
            shift: granules.trailing_zeros(),
        }
    }

    /// The page that `granule` lies in.
    #[inline]
    pub(super) fn page(self, granule: u32) -> u32 {
        granule >> self.shift
    }

    /// The granules of `pages`.
    #[inline]
    pub(super) fn granules(self, pages: Range<u32>) -> Range<u32> {
        pages.start << self.shift..pages.end << self.shift
    }

    /// The pages that `granules`, which are some, touch.
    #[inline]
    pub(super) fn pages_of(self, granules: Range<u32>) -> Range<u32> {
        self.page(granules.start)..self.page(granules.end - 1) + 1
    }

    /// The words of the bits of `pages`.
    #[inline]
    pub(super) fn words(self, pages: Range<u32>) -> Range<usize> {
        let granules = self.granules(pages);
        (granules.start / u64::BITS) as usize..(granules.end / u64::BITS) as usize
    }
}
