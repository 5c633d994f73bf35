//! The atomic words that are changed without the allocator's lock, and what more it takes to order them.
//!
//! They are the processor's. The models (`src/models.rs`) run the same code on loom's, which show it every order that the
//! language allows.

#[cfg(not(all(loom, test)))]
pub(crate) use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

#[cfg(all(loom, test))]
pub(crate) use crate::models::{
    AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering, word_at, words_at,
};

/// Orders the LOCKed step that comes before it in its thread before the loads that come after it.
#[inline]
pub(crate) fn full_fence() {
    // On x86 a LOCKed step orders all that is before it and behind it.
    #[cfg(all(not(target_arch = "x86_64"), not(all(loom, test))))]
    core::sync::atomic::fence(Ordering::SeqCst);
    // Loom knows of no such processor.
    #[cfg(all(loom, test))]
    loom::sync::atomic::fence(Ordering::SeqCst);
}

/// Two words in a CPU's unit.
///
/// # Safety
/// They live at the address as long as the result, aligned, and are changed as atomic words only.
#[cfg(not(all(loom, test)))]
#[inline(always)]
pub(crate) unsafe fn words_at<'a>(address: usize) -> &'a [AtomicU64; 2] {
    // SAFETY: the promise of the caller.
    unsafe { &*core::ptr::with_exposed_provenance(address) }
}

/// A word in a CPU's unit.
///
/// # Safety
/// As [`words_at`].
#[cfg(not(all(loom, test)))]
#[inline(always)]
pub(crate) unsafe fn word_at<'a>(address: usize) -> &'a AtomicU64 {
    // SAFETY: the promise of the caller.
    unsafe { &*core::ptr::with_exposed_provenance(address) }
}
