//! Memory before and below the per-CPU allocator: frames, page tables, stacks.
//!
//! | addresses | what |
//! |---|---|
//! | from 1 MiB | the kernel's image, at its physical addresses |
//! | [`MODULES`] | modules, where 32-bit relocations reach the kernel and all handles |
//! | [`FAR_MODULES`] | modules, out of that reach |
//! | [`USER`] | the user programs of the tests |
//! | [`PHYSICAL_MAP`] | all physical memory |
//! | [`PER_CPU_WINDOW`] | the windows of the per-CPU units, and the allocator's own data |
//! | [`AREAS`] | areas that are never freed |
//! | [`STACKS`] | stacks, with an unmapped page below each |
//! | [`LOCAL_APIC`] | the local APIC's registers |

use core::fmt;

pub mod areas;
pub mod frames;
pub mod image;
pub mod paging;
pub mod stacks;

/// Where modules are mapped.
pub const MODULES: usize = 0x6000_0000;
/// Where modules are mapped that use 64-bit relocations.
pub const FAR_MODULES: usize = 0xffff_f800_0000_0000;
/// Where the user programs of the tests are mapped.
pub const USER: usize = 0x4000_0000_0000;
/// Where physical address 0 is mapped.
pub const PHYSICAL_MAP: usize = 0xffff_8000_0000_0000;
/// Where the per-CPU units lie, each in a window of 1 GiB: more than 4 GiB from the code, where no 32-bit relocation reaches.
pub const PER_CPU_WINDOW: usize = 0xffff_d000_0000_0000;
/// Where areas that are never freed are mapped.
pub const AREAS: usize = 0xffff_dc00_0000_0000;
/// Where stacks are mapped.
pub const STACKS: usize = 0xffff_e000_0000_0000;
/// Where the local APIC's registers are mapped.
pub const LOCAL_APIC: usize = 0xffff_f000_0000_0000;

/// The page size.
pub const PAGE_BYTES: usize = 4096;

/// Some physical addresses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PhysicalRange {
    /// The first.
    pub start: u64,
    /// The first behind it.
    pub end: u64,
}

impl PhysicalRange {
    /// None.
    pub const EMPTY: Self = Self::new(0, 0);

    /// From `start` up to `end`.
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end }
    }

    /// Whether an address is one of them.
    pub const fn contains(&self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// Every `step`-th of them.
    pub fn addresses(&self, step: u64) -> impl Iterator<Item = u64> + use<> {
        (self.start..self.end).step_by(step as usize)
    }
}

impl fmt::Display for PhysicalRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#011x}..{:#011x}", self.start, self.end)
    }
}
