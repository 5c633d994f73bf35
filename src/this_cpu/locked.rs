//! Operations of several words on a copy at an address, for homes without a way to do them on the current CPU as one
//! step: by LOCKed steps, right on whichever CPU the caller is.
//!
//! A pair is exchanged by one such step. A buffer has no step that suffices: its word of used bytes has a bit that
//! says *in work*, and whoever finds it set waits.

use core::sync::atomic::{AtomicU64, Ordering};

#[cfg(not(target_arch = "x86_64"))]
use portable_atomic::AtomicU128;

use super::buffer::DATA_OFFSET_BYTES;
use super::{Pair, Word, slots};

/// In a buffer's word of used bytes: somebody works on the buffer.
const IN_WORK: u64 = 1 << 63;

/// Replaces a pair if it is `old`; returns what it was.
///
/// # Safety
/// `copy` points to a live pair, aligned to 16 bytes, that is only changed by such steps.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn replace_pair(copy: *mut Pair, old: Pair, new: Pair) -> Pair {
    let [mut low, mut high] = old;
    // SAFETY: live and aligned (promise of the caller). rbx, which holds the low half of the new pair, is not to be had as an
    // operand: it is exchanged for the time being.
    unsafe {
        core::arch::asm!(
            "xchg rsi, rbx",
            "lock cmpxchg16b xmmword ptr [rdi]",
            "mov rbx, rsi",
            in("rdi") copy,
            inout("rsi") new[0] => _,
            in("rcx") new[1],
            inout("rax") low,
            inout("rdx") high,
            options(nostack)
        );
    }
    [low, high]
}

/// Replaces a pair if it is `old`; returns what it was.
///
/// # Safety
/// `copy` points to a live pair, aligned to 16 bytes, that is only changed by such steps.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn replace_pair(copy: *mut Pair, old: Pair, new: Pair) -> Pair {
    let wide = |pair: Pair| -> u128 { zerocopy::transmute!(pair) };
    // SAFETY: live and aligned (promise of the caller).
    let copy = unsafe { AtomicU128::from_ptr(copy.cast()) };
    let found = copy
        .compare_exchange(wide(old), wide(new), Ordering::Relaxed, Ordering::Relaxed)
        .unwrap_or_else(|found| found);
    zerocopy::transmute!(found)
}

/// Both words of a pair, each read whole.
///
/// # Safety
/// `copy` points to a live pair, aligned to 16 bytes.
pub(crate) unsafe fn peek_pair(copy: *const Pair) -> Pair {
    let word = copy.cast::<u64>();
    // SAFETY: live and aligned (promise of the caller).
    unsafe { [u64::load(word), u64::load(word.add(1))] }
}

/// Replaces a pair if it is `old`, and says whether it was; the step of whoever opens and closes runs.
///
/// # Safety
/// As [`replace_pair`].
pub(crate) unsafe fn is_replaced(copy: *mut Pair, old: Pair, new: Pair) -> bool {
    // SAFETY: the promise of the caller.
    unsafe { slots::replace_by(|| replace_pair(copy, old, new), old) }
}

/// A buffer that is worked on by the caller alone.
struct InWork<'a> {
    used: &'a AtomicU64,
    /// How many bytes are used; will be stored at the end.
    bytes: u64,
}

impl<'a> InWork<'a> {
    /// Waits until nobody works on the buffer.
    ///
    /// # Safety
    /// `copy` points to a live buffer that is only worked on by the functions of this file.
    unsafe fn begin(copy: *mut u64, relax: impl Fn()) -> Self {
        // SAFETY: a buffer begins with its word (promise of the caller).
        let used: &'a AtomicU64 = unsafe { AtomicU64::from_ptr(copy) };
        loop {
            let before = used.fetch_or(IN_WORK, Ordering::Acquire);
            if before & IN_WORK == 0 {
                return Self {
                    used,
                    bytes: before,
                };
            }
            relax();
        }
    }
}

impl Drop for InWork<'_> {
    fn drop(&mut self) {
        self.used.store(self.bytes, Ordering::Release);
    }
}

/// Appends to a buffer; false if it has no room for all.
///
/// # Safety
/// `copy` points to a live buffer of `capacity_bytes` that is only worked on by the functions of this file; `source` to
/// as many bytes.
pub(crate) unsafe fn append(
    copy: *mut u64,
    source: *const u8,
    bytes: usize,
    capacity_bytes: usize,
    relax: impl Fn(),
) -> bool {
    // SAFETY: the promise of the caller.
    let mut buffer = unsafe { InWork::begin(copy, relax) };
    let used_bytes = buffer.bytes as usize;
    let has_room = bytes <= capacity_bytes - used_bytes;
    if has_room {
        // SAFETY: the place lies within the buffer, and is the caller's while the buffer is in work.
        unsafe {
            let place = copy.cast::<u8>().add(DATA_OFFSET_BYTES).add(used_bytes);
            place.copy_from_nonoverlapping(source, bytes);
        }
        buffer.bytes += bytes as u64;
    }
    has_room
}

/// Moves all that a buffer holds to `out`; returns how many bytes it is.
///
/// # Safety
/// `copy` points to a live buffer that is only worked on by the functions of this file; `out` to as much room as the
/// buffer has.
pub(crate) unsafe fn take(copy: *mut u64, out: *mut u8, relax: impl Fn()) -> usize {
    // SAFETY: the promise of the caller.
    let mut buffer = unsafe { InWork::begin(copy, relax) };
    let used_bytes = buffer.bytes as usize;
    // SAFETY: these bytes are the buffer's, and `out` has room for them (promise of the caller).
    unsafe {
        let data = copy.cast::<u8>().add(DATA_OFFSET_BYTES);
        out.copy_from_nonoverlapping(data, used_bytes);
    }
    buffer.bytes = 0;
    used_bytes
}
