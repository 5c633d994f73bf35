//! The host's side: which modules are attached, where their variables lie, and the functions that they call.
//!
//! What always holds of an attached module: its area is allocated in the host's instance and nobody else's, and holds on
//! every possible CPU what the module made of its initial values. An area of the reserved region is zero again on all
//! CPUs before it is free: the allocator zeroes for CPUs that are materialised only. One of the dynamic region is
//! given out only after all CPUs have been materialised.

use core::mem::size_of;
use core::ptr;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::vec::Vec;

use super::error::AttachError;
use super::reply::{Reply, region_word};
use super::table::{ABI_VERSION, Extent, HostTable, ModuleTable};
use super::{Placement, is_module};
use crate::alloc_api::{Domain, Global};
use crate::allocator::Region;
use crate::global::WINDOW_BYTES;
use crate::request::{AllocError, AllocFlags, CpuError, FreeFlags, Request};
use crate::this_cpu::process;
use crate::unit::CpuId;

/// Where a module's variables lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Area {
    /// The neutral address of its first byte.
    pub neutral: usize,
    /// Its length, in bytes.
    pub bytes: usize,
    /// Its region.
    pub region: Region,
}

/// An attached module; detached when dropped.
///
/// A module that is attached several times is detached when the last of these is dropped. One that is forgotten keeps its
/// area for good.
#[derive(Debug)]
#[must_use = "a module is detached when this is dropped"]
pub struct Attached {
    table: &'static ModuleTable,
    area: Option<Area>,
}

impl Attached {
    /// Where the module's variables lie; `None` if it has none.
    pub fn area(&self) -> Option<Area> {
        self.area
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut modules = modules();
        let Some(index) = modules.iter().position(|module| module.is(self.table)) else {
            return;
        };
        modules[index].users -= 1;
        if modules[index].users == 0 {
            modules.swap_remove(index);
            (self.table.detach)();
            if let Some(area) = self.area {
                area.give_back();
            }
        }
    }
}

/// Attaches a module: its variables get an area in the instance of the process, and their initial values in every
/// possible CPU's copy. If it is attached already, one more has it then.
///
/// This is for who loads libraries by means of their own; [`Module`](super::Module) does it all.
///
/// # Errors
/// [`AttachError`]; the module is not attached then.
///
/// # Panics
/// If the process's instance cannot be set up.
///
/// # Safety
/// - `table` is what a library exports as [`SYMBOL`](super::SYMBOL), and was made by [`module!`](crate::module!).
/// - The library stays mapped until the result has been dropped, or is not dropped at all.
/// - When the last result for the library is dropped, or the library is unmapped, nothing of it is in use, nor will be:
///   no thread is in its code, and nobody keeps a handle or a reference to one of its variables.
pub unsafe fn attach(
    table: *const ModuleTable,
    placement: Placement,
) -> Result<Attached, AttachError> {
    if is_module() {
        return Err(AttachError::NoHost);
    }
    // SAFETY: the promise of the caller.
    let table = unsafe { ModuleTable::check(table)? };
    let mut modules = modules();
    let is_attached = (table.is_attached)() != 0;
    let known = modules.iter().position(|module| module.is(table));
    match (is_attached, known) {
        (true, Some(index)) => {
            modules[index].users += 1;
            let area = modules[index].area;
            return Ok(Attached { table, area });
        }
        (true, None) => return Err(AttachError::AttachedElsewhere),
        // One that was attached has been closed without being detached, and this one lies where it lay. The area stays
        // with the one that was.
        (false, Some(index)) => {
            modules.swap_remove(index);
        }
        (false, None) => {}
    }
    let extent = (table.extent)();
    let area = match extent.bytes {
        0 => None,
        _ => Some(Area::claim(extent, placement)?),
    };
    if let Some(area) = area {
        area.for_each_copy(|copy| {
            // SAFETY: the area is as large as the module wants it, and nobody else's.
            unsafe { (table.fill)(copy) }
        });
    }
    let neutral = area.map_or(0, |area| area.neutral);
    // SAFETY: our table stays for good; the area is filled, and taken back after the module is detached only.
    let reply = unsafe { (table.attach)(host_table(), neutral) };
    if let Err(error) = reply.result() {
        if let Some(area) = area {
            area.give_back();
        }
        return Err(error);
    }
    modules.push(Entry {
        table: ptr::from_ref(table).addr(),
        area,
        users: 1,
    });
    Ok(Attached { table, area })
}

/// A module that is attached.
struct Entry {
    /// Address of its table.
    table: usize,
    area: Option<Area>,
    /// How many have attached it.
    users: usize,
}

impl Entry {
    fn is(&self, table: &ModuleTable) -> bool {
        self.table == ptr::from_ref(table).addr()
    }
}

fn modules() -> MutexGuard<'static, Vec<Entry>> {
    static MODULES: Mutex<Vec<Entry>> = Mutex::new(Vec::new());
    MODULES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Area {
    fn claim(extent: Extent, placement: Placement) -> Result<Self, AttachError> {
        let Extent { bytes, align_bytes } = extent;
        let ask = |flags| {
            let flags = flags | AllocFlags::NO_ZERO;
            Global::allocate(&Request::new(bytes, align_bytes).with_flags(flags))
        };
        let (reserved, region) = match placement {
            Placement::Reserved => (ask(AllocFlags::RESERVED), Region::Reserved),
            Placement::DynamicIfFull => match ask(AllocFlags::RESERVED | AllocFlags::NO_WARN) {
                Err(AllocError::ReservedExhausted { .. }) => {
                    bring_up_all().map_err(AttachError::NoMemory)?;
                    (ask(AllocFlags::empty()), Region::Dynamic)
                }
                other => (other, Region::Reserved),
            },
        };
        let neutral = reserved.map_err(|error| match error {
            AllocError::ReservedExhausted { free_bytes, .. } => AttachError::ReservedExhausted {
                bytes,
                align_bytes,
                free_bytes,
            },
            other => AttachError::Alloc(other),
        })?;
        Ok(Self {
            neutral,
            bytes,
            region,
        })
    }

    /// Frees the area, which nobody uses any more.
    fn give_back(self) {
        self.for_each_copy(|copy| {
            // SAFETY: the area is still allocated.
            unsafe { copy.write_bytes(0, self.bytes) };
        });
        let flags = match self.region {
            Region::Reserved => FreeFlags::RESERVED,
            Region::Static | Region::Dynamic => FreeFlags::empty(),
        };
        // SAFETY: nobody uses it, and only whoever attached the module gives it back.
        let freed = unsafe { Global::free(self.neutral, flags) };
        debug_assert_eq!(freed, Ok(()));
    }

    fn for_each_copy(&self, act: impl Fn(*mut u8)) {
        let units = Global::units();
        for cpu in units.possible().iter() {
            if let Ok(copy) = units.copy_of(self.neutral, cpu) {
                act(ptr::with_exposed_provenance_mut(copy));
            }
        }
    }
}

/// Gives all possible CPUs memory of their own.
fn bring_up_all() -> Result<(), CpuError> {
    Global::units()
        .possible()
        .iter()
        .try_for_each(Global::bring_up)
}

/// The table of this process's instance.
fn host_table() -> &'static HostTable {
    static TABLE: OnceLock<HostTable> = OnceLock::new();
    TABLE.get_or_init(|| HostTable {
        abi: ABI_VERSION,
        table_bytes: size_of::<HostTable>() as u32,
        window_bytes: WINDOW_BYTES,
        stride_bytes: process::stride_bytes(),
        rseq_offset: process::rseq_area(),
        units: Global::units().tables(),
        allocate,
        free,
        bring_up,
        region,
    })
}

extern "C" fn allocate(bytes: usize, align: usize, flags: u32, owner: usize) -> Reply {
    let flags = AllocFlags::from_bits_retain(flags);
    let request = Request::new(bytes, align)
        .with_flags(flags)
        .with_owner(owner);
    Reply::new(Global::allocate(&request))
}

/// # Safety
/// As `PerCpuAllocator::free_with`.
unsafe extern "C" fn free(address: usize, flags: u32) -> Reply {
    // SAFETY: the promise of the caller.
    let freed = unsafe { Global::free(address, FreeFlags::from_bits_retain(flags)) };
    Reply::new(freed.map(|()| 0))
}

extern "C" fn bring_up(cpu: u32) -> Reply {
    Reply::new(Global::bring_up(CpuId::new(cpu)).map(|()| 0))
}

extern "C" fn region(neutral: usize) -> Reply {
    Reply::new(Ok::<_, CpuError>(region_word(Global::region(neutral))))
}
