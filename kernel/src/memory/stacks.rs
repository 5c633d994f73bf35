//! Stacks, each with an unmapped page below it: an overflow is a page fault, not silent damage.

use core::sync::atomic::{AtomicUsize, Ordering};

use pcpu::unit::NodeId;

use super::paging::{self, Access};
use super::{PAGE_BYTES, STACKS};

static NEXT: AtomicUsize = AtomicUsize::new(STACKS);

/// Makes a stack of so many pages in memory of `node`; returns its upper end.
///
/// # Panics
/// If there is no memory for it.
pub fn allocate(node: NodeId, pages: usize) -> usize {
    let bytes = (pages + 1) * PAGE_BYTES;
    let start = NEXT.fetch_add(bytes, Ordering::Relaxed) + PAGE_BYTES;
    for page in 0..pages {
        paging::map_new(start + page * PAGE_BYTES, node, Access::ReadWrite)
            .unwrap_or_else(|_| panic!("no memory for a stack of {pages} pages"));
    }
    start + pages * PAGE_BYTES
}
