//! What host and module know of each other: a table of numbers and C functions for either side.
//!
//! Nothing in them depends on how Rust lays out its types: the two sides may be built by different compilers from
//! different versions of this crate. Whoever changes a table, what a function does, or how the operations on the current
//! CPU's copy work raises [`ABI_VERSION`]. The first two words of both tables never change.

use core::fmt;

use super::error::AttachError;
use super::guest;
use super::reply::Reply;
use crate::cpus::UnitTables;

/// The version of the tables that this build of the crate has.
pub const ABI_VERSION: u32 = 2;

/// The room that a module's variables take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Extent {
    pub(super) bytes: usize,
    pub(super) align_bytes: usize,
}

/// What a module shows to its host. Made by [`module!`](crate::module!).
#[repr(C)]
pub struct ModuleTable {
    abi: u32,
    table_bytes: u32,
    /// The room that it wants.
    pub(super) extent: extern "C" fn() -> Extent,
    /// Writes the initial values to a CPU's copy, which has that room.
    pub(super) fill: unsafe extern "C" fn(copy: *mut u8),
    /// Has the module work for a host, its variables at a neutral address. The table of the host stays for good.
    pub(super) attach: unsafe extern "C" fn(host: *const HostTable, neutral: usize) -> Reply,
    /// Has it work for nobody.
    pub(super) detach: extern "C" fn(),
    /// Not 0 if it works for a host.
    pub(super) is_attached: extern "C" fn() -> u32,
}

impl ModuleTable {
    /// The table of the module that this copy of the crate is linked into.
    #[doc(hidden)]
    pub const fn of_this_module() -> Self {
        Self {
            abi: ABI_VERSION,
            table_bytes: size_of::<Self>() as u32,
            extent: guest::extent,
            fill: guest::fill,
            attach: guest::attach,
            detach: guest::detach,
            is_attached: guest::is_attached,
        }
    }

    /// The table at `table`, if it is one of this version.
    ///
    /// # Safety
    /// A module's table of whatever version lies there, for good.
    pub(super) unsafe fn check(table: *const Self) -> Result<&'static Self, AttachError> {
        // SAFETY: the first two words are the same in every version.
        let (abi, table_bytes) = unsafe { ((*table).abi, (*table).table_bytes) };
        check_version(abi, table_bytes, size_of::<Self>())?;
        // SAFETY: it is a table of this version.
        Ok(unsafe { &*table })
    }
}

impl fmt::Debug for ModuleTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModuleTable")
            .field("abi", &self.abi)
            .finish_non_exhaustive()
    }
}

/// What a host shows to its modules.
#[derive(Debug)]
#[repr(C)]
pub(super) struct HostTable {
    pub(super) abi: u32,
    pub(super) table_bytes: u32,
    /// From a neutral address to the copy in unit 0, as the instructions have it, where the operations are restartable
    /// sequences.
    pub(super) window_bytes: usize,
    /// From one unit to the next, where the operations are restartable sequences.
    pub(super) stride_bytes: usize,
    /// Where a thread's rseq area lies from its thread pointer on; 0 if the operations are LOCKed steps.
    pub(super) rseq_offset: isize,
    /// CPUs and units.
    pub(super) units: UnitTables,
    /// `PerCpuAllocator::allocate`: the neutral address, or why not.
    pub(super) allocate:
        extern "C" fn(bytes: usize, align: usize, flags: u32, owner: usize) -> Reply,
    /// `PerCpuAllocator::free_with`.
    pub(super) free: unsafe extern "C" fn(address: usize, flags: u32) -> Reply,
    /// `PerCpuAllocator::bring_up`.
    pub(super) bring_up: extern "C" fn(cpu: u32) -> Reply,
    /// The region of a neutral address.
    pub(super) region: extern "C" fn(neutral: usize) -> Reply,
}

// SAFETY: the arrays are those of the host's instance, which stay for good and are shared between threads.
unsafe impl Send for HostTable {}
// SAFETY: as above.
unsafe impl Sync for HostTable {}

impl HostTable {
    /// The table at `table`, if it is one of this version.
    ///
    /// # Safety
    /// A host's table of whatever version lies there, for good.
    pub(super) unsafe fn check(table: *const Self) -> Result<&'static Self, AttachError> {
        // SAFETY: the first two words are the same in every version.
        let (abi, table_bytes) = unsafe { ((*table).abi, (*table).table_bytes) };
        check_version(abi, table_bytes, size_of::<Self>())?;
        // SAFETY: it is a table of this version.
        Ok(unsafe { &*table })
    }
}

fn check_version(abi: u32, table_bytes: u32, our_bytes: usize) -> Result<(), AttachError> {
    if abi == ABI_VERSION && table_bytes as usize == our_bytes {
        return Ok(());
    }
    Err(AttachError::Abi {
        theirs: abi,
        ours: ABI_VERSION,
    })
}
