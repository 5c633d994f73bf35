//! The address window of the chunks, and the frames in it.
//!
//! ```text
//!   | chunk 0: unit 0, unit 1, ... | chunk 1: unit 0, unit 1, ... | ...      every unit in frames of its CPU's node
//! ```
//! A kernel with a backing that maps on demand needs none of this. Here all chunks have all their memory from the start,
//! as [`Contig`] wants it: what looks contiguous is put together of frames from several nodes.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use pcpu::backing::contig::Contig;
use pcpu::page::PageMemory;
use pcpu::unit::{Contents, NodeId, UnitId, UnitPlan};

use crate::irq_lock::IrqLock;
use crate::memory::paging::{self, Access, OutOfFrames};
use crate::memory::{PAGE_BYTES, PER_CPU_METADATA, PER_CPU_WINDOW, frames};

/// How many chunks there is memory for, the first one included.
const CHUNKS: usize = 4;

/// The window, while its frames are mapped.
pub struct ChunkWindow {
    unit_bytes: usize,
    chunk_bytes: usize,
}

impl ChunkWindow {
    /// The window for the units of a plan; nothing is mapped yet.
    pub fn new(plan: &UnitPlan<'_>) -> Self {
        let unit_bytes = plan.sizes().unit_bytes();
        Self {
            unit_bytes,
            chunk_bytes: unit_bytes * plan.nr_units() as usize,
        }
    }

    /// Maps what is not mapped yet, and the metadata; makes the backing of both.
    ///
    /// # Panics
    /// If memory does not suffice.
    pub fn into_contig(self, plan: &UnitPlan<'_>, neutral_base: usize) -> Contig<IrqLock> {
        let bytes = CHUNKS * self.chunk_bytes;
        for address in (PER_CPU_WINDOW..PER_CPU_WINDOW + bytes).step_by(PAGE_BYTES) {
            if paging::physical_address(address).is_none() {
                map_or_panic(address, self.node(plan, address));
            }
        }
        // Per chunk 2 bits for each 4 bytes of a unit and less than 64 bytes a page, and as much for the tables.
        let metadata_bytes = ((CHUNKS + 3) * (self.unit_bytes / 16 + self.unit_bytes / 64)
            + (64 << 10))
            .next_multiple_of(PAGE_BYTES);
        for address in (PER_CPU_METADATA..PER_CPU_METADATA + metadata_bytes).step_by(PAGE_BYTES) {
            map_or_panic(address, NodeId::new(0));
        }
        // SAFETY: both ranges are mapped, to be read and written, for good, and used by nothing else.
        let (memory, metadata) = unsafe {
            (
                memory(PER_CPU_WINDOW, bytes),
                memory(PER_CPU_METADATA, metadata_bytes),
            )
        };
        Contig::new(memory, metadata, plan, neutral_base)
            .unwrap_or_else(|error| panic!("no backing: {error}"))
    }

    /// The node of the CPU whose unit has an address. Unused units are on node 0.
    fn node(&self, plan: &UnitPlan<'_>, address: usize) -> NodeId {
        let unit = (address - PER_CPU_WINDOW) % self.chunk_bytes / self.unit_bytes;
        plan.cpu_of_unit(UnitId::new(unit as u32))
            .and_then(|cpu| plan.node_of_cpu(cpu))
            .unwrap_or(NodeId::new(0))
    }
}

// SAFETY: the window is nobody else's, and handed out once; a page that is mapped has a frame of its own.
unsafe impl PageMemory for ChunkWindow {
    type Error = OutOfFrames;

    fn page_bytes(&self) -> usize {
        PAGE_BYTES
    }

    fn contents(&self) -> Contents {
        Contents::Dirty
    }

    fn reserve_window(&mut self, _bytes: usize) -> Result<NonNull<u8>, OutOfFrames> {
        let start = core::ptr::with_exposed_provenance_mut(PER_CPU_WINDOW);
        Ok(NonNull::new(start).expect("the window does not begin at 0"))
    }

    unsafe fn map_new_page(
        &mut self,
        node: NodeId,
        address: NonNull<u8>,
    ) -> Result<(), OutOfFrames> {
        paging::map_new(address.as_ptr().addr(), node, Access::ReadWrite)?;
        Ok(())
    }

    unsafe fn unmap_page(&mut self, address: NonNull<u8>) {
        // SAFETY: mapped above and not used any more (promise of the caller); only the boot processor runs.
        unsafe { frames::free(paging::unmap(address.as_ptr().addr())) };
    }

    unsafe fn release_window(&mut self, _base: NonNull<u8>, _bytes: usize) {}
}

fn map_or_panic(address: usize, node: NodeId) {
    paging::map_new(address, node, Access::ReadWrite)
        .unwrap_or_else(|_| panic!("no memory for the per-CPU areas at {address:#x}, node {node}"));
}

/// # Safety
/// The range is mapped for good, and nothing else uses it.
unsafe fn memory(start: usize, bytes: usize) -> &'static mut [MaybeUninit<u8>] {
    let start = core::ptr::with_exposed_provenance_mut(start);
    // SAFETY: the promise of the caller.
    unsafe { core::slice::from_raw_parts_mut(start, bytes) }
}
