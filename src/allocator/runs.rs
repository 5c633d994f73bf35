//! What the holder of the lock does for the per-CPU caches: sets them up, closes runs ([`refill`](super::refill) opens them), and
//! looks into those of other CPUs.
//!
//! A run's areas are live areas of their chunk, taken at one go. When the run is closed, those that are free in it go back to
//! the chunk; the others stay what they are, areas that are freed by their marks. An area of a run that another CPU frees is
//! marked as freed, and left alone by sweeps until the run gets it back or is closed.
//!
//! Invariants: an area is free in one run at most, and then it is marked as live. The cells of a run are entered before it
//! is opened and taken out after it is closed.

use core::ptr::NonNull;

use lock_api::RawMutex;

use super::state::{CacheView, State, Taken};
use super::{PerCpuAllocator, WATCHED};
use crate::backing::{Backing, BackingError, Context};
use crate::cache::{
    Cells, CellsLayout, Class, REACH_GRANULES, ROWS_BYTES, RUNS, Run, STASHES_AT, Seat, Stash,
    TABLE_BYTES,
};
use crate::chunk::Chunk;
use crate::metadata::BlockLayout;
use crate::places::Place;
use crate::request::{FreeError, FreeFlags, Request, SetupError};
use crate::stats::Event;
use crate::sync::{self, AtomicU32, AtomicU64, Ordering};
use crate::this_cpu::Pair;
use crate::this_cpu::slots::{FRESH, FULL, MAP, ONE_TAKEN};
use crate::unit::{CpuId, GRANULE_BYTES};

/// Areas that a run must have got back from other CPUs to go on rather than make way for another.
const WORTH_COLLECTING: u32 = if cfg!(all(loom, test)) { 2 } else { 4 };

/// What the names of what is stashed take of every unit.
const ROWS_GRANULES: u32 = (ROWS_BYTES / GRANULE_BYTES) as u32;

/// The per-CPU caches of an instance.
#[derive(Debug)]
pub(super) struct Caches {
    /// Neutral address of the tables of runs.
    pub(super) table: usize,
    /// Neutral address of the rows that the names stand in of what is stashed, if each does not stand in the area that was stashed next.
    rows: Option<usize>,
    pub(super) cells: Cells,
    /// Not 0 while another CPU's runs are being closed.
    pub(super) gate: AtomicU32,
    /// Granules that a stash may name, about.
    stash_granules: AtomicU32,
    /// The block that holds the cells.
    pub(super) block: (NonNull<u8>, core::alloc::Layout),
}

impl Caches {
    /// Where the stash for areas of `len` granules is.
    #[inline]
    pub(super) fn stash_of(&self, len: u32) -> usize {
        self.table + STASHES_AT + Stash::table_offset(len)
    }

    /// Where the name stands that is before what was put last into the stash at `at`, which names `depth` areas with that; `None` if it
    /// stands in what was put last.
    #[inline(always)]
    pub(super) fn name_at(&self, at: usize, depth: u32) -> Option<usize> {
        Some(self.rows? + Stash::name_offset(at - self.table - STASHES_AT, depth))
    }

    /// Bytes of memory that holds nothing but names.
    pub(super) fn rows_bytes(&self) -> u64 {
        self.rows.map_or(0, |_| ROWS_BYTES as u64)
    }

    /// Whether the area at a neutral address is one of the caches' own.
    #[inline]
    pub(super) fn is_own(&self, address: usize) -> bool {
        address == self.table || Some(address) == self.rows
    }

    /// Where all stashes are.
    pub(super) fn stashes(&self) -> impl Iterator<Item = usize> + use<> {
        let table = self.table + STASHES_AT;
        Stash::table_offsets().map(move |at| table + at)
    }

    /// Sets how many granules a stash may name.
    pub(super) fn set_stash_granules(&self, granules: u32) {
        if self.stash_granules() != granules {
            self.stash_granules.store(granules, Ordering::Relaxed);
        }
    }

    /// Granules that a stash may name, about.
    #[inline]
    pub(super) fn stash_granules(&self) -> u32 {
        self.stash_granules.load(Ordering::Relaxed)
    }
}

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Puts a cache in front of the instance for every CPU: [`allocate_at`](Self::allocate_at) and
    /// [`free_at`](Self::free_at) use it. An instance that [is hardened](Self::harden) stays without.
    ///
    /// It takes 1,792 bytes of every unit in the first chunk, and what the policy grants for
    /// [names](super::Policy::names_in_rows).
    ///
    /// # Errors
    /// [`SetupError`] if there is no memory for it; then the instance stays as it was.
    pub fn enable_caches(&mut self) -> Result<(), SetupError> {
        if self.caches.is_some() || self.is_hardened() {
            return Ok(());
        }
        let mut block = BlockLayout::new();
        let layout = CellsLayout::add(&mut block, self.units.possible().count())
            .map_err(|_| SetupError::Backing(BackingError::OutOfMetadata))?;
        let layouts = block.finish();
        let block = self
            .backing
            .allocate_metadata(layouts, Context::MaySleep)
            .map_err(SetupError::Backing)?;
        let granules = (TABLE_BYTES / GRANULE_BYTES) as u32;
        let align = 64 / GRANULE_BYTES as u32;
        let state = self.state.get_mut();
        // The tables lie in the first chunk, which every CPU has.
        let Some(Taken { area, chunk, .. }) = state.take_in_first_chunk(granules, align) else {
            // SAFETY: allocated above with this layout, and not used.
            unsafe { self.backing.free_metadata(block, layouts) };
            return Err(SetupError::Backing(BackingError::OutOfFrames));
        };
        let (offset, _) = state.hand_out_area(chunk, area);
        let table = self.geometry.window.base + offset;
        let wants_rows = self.policy.names_in_rows;
        let rows = wants_rows.then(|| state.take_in_first_chunk(ROWS_GRANULES, align));
        // What names are there does not matter.
        let rows = rows
            .flatten()
            .map(|rows| self.geometry.window.base + state.hand_out(&rows).0);
        self.zero(table, TABLE_BYTES);
        // SAFETY: the block has just been allocated with the layout that the cells were added to.
        let cells = unsafe { Cells::new(block, &layout) };
        let state = self.state.get_mut();
        state.metadata_grew(layouts.size());
        // SAFETY: the cells stay as long as the instance.
        let view = unsafe { cells.view() };
        let page_bytes = self.geometry.sizes.page_bytes();
        state.use_caches(CacheView {
            cells: view,
            pitch: self.geometry.window.pitch_bytes / GRANULE_BYTES,
            largest_pages: self.geometry.max_alloc_bytes.div_ceil(page_bytes) as u32 + 1,
        });
        self.caches = Some(Caches {
            table,
            rows,
            cells,
            gate: AtomicU32::new(0),
            stash_granules: AtomicU32::new(0),
            block: (block, layouts),
        });
        self.set_watched(self.has_sign(WATCHED));
        Ok(())
    }

    /// Whether the instance has caches.
    pub fn has_caches(&self) -> bool {
        self.caches.is_some()
    }

    /// Tells a CPU's pair whose it is, if it has memory; false if it cannot have runs.
    pub(super) fn introduce(&self, at: usize, cpu: CpuId) -> bool {
        let has_memory = self.units.materialised().contains(cpu);
        let (Some(closed), Some([_, run])) = (Run::closed(cpu), self.pair_of(at, cpu)) else {
            return false;
        };
        if has_memory {
            self.units.with_runs.insert(cpu);
            // Whoever comes first. The pair's own CPU leaves it alone until then.
            _ = run.compare_exchange(0, closed.bits(), Ordering::Release, Ordering::Relaxed);
        }
        has_memory
    }

    /// A CPU's copy of the pair at a neutral address, to look at.
    pub(super) fn pair_of(&self, at: usize, cpu: CpuId) -> Option<&[AtomicU64; 2]> {
        let copy = self.units.copy_of(at, cpu).ok()?;
        // SAFETY: the tables live as long as the instance, on every CPU that has memory.
        Some(unsafe { sync::words_at(copy) })
    }

    /// What a CPU's pair is; of two moments if it changes meanwhile.
    pub(super) fn peek(&self, at: usize, cpu: CpuId) -> Option<Pair> {
        let [slots, run] = self.pair_of(at, cpu)?;
        let run = run.load(Ordering::Acquire);
        Some([slots.load(Ordering::Acquire), run])
    }

    /// The granule of the window that an address is, if runs can lie there.
    pub(super) fn run_granule(&self, address: usize) -> Option<u32> {
        let granule = address.wrapping_sub(self.geometry.window.base) / GRANULE_BYTES;
        (granule < REACH_GRANULES).then_some(granule as u32)
    }

    /// Frees an area of a run without being its CPU, or without knowing.
    #[inline(always)]
    pub(super) fn free_in_run(
        &self,
        caches: &Caches,
        address: usize,
        flags: FreeFlags,
        (run, slot): (Run, u32),
    ) -> Result<(), FreeError> {
        let not_allocated = FreeError::NotAllocated { address };
        let start = ((address - self.geometry.window.base) / GRANULE_BYTES) as u32;
        let (place, granule) = self.place_of(start);
        let offset = granule as usize * GRANULE_BYTES;
        let at = caches.table + run.class().table_offset();
        let Some(pair) = self.pair_of(at, run.cpu()) else {
            return Err(not_allocated);
        };
        let is_free = || is_free_in(pair, run, slot);
        if is_free() {
            return Err(not_allocated);
        }
        let is_marked = match self.has_sign(WATCHED) {
            false => self.places.mark(place, granule),
            true => self.mark_watched(run, (place, offset), flags)?,
        };
        if !is_marked {
            return Err(not_allocated);
        }
        if is_free() && self.undo_mark(caches, flags, (place, offset), (run, slot)) {
            return Err(not_allocated);
        }
        // The run finds the mark. If there is no such run any more, sweeps should.
        if !caches.cells.note_marked(start, run) {
            self.places.note(place, granule);
        }
        Ok(())
    }

    /// Marks an area of a run as freed, and tells the hook before anyone can get the area: with the lock held.
    #[cold]
    fn mark_watched(
        &self,
        run: Run,
        (place, offset): (u32, usize),
        flags: FreeFlags,
    ) -> Result<bool, FreeError> {
        let state = self
            .lock(flags.contains(FreeFlags::TRY))
            .ok_or(FreeError::Busy)?;
        let is_marked = self.places.mark(place, (offset / GRANULE_BYTES) as u32);
        if let Some(hook) = state.hook
            && is_marked
        {
            hook.event(&Event::Free {
                bytes: run.class().len() as usize * GRANULE_BYTES,
                address: self.neutral(place) + offset,
                at: (place, offset),
            });
        }
        Ok(is_marked)
    }

    /// Takes a mark back from an area that is free in its run: its own CPU was given it at the same moment. False if it is
    /// not so: the run has got the area back meanwhile, as it should.
    #[cold]
    fn undo_mark(
        &self,
        caches: &Caches,
        flags: FreeFlags,
        (place, offset): (u32, usize),
        (run, slot): (Run, u32),
    ) -> bool {
        let Some(mut state) = self.lock(flags.contains(FreeFlags::TRY)) else {
            return false;
        };
        let Place::Chunk(chunk) = state.directory.get(place) else {
            return false;
        };
        let body = state.body(chunk);
        let granule = body.granule(offset);
        // Runs get areas back with the lock held: if it is free before and after a look at the mark, it was so all the time. Or the
        // run has got it back, and the mark is that of whom it was handed out to since.
        let is_free = || self.is_free_in(caches, run, slot);
        let is_both = is_free()
            && body.map.is_freed(granule)
            && is_free()
            && body.map.reuse(granule, run.class().len());
        match is_both {
            true => state.stats.late_errors += 1,
            // Who looks for an area of that length, and finds none, may leave something to sweep.
            false => state.directory.note_freed(place),
        }
        is_both
    }

    /// The chunk of a run, and the granule of its map that the run begins with.
    fn chunk_of(&self, state: &State, run: Run) -> Option<(NonNull<Chunk>, u32, u32)> {
        let address = self.geometry.window.base + run.base() as usize * GRANULE_BYTES;
        let (place, offset) = self.locate(address)?;
        match state.directory.get(place) {
            Place::Chunk(chunk) => Some((chunk, state.body(chunk).granule(offset), place)),
            Place::Vacant | Place::Parked(_) | Place::Busy => None,
        }
    }

    /// An area of the current CPU's run if that is a shared one, used up, and gets areas back that other CPUs have freed: for the
    /// holder of the lock, before it looks at anything else.
    pub(super) fn collect_shared(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        request: &Request,
        class: Class,
    ) -> Option<usize> {
        let at = caches.table + request.key.run_at();
        // SAFETY: the table lives on every CPU, and its pairs are changed by a seat's operations with this gate only.
        let pair = unsafe { seat.peek_pair(at)? };
        let run = Run::from_bits(pair[1]);
        // Those that only the cells know to be shared come later.
        let is_used_up = run.class() == class && pair[0] & (FULL | MAP) == 0;
        let may_collect = is_used_up && run.is_shared() && self.is_worth_collecting(run);
        // A run that is its own CPU's again makes way for one that is not shared.
        if !may_collect || !caches.cells.is_foreign(run) {
            return None;
        }
        let address = self.collect(caches, seat, (at, pair))?;
        caches.cells.take_foreign(run);
        Some(address)
    }

    /// Gets back for a run that is used up those of its areas that other CPUs have freed, with the lock held; one of them is the
    /// caller's.
    pub(super) fn collect(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        (at, pair): (usize, Pair),
    ) -> Option<usize> {
        let run = Run::from_bits(pair[1]);
        let (place, granule) = self.place_of(run.base());
        let (len, slots) = (run.class().len(), run.slots());
        let back = self.places.reuse_among(place, granule, len, slots);
        if back == 0 {
            return None;
        }
        let free = u64::from(back & (back - 1));
        let new = [(pair[0] & !FRESH | free) + ONE_TAKEN, pair[1]];
        // SAFETY: as in `collect_shared`.
        if unsafe { seat.replace_pair_gated(at, pair, new, &caches.gate) } {
            let start = run.start(back.trailing_zeros());
            return Some(self.geometry.window.base + start as usize * GRANULE_BYTES);
        }
        // The caller is on another CPU by now: as it was.
        for slot in (0..slots).filter(|slot| back >> slot & 1 != 0) {
            self.places.mark(place, granule + slot * len);
        }
        None
    }

    /// Whether other CPUs have freed enough areas of a run for it to go on.
    pub(super) fn is_worth_collecting(&self, run: Run) -> bool {
        self.freed_in(run).count_ones() >= WORTH_COLLECTING
    }

    /// Which areas of a run are marked as freed.
    fn freed_in(&self, run: Run) -> u32 {
        let (place, granule) = self.place_of(run.base());
        let len = run.class().len();
        self.places.freed_among(place, granule, len, run.slots())
    }

    /// Gives the areas back that are free in a run that has been closed.
    pub(super) fn retire_run(&self, caches: &Caches, state: &mut State, [slots, run]: Pair) {
        let run = Run::from_bits(run);
        let is_shared = caches.cells.remove(run);
        let len = run.class().len();
        let bytes = len as usize * GRANULE_BYTES;
        state.count_taken(slots, bytes);
        let Some((chunk, base, place)) = self.chunk_of(state, run) else {
            debug_assert!(false, "a run without a chunk");
            return;
        };
        let mut free = slots & MAP;
        while free != 0 {
            let first = free.trailing_zeros();
            let end = first + (free >> first).trailing_ones();
            let areas = base + first * len..base + end * len;
            state.give_back_areas(chunk, areas, len);
            state.count_unused(end - first, bytes);
            free &= u64::MAX << end;
        }
        if is_shared {
            let first = self.places_granule(state, chunk, base);
            (0..run.slots()).for_each(|slot| self.places.note(place, first + slot * len));
        }
    }

    /// The granule of the unit that a granule of the chunk's map is.
    fn places_granule(&self, state: &State, chunk: NonNull<Chunk>, granule: u32) -> u32 {
        (state.body(chunk).byte_offset(granule) / GRANULE_BYTES) as u32
    }

    /// Calls `act` for every pair of every CPU that has had a run.
    pub(super) fn for_each_pair(&self, caches: &Caches, mut act: impl FnMut(usize, CpuId)) {
        for cpu in self.units.with_runs.iter() {
            for index in 0..RUNS {
                act(caches.table + index * size_of::<Pair>(), cpu);
            }
        }
    }

    /// Calls `act` for every open run with its first word.
    pub(super) fn for_each_run(&self, mut act: impl FnMut(Run, u64)) {
        let Some(caches) = &self.caches else {
            return;
        };
        self.for_each_pair(caches, |at, cpu| {
            if let Some([slots, run]) = self.peek(at, cpu)
                && Run::from_bits(run).is_open()
            {
                act(Run::from_bits(run), slots);
            }
        });
    }

    /// Whether the live area at a neutral address is nobody's: free in a run, or the caches' own.
    pub(super) fn is_own(&self, address: usize) -> bool {
        let Some(caches) = &self.caches else {
            return false;
        };
        let run = self
            .run_granule(address)
            .and_then(|granule| caches.cells.find(granule));
        caches.is_own(address) || run.is_some_and(|(run, slot)| self.is_free_in(caches, run, slot))
    }

    /// Whether the tables of runs, or the rows of names, lie at a neutral address.
    #[inline]
    pub(super) fn is_table(&self, address: usize) -> bool {
        self.caches
            .as_ref()
            .is_some_and(|caches| caches.is_own(address))
    }

    /// Whether an area is free in its run.
    fn is_free_in(&self, caches: &Caches, run: Run, slot: u32) -> bool {
        let at = caches.table + run.class().table_offset();
        self.pair_of(at, run.cpu())
            .is_some_and(|pair| is_free_in(pair, run, slot))
    }

    /// How many areas of a run nobody has: those that are free in it, and those that other CPUs have freed.
    pub(super) fn idle_in(&self, run: Run, slots: u64) -> u32 {
        // The word may be of another run by now.
        let all = u32::MAX >> (u32::BITS - run.slots());
        // One that is handed out and freed between the two looks is in both.
        ((slots as u32 | self.freed_in(run)) & all).count_ones()
    }

    /// Takes out of the counters what is free in runs, and counts what runs have handed out.
    pub(super) fn settle_counters(&self, stats: &mut crate::stats::Stats) {
        self.for_each_run(|run, slots| {
            let bytes = run.class().len() as usize * GRANULE_BYTES;
            stats.leave_out(self.idle_in(run, slots).into(), bytes);
            stats.count_taken(slots, bytes);
        });
        self.count_stashes(stats);
        stats.frees = stats.allocs - stats.live;
    }
}

/// Whether an area is free in its run, whose pair this is.
#[inline]
fn is_free_in([slots, found]: &[AtomicU64; 2], run: Run, slot: u32) -> bool {
    // Most often it is not, whatever the run is.
    if slots.load(Ordering::Acquire) >> slot & 1 == 0 {
        return false;
    }
    let is_it = || Run::from_bits(found.load(Ordering::Acquire)).unshared() == run.unshared();
    // Of one moment: a run that was closed is not opened again under its name while somebody has an area of it.
    is_it() && {
        let slots = slots.load(Ordering::Acquire);
        is_it() && slots >> slot & 1 != 0
    }
}
