//! Builds the first chunk in areas of early memory: one area per group, near its node.
//!
//! ```text
//!   area of group 0, from node 0                    area of group 1, from node 1
//!   | unit 0 tail | unit 1 tail | unused |  ......  | unit 3 tail | unit 4 tail | unused |
//!            \____ given back ____/  \__/
//! ```
//! The steps: get all areas; refuse them when they lie too far apart, because later chunks repeat their distances
//! in a space that must be large enough; copy the template into every used unit; give back what no CPU needs.
//!
//! What always holds: only getting an area can fail, and whatever fails, nothing stays allocated. Bytes kept plus
//! bytes given back are bytes allocated. While areas are still being gathered, the offset of a group's lowest
//! CPU is the address of the group's area: that is the only record of it, and the roll-back reads it.

use core::ptr::{self, NonNull};

use crate::page::{self, PageMemory};
use crate::unit::{
    BuildError, Contents, FirstChunk, FirstChunkKind, FirstChunkSpec, Group, NodeId, Shape,
    Storage, Template, Topology, UnitId, UnitPlan, check_build, fill_unit, stride_span_bytes,
};

/// An area that a group's units go into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AreaRequest {
    /// The index of the group.
    pub group: u32,
    /// The node to take it from, or from near it.
    pub node: NodeId,
    /// The number of units.
    pub nr_units: u32,
    /// The size of a unit, a whole number of pages.
    pub unit_bytes: usize,
    /// The distance from unit to unit, as the memory has it.
    pub stride_bytes: usize,
    /// The alignment of the area, a power of two of at least a page.
    pub align_bytes: usize,
}

/// Early memory: what there is before any allocator of pages works.
///
/// # Safety
/// - A successful [`alloc_area`](Self::alloc_area) returns an address of the alignment asked for. From it on
///   there are the units, `unit_bytes` bytes each and `stride_bytes` from one to the next, all of them writable,
///   held by nobody else until [`free`](Self::free) gets them, with the contents that
///   [`contents`](Self::contents) promises. The area does not wrap around the end of the address space.
/// - [`unit_stride_bytes`](Self::unit_stride_bytes) and [`contents`](Self::contents) don't change.
/// - The pointer may be used for the whole area: its provenance covers it.
pub unsafe trait EarlyMemory {
    /// Why an area can't be had.
    type Error;

    /// The distance from unit to unit. Kernels put them side by side; a process may want windows that are
    /// larger than a unit, or not congruent in the CPU's caches.
    fn unit_stride_bytes(&self, unit_bytes: usize) -> usize {
        unit_bytes
    }

    /// What the units of a fresh area hold.
    fn contents(&self) -> Contents;

    /// The size of the address space in which later chunks are reserved.
    fn vm_space_bytes(&self) -> usize;

    /// Allocates an area for a group.
    ///
    /// # Errors
    /// Whatever the memory reports; the builder then gives everything back and passes it on.
    fn alloc_area(&mut self, request: AreaRequest) -> Result<NonNull<u8>, Self::Error>;

    /// Gives all units of an area their initial values at once, where there is a way to do so without touching the memory
    /// of each: a process maps one image into all of them, so that CPUs that never come take no memory. False if there is
    /// none, as by default: the template is copied into every unit then, whatever they hold.
    ///
    /// After a true answer each unit holds the template, followed by zeroes.
    ///
    /// # Safety
    /// The area was returned for this request, and nothing has been done with it yet. The template is no longer than a unit.
    unsafe fn share_template(
        &mut self,
        area: NonNull<u8>,
        request: AreaRequest,
        template: &[u8],
    ) -> bool {
        let _ = (area, request, template);
        false
    }

    /// Takes back a part of an area: whole pages of one unit, or units side by side. What lies between units
    /// whose stride is larger than they are is never passed.
    ///
    /// # Safety
    /// The bytes are part of an area of this memory, were not freed before, and are not used any more.
    unsafe fn free(&mut self, start: NonNull<u8>, bytes: usize);
}

/// Builds a first chunk in areas from `memory`.
///
/// `unit_offsets` needs an entry per CPU id. The plan is one of [`UnitPlan::embed`] or [`UnitPlan::exact`].
///
/// # Errors
/// [`BuildError`]; nothing stays allocated. After [`BuildError::Area`] and [`BuildError::TooFarApart`] a first
/// chunk of single pages may still succeed: see [`build_or_page`].
///
/// ```
/// use core::ptr::NonNull;
/// use pcpu::embed::{self, AreaRequest, EarlyMemory};
/// use pcpu::unit::*;
///
/// /// Memory of the process; what is given back to it stays unused.
/// struct Heap;
///
/// // SAFETY: every area is a fresh, zeroed, aligned block that is never freed.
/// unsafe impl EarlyMemory for Heap {
///     type Error = &'static str;
///     fn contents(&self) -> Contents {
///         Contents::Zeroed
///     }
///     fn vm_space_bytes(&self) -> usize {
///         1 << 47
///     }
///     fn alloc_area(&mut self, request: AreaRequest) -> Result<NonNull<u8>, &'static str> {
///         let bytes = request.nr_units as usize * request.stride_bytes;
///         let layout = std::alloc::Layout::from_size_align(bytes, request.align_bytes).map_err(|_| "too large")?;
///         // SAFETY: a unit has at least a page, so the size isn't 0.
///         NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or("out of memory")
///     }
///     unsafe fn free(&mut self, _: NonNull<u8>, _: usize) {}
/// }
///
/// let spec = FirstChunkSpec { static_bytes: 4, ..Default::default() };
/// let (mut words, mut offsets) = ([0; storage_words(2)], [0; 2]);
/// let plan = UnitPlan::embed(&spec, &EvenNodes::new(2, 1)?, &mut words)?;
/// let template = Template { bytes: &7_u32.to_ne_bytes(), base: 0x1000 };
/// let chunk = embed::build(plan, template, &mut offsets, &mut Heap)?;
///
/// // The variable at the neutral address 0x1000, on CPU 1.
/// let address = 0x1000_usize.wrapping_add(chunk.unit_offsets()[1]);
/// // SAFETY: the address is in CPU 1's unit, which is initialised, aligned and stays.
/// assert_eq!(unsafe { *core::ptr::with_exposed_provenance::<u32>(address) }, 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn build<'m, M: EarlyMemory + ?Sized>(
    plan: UnitPlan<'m>,
    template: Template<'_>,
    unit_offsets: &'m mut [usize],
    memory: &mut M,
) -> Result<FirstChunk<'m>, BuildError<M::Error>> {
    place(&plan, &template, unit_offsets, memory)?;
    Ok(FirstChunk::new(plan, template.base, unit_offsets))
}

/// Builds a first chunk in areas from `early`, or, if that fails, of single pages from `pages`. Why it failed is
/// told to `on_fall_back` first: a kernel will want to log it.
///
/// Unlike two calls it needs the storage only once, so the storage may be static.
///
/// # Errors
/// [`BuildError::Layout`] if the sizes, the topology or the storage make no plan; else the [`BuildError`] of the
/// build with single pages. Nothing stays allocated.
///
/// ```
/// use core::ptr::NonNull;
/// use pcpu::embed::{AreaRequest, EarlyMemory, build_or_page};
/// use pcpu::page::PageMemory;
/// use pcpu::unit::*;
///
/// /// A machine whose memory is all gone.
/// struct Nothing;
///
/// // SAFETY: it never succeeds, so it promises nothing.
/// unsafe impl EarlyMemory for Nothing {
///     type Error = &'static str;
///     fn contents(&self) -> Contents {
///         Contents::Dirty
///     }
///     fn vm_space_bytes(&self) -> usize {
///         1 << 45
///     }
///     fn alloc_area(&mut self, _: AreaRequest) -> Result<NonNull<u8>, &'static str> {
///         Err("no large area")
///     }
///     unsafe fn free(&mut self, _: NonNull<u8>, _: usize) {}
/// }
///
/// // SAFETY: as above.
/// unsafe impl PageMemory for Nothing {
///     type Error = &'static str;
///     fn page_bytes(&self) -> usize {
///         4096
///     }
///     fn contents(&self) -> Contents {
///         Contents::Dirty
///     }
///     fn reserve_window(&mut self, _: usize) -> Result<NonNull<u8>, &'static str> {
///         Err("no window")
///     }
///     unsafe fn map_new_page(&mut self, _: NodeId, _: NonNull<u8>) -> Result<(), &'static str> {
///         Err("no page")
///     }
///     unsafe fn unmap_page(&mut self, _: NonNull<u8>) {}
///     unsafe fn release_window(&mut self, _: NonNull<u8>, _: usize) {}
/// }
///
/// let (mut words, mut unit_offsets) = ([0; storage_words(4)], [0; 4]);
/// let result = build_or_page(
///     &FirstChunkSpec::default(),
///     &EvenNodes::new(4, 1)?,
///     Template { bytes: &[], base: 0x1000 },
///     Storage { words: &mut words, unit_offsets: &mut unit_offsets },
///     (&mut Nothing, &mut Nothing),
///     |error| assert_eq!(error.to_string(), "no area for group 0 on node 0: no large area"),
/// );
/// assert_eq!(result.unwrap_err().to_string(), "no address window of 131072 bytes: no window");
/// # Ok::<(), LayoutError>(())
/// ```
pub fn build_or_page<'m, T, M, P>(
    spec: &FirstChunkSpec,
    topology: &T,
    template: Template<'_>,
    storage: Storage<'m>,
    (early, pages): (&mut M, &mut P),
    on_fall_back: impl FnOnce(BuildError<M::Error>),
) -> Result<FirstChunk<'m>, BuildError<P::Error>>
where
    T: Topology + ?Sized,
    M: EarlyMemory + ?Sized,
    P: PageMemory + ?Sized,
{
    let Storage {
        words,
        unit_offsets,
    } = storage;
    let mut shape = Shape::embed(spec, topology, words)?;
    if let Err(error) = place(
        &UnitPlan::view(shape, words),
        &template,
        unit_offsets,
        early,
    ) {
        on_fall_back(error);
        shape = Shape::page(spec, topology, words)?;
        page::place(
            &UnitPlan::view(shape, words),
            &template,
            unit_offsets,
            pages,
        )?;
    }
    Ok(FirstChunk::new(
        UnitPlan::view(shape, words),
        template.base,
        unit_offsets,
    ))
}

fn place<M: EarlyMemory + ?Sized>(
    plan: &UnitPlan<'_>,
    template: &Template<'_>,
    unit_offsets: &mut [usize],
    memory: &mut M,
) -> Result<(), BuildError<M::Error>> {
    let unit_offsets = check_build(plan, FirstChunkKind::Embed, template, unit_offsets)?;
    let stride_bytes = memory.unit_stride_bytes(plan.sizes().unit_bytes());
    stride_span_bytes(plan.sizes(), plan.nr_units(), stride_bytes)?;
    let mut areas = Areas {
        plan,
        unit_offsets,
        stride_bytes,
        memory,
    };
    areas.allocate()?;
    areas.fill(template.bytes);
    areas.give_back();
    areas.set_offsets(template.base);
    Ok(())
}

/// The areas of the groups while the chunk is built.
struct Areas<'a, 'm, M: ?Sized> {
    plan: &'a UnitPlan<'m>,
    /// At the lowest CPU of a group whose area is there: the address of the area.
    unit_offsets: &'a mut [usize],
    stride_bytes: usize,
    memory: &'a mut M,
}

impl<M: EarlyMemory + ?Sized> Areas<'_, '_, M> {
    /// All areas, or none.
    fn allocate(&mut self) -> Result<(), BuildError<M::Error>> {
        for group in self.plan.groups() {
            match self.memory.alloc_area(self.request(group)) {
                Ok(area) => *self.area_record(group) = area.as_ptr().expose_provenance(),
                Err(error) => {
                    self.free_areas(group.index);
                    return Err(BuildError::Area {
                        group: group.index,
                        node: group.node,
                        error,
                    });
                }
            }
        }
        let (span_bytes, limit_bytes) = (self.span_bytes(), self.memory.vm_space_bytes() / 4 * 3);
        if span_bytes > limit_bytes {
            self.free_areas(self.plan.nr_groups());
            return Err(BuildError::TooFarApart {
                span_bytes,
                limit_bytes,
            });
        }
        Ok(())
    }

    /// What a group's area must be.
    fn request(&self, group: Group) -> AreaRequest {
        AreaRequest {
            group: group.index,
            node: group.node,
            nr_units: group.nr_units,
            unit_bytes: self.plan.sizes().unit_bytes(),
            stride_bytes: self.stride_bytes,
            align_bytes: self.plan.sizes().area_align_bytes(),
        }
    }

    fn fill(&mut self, template: &[u8]) {
        let contents = self.memory.contents();
        for group in self.plan.groups() {
            let (area, request) = (self.unit(group, 0), self.request(group));
            // SAFETY: the area was returned for this request, and nothing has been done with it yet; the template is as long
            // as the static region, a part of the unit.
            if unsafe { self.memory.share_template(area, request, template) } {
                continue;
            }
            for unit in 0..group.nr_cpus {
                // SAFETY: the unit is one of an area that the memory gave to this chunk alone, and the memory
                // promises its contents; a fresh area doesn't overlap the template, which is borrowed.
                unsafe {
                    fill_unit(
                        self.unit(group, unit).as_ptr(),
                        template,
                        self.plan.sizes(),
                        contents,
                    )
                };
            }
        }
    }

    /// The tails of used units, and unused units whole.
    fn give_back(&mut self) {
        let tail = self.plan.sizes().regions().tail;
        for group in self.plan.groups() {
            for unit in 0..group.nr_cpus {
                if !tail.is_empty() {
                    let address = self.unit(group, unit).as_ptr().wrapping_add(tail.start);
                    // SAFETY: the tail is a part of the area that no CPU uses and that is freed only here.
                    unsafe {
                        self.memory
                            .free(NonNull::new_unchecked(address), tail.len())
                    };
                }
            }
            self.free_units(group, group.nr_cpus);
        }
    }

    fn set_offsets(&mut self, base: usize) {
        for group in self.plan.groups() {
            let area = *self.area_record(group);
            for (unit, index) in (group.first_unit.get()..).zip(0..group.nr_cpus as usize) {
                if let Some(cpu) = self.plan.cpu_of_unit(UnitId::new(unit)) {
                    let address = area + index * self.stride_bytes;
                    self.unit_offsets[cpu.index()] = address.wrapping_sub(base);
                }
            }
        }
    }

    /// From the lowest byte of all areas to the end of the highest.
    fn span_bytes(&mut self) -> usize {
        let (mut lowest, mut end) = (usize::MAX, 0);
        for group in self.plan.groups() {
            let area = *self.area_record(group);
            let last = (group.nr_units as usize - 1) * self.stride_bytes;
            lowest = lowest.min(area);
            end = end.max(area + last + self.plan.sizes().unit_bytes());
        }
        end - lowest
    }

    /// Rolls back: the areas of all groups below `end` go, the last first.
    fn free_areas(&mut self, end: u32) {
        for group in self.plan.groups().rev().filter(|group| group.index < end) {
            self.free_units(group, 0);
        }
    }

    /// Frees the units of a group's area from `first` on, in one piece if they are side by side.
    fn free_units(&mut self, group: Group, first: u32) {
        let nr_units = group.nr_units - first;
        if nr_units == 0 {
            return;
        }
        let unit_bytes = self.plan.sizes().unit_bytes();
        let side_by_side = self.stride_bytes == unit_bytes;
        let (pieces, piece_units) = if side_by_side {
            (1, nr_units)
        } else {
            (nr_units, 1)
        };
        let piece_bytes = unit_bytes * piece_units as usize;
        for piece in 0..pieces {
            let start = self.unit(group, first + piece);
            // SAFETY: these units are part of the group's area, have no CPU or never will, and are freed once.
            unsafe { self.memory.free(start, piece_bytes) };
        }
    }

    /// A unit of a group, by its place in the area.
    fn unit(&mut self, group: Group, index: u32) -> NonNull<u8> {
        let address = *self.area_record(group) + index as usize * self.stride_bytes;
        // SAFETY: the area starts at a non-null address and doesn't wrap around.
        unsafe { NonNull::new_unchecked(ptr::with_exposed_provenance_mut(address)) }
    }

    fn area_record(&mut self, group: Group) -> &mut usize {
        &mut self.unit_offsets[group.lowest_cpu.index()]
    }
}
