//! Blocks of metadata: each has the lowest pages that are free in a row, memory of its own, and leaves nothing behind.

use std::alloc::Layout;
use std::ptr::NonNull;

use proptest::prelude::*;

use pcpu::backing::{Backing, BackingError, Context};

use crate::machine::Shape;

const PAGE: usize = 4096;
/// 128 MiB.
const PAGES: usize = 32_768;

/// The lowest run of free pages, in a map of those that are used.
fn lowest(used: &[bool], pages: usize) -> usize {
    let is_free = |&start: &usize| used[start..start + pages].iter().all(|&used| !used);
    (0..used.len() - pages)
        .find(is_free)
        .expect("there is room")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn blocks_lie_as_low_as_they_can(
        steps in prop::collection::vec((any::<bool>(), 1_usize..90_000, any::<usize>()), 1..150),
    ) {
        Shape::default().run(|machine| {
            let before = machine.host.out().len();
            let window = machine.host.mmu.window.start;
            // What the instance has, it has had from the start: the pages that are mapped.
            let mapped = |page: usize| machine.host.mmu.translate(window + page * PAGE).is_some();
            let mut used: Vec<bool> = (0..3000).map(mapped).collect();
            let mut live: Vec<(NonNull<u8>, Layout, u8)> = Vec::new();
            for (turn, &(is_wanted, bytes, which)) in steps.iter().enumerate() {
                if is_wanted || live.is_empty() {
                    let layout = Layout::from_size_align(bytes, 64).unwrap();
                    let block = machine.paging.allocate_metadata(layout, Context::MaySleep).unwrap();
                    let pages = bytes.div_ceil(PAGE);
                    let first = lowest(&used, pages);
                    assert_eq!(block.as_ptr().addr(), window + first * PAGE);
                    used[first..first + pages].fill(true);
                    // SAFETY: the block is that long, and ours.
                    unsafe { block.write_bytes(turn as u8, bytes) };
                    live.push((block, layout, turn as u8));
                } else {
                    let (block, layout, byte) = live.swap_remove(which % live.len());
                    // SAFETY: the block is that long, and ours.
                    let content = unsafe { std::slice::from_raw_parts(block.as_ptr(), layout.size()) };
                    assert!(content.iter().all(|&found| found == byte));
                    // SAFETY: allocated with this layout, and not used any more.
                    unsafe { machine.paging.free_metadata(block, layout) };
                    let first = (block.as_ptr().addr() - window) / PAGE;
                    used[first..first + layout.size().div_ceil(PAGE)].fill(false);
                }
            }
            machine.audit();
            for (block, layout, _) in live {
                // SAFETY: as above.
                unsafe { machine.paging.free_metadata(block, layout) };
            }
            assert_eq!(machine.host.out().len(), before);
        });
    }
}

#[test]
fn what_has_no_room_is_refused() {
    Shape::default().run(|machine| {
        let out = machine.host.out();
        let large_align = Layout::from_size_align(64, 2 * PAGE).unwrap();
        let too_long = Layout::from_size_align(PAGES * PAGE + 1, 8).unwrap();
        for layout in [large_align, too_long] {
            let refused = machine.paging.allocate_metadata(layout, Context::MaySleep);
            assert_eq!(refused, Err(BackingError::OutOfMetadata));
            assert_eq!(machine.host.out(), out);
        }
        machine.audit();
    });
}

/// A block that comes back in atomic context is the next of its size.
#[test]
fn a_block_waits_for_its_next_use() {
    Shape::default().run(|machine| {
        let paging = machine.paging;
        let out = machine.host.out();
        let [small, large] = [1, 5].map(|pages| Layout::from_size_align(pages * PAGE, 8).unwrap());
        let take = |layout| paging.allocate_metadata(layout, Context::Atomic).unwrap();
        let (first, second) = (take(large), take(large));
        // SAFETY: allocated with this layout, and not used.
        unsafe {
            paging.free_metadata_atomic(first, large);
            paging.free_metadata_atomic(second, large);
        }
        assert_eq!(paging.stats().metadata_pages_kept, 10);
        let other = take(small);
        assert!(![first, second].contains(&other));
        assert_eq!((take(large), take(large)), (second, first));
        assert_eq!(paging.stats().metadata_pages_kept, 0);
        // SAFETY: as above.
        unsafe {
            paging.free_metadata_atomic(first, large);
            paging.free_metadata(second, large);
            paging.free_metadata(other, small);
        }
        assert_eq!(paging.stats().metadata_pages_kept, 0);
        assert_eq!(machine.host.out(), out);
    });
}
