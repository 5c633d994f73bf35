//! From the addresses of a unit, which need not begin at a page, to pages of the system: all calls are about whole ones.

use std::ops::Range;

use rustix::param;

use super::shared_pages::{Neighbours, Use};

/// The whole pages that some addresses lie in.
pub(super) fn around(addresses: Range<usize>) -> Range<usize> {
    let page_bytes = param::page_size();
    addresses.start / page_bytes * page_bytes..addresses.end.next_multiple_of(page_bytes)
}

/// The whole pages among some addresses.
pub(super) fn within(addresses: Range<usize>) -> Range<usize> {
    let page_bytes = param::page_size();
    let start = addresses.start.next_multiple_of(page_bytes);
    start..(addresses.end / page_bytes * page_bytes).max(start)
}

/// The whole pages of some addresses that nothing in use has a part of.
pub(super) fn beside(addresses: Range<usize>, neighbours: Neighbours) -> Range<usize> {
    let (outer, inner) = (around(addresses.clone()), within(addresses));
    let start = match neighbours.before {
        Use::Unused => outer.start,
        Use::Used => inner.start,
    };
    let end = match neighbours.behind {
        Use::Unused => outer.end,
        Use::Used => inner.end,
    };
    start..end
}
