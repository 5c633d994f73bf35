//! Which areas belong to a run, and to which: looked up by address, without a lock.
//!
//! Addresses are divided into windows of 128 bytes. A window has areas of one run at most, and a cell that tells which. There
//! are far fewer cells than windows, a cell serves many; but never two at a time: where the cell of a window is taken by
//! another run, the window's areas go without. So a look-up is one load: either the cell's run has the area, or no run has.
//! The low bits of a window's number are those of its cell: a mask, which whoever frees waits for less than for a hash.
//!
//! To each cell belongs a *guide*: what the distance from the run's start is multiplied by to get the slot, and where the run's pair is.
//! Whoever puts an area back into a run of the CPU needs no more. It is a hint: it may be that of a run that was in the cell before, or
//! comes after. A slot is one only if the run has it where the area is, and a pair names its run.
//!
//! Only the holder of the allocator's lock enters runs, makes them shared, and takes them out. That another CPU has freed an
//! area of a shared run is noted in its cell by that CPU: a hint.

use core::ops::Range;
use core::ptr::NonNull;

use super::{CPU, Guide, IS_CLOSED, IS_FOREIGN, IS_SHARED, REACH_GRANULES, Run};
use crate::metadata::{BlockLayout, MetaSlice};
use crate::sync::{AtomicU32, AtomicU64, Ordering, full_fence};
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
    guides: usize,
    guides_at: usize,
}

/// Guides, at most. Where there are more cells some have one guide: that of the run that was entered last.
const MOST_GUIDES: usize = 4096;

impl CellsLayout {
    /// Adds cells for the runs of so many CPUs to `block`.
    pub(crate) fn add(
        block: &mut BlockLayout,
        cpus: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        let cells = (cpus as usize * 256).next_power_of_two().clamp(1024, 8192);
        let guides = cells.min(MOST_GUIDES);
        Ok(Self {
            cells,
            at: block.array::<AtomicU64>(cells)?,
            guides,
            guides_at: block.array::<AtomicU32>(guides)?,
        })
    }
}

/// The table; an entry of 0 is empty.
#[derive(Debug)]
pub(crate) struct Cells {
    cells: MetaSlice<AtomicU64>,
    /// The [`Guide`] of each cell's run, or of another. In a table of their own: who finds no run does not fetch them.
    guides: MetaSlice<AtomicU32>,
    /// The bits of a window's number that tell its cell.
    mask: u32,
    /// Those that tell its guide.
    guide_mask: u32,
}

/// What a cell tells at first sight of an area that is to be put back.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Look {
    /// It belongs to no run.
    NoRun,
    /// It is one of a run that only its CPU frees areas of.
    Own {
        run: Run,
        slot: u32,
        /// Where the run's pair is in its CPU's table, in bytes: most likely. It is some pair's place.
        pair_at: usize,
    },
    /// [`Cells::find`] tells.
    Unclear,
}

impl Cells {
    /// An empty table.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, and nothing else uses this part of it while
    /// the table lives.
    pub(crate) unsafe fn new(block: NonNull<u8>, layout: &CellsLayout) -> Self {
        // SAFETY: the promise of the caller.
        let (cells, guides) = unsafe {
            (
                MetaSlice::filled(block, layout.at, layout.cells, AtomicU64::default),
                MetaSlice::filled(block, layout.guides_at, layout.guides, AtomicU32::default),
            )
        };
        Self {
            cells,
            guides,
            mask: layout.cells as u32 - 1,
            guide_mask: layout.guides as u32 - 1,
        }
    }

    #[inline(always)]
    fn cell(&self, granule: u32) -> &AtomicU64 {
        let index = (granule >> WINDOW_SHIFT) & self.mask;
        // SAFETY: the mask is the number of cells, a power of two, less one.
        unsafe { self.cells.get_unchecked(index as usize) }
    }

    #[inline(always)]
    fn guide(&self, granule: u32) -> &AtomicU32 {
        let index = (granule >> WINDOW_SHIFT) & self.guide_mask;
        // SAFETY: as above, of the guides.
        unsafe { self.guides.get_unchecked(index as usize) }
    }

    /// The cells of the windows that a run's areas start in; one may come more than once.
    #[inline]
    fn cells_of(&self, run: Run) -> impl Iterator<Item = &AtomicU64> {
        starts_of(run).map(|granule| self.cell(granule))
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

    /// What the cell of `granule` tells whoever wants to put the area there back.
    #[inline(always)]
    pub(crate) fn look(&self, granule: u32) -> Look {
        let bits = self.cell(granule).load(Ordering::Acquire);
        if bits == 0 {
            return Look::NoRun;
        }
        // What says that a run is not its CPU's own stands above all that a run is.
        const {
            assert!(
                IS_FOREIGN >> (CPU.0 + CPU.1) == 1
                    && IS_FOREIGN < IS_SHARED
                    && IS_SHARED < IS_CLOSED
            )
        };
        if bits >= IS_FOREIGN {
            return Look::Unclear;
        }
        let run = Run::from_bits(bits);
        // Another run's, perhaps.
        let guide = Guide::from_bits(self.guide(granule).load(Ordering::Relaxed));
        match run.slot_by(granule, guide.reciprocal()) {
            Some(slot) => Look::Own {
                run,
                slot,
                pair_at: guide.pair_at(),
            },
            None => Look::Unclear,
        }
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
        // SAFETY: the arrays are there (promise of the caller), and consist of atomic values.
        unsafe {
            Self {
                cells: MetaSlice::view(self.cells.as_ptr(), self.cells.len()),
                guides: MetaSlice::view(self.guides.as_ptr(), self.guides.len()),
                mask: self.mask,
                guide_mask: self.guide_mask,
            }
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
        let guide = Guide::of(run).bits();
        for granule in starts_of(run) {
            self.guide(granule).store(guide, Ordering::Relaxed);
            self.cell(granule).store(run.bits(), Ordering::Release);
        }
    }

    /// Has the guide of a granule be that of another run.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn mislead(&self, granule: u32, other: Run) {
        let guide = Guide::of(other).bits();
        self.guide(granule).store(guide, Ordering::Relaxed);
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
        let cell = self.cell(granule);
        _ = cell.compare_exchange(bits, foreign, Ordering::Relaxed, Ordering::Relaxed);
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

/// A granule in each window that a run's areas start in; of one window it may be two.
#[inline]
fn starts_of(run: Run) -> impl Iterator<Item = u32> {
    let (start, last) = (run.start(0), run.start(run.slots() - 1));
    // Areas that are shorter than a window start in every one from the first to the last.
    let step = run.class().len().max(1 << WINDOW_SHIFT);
    (start..last).step_by(step as usize).chain([last])
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Class;
    use crate::unit::CpuId;
    use std::alloc;
    use std::vec::Vec;

    fn with_cells(cpus: u32, act: impl FnOnce(&Cells)) {
        let mut block = BlockLayout::new();
        let layout = CellsLayout::add(&mut block, cpus).unwrap();
        let whole = block.finish();
        // SAFETY: it is not empty.
        let memory = NonNull::new(unsafe { alloc::alloc(whole) }).unwrap();
        // SAFETY: the memory is as the layout wants it, and nobody else's.
        act(&unsafe { Cells::new(memory, &layout) });
        // SAFETY: it was allocated so, and the cells are gone.
        unsafe { alloc::dealloc(memory.as_ptr(), whole) };
    }

    fn run(cpu: u32, bytes: usize, base: u32, slots: u32) -> Run {
        let closed = Run::closed(CpuId::new(cpu)).unwrap();
        Run::open(closed, Class::of(bytes, 4).unwrap(), base, slots)
    }

    /// A look finds what [`Cells::find`] finds of a run that is its CPU's own, and leaves all else to it.
    #[track_caller]
    fn assert_look(cells: &Cells, granules: Range<u32>) {
        for granule in granules {
            let found = cells.find(granule);
            match cells.look(granule) {
                Look::NoRun => assert_eq!(found, None, "{granule}"),
                Look::Own { run, slot, pair_at } => {
                    assert_eq!(found, Some((run, slot)), "{granule}");
                    assert_eq!(pair_at, run.class().table_offset(), "{granule}");
                    assert!(!run.is_shared());
                }
                Look::Unclear => {
                    assert!(found.is_none_or(|(run, _)| run.is_shared()), "{granule}");
                }
            }
        }
    }

    #[test]
    fn a_look_tells_what_there_is() {
        with_cells(1, |cells| {
            let runs = [
                run(0, 8, 32, 32),
                run(1, 92, 1000, 9),
                run(0, 4092, 4096, 2),
            ];
            runs.iter().for_each(|run| cells.enter(*run));
            assert_look(cells, 0..8000);
            let owned: Vec<_> = (0..8000)
                .filter(|&granule| matches!(cells.look(granule), Look::Own { .. }))
                .collect();
            assert_eq!(owned.len(), 32 + 9 + 2);
            cells.share(runs[1]);
            assert_look(cells, 0..8000);
            assert!(matches!(cells.look(1000), Look::Unclear));
            cells.note_foreign(1000, runs[1].shared());
            assert!(matches!(cells.look(1000), Look::Unclear));
            // Another one takes the first one's cells, whose areas are of another length.
            cells.remove(runs[0]);
            assert!(matches!(cells.look(32), Look::NoRun));
            cells.enter(run(1, 12, 33, 5));
            assert_look(cells, 0..8000);
        });
    }

    /// Windows side by side have cells of their own, however long the stretch, until all are taken.
    #[test]
    fn a_run_is_in_nobodys_way_but_at_the_tables_distance() {
        with_cells(1, |cells| {
            let windows = cells.cells.len() as u32;
            let long = run(0, 1024, 0, 32);
            cells.enter(long);
            let last = 31 * 256;
            for at in [last + 32, windows * 32 - 32] {
                assert_eq!(cells.stretch(run(0, 64, at, 2)), 0..2, "{at}");
            }
            assert_eq!(cells.stretch(run(0, 64, windows * 32, 2)), 2..2);
        });
    }

    /// Where there are more cells than guides, the run that was entered first is left to [`Cells::find`].
    #[test]
    fn runs_that_share_a_guide() {
        with_cells(64, |cells| {
            let apart = MOST_GUIDES as u32 * 32;
            assert!(cells.cells.len() > MOST_GUIDES && cells.guides.len() == MOST_GUIDES);
            let runs = [run(5, 8, 32, 16), run(6, 12, apart + 32, 10)];
            runs.iter().for_each(|run| cells.enter(*run));
            for slot in 1..10 {
                let [first, second] = runs.map(|run| run.start(slot));
                assert_eq!(cells.find(first), Some((runs[0], slot)));
                assert_eq!(cells.find(second), Some((runs[1], slot)));
                assert!(matches!(cells.look(first), Look::Unclear));
                assert!(matches!(cells.look(second), Look::Own { slot: own, .. } if own == slot));
            }
            // The first slot is where the run starts, whatever the guide. Its pair is another one.
            let Look::Own { run, pair_at, .. } = cells.look(32) else {
                panic!("it is the start of a run");
            };
            assert_eq!((run, pair_at), (runs[0], runs[1].class().table_offset()));
        });
    }
}
