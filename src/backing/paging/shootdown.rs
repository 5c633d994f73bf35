//! Translations that CPUs may still have in their caches after the tables have changed, and how a kernel ends their use.

use core::iter::successors;
use core::ops::Range;

use crate::backing::PageSpan;

/// How a kernel makes its CPUs forget translations.
///
/// # Safety
/// When [`flush`](Self::flush) returns, no CPU uses a translation of the ranges that it had before, nor what it remembers of
/// the page tables that they lead through; whatever address space (PCID) it remembers them for.
pub unsafe trait Shootdown {
    /// Makes all CPUs forget what they know of these ranges: of each page `invlpg`, or, where there are many, of all there
    /// is. Always called in a context that may sleep, with interrupts on; the ranges may be read by all CPUs meanwhile.
    ///
    /// Before other CPUs run it is a matter of the calling one.
    fn flush(&self, stale: Stale<'_>);
}

/// Ranges of addresses whose translations are to be forgotten.
#[derive(Debug, Clone, Copy)]
pub struct Stale<'a>(Kind<'a>);

#[derive(Debug, Clone, Copy)]
enum Kind<'a> {
    /// Pages that were depopulated.
    Span(PageSpan<'a>),
    /// Ranges of one length at equal distances.
    Strided {
        first: usize,
        bytes: usize,
        stride_bytes: usize,
        count: usize,
    },
}

impl<'a> Stale<'a> {
    pub(super) fn span(span: PageSpan<'a>) -> Self {
        Self(Kind::Span(span))
    }

    pub(super) fn strided(first: usize, bytes: usize, stride_bytes: usize, count: usize) -> Self {
        Self(Kind::Strided {
            first,
            bytes,
            stride_bytes,
            count,
        })
    }

    /// One range of whole pages, `bytes` long: for what a kernel unmaps besides, and to test its [`Shootdown`].
    ///
    /// ```
    /// use pcpu::backing::paging::Stale;
    /// let stale = Stale::range(0xffff_8000_0000_0000, 3 * 4096);
    /// assert_eq!(stale.pages(), 3);
    /// assert_eq!(stale.ranges().next(), Some(0xffff_8000_0000_0000..0xffff_8000_0000_3000));
    /// ```
    pub fn range(first: usize, bytes: usize) -> Self {
        Self::strided(first, bytes, bytes, 1)
    }

    /// The ranges, of whole pages.
    pub fn ranges(self) -> impl Iterator<Item = Range<usize>> + 'a {
        let (span, strided) = match self.0 {
            Kind::Span(span) => (Some(span), None),
            Kind::Strided {
                first,
                bytes,
                stride_bytes,
                count,
            } => {
                let starts = successors(Some(first), move |start| start.checked_add(stride_bytes));
                let range = move |start: usize| start..start.wrapping_add(bytes);
                (None, Some(starts.take(count).map(range)))
            }
        };
        let of_area = |area: crate::backing::CpuArea| area.address..area.address + area.bytes;
        let of_span = span.into_iter().flat_map(PageSpan::areas).map(of_area);
        of_span.chain(strided.into_iter().flatten())
    }

    /// How many pages there are in all.
    pub fn pages(self) -> usize {
        self.ranges()
            .map(|range| range.len() / super::tables::PAGE_BYTES)
            .sum()
    }
}
