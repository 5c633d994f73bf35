//! Several areas for one request at one go: all of them, or none.
//!
//! They come out of the caller's CPU's cache as far as that goes. The rest is taken with the lock held once, in rows of areas that lie
//! one behind the other where there is room, and is zeroed row by row. What memory that is there has no room for is served
//! singly, as other requests are, and the rows go on behind it.
//!
//! Nobody knows of any of the areas until all are there: the event hook is told of them then, and of one failure otherwise. A batch
//! that fails leaves neither an area nor a count of one; the most that ever lived is what lived meanwhile.

use core::ops::Range;

use lock_api::{MutexGuard, RawMutex};

use super::drain::may_drain;
use super::hardened::{Hardened, told_apart};
use super::state::State;
use super::{PerCpuAllocator, WATCHED};
use crate::backing::Backing;
use crate::cache::Seat;
use crate::request::{AllocError, AllocFlags, FreeError, FreeFlags, FreeManyError, Request};
use crate::stats::{Event, EventHook};
use crate::unit::GRANULE_BYTES;

/// Rows that are taken while the lock is held, at most.
const MAX_ROWS: usize = 16;

/// Rows that are to be zeroed, as ranges of neutral addresses; those that lie one behind the other are one.
#[derive(Debug, Default)]
struct Dirty {
    ranges: [Range<usize>; MAX_ROWS],
    len: usize,
}

impl Dirty {
    fn is_full(&self) -> bool {
        self.len == MAX_ROWS
    }

    /// Notes one range more; there is room for it.
    fn add(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        if let Some(last) = self.len.checked_sub(1)
            && self.ranges[last].end == range.start
        {
            self.ranges[last].end = range.end;
            return;
        }
        self.ranges[self.len] = range;
        self.len += 1;
    }

    /// Takes all ranges out.
    fn take(&mut self) -> impl Iterator<Item = Range<usize>> {
        let len = core::mem::take(&mut self.len);
        self.ranges[..len].iter().cloned()
    }
}

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Serves a request as often as `out` is long, at one go: fills `out` with the neutral addresses of so many areas, or with
    /// nothing of use. If `out` is empty it does nothing, whatever the request.
    ///
    /// It costs less than as many calls of [`allocate`](Self::allocate): the lock is taken once where memory that is there has room,
    /// and areas that come to lie one behind the other are zeroed together.
    ///
    /// In [hardened mode](crate::hardened) areas have guards between them, and are made one by one.
    ///
    /// ```
    /// use pcpu::backing::sim::Machine;
    /// use pcpu::{FreeFlags, Request};
    ///
    /// let pcpu = Machine::new(4).build()?;
    /// let mut counters = [0; 5];
    /// pcpu.allocate_many(&Request::new(8, 8), &mut counters)?;
    /// assert_eq!(pcpu.stats().live, 5);
    /// // SAFETY: nobody uses the counters any more.
    /// unsafe { pcpu.free_many(&counters, FreeFlags::empty())? };
    /// assert_eq!(pcpu.stats().live, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`AllocError`] of the first area that there was no room for; then no area has been allocated. [`AllocError::Busy`] also for
    /// more than one area with [`AllocFlags::TRY`] in hardened mode, for what had been allocated could not be freed for certain.
    pub fn allocate_many(&self, request: &Request, out: &mut [usize]) -> Result<(), AllocError> {
        if out.is_empty() {
            return Ok(());
        }
        let result = match &self.hardened {
            None => self.fill(request, out, |request, (granules, align)| {
                self.serve(request, granules, align)
            }),
            Some(hardened) => self.fill_hardened(hardened, request, out),
        };
        self.end_many(request, result)
    }

    /// [`allocate_many`](Self::allocate_many) through the cache of the CPU that `seat` is on, if the instance
    /// [has caches](Self::enable_caches).
    ///
    /// # Errors
    /// As [`allocate_many`](Self::allocate_many).
    pub fn allocate_many_at(
        &self,
        seat: &impl Seat,
        request: &Request,
        out: &mut [usize],
    ) -> Result<(), AllocError> {
        if self.caches.is_none() || self.has_sign(WATCHED) {
            return self.allocate_many(request, out);
        }
        let mut dirty = Dirty::default();
        let mut cached = 0;
        while cached < out.len()
            && let Some((address, dirty_bytes)) = self.take_dirty(seat, request)
        {
            out[cached] = address;
            cached += 1;
            if !request.flags.contains(AllocFlags::NO_ZERO) {
                if dirty.is_full() {
                    self.zero_all(&mut dirty);
                }
                dirty.add(dirty_bytes);
            }
        }
        self.zero_all(&mut dirty);
        if cached == out.len() {
            self.keep_up_with(request);
            return Ok(());
        }
        self.prepare_stash(seat, request);
        let (cached, rest) = out.split_at_mut(cached);
        let result = self.fill(request, rest, |request, size| {
            self.serve_draining(seat, request, size)
        });
        if result.is_err() && !cached.is_empty() {
            self.put_back(seat, request, cached);
        }
        self.end_many(request, result)
    }

    /// Frees areas, in their order. It takes no lock round, and so has nothing to save beside single frees.
    ///
    /// # Errors
    /// [`FreeManyError`] says which one was not freed, those before it are, those behind it are not.
    ///
    /// # Safety
    /// As [`free`](Self::free), for each.
    pub unsafe fn free_many(
        &self,
        addresses: &[usize],
        flags: FreeFlags,
    ) -> Result<(), FreeManyError> {
        // SAFETY: the promise of the caller.
        free_each(addresses.iter().copied(), |address| unsafe {
            self.free_with(address, flags)
        })
    }

    /// [`free_many`](Self::free_many) through the cache of the CPU that `seat` is on.
    ///
    /// # Errors
    /// As [`free_many`](Self::free_many).
    ///
    /// # Safety
    /// As [`free_many`](Self::free_many).
    pub unsafe fn free_many_at(
        &self,
        seat: &impl Seat,
        addresses: &[usize],
        flags: FreeFlags,
    ) -> Result<(), FreeManyError> {
        // SAFETY: the promise of the caller.
        free_each(addresses.iter().copied(), |address| unsafe {
            self.free_at(seat, address, flags)
        })
    }

    /// Counts and reports a batch that was refused; runs the upkeep if it is due.
    fn end_many(
        &self,
        request: &Request,
        result: Result<(), AllocError>,
    ) -> Result<(), AllocError> {
        if let Err(error) = result {
            self.refuse(request, error);
        }
        self.keep_up_with(request);
        result
    }

    /// Fills `out`, which is not empty, with areas past the caches, or undoes what it has taken. `serve_one` serves what takes more
    /// than memory that is there.
    fn fill(
        &self,
        request: &Request,
        out: &mut [usize],
        serve_one: impl Fn(&Request, (u32, u32)) -> Result<usize, AllocError>,
    ) -> Result<(), AllocError> {
        let size = self.check_request(request)?;
        let single = told_apart(request);
        let mut hook = None;
        let mut filled = 0;
        while filled < out.len() {
            let result = match self.fill_ready(request, size, &mut out[filled..], &mut hook) {
                Ok(0) => serve_one(&single, size).map(|address| {
                    out[filled] = address;
                    1
                }),
                result => result,
            };
            match result {
                Ok(more) => filled += more,
                Err(error) => {
                    // Who may only try fails with its first area, or has undone all of them.
                    if filled > 0 {
                        self.undo(self.state.lock(), request, size, &out[..filled]);
                    }
                    return Err(error);
                }
            }
        }
        if let Some(hook) = hook {
            out.iter()
                .for_each(|&address| self.tell_alloc(hook, request, address));
        }
        Ok(())
    }

    /// Takes areas in memory that is there, with the lock held once; returns how many. Who may only try gets all of them or an
    /// error: the lock may not be had again, neither to go on nor to undo.
    fn fill_ready(
        &self,
        request: &Request,
        size: (u32, u32),
        out: &mut [usize],
        hook: &mut Option<&'static dyn EventHook>,
    ) -> Result<usize, AllocError> {
        let flags = request.flags;
        let is_try = flags.contains(AllocFlags::TRY);
        let len_bytes = size.0 as usize * GRANULE_BYTES;
        let mut state = self.lock(is_try).ok_or(AllocError::Busy)?;
        *hook = state.hook;
        let mut dirty = Dirty::default();
        let (mut filled, mut rows) = (0, 0);
        while filled < out.len() && (rows < MAX_ROWS || is_try) {
            let Some((taken, areas)) = state.take_row(flags, size, out.len() - filled) else {
                if !flags.contains(AllocFlags::RESERVED) && state.sweep_lowest() {
                    continue;
                }
                break;
            };
            rows += 1;
            let (offset, dirty_bytes) = state.hand_out(&taken);
            let first = self.neutral(taken.place) + offset;
            for slot in 0..areas as usize {
                out[filled] = first + slot * len_bytes;
                filled += 1;
            }
            if !flags.contains(AllocFlags::NO_ZERO) {
                if dirty.is_full() {
                    self.zero_all(&mut dirty);
                }
                dirty.add(first + dirty_bytes.start..first + dirty_bytes.end);
            }
        }
        if filled > 0 {
            state.count_many(filled, request.bytes, len_bytes);
        }
        if is_try && filled < out.len() {
            let error = match flags.contains(AllocFlags::RESERVED) {
                true => AllocError::ReservedExhausted {
                    bytes: request.bytes,
                    free_bytes: state.reserved_free_bytes(),
                },
                false => AllocError::Busy,
            };
            self.undo(state, request, size, &out[..filled]);
            return Err(error);
        }
        self.note_due(&state);
        drop(state);
        self.zero_all(&mut dirty);
        Ok(filled)
    }

    fn zero_all(&self, dirty: &mut Dirty) {
        dirty
            .take()
            .for_each(|range| self.zero(range.start, range.len()));
    }

    /// Makes areas free and uncounts them that have been taken past the caches and that nobody knows of.
    #[cold]
    fn undo(
        &self,
        mut state: MutexGuard<'_, R, State>,
        request: &Request,
        (granules, _): (u32, u32),
        areas: &[usize],
    ) {
        let mut undone = 0;
        for &address in areas {
            let is_released = self.locate(address).is_some_and(|(place, offset)| {
                let chunk = state.chunk_at(request.flags, place);
                chunk.is_some_and(|chunk| state.release(chunk, offset).is_ok())
            });
            match is_released {
                true => undone += 1,
                // Somebody has freed it who had it before: it is swept and counted as any other.
                false => state.stats.late_errors += 1,
            }
        }
        state.uncount_many(undone, granules as usize * GRANULE_BYTES);
        self.note_due(&state);
    }

    /// Puts areas back that came out of the caches, and uncounts them.
    #[cold]
    fn put_back(&self, seat: &impl Seat, request: &Request, areas: &[usize]) {
        let flags = request.free_flags();
        for &address in areas {
            // SAFETY: the area was taken for the caller, who never learnt of it.
            let freed = unsafe { self.free_at(seat, address, flags) };
            if freed.is_err()
                && let Some((place, offset)) = self.locate(address)
            {
                // Who may only try has come to another CPU, and the lock is taken: by the area's mark then.
                self.places.free(place, (offset / GRANULE_BYTES) as u32);
            }
        }
        // Who may only try may find the lock taken: then they count as handed out and freed.
        if let Some(mut state) = self.lock(request.flags.contains(AllocFlags::TRY)) {
            let len_bytes = request.key.len() as usize * GRANULE_BYTES;
            let areas = areas.len() as u64;
            state.stats.uncount_allocs(areas, len_bytes);
        }
    }

    /// Serves what memory that is there cannot serve, by what lies idle in caches rather than by memory beyond the peak.
    fn serve_draining(
        &self,
        seat: &impl Seat,
        request: &Request,
        (granules, align): (u32, u32),
    ) -> Result<usize, AllocError> {
        let Some(caches) = &self.caches else {
            return self.serve(request, granules, align);
        };
        let state = self.state.lock();
        let state = self.make_caches_lean(caches, seat, state, request, (granules, align));
        let result = self.serve_locked(state, request, granules, align);
        let is_short = matches!(result, Err(AllocError::Backing(_)));
        if !is_short || !may_drain(request) {
            return result;
        }
        self.drain(seat);
        self.serve(request, granules, align)
    }

    /// [`fill`](Self::fill) in hardened mode, where each area is entered into the ledger and told apart.
    fn fill_hardened(
        &self,
        hardened: &Hardened<R>,
        request: &Request,
        out: &mut [usize],
    ) -> Result<(), AllocError> {
        if let [only] = out {
            *only = self.serve_hardened(hardened, request)?;
            return Ok(());
        }
        // What has been allocated could not be freed for certain.
        if request.flags.contains(AllocFlags::TRY) {
            return Err(AllocError::Busy);
        }
        let size = self.check_hardened(request)?;
        let single = told_apart(request);
        for index in 0..out.len() {
            match self.serve_hardened_checked(hardened, &single, size) {
                Ok(address) => out[index] = address,
                Err(error) => {
                    for &address in &out[..index] {
                        self.undo_hardened(hardened, request, address);
                    }
                    return Err(error);
                }
            }
        }
        if let Some(hook) = hardened.event_hook() {
            out.iter()
                .for_each(|&address| self.tell_alloc(hook, request, address));
        }
        Ok(())
    }

    #[cold]
    pub(super) fn tell_alloc(&self, hook: &dyn EventHook, request: &Request, address: usize) {
        if let Some(at) = self.locate(address) {
            hook.event(&Event::Alloc {
                address,
                bytes: request.bytes,
                align: request.align,
                flags: request.flags,
                owner: request.owner,
                at,
            });
        }
    }
}

/// Frees areas one after the other, up to the first that is refused.
pub(crate) fn free_each(
    addresses: impl IntoIterator<Item = usize>,
    free: impl Fn(usize) -> Result<(), FreeError>,
) -> Result<(), FreeManyError> {
    addresses
        .into_iter()
        .enumerate()
        .try_for_each(|(freed, address)| {
            free(address).map_err(|error| FreeManyError { freed, error })
        })
}
