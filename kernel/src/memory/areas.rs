//! Areas for as long as the kernel runs, of frames side by side in an address window.

use core::sync::atomic::{AtomicUsize, Ordering};

use pcpu::unit::NodeId;
use zerocopy::FromZeros;

use super::paging::{self, Access};
use super::{AREAS, PAGE_BYTES};

static NEXT: AtomicUsize = AtomicUsize::new(AREAS);

/// So many zeroed values, in memory of node 0 or near it.
///
/// # Panics
/// If there is no memory for them.
pub fn zeroed<T: FromZeros>(count: usize) -> &'static [T] {
    const { assert!(align_of::<T>() <= PAGE_BYTES) };
    let bytes = (count * size_of::<T>()).next_multiple_of(PAGE_BYTES);
    let start = NEXT.fetch_add(bytes, Ordering::Relaxed);
    for page in (start..start + bytes).step_by(PAGE_BYTES) {
        paging::map_new(page, NodeId::new(0), Access::ReadWrite)
            .unwrap_or_else(|_| panic!("no memory for an area of {bytes} bytes"));
        // SAFETY: just mapped, to be written.
        unsafe { core::ptr::with_exposed_provenance_mut::<u8>(page).write_bytes(0, PAGE_BYTES) };
    }
    // SAFETY: mapped for good, zeroed, which is a value of the type, and nobody else's.
    unsafe { core::slice::from_raw_parts(core::ptr::with_exposed_provenance(start), count) }
}
