//! CPUs, nodes, groups, units: who gets which piece of the per-CPU memory.
//!
//! A *unit* is one CPU's area. CPUs that are local to each other form a *group*; a group's units lie in one
//! contiguous run of *allocations*, each holding the same number of units.
//!
//! ```text
//!   group 0                          group 1
//!   | unit 0 | unit 1 | unit 2 | - | unit 4 | unit 5 |      - : a unit without a CPU, its memory is given back
//!   |  allocation 0   | allocation 1 | allocation 2  |      here 2 units per allocation
//!
//!   one unit:  | static | reserved | dynamic | tail |       tail : given back too
//! ```
//!
//! What always holds of a [`UnitPlan`]:
//! - every possible CPU has exactly one unit, and `cpu_of_unit` is the inverse of `unit_of_cpu`;
//! - groups are in the order of their lowest CPU, the CPUs of a group lie in ascending order from its first unit on,
//!   and the unused units of a group are its last ones;
//! - the number of units of a group is a multiple of the units per allocation;
//! - units, allocations and the sum of the three regions are whole pages.
//!
//! Nothing here touches memory but the storage that the caller lends: the builders are in [`crate::embed`] and
//! [`crate::page`].

use core::fmt;

mod boot_log;
mod error;
mod first_chunk;
mod plan;
mod sizes;
mod topology;

pub use boot_log::{AllocLines, BootLog, FirstLine};
pub use error::{BuildError, LayoutError};
pub use first_chunk::{Contents, FirstChunk, FirstChunkKind, Storage, Template};
pub use plan::{Group, UnitPlan, storage_words};
pub use sizes::{FirstChunkSpec, Regions, UnitSizes};
pub use topology::{DistanceMap, EvenNodes, LOCAL_DISTANCE, NodeMap, Topology};

pub(crate) use first_chunk::{check_build, fill_unit, stride_span_bytes};
pub(crate) use plan::Shape;

/// The most CPUs that a topology may have; CPU ids lie below it.
///
/// It is the largest `CONFIG_NR_CPUS` of Linux on x86-64.
pub const MAX_CPUS: u32 = 8192;

/// The grain of the per-CPU memory: regions start at a multiple of it, allocations are rounded up to it.
pub const GRANULE_BYTES: usize = 4;

/// The dynamic room that every first chunk has at least, for requests made before any other chunk can be.
pub const EARLY_DYNAMIC_BYTES: usize = 12 << 10;

/// The smallest unit that a plan may be asked for: the largest dynamic request (32 KiB) must fit in a unit.
pub const MIN_UNIT_BYTES: usize = 32 << 10;

/// The page size of x86-64, and the smallest that is supported.
pub const MIN_PAGE_BYTES: usize = 4 << 10;

/// The largest page size that is supported.
pub const MAX_PAGE_BYTES: usize = 64 << 10;

/// No region, unit or chunk may be larger: no Rust object or pointer difference can.
pub const MAX_BYTES: usize = isize::MAX as usize;

/// The number of a CPU, as the system gives it. Ids may have holes.
///
/// ```
/// use pcpu::unit::CpuId;
/// assert_eq!(CpuId::new(3).index(), 3);
/// assert_eq!(CpuId::new(3).to_string(), "3");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuId(u32);

impl CpuId {
    /// The CPU of that number; any number is accepted here, those that take a CPU check it.
    pub const fn new(id: u32) -> Self {
        Self(id)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number as an index into a table that has an entry per CPU id.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for CpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of a memory node (NUMA node).
///
/// ```
/// assert_eq!(pcpu::unit::NodeId::new(1).get(), 1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

impl NodeId {
    /// The node of that number.
    pub const fn new(id: u32) -> Self {
        Self(id)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number as an index into a table that has an entry per node.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of a unit: its place in the chunk, which is not its CPU's number.
///
/// ```
/// assert_eq!(pcpu::unit::UnitId::new(7).index(), 7);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitId(u32);

impl UnitId {
    /// The unit of that number.
    pub const fn new(id: u32) -> Self {
        Self(id)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number as an index into a table that has an entry per unit.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for UnitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
