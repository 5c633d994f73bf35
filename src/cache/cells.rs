//! Which areas belong to a run, and to which: looked up by address, without a lock.
//!
//! Addresses are divided into windows of 128 bytes. A window has areas of one run at most, and a cell that tells which. There
//! are far fewer cells than windows, a cell serves many; but never two at a time: where the cell of a window is taken by
//! another run, the window's areas go without. So a look-up is one load: either the cell's run has the area, or no run has.
//!
//! Only the holder of the allocator's lock enters runs, makes them shared, and takes them out. That another CPU has freed an
//! area of a shared run is noted in its cell by that CPU: a hint.

use core::ops::Range;
use core::ptr::NonNull;

use super::{REACH_GRANULES, Run};
use crate::metadata::{BlockLayout, MetaSlice};
use crate::sync::{AtomicU64, Ordering, full_fence};
use crate::unit::GRANULE_BYTES;

/// Granules of a window, as a shift.
const WINDOW_SHIFT: u32 = 5;

/// Bytes of a window.
pub(super) const WINDOW_BYTES: usize = GRANULE_BYTES << WINDOW_SHIFT;

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
        let cells = (cpus as usize * 256).next_power_of_two().clamp(1024, 8192);
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
    /// From a hash of 32 bits to an index: 32 less the binary logarithm of the number of cells.
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
        debug_assert!((hash as usize) < self.cells.len());
        // SAFETY: there are two to the power of `32 - shift` cells, and at least two.
        unsafe { self.cells.get_unchecked(hash as usize) }
    }

    /// The cells of the windows that a run's areas start in; one may come more than once.
    #[inline]
    fn cells_of(&self, run: Run) -> impl Iterator<Item = &AtomicU64> {
        let (start, last) = (run.start(0), run.start(run.slots() - 1));
        // Areas that are shorter than a window start in every one from the first to the last.
        let step = run.class().len().max(1 << WINDOW_SHIFT);
        let before = (start..last).step_by(step as usize);
        before.chain([last]).map(|granule| self.cell(granule))
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

    /// Which of the areas of 32 granules belong to a run: bit `i` is the area that starts `i` granules behind `first`, the first
    /// of a window.
    #[inline]
    pub(crate) fn entered_among(&self, first: usize, areas: u32) -> u32 {
        const { assert!(1 << WINDOW_SHIFT == u32::BITS) };
        debug_assert!(first.is_multiple_of(1 << WINDOW_SHIFT));
        if first >= REACH_GRANULES {
            return 0;
        }
        let first = first as u32;
        match self.cell(first).load(Ordering::Acquire) {
            0 => 0,
            bits => entered_among(Run::from_bits(bits), first, areas),
        }
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
        let is_free = |cell: &AtomicU64| cell.load(Ordering::Relaxed) == 0;
        if self.cells_of(run).all(is_free) {
            return 0..run.slots();
        }
        let is_free = |slot: &u32| is_free(self.cell(run.start(*slot)));
        let start = (0..run.slots()).find(is_free).unwrap_or(run.slots());
        let end = (start..run.slots()).find(|slot| !is_free(slot));
        start..end.unwrap_or(run.slots())
    }

    /// Enters a run that is one [`stretch`](Self::stretch).
    pub(crate) fn enter(&self, run: Run) {
        for cell in self.cells_of(run) {
            cell.store(run.bits(), Ordering::Release);
        }
    }

    /// Takes a run out; says whether other CPUs have freed areas of it.
    pub(crate) fn remove(&self, run: Run) -> bool {
        let mut is_shared = false;
        for cell in self.cells_of(run) {
            let was = cell.swap(0, Ordering::AcqRel);
            is_shared |= Run::from_bits(was).is_shared();
        }
        is_shared
    }

    /// Whether somebody has freed an area of an entered run by its mark, or was about to.
    pub(crate) fn is_shared(&self, run: Run) -> bool {
        self.cells_of(run)
            .any(|cell| Run::from_bits(cell.load(Ordering::Acquire)).is_shared())
    }

    /// Makes a run a shared one: from now on its areas are freed by marks only.
    pub(crate) fn share(&self, run: Run) {
        for cell in self.cells_of(run) {
            // What others note there since it is shared stays.
            cell.fetch_or(run.shared().bits(), Ordering::Release);
        }
    }

    /// Notes that the area at `granule` has been marked as freed, by a LOCKed step; false if it does not belong to the run any
    /// more. If it still does, whoever takes the run out finds it shared, and finds the mark.
    #[inline]
    pub(crate) fn note_marked(&self, granule: u32, run: Run) -> bool {
        full_fence();
        let cell = self.cell(granule);
        let bits = cell.load(Ordering::Relaxed);
        run.is_shared() && run.is_but_for_foreign(bits) || self.note_marked_anew(cell, bits, run)
    }

    /// [`note_marked`](Self::note_marked) of a run that is not the shared one in its cell.
    #[cold]
    #[inline(never)]
    fn note_marked_anew(&self, cell: &AtomicU64, mut bits: u64, run: Run) -> bool {
        let name = run.unshared();
        while Run::from_bits(bits).unshared() == name {
            if Run::from_bits(bits).is_shared() {
                return true;
            }
            match cell.compare_exchange(
                bits,
                name.foreign().bits(),
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(found) => bits = found,
            }
        }
        false
    }

    /// Notes that another CPU has freed the area at `granule`, of a shared run. If the run is no more, nothing happens.
    pub(crate) fn note_foreign(&self, granule: u32, run: Run) {
        let (bits, foreign) = (run.shared().bits(), run.foreign().bits());
        // A hint for the next collection.
        _ = self.cell(granule).compare_exchange(
            bits,
            foreign,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
    }

    /// Whether another CPU has freed areas of a shared run since that was taken last.
    pub(crate) fn is_foreign(&self, run: Run) -> bool {
        let foreign = run.foreign().bits();
        self.cells_of(run)
            .any(|cell| cell.load(Ordering::Relaxed) == foreign)
    }

    /// The same, and takes it.
    pub(crate) fn take_foreign(&self, run: Run) -> bool {
        let (bits, foreign) = (run.shared().bits(), run.foreign().bits());
        let mut is_foreign = false;
        for cell in self.cells_of(run) {
            is_foreign |= cell
                .compare_exchange(foreign, bits, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        }
        is_foreign
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

/// Which of the areas of a window belong to `run`.
fn entered_among(run: Run, first: u32, areas: u32) -> u32 {
    let (mut left, mut entered) = (areas, 0);
    while left != 0 {
        let at = left.trailing_zeros();
        left &= left - 1;
        entered |= u32::from(run.slot_at(first + at).is_some()) << at;
    }
    entered
}
