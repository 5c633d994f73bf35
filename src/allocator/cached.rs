//! The ways through the per-CPU caches: an area is taken out of the current CPU's run, or put back into it, without a lock.
//! What that cannot serve goes to the allocator itself, which opens a run where it can ([`runs`](super::runs)).

use lock_api::RawMutex;

use super::runs::Caches;
use super::{PerCpuAllocator, SWEEP_DUE, UPKEEP_DUE, WATCHED};
use crate::backing::Backing;
use crate::cache::{Class, REACH_GRANULES, Run, Seat};
use crate::request::{AllocError, AllocFlags, FreeError, FreeFlags, Request};
use crate::this_cpu::Put;
use crate::this_cpu::slots::FRESH;
use crate::unit::GRANULE_BYTES;

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// [`allocate`](Self::allocate) through the cache of the CPU that `seat` is on, if the instance
    /// [has caches](Self::enable_caches).
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    #[inline]
    pub fn allocate_at(&self, seat: &impl Seat, request: &Request) -> Result<usize, AllocError> {
        if self.has_sign(WATCHED) {
            return self.allocate(request);
        }
        match self.take_cached(seat, request) {
            Some(address) => {
                self.keep_up_with(request);
                Ok(address)
            }
            None => self.allocate_past_cache(seat, request),
        }
    }

    /// Runs the upkeep that is due after a request.
    #[inline]
    pub(super) fn keep_up_with(&self, request: &Request) {
        if self.has_sign(UPKEEP_DUE | SWEEP_DUE) {
            let hurry = AllocFlags::ATOMIC | AllocFlags::TRY;
            self.upkeep_by_caller(request.flags.intersects(hurry));
        }
    }

    /// [`free_with`](Self::free_with) through the cache of the CPU that `seat` is on.
    ///
    /// # Errors
    /// As [`free_with`](Self::free_with).
    ///
    /// # Safety
    /// As [`free_with`](Self::free_with).
    #[inline]
    pub unsafe fn free_at(
        &self,
        seat: &impl Seat,
        address: usize,
        flags: FreeFlags,
    ) -> Result<(), FreeError> {
        let Some((caches, granule)) = self.caches_of(address, flags) else {
            // SAFETY: the promise of the caller.
            return unsafe { self.free_past_cache(address, flags) };
        };
        let Some((run, slot)) = caches.cells.find(granule) else {
            if self.free_to_stash(caches, seat, address, granule) {
                self.keep_up_after(flags);
                return Ok(());
            }
            // SAFETY: the promise of the caller.
            return unsafe { self.free_past_cache(address, flags) };
        };
        let put = self.put_cached(caches, seat, (run, slot));
        if put == Put::Done {
            self.keep_up_after(flags);
            return Ok(());
        }
        self.free_not_put(caches, seat, (address, flags), (run, slot), put)
    }

    /// Frees an area of a run that could not be put back at once.
    #[inline(never)]
    fn free_not_put(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        (address, flags): (usize, FreeFlags),
        (run, slot): (Run, u32),
        put: Put,
    ) -> Result<(), FreeError> {
        let is_shared = run.is_shared();
        let put = match put {
            Put::Elsewhere if !is_shared => self.put_or_share(seat, flags, (run, slot))?,
            put => put,
        };
        match put {
            Put::Done => {}
            Put::WasFree => return Err(FreeError::NotAllocated { address }),
            Put::Elsewhere => {
                match is_shared {
                    true => self.free_in_run(caches, address, flags, (run, slot))?,
                    // It is shared now, or no more.
                    false => self.take_back(address, flags)?,
                }
                self.note_foreign(caches, seat, (run, slot));
            }
        }
        self.keep_up_after(flags);
        Ok(())
    }

    /// Runs the upkeep that is due after a free.
    #[inline]
    pub(super) fn keep_up_after(&self, flags: FreeFlags) {
        if self.has_sign(UPKEEP_DUE | SWEEP_DUE) {
            self.upkeep_by_caller(flags.intersects(FreeFlags::ATOMIC | FreeFlags::TRY));
        }
    }

    /// An area out of the current CPU's cache.
    #[inline]
    pub(super) fn take_cached(&self, seat: &impl Seat, request: &Request) -> Option<usize> {
        let (caches, class) = self.caches_for(request)?;
        if let Some(address) = self.take_from_run(caches, seat, request, class) {
            return Some(address);
        }
        let address = self.take_stashed(caches, seat, class, request.flags)?;
        if !request.flags.contains(AllocFlags::NO_ZERO) {
            self.zero(address, class.len() as usize * GRANULE_BYTES);
        }
        Some(address)
    }

    /// An area out of the current CPU's run.
    #[inline]
    pub(super) fn take_from_run(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        request: &Request,
        class: Class,
    ) -> Option<usize> {
        let at = caches.table + class.table_offset();
        // SAFETY: the table lives on every CPU, and its pairs are changed by a seat's operations with this gate only.
        let [slots, run] = unsafe { seat.take_slot(at, class.bits(), Class::MASK, &caches.gate)? };
        let granule = Run::from_bits(run).base() + slots.trailing_zeros() * class.len();
        let address = self.geometry.window.base + granule as usize * GRANULE_BYTES;
        if slots & FRESH == 0 && !request.flags.contains(AllocFlags::NO_ZERO) {
            self.zero(address, class.len() as usize * GRANULE_BYTES);
        }
        Some(address)
    }

    /// The caches, and the granule of the window that `address` is, if they may serve a free of it with such flags.
    #[inline]
    pub(super) fn caches_of(&self, address: usize, flags: FreeFlags) -> Option<(&Caches, u32)> {
        let caches = self.caches.as_ref()?;
        let is_usual = (FreeFlags::ATOMIC | FreeFlags::TRY).contains(flags);
        let from_base = address.wrapping_sub(self.geometry.window.base);
        // Less than a granule counts too.
        let granule = from_base.rotate_right(GRANULE_BYTES.trailing_zeros());
        (granule < REACH_GRANULES && is_usual).then_some((caches, granule as u32))
    }

    /// Puts an area back into the current CPU's run, if it is that CPU's alone.
    #[inline]
    fn put_cached(&self, caches: &Caches, seat: &impl Seat, (run, slot): (Run, u32)) -> Put {
        // Areas of shared runs are freed by their marks only. A hook is told with the lock held.
        if run.is_shared() || self.has_sign(WATCHED) {
            return Put::Elsewhere;
        }
        let at = caches.table + run.class().table_offset();
        // SAFETY: as in `take_from_run`.
        unsafe { seat.put_slot(at, run.bits(), 1 << slot, &caches.gate) }
    }

    /// The caches, and the class that a request is cached in.
    #[inline]
    pub(super) fn caches_for(&self, request: &Request) -> Option<(&Caches, Class)> {
        let caches = self.caches.as_ref()?;
        let usual = AllocFlags::ATOMIC | AllocFlags::NO_ZERO | AllocFlags::TRY;
        let is_usual = usual.contains(request.flags)
            && request.bytes <= self.geometry.max_alloc_bytes
            && request.align <= self.geometry.max_align_bytes;
        match is_usual {
            true => Some((caches, Class::of(request)?)),
            false => None,
        }
    }
}
