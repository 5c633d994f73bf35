//! The hardened mode: guards around every area, quarantine and poison for those that were freed, a ledger of all of them.
//!
//! It is a layer before the allocator itself, which sees areas with their guards as areas, and an area in quarantine as a live
//! one. So its pages stay populated, whatever else happens, and a CPU that comes late finds zeroes in them.
//!
//! Locking: the ledger has a lock, which is taken before the allocator's own and never while that is held. No lock is held while a
//! request is served, unless it is one that waits for nothing (`TRY`).
//!
//! Invariants: an area is in the ledger from before its caller knows it until its granules are given back; the guards of a live one,
//! and all of a freed one, are as `guards` says on every CPU that is materialised.

use core::fmt;

use lock_api::{Mutex, MutexGuard, RawMutex};

use super::PerCpuAllocator;
use crate::backing::{Backing, BackingError, Context};
use crate::chunk::MAX_MASK_PAGES;
use crate::hardened::{
    Fate, Finding, FindingHook, HardenError, Hardening, Leaks, LiveArea, Record,
};
use crate::request::{AllocError, AllocFlags, FreeError, FreeFlags, Request};
use crate::stats::{Event, EventHook, Stats};
use crate::unit::{CpuId, GRANULE_BYTES};
use guards::{Change, Extent};
use ledger::{Block, Fill, Ledger};

mod guards;
mod ledger;

/// In the flags of a request or a free: whoever makes it tells the event hook, as for an area with its guards, which the hook knows
/// nothing of. No flag of callers.
const TOLD_APART: u32 = 1 << 31;

/// What an instance in hardened mode has besides.
pub(super) struct Hardened<R: RawMutex> {
    guard_bytes: usize,
    hook: &'static dyn FindingHook,
    ledger: Mutex<R, Ledger>,
}

impl<R: RawMutex> fmt::Debug for Hardened<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hardened")
            .field("guard_bytes", &self.guard_bytes)
            .finish_non_exhaustive()
    }
}

impl<R: RawMutex> Hardened<R> {
    fn lock(&self, may_try_only: bool) -> Option<MutexGuard<'_, R, Ledger>> {
        match may_try_only {
            true => self.ledger.try_lock(),
            false => Some(self.ledger.lock()),
        }
    }

    /// The length of the guard before an area.
    fn front_bytes(&self, align: usize) -> usize {
        self.guard_bytes.next_multiple_of(align)
    }

    /// The areas in quarantine, which stay there while the result is held.
    pub(super) fn quarantine(&self) -> Quarantine<'_, R> {
        Quarantine {
            ledger: self.ledger.lock(),
            guard_bytes: self.guard_bytes,
        }
    }

    /// Keeps the ledger as it is until [`end_rest`](Self::end_rest).
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(super) fn rest(&self) {
        core::mem::forget(self.ledger.lock());
    }

    /// Ends that.
    ///
    /// # Safety
    /// The caller's thread called [`rest`](Self::rest), and has not ended it.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(super) unsafe fn end_rest(&self) {
        // SAFETY: `rest` took the lock on this thread and kept it (promise of the caller).
        unsafe { self.ledger.force_unlock() };
    }

    pub(super) fn event_hook(&self) -> Option<&'static dyn EventHook> {
        self.ledger.lock().hook
    }

    pub(super) fn set_event_hook(&self, hook: Option<&'static dyn EventHook>) {
        self.ledger.lock().hook = hook;
    }
}

/// The areas in quarantine, kept as they are.
pub(super) struct Quarantine<'a, R: RawMutex> {
    ledger: MutexGuard<'a, R, Ledger>,
    guard_bytes: usize,
}

impl<R: RawMutex> Quarantine<'_, R> {
    /// Counts them out of the live areas: whoever had them has freed them.
    pub(super) fn leave_out(&self, stats: &mut Stats) {
        for record in self.ledger.in_quarantine() {
            stats.leave_out(1, whole_bytes(&record, self.guard_bytes));
        }
    }
}

/// Whether a request is told to the event hook by whoever made it.
pub(super) fn is_told_apart(flags: AllocFlags) -> bool {
    flags.bits() & TOLD_APART != 0
}

/// The same request, told to the event hook by whoever makes it.
pub(super) fn told_apart(request: &Request) -> Request {
    request.with_flags(request.flags | AllocFlags::from_bits_retain(TOLD_APART))
}

/// [`is_told_apart`] for a free.
pub(super) fn is_free_told_apart(flags: FreeFlags) -> bool {
    flags.bits() & TOLD_APART != 0
}

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Switches the [hardened mode](crate::hardened) on: for good, and before anything is allocated. An instance that is hardened
    /// has no caches, whether [`enable_caches`](Self::enable_caches) is called or not.
    ///
    /// # Errors
    /// [`HardenError`]; then nothing has changed.
    pub fn harden(&mut self, hardening: Hardening) -> Result<(), HardenError> {
        hardening.check()?;
        if self.hardened.is_some() {
            return Err(HardenError::Again);
        }
        if self.caches.is_some() {
            return Err(HardenError::Caches);
        }
        let areas = self.stats().live;
        if areas > 0 {
            return Err(HardenError::Live { areas });
        }
        let no_layout = |_| HardenError::Backing(BackingError::OutOfMetadata);
        let (records, ring) =
            ledger::first_layouts(hardening.quarantine_areas).map_err(no_layout)?;
        let allocate = |layout| {
            let block = self.backing.allocate_metadata(layout, Context::MaySleep);
            block.map(|block| (block, layout))
        };
        let records = allocate(records).map_err(HardenError::Backing)?;
        let ring = match allocate(ring) {
            Ok(ring) => ring,
            Err(error) => {
                // SAFETY: allocated above with this layout, and not used.
                unsafe { self.backing.free_metadata(records.0, records.1) };
                return Err(HardenError::Backing(error));
            }
        };
        // SAFETY: the blocks have just been allocated with these layouts.
        let mut ledger = unsafe { Ledger::new(records, ring, hardening.quarantine_areas) };
        let state = self.state.get_mut();
        ledger.hook = state.hook;
        state.metadata_grew(records.1.size() + ring.1.size());
        let hardened = Hardened {
            guard_bytes: hardening.guard_bytes,
            hook: hardening.hook,
            ledger: Mutex::new(ledger),
        };
        // What is served from now on has guards: the spare chunks are to have room for the largest such request.
        let page_bytes = self.geometry.sizes.page_bytes();
        let unit_bytes = self.geometry.sizes.unit_bytes();
        let limit_bytes = unit_bytes.min((MAX_MASK_PAGES as usize - 1) * page_bytes);
        let front_bytes = hardened.front_bytes(self.geometry.max_align_bytes);
        self.geometry.max_alloc_bytes = self
            .policy
            .max_alloc_bytes
            .saturating_add(front_bytes + GRANULE_BYTES + hardened.guard_bytes)
            .min(limit_bytes);
        self.hardened = Some(hardened);
        self.set_watched(true);
        Ok(())
    }

    /// Whether the instance is in [hardened mode](crate::hardened).
    pub fn is_hardened(&self) -> bool {
        self.hardened.is_some()
    }

    /// Looks at the guards of all live areas and at all areas in quarantine; returns how many mistakes were found, each of which the
    /// [hook](crate::hardened::FindingHook) is told. 0 if the instance is not hardened.
    ///
    /// No area of the instance is handed out or freed meanwhile.
    pub fn check_areas(&self) -> usize {
        let Some(hardened) = &self.hardened else {
            return 0;
        };
        let ledger = hardened.ledger.lock();
        let records = ledger.records();
        records
            .map(|record| self.check_area(hardened, &record))
            .sum()
    }

    /// Calls `visit` for every area of an instance in [hardened mode](crate::hardened) that was not freed, those of the reserved
    /// region left out, in no order. Areas are not handed out and freed meanwhile: `visit` must not call the instance.
    pub fn visit_live_areas(&self, mut visit: impl FnMut(&LiveArea)) {
        if let Some(hardened) = &self.hardened {
            let ledger = hardened.ledger.lock();
            let live = ledger.records().filter(|record| record.fate == Fate::Live);
            live.for_each(|record| visit(&record.area));
        }
    }

    /// Serves a request in hardened mode.
    #[cold]
    #[inline(never)]
    pub(super) fn serve_hardened(
        &self,
        hardened: &Hardened<R>,
        request: &Request,
    ) -> Result<usize, AllocError> {
        let size = self.check_hardened(request)?;
        self.serve_hardened_checked(hardened, request, size)
    }

    /// [`check_request`](Self::check_request) in hardened mode.
    pub(super) fn check_hardened(&self, request: &Request) -> Result<(u32, u32), AllocError> {
        let bytes = request.bytes;
        let limit_bytes = self.policy.max_alloc_bytes;
        if bytes > limit_bytes {
            return Err(AllocError::TooLarge { bytes, limit_bytes });
        }
        // Of any size that can be served: what is wrong besides.
        let shorter = request.with_size(bytes.min(GRANULE_BYTES), request.align);
        let (_, align_granules) = self.check_request(&shorter)?;
        Ok((bytes.div_ceil(GRANULE_BYTES) as u32, align_granules))
    }

    /// Serves a request in hardened mode that has been checked.
    pub(super) fn serve_hardened_checked(
        &self,
        hardened: &Hardened<R>,
        request: &Request,
        (granules, align_granules): (u32, u32),
    ) -> Result<usize, AllocError> {
        let Request { bytes, align, .. } = *request;
        if request.flags.contains(AllocFlags::RESERVED) {
            return self.serve(request, granules, align_granules);
        }
        let front_bytes = hardened.front_bytes(align);
        let guards_bytes = front_bytes + hardened.guard_bytes;
        let whole_bytes = rounded(bytes) + guards_bytes;
        if whole_bytes > self.geometry.max_alloc_bytes {
            let limit_bytes = self.geometry.max_alloc_bytes.saturating_sub(guards_bytes);
            return Err(AllocError::TooLarge { bytes, limit_bytes });
        }
        let whole = told_apart(&request.with_size(whole_bytes, align));
        let is_try = request.flags.contains(AllocFlags::TRY);
        let ledger = hardened.lock(is_try).ok_or(AllocError::Busy)?;
        let mut ledger = self.with_room(hardened, ledger, request)?;
        ledger.promised += 1;
        // Who must not wait keeps the lock, which may not be had again.
        let kept = if is_try {
            Some(ledger)
        } else {
            drop(ledger);
            None
        };
        let serve = || self.serve(&whole, (whole_bytes / GRANULE_BYTES) as u32, align_granules);
        let served = match serve() {
            Err(AllocError::Backing(_)) if !is_try && self.release_quarantine() > 0 => serve(),
            served => served,
        };
        if let Ok(start) = served {
            for cpu in self.units.materialised().iter() {
                if let Some(extent) = self.extent(start, bytes, front_bytes, whole_bytes, cpu) {
                    // SAFETY: the area has just been taken, and has memory on this CPU.
                    unsafe { extent.set_guards() };
                }
            }
        }
        let mut ledger = kept.unwrap_or_else(|| hardened.ledger.lock());
        ledger.promised -= 1;
        let address = served? + front_bytes;
        let area = LiveArea {
            address,
            bytes,
            owner: request.owner,
        };
        ledger.insert(Record {
            area,
            front_bytes,
            fate: Fate::Live,
        });
        let hook = ledger.hook;
        drop(ledger);
        if let Some(hook) = hook
            && !is_told_apart(request.flags)
        {
            self.tell_alloc(hook, request, address);
        }
        Ok(address)
    }

    /// Gives an area back that nobody was told of, and uncounts it: it does not go through quarantine. Not for who may only try.
    #[cold]
    pub(super) fn undo_hardened(&self, hardened: &Hardened<R>, request: &Request, address: usize) {
        let mut ledger = hardened.ledger.lock();
        let (start, whole_bytes) = match ledger.find(address) {
            Some(record) if record.fate == Fate::Live => {
                self.check_area(hardened, &record);
                ledger.remove(address);
                let start = address - record.front_bytes;
                (start, whole_bytes(&record, hardened.guard_bytes))
            }
            // Somebody has freed it who had it before.
            Some(_) => return,
            // Of the reserved region.
            None => (address, rounded(request.bytes)),
        };
        drop(ledger);
        let flags = request.free_flags() | FreeFlags::from_bits_retain(TOLD_APART);
        let taken_back = self.locate(start).is_some_and(|at| {
            let taken_back = self.take_back_at_once(start, flags, at);
            taken_back.is_ok()
        });
        if taken_back {
            let mut state = self.state.lock();
            state.stats.uncount_allocs(1, whole_bytes);
        }
    }

    /// Frees an area of the dynamic regions in hardened mode.
    #[cold]
    #[inline(never)]
    pub(super) fn free_hardened(
        &self,
        hardened: &Hardened<R>,
        address: usize,
        flags: FreeFlags,
    ) -> Result<(), FreeError> {
        let is_try = flags.contains(FreeFlags::TRY);
        let mut ledger = hardened.lock(is_try).ok_or(FreeError::Busy)?;
        let record = ledger.find(address);
        let Some(record) = record.filter(|record| record.fate == Fate::Live) else {
            let around = |record: &Record| {
                let LiveArea {
                    address: start,
                    bytes,
                    ..
                } = record.area;
                record.fate == Fate::Live && (start..start + bytes).contains(&address)
            };
            return Err(match ledger.records().find(around) {
                Some(Record { area, .. }) => FreeError::Interior {
                    address,
                    start: area.address,
                },
                None => FreeError::NotAllocated { address },
            });
        };
        while ledger.is_quarantine_full() {
            self.release_oldest(hardened, &mut ledger, flags)?;
        }
        self.check_area(hardened, &record);
        self.for_each_extent(&record, |_, extent| {
            // SAFETY: the area is freed: nobody uses it (promise of the caller of `free`).
            unsafe { extent.poison() };
        });
        ledger.quarantine(address);
        if let (Some(hook), Some(at)) = (ledger.hook, self.locate(address)) {
            hook.event(&Event::Free {
                bytes: rounded(record.area.bytes),
                address,
                at,
            });
        }
        Ok(())
    }

    /// The size of a live area, rounded up to the grain, in bytes.
    pub(super) fn hardened_area_bytes(hardened: &Hardened<R>, address: usize) -> Option<usize> {
        let record = hardened.ledger.lock().find(address)?;
        (record.fate == Fate::Live).then(|| rounded(record.area.bytes))
    }

    /// Looks at all areas in quarantine, and gives them back; returns how many they were.
    pub(super) fn release_quarantine(&self) -> usize {
        let Some(hardened) = &self.hardened else {
            return 0;
        };
        let mut released = 0;
        let Some(mut ledger) = hardened.lock(false) else {
            return 0;
        };
        while ledger.oldest().is_some()
            && self
                .release_oldest(hardened, &mut ledger, FreeFlags::ATOMIC)
                .is_ok()
        {
            released += 1;
        }
        released
    }

    /// Looks at the area that has been in quarantine for longest, and gives it back to the allocator.
    fn release_oldest(
        &self,
        hardened: &Hardened<R>,
        ledger: &mut Ledger,
        flags: FreeFlags,
    ) -> Result<(), FreeError> {
        if let Some(record) = ledger.oldest() {
            let start = record.area.address - record.front_bytes;
            self.check_area(hardened, &record);
            if let Some(at) = self.locate(start) {
                let flags = flags | FreeFlags::from_bits_retain(TOLD_APART);
                self.take_back_at_once(start, flags, at)?;
            }
        }
        ledger.forget_oldest();
        Ok(())
    }

    /// Looks at an area, tells what is wrong and mends it; returns how much it was.
    fn check_area(&self, hardened: &Hardened<R>, record: &Record) -> usize {
        let mut found = 0;
        self.for_each_extent(record, |cpu, extent| {
            let mut tell = |change: Change| {
                found += 1;
                hardened.hook.found(&Finding {
                    kind: change.kind,
                    address: record.area.address,
                    bytes: record.area.bytes,
                    owner: record.area.owner,
                    cpu,
                    at_bytes: change.at_bytes,
                    found: change.found,
                });
            };
            // SAFETY: the area is in the ledger, and has memory on this CPU; nobody but the instance may use what is written.
            unsafe {
                match record.fate {
                    Fate::Live => {
                        let changed = extent.guards_changed();
                        if changed != [None; 2] {
                            changed.into_iter().flatten().for_each(&mut tell);
                            extent.set_guards();
                        }
                    }
                    Fate::Freed => {
                        if let Some(change) = extent.poison_changed() {
                            tell(change);
                            extent.poison();
                        }
                    }
                }
            }
        });
        found
    }

    /// Calls `act` for the copy of every materialised CPU.
    fn for_each_extent(&self, record: &Record, mut act: impl FnMut(CpuId, Extent)) {
        let Record {
            area, front_bytes, ..
        } = *record;
        let Some(hardened) = &self.hardened else {
            return;
        };
        let whole_bytes = whole_bytes(record, hardened.guard_bytes);
        let start = area.address - front_bytes;
        for cpu in self.units.materialised().iter() {
            if let Some(extent) = self.extent(start, area.bytes, front_bytes, whole_bytes, cpu) {
                act(cpu, extent);
            }
        }
    }

    /// A CPU's copy with its guards.
    fn extent(
        &self,
        start: usize,
        bytes: usize,
        front_bytes: usize,
        whole_bytes: usize,
        cpu: CpuId,
    ) -> Option<Extent> {
        Some(Extent {
            start: self.units.copy_of(start, cpu).ok()?,
            front_bytes,
            bytes,
            rear_bytes: whole_bytes - front_bytes - bytes,
        })
    }

    /// Makes room in the ledger for one area more, if there is none; the lock may be given up for it and taken again.
    fn with_room<'a>(
        &self,
        hardened: &'a Hardened<R>,
        mut ledger: MutexGuard<'a, R, Ledger>,
        request: &Request,
    ) -> Result<MutexGuard<'a, R, Ledger>, AllocError> {
        let context = request.context();
        let usual = match context {
            Context::MaySleep => Fill::Half,
            Context::Atomic if request.flags.contains(AllocFlags::TRY) => Fill::Most,
            Context::Atomic => Fill::ThreeQuarters,
        };
        while ledger.is_filled(usual) {
            if request.flags.contains(AllocFlags::TRY) {
                return Err(AllocError::Busy);
            }
            let len = ledger.len() * 2;
            drop(ledger);
            let larger = ledger::records_layout(len)
                .map_err(|_| BackingError::OutOfMetadata)
                .and_then(|layout| Ok((self.backing.allocate_metadata(layout, context)?, layout)));
            ledger = hardened.ledger.lock();
            match larger {
                Err(_) if !ledger.is_filled(Fill::Most) => break,
                Err(error) => return Err(error.into()),
                Ok(block) => {
                    let is_wanted = ledger.len() < len;
                    let unused = match is_wanted {
                        // SAFETY: the block has just been allocated with the layout for so many.
                        true => unsafe { ledger.move_to(block, len) },
                        false => block,
                    };
                    drop(ledger);
                    if is_wanted {
                        let mut state = self.state.lock();
                        state.metadata_grew(block.1.size());
                        state.stats.metadata_bytes -= unused.1.size();
                    }
                    self.free_ledger_block(unused, context);
                    ledger = hardened.ledger.lock();
                }
            }
        }
        Ok(ledger)
    }

    fn free_ledger_block(&self, (block, layout): Block, context: Context) {
        // SAFETY: the block was allocated with this layout, and is not used any more.
        unsafe {
            match context {
                Context::MaySleep => self.backing.free_metadata(block, layout),
                Context::Atomic => self.backing.free_metadata_atomic(block, layout),
            }
        }
    }

    /// For the end of an instance: looks at everything, tells what was never freed, and gives the ledger back.
    pub(super) fn end_hardened(&mut self) {
        self.check_areas();
        let Some(hardened) = self.hardened.take() else {
            return;
        };
        let hook = hardened.hook;
        let mut ledger = hardened.ledger.into_inner();
        let live = ledger.sort();
        if !live.is_empty() {
            hook.leaked(&Leaks::new(live));
        }
        for block in ledger.blocks() {
            self.free_ledger_block(block, Context::MaySleep);
        }
    }
}

/// An area with its guards.
fn whole_bytes(record: &Record, guard_bytes: usize) -> usize {
    record.front_bytes + rounded(record.area.bytes) + guard_bytes
}

fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(GRANULE_BYTES)
}
