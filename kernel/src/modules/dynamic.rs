//! The initial values of modules' variables that do not lie in the reserved region.
//!
//! Fresh memory is zero on a CPU that comes, so their values are kept in pages of their own, and copied when one comes. Without
//! that a module would have to bring up all possible CPUs.
//!
//! What always holds: a slot that is taken has an area if the area is there, and its pages until it is given back. The boot
//! processor alone loads modules and brings CPUs up.

use lock_api::Mutex;
use pcpu::this_cpu::gs::IrqLock;
use pcpu::unit::CpuId;
use pcpu::{PerCpuPtr, per_cpu_ptr};

use super::PlaceError;
use super::pages::{Code, Pages};
use crate::memory::paging::Access;
use crate::percpu::Kernel;

/// The most areas.
const MAX_AREAS: usize = 8;

static SLOTS: Mutex<IrqLock, [Slot; MAX_AREAS]> = Mutex::new([Slot::Free; MAX_AREAS]);

#[derive(Clone, Copy)]
enum Slot {
    Free,
    /// Values without an area.
    Taken,
    /// An area, and where its values are.
    InUse(PerCpuPtr<u8, Kernel>, Values),
}

#[derive(Clone, Copy)]
struct Values {
    start: usize,
    bytes: usize,
}

/// Initial values that are kept. Dropping it gives their memory back.
pub struct Kept {
    slot: usize,
    bytes: usize,
    pages: Pages,
}

impl Kept {
    /// So many zeroes, of no area so far.
    ///
    /// # Errors
    /// [`PlaceError::Areas`], [`PlaceError::TooLong`], or [`PlaceError::OutOfFrames`].
    pub fn new(bytes: usize) -> Result<Self, PlaceError> {
        let pages = Pages::map(bytes, Access::Read, Code::Near)?;
        let mut slots = SLOTS.lock();
        let slot = slots.iter().position(|slot| matches!(slot, Slot::Free));
        let slot = slot.ok_or(PlaceError::Areas { limit: MAX_AREAS })?;
        slots[slot] = Slot::Taken;
        Ok(Self { slot, bytes, pages })
    }

    /// CPUs that come from here on start from the values in the area.
    pub fn belong_to(&self, area: PerCpuPtr<u8, Kernel>) {
        let values = Values {
            start: self.pages.start(),
            bytes: self.bytes,
        };
        SLOTS.lock()[self.slot] = Slot::InUse(area, values);
    }

    /// The area goes.
    pub fn belong_to_none(&self) {
        SLOTS.lock()[self.slot] = Slot::Taken;
    }

    /// Changes values.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.pages.write(offset, bytes);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        SLOTS.lock()[self.slot] = Slot::Free;
    }
}

/// Writes all values to the copies of a CPU that has memory and has not come yet.
pub fn initialise(cpu: CpuId) {
    let slots = *SLOTS.lock();
    for slot in slots {
        let Slot::InUse(area, values) = slot else {
            continue;
        };
        let copy = per_cpu_ptr(area, cpu).unwrap_or_else(|error| panic!("no copy: {error}"));
        let values_at = core::ptr::with_exposed_provenance::<u8>(values.start);
        // SAFETY: the values are mapped as long as the slot says so, and so is the area, which is as long; nobody uses the copy
        // of a CPU that has not come.
        unsafe {
            copy.as_ptr()
                .copy_from_nonoverlapping(values_at, values.bytes)
        };
    }
}
