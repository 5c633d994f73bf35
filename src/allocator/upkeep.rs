//! The upkeep: gives back memory that has run empty, populates some for atomic requests where there are caches, destroys spare
//! chunks that are too many, prepares those that are too few. It may sleep; a kernel runs it from a worker, a process when it is due.

use core::ptr::NonNull;

use lock_api::RawMutex;

use super::state::{Batch, State};
use super::{PerCpuAllocator, SWEEP_DUE, UPKEEP_DUE};
use crate::backing::{Backing, Context};
use crate::chunk::{Chunk, MAX_MASK_PAGES, PageMask};
use crate::cpus::Cpus;
use crate::stats::Event;
use crate::unit::GRANULE_BYTES;

/// Pages that an upkeep found due leaves beyond the policy's where there are caches, and pages more that may be empty before.
const MORE_PAGES_LOW: u32 = 4;
const MORE_PAGES_HIGH: u32 = 10;
/// Empty pages more that an upkeep leaves or populates there, at most, if an atomic request has had to populate some.
const MORE_PAGES_AHEAD: u32 = 4;
/// How many times as many frees the upkeep waits there.
const MORE_FREES: u32 = 4;

/// What an upkeep did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct UpkeepReport {
    /// Pages (of a unit) given back.
    pub pages_given_back: u64,
    /// Chunks destroyed.
    pub chunks_destroyed: u32,
    /// Spare chunks made.
    pub chunks_prepared: u32,
    /// Pages (of a unit) populated for requests to come.
    pub pages_populated: u64,
}

/// Pages that are about to lose their memory.
struct Claim {
    chunk: NonNull<Chunk>,
    place: u32,
    /// Counted in the chunk's map.
    pages: PageMask,
    /// Counted in the unit.
    in_unit: PageMask,
    batch: Batch,
}

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Whether an [`upkeep`](Self::upkeep) has something to do by the [policy](super::Policy). Cheap enough to ask
    /// after every request.
    #[inline]
    pub fn is_upkeep_due(&self) -> bool {
        self.has_sign(UPKEEP_DUE | SWEEP_DUE)
    }

    /// Runs the upkeep. It may sleep, and takes no longer than what there is to give back and to prepare.
    pub fn upkeep(&self) -> UpkeepReport {
        self.sweep();
        self.keep_up(self.policy.empty_pages_low, self.policy.empty_pages_high)
    }

    /// [`upkeep`](Self::upkeep) of what is known to be free, that leaves so many empty pages and is due when they are more than
    /// `most_pages`: freed areas that have not been swept keep theirs.
    fn keep_up(&self, keep_pages: u32, most_pages: u32) -> UpkeepReport {
        let (target, is_wanted) = {
            let mut state = self.state.lock();
            // Twice what was wanted since the last time; what was not wanted is unlearned slowly.
            let wanted = core::mem::take(&mut state.spares_wanted).saturating_mul(2);
            let target = wanted.max(state.stats.spare_target.saturating_sub(1));
            let most = self.policy.spare_chunks_max.max(self.policy.spare_chunks);
            let target = target.clamp(self.policy.spare_chunks, most);
            state.stats.spare_target = target;
            (target, core::mem::take(&mut state.pages_wanted))
        };
        // What atomic requests will ask for.
        let more = MORE_PAGES_AHEAD.min(most_pages.saturating_sub(keep_pages) / 2);
        let keep_pages = keep_pages + if is_wanted { more } else { 0 };
        let mut report = self.settle(keep_pages, target);
        if is_wanted {
            report.pages_populated = self.populate_ahead(keep_pages);
        }
        while self.lacks_spare(&self.state.lock()) {
            if self.make_spare().is_err() {
                self.state.lock().note_spare_failed();
                break;
            }
            report.chunks_prepared += 1;
        }
        self.note_due(&self.state.lock());
        report
    }

    /// Gives back all that can be: every page without an area, and spare chunks beyond `spare_chunks`. It prepares nothing.
    /// Areas that are free in caches keep their pages: [`drain`](Self::drain) empties these. The metadata of chunks that are no
    /// more stays for the next ones: see [`trim_metadata`](Self::trim_metadata).
    pub fn trim(&self, spare_chunks: u32) -> UpkeepReport {
        self.release_quarantine();
        self.sweep();
        {
            let mut state = self.state.lock();
            state.stats.spare_target = self.policy.spare_chunks;
            state.pages_wanted = false;
        }
        let report = self.settle(0, spare_chunks);
        self.note_due(&self.state.lock());
        report
    }

    /// Runs the upkeep if it is due.
    #[inline]
    pub fn upkeep_if_due(&self) {
        if self.is_upkeep_due() {
            self.sweep_or_upkeep();
        }
    }

    #[cold]
    #[inline(never)]
    fn sweep_or_upkeep(&self) {
        if self.has_sign(SWEEP_DUE) {
            self.sweep();
        }
        if self.has_sign(UPKEEP_DUE) {
            match self.has_caches() {
                // What is freed and not swept is what stashes name.
                true => self.keep_up(self.empty_pages_low(), self.empty_pages_high()),
                false => self.upkeep(),
            };
        }
    }

    /// Makes the granules of all freed areas free.
    fn sweep(&self) {
        let mut state = self.state.lock();
        self.set_sign(SWEEP_DUE, false);
        state.sweep_all();
        self.note_due(&state);
    }

    fn settle(&self, keep_pages: u32, spare_chunks: u32) -> UpkeepReport {
        let mut report = UpkeepReport {
            pages_given_back: self.give_back(keep_pages),
            ..UpkeepReport::default()
        };
        while self.destroy_spare(spare_chunks) {
            report.chunks_destroyed += 1;
        }
        self.state.lock().frees_since = 0;
        report
    }

    /// Gives back pages without areas until at most `keep` of them are left; returns how many.
    pub(super) fn give_back(&self, keep: u32) -> u64 {
        let mut given_back = 0;
        while let Some(claim) = self.claim_empty(keep) {
            let span = self.span(claim.place, claim.in_unit, self.populated_for(claim.batch));
            // SAFETY: the chunk is in the directory, so it is reserved; the pages are claimed, no area touches them, and
            // searches do not see them.
            unsafe { self.backing.depopulate(span) };
            given_back += u64::from(claim.pages.count());
            let mut state = self.state.lock();
            state.end_work(claim.batch);
            state.edit(claim.chunk, |body| body.depopulated(claim.pages));
        }
        given_back
    }

    /// Populates pages for atomic requests, of which one has had to do so itself: so that as many as `target` are empty, or fewer.
    /// Returns how many.
    fn populate_ahead(&self, target: u32) -> u64 {
        let mut state = self.lock_to_work();
        let Some((chunk, pages)) = state.claim_ahead(target) else {
            return 0;
        };
        // SAFETY: chunks in the directory are valid until they are removed from it, and one with claimed pages is not.
        let place = unsafe { chunk.as_ref() }.place;
        let in_unit = state.body(chunk).unit_pages(pages);
        let batch = state.begin_work();
        drop(state);
        let populated = self.populate_claimed(place, in_unit, batch, Context::MaySleep);
        let mut state = self.state.lock();
        state.end_work(batch);
        state.edit(chunk, |body| match populated {
            Ok(contents) => body.populated(pages, contents),
            // It was not needed.
            Err(_) => body.depopulated(pages),
        });
        match populated {
            Ok(_) => pages.count().into(),
            Err(_) => 0,
        }
    }

    /// Claims pages of one chunk that no area touches.
    fn claim_empty(&self, keep: u32) -> Option<Claim> {
        let mut state = self.lock_to_work();
        let surplus = state.stats.empty_pages.saturating_sub(keep.into());
        if surplus == 0 || state.is_bring_up {
            return None;
        }
        let chunk = state.drainable()?;
        // SAFETY: chunks on a list are valid until they are taken off it.
        let place = unsafe { chunk.as_ref() }.place;
        let limit = surplus.min(u32::MAX.into()) as u32;
        let (pages, in_unit) = state.edit(chunk, |body| {
            let pages = body.claim_empty(limit);
            (pages, body.unit_pages(pages))
        });
        Some(Claim {
            chunk,
            place,
            pages,
            in_unit,
            batch: state.begin_work(),
        })
    }

    /// Destroys one spare chunk if there are more than `keep`.
    fn destroy_spare(&self, keep: u32) -> bool {
        let (place, chunk, hook) = {
            let mut state = self.lock_to_work();
            let Some(chunk) = state
                .highest_spare()
                .filter(|_| state.stats.spare_chunks > keep)
            else {
                return false;
            };
            (state.remove_chunk(chunk), chunk, state.hook)
        };
        self.destroy(place, chunk);
        if let Some(hook) = hook {
            // Before the place is used again, so that the events are in order.
            hook.event(&Event::ChunkDestroyed {
                place,
                address: self.neutral(place),
            });
        }
        let mut state = self.state.lock();
        state.park(place, chunk);
        state.stats.chunks_destroyed += 1;
        true
    }

    /// Gives back the metadata of chunks that are no more.
    ///
    /// # Safety
    /// No CPU is in the middle of a free, or of an allocation by [`allocate_at`](Self::allocate_at): one that is looks at the
    /// metadata of the chunk that an address lies in, or lay in, without the lock.
    pub unsafe fn trim_metadata(&self) {
        while let Some(chunk) = self.take_parked() {
            self.free_block(chunk);
        }
    }

    /// The metadata of a chunk that is no more.
    fn take_parked(&self) -> Option<NonNull<Chunk>> {
        let mut state = self.state.lock();
        let (_, chunk) = state.directory.take_parked()?;
        state.stats.metadata_bytes -= self.geometry.chunk.block.size();
        Some(chunk)
    }

    /// Gives back a chunk's metadata, the chunk with it.
    pub(super) fn free_block(&self, chunk: NonNull<Chunk>) {
        // SAFETY: the chunk is in no table, and not used after its block is freed.
        let (block, layout) = unsafe { chunk.as_ref() }.block;
        // SAFETY: the block was allocated with this layout.
        unsafe { self.backing.free_metadata(block, layout) };
    }

    /// Gives back a chunk's memory and address space. It has been taken out of the directory, so nobody else changes it.
    pub(super) fn destroy(&self, place: u32, chunk: NonNull<Chunk>) {
        // SAFETY: the chunk is ours alone.
        let body = unsafe { &*chunk.as_ref().body() };
        if place != 0 {
            let cpus = Cpus::Set(self.units.materialised());
            let mut from = 0;
            while let Some(pages) = body.populated_pages(from) {
                from += MAX_MASK_PAGES;
                if !pages.is_empty() {
                    let span = self.span(place, body.unit_pages(pages), cpus);
                    // SAFETY: only the end of the whole instance finds populated pages here, and ends all areas.
                    unsafe { self.backing.depopulate(span) };
                }
            }
            // SAFETY: reserved when the chunk was made; all its pages are without memory now.
            unsafe { self.backing.release(self.space(place)) };
        }
    }

    /// Whether a spare chunk should be made: there are fewer than wanted, and either atomic requests have asked for more
    /// than the usual number, or the chunks in use could not serve the largest request.
    #[inline]
    fn lacks_spare(&self, state: &State) -> bool {
        let target = state.stats.spare_target;
        if state.stats.spare_chunks >= target {
            return false;
        }
        let largest = self.geometry.max_alloc_bytes.div_ceil(GRANULE_BYTES) as u32;
        let largest_align = self.geometry.max_align_bytes.div_ceil(GRANULE_BYTES) as u32;
        target > self.policy.spare_chunks || !state.has_room(largest, largest_align)
    }

    /// Pages that an upkeep leaves empty that is found due.
    #[inline]
    fn empty_pages_low(&self) -> u32 {
        let more = if self.has_caches() { MORE_PAGES_LOW } else { 0 };
        self.policy.empty_pages_low.saturating_add(more)
    }

    /// Empty pages that are too many at once.
    #[inline]
    fn empty_pages_high(&self) -> u32 {
        let more = if self.has_caches() {
            MORE_PAGES_HIGH
        } else {
            0
        };
        self.policy.empty_pages_high.saturating_add(more)
    }

    /// Notes whether an upkeep has something to do.
    #[inline]
    pub(super) fn note_due(&self, state: &State) {
        let (policy, stats) = (&self.policy, &state.stats);
        let more_frees = if self.has_caches() { MORE_FREES } else { 1 };
        let has_surplus = |empty_pages: u64| {
            empty_pages > self.empty_pages_low().into()
                && (empty_pages > self.empty_pages_high().into()
                    || state.frees_since >= policy.quiet_frees.saturating_mul(more_frees))
        };
        let due = has_surplus(stats.empty_pages)
            || state.pages_wanted
            || stats.spare_chunks > stats.spare_target
            || (self.lacks_spare(state) && state.may_try_spare());
        self.set_sign(UPKEEP_DUE, due);
    }
}
