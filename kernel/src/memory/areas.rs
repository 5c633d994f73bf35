//! Areas for as long as the kernel runs, of frames side by side in an address window.

use core::sync::atomic::{AtomicUsize, Ordering};

use pcpu::unit::NodeId;
use zerocopy::FromZeros;

use super::paging::{self, Access};
use super::{AREAS, PAGE_BYTES};

static NEXT: AtomicUsize = AtomicUsize::new(AREAS);

/// Addresses for so many pages, which are nobody else's and where nothing is mapped.
pub fn addresses(pages: usize) -> usize {
    NEXT.fetch_add(pages * PAGE_BYTES, Ordering::Relaxed)
}

/// So many zeroed values, in memory of node 0 or near it.
///
/// # Panics
/// If there is no memory for them.
pub fn zeroed<T: FromZeros>(count: usize) -> &'static [T] {
    made(count, |_| T::new_zeroed())
}

/// So many values, made by `make` of their numbers, in memory of node 0 or near it.
///
/// # Panics
/// If there is no memory for them.
pub fn made<T>(count: usize, make: impl Fn(usize) -> T) -> &'static mut [T] {
    const { assert!(align_of::<T>() <= PAGE_BYTES) };
    let bytes = (count * size_of::<T>()).next_multiple_of(PAGE_BYTES);
    let start = addresses(bytes / PAGE_BYTES);
    for page in (start..start + bytes).step_by(PAGE_BYTES) {
        paging::map_new(page, NodeId::new(0), Access::ReadWrite)
            .unwrap_or_else(|_| panic!("no memory for an area of {bytes} bytes"));
    }
    let first = core::ptr::with_exposed_provenance_mut::<T>(start);
    for index in 0..count {
        // SAFETY: just mapped, to be written, with room for so many.
        unsafe { first.add(index).write(make(index)) };
    }
    // SAFETY: mapped for good, all of them written, and nobody else's.
    unsafe { core::slice::from_raw_parts_mut(first, count) }
}
