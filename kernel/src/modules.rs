//! Modules: code that is loaded and unloaded, with per-CPU variables of its own.
//!
//! A module is a relocatable object. Its section `.data..percpu` is a template like the kernel's own: it gets an area of
//! the per-CPU allocator, whose address is where the loader takes the section to be, and every CPU's copy gets the
//! section's contents. From then on its variables are like any others: the kernel's `gs:` instruction reaches them, and so
//! do other modules.
//!
//! The area comes from the reserved region, or from wherever there is room: handles lie close together, so that code that reaches
//! one with 32 bits reaches all. Code that lies far away uses 64 ([`Code::Far`]).
//!
//! What always holds: a CPU that comes later finds the initial values, too. Those of the reserved region are kept by the page
//! tables' part of the library; those of other areas are kept here ([`dynamic`]).

use pcpu::{
    AllocFlags, CpuCell, CpuError, Domain, FreeFlags, Handle, PerCpuPtr, Request,
    alloc_percpu_bytes, define_per_cpu_in, free_percpu_with,
};

use self::dynamic::Kept;
use crate::percpu::Kernel;

mod dynamic;
mod error;
mod loader;
mod object;
mod pages;

pub use dynamic::initialise;
pub use error::{LoadError, PlaceError};
pub use loader::Module;
pub use pages::Code;

define_per_cpu_in! {
    in Kernel;

    /// Counts of modules, a variable of the kernel's.
    pub static SHARED_HITS: CpuCell<u64> = CpuCell::new(0);
}

/// What the kernel lets modules use: names and addresses.
fn exported(name: &str) -> Option<usize> {
    match name {
        "SHARED_HITS" => Some(SHARED_HITS.handle().neutral()),
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
    values: Values,
}

/// Who keeps the initial values.
enum Values {
    /// The page tables' part of the library.
    Reserved,
    /// This kernel.
    Dynamic(Kept),
}

impl PerCpuArea {
    fn allocate(bytes: usize, align: usize, placement: Placement) -> Result<Self, PlaceError> {
        let flags = match placement {
            Placement::Reserved => AllocFlags::RESERVED,
            Placement::Dynamic => AllocFlags::empty(),
        };
        let start = alloc_percpu_bytes(&Request::new(bytes, align).with_flags(flags))?;
        let values = match placement {
            Placement::Reserved => Values::Reserved,
            Placement::Dynamic => Values::Dynamic(Kept::new(bytes).inspect_err(|_| {
                // SAFETY: nobody knows of it yet.
                let freed = unsafe { free_percpu_with(start, FreeFlags::empty()) };
                assert_eq!(freed, Ok(()), "just allocated");
            })?),
        };
        if let Values::Dynamic(kept) = &values {
            kept.belong_to(start);
        }
        Ok(Self {
            start,
            bytes,
            values,
        })
    }

    /// Writes to the copy of every CPU that has memory, and to the initial values. Until a CPU comes, its copies show the initial
    /// values in the reserved region, and zeroes elsewhere.
    ///
    /// # Errors
    /// [`CpuError`]: a CPU has no copy.
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), CpuError> {
        let allocator = Kernel::allocator();
        let start = self.start.neutral() + offset;
        match &self.values {
            Values::Reserved => self.set_initial(offset, bytes),
            Values::Dynamic(kept) => kept.write(offset, bytes),
        }
        for cpu in allocator.units().materialised().iter() {
            let copy = allocator.per_cpu_address(start, cpu)?;
            let copy = core::ptr::with_exposed_provenance_mut::<u8>(copy);
            // SAFETY: within the module's area, which nobody uses yet, on a CPU that has memory.
            unsafe { copy.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
        Ok(())
    }

    fn set_initial(&self, offset: usize, bytes: &[u8]) {
        let memory = Kernel::allocator().backing();
        // SAFETY: the boot processor alone loads modules, and brings CPUs up; nobody uses the area now.
        let set = unsafe { memory.set_initial(self.start.neutral() + offset, bytes) };
        set.unwrap_or_else(|error| panic!("an area of the reserved region: {error}"));
    }
}

impl Drop for PerCpuArea {
    fn drop(&mut self) {
        let flags = match &self.values {
            Values::Reserved => {
                for offset in 0..self.bytes {
                    self.set_initial(offset, &[0]);
                }
                FreeFlags::RESERVED
            }
            Values::Dynamic(kept) => {
                kept.belong_to_none();
                FreeFlags::empty()
            }
        };
        // SAFETY: the module is gone, and with it whoever used its variables.
        let freed = unsafe { free_percpu_with(self.start, flags) };
        assert_eq!(freed, Ok(()), "the area of a module");
    }
}
