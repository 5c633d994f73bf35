//! Freeing as tests do it: areas of their own, once they are done with them, and addresses that are to be refused.

use lock_api::RawMutex;
use pcpu::backing::Backing;
use pcpu::{FreeError, FreeFlags, PerCpuAllocator};

/// An instance that a test frees from.
pub trait FreeArea {
    /// Frees what a test allocated and uses no more; any other address is refused.
    fn free_area(&self, address: usize, flags: FreeFlags) -> Result<(), FreeError>;
}

impl<B: Backing, R: RawMutex> FreeArea for PerCpuAllocator<B, R> {
    fn free_area(&self, address: usize, flags: FreeFlags) -> Result<(), FreeError> {
        // SAFETY: no test frees another's areas, nor looks at the copies of an area that it has freed.
        unsafe { self.free_with(address, flags) }
    }
}
