//! Modules: code that is loaded and unloaded, with per-CPU variables of its own.
//!
//! A module is a relocatable object. Its section `.data..percpu` is a template like the kernel's own: it gets an area of
//! the per-CPU allocator, whose address is where the loader takes the section to be, and every CPU's copy gets the
//! section's contents. From then on its variables are like any others: the kernel's `gs:` instruction reaches them, and so
//! do other modules. The area comes from the reserved region, or, since all handles lie within 2 GiB of all code, from
//! wherever there is room.

use pcpu::{
    AllocError, AllocFlags, FreeFlags, PerCpuPtr, Request, alloc_percpu_bytes, free_percpu_with,
};

use crate::percpu::Kernel;
use crate::percpu::gs::PerCpuVar;

mod loader;
mod pages;

pub use loader::{LoadError, Module};

/// Counts of modules, a variable of the kernel's.
#[unsafe(link_section = ".data..percpu")]
pub static SHARED_HITS: PerCpuVar<u64> = PerCpuVar::new(0);

/// What the kernel lets modules use: names and addresses.
fn exported(name: &str) -> Option<usize> {
    match name {
        "SHARED_HITS" => Some((&raw const SHARED_HITS).addr()),
        _ => None,
    }
}

/// Where a module's per-CPU variables come to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// In the region that is reserved for modules.
    Reserved,
    /// Anywhere.
    Dynamic,
}

/// The area of a module's per-CPU variables.
struct PerCpuArea {
    start: PerCpuPtr<u8, Kernel>,
    bytes: usize,
    placement: Placement,
}

impl PerCpuArea {
    fn allocate(bytes: usize, align: usize, placement: Placement) -> Result<Self, AllocError> {
        let flags = match placement {
            Placement::Reserved => AllocFlags::RESERVED,
            Placement::Dynamic => AllocFlags::empty(),
        };
        let start = alloc_percpu_bytes(&Request::new(bytes, align).with_flags(flags))?;
        Ok(Self {
            start,
            bytes,
            placement,
        })
    }
}

impl Drop for PerCpuArea {
    fn drop(&mut self) {
        let flags = match self.placement {
            Placement::Reserved => FreeFlags::RESERVED,
            Placement::Dynamic => FreeFlags::empty(),
        };
        // SAFETY: the module is gone, and with it whoever used its variables.
        let freed = unsafe { free_percpu_with(self.start, flags) };
        assert_eq!(freed, Ok(()), "the area of a module");
    }
}
