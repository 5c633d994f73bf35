//! The sizes of a first chunk: what is asked for, and what comes out after rounding.
//!
//! ```text
//!   | static s | reserved r |      dynamic d      | tail |
//!   0                                             sum    unit size
//! ```
//! - `s + r + d` is a whole number of pages: d takes the rounding, and is at least the early reserve;
//! - unit size >= sum, and an allocation is `units_per_alloc` units = a whole number of atoms;
//! - the regions start at multiples of the granule: static's padding is taken from d. The *printed* d is before
//!   that, as in Linux's log.
//!
//! Sums are made in 128 bits, so that an error can name the exact size that was too large.

use core::ops::Range;

use super::{
    EARLY_DYNAMIC_BYTES, FirstChunkKind, GRANULE_BYTES, LayoutError, MAX_BYTES, MAX_PAGE_BYTES,
    MIN_PAGE_BYTES, MIN_UNIT_BYTES,
};

/// What a first chunk is asked to hold. The default is x86-64 without any variable: 4 KiB pages, 2 MiB atoms,
/// units of at least 32 KiB.
///
/// ```
/// use pcpu::unit::FirstChunkSpec;
/// let spec = FirstChunkSpec { static_bytes: 212_992, reserved_bytes: 8192, ..Default::default() };
/// assert_eq!(spec.atom_bytes, 2 << 20);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstChunkSpec {
    /// The size of the template: all static per-CPU variables.
    pub static_bytes: usize,
    /// The room for the static variables of modules, a multiple of [`GRANULE_BYTES`].
    pub reserved_bytes: usize,
    /// The dynamic room that is wanted; at least [`EARLY_DYNAMIC_BYTES`] are given, and the rounding is added.
    pub dyn_bytes: usize,
    /// Areas of units are multiples of it: the large page with which they are mapped.
    pub atom_bytes: usize,
    /// The page size, a power of two from [`MIN_PAGE_BYTES`] to [`MAX_PAGE_BYTES`].
    pub page_bytes: usize,
    /// No unit is smaller; at least [`MIN_UNIT_BYTES`].
    pub min_unit_bytes: usize,
}

impl Default for FirstChunkSpec {
    fn default() -> Self {
        Self {
            static_bytes: 0,
            reserved_bytes: 0,
            dyn_bytes: 0,
            atom_bytes: 2 << 20,
            page_bytes: MIN_PAGE_BYTES,
            min_unit_bytes: MIN_UNIT_BYTES,
        }
    }
}

impl FirstChunkSpec {
    /// What Linux gives an x86-64 machine: room of 8 KiB for modules and of 28 KiB for dynamic variables, 2 MiB atoms.
    ///
    /// ```
    /// use pcpu::unit::FirstChunkSpec;
    /// let spec = FirstChunkSpec::like_linux(212_992);
    /// assert_eq!((spec.static_bytes, spec.reserved_bytes, spec.dyn_bytes), (212_992, 8192, 28672));
    /// ```
    pub fn like_linux(static_bytes: usize) -> Self {
        Self {
            static_bytes,
            reserved_bytes: 8 << 10,
            dyn_bytes: 28 << 10,
            ..Self::default()
        }
    }

    /// Single pages serve no large mapping and are made before any later chunk: atoms of a page, no more dynamic
    /// room than the early reserve.
    fn for_kind(self, kind: FirstChunkKind) -> Self {
        match kind {
            FirstChunkKind::Embed => self,
            FirstChunkKind::Page => Self {
                atom_bytes: self.page_bytes,
                dyn_bytes: 0,
                ..self
            },
        }
    }

    fn check(&self) -> Result<(), LayoutError> {
        let Self {
            page_bytes,
            atom_bytes,
            reserved_bytes,
            ..
        } = *self;
        if !page_bytes.is_power_of_two() || !(MIN_PAGE_BYTES..=MAX_PAGE_BYTES).contains(&page_bytes)
        {
            return Err(LayoutError::PageSize { page_bytes });
        }
        if atom_bytes == 0 || !atom_bytes.is_multiple_of(page_bytes) {
            return Err(LayoutError::AtomMisaligned {
                atom_bytes,
                page_bytes,
            });
        }
        if !reserved_bytes.is_multiple_of(GRANULE_BYTES) {
            return Err(LayoutError::ReservedMisaligned { reserved_bytes });
        }
        Ok(())
    }

    /// The size of the three regions together, a whole number of pages.
    fn sum_bytes(&self) -> Result<usize, LayoutError> {
        let wanted = [
            self.static_bytes,
            self.reserved_bytes,
            self.dyn_bytes.max(EARLY_DYNAMIC_BYTES),
        ];
        let sum = wanted.iter().map(|&bytes| bytes as u128).sum::<u128>();
        fits(
            "the regions of a unit",
            sum.next_multiple_of(self.page_bytes as u128),
        )
    }
}

/// The sizes of a plan, after rounding.
///
/// ```
/// use pcpu::unit::{EvenNodes, FirstChunkSpec, UnitPlan, storage_words};
/// let spec = FirstChunkSpec { static_bytes: 10_001, ..Default::default() };
/// let mut words = [0; storage_words(4)];
/// let plan = UnitPlan::embed(&spec, &EvenNodes::new(4, 1)?, &mut words)?;
/// let sizes = plan.sizes();
/// assert_eq!(sizes.sum_bytes(), 24_576);
/// assert_eq!(sizes.static_bytes() + sizes.reserved_bytes() + sizes.dyn_bytes(), sizes.sum_bytes());
/// assert_eq!(sizes.regions().dynamic, 10_004..24_576);
/// # Ok::<(), pcpu::unit::LayoutError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitSizes {
    static_bytes: usize,
    reserved_bytes: usize,
    dyn_bytes: usize,
    unit_bytes: usize,
    units_per_alloc: u32,
    atom_bytes: usize,
    page_bytes: usize,
}

impl UnitSizes {
    /// The sizes for a kind of first chunk, with as many units per allocation as fit; which of their divisors
    /// is best depends on the groups, see [`Self::set_units_per_alloc`]. More than `limit_units` are never tried.
    pub(super) fn packed(
        spec: &FirstChunkSpec,
        kind: FirstChunkKind,
        limit_units: u32,
    ) -> Result<Self, LayoutError> {
        spec.check()?;
        if spec.min_unit_bytes < MIN_UNIT_BYTES {
            return Err(LayoutError::UnitTooSmall {
                unit_bytes: spec.min_unit_bytes,
                limit_bytes: MIN_UNIT_BYTES,
            });
        }
        let spec = spec.for_kind(kind);
        let sum_bytes = spec.sum_bytes()?;
        let min_unit_bytes = sum_bytes.max(spec.min_unit_bytes);
        let alloc_bytes = (min_unit_bytes as u128).next_multiple_of(spec.atom_bytes as u128);
        let alloc_bytes = fits("an allocation of units", alloc_bytes)?;
        let mut sizes = Self::new(&spec, sum_bytes, alloc_bytes);
        let most = u32::try_from(alloc_bytes / min_unit_bytes)
            .unwrap_or(u32::MAX)
            .min(limit_units);
        // One unit per allocation always splits it into whole pages.
        sizes.set_units_per_alloc(
            (1..=most)
                .rev()
                .find(|&units| sizes.splits_into(units))
                .unwrap_or(1),
        );
        Ok(sizes)
    }

    /// The sizes with units of exactly `unit_bytes`, one per allocation, atoms of a page.
    pub(super) fn exact(spec: &FirstChunkSpec, unit_bytes: usize) -> Result<Self, LayoutError> {
        spec.check()?;
        let spec = FirstChunkSpec {
            atom_bytes: spec.page_bytes,
            ..*spec
        };
        let sum_bytes = spec.sum_bytes()?;
        if unit_bytes < sum_bytes {
            return Err(LayoutError::UnitTooSmall {
                unit_bytes,
                limit_bytes: sum_bytes,
            });
        }
        if !unit_bytes.is_multiple_of(spec.page_bytes) {
            return Err(LayoutError::UnitMisaligned {
                unit_bytes,
                page_bytes: spec.page_bytes,
            });
        }
        let unit_bytes = fits("a unit", unit_bytes as u128)?;
        Ok(Self::new(&spec, sum_bytes, unit_bytes))
    }

    fn new(spec: &FirstChunkSpec, sum_bytes: usize, alloc_bytes: usize) -> Self {
        Self {
            static_bytes: spec.static_bytes,
            reserved_bytes: spec.reserved_bytes,
            dyn_bytes: sum_bytes - spec.static_bytes - spec.reserved_bytes,
            unit_bytes: alloc_bytes,
            units_per_alloc: 1,
            atom_bytes: spec.atom_bytes,
            page_bytes: spec.page_bytes,
        }
    }

    /// Whether an allocation divides into so many units of whole pages.
    pub(super) fn splits_into(&self, units: u32) -> bool {
        (self.alloc_bytes() / self.page_bytes).is_multiple_of(units as usize)
    }

    /// Divides the same allocation anew, by a number that it [splits into](Self::splits_into).
    pub(super) fn set_units_per_alloc(&mut self, units: u32) {
        self.unit_bytes = self.alloc_bytes() / units as usize;
        self.units_per_alloc = units;
    }

    /// The size of the static region, as asked for.
    pub fn static_bytes(&self) -> usize {
        self.static_bytes
    }

    /// The size of the reserved region.
    pub fn reserved_bytes(&self) -> usize {
        self.reserved_bytes
    }

    /// The size of the dynamic region as the boot log has it: the sum less the other two. Up to 3 bytes of it
    /// go into the padding behind the static region; [`Regions::dynamic`] is what can be allocated from.
    pub fn dyn_bytes(&self) -> usize {
        self.dyn_bytes
    }

    /// The size of the three regions together, a whole number of pages: what stays populated of a unit.
    pub fn sum_bytes(&self) -> usize {
        self.static_bytes + self.reserved_bytes + self.dyn_bytes
    }

    /// The size of a unit, a whole number of pages; what is beyond the sum is the tail.
    pub fn unit_bytes(&self) -> usize {
        self.unit_bytes
    }

    /// The size of an allocation of units, a whole number of atoms.
    pub fn alloc_bytes(&self) -> usize {
        self.unit_bytes * self.units_per_alloc as usize
    }

    /// The atom.
    pub fn atom_bytes(&self) -> usize {
        self.atom_bytes
    }

    /// The page size.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// The number of units in an allocation.
    pub fn units_per_alloc(&self) -> u32 {
        self.units_per_alloc
    }

    /// The number of pages of a unit, the tail included.
    pub fn unit_pages(&self) -> usize {
        self.unit_bytes / self.page_bytes
    }

    /// The number of pages of a unit that stay populated.
    pub fn populated_pages(&self) -> usize {
        self.sum_bytes() / self.page_bytes
    }

    /// The alignment that an area of units needs: the largest power of two that divides the atom.
    pub fn area_align_bytes(&self) -> usize {
        1 << self.atom_bytes.trailing_zeros()
    }

    /// Where the regions lie in a unit.
    pub fn regions(&self) -> Regions {
        // In bounds: the dynamic region has 12 KiB at least, the padding takes 3 bytes at most.
        let reserved_start = self.static_bytes.next_multiple_of(GRANULE_BYTES);
        let dynamic_start = reserved_start + self.reserved_bytes;
        Regions {
            static_vars: 0..self.static_bytes,
            reserved: reserved_start..dynamic_start,
            dynamic: dynamic_start..self.sum_bytes(),
            tail: self.sum_bytes()..self.unit_bytes,
        }
    }
}

/// The byte ranges of the regions in a unit, in this order, each but the tail at a multiple of
/// [`GRANULE_BYTES`], disjoint, and gapless but for the padding behind the static variables.
///
/// ```
/// # use pcpu::unit::{EvenNodes, FirstChunkSpec, UnitPlan, storage_words};
/// let spec = FirstChunkSpec { static_bytes: 212_992, reserved_bytes: 8192, dyn_bytes: 28_672, ..Default::default() };
/// let mut words = [0; storage_words(16)];
/// let regions = UnitPlan::embed(&spec, &EvenNodes::new(16, 1)?, &mut words)?.sizes().regions();
/// assert_eq!(regions.reserved, 212_992..221_184);
/// assert_eq!(regions.dynamic, 221_184..249_856);
/// assert_eq!(regions.tail, 249_856..262_144);
/// # Ok::<(), pcpu::unit::LayoutError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Regions {
    /// The copy of the template.
    pub static_vars: Range<usize>,
    /// The static variables of modules.
    pub reserved: Range<usize>,
    /// The first dynamic region.
    pub dynamic: Range<usize>,
    /// What is given back.
    pub tail: Range<usize>,
}

/// The size, if an address space can hold it.
pub(super) fn fits(what: &'static str, bytes: u128) -> Result<usize, LayoutError> {
    match usize::try_from(bytes) {
        Ok(bytes) if bytes <= MAX_BYTES => Ok(bytes),
        _ => Err(LayoutError::SizeOverflow {
            what,
            bytes,
            limit_bytes: MAX_BYTES,
        }),
    }
}
