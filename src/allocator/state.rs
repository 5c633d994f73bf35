//! What the allocator's lock guards: the directory of chunks, the lists of spare and drainable chunks, the counters.
//!
//! Whoever has a `&mut State` holds the lock. Bodies of chunks are changed through [`State::edit`] only, which keeps
//! the sums, the lists and the directory in step with them.

use core::ops::Range;
use core::ptr::NonNull;

use intrusive_collections::{LinkedList, UnsafeRef};

use crate::backing::BackingError;
use crate::cache::Cells;
use crate::chunk::area_map::NoArea;
use crate::chunk::{Body, Chunk, ChunkAdapter, Counts, Membership};
use crate::directory::{Directory, Room};
use crate::places::Place;
use crate::stats::{EventHook, Stats};
use crate::unit::{GRANULE_BYTES, UnitSizes};

pub(super) use placing::{Growth, Taken};

mod counting;
mod many;
mod placing;

/// Frees and allocations that pass before a spare chunk that could not be made is tried again; twice as many each time.
const RETRY_AFTER: u32 = 16;

/// Pages that an instance has at least that grows before it sweeps.
const LARGE_PAGES: u64 = 2048;
/// By how much, as a divisor.
const UNSWEPT_SHARE: u64 = 64;

/// Calls that populate pages or give them back, and that began in one phase: between two changes of the set of CPUs that
/// pages are populated for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Batch {
    pub(super) phase: usize,
    /// A CPU was being brought up then.
    pub(super) is_bring_up: bool,
}

/// A vacant place that has been claimed for a chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct VacantPlace {
    pub(super) at: u32,
    /// The metadata of the chunk that was there before.
    pub(super) parked: Option<NonNull<Chunk>>,
}

/// What the caches of an instance have to do with its memory.
pub(super) struct CacheView {
    /// Which areas belong to runs.
    pub(super) cells: Cells,
    /// From one place to the next, in granules of the window.
    pub(super) pitch: usize,
    /// What the largest request takes.
    pub(super) largest_pages: u32,
}

/// What changes about an instance.
pub(super) struct State {
    pub(super) directory: Directory,
    /// The chunk of the reserved region.
    pub(super) reserved: Option<NonNull<Chunk>>,
    spare: LinkedList<ChunkAdapter>,
    drain: LinkedList<ChunkAdapter>,
    pub(super) stats: Stats,
    pub(super) hook: Option<&'static dyn EventHook>,
    /// Spare chunks that atomic requests have taken, or would have, since the last upkeep.
    pub(super) spares_wanted: u32,
    /// An atomic request has had to populate pages since the last upkeep, and such pages as it found none of are worth having.
    pub(super) pages_wanted: bool,
    /// Frees and allocations to pass before a spare chunk may be tried again that could not be made.
    retry_in: u32,
    /// What `retry_in` starts from the next time.
    retry_after: u32,
    /// Areas freed since memory was last given back.
    pub(super) frees_since: u32,
    /// Places whose chunk is being made or destroyed.
    pub(super) busy_places: u32,
    /// A CPU is being brought up: no page may lose its memory meanwhile.
    pub(super) is_bring_up: bool,
    /// Who waits for the work without the lock to end: none begins meanwhile.
    pub(super) rest_wanted: u32,
    /// Populating and giving back under way, by phase.
    works: [u32; 2],
    phase: usize,
    /// How much memory had come when some of a CPU's runs were looked at last.
    pub(super) grown_when_looked: u64,
    caches: Option<CacheView>,
    /// Pages that are needed for what was live at most when nothing was left to be swept, and that.
    needed_pages: u64,
    needed_live_bytes: u64,
}

impl State {
    pub(super) fn new(directory: Directory, sizes: &UnitSizes, spare_target: u32) -> Self {
        let stats = Stats {
            unit_bytes: sizes.unit_bytes(),
            static_bytes: sizes.static_bytes(),
            reserved_bytes: sizes.reserved_bytes(),
            dyn_bytes: sizes.dyn_bytes(),
            atom_bytes: sizes.atom_bytes(),
            alloc_bytes: sizes.alloc_bytes(),
            spare_target,
            ..Stats::default()
        };
        Self {
            directory,
            reserved: None,
            spare: LinkedList::new(ChunkAdapter::new()),
            drain: LinkedList::new(ChunkAdapter::new()),
            stats,
            hook: None,
            spares_wanted: 0,
            pages_wanted: false,
            retry_in: 0,
            retry_after: RETRY_AFTER,
            frees_since: 0,
            busy_places: 0,
            is_bring_up: false,
            rest_wanted: 0,
            works: [0; 2],
            phase: 0,
            grown_when_looked: 0,
            caches: None,
            needed_pages: 0,
            needed_live_bytes: 0,
        }
    }

    /// Leaves areas of runs alone from now on that are marked as freed, and has memory come several pages at a time.
    pub(super) fn use_caches(&mut self, caches: CacheView) {
        self.caches = Some(caches);
    }

    /// Makes areas of `len` granules each, one behind the other and live, free; nobody had them.
    pub(super) fn give_back_areas(&mut self, chunk: NonNull<Chunk>, areas: Range<u32>, len: u32) {
        if !areas.is_empty() {
            let wrong = self.edit_area(chunk, |body| body.give_back(areas, len));
            self.stats.late_errors += u64::from(wrong);
        }
    }

    /// Frees the area at `offset` bytes into the unit; otherwise says which area's offset it lies in, if any.
    #[inline]
    pub(super) fn release(
        &mut self,
        chunk: NonNull<Chunk>,
        offset: usize,
    ) -> Result<Range<u32>, Option<usize>> {
        self.edit_area(chunk, |body| {
            body.release(body.granule(offset))
                .map_err(|no_area| match no_area {
                    NoArea::Free => None,
                    NoArea::Interior(start) => Some(body.byte_offset(start)),
                })
        })
    }

    /// The offset of the area that the place `offset` bytes into the unit lies in, if it starts before.
    pub(super) fn area_around(&self, chunk: NonNull<Chunk>, offset: usize) -> Option<usize> {
        let body = self.body(chunk);
        match body.map.area_at(body.granule(offset)) {
            Err(NoArea::Interior(start)) => Some(body.byte_offset(start)),
            Err(NoArea::Free) | Ok(_) => None,
        }
    }

    /// Makes the granules of the freed areas free that start in the page of `granule`.
    pub(super) fn sweep_page(&mut self, place: u32, chunk: NonNull<Chunk>, granule: u32) {
        // Whoever asks knew the chunk before the lock was taken.
        if !matches!(self.directory.get(place), Place::Chunk(now) if now == chunk) {
            return;
        }
        self.sweep(chunk, |body| {
            let page = body.page_of(granule);
            page..page + 1
        });
    }

    /// Makes the granules of the freed areas free that start in the lowest page that has any; false if none has.
    pub(super) fn sweep_lowest(&mut self) -> bool {
        while let Some(at) = self.directory.take_freed() {
            let Place::Chunk(chunk) = self.directory.get(at) else {
                continue;
            };
            let map = &self.body(chunk).map;
            let pages = map.pages();
            if let Some(page) = map.next_freed_page(0..pages) {
                let has_more = map.next_freed_page(page + 1..pages).is_some();
                self.sweep(chunk, |_| page..page + 1);
                if has_more {
                    self.directory.note_freed(at);
                }
                return true;
            }
        }
        false
    }

    /// Makes the granules of freed areas free until memory that is there may have room for so many; false if none was freed.
    pub(super) fn sweep_for(&mut self, granules: u32) -> bool {
        let mut has_swept = false;
        while !self.may_have_ready(granules) && self.sweep_lowest() {
            has_swept = true;
        }
        has_swept
    }

    /// Makes the granules of all freed areas free.
    pub(super) fn sweep_all(&mut self) {
        while let Some(at) = self.directory.take_freed() {
            if let Place::Chunk(chunk) = self.directory.get(at) {
                self.sweep(chunk, |body| 0..body.map.pages());
            }
        }
    }

    #[inline]
    fn sweep(&mut self, chunk: NonNull<Chunk>, pages: impl FnOnce(&Body) -> Range<u32>) {
        // SAFETY: as in `body_mut`. Of the state, only the counters are touched meanwhile.
        let body = unsafe { &mut *chunk.as_ref().body() };
        let before = body.counts.empty;
        let caches = self.caches.take();
        let kept = |first: u32, freed: u32| {
            let Some(CacheView { cells, pitch, .. }) = &caches else {
                return 0;
            };
            // SAFETY: as above.
            let place = unsafe { chunk.as_ref() }.place as usize;
            cells.entered_among(place * pitch + first as usize, freed)
        };
        body.sweep(pages(body), kept, |granules| {
            self.count_free(granules as usize * GRANULE_BYTES)
        });
        self.caches = caches;
        self.after_area_change(chunk, before);
    }

    /// Changes the body of a chunk; afterwards the sums, the chunk's list and its entry in the directory are right.
    #[inline]
    pub(super) fn edit<T>(
        &mut self,
        chunk: NonNull<Chunk>,
        change: impl FnOnce(&mut Body) -> T,
    ) -> T {
        let body = self.body_mut(chunk);
        let before = body.counts;
        let result = change(body);
        let after = body.counts;
        if after != before {
            self.count_pages(chunk, before, after);
        }
        self.note_room(chunk);
        result
    }

    /// [`edit`](Self::edit) for a change that takes or frees an area in memory that is there, which leaves all counters of
    /// the body's pages but one as they are.
    #[inline]
    fn edit_area<T>(&mut self, chunk: NonNull<Chunk>, change: impl FnOnce(&mut Body) -> T) -> T {
        let body = self.body_mut(chunk);
        let empty = body.counts.empty;
        let result = change(body);
        self.after_area_change(chunk, empty);
        result
    }

    /// Puts the sums, the chunk's list and its entry right after areas were taken or freed; `empty` is what the body counted
    /// before.
    #[inline]
    fn after_area_change(&mut self, chunk: NonNull<Chunk>, empty: u32) {
        let body = self.body_mut(chunk);
        let after = body.counts;
        let is_entered = body.is_entered();
        if after.empty != empty {
            self.count_pages(chunk, Counts { empty, ..after }, after);
        }
        if !is_entered {
            self.note_room(chunk);
        }
    }

    /// Brings the sums and the chunk's list up to date.
    #[inline(never)]
    fn count_pages(&mut self, chunk: NonNull<Chunk>, before: Counts, after: Counts) {
        self.add_up(before, after);
        self.enlist(chunk);
    }

    /// Puts a chunk on the list that it belongs on.
    fn enlist(&mut self, chunk: NonNull<Chunk>) {
        let body = self.body_mut(chunk);
        let (was, belongs) = (body.membership, body.belongs());
        if was == belongs {
            return;
        }
        body.membership = belongs;
        // SAFETY: chunks in the directory are valid until they are removed from it.
        self.leave(unsafe { chunk.as_ref() }, was);
        // SAFETY: the chunk stays valid until it is removed from the directory, which takes it off its list.
        let entry = unsafe { UnsafeRef::from_raw(chunk.as_ptr()) };
        match belongs {
            Membership::None => {}
            Membership::Spare => {
                self.stats.spare_chunks += 1;
                self.spare.push_back(entry);
            }
            Membership::Drain => self.drain.push_back(entry),
        }
    }

    /// Enters into the directory what a chunk has to offer.
    #[inline(never)]
    fn note_room(&mut self, chunk: NonNull<Chunk>) {
        let body = self.body_mut(chunk);
        let room = match body.membership {
            Membership::Spare => Room::default(),
            Membership::None | Membership::Drain => body.room(),
        };
        body.enter(room);
        if self.reserved != Some(chunk) {
            // SAFETY: chunks in the directory are valid until they are removed from it.
            self.directory
                .set_room(unsafe { chunk.as_ref() }.place, room);
        }
    }

    /// The body of a chunk, to change it.
    #[inline]
    fn body_mut(&mut self, chunk: NonNull<Chunk>) -> &mut Body {
        // SAFETY: chunks in the directory are valid until they are removed from it, and `self` stands for the lock, so
        // that this is the only reference to the body.
        unsafe { &mut *chunk.as_ref().body() }
    }

    /// Looks at the body of a chunk.
    pub(super) fn body(&self, chunk: NonNull<Chunk>) -> &Body {
        // SAFETY: as in `body_mut`; a shared borrow of the state allows shared references only.
        unsafe { &*chunk.as_ref().body() }
    }

    fn leave(&mut self, chunk: &Chunk, list: Membership) {
        let list = match list {
            Membership::None => return,
            Membership::Spare => {
                self.stats.spare_chunks -= 1;
                &mut self.spare
            }
            Membership::Drain => &mut self.drain,
        };
        // SAFETY: the membership says that the chunk is on this list.
        unsafe { list.cursor_mut_from_ptr(chunk) }.remove();
    }

    fn add_up(&mut self, before: Counts, after: Counts) {
        let stats = &mut self.stats;
        let (gained, lost) = (
            u64::from(after.populated.saturating_sub(before.populated)),
            u64::from(before.populated.saturating_sub(after.populated)),
        );
        stats.pages_populated += gained;
        stats.pages_depopulated += lost;
        stats.populated_pages = stats.populated_pages + gained - lost;
        stats.populated_peak_pages = stats.populated_peak_pages.max(stats.populated_pages);
        stats.empty_pages = stats.empty_pages + u64::from(after.empty) - u64::from(before.empty);
    }

    /// Whether memory may grow although there may be room in what was freed and not swept: in a large instance with caches, up to a
    /// share beyond what was needed when all was swept. Else each page is swept for the one or two areas that were freed there.
    pub(super) fn may_grow_unswept(&self) -> bool {
        self.caches.is_some()
            && self.needed_pages >= LARGE_PAGES
            && self.stats.populated_pages < self.needed_pages + self.needed_pages / UNSWEPT_SHARE
    }

    /// Notes that all that was freed is swept, and a request has no room: more is needed by as much as is live.
    pub(super) fn note_needed(&mut self) {
        let (live_bytes, most_bytes) = (self.stats.live_bytes, self.needed_live_bytes);
        if live_bytes > most_bytes {
            // In proportion: what came without a sweep is not needed, and would be added to each time.
            let pages = match most_bytes {
                0 => self.stats.populated_pages,
                _ => {
                    let pages = u128::from(self.needed_pages) * u128::from(live_bytes);
                    let most_pages = u128::from(self.stats.populated_pages);
                    pages.div_ceil(most_bytes.into()).min(most_pages) as u64
                }
            };
            self.needed_pages = self.needed_pages.max(pages);
            self.needed_live_bytes = live_bytes;
        }
    }

    /// Whether as much memory is there as ever was.
    pub(super) fn is_at_peak(&self) -> bool {
        self.stats.populated_pages >= self.stats.populated_peak_pages
    }

    /// Whether nearly as much is live as ever was: seven eighths. What is idle in caches counts as live.
    pub(super) fn is_near_peak(&self) -> bool {
        self.stats.live_bytes * 8 >= self.stats.live_peak_bytes * 7
    }

    /// Claims a vacant place for a chunk in the making.
    pub(super) fn claim_place(&mut self) -> Result<VacantPlace, BackingError> {
        let at = self
            .directory
            .vacant()
            .ok_or(BackingError::OutOfAddressSpace)?;
        let parked = match self.directory.get(at) {
            Place::Parked(chunk) => Some(chunk),
            Place::Vacant | Place::Busy | Place::Chunk(_) => None,
        };
        self.directory.put(at, Place::Busy);
        self.busy_places += 1;
        Ok(VacantPlace { at, parked })
    }

    /// Vacates a place that was claimed.
    pub(super) fn vacate(&mut self, place: VacantPlace) {
        let VacantPlace { at, parked } = place;
        self.directory
            .put(at, parked.map_or(Place::Vacant, Place::Parked));
        self.busy_places -= 1;
    }

    /// Vacates a place whose chunk has been destroyed, and keeps the chunk's metadata there.
    pub(super) fn park(&mut self, at: u32, chunk: NonNull<Chunk>) {
        self.body_mut(chunk).renew();
        self.vacate(VacantPlace {
            at,
            parked: Some(chunk),
        });
    }

    /// Enters a chunk of the first chunk.
    pub(super) fn add_first_chunk(&mut self, chunk: NonNull<Chunk>) {
        self.busy_places += 1;
        self.add_chunk(chunk, 0);
    }

    /// Enters a chunk that has been made, at the place that was claimed for it.
    pub(super) fn add_chunk(&mut self, chunk: NonNull<Chunk>, place: u32) {
        self.directory.put(place, Place::Chunk(chunk));
        // Somebody may have noted pages of the chunk that was there before, when it had gone: nobody would note the place again.
        self.directory.note_freed(place);
        self.busy_places -= 1;
        self.stats.chunks += 1;
        self.stats.chunks_peak = self.stats.chunks_peak.max(self.stats.chunks);
        self.retry_after = RETRY_AFTER;
        self.enlist(chunk);
        self.note_room(chunk);
    }

    /// Takes a chunk out that has been emptied; its place stays busy.
    pub(super) fn remove_chunk(&mut self, chunk: NonNull<Chunk>) -> u32 {
        let body = self.body_mut(chunk);
        let membership = core::mem::replace(&mut body.membership, Membership::None);
        // SAFETY: the chunk is in the directory.
        let shared = unsafe { chunk.as_ref() };
        self.leave(shared, membership);
        self.directory.put(shared.place, Place::Busy);
        self.directory.set_room(shared.place, Room::default());
        self.busy_places += 1;
        self.stats.chunks -= 1;
        shared.place
    }

    /// A spare chunk that can be destroyed: the highest one.
    pub(super) fn highest_spare(&self) -> Option<NonNull<Chunk>> {
        self.spare
            .iter()
            .max_by_key(|chunk| chunk.place)
            .map(NonNull::from)
    }

    /// A chunk with populated pages that no area touches.
    pub(super) fn drainable(&self) -> Option<NonNull<Chunk>> {
        self.drain.back().get().map(NonNull::from)
    }

    /// For the end of an instance: takes any chunk out, the reserved one too.
    pub(super) fn remove_any_chunk(&mut self) -> Option<(u32, NonNull<Chunk>)> {
        if let Some(reserved) = self.reserved.take() {
            return Some((0, reserved));
        }
        let (_, chunk) = self.directory.chunks().next()?;
        Some((self.remove_chunk(chunk), chunk))
    }

    pub(super) fn reserved_free_bytes(&self) -> usize {
        self.reserved.map_or(0, |chunk| {
            self.body(chunk).map.free_granules() as usize * GRANULE_BYTES
        })
    }

    /// Notes that an atomic request found neither room nor a spare chunk.
    pub(super) fn note_shortfall(&mut self) {
        self.stats.spare_shortfalls += 1;
        self.spares_wanted += 1;
        self.retry_in = 0;
    }

    /// Notes that a spare chunk could not be made.
    pub(super) fn note_spare_failed(&mut self) {
        self.retry_in = self.retry_after;
        self.retry_after = self.retry_after.saturating_mul(2);
    }

    /// Whether a spare chunk may be tried: the last try worked, or is long enough ago.
    pub(super) fn may_try_spare(&self) -> bool {
        self.retry_in == 0
    }

    /// Notes that pages are about to be populated or given back without the lock.
    pub(super) fn begin_work(&mut self) -> Batch {
        self.works[self.phase] += 1;
        Batch {
            phase: self.phase,
            is_bring_up: self.is_bring_up,
        }
    }

    /// Notes the end of that.
    pub(super) fn end_work(&mut self, batch: Batch) {
        self.works[batch.phase] -= 1;
    }

    /// Whether nothing is under way without the lock.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(super) fn is_at_rest(&self) -> bool {
        self.works == [0; 2] && self.busy_places == 0 && !self.is_bring_up
    }

    /// The phase now: which of the two sets of CPUs new work uses.
    pub(super) fn phase(&self) -> usize {
        self.phase
    }

    /// Starts the other phase: work that begins from now on uses the other set.
    pub(super) fn change_phase(&mut self) {
        self.phase = 1 - self.phase;
    }

    /// Whether work of the other phase is still under way.
    pub(super) fn is_other_phase_busy(&self) -> bool {
        self.works[1 - self.phase] > 0
    }
}
