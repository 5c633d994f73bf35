//! The backing for an x86_64 kernel with page tables: address space for all possible CPUs, frames for those that came.
//!
//! ```text
//!   | metadata | unit 0: chunk 0, chunk 1, ... | unit 1: chunk 0, chunk 1, ... | ...      1 GiB each
//! ```
//! Every unit has a window of 1 GiB, which chunk `i` takes the `i`-th piece of. Making a chunk makes the page tables for it,
//! so that populating its pages needs frames only, works in interrupt context, and takes no lock. Pages of a CPU come from
//! its node, and from the nearest other one where that has none left.
//!
//! A CPU that never came costs one entry of a table: its window leads to shared tables, and these to a frame of zeroes and
//! to frames with the initial values of the static variables, all of it read only. Bringing it up makes tables of its own,
//! which take the place of the shared ones when all its pages have memory.
//!
//! What always holds:
//! - no page is writable and executable, and none of a CPU that never came is writable;
//! - a frame or a table goes back only after all CPUs have forgotten it, by one flush for each batch, never in atomic context;
//! - the level-4 entries exist from the set-up on: address spaces that are made later share them by copying.
//!
//! The kernel gives [`Frames`] and a [`Shootdown`]; physical memory is mapped, whole, at an offset. Tables have four levels,
//! and no-execute must be enabled (EFER.NXE).

use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use lock_api::{Mutex, RawMutex};
use x86_64::VirtAddr;
use x86_64::structures::paging::PhysFrame;

use super::{Backing, BackingError, ChunkSpace, Context, CpuArea, PageSpan, Window};
use crate::unit::{Contents, NodeId, UnitPlan};
use frames::Pool;
use tables::{DIRECTORY_BYTES, PAGE_BYTES, Physical, Table, UPPER_BYTES};
use usage::Usage;
use windows::{METADATA, Windows, tables_of};

mod cpu;
mod error;
mod first_chunk;
mod frames;
mod instance;
mod metadata;
mod pages;
mod shootdown;
mod tables;
mod usage;
mod windows;

pub use error::{FirstChunkError, InitialError, InstanceError, PagingError};
pub use frames::Frames;
pub use shootdown::{Shootdown, Stale};

/// Where a [`Paging`] lies.
#[derive(Debug, Clone, Copy)]
pub struct PagingSetup {
    /// The level-4 table in use. The kernel's part of all address spaces to come is copied from it.
    pub level_4: PhysFrame,
    /// Where physical address 0 is mapped; the rest of physical memory follows.
    pub physical_memory_offset: VirtAddr,
    /// The first address of the windows: a multiple of 512 GiB. They take 1 GiB for metadata and 1 GiB for each unit, and
    /// level-4 entries (512 GiB each) of their own.
    pub window: VirtAddr,
    /// The neutral address of the first chunk: the address of the per-CPU section, whose static variables are handles.
    pub neutral_base: usize,
    /// The node that metadata and shared tables come from.
    pub node: NodeId,
    /// The most chunks at a time, the first one included. The allocator's table takes 23 bytes for each, whether it is there
    /// or not, and small units make room for many in 1 GiB. There is always one, and never more than there is room for.
    pub max_chunks: u32,
}

impl PagingSetup {
    /// A place with what suits most kernels: metadata and shared tables from node 0, and at most 2,048 chunks.
    ///
    /// ```
    /// use pcpu::backing::paging::PagingSetup;
    /// use x86_64::structures::paging::PhysFrame;
    /// use x86_64::{PhysAddr, VirtAddr};
    ///
    /// let level_4 = PhysFrame::containing_address(PhysAddr::new(0x1000)); // from CR3
    /// let physical_memory = VirtAddr::new(0xffff_8000_0000_0000);
    /// let window = VirtAddr::new(0xffff_c000_0000_0000);
    /// let setup = PagingSetup::new(level_4, physical_memory, window, 0x20_0000);
    /// assert_eq!((setup.node.get(), setup.max_chunks), (0, 2048));
    /// ```
    pub const fn new(
        level_4: PhysFrame,
        physical_memory_offset: VirtAddr,
        window: VirtAddr,
        neutral_base: usize,
    ) -> Self {
        Self {
            level_4,
            physical_memory_offset,
            window,
            neutral_base,
            node: NodeId::new(0),
            max_chunks: 2048,
        }
    }
}

/// What a [`Paging`] has taken and done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PagingStats {
    /// Frames that it holds now: pages, tables and metadata.
    pub frames: u64,
    /// Frames that came from another node than was asked for, since the set-up.
    pub frames_from_afar: u64,
    /// Pages of metadata that are kept for the next chunk: an atomic request could not make one.
    pub metadata_pages_kept: u64,
    /// Calls of [`Shootdown::flush`] since the set-up.
    pub flushes: u64,
}

/// Memory by page tables, of a kernel `K`; `R` is the lock of the counts of what is in use, which is held for a few
/// instructions at a time.
///
/// It is built before any heap, and makes the first chunk itself ([`build_first_chunk`](Self::build_first_chunk)), of a plan of
/// any kind. [`set_up`](Self::set_up) does all that is shown here at one go:
///
/// ```no_run
/// use core::ptr::addr_of;
/// use parking_lot::RawMutex; // a kernel has its own, which masks interrupts
/// use pcpu::PerCpuAllocator;
/// use pcpu::allocator::Policy;
/// use pcpu::backing::paging::{Frames, Paging, PagingSetup, Shootdown, Stale};
/// use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, NodeId, Template, UnitPlan, storage_words};
/// use x86_64::structures::paging::PhysFrame;
/// use x86_64::{PhysAddr, VirtAddr};
///
/// struct Memory;
///
/// // SAFETY: an allocator of frames hands each out once.
/// unsafe impl Frames for Memory {
///     fn allocate(&self, node: NodeId) -> Option<PhysFrame> {
///         // ...
/// #       None
///     }
///     unsafe fn free(&self, frame: PhysFrame) {
///         // ...
///     }
///     fn fall_back(&self, node: NodeId, nth: u32) -> Option<NodeId> {
///         [NodeId::new(0), NodeId::new(1)].get(nth as usize).copied()
///     }
/// }
///
/// // SAFETY: every CPU answers the interrupt before this one goes on.
/// unsafe impl Shootdown for Memory {
///     fn flush(&self, stale: Stale<'_>) {
///         if stale.pages() > 64 {
///             // Every CPU reloads CR3.
///         } else {
///             // Every CPU goes through `stale.ranges()` with invlpg.
///         }
///     }
/// }
///
/// # let (level_4, section_start): (PhysAddr, *const u8) = (PhysAddr::new(0x1000), core::ptr::null());
/// # let section: &[u8] = &[];
/// let (mut words, mut offsets) = ([0; storage_words(4)], [0; 4]);
/// let spec = FirstChunkSpec { static_bytes: section.len(), ..FirstChunkSpec::default() };
/// let plan = UnitPlan::embed(&spec, &EvenNodes::new(4, 2)?, &mut words)?;
/// let setup = PagingSetup {
///     level_4: PhysFrame::containing_address(level_4), // from CR3
///     physical_memory_offset: VirtAddr::new(0xffff_8000_0000_0000),
///     window: VirtAddr::new(0xffff_c000_0000_0000),
///     neutral_base: section_start.addr(),
///     node: NodeId::new(0),
///     max_chunks: 4096,
/// };
/// // SAFETY: all as `PagingSetup` says; the window is used for nothing else.
/// let mut paging = unsafe { Paging::<Memory, RawMutex>::new(Memory, setup, &plan)? };
/// let template = Template { bytes: section, base: setup.neutral_base };
/// let boot_cpu = CpuId::new(0);
/// let first_chunk = paging.build_first_chunk(plan, template, &mut offsets, |cpu| cpu == boot_cpu)?;
/// // The boot CPU may load its GS base now: first_chunk.unit_offset(boot_cpu).
///
/// // SAFETY: the first chunk lies in the windows of `paging`, which the instance takes over.
/// let pcpu = unsafe { PerCpuAllocator::<_, RawMutex>::new(paging, &first_chunk, Policy::default())? };
/// pcpu.bring_up(boot_cpu)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Paging<K, R: RawMutex> {
    pool: Pool<K>,
    windows: Windows,
    geometry: Geometry,
    usage: Mutex<R, Usage>,
    flushes: AtomicU64,
}

/// What never changes.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    neutral_base: usize,
    unit_bytes: usize,
    /// From chunk to chunk: a power of two, so that a chunk lies in one table or takes whole ones.
    pitch_bytes: usize,
    /// Bytes of the first chunk's regions, whole pages: its tail has no memory.
    first_bytes: usize,
    /// Bytes of it that may have initial values: the static and the reserved region.
    initial_bytes: usize,
    node: NodeId,
    max_chunks: u32,
}

impl Geometry {
    fn chunks(&self) -> u32 {
        let room = (DIRECTORY_BYTES / self.pitch_bytes) as u32;
        self.max_chunks.clamp(1, room)
    }

    /// The tables that a chunk lies in.
    fn tables(&self, chunk: u32) -> core::ops::Range<usize> {
        let start = chunk as usize * self.pitch_bytes;
        tables_of(start..start + self.unit_bytes)
    }
}

impl<K, R: RawMutex> fmt::Debug for Paging<K, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Paging")
            .field("windows", &self.windows)
            .field("geometry", &self.geometry)
            .finish_non_exhaustive()
    }
}

impl<K: Frames + Shootdown, R: RawMutex> Paging<K, R> {
    /// Makes the windows for the units of `plan`, with their top-level entries.
    ///
    /// # Errors
    /// [`PagingError`]; nothing has changed then.
    ///
    /// # Safety
    /// `setup` tells the truth: the table is in use, physical memory is mapped at the offset, readable and writable. Nothing
    /// else uses the level-4 entries of the window from now on, and address spaces that are made from now on have copies of
    /// them.
    pub unsafe fn new(
        kernel: K,
        setup: PagingSetup,
        plan: &UnitPlan<'_>,
    ) -> Result<Self, PagingError> {
        let sizes = plan.sizes();
        if sizes.page_bytes() != PAGE_BYTES {
            return Err(PagingError::PageSize {
                page_bytes: sizes.page_bytes(),
            });
        }
        let (unit_bytes, limit_bytes) = (sizes.unit_bytes(), DIRECTORY_BYTES);
        if unit_bytes > limit_bytes {
            return Err(PagingError::UnitTooLarge {
                unit_bytes,
                limit_bytes,
            });
        }
        let slots = plan.nr_units() as usize + 1;
        let start = setup.window.as_u64() as usize;
        check_window(&setup, start, slots)?;
        // SAFETY: the promise of the caller, and of `Frames`.
        let (physical, level_4) = unsafe {
            (
                Physical::new(setup.physical_memory_offset),
                Table::new(setup.level_4),
            )
        };
        for index in 0..slots.div_ceil(tables::ENTRIES) {
            let address = start + index * UPPER_BYTES;
            if physical
                .get(level_4, address / UPPER_BYTES)
                .frame()
                .is_some()
            {
                return Err(PagingError::WindowInUse { address });
            }
        }
        let pool = Pool::new(kernel, physical);
        let windows =
            Windows::new(&pool, level_4, start, slots, setup.node).map_err(PagingError::Backing)?;
        let bitmap = match pool.table(setup.node) {
            Ok(bitmap) => bitmap,
            Err(error) => {
                // SAFETY: nobody has heard of the windows yet.
                unsafe { windows.free(&pool, || ()) };
                return Err(PagingError::Backing(error));
            }
        };
        let regions = sizes.regions();
        let geometry = Geometry {
            neutral_base: setup.neutral_base,
            unit_bytes,
            pitch_bytes: unit_bytes.next_power_of_two(),
            first_bytes: sizes.sum_bytes(),
            initial_bytes: regions.reserved.end,
            node: setup.node,
            max_chunks: setup.max_chunks,
        };
        let mut usage = Usage::new(bitmap);
        usage.take_chunk(geometry.tables(0));
        Ok(Self {
            pool,
            windows,
            geometry,
            usage: Mutex::new(usage),
            flushes: AtomicU64::new(0),
        })
    }

    /// What it has taken and done.
    pub fn stats(&self) -> PagingStats {
        PagingStats {
            frames: self.pool.held(),
            frames_from_afar: self.pool.taken_from_afar(),
            metadata_pages_kept: self.usage.lock().kept.pages(),
            flushes: self.flushes.load(Ordering::Relaxed),
        }
    }

    fn flush(&self, stale: Stale<'_>) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.pool.kernel.flush(stale);
    }

    /// Takes everything down: the first chunk, all tables and the level-4 entries. A kernel never does; its address spaces
    /// have copies of the entries.
    ///
    /// # Safety
    /// No instance uses the backing any more, nobody uses its addresses, and no other level-4 table has copies of its
    /// entries.
    pub unsafe fn tear_down(self) {
        self.free_kept();
        for slot in self.windows.units() {
            self.dismantle_unit(slot);
        }
        self.free_initial_values();
        let bitmap = self.usage.lock().bitmap();
        let all = Stale::strided(
            self.windows.address(METADATA),
            DIRECTORY_BYTES,
            DIRECTORY_BYTES,
            self.windows.units().end,
        );
        // SAFETY: the promise of the caller; what units had is gone, and an instance has given back its metadata.
        unsafe {
            self.windows.free(&self.pool, || self.flush(all));
            self.pool.free(bitmap.frame());
        }
    }
}

fn check_window(setup: &PagingSetup, start: usize, slots: usize) -> Result<(), PagingError> {
    if !start.is_multiple_of(UPPER_BYTES) {
        return Err(PagingError::WindowMisaligned {
            address: start,
            align_bytes: UPPER_BYTES,
        });
    }
    let bytes = slots * DIRECTORY_BYTES;
    let half_end = 1_usize << 47;
    // The upper half ends with the address space; addresses in between are none.
    let end = start.checked_add(bytes - 1);
    if end.is_none_or(|end| (start < half_end) != (end < half_end)) {
        return Err(PagingError::WindowTooLong {
            address: start,
            bytes,
        });
    }
    // The distances from the template to the units are what CPUs load as their GS base.
    for slot in [1, slots.saturating_sub(1).max(1)] {
        let unit = start + slot * DIRECTORY_BYTES;
        let offset = unit.wrapping_sub(setup.neutral_base);
        if VirtAddr::try_new(offset as u64).is_err() {
            return Err(PagingError::OffsetNotCanonical { offset });
        }
    }
    Ok(())
}

// SAFETY: a populated page is a frame that is nobody else's, zeroed, mapped writable in the CPU's own tables, which the CPUs
// see from `finish_cpu` on, when the allocator takes the CPU for materialised; until then they see zeroes. Metadata pages are
// mapped while their block is out. The window is what `new` made of the plan, and stays.
unsafe impl<K: Frames + Shootdown, R: RawMutex> Backing for Paging<K, R> {
    fn window(&self) -> Window {
        Window {
            base: self.geometry.neutral_base,
            pitch_bytes: self.geometry.pitch_bytes,
            chunks: self.geometry.chunks(),
        }
    }

    fn allocate_metadata(
        &self,
        layout: Layout,
        _context: Context,
    ) -> Result<NonNull<u8>, BackingError> {
        self.map_metadata(layout)
    }

    unsafe fn free_metadata(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: the promise of the caller.
        unsafe { self.unmap_metadata(block, layout) };
    }

    unsafe fn free_metadata_atomic(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: the promise of the caller.
        unsafe { self.keep_metadata(block, layout) };
    }

    unsafe fn reserve(&self, space: ChunkSpace<'_>, _context: Context) -> Result<(), BackingError> {
        self.reserve_tables(space)
    }

    unsafe fn release(&self, space: ChunkSpace<'_>) {
        self.free_kept();
        self.release_tables(space.chunk());
    }

    unsafe fn populate(
        &self,
        span: PageSpan<'_>,
        _context: Context,
    ) -> Result<Contents, BackingError> {
        self.map_pages(span)
    }

    unsafe fn depopulate(&self, span: PageSpan<'_>) {
        // SAFETY: the promise of the caller.
        unsafe { self.unmap_pages(span) };
    }

    unsafe fn begin_cpu(&self, unit: CpuArea) -> Result<(), BackingError> {
        self.begin_unit(unit)
    }

    unsafe fn finish_cpu(&self, unit: CpuArea) {
        self.finish_unit(unit);
    }

    unsafe fn cancel_cpu(&self, unit: CpuArea) {
        self.cancel_unit(unit);
    }

    fn physical_address(&self, address: usize) -> Option<u64> {
        let frame = self.windows.frame_at(address)?;
        Some(frame.start_address().as_u64() + (address % PAGE_BYTES) as u64)
    }
}
