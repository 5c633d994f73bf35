//! The upkeep: gives back memory that has run empty, destroys spare chunks that are too many, prepares those that are
//! too few. It may sleep; a kernel runs it from a worker, a process when it is due.

use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

use lock_api::RawMutex;

use super::PerCpuAllocator;
use super::state::State;
use crate::backing::{Backing, Context};
use crate::chunk::Chunk;
use crate::cpus::Cpus;
use crate::directory::Place;
use crate::stats::Event;
use crate::unit::GRANULE_BYTES;

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
}

/// Pages that are about to lose their memory.
struct Claim {
    chunk: NonNull<Chunk>,
    place: u32,
    /// Counted in the chunk's map.
    pages: Range<u32>,
    /// Counted in the unit.
    unit_pages: Range<u32>,
}

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Whether an [`upkeep`](Self::upkeep) has something to do by the [policy](super::Policy). Cheap enough to ask
    /// after every request.
    #[inline]
    pub fn is_upkeep_due(&self) -> bool {
        self.upkeep_due.load(Ordering::Relaxed)
    }

    /// Runs the upkeep. It may sleep, and takes no longer than what there is to give back and to prepare.
    pub fn upkeep(&self) -> UpkeepReport {
        let target = {
            let mut state = self.state.lock();
            let taken = core::mem::take(&mut state.spares_taken);
            let wanted = (taken * 2).max(state.stats.spare_target / 2);
            let target = wanted
                .min(self.policy.spare_chunks_max)
                .max(self.policy.spare_chunks);
            state.stats.spare_target = target;
            state.spare_failed = false;
            target
        };
        self.settle(self.policy.empty_pages_low, target)
    }

    /// Gives back all that can be: every page without an area, and spare chunks beyond `spare_chunks`.
    pub fn trim(&self, spare_chunks: u32) -> UpkeepReport {
        self.state.lock().stats.spare_target = self.policy.spare_chunks;
        self.settle(0, spare_chunks)
    }

    /// Runs the upkeep if it is due.
    pub fn upkeep_if_due(&self) {
        if self.is_upkeep_due() {
            self.upkeep();
        }
    }

    fn settle(&self, keep_pages: u32, spare_chunks: u32) -> UpkeepReport {
        let mut report = UpkeepReport {
            pages_given_back: self.give_back(keep_pages),
            ..UpkeepReport::default()
        };
        while self.destroy_spare(spare_chunks) {
            report.chunks_destroyed += 1;
        }
        while self.lacks_spare(&self.state.lock(), spare_chunks) {
            if self.make_chunk(Context::MaySleep).is_err() {
                self.state.lock().spare_failed = true;
                break;
            }
            report.chunks_prepared += 1;
        }
        let mut state = self.state.lock();
        state.frees_since = 0;
        self.note_due(&state);
        report
    }

    /// Gives back pages without areas until at most `keep` of them are left; returns how many.
    pub(super) fn give_back(&self, keep: u32) -> u64 {
        let mut given_back = 0;
        while let Some(Claim {
            chunk,
            place,
            pages,
            unit_pages,
        }) = self.claim_empty(keep)
        {
            let span = self.span(place, unit_pages, Cpus::Set(&self.units.populated_for));
            // SAFETY: the pages are claimed, no area touches them, and searches do not see them.
            unsafe { self.backing.depopulate(span) };
            given_back += u64::from(pages.end - pages.start);
            self.state
                .lock()
                .edit(chunk, |body| body.depopulated(pages));
        }
        given_back
    }

    /// Claims a run of pages without areas.
    fn claim_empty(&self, keep: u32) -> Option<Claim> {
        let mut state = self.state.lock();
        let surplus = state.stats.empty_pages.saturating_sub(keep.into());
        if surplus == 0 || state.bring_up {
            return None;
        }
        let chunk = state.drainable()?;
        // SAFETY: chunks on a list are valid until they are taken off it.
        let place = unsafe { chunk.as_ref() }.place;
        state.edit(chunk, |body| {
            let pages = body.claim_empty(surplus.min(u32::MAX.into()) as u32)?;
            let unit_pages = body.unit_page(pages.start)..body.unit_page(pages.end);
            Some(Claim {
                chunk,
                place,
                pages,
                unit_pages,
            })
        })
    }

    /// Destroys one spare chunk if there are more than `keep`.
    fn destroy_spare(&self, keep: u32) -> bool {
        let (place, chunk, hook) = {
            let mut state = self.state.lock();
            let Some(chunk) = state
                .highest_spare()
                .filter(|_| state.stats.spare_chunks > keep)
            else {
                return false;
            };
            (state.remove_chunk(chunk), chunk, state.hook)
        };
        self.destroy(place, chunk);
        let mut state = self.state.lock();
        state.directory.put(place, Place::Vacant);
        state.stats.chunks_destroyed += 1;
        state.stats.metadata_bytes -= self.geometry.chunk.block.size();
        drop(state);
        if let Some(hook) = hook {
            hook.event(&Event::ChunkDestroyed {
                place,
                address: self.neutral(place),
            });
        }
        true
    }

    /// Gives back all that a chunk has. It has been taken out of the directory, so nobody else knows of it.
    pub(super) fn destroy(&self, place: u32, chunk: NonNull<Chunk>) {
        // SAFETY: the chunk is ours alone; it is not used after its block is freed below.
        let (block, body) = unsafe { (chunk.as_ref().block, &*chunk.as_ref().body()) };
        if place != 0 {
            let mut from = 0;
            while let Some(pages) = body.next_populated(from) {
                from = pages.end;
                let unit_pages = body.unit_page(pages.start)..body.unit_page(pages.end);
                let span = self.span(place, unit_pages, Cpus::Set(&self.units.populated_for));
                // SAFETY: only the end of the whole instance finds populated pages here, and ends all areas.
                unsafe { self.backing.depopulate(span) };
            }
            // SAFETY: reserved when the chunk was made; all its pages are without memory now.
            unsafe { self.backing.release(self.space(place)) };
        }
        // SAFETY: the block was allocated with this layout, and the chunk in it is not used any more.
        unsafe { self.backing.free_metadata(block.0, block.1) };
    }

    /// Whether a spare chunk should be made: there are fewer than `target`, and the chunks in use could not serve
    /// the largest request.
    fn lacks_spare(&self, state: &State, target: u32) -> bool {
        let largest = (self.geometry.max_alloc_bytes / GRANULE_BYTES) as u32;
        state.stats.spare_chunks < target && state.directory.longest() < largest
    }

    /// Notes whether an upkeep has something to do.
    pub(super) fn note_due(&self, state: &State) {
        let (policy, stats) = (&self.policy, &state.stats);
        let empty_pages = stats.empty_pages;
        let is_quiet = state.frees_since >= policy.quiet_frees;
        let due = empty_pages > policy.empty_pages_high.into()
            || (is_quiet && empty_pages > policy.empty_pages_low.into())
            || stats.spare_chunks > stats.spare_target
            || (!state.spare_failed && self.lacks_spare(state, stats.spare_target));
        if self.upkeep_due.load(Ordering::Relaxed) != due {
            self.upkeep_due.store(due, Ordering::Relaxed);
        }
    }
}
