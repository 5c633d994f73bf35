//! Operations on more than one word: pairs, stacks, buffers. Whatever a section writes before its last instruction lies where
//! nobody looks until that instruction has made it visible.

use core::arch::asm;
use core::arch::x86_64::{__m128i, _mm_set_epi64x};

use super::super::Outcome;
use super::{Way, leave};
use crate::global::WINDOW_BYTES;
use crate::this_cpu::Pair;
use crate::this_cpu::buffer::DATA_OFFSET_BYTES;

/// Reads the current CPU's copy of a pair; `None` if the slow way must be taken. Announced like a change, so that both
/// words are of one time.
///
/// # Safety
/// As [`LocalOps::read_pair`](crate::this_cpu::LocalOps::read_pair).
#[inline(always)]
pub(in super::super) unsafe fn read_pair(way: Way, at: usize) -> Option<Pair> {
    let way = way.open()?;
    let (mut is_open, first, second) = (1_u32, 0_u64, 0_u64);
    let (first_found, second_found): (u64, u64);
    commit!(way, at, is_open, [
        "mov {first}, qword ptr [{at} + {t} + {unit_0}]",
        "mov {second}, qword ptr [{at} + {t} + {unit_0} + 8]"
    ], first = inout(reg) first => first_found, second = inout(reg) second => second_found,);
    (is_open != 0).then_some([first_found, second_found])
}

/// Replaces the current CPU's copy of a pair if it is `old`, and returns what it was; `None` if the slow way must be
/// taken, and then nothing has happened.
///
/// # Safety
/// As [`LocalOps::replace_pair`](crate::this_cpu::LocalOps::replace_pair).
#[inline(always)]
pub(in super::super) unsafe fn replace_pair(
    way: Way,
    at: usize,
    old: Pair,
    new: Pair,
) -> Option<Pair> {
    let way = way.open()?;
    // SAFETY: every x86_64 has these registers.
    let new: __m128i = unsafe { _mm_set_epi64x(new[1] as i64, new[0] as i64) };
    let mut is_open = 1_u32;
    let (first, second): (u64, u64);
    commit!(way, at, is_open, [
        "mov {first}, qword ptr [{at} + {t} + {unit_0}]",
        "mov {second}, qword ptr [{at} + {t} + {unit_0} + 8]",
        "cmp {first}, {old_first}",
        "jne 4f",
        "cmp {second}, {old_second}",
        "jne 4f",
        "movdqa xmmword ptr [{at} + {t} + {unit_0}], {new}"
    ], first = out(reg) first, second = out(reg) second, old_first = in(reg) old[0],
        old_second = in(reg) old[1], new = in(xmm_reg) new,);
    (is_open != 0).then_some([first, second])
}

/// Puts a node onto the current CPU's copy of a stack; false if the slow way must be taken, and then nothing has
/// happened.
///
/// # Safety
/// As [`LocalOps::push`](crate::this_cpu::LocalOps::push).
#[inline(always)]
pub(in super::super) unsafe fn push(way: Way, at: usize, link: *mut usize) -> bool {
    let Some(way) = way.open() else {
        return false;
    };
    let link = link.expose_provenance();
    // SAFETY: as in `store`; the link is the caller's until the commit.
    unsafe {
        section!(way, ["{slow}"], [
                "mov {next}, qword ptr [{at} + {t} + {unit_0}]",
                "mov qword ptr [{link}], {next}",
                "mov qword ptr [{at} + {t} + {unit_0}], {link}",
            ],
            at = in(reg) at, link = in(reg) link, next = out(reg) _,
            slow = label { leave(way.rseq); return false }, options(nostack));
    }
    true
}

/// Takes the last node off the current CPU's copy of a stack, null if it is empty; `None` if the slow way must be taken,
/// and then nothing has happened.
///
/// # Safety
/// As [`LocalOps::pop`](crate::this_cpu::LocalOps::pop).
#[inline(always)]
pub(in super::super) unsafe fn pop(way: Way, at: usize) -> Option<*mut usize> {
    let way = way.open()?;
    let mut is_open = 1_u32;
    let first: usize;
    // The first node is on the stack while its link is read: who takes it runs on this CPU, and the section begins anew.
    commit!(way, at, is_open, [
        "mov {first}, qword ptr [{at} + {t} + {unit_0}]",
        "test {first}, {first}",
        "jz 4f",
        "mov {next}, qword ptr [{first}]",
        "mov qword ptr [{at} + {t} + {unit_0}], {next}"
    ], first = out(reg) first, next = out(reg) _,);
    (is_open != 0).then(|| core::ptr::with_exposed_provenance_mut(first))
}

/// Appends bytes to the current CPU's copy of a buffer.
///
/// # Safety
/// As [`LocalOps::append`](crate::this_cpu::LocalOps::append).
#[inline(always)]
pub(in super::super) unsafe fn append(
    way: Way,
    at: usize,
    source: *const u8,
    bytes: usize,
    capacity_bytes: usize,
) -> Outcome {
    let Some(way) = way.open() else {
        return Outcome::NoMemory;
    };
    // SAFETY: as in `store`; what is written before the commit lies above the bytes in use, within the buffer.
    unsafe {
        section!(way, ["{slow}"], [
                "lea {t}, [{at} + {t} + {unit_0}]",
                "mov {end}, qword ptr [{t}]",
                "lea {to}, [{t} + {end} + {data}]",
                "add {end}, {bytes}",
                "cmp {end}, {capacity}",
                "ja {refused}",
                "xor {done:e}, {done:e}",
                // Words as long as there are, then bytes.
                "8:",
                "lea {word}, [{done} + 8]",
                "cmp {word}, {bytes}",
                "ja 9f",
                "mov {word}, qword ptr [{source} + {done}]",
                "mov qword ptr [{to} + {done}], {word}",
                "add {done}, 8",
                "jmp 8b",
                "9:",
                "cmp {done}, {bytes}",
                "je 7f",
                "mov {word:l}, byte ptr [{source} + {done}]",
                "mov byte ptr [{to} + {done}], {word:l}",
                "inc {done}",
                "jmp 9b",
                "7:",
                "mov qword ptr [{t}], {end}",
            ],
            at = in(reg) at, source = in(reg) source, bytes = in(reg) bytes,
            capacity = in(reg) capacity_bytes, data = const DATA_OFFSET_BYTES,
            end = out(reg) _, to = out(reg) _, done = out(reg) _, word = out(reg) _,
            slow = label { leave(way.rseq); return Outcome::NoMemory },
            refused = label { leave(way.rseq); return Outcome::Refused },
            options(nostack));
    }
    Outcome::Done
}

/// Moves what the current CPU's copy of a buffer holds to `out`, and returns how many bytes it is; `None` if the slow way
/// must be taken, and then nothing has happened.
///
/// # Safety
/// As [`LocalOps::take`](crate::this_cpu::LocalOps::take).
#[inline(always)]
pub(in super::super) unsafe fn take(way: Way, at: usize, out: *mut u8) -> Option<usize> {
    let way = way.open()?;
    let mut is_open = 1_u32;
    let used_bytes: usize;
    commit!(way, at, is_open, [
        "lea {t}, [{at} + {t} + {unit_0}]",
        "mov {used}, qword ptr [{t}]",
        "xor {done:e}, {done:e}",
        "8:",
        "lea {word}, [{done} + 8]",
        "cmp {word}, {used}",
        "ja 9f",
        "mov {word}, qword ptr [{t} + {done} + {data}]",
        "mov qword ptr [{out} + {done}], {word}",
        "add {done}, 8",
        "jmp 8b",
        "9:",
        "cmp {done}, {used}",
        "je 7f",
        "mov {word:l}, byte ptr [{t} + {done} + {data}]",
        "mov byte ptr [{out} + {done}], {word:l}",
        "inc {done}",
        "jmp 9b",
        "7:",
        "mov qword ptr [{t}], 0"
    ], used = out(reg) used_bytes, out = in(reg) out, done = out(reg) _, word = out(reg) _,
        data = const DATA_OFFSET_BYTES,);
    (is_open != 0).then_some(used_bytes)
}
