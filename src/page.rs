//! Builds the first chunk of single pages, mapped into one address window.
//!
//! For homes without large areas to spare, and for those whose areas lie too far apart for [`crate::embed`].
//!
//! ```text
//!   window   | unit 0: pages from CPU 0's node | tail | unit 1: pages from CPU 1's node | tail | ...
//! ```
//! The steps: reserve the window; map the pages of every CPU's unit, each from the CPU's node; copy the template
//! into every unit. Tails are address space only: no page is mapped there.
//!
//! What always holds: each step before the copy can fail, and whatever fails, no page stays mapped and no window
//! reserved. Pages are mapped in order of the units and unmapped in reverse.

use core::ptr::NonNull;

use crate::unit::{
    BuildError, Contents, CpuId, FirstChunk, FirstChunkKind, NodeId, Template, UnitId, UnitPlan,
    check_build, fill_unit, stride_span_bytes,
};

/// Pages and the address space to map them into.
///
/// # Safety
/// - A successful [`reserve_window`](Self::reserve_window) returns the page-aligned start of a window that nobody
///   else uses until it is released, and that doesn't wrap around the end of the address space.
/// - After a successful [`map_new_page`](Self::map_new_page) the page is writable, held by nobody else until it is
///   unmapped, and holds what [`contents`](Self::contents) promises.
/// - [`page_bytes`](Self::page_bytes), [`unit_stride_bytes`](Self::unit_stride_bytes) and
///   [`contents`](Self::contents) don't change.
/// - The pointer to the window may be used for all of it: its provenance covers it.
pub unsafe trait PageMemory {
    /// Why a window or a page can't be had.
    type Error;

    /// The size of a page.
    fn page_bytes(&self) -> usize;

    /// The distance from unit to unit, a whole number of pages.
    fn unit_stride_bytes(&self, unit_bytes: usize) -> usize {
        unit_bytes
    }

    /// What a fresh page holds.
    fn contents(&self) -> Contents;

    /// Reserves addresses, without memory.
    ///
    /// # Errors
    /// Whatever the memory reports; the builder passes it on.
    fn reserve_window(&mut self, bytes: usize) -> Result<NonNull<u8>, Self::Error>;

    /// Maps a fresh page, from `node` or from near it, at a page-aligned address in the window.
    ///
    /// # Errors
    /// Whatever the memory reports, and then nothing is mapped there; the builder takes everything back and
    /// passes it on.
    ///
    /// # Safety
    /// The address lies in a window of this memory, and no page is mapped there.
    unsafe fn map_new_page(
        &mut self,
        node: NodeId,
        address: NonNull<u8>,
    ) -> Result<(), Self::Error>;

    /// Unmaps a page and frees it.
    ///
    /// # Safety
    /// The page is mapped at that address, by this memory, and not used any more.
    unsafe fn unmap_page(&mut self, address: NonNull<u8>);

    /// Releases a window.
    ///
    /// # Safety
    /// It is a whole window of this memory, without any page mapped, and not used any more.
    unsafe fn release_window(&mut self, base: NonNull<u8>, bytes: usize);
}

/// Builds a first chunk of single pages from `memory`.
///
/// `unit_offsets` needs an entry per CPU id. The plan is one of [`UnitPlan::page`].
///
/// # Errors
/// [`BuildError`]; no page stays mapped and no window reserved.
///
/// ```
/// use core::ptr::NonNull;
/// use pcpu::page::{self, PageMemory};
/// use pcpu::unit::*;
///
/// /// A window whose pages are all there beforehand; it is never freed.
/// struct Heap;
///
/// // SAFETY: every window is a fresh, zeroed, page-aligned block.
/// unsafe impl PageMemory for Heap {
///     type Error = &'static str;
///     fn page_bytes(&self) -> usize {
///         4096
///     }
///     fn contents(&self) -> Contents {
///         Contents::Zeroed
///     }
///     fn reserve_window(&mut self, bytes: usize) -> Result<NonNull<u8>, &'static str> {
///         let layout = std::alloc::Layout::from_size_align(bytes, 4096).map_err(|_| "too large")?;
///         // SAFETY: a unit has at least a page, so the size isn't 0.
///         NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or("out of memory")
///     }
///     unsafe fn map_new_page(&mut self, _: NodeId, _: NonNull<u8>) -> Result<(), &'static str> {
///         Ok(())
///     }
///     unsafe fn unmap_page(&mut self, _: NonNull<u8>) {}
///     unsafe fn release_window(&mut self, _: NonNull<u8>, _: usize) {}
/// }
///
/// let spec = FirstChunkSpec { static_bytes: 1, ..Default::default() };
/// let (mut words, mut offsets) = ([0; storage_words(2)], [0; 2]);
/// let plan = UnitPlan::page(&spec, &EvenNodes::new(2, 2)?, &mut words)?;
/// let chunk = page::build(plan, Template { bytes: &[7], base: 0x1000 }, &mut offsets, &mut Heap)?;
///
/// let unit = chunk.unit_address(CpuId::new(1)).unwrap();
/// // SAFETY: CPU 1's unit is initialised and stays.
/// assert_eq!(unsafe { unit.read() }, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn build<'m, P: PageMemory + ?Sized>(
    plan: UnitPlan<'m>,
    template: Template<'_>,
    unit_offsets: &'m mut [usize],
    memory: &mut P,
) -> Result<FirstChunk<'m>, BuildError<P::Error>> {
    place(&plan, &template, unit_offsets, memory)?;
    Ok(FirstChunk::new(plan, template.base, unit_offsets))
}

pub(crate) fn place<P: PageMemory + ?Sized>(
    plan: &UnitPlan<'_>,
    template: &Template<'_>,
    unit_offsets: &mut [usize],
    memory: &mut P,
) -> Result<(), BuildError<P::Error>> {
    let unit_offsets = check_build(plan, FirstChunkKind::Page, template, unit_offsets)?;
    let page_bytes = plan.sizes().page_bytes();
    if memory.page_bytes() != page_bytes {
        return Err(BuildError::PageSize {
            memory_page_bytes: memory.page_bytes(),
            plan_page_bytes: page_bytes,
        });
    }
    let stride_bytes = memory.unit_stride_bytes(plan.sizes().unit_bytes());
    let window_bytes = stride_span_bytes(plan.sizes(), plan.nr_units(), stride_bytes)?;
    if !stride_bytes.is_multiple_of(page_bytes) {
        return Err(BuildError::StrideMisaligned {
            stride_bytes,
            page_bytes,
        });
    }
    let window = memory
        .reserve_window(window_bytes)
        .map_err(|error| BuildError::Window {
            window_bytes,
            error,
        })?;
    window.as_ptr().expose_provenance();
    let mut pages = Pages {
        plan,
        window,
        window_bytes,
        stride_bytes,
        memory,
    };
    pages.map()?;
    pages.fill(template);
    for (unit, cpu) in pages.units() {
        let address = pages.page(unit, 0).as_ptr().addr();
        unit_offsets[cpu.index()] = address.wrapping_sub(template.base);
    }
    Ok(())
}

/// The window while the chunk is built.
struct Pages<'a, 'm, P: ?Sized> {
    plan: &'a UnitPlan<'m>,
    window: NonNull<u8>,
    window_bytes: usize,
    stride_bytes: usize,
    memory: &'a mut P,
}

impl<'m, P: PageMemory + ?Sized> Pages<'_, 'm, P> {
    /// All pages, or none and no window.
    fn map(&mut self) -> Result<(), BuildError<P::Error>> {
        let pages_per_unit = self.plan.sizes().populated_pages();
        for (unit, cpu) in self.units() {
            let node = self.plan.node_of_cpu(cpu).unwrap_or(NodeId::new(0));
            for page in 0..pages_per_unit {
                let address = self.page(unit, page);
                // SAFETY: the page lies in the window, and each is mapped once.
                if let Err(error) = unsafe { self.memory.map_new_page(node, address) } {
                    self.roll_back(unit.index() * pages_per_unit + page);
                    return Err(BuildError::Page { cpu, page, error });
                }
            }
        }
        Ok(())
    }

    fn fill(&mut self, template: &Template<'_>) {
        let contents = self.memory.contents();
        for (unit, _) in self.units() {
            // SAFETY: all pages of the unit's regions are mapped, for this chunk alone, in a window that holds
            // nothing else, hence not the template; the memory promises their contents.
            unsafe {
                fill_unit(
                    self.page(unit, 0).as_ptr(),
                    template.bytes,
                    self.plan.sizes(),
                    contents,
                )
            };
        }
    }

    /// Unmaps the pages that were mapped, the last first, and releases the window.
    fn roll_back(&mut self, mapped_pages: usize) {
        let pages_per_unit = self.plan.sizes().populated_pages();
        for index in (0..mapped_pages).rev() {
            let unit = UnitId::new((index / pages_per_unit) as u32);
            // SAFETY: so many pages were mapped, in this order, and none of them was used yet.
            unsafe {
                self.memory
                    .unmap_page(self.page(unit, index % pages_per_unit))
            };
        }
        // SAFETY: no page is mapped any more, and nobody has been told of the window.
        unsafe { self.memory.release_window(self.window, self.window_bytes) };
    }

    /// The units with their CPUs. One unit per allocation and one group: there is no unused unit.
    fn units(&self) -> impl Iterator<Item = (UnitId, CpuId)> + use<'m, P> {
        let plan = *self.plan;
        (0..plan.nr_units())
            .map(UnitId::new)
            .filter_map(move |unit| Some((unit, plan.cpu_of_unit(unit)?)))
    }

    fn page(&self, unit: UnitId, page: usize) -> NonNull<u8> {
        let offset = unit.index() * self.stride_bytes + page * self.plan.sizes().page_bytes();
        // SAFETY: unit and page are of this plan, whose window has room for them.
        unsafe { self.window.add(offset) }
    }
}
