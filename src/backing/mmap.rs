//! The backing for a Linux process: one address range, pages that come with their first touch and go back to the
//! system when they run empty.
//!
//! The window of neutral addresses lies in the same range, without access, so that a handle never equals a real
//! pointer. Chunk `i` lies `i` units further in every unit's window; `open_chunks.rs` knows how far these can be used. CPUs
//! that never run the process cost address space only. On a machine with several nodes each unit's memory is preferred from
//! its CPU's node.
//!
//! Units need not begin at pages ([`Geometry`]): what is asked of the system is about whole pages all the same. Pages
//! that are shared are seen to in `shared_pages.rs`; no two units share one.

use std::alloc::{GlobalAlloc, System};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};

use core::alloc::Layout;

use super::address_range::{Access, AddressRange};
use super::{Backing, BackingError, ChunkSpace, Context, CpuArea, PageSpan, Window};
use crate::cpus::Cpus;
use crate::embed::{AreaRequest, EarlyMemory};
use crate::page::PageMemory;
use crate::unit::{Contents, FirstChunk, NodeId, UnitPlan};
use open_chunks::OpenChunks;
use shared_pages::{Neighbours, SharedPages, Use};

mod geometry;
mod numbers;
mod open_chunks;
mod shared_pages;
mod template_image;
mod whole_pages;

pub use geometry::Geometry;

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
/// use pcpu::backing::mmap::{Geometry, Mmap, Placement};
/// use pcpu::embed;
/// use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, Template, UnitPlan, storage_words};
///
/// let (mut words, mut offsets) = ([0; storage_words(2)], [0; 2]);
/// let spec = FirstChunkSpec { atom_bytes: 4096, dyn_bytes: 20 << 10, ..FirstChunkSpec::default() };
/// let plan = UnitPlan::embed(&spec, &EvenNodes::new(2, 1)?, &mut words)?;
/// let mut memory = Mmap::reserve(&plan, Geometry::lines(16 << 20), Placement::Any)?;
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
    open: OpenChunks,
    /// `None` if all units begin at pages.
    shared: Option<SharedPages>,
}

impl Mmap {
    /// Reserves address space for every unit of `plan`: windows as `geometry` has them, which hold as many chunks as fit,
    /// the first included.
    ///
    /// # Errors
    /// What the system says if the process may not have that much address space; that it is too little for one chunk,
    /// that the window is no multiple of the area alignment of the plan, or that the plan has several groups, whose areas
    /// need that alignment, and the stride is no multiple of it.
    pub fn reserve(
        plan: &UnitPlan<'_>,
        geometry: Geometry,
        placement: Placement,
    ) -> io::Result<Self> {
        let sizes = plan.sizes();
        let align_bytes = sizes.area_align_bytes();
        let chunks = geometry.window_bytes() / sizes.unit_bytes();
        let is_aligned = geometry.window_bytes().is_multiple_of(align_bytes)
            && (plan.nr_groups() == 1 || geometry.stride_bytes().is_multiple_of(align_bytes));
        if chunks == 0 || !is_aligned {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let shares_pages = !geometry
            .stride_bytes()
            .is_multiple_of(rustix::param::page_size());
        Ok(Self {
            range: AddressRange::reserve(plan.nr_units() as usize, geometry, align_bytes)?,
            page_bytes: sizes.page_bytes(),
            unit_bytes: sizes.unit_bytes(),
            chunks: u32::try_from(chunks).unwrap_or(u32::MAX),
            placement,
            open: OpenChunks::new(chunks, sizes.unit_bytes()),
            shared: shares_pages
                .then(|| SharedPages::new(chunks, sizes.unit_pages(), sizes.populated_pages())),
        })
    }

    /// Prefers, for the first chunk, the node of each CPU; the builder knows the nodes of groups only.
    pub(crate) fn place_first_chunk(&self, first_chunk: &FirstChunk<'_>) {
        let plan = first_chunk.plan();
        for cpu in plan.possible_cpus() {
            if let (Some(unit), Some(node)) = (first_chunk.unit_address(cpu), plan.node_of_cpu(cpu))
            {
                self.prefer_node(unit.as_ptr().addr(), self.open_bytes(), node);
            }
        }
    }

    /// How far apart the units lie.
    pub fn geometry(&self) -> Geometry {
        self.range.geometry()
    }

    /// The neutral address of the first chunk: where to build it.
    pub fn neutral_base(&self) -> usize {
        self.range.neutral_base()
    }

    /// Makes the next `units` units usable: their part of the first chunk, and of some chunks behind it, which takes no more
    /// calls; or of the first chunk only, if the system does not grant as much.
    fn open_units(&mut self, units: usize) -> io::Result<NonNull<u8>> {
        let base = self
            .range
            .take_units(units)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let first = base.as_ptr().addr();
        let stride_bytes = self.range.stride_bytes();
        let each = (0..units).map(|unit| first + unit * stride_bytes);
        let open_to = |end: usize| {
            let mut each = each.clone();
            let open = |unit: usize| self.open(unit..unit + end * self.unit_bytes);
            // The unit that could not be opened, if one could not.
            each.try_for_each(|unit| open(unit).map_err(|error| (unit, error)))
        };
        let ample = self.open.at_set_up();
        let end = match open_to(ample) {
            Ok(()) => ample,
            Err((failed, _)) => {
                // The others have no memory, nor access to it.
                for unit in each.clone().take_while(|&unit| unit < failed) {
                    let end = unit + ample * self.unit_bytes;
                    self.close_behind(unit + self.unit_bytes..end);
                }
                open_to(1).map_err(|(_, error)| error)?;
                1
            }
        };
        let is_first = first == self.neutral_base() + self.range.geometry().window_bytes();
        let mut open = self.open.lock();
        let end = if is_first { end } else { end.min(open.end()) };
        open.set_end(end);
        drop(open);
        Ok(base)
    }

    /// What is open of every unit, in bytes.
    fn open_bytes(&self) -> usize {
        self.open.lock().end() * self.unit_bytes
    }

    /// Makes addresses usable; what shares a page with them becomes so, too.
    fn open(&self, addresses: Range<usize>) -> io::Result<()> {
        let Range { start, end } = whole_pages::around(addresses);
        // SAFETY: the pages lie in the range; to be able to use them harms nobody.
        unsafe { self.range.set_access(start, end - start, Access::ReadWrite) }
    }

    /// Takes memory and access away from whole pages.
    fn close(&self, Range { start, end }: Range<usize>) {
        // SAFETY: callers own the pages and do not use them any more.
        unsafe {
            self.range.discard(start, end - start);
            // Without access a stray touch is a fault; where that cannot be had, it reads zero.
            let _ = self.range.set_access(start, end - start, Access::None);
        }
    }

    /// Makes some chunks usable in all units, or none of them in any.
    fn open_chunks(&self, space: &ChunkSpace<'_>, chunks: Range<usize>) -> io::Result<()> {
        for area in self.chunks_of_units(space, &chunks) {
            if let Err(error) = self.open(area.addresses()) {
                self.chunks_of_units(space, &chunks)
                    .take_while(|done| done.cpu != area.cpu)
                    .for_each(|done| self.close_behind(done.addresses()));
                return Err(error);
            }
        }
        for area in self.chunks_of_units(space, &chunks) {
            self.prefer_node(area.address, area.bytes, area.node);
        }
        Ok(())
    }

    /// Closes a part of a unit behind which nothing is open.
    fn close_behind(&self, part: Range<usize>) {
        let neighbours = Neighbours {
            before: Use::Used,
            behind: Use::Unused,
        };
        self.close(whole_pages::beside(part, neighbours));
    }

    /// Where some chunks lie in every unit, given where one does.
    fn chunks_of_units<'a>(
        &self,
        space: &ChunkSpace<'a>,
        chunks: &Range<usize>,
    ) -> impl Iterator<Item = CpuArea> + use<'a> {
        let bytes = |chunks: usize| chunks * self.unit_bytes;
        let (own, first, bytes) = (
            bytes(space.chunk() as usize),
            bytes(chunks.start),
            bytes(chunks.len()),
        );
        space.areas().map(move |area| CpuArea {
            address: area.address - own + first,
            bytes,
            ..area
        })
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
            let Range { start, end } = whole_pages::around(address..address + bytes);
            // SAFETY: the call reads the mask only, and sets where future pages come from. Placement is a
            // preference: if the system refuses it, pages come from elsewhere.
            unsafe {
                libc::syscall(
                    libc::SYS_mbind,
                    start,
                    end - start,
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
                self.open_bytes(),
                request.node,
            );
        }
        Ok(base)
    }

    unsafe fn share_template(
        &mut self,
        area: NonNull<u8>,
        request: AreaRequest,
        template: &[u8],
    ) -> bool {
        let units = (0..request.nr_units as usize)
            .map(|unit| area.as_ptr().addr() + unit * request.stride_bytes);
        // SAFETY: the units have just been opened, and are not used yet (promise of the caller).
        let mapped = unsafe { template_image::map(&self.range, &units, template) };
        // A new mapping prefers no node.
        units.for_each(|unit| self.prefer_node(unit, template.len(), request.node));
        mapped.is_ok()
    }

    unsafe fn free(&mut self, start: NonNull<u8>, bytes: usize) {
        let start = start.as_ptr().addr();
        let first = self.neutral_base() + self.range.geometry().window_bytes();
        if !(start - first).is_multiple_of(self.range.stride_bytes()) {
            // The tail of a unit: nobody has touched it, so it has no memory, and what lies behind it stays open.
            return;
        }
        // Behind the unit nothing is reserved yet.
        let neighbours = Neighbours {
            before: Use::Unused,
            behind: Use::Unused,
        };
        let end = start + bytes.max(self.open_bytes());
        self.close(whole_pages::beside(start..end, neighbours));
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
        // A builder that failed before has given all its windows back, and closed them.
        self.range.return_units();
        self.open.lock().set_end(1);
        let units = bytes.div_ceil(self.range.stride_bytes());
        self.range
            .take_units(units)
            .ok_or(io::ErrorKind::OutOfMemory.into())
    }

    unsafe fn map_new_page(&mut self, node: NodeId, address: NonNull<u8>) -> io::Result<()> {
        let address = address.as_ptr().addr();
        self.open(address..address + self.page_bytes)?;
        self.prefer_node(address, self.page_bytes, node);
        Ok(())
    }

    unsafe fn unmap_page(&mut self, address: NonNull<u8>) {
        // The builder wants whole pages: they share nothing.
        let address = address.as_ptr().addr();
        self.close(address..address + self.page_bytes);
    }

    unsafe fn release_window(&mut self, _base: NonNull<u8>, _bytes: usize) {
        self.range.return_units();
    }
}

// SAFETY: a chunk's units are accessible from `reserve` to `release`, lie in this range, and are nobody else's; pages
// are zero at first touch and after they were given back, for what does not go back is made zero (`shared_pages`). Metadata comes from the system's allocator.
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
        let chunk = space.chunk() as usize;
        let mut open = self.open.lock();
        if !open.is_open(chunk) {
            let opened = self.open.wider(&open, chunk).into_iter().find(|&end| {
                let chunks = open.end()..end;
                self.open_chunks(&space, chunks).is_ok()
            });
            open.set_end(opened.ok_or(BackingError::OutOfAddressSpace)?);
        }
        open.note_reserved(chunk);
        Ok(())
    }

    unsafe fn release(&self, space: ChunkSpace<'_>) {
        let mut open = self.open.lock();
        open.note_released(space.chunk() as usize);
        // None of its pages is populated, but reading the copies of a CPU that never came may have taken memory.
        for area in space.areas() {
            let pages = whole_pages::within(area.addresses());
            // SAFETY: nothing uses the pages (promise of the caller), and they are shared with no others.
            unsafe { self.range.discard(pages.start, pages.len()) };
        }
        let end = self.open.narrower(&open);
        if end < open.end() {
            self.chunks_of_units(&space, &(end..open.end()))
                .for_each(|part| self.close_behind(part.addresses()));
            open.set_end(end);
        }
    }

    unsafe fn populate(
        &self,
        span: PageSpan<'_>,
        _context: Context,
    ) -> Result<Contents, BackingError> {
        // The first touch brings the memory, zeroed.
        if let Some(shared) = &self.shared {
            let mut with_memory = shared.with_memory();
            for run in span.runs() {
                with_memory.insert(shared.in_window(span.chunk(), run));
            }
        }
        Ok(Contents::Zeroed)
    }

    unsafe fn depopulate(&self, span: PageSpan<'_>) {
        for run in span.runs() {
            let Some(shared) = &self.shared else {
                for area in span.areas_of(&run) {
                    let pages = whole_pages::within(area.addresses());
                    // SAFETY: nothing uses the pages any more (promise of the caller); they are shared with no others.
                    unsafe { self.range.discard(pages.start, pages.len()) };
                }
                continue;
            };
            let mut with_memory = shared.with_memory();
            let pages = shared.in_window(span.chunk(), run.clone());
            let neighbours = with_memory.neighbours(&pages);
            for area in span.areas_of(&run) {
                // SAFETY: as above; no page gets memory or loses it as long as the note is locked.
                unsafe { self.give_back(area.addresses(), neighbours) };
            }
            // One CPU's copies go when bringing it up has failed: the others keep theirs.
            if let Cpus::Set(_) = span.cpus() {
                with_memory.remove(pages);
            }
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
    /// Gives back the pages of a part of a unit; those that it shares with what has memory stay, and what it has of them is
    /// made zero.
    ///
    /// # Safety
    /// Nothing uses that part of the unit any more. What lies beside it stays as it is meanwhile: with memory or without.
    unsafe fn give_back(&self, part: Range<usize>, neighbours: Neighbours) {
        let pages = whole_pages::beside(part.clone(), neighbours);
        if !pages.is_empty() {
            // SAFETY: nothing in use has a part of these pages (promise of the caller).
            unsafe { self.range.discard(pages.start, pages.len()) };
        }
        for edge in [part.start..pages.start, pages.end..part.end] {
            // SAFETY: the bytes, if there are any, are those of the part, which nothing uses, and readable and writable.
            unsafe { make_zero(edge) };
        }
    }
}

impl CpuArea {
    fn addresses(&self) -> Range<usize> {
        self.address..self.address + self.bytes
    }
}

/// Makes bytes zero; memory that is zero, and maybe has never been touched, is only read.
///
/// # Safety
/// They are readable and writable, and nobody else uses them.
unsafe fn make_zero(bytes: Range<usize>) {
    const LINE_BYTES: usize = 64;
    if bytes.is_empty() {
        return;
    }
    let start = ptr::with_exposed_provenance_mut::<u8>(bytes.start);
    // SAFETY: the promise of the caller.
    let bytes = unsafe { core::slice::from_raw_parts_mut(start, bytes.len()) };
    // Whole lines are looked at without a branch for each byte.
    let is_zero = |line: &[u8]| line.iter().fold(0, |all, byte| all | byte) == 0;
    if !bytes.chunks(LINE_BYTES).all(is_zero) {
        bytes.fill(0);
    }
}

#[cfg(test)]
mod tests;
