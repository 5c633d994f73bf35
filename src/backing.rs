//! Where memory comes from: the one trait that a home of the allocator implements.
//!
//! The allocator decides which chunk exists and which of its pages have memory; a backing carries that out. A chunk is
//! a piece of address space of the same length in every CPU's unit, at congruent addresses: chunk `i` begins at
//! neutral address `window.base + i * window.pitch_bytes`, and a CPU's part of it lies
//! [`Units::offset`](crate::cpus::Units::offset) further. Chunk 0 is the first chunk, made by a builder before the
//! allocator exists; its pages never go away and no backing call is about it.
//!
//! All calls come without any lock of the allocator held. Calls about one chunk may overlap in time, but never two
//! about the same page on the same CPU.

use core::alloc::Layout;
use core::fmt;
use core::ops::Range;
use core::ptr::NonNull;

use crate::chunk::PageMask;
use crate::cpus::{Cpus, Units};
use crate::unit::{Contents, CpuId, NodeId};

#[cfg(all(feature = "std", target_os = "linux"))]
mod address_range;
pub mod contig;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod mmap;
#[cfg(all(feature = "paging", target_arch = "x86_64"))]
pub mod paging;
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

/// The address space of one chunk in every possible CPU's unit. Only the allocator makes one.
#[derive(Debug, Clone, Copy)]
pub struct ChunkSpace<'a> {
    pub(crate) chunk: u32,
    pub(crate) neutral: usize,
    pub(crate) unit_bytes: usize,
    pub(crate) units: &'a Units,
}

impl<'a> ChunkSpace<'a> {
    /// Number of the chunk in the window; never 0. A number is used again once the chunk has been released.
    pub fn chunk(&self) -> u32 {
        self.chunk
    }

    /// Neutral address of the chunk.
    pub fn neutral(&self) -> usize {
        self.neutral
    }

    /// Length of a unit's part, in bytes.
    pub fn unit_bytes(&self) -> usize {
        self.unit_bytes
    }

    /// Where the units lie, which CPUs there are, and which of them are materialised.
    pub fn units(&self) -> &'a Units {
        self.units
    }

    /// The chunk's address space in the unit of every possible CPU.
    pub fn areas(self) -> impl Iterator<Item = CpuArea> + 'a {
        let cpus = Cpus::Set(self.units.possible());
        areas(self.units, cpus, self.neutral, self.unit_bytes)
    }
}

/// Some pages of one chunk on some CPUs. Only the allocator makes one. It may be gone through as often as one likes: the
/// pages and the CPUs stay the same.
#[derive(Debug, Clone, Copy)]
pub struct PageSpan<'a> {
    pub(crate) chunk: u32,
    pub(crate) neutral: usize,
    pub(crate) page_bytes: usize,
    pub(crate) pages: PageMask,
    pub(crate) cpus: Cpus<'a>,
    pub(crate) units: &'a Units,
}

impl<'a> PageSpan<'a> {
    /// Number of the chunk in the window; never 0.
    pub fn chunk(&self) -> u32 {
        self.chunk
    }

    /// The CPUs concerned.
    pub fn cpus(&self) -> Cpus<'a> {
        self.cpus
    }

    /// Where the units lie, which CPUs there are, and which of them are materialised.
    pub fn units(&self) -> &'a Units {
        self.units
    }

    /// The pages as runs of neighbours, counted from the start of the unit.
    pub fn runs(&self) -> impl Iterator<Item = Range<u32>> + use<> {
        self.pages.runs()
    }

    /// The address ranges of the pages, a range for every run in the unit of every CPU concerned.
    pub fn areas(self) -> impl Iterator<Item = CpuArea> + 'a {
        self.pages.runs().flat_map(move |run| self.areas_of(&run))
    }

    /// The address ranges of one of the runs, in the unit of every CPU concerned.
    fn areas_of(&self, run: &Range<u32>) -> impl Iterator<Item = CpuArea> + use<'a> {
        let neutral = self
            .neutral
            .wrapping_add(run.start as usize * self.page_bytes);
        areas(self.units, self.cpus, neutral, run.len() * self.page_bytes)
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
/// What the copies of a possible CPU that is not materialised hold: they must be readable, as zeroes, wherever a chunk is
/// reserved, for [`per_cpu_ptr`](crate::per_cpu_ptr) promises that. A kernel may map one frame of zeroes there, read only,
/// and replace it when the CPU is brought up; in a process untouched address space does it.
///
/// # Safety
/// The allocator hands out memory on the word of its backing:
/// - between a successful [`populate`](Self::populate) and the matching [`depopulate`](Self::depopulate) every byte of
///   the span on each of its CPUs is readable, writable and used by nothing else, and is zero where
///   [`Contents::Zeroed`] was returned;
/// - metadata blocks fit their layout and are used by nothing else until they are freed;
/// - where [`comes_with_touch`](Self::comes_with_touch) is true, all of that holds of every possible CPU, whether a call
///   named it or not;
/// - [`window`](Self::window) never changes, and what the builder of the first chunk made stays in place.
pub unsafe trait Backing {
    /// Where chunks lie. Asked once, at set-up.
    fn window(&self) -> Window;

    /// Memory for the allocator's own data: two blocks at set-up, one or two for the first chunk, then one for each
    /// chunk, all of them of the layout that
    /// [`chunk_metadata_layout`](crate::PerCpuAllocator::chunk_metadata_layout) tells, so that a kernel can keep a few
    /// ready.
    ///
    /// # Errors
    /// [`BackingError::OutOfMetadata`], or [`BackingError::WouldSleep`] in atomic context.
    fn allocate_metadata(
        &self,
        layout: Layout,
        context: Context,
    ) -> Result<NonNull<u8>, BackingError>;

    /// Takes metadata back. Always in a context that may sleep.
    ///
    /// # Safety
    /// `block` came from [`allocate_metadata`](Self::allocate_metadata) of this backing with the same `layout`, and is
    /// not used any more.
    unsafe fn free_metadata(&self, block: NonNull<u8>, layout: Layout);

    /// Takes metadata back that was not used, in atomic context: the chunk that it was for could not be made. A backing that
    /// may have to sleep to free it keeps it for the next one.
    ///
    /// # Safety
    /// As [`free_metadata`](Self::free_metadata).
    unsafe fn free_metadata_atomic(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: the promise of the caller.
        unsafe { self.free_metadata(block, layout) };
    }

    /// Makes a chunk's address space ready, so that populating its pages later needs frames only, and never sleeps.
    /// Calls about different chunks may overlap.
    ///
    /// # Errors
    /// Any [`BackingError`]; then nothing is reserved.
    ///
    /// # Safety
    /// The chunk is not reserved.
    unsafe fn reserve(&self, space: ChunkSpace<'_>, context: Context) -> Result<(), BackingError>;

    /// Gives a chunk's address space back. Always in a context that may sleep.
    ///
    /// # Safety
    /// The chunk was reserved, none of its pages is populated, and nothing uses its addresses any more.
    unsafe fn release(&self, space: ChunkSpace<'_>);

    /// Gives all pages of the span memory on all of its CPUs, or none on any. With [`Cpus::One`] (a CPU is brought up) a
    /// page that has memory there already keeps it.
    ///
    /// Returns what the memory holds: [`Contents::Zeroed`] only if all of it is known to be zero; the allocator does not
    /// zero it again then.
    ///
    /// # Errors
    /// [`BackingError::OutOfFrames`]; then no page of the span has memory, but those that a CPU had before.
    ///
    /// # Safety
    /// The chunk is reserved. The pages are in nobody's use; but for [`Cpus::One`] none of them is populated.
    unsafe fn populate(
        &self,
        span: PageSpan<'_>,
        context: Context,
    ) -> Result<Contents, BackingError>;

    /// Takes the memory of the pages away on all CPUs of the span. A page that has none on some CPU is passed over.
    /// Always in a context that may sleep. One call is one batch: a kernel unmaps all of it, flushes the translations of
    /// all CPUs once, and only then frees the frames.
    ///
    /// # Safety
    /// The chunk is reserved, and nothing uses the memory any more.
    unsafe fn depopulate(&self, span: PageSpan<'_>);

    /// A CPU is to be brought up: the calls that follow may name it. Makes ready what they need besides frames, and gives
    /// its copy of the first chunk, `unit`, memory of its own where the builder gave it none. Always in a context that may
    /// sleep.
    ///
    /// Until [`finish_cpu`](Self::finish_cpu) others read at the CPU's addresses what they read before. So a backing that
    /// hides memory until then returns [`Contents::Zeroed`] when it populates: nobody else could zero it.
    ///
    /// # Errors
    /// Any [`BackingError`]; nothing has changed then.
    ///
    /// # Safety
    /// The CPU is not materialised, and no other has begun and is neither finished nor cancelled.
    unsafe fn begin_cpu(&self, unit: CpuArea) -> Result<(), BackingError> {
        let _ = unit;
        Ok(())
    }

    /// The CPU is up: all populated pages have memory on it, and what anybody reads or writes at its addresses from now on is
    /// that. Always in a context that may sleep.
    ///
    /// # Safety
    /// The CPU has begun, and is neither finished nor cancelled.
    unsafe fn finish_cpu(&self, unit: CpuArea) {
        let _ = unit;
    }

    /// The CPU is not brought up after all; its pages have been depopulated. Undoes [`begin_cpu`](Self::begin_cpu). Always in
    /// a context that may sleep.
    ///
    /// # Safety
    /// The CPU has begun, and is neither finished nor cancelled; none of its pages is populated, those of the first chunk
    /// aside, and no call names it any more.
    unsafe fn cancel_cpu(&self, unit: CpuArea) {
        let _ = unit;
    }

    /// The physical address behind `address` (real, not neutral), if the backing can tell.
    fn physical_address(&self, address: usize) -> Option<u64> {
        let _ = address;
        None
    }

    /// Whether memory comes to a page of its own accord with the first touch, zeroed: then a CPU is brought up without any
    /// call of the backing, and without a lock. The answer never changes.
    fn comes_with_touch(&self) -> bool {
        false
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

    unsafe fn free_metadata_atomic(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).free_metadata_atomic(block, layout) }
    }

    unsafe fn reserve(&self, space: ChunkSpace<'_>, context: Context) -> Result<(), BackingError> {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).reserve(space, context) }
    }

    unsafe fn release(&self, space: ChunkSpace<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).release(space) }
    }

    unsafe fn populate(
        &self,
        span: PageSpan<'_>,
        context: Context,
    ) -> Result<Contents, BackingError> {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).populate(span, context) }
    }

    unsafe fn depopulate(&self, span: PageSpan<'_>) {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).depopulate(span) }
    }

    unsafe fn begin_cpu(&self, unit: CpuArea) -> Result<(), BackingError> {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).begin_cpu(unit) }
    }

    unsafe fn finish_cpu(&self, unit: CpuArea) {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).finish_cpu(unit) }
    }

    unsafe fn cancel_cpu(&self, unit: CpuArea) {
        // SAFETY: the caller's promise, passed on.
        unsafe { (**self).cancel_cpu(unit) }
    }

    fn physical_address(&self, address: usize) -> Option<u64> {
        (**self).physical_address(address)
    }

    fn comes_with_touch(&self) -> bool {
        (**self).comes_with_touch()
    }

    fn relax(&self) {
        (**self).relax();
    }
}
