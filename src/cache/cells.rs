//! Which areas belong to a run, and to which: looked up by address, without a lock.
//!
//! Addresses are divided into windows of 512 bytes. A window has areas of one run at most, and a cell that tells which. There
//! are far fewer cells than windows, a cell serves many; but never two at a time: where the cell of a window is taken by
//! another run, the window's areas go without. So a look-up is one load: either the cell's run has the area, or no run has.
//!
//! Only the holder of the allocator's lock enters runs and takes them out. That other CPUs have freed areas of a run is noted
//! in its cells by whoever does.

use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use super::{REACH_GRANULES, Run};
use crate::metadata::{BlockLayout, MetaSlice};

/// Granules of a window, as a shift.
const WINDOW_SHIFT: u32 = 7;

/// Layout of [`Cells`] in a metadata block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CellsLayout {
    cells: usize,
    at: usize,
}

impl CellsLayout {
    /// Adds cells for the runs of so many CPUs to `block`.
    pub(crate) fn add(
        block: &mut BlockLayout,
        cpus: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        let cells = (cpus as usize * 64).next_power_of_two().clamp(256, 4096);
        Ok(Self {
            cells,
            at: block.array::<AtomicU64>(cells)?,
        })
    }
}

/// The table; an entry of 0 is empty.
#[derive(Debug)]
pub(crate) struct Cells {
    cells: MetaSlice<AtomicU64>,
    /// From a hash of 32 bits to an index.
    shift: u32,
}

impl Cells {
    /// An empty table.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, and nothing else uses this part of it while
    /// the table lives.
    pub(crate) unsafe fn new(block: NonNull<u8>, layout: &CellsLayout) -> Self {
        // SAFETY: the promise of the caller.
        let cells =
            unsafe { MetaSlice::filled(block, layout.at, layout.cells, AtomicU64::default) };
        Self {
            shift: u32::BITS - layout.cells.trailing_zeros(),
            cells,
        }
    }

    #[inline]
    fn cell(&self, granule: u32) -> &AtomicU64 {
        let hash = (granule >> WINDOW_SHIFT).wrapping_mul(0x9e37_79b1) >> self.shift;
        &self.cells[hash as usize]
    }

    /// The run that the area at `granule` belongs to, if any, and which of its areas it is.
    #[inline]
    pub(crate) fn find(&self, granule: u32) -> Option<(Run, u32)> {
        let bits = self.cell(granule).load(Ordering::Acquire);
        if bits == 0 {
            return None;
        }
        let run = Run::from_bits(bits);
        Some((run, run.slot_at(granule)?))
    }

    /// Whether the area at `granule` belongs to a run.
    #[inline]
    pub(crate) fn is_entered(&self, granule: usize) -> bool {
        granule < REACH_GRANULES && self.find(granule as u32).is_some()
    }

    /// The same table once more.
    ///
    /// # Safety
    /// The memory of the table stays for as long as the result.
    pub(crate) unsafe fn view(&self) -> Self {
        // SAFETY: the array is there (promise of the caller), and consists of atomic values.
        let cells = unsafe { MetaSlice::view(self.cells.as_ptr(), self.cells.len()) };
        Self {
            cells,
            shift: self.shift,
        }
    }

    /// The first stretch of the run's areas that can be entered.
    pub(crate) fn stretch(&self, run: Run) -> Range<u32> {
        let is_free = |slot: &u32| self.cell(run.start(*slot)).load(Ordering::Relaxed) == 0;
        let start = (0..run.slots()).find(is_free).unwrap_or(run.slots());
        let end = (start..run.slots()).find(|slot| !is_free(slot));
        start..end.unwrap_or(run.slots())
    }

    /// Enters a run that is one [`stretch`](Self::stretch).
    pub(crate) fn enter(&self, run: Run) {
        for slot in 0..run.slots() {
            self.cell(run.start(slot))
                .store(run.bits(), Ordering::Release);
        }
    }

    /// Takes a run out; says whether other CPUs have freed areas of it.
    pub(crate) fn remove(&self, run: Run) -> bool {
        let mut is_shared = false;
        for slot in 0..run.slots() {
            let was = self.cell(run.start(slot)).swap(0, Ordering::AcqRel);
            is_shared |= Run::from_bits(was).is_shared();
        }
        is_shared
    }

    /// Notes that another CPU has marked the area at `granule` as freed; false if it does not belong to the run any more.
    #[inline]
    pub(crate) fn share(&self, granule: u32, run: Run) -> bool {
        let (bits, shared) = (run.unshared().bits(), run.shared().bits());
        let found =
            self.cell(granule)
                .compare_exchange(bits, shared, Ordering::AcqRel, Ordering::Relaxed);
        found.is_ok() || found == Err(shared)
    }

    /// Takes the note back in all cells of the run, by LOCKed steps: marks are looked at afterwards.
    pub(crate) fn unshare(&self, run: Run) {
        for slot in 0..run.slots() {
            self.cell(run.start(slot))
                .swap(run.unshared().bits(), Ordering::SeqCst);
        }
    }

    /// Notes of all runs that other CPUs may have freed areas of them.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(crate) fn share_all(&self) {
        for cell in self.cells.iter() {
            let bits = cell.load(Ordering::Relaxed);
            if bits != 0 {
                cell.store(Run::from_bits(bits).shared().bits(), Ordering::Relaxed);
            }
        }
    }
}
