//! Operations with a condition that is tested within the section.

use core::arch::asm;
use core::sync::atomic::AtomicU32;

use super::super::Outcome;
use super::{Way, leave};
use crate::global::WINDOW_BYTES;

/// Adds to the current CPU's copy, a signed number, if that leaves it at `bound` or less from 0.
///
/// # Safety
/// As [`LocalOps::change`](crate::this_cpu::LocalOps::change).
#[inline(always)]
pub(in super::super) unsafe fn add_within(way: Way, at: usize, value: u64, bound: u64) -> Outcome {
    let Some(way) = way.open() else {
        return Outcome::NoMemory;
    };
    // -bound <= sum <= bound, as one unsigned comparison.
    let shifted_value = value.wrapping_add(bound);
    let shifted_limit = bound.wrapping_mul(2);
    // SAFETY: as in `store`.
    unsafe {
        section!(way, ["{slow}"], [
                "mov {shifted_sum}, qword ptr [{at} + {t} + {unit_0}]",
                "add {shifted_sum}, {shifted_value}",
                "cmp {shifted_sum}, {shifted_limit}",
                "ja {refused}",
                "add qword ptr [{at} + {t} + {unit_0}], {value}",
            ],
            at = in(reg) at, value = in(reg) value,
            shifted_value = in(reg) shifted_value, shifted_limit = in(reg) shifted_limit,
            shifted_sum = out(reg) _,
            slow = label { leave(way.rseq); return Outcome::NoMemory },
            refused = label { leave(way.rseq); return Outcome::Refused },
            options(nostack));
    }
    Outcome::Done
}

/// Adds to the current CPU's copy if `gate` is 0.
///
/// # Safety
/// As [`LocalOps::change`](crate::this_cpu::LocalOps::change).
#[inline(always)]
pub(in super::super) unsafe fn add_gated(
    way: Way,
    at: usize,
    value: u64,
    gate: &AtomicU32,
) -> Outcome {
    let Some(way) = way.open() else {
        return Outcome::NoMemory;
    };
    // SAFETY: as in `store`; the gate is a live word, read in one piece.
    unsafe {
        section!(way, ["{slow}"], [
                "cmp dword ptr [{gate}], 0",
                "jne {refused}",
                "add qword ptr [{at} + {t} + {unit_0}], {value}",
            ],
            at = in(reg) at, value = in(reg) value, gate = in(reg) gate.as_ptr(),
            slow = label { leave(way.rseq); return Outcome::NoMemory },
            refused = label { leave(way.rseq); return Outcome::Refused },
            options(nostack));
    }
    Outcome::Done
}

/// Takes the lock in the current CPU's copy; `None` if the slow way must be taken, and then nothing has happened.
///
/// # Safety
/// As `ProcessOps::acquire`.
#[inline(always)]
pub(in super::super) unsafe fn acquire(way: Way, at: usize, owner: u64) -> Option<(*mut u64, u64)> {
    let way = way.open()?;
    let mut is_open = 1_u32;
    let (copy, found): (usize, u64);
    commit!(way, at, is_open, [
        "lea {copy}, [{at} + {t} + {unit_0}]",
        "mov {found:e}, 1",
        "cmp dword ptr [{copy} + 8], 0",
        "jne 4f",
        "mov {found}, qword ptr [{copy}]",
        "test {found}, {found}",
        "jnz 4f",
        "mov qword ptr [{copy}], {owner}"
    ], copy = out(reg) copy, found = out(reg) found, owner = in(reg) owner,);
    (is_open != 0).then_some((core::ptr::with_exposed_provenance_mut(copy), found))
}
