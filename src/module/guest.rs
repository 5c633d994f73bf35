//! The module's side: this copy of the crate is linked into a library, and works for the instance of a host.
//!
//! What always holds: while a host is there (`STATE` is `ATTACHED`) the variables have a place in its instance, and the
//! operations are done as the host does them. While none is there, no operation takes the fast way, every handle of a
//! static variable is one without place, and everything else panics.
//!
//! Attaching and detaching are the host's calls, which it makes one at a time; that nobody uses the module meanwhile is
//! what whoever loads it promises.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use super::error::AttachError;
use super::reply::{Reply, region_of_word};
use super::table::{Extent, HostTable};
use crate::allocator::Region;
use crate::cpus::Units;
use crate::global::{self, WINDOW_BYTES};
use crate::request::{AllocError, AllocFlags, CpuError, FreeError, FreeFlags, Request};
use crate::static_var::Template;
use crate::this_cpu::process::{self, Method};
use crate::unit::CpuId;

/// Whether this copy of the crate is linked into a module.
#[inline]
pub(crate) fn is_module() -> bool {
    unsafe extern "C" {
        // The linker defines these two for a section whose name is an identifier.
        #[link_name = "__start_pcpu_module_mark"]
        static START: [u8; 0];
        #[link_name = "__stop_pcpu_module_mark"]
        static STOP: [u8; 0];
    }
    /// Nothing, so that the section exists where `module!` put nothing into it.
    #[used]
    #[unsafe(link_section = "pcpu_module_mark")]
    static ANCHOR: [u8; 0] = [];
    core::hint::black_box(&ANCHOR);
    (&raw const START).addr() != (&raw const STOP).addr()
}

/// The host that a module works for.
#[derive(Debug)]
pub(crate) struct Host {
    table: &'static HostTable,
    units: Units,
}

struct Place(UnsafeCell<MaybeUninit<Host>>);

// SAFETY: written while `STATE` is `DETACHED`, and only read while it is `ATTACHED`.
unsafe impl Sync for Place {}

static HOST: Place = Place(UnsafeCell::new(MaybeUninit::uninit()));
static STATE: AtomicU32 = AtomicU32::new(DETACHED);
const DETACHED: u32 = 0;
const ATTACHED: u32 = 1;

/// The host; `None` if this is no module.
///
/// # Panics
/// If this is a module that no host has attached.
pub(crate) fn host() -> Option<&'static Host> {
    if !is_module() {
        return None;
    }
    assert!(
        STATE.load(Ordering::Acquire) == ATTACHED,
        "a module uses per-CPU memory, but no host has attached it (pcpu::module)"
    );
    // SAFETY: written before `STATE` became `ATTACHED`.
    Some(unsafe { (*HOST.0.get()).assume_init_ref() })
}

impl Host {
    pub(crate) fn units(&self) -> &Units {
        &self.units
    }

    pub(crate) fn method(&self) -> Method {
        match self.table.rseq_offset {
            0 => Method::Locked,
            _ => Method::RestartableSequences,
        }
    }

    pub(crate) fn allocate(&self, request: &Request) -> Result<usize, AllocError> {
        let Request {
            bytes,
            align,
            flags,
            owner,
            ..
        } = *request;
        (self.table.allocate)(bytes, align, flags.bits(), owner).result()
    }

    /// # Safety
    /// As `PerCpuAllocator::free_with`.
    pub(crate) unsafe fn free(&self, address: usize, flags: FreeFlags) -> Result<(), FreeError> {
        // SAFETY: the promise of the caller.
        let reply = unsafe { (self.table.free)(address, flags.bits()) };
        reply.result().map(|_| ())
    }

    /// One after the other: hosts of any age serve that. More than one for who may only try is refused, since what had been
    /// allocated could not be freed for certain.
    pub(crate) fn allocate_many(
        &self,
        request: &Request,
        out: &mut [usize],
    ) -> Result<(), AllocError> {
        if request.flags.contains(AllocFlags::TRY) && out.len() > 1 {
            return Err(AllocError::Busy);
        }
        for index in 0..out.len() {
            match self.allocate(request) {
                Ok(address) => out[index] = address,
                Err(error) => {
                    for &address in &out[..index] {
                        // SAFETY: allocated above, for the caller, who never learnt of it.
                        let freed = unsafe { self.free(address, request.free_flags()) };
                        debug_assert_eq!(freed, Ok(()));
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn bring_up(&self, cpu: CpuId) -> Result<(), CpuError> {
        (self.table.bring_up)(cpu.get()).result().map(|_| ())
    }

    pub(crate) fn region(&self, neutral: usize) -> Option<Region> {
        // Never an error: no region is a region of its own there.
        let word = (self.table.region)(neutral).result::<CpuError>();
        region_of_word(word.unwrap_or(0))
    }
}

pub(super) extern "C" fn extent() -> Extent {
    let template = Template::of_this_object();
    Extent {
        bytes: template.bytes,
        align_bytes: template.align_bytes,
    }
}

/// # Safety
/// `copy` is writable over the extent, and nobody else's.
pub(super) unsafe extern "C" fn fill(copy: *mut u8) {
    // SAFETY: the promise of the caller.
    unsafe { Template::of_this_object().write_to(copy) };
}

pub(super) extern "C" fn is_attached() -> u32 {
    STATE.load(Ordering::Acquire)
}

/// # Safety
/// A host's table lies at `host` for good, and at `neutral` there is an area in its instance that `fill` has filled for
/// every possible CPU and that is this module's until it is detached. No other call of this kind is under way.
pub(super) unsafe extern "C" fn attach(host: *const HostTable, neutral: usize) -> Reply {
    // SAFETY: the promise of the caller.
    let attached = unsafe { HostTable::check(host) }.and_then(|host| {
        // SAFETY: the promise of the caller.
        unsafe { attach_to(host, neutral) }
    });
    Reply::new(attached.map(|()| 0))
}

/// # Safety
/// As [`attach`].
unsafe fn attach_to(table: &'static HostTable, neutral: usize) -> Result<(), AttachError> {
    if STATE.load(Ordering::Acquire) == ATTACHED {
        return Err(AttachError::AttachedElsewhere);
    }
    let has_rseq = table.rseq_offset != 0;
    if has_rseq && table.window_bytes != WINDOW_BYTES {
        return Err(AttachError::Window {
            module_bytes: WINDOW_BYTES,
            host_bytes: table.window_bytes,
        });
    }
    if has_rseq && !process::IS_UNLOADABLE && !stay_mapped() {
        return Err(AttachError::NotPinned);
    }
    // SAFETY: the arrays are those of the host's instance (promise of the caller), which stay for good.
    let units = unsafe { Units::of_tables(&table.units) };
    // SAFETY: nobody reads it while `STATE` is `DETACHED`, and nobody else attaches (promise of the caller).
    let units = unsafe { &(*HOST.0.get()).write(Host { table, units }).units };
    global::use_units(Some(units));
    Template::of_this_object().place_at(neutral);
    STATE.store(ATTACHED, Ordering::Release);
    // From here on operations may take the fast way.
    process::adopt(table.rseq_offset, table.stride_bytes);
    Ok(())
}

pub(super) extern "C" fn detach() {
    process::adopt(0, 0);
    STATE.store(DETACHED, Ordering::Release);
    global::use_units(None);
    Template::displace();
}

/// Keeps the library that this copy of the crate is linked into from being unmapped, until the process ends. False if the
/// system does not.
fn stay_mapped() -> bool {
    static HERE: u8 = 0;
    // SAFETY: a structure of integers and pointers.
    let mut info: libc::Dl_info = unsafe { core::mem::zeroed() };
    // SAFETY: the address is one of ours; the answer is written to `info`.
    let is_found = unsafe { libc::dladdr(ptr::from_ref(&HERE).cast(), &mut info) } != 0;
    if !is_found || info.dli_fname.is_null() {
        return false;
    }
    let flags = libc::RTLD_NOW | libc::RTLD_NOLOAD | libc::RTLD_NODELETE;
    // SAFETY: the name is that of a library that is loaded already, so that no code runs.
    let handle = unsafe { libc::dlopen(info.dli_fname, flags) };
    !handle.is_null()
}
