//! The backing for kernels without paging code: chunks of contiguous memory, from one region that is given up front.
//!
//! ```text
//!   | chunk 0: unit 0, unit 1, ... | chunk 1: unit 0, unit 1, ... | ...
//! ```
//! Chunk `i` is the `i`-th piece of the region, a unit of it follows the other. All pages of a chunk have memory from
//! the start: populating costs nothing and gives nothing back. Neutral addresses may be chosen freely; those of the
//! static template let its symbols be handles.

use core::alloc::Layout;
use core::fmt;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use lock_api::{Mutex, RawMutex};

use super::{Backing, BackingError, ChunkSpace, Context, PageSpan, Window};
use crate::embed::{AreaRequest, EarlyMemory};
use crate::unit::{Contents, UnitPlan};

/// Contiguous memory. First the memory that [`embed`](crate::embed) makes the first chunk in, then the backing of the
/// instance; `R` is the lock of its metadata.
///
/// ```
/// use core::mem::MaybeUninit;
/// use parking_lot::RawMutex;
/// use pcpu::allocator::{PerCpuAllocator, Policy};
/// use pcpu::backing::contig::Contig;
/// use pcpu::embed;
/// use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, Template, UnitPlan, storage_words};
/// use pcpu::Request;
///
/// // What a kernel has set aside: aligned to a page, and 64 KiB for metadata.
/// #[repr(align(4096))]
/// struct Region([MaybeUninit<u8>; 512 << 10]);
/// let memory = Box::leak(Box::new(Region([MaybeUninit::uninit(); 512 << 10])));
/// let metadata = Box::leak(Box::new([MaybeUninit::uninit(); 64 << 10]));
///
/// let (mut words, mut offsets) = ([0; storage_words(2)], [0; 2]);
/// let spec = FirstChunkSpec { static_bytes: 8, atom_bytes: 4096, ..FirstChunkSpec::default() };
/// let plan = UnitPlan::embed(&spec, &EvenNodes::new(2, 1)?, &mut words)?;
/// let template = Template { bytes: &7_u64.to_ne_bytes(), base: 0x10_0000 };
/// let mut contig = Contig::<RawMutex>::new(&mut memory.0, metadata, &plan, template.base)?;
/// let first_chunk = embed::build(plan, template, &mut offsets, &mut contig)?;
/// // SAFETY: the first chunk lies in the region of `contig`, which the instance takes over.
/// let pcpu = unsafe { PerCpuAllocator::<_, RawMutex>::new(contig, &first_chunk, Policy::default())? };
/// pcpu.bring_up(CpuId::new(0))?;
///
/// let counter = pcpu.allocate(&Request::new(8, 8))?;
/// // The static variable at the template's first byte, and the new one, on CPU 1: the same offset for both.
/// let offset = pcpu.units().offset(CpuId::new(1)).unwrap();
/// # let at = |neutral: usize| core::ptr::with_exposed_provenance::<u64>(neutral.wrapping_add(offset));
/// // SAFETY: both lie in CPU 1's unit and are initialised.
/// let values = unsafe { (at(0x10_0000).read(), at(counter).read()) };
/// assert_eq!(values, (7, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Contig<R: RawMutex> {
    start: NonNull<u8>,
    neutral_base: usize,
    unit_bytes: usize,
    /// Length of a chunk: all its units.
    chunk_bytes: usize,
    chunks: u32,
    /// Bytes of chunk 0 that the builder has taken.
    built_bytes: usize,
    metadata: Mutex<R, Pool>,
}

/// Why a group's units find no place in chunk 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AreaError {
    /// It is not long enough: it was planned for another topology.
    NoRoom {
        /// What it lacks.
        lacking_bytes: usize,
    },
    /// The region does not begin at a multiple of the plan's atom; an atom of a page fits any region.
    Misaligned {
        /// The alignment asked for.
        align_bytes: usize,
    },
}

impl fmt::Display for AreaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRoom { lacking_bytes } => {
                write!(f, "chunk 0 is {lacking_bytes} bytes too short")
            }
            Self::Misaligned { align_bytes } => {
                write!(
                    f,
                    "the region does not begin at a multiple of {align_bytes}"
                )
            }
        }
    }
}

impl core::error::Error for AreaError {}

/// Why a region cannot hold chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegionError {
    /// It does not hold all units of one chunk.
    TooSmall {
        /// Its length.
        bytes: usize,
        /// The length of a chunk.
        needed_bytes: usize,
    },
    /// It does not begin at a page.
    Misaligned {
        /// Where it begins.
        address: usize,
        /// The page size.
        page_bytes: usize,
    },
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooSmall {
                bytes,
                needed_bytes,
            } => {
                write!(f, "a region of {bytes} bytes, a chunk needs {needed_bytes}")
            }
            Self::Misaligned {
                address,
                page_bytes,
            } => {
                write!(
                    f,
                    "a region at {address:#x}, which is no multiple of the page size {page_bytes}"
                )
            }
        }
    }
}

impl core::error::Error for RegionError {}

// SAFETY: the region and the pool belong to this value alone.
unsafe impl<R: RawMutex + Send> Send for Contig<R> {}
// SAFETY: shared use reads plain numbers; the pool is behind its lock.
unsafe impl<R: RawMutex + Sync> Sync for Contig<R> {}

impl<R: RawMutex> Contig<R> {
    /// Takes a region for the chunks, as many as it holds, and one for metadata. Neutral addresses begin at
    /// `neutral_base`: that of the [`Template`](crate::unit::Template).
    ///
    /// # Errors
    /// [`RegionError`] if the region does not hold all units of one chunk, or does not begin at a page.
    pub fn new(
        memory: &'static mut [MaybeUninit<u8>],
        metadata: &'static mut [MaybeUninit<u8>],
        plan: &UnitPlan<'_>,
        neutral_base: usize,
    ) -> Result<Self, RegionError> {
        let (bytes, sizes) = (memory.len(), plan.sizes());
        let chunk_bytes = sizes.unit_bytes().saturating_mul(plan.nr_units() as usize);
        if bytes < chunk_bytes {
            return Err(RegionError::TooSmall {
                bytes,
                needed_bytes: chunk_bytes,
            });
        }
        let start = NonNull::from(memory).cast::<u8>();
        let (address, page_bytes) = (start.as_ptr().expose_provenance(), sizes.page_bytes());
        if !address.is_multiple_of(page_bytes) {
            return Err(RegionError::Misaligned {
                address,
                page_bytes,
            });
        }
        Ok(Self {
            start,
            neutral_base,
            unit_bytes: sizes.unit_bytes(),
            chunk_bytes,
            chunks: u32::try_from(bytes / chunk_bytes).unwrap_or(u32::MAX),
            built_bytes: 0,
            metadata: Mutex::new(Pool::new(metadata)),
        })
    }
}

// SAFETY: areas are taken one behind the other from chunk 0, which nothing else uses; the region is 'static.
unsafe impl<R: RawMutex> EarlyMemory for Contig<R> {
    type Error = AreaError;

    fn contents(&self) -> Contents {
        Contents::Dirty
    }

    fn vm_space_bytes(&self) -> usize {
        usize::MAX
    }

    fn alloc_area(&mut self, request: AreaRequest) -> Result<NonNull<u8>, AreaError> {
        let end = self.built_bytes + request.nr_units as usize * self.unit_bytes;
        if end > self.chunk_bytes {
            return Err(AreaError::NoRoom {
                lacking_bytes: end - self.chunk_bytes,
            });
        }
        // SAFETY: `built_bytes < end <= chunk_bytes`, and the region holds at least one chunk.
        let area = unsafe { self.start.add(self.built_bytes) };
        if !area.as_ptr().addr().is_multiple_of(request.align_bytes) {
            return Err(AreaError::Misaligned {
                align_bytes: request.align_bytes,
            });
        }
        self.built_bytes = end;
        Ok(area)
    }

    unsafe fn free(&mut self, _start: NonNull<u8>, _bytes: usize) {
        // Unused units and tails stay where they are: the pieces of the region are all of one length.
    }
}

// SAFETY: a chunk's units are its piece of the region, always readable and writable; contents are called dirty.
// Metadata blocks come from a pool that hands each out once.
unsafe impl<R: RawMutex> Backing for Contig<R> {
    fn window(&self) -> Window {
        Window {
            base: self.neutral_base,
            pitch_bytes: self.chunk_bytes,
            chunks: self.chunks,
        }
    }

    fn allocate_metadata(
        &self,
        layout: Layout,
        _context: Context,
    ) -> Result<NonNull<u8>, BackingError> {
        self.metadata
            .lock()
            .allocate(layout)
            .ok_or(BackingError::OutOfMetadata)
    }

    unsafe fn free_metadata(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: the promise of the caller.
        unsafe { self.metadata.lock().free(block, layout) };
    }

    unsafe fn reserve(
        &self,
        _space: ChunkSpace<'_>,
        _context: Context,
    ) -> Result<(), BackingError> {
        Ok(())
    }

    unsafe fn release(&self, _space: ChunkSpace<'_>) {}

    unsafe fn populate(
        &self,
        _span: PageSpan<'_>,
        _context: Context,
    ) -> Result<Contents, BackingError> {
        Ok(Contents::Dirty)
    }

    unsafe fn depopulate(&self, _span: PageSpan<'_>) {}
}

/// Blocks of metadata. They come in very few sizes: one for each table, and one for all chunks. A block that was freed
/// is handed out again to whoever asks for the same layout.
#[derive(Debug)]
struct Pool {
    next: NonNull<u8>,
    left_bytes: usize,
    free: Option<NonNull<FreeBlock>>,
}

/// What a free block holds.
#[derive(Debug)]
struct FreeBlock {
    layout: Layout,
    next: Option<NonNull<FreeBlock>>,
}

impl Pool {
    fn new(memory: &'static mut [MaybeUninit<u8>]) -> Self {
        let left_bytes = memory.len();
        Self {
            next: NonNull::from(memory).cast(),
            left_bytes,
            free: None,
        }
    }

    /// Every block can hold what it needs while it is free.
    fn padded(layout: Layout) -> Option<Layout> {
        let least = Layout::new::<FreeBlock>();
        let align = layout.align().max(least.align());
        Some(
            Layout::from_size_align(layout.size().max(least.size()), align)
                .ok()?
                .pad_to_align(),
        )
    }

    fn allocate(&mut self, layout: Layout) -> Option<NonNull<u8>> {
        let layout = Self::padded(layout)?;
        let mut link = &mut self.free;
        while let Some(block) = *link {
            // SAFETY: blocks on the list are free and hold a `FreeBlock`.
            let free = unsafe { &mut *block.as_ptr() };
            if free.layout == layout {
                *link = free.next;
                return Some(block.cast());
            }
            link = &mut free.next;
        }
        let skip = self.next.as_ptr().align_offset(layout.align());
        let taken = skip
            .checked_add(layout.size())
            .filter(|&taken| taken <= self.left_bytes)?;
        // SAFETY: `skip <= taken <= left_bytes`.
        let block = unsafe { self.next.add(skip) };
        // SAFETY: `taken <= left_bytes`.
        self.next = unsafe { self.next.add(taken) };
        self.left_bytes -= taken;
        Some(block)
    }

    /// # Safety
    /// `block` came from `allocate` with this layout and is not used any more.
    unsafe fn free(&mut self, block: NonNull<u8>, layout: Layout) {
        let Some(layout) = Self::padded(layout) else {
            return;
        };
        let block = block.cast::<FreeBlock>();
        // SAFETY: the block is ours again, and large and aligned enough for a `FreeBlock`.
        unsafe {
            block.write(FreeBlock {
                layout,
                next: self.free,
            })
        };
        self.free = Some(block);
    }
}
