//! The backing for a Linux process: one address range, pages that come with their first touch and go back to the
//! system when they run empty.
//!
//! The window of neutral addresses lies in the same range, without access, so that a handle never equals a real
//! pointer. Chunk `i` lies `i` units further in every unit's window. CPUs that never run the process cost address
//! space only. On a machine with several nodes each unit's memory is preferred from its CPU's node.

use std::alloc::{GlobalAlloc, System};
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use core::alloc::Layout;

use super::address_range::{Access, AddressRange};
use super::{Backing, BackingError, ChunkSpace, Context, CpuArea, PageSpan, Window};
use crate::embed::{AreaRequest, EarlyMemory};
use crate::page::PageMemory;
use crate::unit::{Contents, FirstChunk, NodeId, UnitPlan};

/// Whether memory is asked from particular nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Placement {
    /// Wherever the system takes it from.
    Any,
    /// Preferably from each CPU's node.
    NodeLocal,
}

/// Memory of a Linux process. First the memory that a builder makes the first chunk in, then the backing of the
/// instance.
///
/// ```
/// use pcpu::allocator::{PerCpuAllocator, Policy};
/// use pcpu::backing::mmap::{Mmap, Placement};
/// use pcpu::embed;
/// use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, Template, UnitPlan, storage_words};
///
/// let (mut words, mut offsets) = ([0; storage_words(2)], [0; 2]);
/// let spec = FirstChunkSpec { atom_bytes: 4096, dyn_bytes: 20 << 10, ..FirstChunkSpec::default() };
/// let plan = UnitPlan::embed(&spec, &EvenNodes::new(2, 1)?, &mut words)?;
/// let mut memory = Mmap::reserve(&plan, 16 << 20, Placement::Any)?;
/// let template = Template { bytes: &[], base: memory.neutral_base() };
/// let first_chunk = embed::build(plan, template, &mut offsets, &mut memory)?;
/// // SAFETY: the first chunk lies in `memory`, which the instance takes over.
/// let pcpu = unsafe {
///     PerCpuAllocator::<_, parking_lot::RawMutex>::new(memory, &first_chunk, Policy::default())?
/// };
/// pcpu.bring_up(CpuId::new(0))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Mmap {
    range: AddressRange,
    page_bytes: usize,
    unit_bytes: usize,
    chunks: u32,
    placement: Placement,
}

impl Mmap {
    /// Reserves address space for every unit of `plan`: windows that are `stride_bytes` apart and hold as many chunks as
    /// fit, the first included.
    ///
    /// # Errors
    /// What the system says if the process may not have that much address space; that it is too little for one chunk, or
    /// that the stride is no multiple of the area alignment of the plan.
    pub fn reserve(
        plan: &UnitPlan<'_>,
        stride_bytes: usize,
        placement: Placement,
    ) -> io::Result<Self> {
        let sizes = plan.sizes();
        let align_bytes = sizes.area_align_bytes();
        let chunks = u32::try_from(stride_bytes / sizes.unit_bytes()).unwrap_or(u32::MAX);
        if chunks == 0 || !stride_bytes.is_multiple_of(align_bytes) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self {
            range: AddressRange::reserve(plan.nr_units() as usize, stride_bytes, align_bytes)?,
            page_bytes: sizes.page_bytes(),
            unit_bytes: sizes.unit_bytes(),
            chunks,
            placement,
        })
    }

    /// Prefers, for the first chunk, the node of each CPU; the builder knows the nodes of groups only.
    pub(crate) fn place_first_chunk(&self, first_chunk: &FirstChunk<'_>) {
        let plan = first_chunk.plan();
        for cpu in plan.possible_cpus() {
            if let (Some(unit), Some(node)) = (first_chunk.unit_address(cpu), plan.node_of_cpu(cpu))
            {
                self.prefer_node(unit.as_ptr().addr(), self.unit_bytes, node);
            }
        }
    }

    /// The neutral address of the first chunk: where to build it.
    pub fn neutral_base(&self) -> usize {
        self.range.neutral_base()
    }

    /// Makes units `units` of the range usable for the first chunk.
    fn open_units(&mut self, units: usize) -> io::Result<NonNull<u8>> {
        let base = self
            .range
            .take_units(units)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        for unit in 0..units {
            let address = base.as_ptr().addr() + unit * self.range.stride_bytes();
            // SAFETY: the window has just been taken and holds nothing.
            unsafe {
                self.range
                    .set_access(address, self.unit_bytes, Access::ReadWrite)?
            };
        }
        Ok(base)
    }

    fn close(&self, address: usize, bytes: usize) {
        // SAFETY: callers own the part and do not use it any more.
        unsafe {
            self.range.discard(address, bytes);
            // Without access a stray touch is a fault; where that cannot be had, it reads zero.
            let _ = self.range.set_access(address, bytes, Access::None);
        }
    }

    fn prefer_node(&self, address: usize, bytes: usize, node: NodeId) {
        const MPOL_PREFERRED: libc::c_ulong = 1;
        let mask: [libc::c_ulong; 16] = core::array::from_fn(|word| {
            if word == node.index() / 64 {
                1 << (node.index() % 64)
            } else {
                0
            }
        });
        if self.placement == Placement::NodeLocal {
            // SAFETY: the call reads the mask only, and sets where future pages come from. Placement is a
            // preference: if the system refuses it, pages come from elsewhere.
            unsafe {
                libc::syscall(
                    libc::SYS_mbind,
                    address,
                    bytes,
                    MPOL_PREFERRED,
                    mask.as_ptr(),
                    16 * 64 + 1,
                    0,
                );
            }
        }
    }
}

// SAFETY: unit windows are handed out once, are writable, ours, and zero: nothing has touched them.
unsafe impl EarlyMemory for Mmap {
    type Error = io::Error;

    fn unit_stride_bytes(&self, _unit_bytes: usize) -> usize {
        self.range.stride_bytes()
    }

    fn contents(&self) -> Contents {
        Contents::Zeroed
    }

    fn vm_space_bytes(&self) -> usize {
        1 << 47
    }

    fn alloc_area(&mut self, request: AreaRequest) -> io::Result<NonNull<u8>> {
        let base = self.open_units(request.nr_units as usize)?;
        for unit in 0..request.nr_units as usize {
            self.prefer_node(
                base.as_ptr().addr() + unit * request.stride_bytes,
                self.unit_bytes,
                request.node,
            );
        }
        Ok(base)
    }

    unsafe fn free(&mut self, start: NonNull<u8>, bytes: usize) {
        self.close(start.as_ptr().addr(), bytes);
    }
}

// SAFETY: as for `EarlyMemory`; a page is accessible from `map_new_page` to `unmap_page`.
unsafe impl PageMemory for Mmap {
    type Error = io::Error;

    fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    fn unit_stride_bytes(&self, _unit_bytes: usize) -> usize {
        self.range.stride_bytes()
    }

    fn contents(&self) -> Contents {
        Contents::Zeroed
    }

    fn reserve_window(&mut self, bytes: usize) -> io::Result<NonNull<u8>> {
        // A builder that failed before has given all its windows back.
        self.range.return_units();
        let units = bytes.div_ceil(self.range.stride_bytes());
        self.range
            .take_units(units)
            .ok_or(io::ErrorKind::OutOfMemory.into())
    }

    unsafe fn map_new_page(&mut self, node: NodeId, address: NonNull<u8>) -> io::Result<()> {
        let address = address.as_ptr().addr();
        // SAFETY: the page lies in a window that was taken, and holds nothing yet.
        unsafe {
            self.range
                .set_access(address, self.page_bytes, Access::ReadWrite)?
        };
        self.prefer_node(address, self.page_bytes, node);
        Ok(())
    }

    unsafe fn unmap_page(&mut self, address: NonNull<u8>) {
        self.close(address.as_ptr().addr(), self.page_bytes);
    }

    unsafe fn release_window(&mut self, _base: NonNull<u8>, _bytes: usize) {
        self.range.return_units();
    }
}

// SAFETY: a chunk's units are accessible from `reserve` to `release`, lie in this range, and are nobody else's; pages
// are zero at first touch and after they were given back. Metadata comes from the system's allocator.
unsafe impl Backing for Mmap {
    fn window(&self) -> Window {
        Window {
            base: self.neutral_base(),
            pitch_bytes: self.unit_bytes,
            chunks: self.chunks,
        }
    }

    fn allocate_metadata(
        &self,
        layout: Layout,
        _context: Context,
    ) -> Result<NonNull<u8>, BackingError> {
        // SAFETY: the allocator asks for blocks of a size above zero only.
        NonNull::new(unsafe { System.alloc(layout) }).ok_or(BackingError::OutOfMetadata)
    }

    unsafe fn free_metadata(&self, block: NonNull<u8>, layout: Layout) {
        // SAFETY: allocated above with this layout (promise of the caller).
        unsafe { System.dealloc(block.as_ptr(), layout) };
    }

    unsafe fn reserve(&self, space: ChunkSpace<'_>, _context: Context) -> Result<(), BackingError> {
        for area in space.areas() {
            // SAFETY: the chunk's part of the range is not in use.
            let opened = unsafe {
                self.range
                    .set_access(area.address, area.bytes, Access::ReadWrite)
            };
            if opened.is_err() {
                space
                    .areas()
                    .take_while(|done| done.cpu != area.cpu)
                    .for_each(|done| self.close_area(done));
                return Err(BackingError::OutOfAddressSpace);
            }
            self.prefer_node(area.address, area.bytes, area.node);
        }
        Ok(())
    }

    unsafe fn release(&self, space: ChunkSpace<'_>) {
        space.areas().for_each(|area| self.close_area(area));
    }

    unsafe fn populate(
        &self,
        _span: PageSpan<'_>,
        _context: Context,
    ) -> Result<Contents, BackingError> {
        // The first touch brings the memory, zeroed.
        Ok(Contents::Zeroed)
    }

    unsafe fn depopulate(&self, span: PageSpan<'_>) {
        for area in span.areas() {
            // SAFETY: nothing uses the pages any more (promise of the caller).
            unsafe { self.range.discard(area.address, area.bytes) };
        }
    }

    fn physical_address(&self, address: usize) -> Option<u64> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let system_page_bytes = rustix::param::page_size();
        let mut entry = [0; 8];
        // Without the privilege the system hides the frame number: it reads as zero.
        let pagemap = std::fs::File::open("/proc/self/pagemap").ok()?;
        pagemap
            .read_exact_at(&mut entry, (address / system_page_bytes * 8) as u64)
            .ok()?;
        let entry = u64::from_le_bytes(entry);
        let frame = (entry & FRAME) * system_page_bytes as u64;
        (entry & PRESENT != 0 && frame != 0).then(|| frame + (address % system_page_bytes) as u64)
    }

    fn comes_with_touch(&self) -> bool {
        true
    }

    fn relax(&self) {
        std::thread::yield_now();
    }
}

impl Mmap {
    fn close_area(&self, area: CpuArea) {
        self.close(area.address, area.bytes);
    }
}
