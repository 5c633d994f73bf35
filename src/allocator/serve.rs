//! How a request is served: checked, placed, its pages populated where they must be, zeroed, handed out; and how a chunk
//! is made when no other has room.

use core::ptr::NonNull;

use lock_api::{MutexGuard, RawMutex};
use zerocopy::FromZeros;

use super::PerCpuAllocator;
use super::hardened::is_told_apart;
use super::state::{Batch, Growth, State, Taken, VacantPlace};
use crate::backing::{Backing, BackingError, Context, CpuArea};
use crate::chunk::{Chunk, Nature, PageMask};
use crate::cpus::Units;
use crate::request::{AllocError, AllocFlags, Request};
use crate::stats::{Event, EventHook};
use crate::unit::{Contents, GRANULE_BYTES};

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// The request in granules: (length, alignment).
    pub(super) fn check_request(&self, request: &Request) -> Result<(u32, u32), AllocError> {
        let (bytes, align) = (request.bytes, request.align);
        if bytes == 0 {
            return Err(AllocError::ZeroSize);
        }
        if bytes > self.geometry.max_alloc_bytes {
            return Err(AllocError::TooLarge {
                bytes,
                limit_bytes: self.geometry.max_alloc_bytes,
            });
        }
        if !align.is_power_of_two() {
            return Err(AllocError::AlignNotPowerOfTwo { align });
        }
        if align > self.geometry.max_align_bytes {
            return Err(AllocError::AlignTooLarge {
                align,
                limit: self.geometry.max_align_bytes,
            });
        }
        let unknown = request.flags.bits() & !AllocFlags::all().bits();
        if unknown != 0 {
            return Err(AllocError::UnknownFlags { bits: unknown });
        }
        Ok((
            bytes.div_ceil(GRANULE_BYTES) as u32,
            align.div_ceil(GRANULE_BYTES) as u32,
        ))
    }

    /// Serves a request that has been checked.
    #[inline]
    pub(super) fn serve(
        &self,
        request: &Request,
        granules: u32,
        align: u32,
    ) -> Result<usize, AllocError> {
        let state = self
            .lock(request.flags.contains(AllocFlags::TRY))
            .ok_or(AllocError::Busy)?;
        self.serve_locked(state, request, granules, align)
    }

    /// [`serve`](Self::serve) with the lock held.
    #[inline]
    pub(super) fn serve_locked<'a>(
        &'a self,
        mut state: MutexGuard<'a, R, State>,
        request: &Request,
        granules: u32,
        align: u32,
    ) -> Result<usize, AllocError> {
        match state.take_ready(request.flags, granules, align) {
            Some(taken) => Ok(self.hand_out(state, request, &taken)),
            None => self.serve_swept(state, request, granules, align),
        }
    }

    /// Serves a request that no free granules can serve in memory that is there: by those of areas that were freed and not
    /// swept, or else by growing.
    #[inline(never)]
    fn serve_swept<'a>(
        &'a self,
        mut state: MutexGuard<'a, R, State>,
        request: &Request,
        granules: u32,
        align: u32,
    ) -> Result<usize, AllocError> {
        let can_grow = !request
            .flags
            .intersects(AllocFlags::RESERVED | AllocFlags::TRY);
        if can_grow && state.may_grow_unswept() {
            match self.serve_growing(state, request, granules, align) {
                // What was freed may do.
                Err(AllocError::Backing(_)) => state = self.state.lock(),
                result => return result,
            }
        }
        while state.sweep_lowest() {
            if let Some(taken) = state.take_ready(request.flags, granules, align) {
                return Ok(self.hand_out(state, request, &taken));
            }
        }
        state.note_needed();
        self.serve_growing(state, request, granules, align)
    }

    /// Serves a request that memory that is there cannot serve.
    fn serve_growing<'a>(
        &'a self,
        mut state: MutexGuard<'a, R, State>,
        request: &Request,
        granules: u32,
        align: u32,
    ) -> Result<usize, AllocError> {
        let context = request.context();
        let mut has_reclaimed = false;
        let is_wait_allowed = !request.flags.contains(AllocFlags::TRY);
        let mut placed = if is_wait_allowed && state.rest_wanted > 0 {
            state = self.until_work_may_begin(state);
            state.take_anew(request.flags, granules, align)
        } else {
            state.take_growing(request.flags, granules, align, Growth::Ahead)
        };
        loop {
            let found = match placed {
                Some(found) => found,
                None => match self.make_room(state, request) {
                    Ok(locked) => {
                        state = match is_wait_allowed {
                            true => self.until_work_may_begin(locked),
                            false => locked,
                        };
                        placed = state.take_anew(request.flags, granules, align);
                        continue;
                    }
                    Err((mut locked, error)) => {
                        let is_dynamic = matches!(error, AllocError::Backing(_));
                        let found = is_dynamic.then(|| locked.place_anywhere(granules, align));
                        state = locked;
                        found.flatten().ok_or(error)?
                    }
                },
            };
            if !found.claimed.is_empty() {
                let batch = state.begin_work();
                drop(state);
                let (place, pages) = (found.taken.place, found.claimed_in_unit);
                let populated = self.populate_claimed(place, pages, batch, context);
                state = self.state.lock();
                state.end_work(batch);
                match populated {
                    Ok(contents) => {
                        state.edit(found.taken.chunk, |body| {
                            body.populated(found.claimed, contents)
                        });
                    }
                    Err(error) => {
                        state.undo(&found);
                        if found.growth == Growth::Ahead {
                            state = self.until_work_may_begin(state);
                            let needed = Growth::Needed;
                            placed = state.take_growing(request.flags, granules, align, needed);
                            continue;
                        }
                        self.note_due(&state);
                        drop(state);
                        // Pages that nobody uses may still hold memory: give it back, then try once more.
                        let may_retry = context == Context::MaySleep && !has_reclaimed;
                        if !may_retry || self.give_back(0) == 0 {
                            return Err(error.into());
                        }
                        has_reclaimed = true;
                        state = self.lock_to_work();
                        placed = state.take_anew(request.flags, granules, align);
                        continue;
                    }
                }
            }
            if !found.claimed.is_empty() && context == Context::Atomic {
                state.note_atomic_growth();
            }
            if found.was_spare && context == Context::Atomic {
                state.spares_wanted += 1;
            }
            return Ok(self.hand_out(state, request, &found.taken));
        }
    }

    /// Makes room for a request that no chunk in use and no spare one has room for; the lock is given up for it and taken
    /// again. The chunk that it makes goes to the request, unless somebody else is quicker.
    fn make_room<'a>(
        &'a self,
        mut state: MutexGuard<'a, R, State>,
        request: &Request,
    ) -> Result<MutexGuard<'a, R, State>, (MutexGuard<'a, R, State>, AllocError)> {
        if request.flags.contains(AllocFlags::RESERVED) {
            let free_bytes = state.reserved_free_bytes();
            let error = AllocError::ReservedExhausted {
                bytes: request.bytes,
                free_bytes,
            };
            return Err((state, error));
        }
        if request.flags.contains(AllocFlags::TRY) {
            return Err((state, AllocError::Busy));
        }
        if request.context() == Context::Atomic {
            state.note_shortfall();
            self.note_due(&state);
        } else if state.busy_places > 0 {
            // A chunk is being made, or a place comes free: better wait for it than make one more.
            drop(state);
            self.backing.relax();
            return Ok(self.state.lock());
        }
        let place = match state.claim_place() {
            Ok(place) => place,
            Err(error) => return Err((state, error.into())),
        };
        let hook = state.hook;
        drop(state);
        let made = self.make_chunk_at(place, request.context());
        self.enter_chunk(place, made, hook)
            .map_err(|error| (self.state.lock(), error.into()))
    }

    /// Gives out an area that has been taken and has memory.
    #[inline]
    pub(super) fn hand_out(
        &self,
        mut state: MutexGuard<'_, R, State>,
        request: &Request,
        taken: &Taken,
    ) -> usize {
        let (offset, dirty_bytes) = state.hand_out(taken);
        state.count_alloc(request.bytes, taken.area.len() * GRANULE_BYTES);
        self.note_due(&state);
        let hook = state.hook;
        drop(state);

        let address = self.neutral(taken.place) + offset;
        if !request.flags.contains(AllocFlags::NO_ZERO) && !dirty_bytes.is_empty() {
            self.zero(address + dirty_bytes.start, dirty_bytes.len());
        }
        if let Some(hook) = hook
            && !is_told_apart(request.flags)
        {
            hook.event(&Event::Alloc {
                address,
                bytes: request.bytes,
                align: request.align,
                flags: request.flags,
                owner: request.owner,
                at: (taken.place, offset),
            });
        }
        address
    }

    /// Populates claimed pages of the unit, all of them or none. Called without the lock.
    pub(super) fn populate_claimed(
        &self,
        place: u32,
        pages: PageMask,
        batch: Batch,
        context: Context,
    ) -> Result<Contents, BackingError> {
        let span = self.span(place, pages, self.populated_for(batch));
        // SAFETY: the chunk is in the directory, so it is reserved; the pages had no memory and are claimed.
        let contents = unsafe { self.backing.populate(span, context)? };
        if contents == Contents::Dirty && batch.is_bring_up {
            // Handing out zeroes materialised CPUs only: the one on its way would keep what the pages hold.
            span.areas().for_each(zero_area);
            return Ok(Contents::Zeroed);
        }
        Ok(contents)
    }

    /// Zeroes `bytes`, whole granules, from the neutral address `from` on every materialised CPU.
    pub(super) fn zero(&self, from: usize, bytes: usize) {
        debug_assert!(bytes > 0 && bytes.is_multiple_of(GRANULE_BYTES));
        // SAFETY: the range lies in an area that has just been taken, whose pages are populated on these CPUs; nobody else
        // uses it.
        unsafe {
            match ZERO_SHORT.get(bytes / GRANULE_BYTES) {
                Some(zero_short) => zero_short(&self.units, from, bytes),
                None => zero_long(&self.units, from, bytes),
            }
        }
    }

    /// Makes a chunk and puts it on the list of spare ones. Called without the lock, in a context that may sleep.
    pub(super) fn make_spare(&self) -> Result<(), BackingError> {
        let (place, hook) = {
            let mut state = self.lock_to_work();
            (state.claim_place()?, state.hook)
        };
        let made = self.make_chunk_at(place, Context::MaySleep);
        self.enter_chunk(place, made, hook)
            .map(|state| self.note_due(&state))
    }

    /// Enters the chunk that was made for `place`, or vacates the place again; returns with the lock held.
    fn enter_chunk(
        &self,
        place: VacantPlace,
        made: Result<NonNull<Chunk>, BackingError>,
        hook: Option<&'static dyn EventHook>,
    ) -> Result<MutexGuard<'_, R, State>, BackingError> {
        if let (Ok(_), Some(hook)) = (made, hook) {
            // Before anyone can allocate from it, so that the events are in order.
            hook.event(&Event::ChunkCreated {
                place: place.at,
                address: self.neutral(place.at),
            });
        }
        let mut state = self.state.lock();
        match made {
            Ok(chunk) => {
                state.add_chunk(chunk, place.at);
                state.count_chunk_created();
                if place.parked.is_none() {
                    state.metadata_grew(self.geometry.chunk.block.size());
                }
                Ok(state)
            }
            Err(error) => {
                state.vacate(place);
                Err(error)
            }
        }
    }

    fn make_chunk_at(
        &self,
        place: VacantPlace,
        context: Context,
    ) -> Result<NonNull<Chunk>, BackingError> {
        if let Some(chunk) = place.parked {
            // SAFETY: the place was vacant and has been claimed: the chunk is not reserved.
            unsafe { self.backing.reserve(self.space(place.at), context)? };
            return Ok(chunk);
        }
        let layout = &self.geometry.chunk;
        let block = self.backing.allocate_metadata(layout.block, context)?;
        // SAFETY: as above.
        if let Err(error) = unsafe { self.backing.reserve(self.space(place.at), context) } {
            // SAFETY: allocated above with this layout, not used yet.
            unsafe {
                match context {
                    Context::MaySleep => self.backing.free_metadata(block, layout.block),
                    Context::Atomic => self.backing.free_metadata_atomic(block, layout.block),
                }
            }
            return Err(error);
        }
        let granules = (self.geometry.sizes.unit_bytes() / GRANULE_BYTES) as u32;
        // SAFETY: the block was allocated with this layout, which is for all pages of a unit.
        Ok(unsafe { Chunk::new(block, layout, place.at, Nature::Mapped, 0..granules) })
    }

    /// Counts and reports a refusal.
    pub(super) fn refuse(&self, request: &Request, error: AllocError) {
        // From a context that must not wait for the lock, the count is given up rather than the caller held up.
        let Some(mut state) = self.lock(request.flags.contains(AllocFlags::TRY)) else {
            return;
        };
        state.stats.failures += 1;
        if request.flags.contains(AllocFlags::ATOMIC) {
            state.stats.atomic_failures += 1;
        }
        let hook = state.hook;
        drop(state);
        if let Some(hook) = hook {
            let Request {
                bytes,
                align,
                flags,
                owner,
                ..
            } = *request;
            hook.event(&Event::Failure {
                bytes,
                align,
                flags,
                owner,
                error,
            });
        }
    }
}

/// How so many granules are zeroed: by one store or two that overlap, which is quicker than a call.
static ZERO_SHORT: [unsafe fn(&Units, usize, usize); 33] = {
    let mut table: [unsafe fn(&Units, usize, usize); 33] = [zero_long; 33];
    let mut granules = 1;
    while granules < table.len() {
        table[granules] = match granules {
            1 => zero_short::<u32>,
            2..4 => zero_short::<u64>,
            4..8 => zero_short::<u128>,
            8..16 => zero_short::<[u128; 2]>,
            _ => zero_short::<[u128; 4]>,
        };
        granules += 1;
    }
    table
};

/// Zeroes so many bytes from a neutral address on, on every materialised CPU: as many as `T` has, or up to twice as many.
///
/// # Safety
/// They are writable and used by nobody else.
unsafe fn zero_short<T: FromZeros>(units: &Units, from: usize, bytes: usize) {
    let last = bytes - size_of::<T>();
    // SAFETY: the promise of the caller.
    units.for_each_copy(from, |copy| unsafe {
        store_zero::<T>(copy);
        if last != 0 {
            store_zero::<T>(copy + last);
        }
    });
}

/// Zeroes so many bytes from a neutral address on, on every materialised CPU.
///
/// # Safety
/// They are writable and used by nobody else.
unsafe fn zero_long(units: &Units, from: usize, bytes: usize) {
    // SAFETY: the promise of the caller.
    units.for_each_copy(from, |copy| unsafe {
        core::ptr::with_exposed_provenance_mut::<u8>(copy).write_bytes(0, bytes);
    });
}

/// Writes the zero of `T` to `address`, which need not be aligned for it.
///
/// # Safety
/// The bytes are writable and used by nobody else.
#[inline]
unsafe fn store_zero<T: FromZeros>(address: usize) {
    // SAFETY: the promise of the caller.
    unsafe {
        core::ptr::with_exposed_provenance_mut::<T>(address).write_unaligned(T::new_zeroed())
    };
}

/// Zeroes memory that a backing has just populated.
pub(super) fn zero_area(area: CpuArea) {
    // SAFETY: callers pass areas of spans that they have populated and that are not handed out yet.
    unsafe {
        core::ptr::with_exposed_provenance_mut::<u8>(area.address).write_bytes(0, area.bytes)
    };
}
