//! What both builders take and what they leave: the first chunk.
//!
//! What always holds of a [`FirstChunk`]: `base + unit_offsets[cpu]`, wrapping, is the address of the CPU's unit,
//! where a copy of the template lies, followed by zeroes up to the end of the dynamic region. The areas may lie
//! anywhere, below the base too. Nothing of the template itself is kept.

use core::{
    fmt,
    ptr::{self, NonNull},
};

use super::{BuildError, CpuId, LayoutError, UnitPlan, UnitSizes, sizes::fits};

/// How the memory of a first chunk is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstChunkKind {
    /// One area per group: [`crate::embed`].
    Embed,
    /// Single pages: [`crate::page`].
    Page,
}

impl fmt::Display for FirstChunkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Embed => "embed",
            Self::Page => "page",
        })
    }
}

/// What fresh memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Zeroes: it is not zeroed again.
    Zeroed,
    /// Anything: the builder zeroes it.
    Dirty,
}

/// The initial values of all static variables, and where the variables are taken to be.
///
/// ```
/// use pcpu::unit::Template;
/// let template = Template { bytes: &[1, 2, 3, 4], base: 0x10_0000 };
/// assert_eq!(template.bytes.len(), 4);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Template<'a> {
    /// The values; as long as the static region of the plan.
    pub bytes: &'a [u8],
    /// The neutral address of the first byte: what a handle to it holds. In a kernel the address of the section
    /// itself.
    pub base: usize,
}

/// The storage that a first chunk borrows.
///
/// ```
/// use pcpu::unit::{Storage, storage_words};
/// let (mut words, mut unit_offsets) = ([0; storage_words(64)], [0; 64]);
/// let storage = Storage { words: &mut words, unit_offsets: &mut unit_offsets };
/// # let _ = storage;
/// ```
#[derive(Debug)]
pub struct Storage<'m> {
    /// For the plan: [`storage_words`](super::storage_words) of the number of CPU ids.
    pub words: &'m mut [u32],
    /// An entry for every CPU id.
    pub unit_offsets: &'m mut [usize],
}

/// A built first chunk. The memory stays until whoever owns it takes it away: dropping this frees nothing.
///
/// Examples are at [`crate::embed`] and [`crate::page`].
#[derive(Clone, Copy, Debug)]
pub struct FirstChunk<'m> {
    plan: UnitPlan<'m>,
    base: usize,
    unit_offsets: &'m [usize],
}

impl<'m> FirstChunk<'m> {
    /// The builders' last step; every used unit's offset is in `unit_offsets`.
    pub(crate) fn new(plan: UnitPlan<'m>, base: usize, unit_offsets: &'m [usize]) -> Self {
        Self {
            plan,
            base,
            unit_offsets: &unit_offsets[..plan.nr_cpu_ids() as usize],
        }
    }

    /// Who has which unit.
    pub fn plan(&self) -> &UnitPlan<'m> {
        &self.plan
    }

    /// Which builder made it.
    pub fn kind(&self) -> FirstChunkKind {
        self.plan.kind()
    }

    /// The neutral address of a unit's first byte.
    pub fn base(&self) -> usize {
        self.base
    }

    /// What to add, wrapping, to a neutral address to reach a CPU's copy; indexed by CPU id. A CPU that isn't
    /// possible has 0, which leads to the neutral address itself.
    pub fn unit_offsets(&self) -> &'m [usize] {
        self.unit_offsets
    }

    /// The offset of a CPU; `None` if the CPU isn't possible.
    pub fn unit_offset(&self, cpu: CpuId) -> Option<usize> {
        self.plan
            .unit_of_cpu(cpu)
            .map(|_| self.unit_offsets[cpu.index()])
    }

    /// The first byte of a CPU's unit; `None` if the CPU isn't possible. The pointer has the provenance of the
    /// area, which the builders expose.
    pub fn unit_address(&self, cpu: CpuId) -> Option<NonNull<u8>> {
        let offset = self.unit_offset(cpu)?;
        NonNull::new(ptr::with_exposed_provenance_mut(
            self.base.wrapping_add(offset),
        ))
    }
}

/// What both builders check before they ask for memory. Returns the offsets' table, zeroed.
pub(crate) fn check_build<'o, E>(
    plan: &UnitPlan<'_>,
    builder: FirstChunkKind,
    template: &Template<'_>,
    unit_offsets: &'o mut [usize],
) -> Result<&'o mut [usize], BuildError<E>> {
    if plan.kind() != builder {
        return Err(BuildError::WrongKind {
            plan: plan.kind(),
            builder,
        });
    }
    let (template_bytes, static_bytes) = (template.bytes.len(), plan.sizes().static_bytes());
    if template_bytes != static_bytes {
        return Err(BuildError::TemplateSize {
            template_bytes,
            static_bytes,
        });
    }
    let (entries, needed) = (unit_offsets.len(), plan.nr_cpu_ids() as usize);
    let unit_offsets = unit_offsets
        .get_mut(..needed)
        .ok_or(LayoutError::StorageTooSmall {
            what: "the offset of each CPU's unit",
            entries,
            needed,
        })?;
    unit_offsets.fill(0);
    Ok(unit_offsets)
}

/// The bytes from the first of so many units to the end of the last.
pub(crate) fn stride_span_bytes<E>(
    sizes: &UnitSizes,
    nr_units: u32,
    stride_bytes: usize,
) -> Result<usize, BuildError<E>> {
    let unit_bytes = sizes.unit_bytes();
    if stride_bytes < unit_bytes {
        return Err(BuildError::StrideTooSmall {
            stride_bytes,
            unit_bytes,
        });
    }
    let last = u128::from(nr_units.saturating_sub(1)) * stride_bytes as u128;
    Ok(fits("all units together", last + unit_bytes as u128)?)
}

/// Copies the template into a unit and makes the rest of its regions zero.
///
/// # Safety
/// `sizes.sum_bytes()` bytes from `unit` on are writable and nobody else's, and hold what `contents` says. The
/// template, of `sizes.static_bytes()` bytes, lies elsewhere.
pub(crate) unsafe fn fill_unit(
    unit: *mut u8,
    template: &[u8],
    sizes: &UnitSizes,
    contents: Contents,
) {
    // SAFETY: the caller owns the unit; the static region is its start and as long as the template, and they
    // don't overlap.
    unsafe { ptr::copy_nonoverlapping(template.as_ptr(), unit, template.len()) };
    match contents {
        Contents::Zeroed => {}
        // SAFETY: the template is not longer than the sum of the regions, which the caller owns.
        Contents::Dirty => unsafe {
            unit.add(template.len())
                .write_bytes(0, sizes.sum_bytes() - template.len())
        },
    }
}
