//! What can be wrong with a topology, with sizes and with the memory of a first chunk.
//!
//! Every variant carries the value that was given and the limit that it broke; its text is one line.

use core::fmt;

use super::{
    CpuId, FirstChunkKind, GRANULE_BYTES, MAX_CPUS, MAX_PAGE_BYTES, MIN_PAGE_BYTES, NodeId,
};

/// Why a topology or a set of sizes makes no layout of units.
///
/// ```
/// use pcpu::unit::{CpuId, LayoutError};
/// let error = LayoutError::CpuTwice { cpu: CpuId::new(2) };
/// assert_eq!(error.to_string(), "CPU 2 is listed twice, the limit is once");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// The topology has no possible CPU.
    NoCpu,
    /// A CPU belongs to two groups, or twice to one.
    CpuTwice {
        /// The CPU.
        cpu: CpuId,
    },
    /// A CPU id is not below [`MAX_CPUS`].
    CpuTooHigh {
        /// The CPU.
        cpu: CpuId,
    },
    /// A topology has more CPU ids than [`MAX_CPUS`].
    TooManyCpus {
        /// The number of CPU ids.
        nr_cpu_ids: usize,
    },
    /// A group was given without CPUs.
    EmptyGroup {
        /// The index of the group.
        group: usize,
    },
    /// There are more nodes than CPUs, or none at all.
    NodeCount {
        /// The number of nodes.
        nr_nodes: u32,
        /// The largest number that is possible.
        limit: u32,
    },
    /// A CPU is on a node that the distance matrix doesn't know.
    NodeTooHigh {
        /// The CPU.
        cpu: CpuId,
        /// Its node.
        node: NodeId,
        /// The number of nodes of the matrix.
        nr_nodes: usize,
    },
    /// A distance matrix hasn't an entry for every pair of nodes.
    DistanceCount {
        /// The number of entries.
        entries: usize,
        /// The number of nodes, whose square is wanted.
        nr_nodes: usize,
    },
    /// A node isn't at local distance of itself, or is nearer than local to another.
    Distance {
        /// The node from which the distance is.
        from: NodeId,
        /// The node to which it is.
        to: NodeId,
        /// The distance.
        distance: u8,
    },
    /// The page size is no power of two from [`MIN_PAGE_BYTES`] to [`MAX_PAGE_BYTES`].
    PageSize {
        /// The page size.
        page_bytes: usize,
    },
    /// The atom is not a positive multiple of the page.
    AtomMisaligned {
        /// The atom.
        atom_bytes: usize,
        /// The page size.
        page_bytes: usize,
    },
    /// The reserved region is not a multiple of [`GRANULE_BYTES`].
    ReservedMisaligned {
        /// Its size.
        reserved_bytes: usize,
    },
    /// A unit of a size that was asked for is not a multiple of the page.
    UnitMisaligned {
        /// Its size.
        unit_bytes: usize,
        /// The page size.
        page_bytes: usize,
    },
    /// A unit is too small for what must fit in it.
    UnitTooSmall {
        /// Its size.
        unit_bytes: usize,
        /// The smallest size that will do.
        limit_bytes: usize,
    },
    /// A size is too large for an address space.
    SizeOverflow {
        /// What is too large.
        what: &'static str,
        /// Its size, exact.
        bytes: u128,
        /// The largest size that is possible.
        limit_bytes: usize,
    },
    /// The storage lent for a table is too short.
    StorageTooSmall {
        /// Which storage.
        what: &'static str,
        /// The number of its entries.
        entries: usize,
        /// The number of entries that are needed.
        needed: usize,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoCpu => write!(f, "0 CPUs are possible, at least 1 must be"),
            Self::CpuTwice { cpu } => write!(f, "CPU {cpu} is listed twice, the limit is once"),
            Self::CpuTooHigh { cpu } => {
                write!(
                    f,
                    "CPU {cpu} is too high, the highest CPU id is {}",
                    MAX_CPUS - 1
                )
            }
            Self::TooManyCpus { nr_cpu_ids } => {
                write!(
                    f,
                    "{nr_cpu_ids} CPU ids are too many, the limit is {MAX_CPUS}"
                )
            }
            Self::EmptyGroup { group } => {
                write!(f, "group {group} has 0 CPUs, at least 1 is needed")
            }
            Self::NodeCount { nr_nodes, limit } => {
                write!(
                    f,
                    "{nr_nodes} nodes are not possible here, the limits are 1 and {limit}"
                )
            }
            Self::NodeTooHigh {
                cpu,
                node,
                nr_nodes,
            } => {
                write!(
                    f,
                    "CPU {cpu} is on node {node}, but the distance matrix has {nr_nodes} nodes"
                )
            }
            Self::DistanceCount { entries, nr_nodes } => {
                write!(
                    f,
                    "the distance matrix has {entries} entries, {nr_nodes} nodes need {nr_nodes} * {nr_nodes}"
                )
            }
            Self::Distance { from, to, distance } => {
                write!(
                    f,
                    "the distance {distance} from node {from} to node {to} is wrong: 10 is local, less is nothing"
                )
            }
            Self::PageSize { page_bytes } => {
                write!(
                    f,
                    "page size {page_bytes} is not a power of two from {MIN_PAGE_BYTES} to {MAX_PAGE_BYTES}"
                )
            }
            Self::AtomMisaligned {
                atom_bytes,
                page_bytes,
            } => {
                write!(
                    f,
                    "atom size {atom_bytes} is not a positive multiple of the page size {page_bytes}"
                )
            }
            Self::ReservedMisaligned { reserved_bytes } => {
                write!(
                    f,
                    "reserved size {reserved_bytes} is not a multiple of {GRANULE_BYTES} bytes"
                )
            }
            Self::UnitMisaligned {
                unit_bytes,
                page_bytes,
            } => {
                write!(
                    f,
                    "unit size {unit_bytes} is not a multiple of the page size {page_bytes}"
                )
            }
            Self::UnitTooSmall {
                unit_bytes,
                limit_bytes,
            } => {
                write!(
                    f,
                    "unit size {unit_bytes} is too small, at least {limit_bytes} bytes are needed"
                )
            }
            Self::SizeOverflow {
                what,
                bytes,
                limit_bytes,
            } => {
                write!(
                    f,
                    "{what}: {bytes} bytes are too many, the limit is {limit_bytes}"
                )
            }
            Self::StorageTooSmall {
                what,
                entries,
                needed,
            } => {
                write!(
                    f,
                    "the storage for {what} has {entries} entries, {needed} are needed"
                )
            }
        }
    }
}

impl core::error::Error for LayoutError {}

/// Why a first chunk could not be built; `E` is the error of the memory that was asked.
///
/// Whatever the reason: what was allocated, mapped or reserved on the way has been given back.
///
/// ```
/// use pcpu::unit::BuildError;
/// let error = BuildError::<&str>::TooFarApart { span_bytes: 900, limit_bytes: 750 };
/// assert_eq!(error.to_string(), "the groups span 900 bytes, the limit is 750");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BuildError<E> {
    /// The sizes or the storage don't fit.
    Layout(LayoutError),
    /// The plan was made for the other builder.
    WrongKind {
        /// What the plan was made for.
        plan: FirstChunkKind,
        /// What was to be built.
        builder: FirstChunkKind,
    },
    /// The template isn't as long as the static region of the plan.
    TemplateSize {
        /// The length of the template.
        template_bytes: usize,
        /// The size of the static region.
        static_bytes: usize,
    },
    /// The memory wants units nearer to each other than they are large.
    StrideTooSmall {
        /// The distance from unit to unit.
        stride_bytes: usize,
        /// The size of a unit.
        unit_bytes: usize,
    },
    /// Units of single pages must start at a page.
    StrideMisaligned {
        /// The distance from unit to unit.
        stride_bytes: usize,
        /// The page size.
        page_bytes: usize,
    },
    /// The memory maps pages of another size than the plan has.
    PageSize {
        /// The page size of the memory.
        memory_page_bytes: usize,
        /// The page size of the plan.
        plan_page_bytes: usize,
    },
    /// The area of a group could not be had.
    Area {
        /// The index of the group.
        group: u32,
        /// The node that it was wanted from.
        node: NodeId,
        /// What the memory said.
        error: E,
    },
    /// The areas of the groups are so far apart that no later chunk could repeat their distances.
    TooFarApart {
        /// From the lowest address of a unit to the end of the highest unit.
        span_bytes: usize,
        /// The largest span: three quarters of the space for later chunks.
        limit_bytes: usize,
    },
    /// The address window for all units could not be had.
    Window {
        /// Its size.
        window_bytes: usize,
        /// What the memory said.
        error: E,
    },
    /// A page of a CPU's unit could not be had or mapped.
    Page {
        /// The CPU.
        cpu: CpuId,
        /// The index of the page in the unit.
        page: usize,
        /// What the memory said.
        error: E,
    },
}

impl<E> From<LayoutError> for BuildError<E> {
    fn from(error: LayoutError) -> Self {
        Self::Layout(error)
    }
}

impl<E: fmt::Display> fmt::Display for BuildError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout(error) => error.fmt(f),
            Self::WrongKind { plan, builder } => {
                write!(f, "the plan is for {plan}, the builder is {builder}")
            }
            Self::TemplateSize {
                template_bytes,
                static_bytes,
            } => {
                write!(
                    f,
                    "the template has {template_bytes} bytes, the static region {static_bytes}"
                )
            }
            Self::StrideTooSmall {
                stride_bytes,
                unit_bytes,
            } => {
                write!(
                    f,
                    "unit stride {stride_bytes} is too small, at least {unit_bytes} bytes are needed"
                )
            }
            Self::StrideMisaligned {
                stride_bytes,
                page_bytes,
            } => {
                write!(
                    f,
                    "unit stride {stride_bytes} is not a multiple of the page size {page_bytes}"
                )
            }
            Self::PageSize {
                memory_page_bytes,
                plan_page_bytes,
            } => {
                write!(
                    f,
                    "the memory has pages of {memory_page_bytes} bytes, the plan of {plan_page_bytes}"
                )
            }
            Self::Area { group, node, error } => {
                write!(f, "no area for group {group} on node {node}: {error}")
            }
            Self::TooFarApart {
                span_bytes,
                limit_bytes,
            } => {
                write!(
                    f,
                    "the groups span {span_bytes} bytes, the limit is {limit_bytes}"
                )
            }
            Self::Window {
                window_bytes,
                error,
            } => {
                write!(f, "no address window of {window_bytes} bytes: {error}")
            }
            Self::Page { cpu, page, error } => write!(f, "no page {page} for CPU {cpu}: {error}"),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> core::error::Error for BuildError<E> {}
