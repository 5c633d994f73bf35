//! The ways through the per-CPU caches: an area is taken out of the current CPU's run, or put back into it, without a lock.
//! What that cannot serve goes to the allocator itself, which opens a run where it can ([`runs`](super::runs)).

use core::ops::Range;

use lock_api::RawMutex;

use super::runs::Caches;
use super::{PerCpuAllocator, SWEEP_DUE, UPKEEP_DUE, WATCHED};
use crate::backing::Backing;
use crate::cache::{Class, ClassLimit, Look, REACH_GRANULES, Run, Seat};
use crate::request::{AllocError, AllocFlags, FreeError, FreeFlags, Request};
use crate::sync::{AtomicU64, Ordering};
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
        let Some((caches, class)) = self.served.class_of(request, &self.caches) else {
            return self.allocate_unusual(seat, request);
        };
        match self.take_of_class(caches, seat, request, class) {
            Some(address) => {
                self.keep_up_with(request);
                Ok(address)
            }
            None => self.allocate_past_cache(seat, request),
        }
    }

    /// [`allocate_at`](Self::allocate_at) where it takes a closer look whether the cache serves such a request.
    #[cold]
    #[inline(never)]
    fn allocate_unusual(&self, seat: &impl Seat, request: &Request) -> Result<usize, AllocError> {
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
        let Some((caches, granule)) = self.serving_caches(address, flags) else {
            // SAFETY: the promise of the caller.
            return unsafe { self.free_unusual(seat, address, flags) };
        };
        let found = caches.cells.find(granule);
        // SAFETY: the promise of the caller.
        unsafe { self.free_found(caches, seat, (address, flags), granule, found) }
    }

    /// Puts an area back into a run of the CPU, as [`free_at`](Self::free_at) does most often, in few instructions: for whoever has that
    /// in line, and [`free_past_own_at`](Self::free_past_own_at) behind a call.
    ///
    /// # Safety
    /// As [`free_with`](Self::free_with).
    #[inline(always)]
    pub(crate) unsafe fn put_own_at(
        &self,
        seat: &impl Seat,
        address: usize,
        flags: FreeFlags,
    ) -> Result<(), NotPut> {
        let Some((caches, granule)) = self.serving_caches(address, flags) else {
            return Err(NotPut::LookAgain);
        };
        let (run, slot, pair_at) = match caches.cells.look(granule) {
            Look::Own { run, slot, pair_at } => (run, slot, pair_at),
            Look::NoRun => return Err(NotPut::NoRun),
            Look::Unclear => return Err(NotPut::LookAgain),
        };
        let at = caches.table + pair_at;
        // SAFETY: as in `take_slot`; the offset is that of a pair, and where it is another run's nothing happens.
        match unsafe { seat.put_slot(at, run.bits(), 1 << slot, &caches.gate) } {
            Put::Done => {
                self.keep_up_after(flags);
                Ok(())
            }
            Put::WasFree => Err(NotPut::WasFree),
            Put::Elsewhere => Err(NotPut::LookAgain),
        }
    }

    /// [`free_at`](Self::free_at) of what was not put back into a run of the CPU at once.
    ///
    /// # Safety
    /// As [`free_with`](Self::free_with).
    #[inline(always)]
    pub(crate) unsafe fn free_past_own_at(
        &self,
        seat: &impl Seat,
        address: usize,
        flags: FreeFlags,
        why: NotPut,
    ) -> Result<(), FreeError> {
        let Some((caches, granule)) = self.serving_caches(address, flags) else {
            // SAFETY: the promise of the caller.
            return unsafe { self.free_unusual(seat, address, flags) };
        };
        let found = match why {
            NotPut::NoRun => None,
            NotPut::LookAgain => caches.cells.find(granule),
            // Somebody may have been given it since.
            NotPut::WasFree => return Err(FreeError::NotAllocated { address }),
        };
        // SAFETY: the promise of the caller.
        unsafe { self.free_found(caches, seat, (address, flags), granule, found) }
    }

    /// Frees an area that was found to belong to a run, or to none.
    ///
    /// # Safety
    /// As [`free_with`](Self::free_with).
    #[inline(always)]
    unsafe fn free_found(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        (address, flags): (usize, FreeFlags),
        granule: u32,
        found: Option<(Run, u32)>,
    ) -> Result<(), FreeError> {
        let Some((run, slot)) = found else {
            if self.free_to_stash(caches, seat, address, granule) {
                self.keep_up_after(flags);
                return Ok(());
            }
            // SAFETY: the promise of the caller.
            return unsafe { self.free_past_cache(address, flags) };
        };
        if run.is_shared() {
            return self.free_shared(seat, address, flags, run, slot);
        }
        let at = caches.table + run.class().table_offset();
        // SAFETY: as in `take_slot`.
        let put = unsafe { seat.put_slot(at, run.bits(), 1 << slot, &caches.gate) };
        if put == Put::Done {
            self.keep_up_after(flags);
            return Ok(());
        }
        self.free_not_put(caches, seat, (address, flags), (run, slot), put)
    }

    /// [`free_at`](Self::free_at) while caches are passed by: a hook is told with the lock held.
    ///
    /// # Safety
    /// As there.
    #[cold]
    #[inline(never)]
    unsafe fn free_unusual(
        &self,
        seat: &impl Seat,
        address: usize,
        flags: FreeFlags,
    ) -> Result<(), FreeError> {
        let caches = self.caches_of(address, flags);
        let found =
            caches.and_then(|(caches, granule)| Some((caches, caches.cells.find(granule)?)));
        match found {
            Some((_, (run, slot))) if run.is_shared() => {
                self.free_shared(seat, address, flags, run, slot)
            }
            Some((caches, found)) => {
                self.free_not_put(caches, seat, (address, flags), found, Put::Elsewhere)
            }
            // SAFETY: the promise of the caller.
            None => unsafe { self.free_past_cache(address, flags) },
        }
    }

    /// Frees an area of a shared run, and notes whether that was another CPU.
    #[inline(never)]
    fn free_shared(
        &self,
        seat: &impl Seat,
        address: usize,
        flags: FreeFlags,
        run: Run,
        slot: u32,
    ) -> Result<(), FreeError> {
        if let Some(caches) = &self.caches {
            self.free_in_run(caches, address, flags, (run, slot))?;
            self.note_foreign(caches, seat, (run, slot));
        }
        self.keep_up_after(flags);
        Ok(())
    }

    /// Frees an area of a run that could not be put back at once.
    #[cold]
    #[inline(never)]
    fn free_not_put(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        (address, flags): (usize, FreeFlags),
        (run, slot): (Run, u32),
        put: Put,
    ) -> Result<(), FreeError> {
        let put = match put {
            Put::Elsewhere => self.put_or_share(seat, flags, (run, slot))?,
            put => put,
        };
        match put {
            Put::Done => {}
            Put::WasFree => return Err(FreeError::NotAllocated { address }),
            Put::Elsewhere => {
                // It is shared now, or no more.
                self.take_back(address, flags)?;
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
    fn take_cached(&self, seat: &impl Seat, request: &Request) -> Option<usize> {
        let (caches, class) = self.caches_for(request)?;
        self.take_of_class(caches, seat, request, class)
    }

    /// An area out of the current CPU's cache as it is, and which part of it may hold something other than zero: all or nothing.
    #[inline]
    pub(super) fn take_dirty(
        &self,
        seat: &impl Seat,
        request: &Request,
    ) -> Option<(usize, Range<usize>)> {
        let (caches, class) = self.caches_for(request)?;
        let (address, is_fresh) = match self.take_slot(caches, seat, request, class) {
            Some(taken) => taken,
            None => (self.take_stashed(caches, seat, request, class)?, false),
        };
        let len_bytes = class.len() as usize * GRANULE_BYTES;
        let dirty_bytes = if is_fresh { 0 } else { len_bytes };
        Some((address, address..address + dirty_bytes))
    }

    /// An area of a class out of the current CPU's cache.
    #[inline(always)]
    fn take_of_class(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        request: &Request,
        class: Class,
    ) -> Option<usize> {
        if let Some(address) = self.take_from_run(caches, seat, request, class) {
            return Some(address);
        }
        self.take_from_stash(caches, seat, request, class)
    }

    /// An area of a class out of the current CPU's stash.
    #[inline(always)]
    fn take_from_stash(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        request: &Request,
        class: Class,
    ) -> Option<usize> {
        let address = self.take_stashed(caches, seat, request, class)?;
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
        let (address, is_fresh) = self.take_slot(caches, seat, request, class)?;
        if !is_fresh && !request.flags.contains(AllocFlags::NO_ZERO) {
            self.zero(address, class.len() as usize * GRANULE_BYTES);
        }
        Some(address)
    }

    /// An area out of the current CPU's run as it is, and whether it is known to be zero.
    #[inline(always)]
    fn take_slot(
        &self,
        caches: &Caches,
        seat: &impl Seat,
        request: &Request,
        class: Class,
    ) -> Option<(usize, bool)> {
        let at = caches.table + request.key.run_at();
        // SAFETY: the table lives on every CPU, and its pairs are changed by a seat's operations with this gate only.
        let [slots, run] = unsafe { seat.take_slot(at, class.bits(), Class::MASK, &caches.gate)? };
        // Whatever waits for the slot comes last.
        let base = self.geometry.window.base + Run::from_bits(run).base() as usize * GRANULE_BYTES;
        let from_base = slots.trailing_zeros() as usize * request.key.len_bytes();
        let address = base + from_base;
        Some((address, slots & FRESH != 0))
    }

    /// The caches, and the granule of the window that `address` is, if they may serve a free of it with such flags.
    #[inline]
    pub(super) fn caches_of(&self, address: usize, flags: FreeFlags) -> Option<(&Caches, u32)> {
        let caches = self.caches.as_ref()?;
        let granule = self.granule_of(address);
        (granule < REACH_GRANULES && is_usual(flags)).then_some((caches, granule as u32))
    }

    /// The same, while nobody has caches passed by.
    #[inline(always)]
    fn serving_caches(&self, address: usize, flags: FreeFlags) -> Option<(&Caches, u32)> {
        let granule = self.granule_of(address);
        let caches = self.served.caches_at(granule, &self.caches);
        let caches = caches.filter(|_| is_usual(flags))?;
        Some((caches, granule as u32))
    }

    /// The granule of the window that `address` is; one that is out of reach if it is in none.
    #[inline]
    fn granule_of(&self, address: usize) -> usize {
        let from_base = address.wrapping_sub(self.geometry.window.base);
        // Less than a granule counts too.
        from_base.rotate_right(GRANULE_BYTES.trailing_zeros())
    }

    /// The caches, and the class that a request is cached in.
    #[inline]
    pub(super) fn caches_for(&self, request: &Request) -> Option<(&Caches, Class)> {
        let caches = self.caches.as_ref()?;
        let class = request.key.class()?;
        let max_bytes = self.geometry.max_alloc_bytes;
        // Its areas may be longer than what was asked for.
        let is_served = request.bytes <= max_bytes
            && class.len() as usize <= max_bytes.div_ceil(GRANULE_BYTES)
            && request.align <= self.geometry.max_align_bytes;
        if !is_served {
            return None;
        }
        Some((caches, class))
    }

    /// Has caches passed by while somebody watches, or not.
    pub(super) fn set_watched(&self, is_watched: bool) {
        self.set_sign(WATCHED, is_watched);
        let (limit, reach) = match &self.caches {
            Some(_) if !is_watched => (
                ClassLimit::new(self.geometry.max_alloc_bytes, self.geometry.max_align_bytes),
                REACH_GRANULES,
            ),
            _ => (ClassLimit::NONE, 0),
        };
        self.served.limit.store(limit.bits(), Ordering::Relaxed);
        self.served.reach.store(reach as u64, Ordering::Relaxed);
    }
}

/// Why an area was not put back into a run of the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotPut {
    /// It belongs to no run.
    NoRun,
    /// It is free in its run.
    WasFree,
    /// Its run is another CPU's, or shared, or in change; or caches do not serve such a free.
    LookAgain,
}

/// Whether caches serve frees with such flags.
#[inline]
fn is_usual(flags: FreeFlags) -> bool {
    (FreeFlags::ATOMIC | FreeFlags::TRY).contains(flags)
}

/// What the caches of an instance serve: nothing if it has none, and nothing while they are passed by. So a request is compared
/// once.
///
/// Invariant: where neither is 0 there are caches.
#[derive(Debug, Default)]
pub(super) struct Served {
    /// A [`ClassLimit`].
    limit: AtomicU64,
    /// Granules that areas of runs and stashes lie in.
    reach: AtomicU64,
}

impl Served {
    /// The caches, and the class of a request, if it is served for sure.
    #[inline(always)]
    fn class_of<'a>(
        &self,
        request: &Request,
        caches: &'a Option<Caches>,
    ) -> Option<(&'a Caches, Class)> {
        let limit = ClassLimit::from_bits(self.limit.load(Ordering::Relaxed));
        let class = request.key.class_within(limit)?;
        // SAFETY: a class is within the limit, which is not 0 then.
        Some((unsafe { caches.as_ref().unwrap_unchecked() }, class))
    }

    /// The caches, if they serve areas at a granule.
    #[inline(always)]
    fn caches_at<'a>(&self, granule: usize, caches: &'a Option<Caches>) -> Option<&'a Caches> {
        if granule as u64 >= self.reach.load(Ordering::Relaxed) {
            return None;
        }
        // SAFETY: the granule is below the reach, which is not 0 then.
        Some(unsafe { caches.as_ref().unwrap_unchecked() })
    }
}
