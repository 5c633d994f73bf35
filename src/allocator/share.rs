//! Runs of which other CPUs free areas, too.
//!
//! A run is its CPU's alone at first: its areas are put back by that CPU's own steps, which look at no mark. When another
//! CPU is about to free one of them, it makes the run a *shared* one, and it stays so until it is closed: now everybody
//! frees by marks, the run's CPU as well, and of two who free the same area one finds the mark made. A run that takes the
//! place of one of which others freed areas until it was used up is shared from the start: where areas go on to others all
//! the time, nobody waits for a fence.
//!
//! Invariant: nobody puts an area into a run that is shared. A step that puts one names the run as it looked it up; the
//! pair gets the shared name first, when its CPU cannot be at it, and only then do the cells say that the run is shared, and
//! may anybody make a mark. So a step that was under way is over, and seen by all who make marks; one that is late finds
//! another name.
//!
//! Where the pairs of other CPUs are out of reach ([`RemotePairs::Never`]), the cells alone say it: of two frees at the same
//! moment, one of which is by the run's CPU, both may be taken for right.

use lock_api::RawMutex;

use super::runs::Caches;
use super::{PerCpuAllocator, WATCHED};
use crate::backing::Backing;
use crate::cache::{Run, Seat};
use crate::request::{FreeError, FreeFlags};
use crate::sync::Ordering;
use crate::this_cpu::{Put, RemotePairs};

/// Whose a run is that is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Its CPU's alone, until another is about to free an area of it.
    Own,
    /// Others are going to free areas of it.
    Shared,
}

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Puts an area back after all, or sees to it that its run is shared or closed, so that it can be marked.
    #[cold]
    #[inline(never)]
    pub(super) fn put_or_share(
        &self,
        seat: &impl Seat,
        flags: FreeFlags,
        (run, slot): (Run, u32),
    ) -> Result<Put, FreeError> {
        let Some(caches) = &self.caches else {
            return Ok(Put::Elsewhere);
        };
        let _state = self
            .lock(flags.contains(FreeFlags::TRY))
            .ok_or(FreeError::Busy)?;
        if caches.cells.find(run.start(slot)) != Some((run, slot)) {
            return Ok(Put::Elsewhere);
        }
        if !self.has_sign(WATCHED) {
            // The gate was closed, perhaps.
            let at = caches.table + run.class().table_offset();
            // SAFETY: as in `take_slot`.
            match unsafe { seat.put_slot(at, run.bits(), 1 << slot, &caches.gate) } {
                Put::Elsewhere => {}
                put => return Ok(put),
            }
        }
        self.share(caches, seat, run);
        Ok(Put::Elsewhere)
    }

    /// Whose a run of the class is going to be after one that is used up: the next one, or the same when it has got its areas
    /// back. Where nobody has freed anything, as it was.
    pub(super) fn sharing_after(&self, caches: &Caches, run: Run) -> Sharing {
        if !caches.cells.is_shared(run) {
            return Sharing::Own;
        }
        let is_foreign = caches.cells.take_foreign(run);
        match is_foreign || self.idle_in(run, 0) == 0 {
            true => Sharing::Shared,
            false => Sharing::Own,
        }
    }

    /// Makes a run that is entered a shared one. For the holder of the lock: nobody opens or closes runs.
    fn share(&self, caches: &Caches, seat: &impl Seat, run: Run) {
        let at = caches.table + run.class().table_offset();
        let shared = run.shared().bits();
        match seat.remote_pairs() {
            RemotePairs::Never => {}
            RemotePairs::AfterFence => {
                caches.gate.store(1, Ordering::SeqCst);
                if seat.wait_for_gated().is_ok()
                    && let Some([_, name]) = self.pair_of(at, run.cpu())
                {
                    name.store(shared, Ordering::Relaxed);
                }
                caches.gate.store(0, Ordering::Release);
            }
            RemotePairs::ByLockedStep => {
                while let Some(pair @ [slots, name]) = self.peek(at, run.cpu())
                    && name == run.bits()
                    && let Ok(copy) = self.units.copy_of(at, run.cpu())
                {
                    let copy = core::ptr::with_exposed_provenance_mut(copy);
                    // SAFETY: the tables live on this CPU, and are changed by a seat's operations only, by LOCKed steps.
                    if unsafe { seat.replace_remote_pair(copy, pair, [slots, shared]) } {
                        break;
                    }
                }
            }
        }
        caches.cells.share(run);
    }

    /// Notes that an area of a shared run has been freed, if that was another CPU.
    pub(super) fn note_foreign(&self, caches: &Caches, seat: &impl Seat, (run, slot): (Run, u32)) {
        if !run.is_foreign() && seat.cpu() != run.cpu() {
            caches.cells.note_foreign(run.start(slot), run);
        }
    }
}
