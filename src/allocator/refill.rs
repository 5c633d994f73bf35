//! What the holder of the lock does for a request that its CPU's cache could not serve: fills the cache anew, where memory that
//! is there has room for several areas of its class.
//!
//! Areas are taken from the lowest place that has room for several, one behind the other: they are a run.

use core::ops::Range;

use lock_api::{MutexGuard, RawMutex};

use super::PerCpuAllocator;
use super::drain::may_drain;
use super::runs::Caches;
use super::share::Sharing;
use super::state::{State, Taken};
use crate::backing::Backing;
use crate::cache::{Class, MAX_SLOTS, MOST_GRANULES, Run, Seat};
use crate::request::{AllocError, AllocFlags, Request};
use crate::this_cpu::slots::{FRESH, FULL, MAP, ONE_TAKEN};
use crate::unit::GRANULE_BYTES;

/// Bytes that a run is made of, at least and at most; in between, a share of the memory that there is for each CPU with a cache.
const FILL_BYTES: Range<u64> = 512..8192;
/// The same, at most, while about as much is live as ever was: what is idle then is memory that lacks.
const FILL_BYTES_AT_PEAK: u64 = 1280;
/// As a divisor.
const FILL_SHARE: u64 = 128;

/// Bytes that a stash may name, at least and at most; in between, a share of that memory.
const STASH_BYTES: Range<u64> = 1024..MOST_GRANULES as u64 * GRANULE_BYTES as u64;
/// As a divisor.
const STASH_SHARE: u64 = 48;

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Serves what the current CPU's run cannot.
    #[cold]
    #[inline(never)]
    pub(super) fn allocate_past_cache(
        &self,
        seat: &impl Seat,
        request: &Request,
    ) -> Result<usize, AllocError> {
        let result = self.check_request(request).and_then(|(granules, align)| {
            let Some(caches) = &self.caches else {
                return self.serve(request, granules, align);
            };
            let mut state = self
                .lock(request.flags.contains(AllocFlags::TRY))
                .ok_or(AllocError::Busy)?;
            state.stats.cache_misses += 1;
            if let Some((_, class)) = self.caches_for(request) {
                if let Some(address) = self.collect_shared(caches, seat, request, class) {
                    drop(state);
                    return Ok(self.hand_out_cached(request, address, class, false));
                }
                self.settle_stash(caches, seat, &mut state, class);
                self.close_unused(caches, seat, &mut state);
                loop {
                    match self.refill(caches, seat, state, request, class) {
                        Ok(address) => return Ok(address),
                        Err(locked) => state = locked,
                    }
                    if let Some(taken) = state.take_ready(request.flags, granules, align) {
                        return Ok(self.hand_out(state, request, &taken));
                    }
                    if state.may_grow_unswept() || !state.sweep_for(granules) {
                        break;
                    }
                }
            }
            let state = self.make_caches_lean(caches, seat, state, request, (granules, align));
            let result = self.serve_locked(state, request, granules, align);
            let is_short = matches!(result, Err(AllocError::Backing(_)));
            if !is_short || !may_drain(request) {
                return result;
            }
            // What lies idle in caches may do.
            self.drain(seat);
            self.serve(request, granules, align)
        });
        if let Err(error) = result {
            self.refuse(request, error);
        }
        self.keep_up_with(request);
        result
    }

    /// Serves a request by the first of several areas that it fills the cache with; gives the lock back if it does not.
    fn refill<'a>(
        &'a self,
        caches: &Caches,
        seat: &impl Seat,
        mut state: MutexGuard<'a, R, State>,
        request: &Request,
        class: Class,
    ) -> Result<usize, MutexGuard<'a, R, State>> {
        let fill_bytes = self.set_sizes(caches, &state);
        let len_bytes = u64::from(class.len()) * GRANULE_BYTES as u64;
        let wanted = (fill_bytes / len_bytes).min(MAX_SLOTS.into()) as u32;
        let at = caches.table + class.table_offset();
        let (closed, sharing) = loop {
            // SAFETY: the tables live on every CPU, and are changed by a seat's operations with this gate only.
            let Some(pair) = (unsafe { seat.peek_pair(at) }) else {
                return Err(state);
            };
            if pair[1] == 0 {
                match self.introduce(at, seat.cpu()) {
                    true => continue,
                    false => return Err(state),
                }
            }
            let run = Run::from_bits(pair[1]);
            let Some(closed) = Run::closed(run.cpu()) else {
                return Err(state);
            };
            if !run.is_open() {
                break (closed, Sharing::Own);
            }
            let mut sharing = Sharing::Own;
            if run.class() == class && pair[0] & FULL == 0 {
                if pair[0] & MAP != 0 {
                    // Somebody else has opened it meanwhile, or the caller has come to another CPU.
                    if let Some(address) = self.take_from_run(caches, seat, request, class) {
                        return Ok(address);
                    }
                    continue;
                }
                sharing = self.sharing_after(caches, run);
                if sharing == Sharing::Shared
                    && self.is_worth_collecting(run)
                    && let Some(address) = self.collect(caches, seat, (at, pair))
                {
                    drop(state);
                    return Ok(self.hand_out_cached(request, address, class, false));
                }
            }
            // SAFETY: as above.
            if unsafe { seat.replace_pair_gated(at, pair, [0, closed.bits()], &caches.gate) } {
                self.retire_run(caches, &mut state, pair);
                break (closed, sharing);
            }
        };
        self.open_run(
            caches,
            seat,
            state,
            request,
            (at, closed, class, wanted),
            sharing,
        )
    }

    /// Has the current CPU's cache take areas back that are about to be served past it.
    pub(super) fn prepare_stash(&self, seat: &impl Seat, request: &Request) {
        if let Some((caches, class)) = self.caches_for(request)
            && let Some(mut state) = self.lock(request.flags.contains(AllocFlags::TRY))
        {
            self.set_sizes(caches, &state);
            self.settle_stash(caches, seat, &mut state, class);
        }
    }

    /// How many bytes a cache is filled with; also sets what a stash may name.
    fn set_sizes(&self, caches: &Caches, state: &State) -> u64 {
        let page_bytes = self.geometry.sizes.page_bytes() as u64;
        let memory_bytes = state.stats.populated_pages * page_bytes - caches.rows_bytes();
        let cpu_bytes = memory_bytes / u64::from(self.units.with_runs.count().max(1));
        let stash_bytes = (cpu_bytes / STASH_SHARE).clamp(STASH_BYTES.start, STASH_BYTES.end);
        caches.set_stash_granules((stash_bytes / GRANULE_BYTES as u64) as u32);
        let most = match state.is_near_peak() {
            true => FILL_BYTES_AT_PEAK,
            false => FILL_BYTES.end,
        };
        (cpu_bytes / FILL_SHARE).clamp(FILL_BYTES.start, most)
    }

    /// Opens a run on the CPU of `closed`, and serves a request from it. One in place of a run that other CPUs freed areas of
    /// until the end is shared from the start, which costs no fence.
    fn open_run<'a>(
        &'a self,
        caches: &Caches,
        seat: &impl Seat,
        mut state: MutexGuard<'a, R, State>,
        request: &Request,
        (at, closed, class, wanted): (usize, Run, Class, u32),
        sharing: Sharing,
    ) -> Result<usize, MutexGuard<'a, R, State>> {
        let Some((taken, slots)) = state.take_run(class, wanted) else {
            return Err(state);
        };
        let Taken { chunk, place, area } = taken;
        let len = class.len();
        let start = self.neutral(place) + state.body(chunk).byte_offset(area.start);
        let in_reach = self
            .run_granule(start + area.len() * GRANULE_BYTES)
            .and(self.run_granule(start));
        let Some(base) = in_reach else {
            state.give_back_areas(chunk, area, len);
            return Err(state);
        };
        // What other runs leave of it, or one area that is no run's.
        let kept = caches.cells.stretch(Run::open(closed, class, base, slots));
        let kept = if kept.len() > 1 { kept } else { 0..1 };
        let (first, end) = (area.start + kept.start * len, area.start + kept.end * len);
        state.give_back_areas(chunk, area.start..first, len);
        state.give_back_areas(chunk, end..area.end, len);
        let (offset, dirty) = state.hand_out_area(chunk, first..end);
        let address = self.neutral(place) + offset;
        let is_fresh = dirty.is_empty();
        let room = kept.end - kept.start;
        let run = Run::open(closed, class, base + kept.start * len, room);
        let run = match sharing {
            Sharing::Own => run,
            Sharing::Shared => run.shared(),
        };
        if room > 1 {
            let free = (1 << room) - 2;
            let fresh = if is_fresh { FRESH } else { 0 };
            caches.cells.enter(run);
            // SAFETY: as in `refill`.
            let is_open = unsafe {
                seat.replace_pair_gated(
                    at,
                    [0, closed.bits()],
                    [free | fresh | ONE_TAKEN, run.bits()],
                    &caches.gate,
                )
            };
            if is_open {
                state.count_run(room, class.len() as usize * GRANULE_BYTES, request.bytes);
                self.note_due(&state);
                drop(state);
                return Ok(self.hand_out_cached(request, address, class, is_fresh));
            }
            // The caller is on another CPU by now.
            caches.cells.remove(run);
            state.give_back_areas(chunk, first + len..end, len);
        }
        // One area is left, which is no run's.
        state.count_alloc(request.bytes, class.len() as usize * GRANULE_BYTES);
        self.note_due(&state);
        drop(state);
        Ok(self.hand_out_cached(request, address, class, is_fresh))
    }

    /// Gives out an area of a class.
    fn hand_out_cached(
        &self,
        request: &Request,
        address: usize,
        class: Class,
        is_fresh: bool,
    ) -> usize {
        if !is_fresh && !request.flags.contains(AllocFlags::NO_ZERO) {
            self.zero(address, class.len() as usize * GRANULE_BYTES);
        }
        address
    }
}
