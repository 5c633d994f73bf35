//! The second way through a CPU's cache: areas that belong to no run of the CPU are stashed when they are freed, and handed out
//! again from there.
//!
//! A stash names freed areas, and owns none: its areas are swept like all others when room is wanted. Who takes one turns its
//! mark back by a LOCKed step, and has the area if that succeeds.

use lock_api::RawMutex;

use super::runs::Caches;
use super::state::State;
use super::{PerCpuAllocator, WATCHED};
use crate::backing::Backing;
use crate::cache::{Class, MAX_LEN, Seat, Stash};
use crate::places::LiveArea;
use crate::request::AllocFlags;
use crate::stats::Stats;
use crate::sync::{self, Ordering};
use crate::unit::GRANULE_BYTES;

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// An area out of the current CPU's stash: its address.
    #[inline]
    pub(super) fn take_stashed(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        class: Class,
        flags: AllocFlags,
    ) -> Option<usize> {
        let len = class.len();
        let at = caches.stash_of(len);
        // SAFETY: the table lives on every CPU, and its words are changed by a seat's operations only.
        let mut stash = Stash::from_bits(unsafe { seat.peek_word(at)? });
        let granule = stash.first(len)?;
        if granule & (class.align() - 1) != 0 {
            return None;
        }
        let address = self.geometry.window.base + granule as usize * GRANULE_BYTES;
        let (place, in_unit) = self.place_of(granule);
        if !self.places.reuse(place, in_unit, len) {
            // It has been swept, and most likely so have the others.
            // SAFETY: as above.
            unsafe { seat.replace_word(at, stash.bits(), stash.cleared().bits()) };
            return None;
        }
        // SAFETY: the area is ours, and live on every CPU that has memory.
        let link = unsafe { seat.read_link(address) };
        loop {
            let left = stash.without(granule, link);
            // SAFETY: as above.
            if unsafe { seat.replace_word(at, stash.bits(), left.bits()) } {
                return Some(address);
            }
            // SAFETY: as above.
            let now = unsafe { seat.peek_word(at) }.map(Stash::from_bits);
            match now.filter(|now| now.len() == len) {
                Some(now) => stash = now,
                // The caller has come to a CPU that has no such stash.
                None => return self.count_stray(address, class, flags),
            }
        }
    }

    /// Frees an area that was made live again for nobody.
    fn unuse(&self, place: u32, granule: u32) {
        if let Some(Some((chunk, granule))) = self.places.free(place, granule) {
            self.sweep_page(place, chunk, granule);
        }
    }

    /// Counts an area that was taken from a stash where there is none to count it.
    #[cold]
    fn count_stray(&self, address: usize, class: Class, flags: AllocFlags) -> Option<usize> {
        match self.lock(flags.contains(AllocFlags::TRY)) {
            Some(mut state) => {
                let bytes = class.len() as usize * GRANULE_BYTES;
                state.stats.count_allocs(1, bytes);
                Some(address)
            }
            None => {
                let (place, offset) = self.locate(address)?;
                self.unuse(place, (offset / GRANULE_BYTES) as u32);
                None
            }
        }
    }

    /// Frees the area at `address`, which belongs to no run, and has the current CPU's stash name it. False if that is not
    /// the way to free it, or it is not live: then it is as it was, but for the link that may stand in it.
    #[inline]
    pub(super) fn free_to_stash(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        address: usize,
        granule: u32,
    ) -> bool {
        if address == caches.table {
            return false;
        }
        let (place, in_unit) = self.place_of(granule);
        let Some(area) = self.places.live_area(place, in_unit) else {
            return false;
        };
        let len = area.len();
        if self.has_sign(WATCHED) || len > MAX_LEN {
            return false;
        }
        let at = caches.stash_of(len);
        // SAFETY: as in `take_stashed`.
        let Some(bits) = (unsafe { seat.peek_word(at) }) else {
            return self.free_and_sweep(&area);
        };
        let stash = Stash::from_bits(bits);
        let Some(more) = stash.with(granule, len, caches.stash_granules()) else {
            return self.free_and_sweep(&area);
        };
        // While the area is the caller's.
        // SAFETY: nobody uses the area (promise of whoever frees it), which is live on every CPU that has memory.
        unsafe { seat.write_link(address, stash.link()) };
        if !area.end() {
            return false;
        }
        // SAFETY: as above.
        match unsafe { seat.replace_word(at, stash.bits(), more.bits()) } {
            true => area.note(&self.places),
            false => self.sweep_if_ripe(&area),
        }
        true
    }

    /// Frees an area that no stash has room for; false if it is not live any more.
    #[inline(never)]
    fn free_and_sweep(&self, area: &LiveArea<'_>) -> bool {
        let is_ended = area.end();
        if is_ended {
            self.sweep_if_ripe(area);
        }
        is_ended
    }

    /// Sees to it that an area is swept that was freed and is in no stash.
    fn sweep_if_ripe(&self, area: &LiveArea<'_>) {
        if let Some((chunk, granule)) = area.ripen(&self.places) {
            self.sweep_page(area.place(), chunk, granule);
        }
    }

    /// Adds up what the current CPU's stash for a class has handed out, and makes one for that class of it.
    pub(super) fn settle_stash(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        state: &mut State,
        class: Class,
    ) {
        let at = caches.stash_of(class.len());
        // SAFETY: as in `take_stashed`.
        while let Some(bits) = unsafe { seat.peek_word(at) } {
            let stash = Stash::from_bits(bits);
            // A CPU that has no memory has no stash: nobody writes to its copies.
            let has_memory = || self.units.materialised().contains(seat.cpu());
            if !stash.is_due(class.len()) || !has_memory() {
                return;
            }
            // SAFETY: as above.
            if unsafe { seat.replace_word(at, bits, stash.settled(class.len()).bits()) } {
                let bytes = stash.len() as usize * GRANULE_BYTES;
                state.stats.count_allocs(stash.taken().into(), bytes);
                return;
            }
        }
    }

    /// Empties the current CPU's stashes.
    pub(super) fn clear_stashes(&self, caches: &Caches, seat: &impl Seat) {
        for at in caches.stashes() {
            // SAFETY: as in `take_stashed`.
            while let Some(bits) = unsafe { seat.peek_word(at) } {
                let cleared = Stash::from_bits(bits).cleared().bits();
                // SAFETY: as above.
                if bits == cleared || unsafe { seat.replace_word(at, bits, cleared) } {
                    break;
                }
            }
        }
    }

    /// Counts what stashes have handed out.
    pub(super) fn count_stashes(&self, stats: &mut Stats) {
        let Some(caches) = &self.caches else {
            return;
        };
        for cpu in self.units.materialised().iter() {
            for at in caches.stashes() {
                if let Ok(copy) = self.units.copy_of(at, cpu) {
                    // SAFETY: the tables live as long as the instance, on every CPU that has memory.
                    let word = unsafe { sync::word_at(copy) };
                    let stash = Stash::from_bits(word.load(Ordering::Acquire));
                    let bytes = stash.len() as usize * GRANULE_BYTES;
                    stats.count_allocs(stash.taken().into(), bytes);
                }
            }
        }
    }
}
