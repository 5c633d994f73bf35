//! Modules: code that is loaded and unloaded, with per-CPU variables of its own.
//!
//! A module is a relocatable object. Its section `.data..percpu` is a template like the kernel's own: it gets an area of
//! the per-CPU allocator, whose address is where the loader takes the section to be, and every CPU's copy gets the
//! section's contents. From then on its variables are like any others: the kernel's `gs:` instruction reaches them, and so
//! do other modules. The area comes from the reserved region, or, since all handles lie within 2 GiB of all code, from
//! wherever there is room.

use pcpu::{
    AllocError, AllocFlags, CpuCell, CpuError, Domain, FreeFlags, Handle, PerCpuPtr, Request,
    alloc_percpu_bytes, define_per_cpu_in, free_percpu_with,
};

use crate::percpu::Kernel;

mod loader;
mod object;
mod pages;

pub use loader::{LoadError, Module, PlaceError};

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

impl PerCpuArea {
    /// Writes to the copy of every possible CPU. What lies in the reserved region is an initial value as those of the kernel's
    /// own variables are, and CPUs that come later start from it. Elsewhere all copies start as zeroes: CPUs that never came
    /// get memory for it.
    ///
    /// # Errors
    /// [`CpuError`]: a CPU has no memory.
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), CpuError> {
        let allocator = Kernel::allocator();
        let start = self.start.neutral() + offset;
        match self.placement {
            Placement::Reserved => self.set_initial(offset, bytes),
            Placement::Dynamic => {
                let mut possible = allocator.units().possible().iter();
                possible.try_for_each(|cpu| allocator.bring_up(cpu))?;
            }
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
        if self.placement == Placement::Reserved {
            for offset in 0..self.bytes {
                self.set_initial(offset, &[0]);
            }
        }
        let flags = match self.placement {
            Placement::Reserved => FreeFlags::RESERVED,
            Placement::Dynamic => FreeFlags::empty(),
        };
        // SAFETY: the module is gone, and with it whoever used its variables.
        let freed = unsafe { free_percpu_with(self.start, flags) };
        assert_eq!(freed, Ok(()), "the area of a module");
    }
}
