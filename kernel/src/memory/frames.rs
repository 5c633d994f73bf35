//! Physical memory in frames of 4 KiB: which are free, and on which node they are.
//!
//! A bitmap has a bit for each frame of the first 4 GiB, set while the frame is free. What always holds: no frame below
//! 1 MiB, of the image, of the boot module, or outside of RAM is ever free.

use core::sync::atomic::{AtomicUsize, Ordering};

use lock_api::Mutex;
use pcpu::this_cpu::gs::IrqLock;
use pcpu::unit::NodeId;
use x86_64::PhysAddr;
use x86_64::structures::paging::{FrameAllocator, PhysFrame, Size4KiB};

use super::{PAGE_BYTES, PhysicalRange, image};
use crate::machine::{MAX_NODE_RANGES, Machine, NodeRange};

/// Frames from here on are not used.
const END: u64 = 4 << 30;
/// Frames below are not used: firmware and the trampoline have them.
const LOW_END: u64 = 1 << 20;

const WORDS: usize = END as usize / PAGE_BYTES / 64;

static FRAMES: Mutex<IrqLock, Frames> = Mutex::new(Frames {
    free: [0; WORDS],
    ranges: [Search::NOTHING; MAX_NODE_RANGES],
});

/// How many frames came from another node than they were asked from.
static FALL_BACKS: AtomicUsize = AtomicUsize::new(0);

struct Frames {
    free: [u64; WORDS],
    ranges: [Search; MAX_NODE_RANGES],
}

/// A piece of a node's memory, and the word of the bitmap where the search goes on.
#[derive(Clone, Copy)]
struct Search {
    memory: NodeRange,
    next_word: usize,
}

impl Search {
    const NOTHING: Self = Self {
        memory: NodeRange {
            range: PhysicalRange::EMPTY,
            node: NodeId::new(0),
        },
        next_word: 0,
    };

    /// The words that have bits of this piece.
    fn words(&self) -> core::ops::Range<usize> {
        let range = self.memory.range;
        word_of(range.start.min(END))..word_of(range.end.min(END) + 63 * PAGE_BYTES as u64)
    }
}

/// Makes the machine's RAM free.
pub fn init(machine: &Machine) {
    let mut frames = FRAMES.lock();
    for (search, &memory) in frames.ranges.iter_mut().zip(machine.node_ranges()) {
        *search = Search {
            memory,
            next_word: 0,
        };
        search.next_word = search.words().start;
    }
    let kept = [Some(image::whole()), machine.start_info.module];
    let is_kept = |address| kept.iter().flatten().any(|range| range.contains(address));
    for ram in machine.start_info.ram() {
        let page_bytes = PAGE_BYTES as u64;
        let start = ram.start.max(LOW_END).next_multiple_of(page_bytes);
        let mut address = start;
        while address + page_bytes <= ram.end.min(END) {
            if !is_kept(address) {
                frames.free[word_of(address)] |= bit_of(address);
            }
            address += page_bytes;
        }
    }
}

/// A frame from `node`.
pub fn allocate_on(node: NodeId) -> Option<PhysFrame> {
    let address = FRAMES.lock().take(|memory| memory.node == node)?;
    Some(PhysFrame::containing_address(PhysAddr::new(address)))
}

/// A frame from `node`, or, if that has none left, from another.
pub fn allocate(node: NodeId) -> Option<PhysFrame> {
    let mut frames = FRAMES.lock();
    let address = frames.take(|memory| memory.node == node).or_else(|| {
        let address = frames.take(|memory| memory.node != node)?;
        FALL_BACKS.fetch_add(1, Ordering::Relaxed);
        Some(address)
    })?;
    Some(PhysFrame::containing_address(PhysAddr::new(address)))
}

/// Makes a frame free.
///
/// # Safety
/// It is RAM, and nothing uses it any more.
pub unsafe fn free(frame: PhysFrame) {
    let address = frame.start_address().as_u64();
    let mut frames = FRAMES.lock();
    let (word, bit) = (word_of(address), bit_of(address));
    assert!(
        frames.free[word] & bit == 0,
        "the frame at {address:#x} is free already"
    );
    frames.free[word] |= bit;
    for search in &mut frames.ranges {
        if search.memory.range.contains(address) {
            search.next_word = search.next_word.min(word);
        }
    }
}

/// The node that a physical address is on.
pub fn node_of(address: PhysAddr) -> Option<NodeId> {
    let frames = FRAMES.lock();
    let memory = frames.ranges.iter().map(|search| search.memory);
    memory
        .filter(|memory| memory.range.contains(address.as_u64()))
        .map(|memory| memory.node)
        .next()
}

/// How many frames are free.
pub fn free_count() -> usize {
    let frames = FRAMES.lock();
    frames
        .free
        .iter()
        .map(|word| word.count_ones() as usize)
        .sum()
}

/// How many frames came from another node than they were asked from.
pub fn fall_backs() -> usize {
    FALL_BACKS.load(Ordering::Relaxed)
}

impl Frames {
    /// Takes the lowest free frame of the pieces that `suits`.
    fn take(&mut self, suits: impl Fn(NodeRange) -> bool) -> Option<u64> {
        for search in self.ranges.iter_mut().filter(|search| suits(search.memory)) {
            for word in search.next_word..search.words().end {
                // Pieces of two nodes may share a word.
                let mut bits = self.free[word];
                while bits != 0 {
                    let address = (word * 64 + bits.trailing_zeros() as usize) * PAGE_BYTES;
                    if search.memory.range.contains(address as u64) {
                        search.next_word = word;
                        self.free[word] &= !bit_of(address as u64);
                        return Some(address as u64);
                    }
                    bits &= bits - 1;
                }
            }
            search.next_word = search.words().end;
        }
        None
    }
}

fn word_of(address: u64) -> usize {
    address as usize / PAGE_BYTES / 64
}

fn bit_of(address: u64) -> u64 {
    1 << (address as usize / PAGE_BYTES % 64)
}

/// Where page tables come from.
pub struct TableFrames(pub NodeId);

// SAFETY: every frame is handed out once until it is freed.
unsafe impl FrameAllocator<Size4KiB> for TableFrames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        allocate(self.0)
    }
}
