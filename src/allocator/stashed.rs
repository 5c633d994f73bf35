//! The second way through a CPU's cache: areas that belong to no run of the CPU are stashed when they are freed, and handed out
//! again from there.
//!
//! A stash names freed areas, and owns none: its areas are swept like all others when room is wanted. Who takes one turns its
//! mark back by a LOCKed step, and has the area if that succeeds.

use lock_api::RawMutex;

use super::PerCpuAllocator;
use super::runs::Caches;
use super::state::State;
use crate::backing::Backing;
use crate::cache::{
    Class, First, MAX_LEN, OWN_PLACES, ROWS_BYTES, STASHES_AT, Seat, Stash, TABLE_BYTES,
};
use crate::request::{AllocFlags, Request};
use crate::stats::Stats;
use crate::sync::{self, Ordering};
use crate::unit::GRANULE_BYTES;

/// Names of a stash that are tried behind one that is stale.
const TRIES: u32 = 8;

/// What a stash names is not there to be taken.
struct Stale;

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// An area out of the current CPU's stash: its address.
    #[inline]
    pub(super) fn take_stashed(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        request: &Request,
        class: Class,
    ) -> Option<usize> {
        let at = caches.table + STASHES_AT + request.key.stash_at();
        // SAFETY: the table lives on every CPU, and its words are changed by a seat's operations only.
        let stash = Stash::from_bits(unsafe { seat.peek_word(at)? });
        let first = stash.first(class)?;
        let granule = first.granule();
        if !request.key.is_aligned(granule) {
            // No area of an even length starts there that was stashed: another stash's name.
            if granule & 1 != 0 {
                self.forget_stash(seat, at, stash);
            }
            return None;
        }
        match self.take_first(caches, seat, at, request, (stash, first)) {
            Ok(address) => address,
            Err(Stale) => self.take_behind(caches, seat, at, request, (stash, class)),
        }
    }

    /// Takes the area that a stash names first, if it is still there to be taken.
    #[inline(always)]
    fn take_first(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        at: usize,
        request: &Request,
        (stash, first): (Stash, First),
    ) -> Result<Option<usize>, Stale> {
        let granule = first.granule();
        let address = self.geometry.window.base + granule as usize * GRANULE_BYTES;
        let (place, in_unit) = self.place_of(granule);
        if !self.places.reuse(place, in_unit, request.key.len()) {
            return Err(Stale);
        }
        let link = match caches.name_at(at, stash.depth()) {
            // SAFETY: the area is ours, and live on every CPU that has memory.
            None => unsafe { seat.read_link(address) },
            // SAFETY: the rows live on every CPU that has memory.
            Some(name_at) => unsafe { seat.read_link(name_at) },
        };
        let left = first.taken(link);
        // SAFETY: as in `take_stashed`.
        match unsafe { seat.replace_word(at, stash.bits(), left.bits()) } {
            true => Ok(Some(address)),
            false => Ok(self.take_out(seat, at, request, address, link)),
        }
    }

    /// Takes an area of a stash whose first one has been swept. Where the names stand in the areas, they went with it; in rows they are
    /// what they were, and a few of them are tried: those of a large instance that one page was swept of are few.
    #[inline(never)]
    fn take_behind(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        at: usize,
        request: &Request,
        (mut stash, class): (Stash, Class),
    ) -> Option<usize> {
        for _ in 0..TRIES {
            let Some(name_at) = caches.name_at(at, stash.depth()) else {
                break;
            };
            self.note_chunk_of(stash);
            // SAFETY: the rows live on every CPU that has memory.
            let left = stash.dropped(unsafe { seat.read_link(name_at) });
            // SAFETY: as in `take_stashed`.
            if !unsafe { seat.replace_word(at, stash.bits(), left.bits()) } {
                return None;
            }
            stash = left;
            let first = stash.first(class)?;
            if !request.key.is_aligned(first.granule()) {
                return None;
            }
            if let Ok(address) = self.take_first(caches, seat, at, request, (stash, first)) {
                return address;
            }
        }
        self.forget_stash(seat, at, stash);
        None
    }

    /// Empties a stash whose first area has been swept: most likely so have the others.
    #[inline(never)]
    fn forget_stash(&self, seat: &impl Seat, at: usize, stash: Stash) {
        self.note_chunk_of(stash);
        // SAFETY: as in `take_stashed`.
        unsafe { seat.replace_word(at, stash.bits(), stash.cleared().bits()) };
    }

    /// Notes that there may be something to sweep where a stash's first area was found to be none, or another.
    fn note_chunk_of(&self, stash: Stash) {
        let (place, _) = self.place_of(stash.head());
        self.places.note_chunk(place);
    }

    /// Counts an area that was made live again, and takes it out of the stash if it is still the first one there.
    #[cold]
    #[inline(never)]
    fn take_out(
        &self,
        seat: &impl Seat,
        at: usize,
        request: &Request,
        address: usize,
        link: u32,
    ) -> Option<usize> {
        let granule = ((address - self.geometry.window.base) / GRANULE_BYTES) as u32;
        loop {
            // SAFETY: as in `take_stashed`.
            let now = unsafe { seat.peek_word(at) }.map(Stash::from_bits);
            let Some(stash) = now.filter(|now| now.len() == request.key.len()) else {
                // The caller has come to a CPU that has no such stash.
                return self.count_stray(address, request);
            };
            let left = stash.without(granule, link);
            // SAFETY: as above.
            if unsafe { seat.replace_word(at, stash.bits(), left.bits()) } {
                return Some(address);
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
    fn count_stray(&self, address: usize, request: &Request) -> Option<usize> {
        match self.lock(request.flags.contains(AllocFlags::TRY)) {
            Some(mut state) => {
                let bytes = request.key.len() as usize * GRANULE_BYTES;
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
        let (place, in_unit) = self.place_of(granule);
        let Some(area) = self.places.live_area(place, in_unit) else {
            return false;
        };
        let at = match area.len() <= OWN_PLACES {
            true => caches.table + STASHES_AT + Stash::own_offset(area.len()),
            // The tables are such areas themselves.
            false if caches.is_own(address) => return false,
            false if area.len() > MAX_LEN => return self.free_and_sweep(granule),
            false => caches.stash_of(area.len()),
        };
        const {
            let least_bytes = OWN_PLACES as usize * GRANULE_BYTES;
            assert!(TABLE_BYTES > least_bytes);
            assert!(ROWS_BYTES > least_bytes);
        }
        // SAFETY: as in `take_stashed`.
        let Some(bits) = (unsafe { seat.peek_word(at) }) else {
            return self.free_and_sweep(granule);
        };
        let stash = Stash::from_bits(bits);
        let Some(more) = stash.with(granule, area.len(), caches.stash_granules()) else {
            return self.free_and_sweep(granule);
        };
        match caches.name_at(at, more.depth()) {
            // While the area is the caller's.
            // SAFETY: nobody uses the area (promise of whoever frees it), which is live on every CPU that has memory.
            None => unsafe { seat.write_link(address, stash.link()) },
            // SAFETY: the rows live on every CPU that has memory, and hold hints.
            Some(name_at) => unsafe { seat.write_link(name_at, stash.link()) },
        }
        if !area.end() {
            return false;
        }
        // SAFETY: as above.
        match unsafe { seat.replace_word(at, stash.bits(), more.bits()) } {
            true => area.note(&self.places),
            false => self.note_freed(granule),
        }
        true
    }

    /// Has the area at a granule of the window swept, which was freed and is in no stash, by whoever wants room.
    #[cold]
    fn note_freed(&self, granule: u32) {
        let (place, in_unit) = self.place_of(granule);
        self.places.note(place, in_unit);
    }

    /// Frees the area at a granule of the window, which no stash has room for; false if it is not live any more.
    #[inline(never)]
    fn free_and_sweep(&self, granule: u32) -> bool {
        let (place, in_unit) = self.place_of(granule);
        let freed = self.places.free(place, in_unit);
        if let Some(Some((chunk, granule))) = freed {
            self.sweep_page(place, chunk, granule);
        }
        freed.is_some()
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
