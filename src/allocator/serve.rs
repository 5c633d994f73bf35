//! How a request is served: checked, placed, its pages populated where they must be, zeroed, handed out; and how a chunk
//! is made when no other has room.

use core::ops::Range;
use core::ptr::NonNull;

use lock_api::RawMutex;

use super::PerCpuAllocator;
use super::state::{Batch, Placed};
use crate::backing::{Backing, BackingError, Context, CpuArea};
use crate::chunk::{Chunk, Nature};
use crate::cpus::Cpus;
use crate::directory::Place;
use crate::request::{AllocError, AllocFlags, Request};
use crate::stats::Event;
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
    pub(super) fn serve(
        &self,
        request: &Request,
        granules: u32,
        align: u32,
    ) -> Result<usize, AllocError> {
        let context = request.context();
        let mut has_reclaimed = false;
        loop {
            let mut state = self
                .lock(request.flags.contains(AllocFlags::TRY))
                .ok_or(AllocError::Busy)?;
            let Some(placed) = state.place(request.flags, granules, align) else {
                if request.flags.contains(AllocFlags::RESERVED) {
                    let free_bytes = state.reserved_free_bytes();
                    return Err(AllocError::ReservedExhausted {
                        bytes: request.bytes,
                        free_bytes,
                    });
                }
                if request.flags.contains(AllocFlags::TRY) {
                    return Err(AllocError::Busy);
                }
                if context == Context::Atomic {
                    state.stats.spare_shortfalls += 1;
                }
                drop(state);
                self.make_chunk(context).map_err(AllocError::from)?;
                continue;
            };
            if !placed.claimed.is_empty() {
                let batch = state.begin_populating();
                drop(state);
                let populated = self.populate_claimed(&placed, batch, context);
                state = self.state.lock();
                state.end_populating(batch);
                if let Err(error) = populated {
                    state.undo(&placed);
                    self.note_due(&state);
                    drop(state);
                    // Pages that nobody uses may still hold memory: give it back, then try once more.
                    if context == Context::MaySleep && !has_reclaimed && self.give_back(0) > 0 {
                        has_reclaimed = true;
                        continue;
                    }
                    return Err(error.into());
                }
                // Zero only if all its runs were: see `populate_claimed`.
                let content = populated.unwrap_or(Contents::Dirty);
                state.edit(placed.chunk, |body| {
                    body.populated(placed.area.clone(), placed.claimed, content)
                });
            }
            let (dirty_granules, offset) = state.edit(placed.chunk, |body| {
                (
                    body.hand_out(placed.area.clone()),
                    body.byte_offset(placed.area.start),
                )
            });
            state.count_alloc(request.bytes, granules as usize * GRANULE_BYTES);
            self.note_due(&state);
            let hook = state.hook;
            drop(state);

            let address = self.neutral(placed.place).wrapping_add(offset);
            if !request.flags.contains(AllocFlags::NO_ZERO) && !dirty_granules.is_empty() {
                let skip = (dirty_granules.start - placed.area.start) as usize * GRANULE_BYTES;
                self.zero(address + skip, dirty_granules.len() * GRANULE_BYTES);
            }
            if let Some(hook) = hook {
                hook.event(&Event::Alloc {
                    address,
                    bytes: request.bytes,
                    align: request.align,
                    flags: request.flags,
                    owner: request.owner,
                    at: (placed.place, offset),
                });
            }
            return Ok(address);
        }
    }

    /// Populates the claimed pages of a placed area, all of them or none. Called without the lock.
    fn populate_claimed(
        &self,
        placed: &Placed,
        batch: Batch,
        context: Context,
    ) -> Result<Contents, BackingError> {
        let span = |pages: Range<u32>| {
            self.span(placed.place, pages, Cpus::Set(&self.units.populated_for))
        };
        let mut content = Contents::Zeroed;
        for run in placed.claimed_pages() {
            match self.backing.populate(span(run.clone()), context) {
                Ok(Contents::Zeroed) => {}
                Ok(Contents::Dirty) => content = Contents::Dirty,
                Err(error) => {
                    for done in placed.claimed_pages().take_while(|done| *done != run) {
                        // SAFETY: populated a moment ago; the pages are claimed and the area was not handed out.
                        unsafe { self.backing.depopulate(span(done)) };
                    }
                    return Err(error);
                }
            }
        }
        if content == Contents::Dirty && batch.during_bring_up {
            // Handing out zeroes materialised CPUs only: the one on its way would keep what the pages hold.
            for run in placed.claimed_pages() {
                span(run).areas().for_each(zero_area);
            }
            content = Contents::Zeroed;
        }
        Ok(content)
    }

    /// Zeroes `bytes` from the neutral address `from` on every materialised CPU.
    fn zero(&self, from: usize, bytes: usize) {
        for cpu in self.units.materialised().iter() {
            if let Ok(address) = self.per_cpu_address(from, cpu) {
                // SAFETY: the range lies in an area that has just been taken, whose pages are populated on this CPU;
                // nobody else uses it.
                unsafe {
                    core::ptr::with_exposed_provenance_mut::<u8>(address).write_bytes(0, bytes)
                };
            }
        }
    }

    /// Makes a chunk and puts it on the list of spare ones. Called without the lock.
    pub(super) fn make_chunk(&self, context: Context) -> Result<(), BackingError> {
        let place = {
            let mut state = self.state.lock();
            let place = state
                .directory
                .vacant()
                .ok_or(BackingError::OutOfAddressSpace)?;
            state.directory.put(place, Place::Busy);
            place
        };
        match self.make_chunk_at(place, context) {
            Ok(chunk) => {
                let mut state = self.state.lock();
                state.add_chunk(chunk, place);
                state.count_chunk_created(self.geometry.chunk.block.size());
                self.note_due(&state);
                let hook = state.hook;
                drop(state);
                if let Some(hook) = hook {
                    hook.event(&Event::ChunkCreated {
                        place,
                        address: self.neutral(place),
                    });
                }
                Ok(())
            }
            Err(error) => {
                self.state.lock().directory.put(place, Place::Vacant);
                Err(error)
            }
        }
    }

    fn make_chunk_at(&self, place: u32, context: Context) -> Result<NonNull<Chunk>, BackingError> {
        let layout = &self.geometry.chunk;
        let block = self.backing.allocate_metadata(layout.block, context)?;
        if let Err(error) = self.backing.reserve(self.space(place), context) {
            // SAFETY: allocated above with this layout, not used yet.
            unsafe { self.backing.free_metadata(block, layout.block) };
            return Err(error);
        }
        let granules = (self.geometry.sizes.unit_bytes() / GRANULE_BYTES) as u32;
        // SAFETY: the block was allocated with this layout, which is for all pages of a unit.
        Ok(unsafe { Chunk::new(block, layout, place, Nature::Mapped, 0..granules) })
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

/// Zeroes memory that a backing has just populated.
pub(super) fn zero_area(area: CpuArea) {
    // SAFETY: callers pass areas of spans that they have populated and that are not handed out yet.
    unsafe {
        core::ptr::with_exposed_provenance_mut::<u8>(area.address).write_bytes(0, area.bytes)
    };
}
