//! Where memory comes from: the one trait that a home of the allocator implements.
//!
//! The allocator decides which chunk exists and which of its pages have memory; a backing carries that out. A chunk is
//! a piece of address space of the same length in every CPU's unit, at congruent addresses: chunk `i` begins at
//! neutral address `window.base + i * window.pitch_bytes`, and a CPU's part of it lies
//! [`Units::offset`](crate::cpus::Units::offset) further. Chunk 0 is the first chunk, made by a builder before the
//! allocator exists; its pages never go away and no backing call is about it.
//!
//! All calls come without any lock of the allocator held. Calls about one chunk may overlap in time, but never two
//! about the same page.

use core::alloc::Layout;
use core::fmt;
use core::ptr::NonNull;

use crate::cpus::{Cpus, Units};
use crate::unit::{Contents, CpuId, NodeId};

#[cfg(all(feature = "std", target_os = "linux"))]
mod address_range;
pub mod contig;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod mmap;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod sim;

/// Where the chunks of an instance may lie in neutral address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Neutral address of the first chunk: where the static template's addresses begin.
    pub base: usize,
    /// From one chunk's neutral address to the next one's; at least the unit size, a multiple of the page size.
    pub pitch_bytes: usize,
    /// How many chunks fit, the first one included; at least 1.
    pub chunks: u32,
}

/// Whether a call may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Context {
    /// The caller may sleep.
    MaySleep,
    /// The caller must not sleep: interrupt context, or a lock held.
    Atomic,
}

/// Why a backing could not do what it was asked for. Nothing has changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BackingError {
    /// No memory for pages.
    OutOfFrames,
    /// No address space (or no page table) for a chunk.
    OutOfAddressSpace,
    /// No memory for metadata.
    OutOfMetadata,
    /// It can only be done in a context that may sleep.
    WouldSleep,
}

impl fmt::Display for BackingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfFrames => "no memory for pages",
            Self::OutOfAddressSpace => "no address space for a chunk",
            Self::OutOfMetadata => "no memory for metadata",
            Self::WouldSleep => "it cannot be done without sleeping",
        })
    }
}

impl core::error::Error for BackingError {}

/// The address space of one chunk in every possible CPU's unit.
#[derive(Debug, Clone, Copy)]
pub struct ChunkSpace<'a> {
    /// Number of the chunk in the window; never 0.
    pub chunk: u32,
    /// Neutral address of the chunk.
    pub neutral: usize,
    /// Length of a unit's part.
    pub unit_bytes: usize,
    /// Where the units lie.
    pub units: &'a Units,
}

impl<'a> ChunkSpace<'a> {
    /// The chunk's address space in the unit of every possible CPU.
    pub fn areas(self) -> impl Iterator<Item = CpuArea> + 'a {
        areas(
            self.units,
            Cpus::Set(self.units.possible()),
            self.neutral,
            self.unit_bytes,
        )
    }
}

/// Neighbouring pages of one chunk on some CPUs.
#[derive(Debug, Clone, Copy)]
pub struct PageSpan<'a> {
    /// Number of the chunk in the window; never 0.
    pub chunk: u32,
    /// First page, counted from the start of the unit.
    pub first_page: u32,
    /// How many pages.
    pub pages: u32,
    /// Neutral address of the first page.
    pub neutral: usize,
    /// Length of the pages.
    pub bytes: usize,
    /// The CPUs concerned.
    pub cpus: Cpus<'a>,
    /// Where the units lie.
    pub units: &'a Units,
}

impl<'a> PageSpan<'a> {
    /// The pages' address range in the unit of each CPU concerned.
    pub fn areas(self) -> impl Iterator<Item = CpuArea> + 'a {
        areas(self.units, self.cpus, self.neutral, self.bytes)
    }
}

fn areas<'a>(
    units: &'a Units,
    cpus: Cpus<'a>,
    neutral: usize,
    bytes: usize,
) -> impl Iterator<Item = CpuArea> + 'a {
    cpus.iter().filter_map(move |cpu| {
        let address = neutral.wrapping_add(units.offset(cpu)?);
        Some(CpuArea {
            cpu,
            node: units.node(cpu)?,
            address,
            bytes,
        })
    })
}

/// A range of real addresses in one CPU's unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuArea {
    /// Whose unit.
    pub cpu: CpuId,
    /// The node that its memory should come from.
    pub node: NodeId,
    /// First address.
    pub address: usize,
    /// Length.
    pub bytes: usize,
}

/// Supplies address space, pages and metadata.
///
/// # Safety
/// The allocator hands out memory on the word of its backing:
/// - between a successful [`populate`](Self::populate) and the matching [`depopulate`](Self::depopulate) every byte of
///   the span on each of its CPUs is readable, writable and used by nothing else, and is zero where
///   [`Contents::Zeroed`] was returned;
/// - metadata blocks fit their layout and are used by nothing else until they are freed;
/// - [`window`](Self::window) never changes, and what the builder of the first chunk made stays in place.
pub unsafe trait Backing {
    /// Where chunks lie. Asked once, at set-up.
    fn window(&self) -> Window;

    /// Memory for the allocator's own data.
    ///
    /// # Errors
    /// [`BackingError::OutOfMetadata`], or [`BackingError::WouldSleep`] in atomic context.
    fn allocate_metadata(
        &self,
        layout: Layout,
        context: Context,
    ) -> Result<NonNull<u8>, BackingError>;

    /// Takes metadata back.
    ///
    /// # Safety
    /// `block` came from [`allocate_metadata`](Self::allocate_metadata) of this backing with the same `layout`, and is
    /// not used any more.
    unsafe fn free_metadata(&self, block: NonNull<u8>, layout: Layout);

    /// Makes a chunk's address space ready, so that populating its pages later needs memory only.
    ///
    /// # Errors
    /// Any [`BackingError`]; then nothing is reserved.
    fn reserve(&self, space: ChunkSpace<'_>, context: Context) -> Result<(), BackingError>;

    /// Gives a chunk's address space back.
    ///
    /// # Safety
    /// The chunk was reserved, none of its pages is populated, and nothing uses its addresses any more.
    unsafe fn release(&self, space: ChunkSpace<'_>);

    /// Gives the pages memory on all CPUs of the span, or on none. With [`Cpus::One`] (a CPU is brought up) a page that
    /// has memory there already keeps it.
    ///
    /// Returns what the memory holds: with [`Contents::Zeroed`] the allocator does not zero it again.
    ///
    /// # Errors
    /// Any [`BackingError`]; then no page of the span has memory.
    fn populate(&self, span: PageSpan<'_>, context: Context) -> Result<Contents, BackingError>;

    /// Takes the pages' memory away on all CPUs of the span. A page that has none on some CPU is passed over.
    ///
    /// # Safety
    /// Nothing uses the memory any more.
    unsafe fn depopulate(&self, span: PageSpan<'_>);

    /// The physical address behind `address` (real, not neutral), if the backing can tell.
    fn physical_address(&self, address: usize) -> Option<u64> {
        let _ = address;
        None
    }

    /// Lets time pass while another CPU finishes its part; called only where sleeping is allowed.
    fn relax(&self) {
        core::hint::spin_loop();
    }
}

// SAFETY: the calls are passed on unchanged, so the promises of the other backing hold.
unsafe impl<B: Backing + ?Sized> Backing for &B {
    fn window(&self) -> Window {
        (**self).window()
    }

    fn allocate_metadata(
        &self,
        layout: Layout,
        context: Context,
    ) -> Result<NonNull<u8>, BackingError> {
        (**self).allocate_metadata(layout, context)
    }

    unsafe fn free_metadata(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).free_metadata(block, layout) }
    }

    fn reserve(&self, space: ChunkSpace<'_>, context: Context) -> Result<(), BackingError> {
        (**self).reserve(space, context)
    }

    unsafe fn release(&self, space: ChunkSpace<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).release(space) }
    }

    fn populate(&self, span: PageSpan<'_>, context: Context) -> Result<Contents, BackingError> {
        (**self).populate(span, context)
    }

    unsafe fn depopulate(&self, span: PageSpan<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).depopulate(span) }
    }

    fn physical_address(&self, address: usize) -> Option<u64> {
        (**self).physical_address(address)
    }

    fn relax(&self) {
        (**self).relax();
    }
}
