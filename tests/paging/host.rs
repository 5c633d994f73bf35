//! A machine in a process: physical memory is an arena of frames, spread over nodes; its page tables lie there, and a unit of
//! the process's own makes them true ([`crate::mmu`]).
//!
//! Frames are handed out dirty and taken back once. Whatever allocates one may be made to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pcpu::backing::paging::{Frames, Shootdown, Stale};
use pcpu::unit::{Contents, NodeId};
use x86_64::structures::paging::PhysFrame;
use x86_64::{PhysAddr, VirtAddr};

use crate::mmu::Mmu;

const PAGE: usize = 4096;
/// No frame below, as in a kernel.
const LOWEST: u64 = 1 << 20;
const LEVEL_4: u64 = 0x1000;

#[derive(Debug)]
pub struct Host {
    arena: *mut u8,
    bytes: usize,
    pub mmu: Box<Mmu>,
    nodes: Mutex<Nodes>,
    /// Allocations so far, and which of them fail.
    calls: AtomicU64,
    fails: Mutex<Faults>,
    /// Ranges that were flushed, for each flush.
    pub flushes: Mutex<Vec<usize>>,
    /// Whether frames are handed out zeroed; dirty otherwise.
    pub has_zeroed_frames: AtomicBool,
    /// Whether a flush may be asked for: not in atomic context.
    pub may_flush: AtomicBool,
}

/// Which allocations fail, by their number.
struct Faults(Box<dyn Fn(u64) -> bool + Send>);

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Faults")
    }
}

// SAFETY: the arena is memory, used by whoever has its frames.
unsafe impl Sync for Host {}

#[derive(Debug, Default)]
struct Nodes {
    free: BTreeMap<u32, Vec<u64>>,
    out: BTreeSet<u64>,
    frames_of_a_node: u64,
}

impl Host {
    /// A machine with so many frames on each node, and addresses for so many units.
    pub fn new(nodes: u32, frames_of_a_node: u64, units: u32) -> Self {
        let bytes = LOWEST as usize + (u64::from(nodes) * frames_of_a_node) as usize * PAGE;
        // SAFETY: a file without a name, and a fresh mapping of it.
        let (arena, file) = unsafe {
            let file = libc::memfd_create(c"frames".as_ptr(), libc::MFD_CLOEXEC);
            assert!(file >= 0 && libc::ftruncate(file, bytes as libc::off_t) == 0);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let arena = libc::mmap(ptr::null_mut(), bytes, access, libc::MAP_SHARED, file, 0);
            assert_ne!(arena, libc::MAP_FAILED, "an arena");
            (arena.cast::<u8>(), file)
        };
        arena.expose_provenance();
        let node = |node: u32| {
            let first = u64::from(node) * frames_of_a_node;
            let frames = (first..first + frames_of_a_node).rev();
            (
                node,
                frames.map(|frame| LOWEST + frame * PAGE as u64).collect(),
            )
        };
        let windows = (units as usize + 1) << 30;
        Self {
            arena,
            bytes,
            mmu: Mmu::new(arena, bytes, file, LEVEL_4, windows),
            nodes: Mutex::new(Nodes {
                free: (0..nodes).map(node).collect(),
                out: BTreeSet::new(),
                frames_of_a_node,
            }),
            calls: AtomicU64::new(0),
            fails: Mutex::new(Faults(Box::new(|_| false))),
            flushes: Mutex::new(Vec::new()),
            has_zeroed_frames: AtomicBool::new(false),
            may_flush: AtomicBool::new(true),
        }
    }

    pub fn level_4(&self) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::new(LEVEL_4))
    }

    pub fn physical_memory_offset(&self) -> VirtAddr {
        VirtAddr::new(self.arena.addr() as u64)
    }

    /// From now on the allocations of frames fail for which `fails`, given their number from 0, is true.
    pub fn set_faults(&self, fails: impl Fn(u64) -> bool + Send + 'static) {
        *self.fails.lock().unwrap() = Faults(Box::new(fails));
        self.calls.store(0, Ordering::Relaxed);
    }

    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// The frames that are out.
    pub fn out(&self) -> BTreeSet<u64> {
        self.nodes.lock().unwrap().out.clone()
    }

    pub fn node_of(&self, frame: u64) -> NodeId {
        let per_node = self.nodes.lock().unwrap().frames_of_a_node;
        NodeId::new(((frame - LOWEST) / PAGE as u64 / per_node) as u32)
    }

    /// Takes all frames of a node but so many out of circulation.
    pub fn leave(&self, node: NodeId, frames: usize) {
        let mut nodes = self.nodes.lock().unwrap();
        let free = nodes.free.get_mut(&node.get()).expect("a node");
        let surplus = free.len() - frames;
        free.drain(..surplus);
    }

    /// The words of the level-4 table.
    pub fn level_4_words(&self) -> Vec<u64> {
        // SAFETY: it lies in the arena, and nobody changes it while a test looks.
        let words = unsafe { self.arena.add(LEVEL_4 as usize).cast::<[u64; 512]>().read() };
        words.to_vec()
    }

    fn fill(&self, frame: u64, byte: u8) {
        // SAFETY: the frame lies in the arena and is nobody's at this moment.
        unsafe { self.arena.add(frame as usize).write_bytes(byte, PAGE) };
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: nobody uses the arena any more.
        unsafe { libc::munmap(self.arena.cast(), self.bytes) };
    }
}

// SAFETY: each frame is handed out once until it is taken back; the arena is mapped, whole.
unsafe impl Frames for &Host {
    fn allocate(&self, node: NodeId) -> Option<PhysFrame> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        if (self.fails.lock().unwrap().0)(call) {
            return None;
        }
        let mut nodes = self.nodes.lock().unwrap();
        let frame = nodes.free.get_mut(&node.get())?.pop()?;
        assert!(nodes.out.insert(frame));
        self.fill(
            frame,
            if self.contents() == Contents::Zeroed {
                0
            } else {
                0xa5
            },
        );
        Some(PhysFrame::containing_address(PhysAddr::new(frame)))
    }

    unsafe fn free(&self, frame: PhysFrame) {
        let frame = frame.start_address().as_u64();
        if let Some(page) = self.mmu.knows(frame) {
            panic!("frame {frame:#x} goes back, and is remembered at {page:#x}");
        }
        self.fill(frame, 0xdb);
        let node = self.node_of(frame).get();
        let mut nodes = self.nodes.lock().unwrap();
        assert!(nodes.out.remove(&frame), "frame {frame:#x} is not out");
        nodes.free.entry(node).or_default().push(frame);
    }

    fn contents(&self) -> Contents {
        match self.has_zeroed_frames.load(Ordering::Relaxed) {
            true => Contents::Zeroed,
            false => Contents::Dirty,
        }
    }

    fn fall_back(&self, node: NodeId, nth: u32) -> Option<NodeId> {
        let nodes = self.nodes.lock().unwrap().free.len() as u32;
        (nth + 1 < nodes).then(|| NodeId::new((node.get() + 1 + nth) % nodes))
    }
}

// SAFETY: there is one memory of translations, and it forgets.
unsafe impl Shootdown for &Host {
    fn flush(&self, stale: Stale<'_>) {
        assert!(
            self.may_flush.load(Ordering::Relaxed),
            "a flush in atomic context"
        );
        let mut pages = 0;
        for range in stale.ranges() {
            let window = &self.mmu.window;
            assert!(
                window.start <= range.start && range.end <= window.end,
                "{range:x?}"
            );
            assert!(range.start < range.end);
            pages += range.len() / PAGE;
            self.mmu.forget(range);
        }
        assert_eq!(pages, stale.pages());
        self.flushes.lock().unwrap().push(pages);
    }
}
