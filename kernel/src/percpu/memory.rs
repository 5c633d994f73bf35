//! What this kernel lends the per-CPU memory: frames from the CPU's node or the nearest other one, and the shootdown.

use pcpu::backing::paging::{Frames, Shootdown, Stale};
use pcpu::unit::NodeId;
use x86_64::structures::paging::PhysFrame;

use crate::cpus::shootdown;
use crate::machine::machine;
use crate::memory::frames;

/// The kernel's memory.
#[derive(Clone, Copy, Debug)]
pub struct KernelMemory;

// SAFETY: every frame is handed out once until it is freed. All of RAM is in the physical map, and no free frame is read only
// there: the image's are kept, but for the template's, whose access is changed before they are free.
unsafe impl Frames for KernelMemory {
    fn allocate(&self, node: NodeId) -> Option<PhysFrame> {
        frames::allocate_on(node)
    }

    unsafe fn free(&self, frame: PhysFrame) {
        // SAFETY: the promise of the caller.
        unsafe { frames::free(frame) };
    }

    fn fall_back(&self, node: NodeId, nth: u32) -> Option<NodeId> {
        machine().nearest_node(node, nth)
    }
}

// SAFETY: every CPU that runs has flushed what is stale when this returns, and one that comes begins with nothing. There are
// no global pages and no PCIDs.
unsafe impl Shootdown for KernelMemory {
    fn flush(&self, stale: Stale<'_>) {
        shootdown::flush(stale);
    }
}
