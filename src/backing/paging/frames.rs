//! Frames: what a kernel lends its memory by, node by node.
//!
//! What always holds of a [`Pool`]: every frame that it took and has not given back is counted, once. A frame that is in no
//! table is on a [`Chain`], which gives back what is left on it.

use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

use super::tables::{Physical, Table};
use crate::backing::BackingError;
use crate::unit::{Contents, NodeId};

/// A kernel's frames of 4 KiB. No call sleeps: pages are populated in interrupt context too.
///
/// # Safety
/// - A frame that [`allocate`](Self::allocate) returned is nobody else's until [`free`](Self::free) gets it, and holds what
///   [`contents`](Self::contents) promises, which does not change.
/// - Every such frame is readable and writable at its physical address plus the offset that the backing is set up with, not
///   cached otherwise than other memory.
pub unsafe trait Frames {
    /// A frame of this node's memory, of no other's. `None` if it has none left.
    fn allocate(&self, node: NodeId) -> Option<PhysFrame>;

    /// Takes a frame back.
    ///
    /// # Safety
    /// It came from [`allocate`](Self::allocate), and is not used any more.
    unsafe fn free(&self, frame: PhysFrame);

    /// The nodes to ask when `node` has none left, the nearest first: the `nth`, from 0 on; `None` if there is no other.
    fn fall_back(&self, node: NodeId, nth: u32) -> Option<NodeId> {
        let _ = (node, nth);
        None
    }

    /// What a fresh frame holds. One that is [`Contents::Zeroed`] is not zeroed again.
    fn contents(&self) -> Contents {
        Contents::Dirty
    }
}

/// The kernel's frames with what a backing counts of them.
#[derive(Debug)]
pub(super) struct Pool<K> {
    pub(super) kernel: K,
    pub(super) physical: Physical,
    held: AtomicU64,
    from_afar: AtomicU64,
}

impl<K: Frames> Pool<K> {
    pub(super) fn new(kernel: K, physical: Physical) -> Self {
        Self {
            kernel,
            physical,
            held: AtomicU64::new(0),
            from_afar: AtomicU64::new(0),
        }
    }

    /// Frames out.
    pub(super) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Frames that came from another node than was asked for, ever.
    pub(super) fn taken_from_afar(&self) -> u64 {
        self.from_afar.load(Ordering::Relaxed)
    }

    /// A frame with whatever it holds, from `node` or else from the nearest.
    fn allocate(&self, node: NodeId) -> Option<PhysFrame> {
        let frame = self.kernel.allocate(node).or_else(|| {
            let nearest = (0..).map_while(|nth| self.kernel.fall_back(node, nth));
            let frame = nearest
                .filter(|&other| other != node)
                .find_map(|other| self.kernel.allocate(other))?;
            self.from_afar.fetch_add(1, Ordering::Relaxed);
            Some(frame)
        })?;
        self.held.fetch_add(1, Ordering::Relaxed);
        Some(frame)
    }

    /// A frame of zeroes.
    pub(super) fn zeroed(&self, node: NodeId) -> Result<PhysFrame, BackingError> {
        let frame = self.allocate(node).ok_or(BackingError::OutOfFrames)?;
        if self.kernel.contents() == Contents::Dirty {
            self.physical.zero(frame);
        }
        Ok(frame)
    }

    /// A table without entries.
    pub(super) fn table(&self, node: NodeId) -> Result<Table, BackingError> {
        // SAFETY: the frame is ours, and zero.
        self.zeroed(node).map(|frame| unsafe { Table::new(frame) })
    }

    /// Gives a frame back.
    ///
    /// # Safety
    /// The frame came from this pool, and is not used any more; no CPU has a translation of it.
    pub(super) unsafe fn free(&self, frame: PhysFrame) {
        self.held.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: the promise of the caller.
        unsafe { self.kernel.free(frame) };
    }

    pub(super) fn chain(&self) -> Chain<'_, K> {
        Chain {
            pool: self,
            first: None,
            last: None,
            tables: 0,
        }
    }
}

/// Frames in a row, each of which names the next in its first word. First in, first out.
///
/// A link is a multiple of the page size. So a table that is put on a chain while a CPU may still look into it has no entry
/// there that is present.
pub(super) struct Chain<'p, K: Frames> {
    pool: &'p Pool<K>,
    first: Option<PhysFrame>,
    last: Option<PhysFrame>,
    tables: usize,
}

impl<K: Frames> Chain<'_, K> {
    pub(super) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// Puts a fresh frame at the end.
    pub(super) fn allocate(&mut self, node: NodeId) -> Result<(), BackingError> {
        let frame = self.pool.allocate(node).ok_or(BackingError::OutOfFrames)?;
        // SAFETY: the frame is fresh.
        unsafe { self.push(frame) };
        Ok(())
    }

    /// Puts a fresh frame at the end that is to be a table.
    pub(super) fn allocate_table(&mut self, node: NodeId) -> Result<(), BackingError> {
        let frame = self.pool.zeroed(node)?;
        // SAFETY: the frame is fresh.
        unsafe { self.push(frame) };
        self.tables += 1;
        Ok(())
    }

    /// How many tables there are.
    pub(super) fn tables(&self) -> usize {
        self.tables
    }

    /// Takes the first table of a chain that has nothing but tables.
    pub(super) fn pop_table(&mut self) -> Option<Table> {
        self.tables = self.tables.checked_sub(1)?;
        let frame = self.pop()?;
        // But for the link, it is zero.
        self.set_next(frame, None);
        // SAFETY: the frame is ours, and zero.
        Some(unsafe { Table::new(frame) })
    }

    /// Puts a frame at the end.
    ///
    /// # Safety
    /// The frame came from the pool, and what it holds is not needed any more. Before the chain is dropped, the CPUs have
    /// been made to forget it.
    pub(super) unsafe fn push(&mut self, frame: PhysFrame) {
        self.set_next(frame, None);
        match self.last.replace(frame) {
            Some(last) => self.set_next(last, Some(frame)),
            None => self.first = Some(frame),
        }
    }

    /// Takes the first frame, zeroed.
    pub(super) fn pop_zeroed(&mut self) -> Option<PhysFrame> {
        let frame = self.pop()?;
        match self.pool.kernel.contents() {
            Contents::Dirty => self.pool.physical.zero(frame),
            // But for the link, it is zero.
            Contents::Zeroed => self.set_next(frame, None),
        }
        Some(frame)
    }

    fn pop(&mut self) -> Option<PhysFrame> {
        let frame = self.first?;
        let next = self.link(frame).load(Ordering::Relaxed);
        self.first = (next != 0).then(|| PhysFrame::containing_address(PhysAddr::new(next)));
        if self.first.is_none() {
            self.last = None;
        }
        Some(frame)
    }

    fn set_next(&self, frame: PhysFrame, next: Option<PhysFrame>) {
        let link = next.map_or(0, |next| next.start_address().as_u64());
        self.link(frame).store(link, Ordering::Relaxed);
    }

    fn link(&self, frame: PhysFrame) -> &AtomicU64 {
        // SAFETY: a frame on a chain is ours; its words are accessed whole.
        self.pool.physical.entry(unsafe { Table::new(frame) }, 0)
    }
}

impl<K: Frames> Drop for Chain<'_, K> {
    fn drop(&mut self) {
        while let Some(frame) = self.pop() {
            // SAFETY: nothing uses a frame on a chain any more (promise of `push`).
            unsafe { self.pool.free(frame) };
        }
    }
}
