//! The template: the section of the static per-CPU variables, as the linker made it.
//!
//! It is mapped read only, and only read while the first chunk is built. After that its address range is all that is
//! needed, for handles; its frames serve as any others do.

use crate::memory::PAGE_BYTES;
use crate::memory::frames;
use crate::memory::image;
use crate::memory::paging::{self, Access};

unsafe extern "C" {
    static __per_cpu_start: [u8; 0];
    static __per_cpu_end: [u8; 0];
}

/// The initial values of all static per-CPU variables. Not to be called after [`give_back`].
pub fn section() -> &'static [u8] {
    let start = &raw const __per_cpu_start;
    let bytes = (&raw const __per_cpu_end).addr() - start.addr();
    // SAFETY: the linker places the section between the two symbols; nothing writes to it.
    unsafe { core::slice::from_raw_parts(start.cast(), bytes) }
}

/// Unmaps the template and frees its frames; returns how many. From here on following a handle is a fault.
///
/// To be called once, when all units are filled and before other CPUs run: they would keep translations.
pub fn give_back() -> usize {
    let pages = image::template().addresses(PAGE_BYTES as u64);
    pages
        .map(|address| {
            // SAFETY: only the builder of the first chunk ever followed these addresses. The frame is RAM that nothing
            // uses any more, so it may be written through the physical map and handed out.
            unsafe {
                let frame = paging::unmap(address as usize);
                paging::set_physical_access(frame, Access::ReadWrite);
                frames::free(frame);
            }
        })
        .count()
}
