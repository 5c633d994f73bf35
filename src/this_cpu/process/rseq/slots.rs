//! Operations on runs of slots: a section tests the gate and what run it is, and ends with the store of the word that says
//! which slots are free. A run is opened and closed by a store of both words.

use core::arch::asm;
use core::arch::x86_64::{__m128i, _mm_set_epi64x};
use core::sync::atomic::AtomicU32;

use super::super::Outcome;
use super::{Way, leave};
use crate::global::WINDOW_BYTES;
use crate::this_cpu::Pair;
use crate::this_cpu::slots::{FRESH, ONE_TAKEN, Put};

/// Takes the lowest free slot of the current CPU's run, if there is one to be had; results in what the pair was. `None` if
/// the slow way must be taken, and then nothing has happened.
///
/// # Safety
/// As [`LocalOps::take_slot`](crate::this_cpu::LocalOps::take_slot).
#[inline(always)]
pub(in super::super) unsafe fn take_slot(
    way: Way,
    at: usize,
    class: u64,
    class_mask: u64,
    gate: &AtomicU32,
) -> Option<Option<Pair>> {
    let way = way.open()?;
    // The first word: positive if a slot was taken, 0 if none could be, negative if the CPU has no memory.
    let (slots, run): (i64, u64);
    // SAFETY: as in `store`; the gate is a live word, read in one piece.
    unsafe {
        section!(way, [
                "6f",
                "6:",
                "mov {slots}, -1",
                "jmp 4b",
                "7:",
                "xor {slots:e}, {slots:e}",
                "jmp 4b"
            ], [
                "cmp dword ptr [{gate}], 0",
                "jne 7f",
                "mov {run}, qword ptr [{at} + {t} + {unit_0} + 8]",
                "mov {next}, {run}",
                "and {next}, {class_mask}",
                "cmp {next}, {class}",
                "jne 7f",
                "mov {slots}, qword ptr [{at} + {t} + {unit_0}]",
                "test {slots:e}, {slots:e}",
                "jz 7f",
                // The lowest bit goes. The uppermost one stays: it says that the count has overflowed.
                "lea {next}, [{slots} - 1]",
                "and {next}, {slots}",
                "js 7f",
                "add {next}, {one_taken}",
                "mov qword ptr [{at} + {t} + {unit_0}], {next}",
            ],
            at = in(reg) at, class = in(reg) class, class_mask = in(reg) class_mask,
            gate = in(reg) gate.as_ptr(), one_taken = in(reg) ONE_TAKEN,
            slots = out(reg) slots, run = out(reg) run, next = out(reg) _,
            options(nostack));
    }
    match slots {
        1.. => Some(Some([slots as u64, run])),
        0 => Some(None),
        ..0 => None,
    }
}

/// Puts a slot back into the current CPU's run; `None` if the slow way must be taken, and then nothing has happened.
///
/// # Safety
/// As [`LocalOps::put_slot`](crate::this_cpu::LocalOps::put_slot).
#[inline(always)]
pub(in super::super) unsafe fn put_slot(
    way: Way,
    at: usize,
    run: u64,
    slot: u64,
    gate: &AtomicU32,
) -> Option<Put> {
    let way = way.open()?;
    // SAFETY: as in `take_slot`.
    unsafe {
        section!(way, ["{slow}"], [
                "cmp dword ptr [{gate}], 0",
                "jne {elsewhere}",
                "cmp qword ptr [{at} + {t} + {unit_0} + 8], {run}",
                "jne {elsewhere}",
                "mov {slots}, qword ptr [{at} + {t} + {unit_0}]",
                "btr {slots}, {fresh}",
                "test {slots}, {slot}",
                "jnz {was_free}",
                // Which slot it is, is known last.
                "or {slots}, {slot}",
                "mov qword ptr [{at} + {t} + {unit_0}], {slots}",
            ],
            at = in(reg) at, run = in(reg) run, slot = in(reg) slot, gate = in(reg) gate.as_ptr(),
            fresh = const FRESH.trailing_zeros(), slots = out(reg) _,
            slow = label { leave(way.rseq); return None },
            was_free = label { leave(way.rseq); return Some(Put::WasFree) },
            elsewhere = label { leave(way.rseq); return Some(Put::Elsewhere) },
            options(nostack));
    }
    Some(Put::Done)
}

/// Replaces the current CPU's copy of a pair if it is `old` and `gate` is 0.
///
/// # Safety
/// As [`LocalOps::replace_pair_gated`](crate::this_cpu::LocalOps::replace_pair_gated).
#[inline(always)]
pub(in super::super) unsafe fn replace_pair_gated(
    way: Way,
    at: usize,
    old: Pair,
    new: Pair,
    gate: &AtomicU32,
) -> Outcome {
    let Some(way) = way.open() else {
        return Outcome::NoMemory;
    };
    // SAFETY: every x86_64 has these registers.
    let new: __m128i = unsafe { _mm_set_epi64x(new[1] as i64, new[0] as i64) };
    // SAFETY: as in `take_slot`.
    unsafe {
        section!(way, ["{slow}"], [
                "cmp dword ptr [{gate}], 0",
                "jne {refused}",
                "cmp qword ptr [{at} + {t} + {unit_0}], {old_first}",
                "jne {refused}",
                "cmp qword ptr [{at} + {t} + {unit_0} + 8], {old_second}",
                "jne {refused}",
                "movdqa xmmword ptr [{at} + {t} + {unit_0}], {new}",
            ],
            at = in(reg) at, gate = in(reg) gate.as_ptr(), old_first = in(reg) old[0],
            old_second = in(reg) old[1], new = in(xmm_reg) new,
            slow = label { leave(way.rseq); return Outcome::NoMemory },
            refused = label { leave(way.rseq); return Outcome::Refused },
            options(nostack));
    }
    Outcome::Done
}
