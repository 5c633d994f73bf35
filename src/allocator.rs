//! The policy: which chunk serves a request, when a chunk is made, when memory is given back.
//!
//! A request is served by the lowest place in the lowest chunk where it fits: areas gather at low addresses, and what
//! lies above them runs empty and is given back. Pages without memory are populated as an area comes to touch them.
//! Where nothing fits, a spare chunk is put to use; where there is none, a chunk is made.
//!
//! Locking: one lock guards all that changes (`state`). No lock is held while memory is populated, zeroed or given
//! back, nor while a chunk is made or destroyed: the pages or the place concerned are claimed first, the lock is
//! dropped for the work, and they are settled under it. A request of another CPU meanwhile goes elsewhere.
//!
//! Atomic requests populate pages and use spare chunks like all others; what they never do is wait.
//! [`PerCpuAllocator::upkeep`] prepares spare chunks ahead of them and gives back what has run empty.

use core::alloc::Layout;
use core::fmt;
use core::ops::Range;
use core::ptr::NonNull;

use lock_api::{Mutex, MutexGuard, RawMutex};

use crate::backing::{Backing, BackingError, ChunkSpace, Context, PageSpan, Window};
use crate::chunk::{Chunk, ChunkLayout, MAX_MASK_PAGES, Nature, PageMask};
use crate::cpus::{Cpus, Units, UnitsLayout};
use crate::directory::{Directory, DirectoryLayout};
use crate::metadata::BlockLayout;
use crate::places::{Places, PlacesLayout};
use crate::request::{AllocError, CpuError, FreeError, FreeFlags, Request, SetupError};
use crate::stats::EventHook;
use crate::sync::{AtomicU8, Ordering};
use crate::unit::{CpuId, FirstChunk, GRANULE_BYTES, Regions, UnitSizes};
pub(crate) use cached::NotPut;
use cached::Served;
use hardened::Hardened;
use runs::Caches;
use state::{Batch, State};

mod bring_up;
mod cached;
mod drain;
mod hardened;
mod many;
mod query;
mod refill;
mod rest;
mod runs;
mod serve;
mod share;
mod stashed;
mod state;
mod take_back;
mod upkeep;

pub(crate) use many::free_each;
pub use query::{AddressInfo, Region};
pub use upkeep::UpkeepReport;

/// The longest unit: its granules, and those of a request behind them, are numbered in 32 bits.
const MAX_UNIT_BYTES: usize = 8 << 30;

/// In the signs of an instance: an upkeep has something to do.
const UPKEEP_DUE: u8 = 1;

/// In the signs of an instance: there are freed areas that nobody may come to sweep.
const SWEEP_DUE: u8 = 4;

/// In the signs of an instance: there is a hook, or it is hardened. Caches are passed by.
const WATCHED: u8 = 2;

/// What an instance decides by itself, in numbers. More may be added: take `..Policy::default()` for those that you do not set.
///
/// ```
/// use pcpu::allocator::Policy;
/// let eager = Policy { empty_pages_low: 0, empty_pages_high: 0, ..Policy::default() };
/// assert!(eager.spare_chunks <= eager.spare_chunks_max);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// The largest request, in bytes. At least 1, at most a unit, and few enough pages to be named in one word.
    pub max_alloc_bytes: usize,
    /// The largest alignment, in bytes; at least 1. What holds is the power of two that it reaches, and at most what all units
    /// have ([`max_align_bytes`](PerCpuAllocator::max_align_bytes)).
    pub max_align_bytes: usize,
    /// Spare chunks that the upkeep keeps ready for atomic requests when the chunks in use could not serve the largest
    /// request.
    pub spare_chunks: u32,
    /// Where atomic requests used up more spare chunks than that between two upkeeps, twice as many are kept ready,
    /// up to so many; the number halves again while they are left alone.
    pub spare_chunks_max: u32,
    /// Pages without areas that an upkeep leaves populated; where there are caches, which have memory come several pages at a
    /// time, one that is found due leaves four more. Four more again, or half way to `empty_pages_high`, are left or populated when
    /// an atomic request has had to populate pages itself.
    pub empty_pages_low: u32,
    /// Upkeep is due at once when more pages than this are populated without an area; where there are caches, ten more.
    pub empty_pages_high: u32,
    /// Upkeep is due when more pages than it leaves are populated without an area and so many areas have been freed since the
    /// last one, where there are caches four times as many: a page that is filled and emptied in turn does not come and go each
    /// time.
    pub quiet_frees: u32,
    /// Whether allocating and freeing runs the upkeep by itself.
    pub upkeep: UpkeepBy,
    /// Whether [caches](PerCpuAllocator::enable_caches) keep the names of what they stash in rows of their own, if the first chunk has
    /// room for them when they are set up: 64,896 bytes of every unit. Otherwise a name stands in the area that was freed next; with rows
    /// who frees an area does not touch its memory, which is quicker where many areas are live.
    pub names_in_rows: bool,
}

/// Who runs the upkeep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UpkeepBy {
    /// The owner calls [`PerCpuAllocator::upkeep`]: a kernel's worker.
    Owner,
    /// Whoever allocates or frees without [`AllocFlags::ATOMIC`](crate::AllocFlags::ATOMIC) and finds it due: a process.
    Callers,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_alloc_bytes: 32 << 10,
            max_align_bytes: usize::MAX,
            spare_chunks: 1,
            spare_chunks_max: 16,
            empty_pages_low: 0,
            empty_pages_high: 2,
            quiet_frees: 16,
            upkeep: UpkeepBy::Owner,
            names_in_rows: false,
        }
    }
}

/// What never changes about an instance.
#[derive(Debug)]
struct Geometry {
    window: Window,
    /// `pitch_bytes` as a shift, where it is a power of two.
    pitch_shift: Option<u32>,
    /// In a granule of the window: which it is of its unit; 0 if that takes a division.
    granule_mask: u32,
    /// How many bits that has.
    granule_bits: u32,
    sizes: UnitSizes,
    regions: Regions,
    max_alloc_bytes: usize,
    max_align_bytes: usize,
    chunk: ChunkLayout,
    /// The block that holds the tables of units and chunks.
    tables: (NonNull<u8>, Layout),
}

/// A dynamic per-CPU allocator: an instance with its backing `B` and its lock `R`.
///
/// Addresses that it hands out are *neutral*: [`per_cpu_address`](Self::per_cpu_address) makes one CPU's address of
/// it. A typed view is [`PerCpuPtr`](crate::PerCpuPtr) with a [`Domain`](crate::Domain); simulated machines and
/// kernels make instances through [`new`](Self::new), a Linux process has one ready ([`crate::alloc_percpu`]).
///
/// ```
/// use pcpu::backing::sim::Machine;
/// use pcpu::{AllocFlags, Request};
///
/// let pcpu = Machine::new(4).build()?;
/// let counter = pcpu.allocate(&Request::new(8, 8))?;
/// let copies = pcpu.units().possible().iter().map(|cpu| pcpu.per_cpu_address(counter, cpu));
/// assert_eq!(copies.flatten().count(), 4);
/// // SAFETY: nobody uses the counter any more.
/// unsafe { pcpu.free(counter)? };
/// // SAFETY: no area is there any more: a second free is caught.
/// assert!(unsafe { pcpu.free(counter) }.is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PerCpuAllocator<B: Backing, R: RawMutex> {
    backing: B,
    units: Units,
    /// The chunks, for whoever frees without the lock.
    places: Places,
    geometry: Geometry,
    policy: Policy,
    state: Mutex<R, State>,
    served: Served,
    caches: Option<Caches>,
    hardened: Option<Hardened<R>>,
    /// Read without the lock: what is out of the ordinary.
    signs: AtomicU8,
}

// SAFETY: the raw pointers inside (chunks, metadata) point to memory that only this instance reaches, and that is only
// changed with the lock held or before the instance is shared.
unsafe impl<B: Backing + Send, R: RawMutex + Send> Send for PerCpuAllocator<B, R> {}
// SAFETY: as above: shared access to what changes goes through the lock.
unsafe impl<B: Backing + Sync, R: RawMutex + Sync> Sync for PerCpuAllocator<B, R> {}

impl<B: Backing, R: RawMutex> fmt::Debug for PerCpuAllocator<B, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PerCpuAllocator")
            .field("geometry", &self.geometry)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Takes over a first chunk. No CPU is materialised yet, see [`bring_up`](Self::bring_up).
    ///
    /// # Errors
    /// [`SetupError`] if the backing has no metadata, its window does not suit the first chunk, or `policy` asks for
    /// more than the geometry can give.
    ///
    /// # Safety
    /// `first_chunk` was built in memory that stays for as long as the instance, and no other instance has it; its
    /// unit offsets hold for all chunks of `backing`'s window.
    pub unsafe fn new(
        backing: B,
        first_chunk: &FirstChunk<'_>,
        policy: Policy,
    ) -> Result<Self, SetupError> {
        let plan = first_chunk.plan();
        let sizes = *plan.sizes();
        let window = backing.window();
        let end_bytes = window.pitch_bytes.checked_mul(window.chunks as usize);
        let fits = end_bytes.is_some_and(|bytes| window.base.checked_add(bytes).is_some());
        if window.base == 0
            || !window.base.is_multiple_of(GRANULE_BYTES)
            || window.chunks == 0
            || !fits
        {
            return Err(SetupError::Window { window });
        }
        if window.base != first_chunk.base() {
            return Err(SetupError::WindowBase {
                base: window.base,
                first_chunk: first_chunk.base(),
            });
        }
        let pages = sizes.unit_pages();
        let granules_per_page = (sizes.page_bytes() / GRANULE_BYTES) as u32;
        let limit_bytes = sizes
            .unit_bytes()
            .min((MAX_MASK_PAGES as usize - 1) * sizes.page_bytes());
        if policy.max_alloc_bytes == 0 || policy.max_alloc_bytes > limit_bytes {
            return Err(SetupError::MaxAlloc {
                bytes: policy.max_alloc_bytes,
                limit_bytes,
            });
        }
        let Some(max_align_shift) = policy.max_align_bytes.checked_ilog2() else {
            return Err(SetupError::MaxAlign {
                align: policy.max_align_bytes,
            });
        };
        if window.pitch_bytes < sizes.unit_bytes()
            || !window.pitch_bytes.is_multiple_of(sizes.page_bytes())
        {
            return Err(SetupError::WindowPitch {
                pitch_bytes: window.pitch_bytes,
                unit_bytes: sizes.unit_bytes(),
            });
        }
        if sizes.unit_bytes() > MAX_UNIT_BYTES {
            return Err(SetupError::UnitBytes {
                unit_bytes: sizes.unit_bytes(),
                limit_bytes: MAX_UNIT_BYTES,
            });
        }
        let overflow = |_| SetupError::Backing(BackingError::OutOfMetadata);
        let chunk = ChunkLayout::new(pages as u32, granules_per_page).map_err(overflow)?;

        let mut block = BlockLayout::new();
        let units_layout = UnitsLayout::add(&mut block, plan.nr_cpu_ids()).map_err(overflow)?;
        let places_layout = PlacesLayout::add(&mut block, window.chunks).map_err(overflow)?;
        let directory_layout = DirectoryLayout::add(&mut block, window.chunks).map_err(overflow)?;
        let tables_layout = block.finish();
        let tables = backing
            .allocate_metadata(tables_layout, Context::MaySleep)
            .map_err(SetupError::Backing)?;
        // SAFETY: the block has just been allocated with the layout that all were added to; it stays as long as the
        // instance.
        let (units, places, directory) = unsafe {
            let places = Places::new(tables, &places_layout);
            (
                Units::new(
                    tables,
                    &units_layout,
                    first_chunk,
                    backing.comes_with_touch(),
                ),
                places.view(),
                Directory::new(tables, &directory_layout, places),
            )
        };
        // An area is aligned within its unit; a copy no further than the unit itself.
        let units_align = plan
            .possible_cpus()
            .filter_map(|cpu| first_chunk.unit_address(cpu))
            .map(|unit| 1 << unit.as_ptr().addr().trailing_zeros())
            .fold(sizes.page_bytes(), usize::min);
        // Granules that caches look at have 28 bits: of places that are longer there is one within reach.
        let pitch_granules = u32::try_from(window.pitch_bytes / GRANULE_BYTES).unwrap_or(1 << 31);
        let geometry = Geometry {
            window,
            granule_mask: match pitch_granules.is_power_of_two() {
                true => pitch_granules - 1,
                false => 0,
            },
            granule_bits: pitch_granules.trailing_zeros(),
            pitch_shift: window
                .pitch_bytes
                .is_power_of_two()
                .then(|| window.pitch_bytes.trailing_zeros()),
            sizes,
            regions: sizes.regions(),
            max_alloc_bytes: policy.max_alloc_bytes,
            max_align_bytes: units_align.min(1 << max_align_shift),
            chunk,
            tables: (tables, tables_layout),
        };
        let mut state = State::new(directory, &sizes, policy.spare_chunks);
        state.metadata_grew(tables_layout.size());
        let mut new = Self {
            backing,
            units,
            places,
            geometry,
            policy,
            state: Mutex::new(state),
            served: Served::default(),
            caches: None,
            hardened: None,
            signs: AtomicU8::new(UPKEEP_DUE),
        };
        // From here on a failure drops `new`, which gives all metadata back.
        new.add_first_chunk()?;
        Ok(new)
    }

    /// Makes the chunks of the first chunk's reserved and dynamic regions.
    fn add_first_chunk(&mut self) -> Result<(), SetupError> {
        let granules = |bytes: &Range<usize>| {
            (bytes.start / GRANULE_BYTES) as u32..(bytes.end / GRANULE_BYTES) as u32
        };
        let per_page = (self.geometry.sizes.page_bytes() / GRANULE_BYTES) as u32;
        let make = |region: Range<u32>| {
            let pages = region.end.div_ceil(per_page) - region.start / per_page;
            let layout =
                ChunkLayout::new(pages, per_page).map_err(|_| BackingError::OutOfMetadata)?;
            let block = self
                .backing
                .allocate_metadata(layout.block, Context::MaySleep)?;
            // SAFETY: the block has just been allocated with this layout; the region lies in these pages.
            Ok((
                unsafe { Chunk::new(block, &layout, 0, Nature::First, region) },
                layout.block.size(),
            ))
        };
        let (dynamic, dynamic_bytes) =
            make(granules(&self.geometry.regions.dynamic)).map_err(SetupError::Backing)?;
        let state = self.state.get_mut();
        state.add_first_chunk(dynamic);
        state.metadata_grew(dynamic_bytes);
        state.count_first_chunk(self.geometry.sizes.populated_pages() as u64);
        if !self.geometry.regions.reserved.is_empty() {
            let (reserved, reserved_bytes) =
                make(granules(&self.geometry.regions.reserved)).map_err(SetupError::Backing)?;
            state.reserved = Some(reserved);
            state.metadata_grew(reserved_bytes);
        }
        Ok(())
    }

    /// Where the units lie, and which CPUs there are.
    pub fn units(&self) -> &Units {
        &self.units
    }

    /// The neutral address of the first chunk's first byte.
    pub fn neutral_base(&self) -> usize {
        self.geometry.window.base
    }

    /// The sizes of a unit and its regions.
    pub fn sizes(&self) -> &UnitSizes {
        &self.geometry.sizes
    }

    /// The largest alignment that is served, in bytes: the policy's, or what all units lie at multiples of; at most a page.
    pub fn max_align_bytes(&self) -> usize {
        self.geometry.max_align_bytes
    }

    /// The layout of every later chunk's metadata.
    pub fn chunk_metadata_layout(&self) -> Layout {
        self.geometry.chunk.block
    }

    /// The policy in force.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The backing.
    pub fn backing(&self) -> &B {
        &self.backing
    }

    /// Sets the hook that is told of every event, or none.
    pub fn set_event_hook(&self, hook: Option<&'static dyn EventHook>) {
        if let Some(hardened) = &self.hardened {
            hardened.set_event_hook(hook);
        }
        let mut state = self.state.lock();
        state.hook = hook;
        self.set_watched(hook.is_some() || self.is_hardened());
    }

    /// Serves a request: returns the neutral address of an area, which is zero on every materialised CPU unless
    /// [`AllocFlags::NO_ZERO`](crate::AllocFlags::NO_ZERO) was given.
    ///
    /// # Errors
    /// [`AllocError`]; nothing has changed then.
    pub fn allocate(&self, request: &Request) -> Result<usize, AllocError> {
        let result = match &self.hardened {
            None => self
                .check_request(request)
                .and_then(|(granules, align)| self.serve(request, granules, align)),
            Some(hardened) => self.serve_hardened(hardened, request),
        };
        if let Err(error) = result {
            self.refuse(request, error);
        }
        self.keep_up_with(request);
        result
    }

    /// Takes back an area of the dynamic regions, by the neutral address that [`allocate`](Self::allocate) returned.
    ///
    /// # Errors
    /// [`FreeError`] says what `address` is instead; nothing has changed then.
    ///
    /// # Safety
    /// If an area starts at `address`, it is the caller's to free, and no copy of it is used any more. (Any other address
    /// is refused.)
    pub unsafe fn free(&self, address: usize) -> Result<(), FreeError> {
        // SAFETY: the promise of the caller.
        unsafe { self.free_with(address, FreeFlags::empty()) }
    }

    /// [`free`](Self::free) with flags: from atomic context, or an area of the reserved region.
    ///
    /// # Errors
    /// As [`free`](Self::free).
    ///
    /// # Safety
    /// As [`free`](Self::free).
    pub unsafe fn free_with(&self, address: usize, flags: FreeFlags) -> Result<(), FreeError> {
        self.take_back(address, flags)?;
        self.keep_up_after(flags);
        Ok(())
    }

    /// [`free_with`](Self::free_with) for an area that belongs to no run.
    ///
    /// # Safety
    /// As there.
    unsafe fn free_past_cache(&self, address: usize, flags: FreeFlags) -> Result<(), FreeError> {
        self.take_back_past_runs(address, flags)?;
        self.keep_up_after(flags);
        Ok(())
    }

    /// Runs the upkeep if that is the callers' business and it is due, unless the caller `is_hurried`.
    #[inline]
    fn upkeep_by_caller(&self, is_hurried: bool) {
        if self.policy.upkeep == UpkeepBy::Callers && !is_hurried {
            self.upkeep_if_due();
        }
    }

    #[inline]
    fn has_sign(&self, sign: u8) -> bool {
        self.signs.load(Ordering::Relaxed) & sign != 0
    }

    #[inline]
    fn set_sign(&self, sign: u8, is_set: bool) {
        if self.has_sign(sign) != is_set {
            match is_set {
                true => self.signs.fetch_or(sign, Ordering::Relaxed),
                false => self.signs.fetch_and(!sign, Ordering::Relaxed),
            };
        }
    }

    /// `cpu`'s address for a neutral one: one addition.
    ///
    /// # Errors
    /// [`CpuError`] if `cpu` is not possible.
    #[inline]
    pub fn per_cpu_address(&self, neutral: usize, cpu: CpuId) -> Result<usize, CpuError> {
        self.units.copy_of(neutral, cpu)
    }

    fn lock(&self, may_try_only: bool) -> Option<MutexGuard<'_, R, State>> {
        if may_try_only {
            self.state.try_lock()
        } else {
            Some(self.state.lock())
        }
    }

    /// Pages of the chunk at `place`, counted in the unit, on `cpus`.
    fn span<'a>(&'a self, place: u32, pages: PageMask, cpus: Cpus<'a>) -> PageSpan<'a> {
        PageSpan {
            chunk: place,
            neutral: self.neutral(place),
            page_bytes: self.geometry.sizes.page_bytes(),
            pages,
            cpus,
            units: &self.units,
        }
    }

    /// The CPUs that a batch of work populates pages for.
    fn populated_for(&self, batch: Batch) -> Cpus<'_> {
        Cpus::Set(&self.units.populated_for[batch.phase])
    }

    fn space(&self, place: u32) -> ChunkSpace<'_> {
        ChunkSpace {
            chunk: place,
            neutral: self.neutral(place),
            unit_bytes: self.geometry.sizes.unit_bytes(),
            units: &self.units,
        }
    }

    /// Neutral address of the chunk at `place`.
    fn neutral(&self, place: u32) -> usize {
        self.geometry
            .window
            .base
            .wrapping_add(place as usize * self.geometry.window.pitch_bytes)
    }
}

impl<B: Backing, R: RawMutex> Drop for PerCpuAllocator<B, R> {
    fn drop(&mut self) {
        self.end_hardened();
        while let Some((place, chunk)) = self.state.get_mut().remove_any_chunk() {
            self.destroy(place, chunk);
            self.free_block(chunk);
        }
        while let Some((_, chunk)) = self.state.get_mut().directory.take_parked() {
            self.free_block(chunk);
        }
        if let Some(caches) = self.caches.take() {
            let (block, layout) = caches.block;
            // SAFETY: allocated with this layout; the cells in it are not used any more.
            unsafe { self.backing.free_metadata(block, layout) };
        }
        let (block, layout) = self.geometry.tables;
        // SAFETY: allocated in `new` with this layout; the state that used it is gone, the units are not used any more.
        unsafe { self.backing.free_metadata(block, layout) };
    }
}

#[cfg(all(loom, test))]
mod models;
#[cfg(all(test, not(loom), feature = "std", target_os = "linux"))]
mod tests;
