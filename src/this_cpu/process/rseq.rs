//! Restartable sequences: the machine code of the operations in a Linux process on x86_64.
//!
//! The kernel knows, per thread, a *critical section* that the thread announces: if the thread is preempted, migrated or
//! gets a signal inside it, it continues at the section's abort address. Every operation is such a section: find the CPU,
//! compute the address of its copy, and end with the one instruction that changes the copy, the *commit*. Either the
//! commit has happened, or nothing has and the section begins anew, maybe on another CPU.
//!
//! ```text
//! 2: lea   t, [descriptor]
//!    mov   fs:[rseq + rseq_cs], t        announces the section
//! 3: mov   t, fs:[rseq + cpu_id]
//!    cmp   t, high water                 also stops the ids -1 and -2 of threads that are not registered
//!    jae   slow
//!    imul  t, stride
//!    add   [at + t + WINDOW], value      the commit; unit 0 lies a window above the neutral one
//! 4:
//! ```
//!
//! The area that a thread shares with the kernel is the one that glibc registers; nothing is registered here. Layout of
//! it: `include/uapi/linux/rseq.h`.

use core::arch::asm;
use core::mem::size_of;
use core::sync::atomic::{AtomicIsize, AtomicU32, AtomicUsize, Ordering};

use crate::global::WINDOW_BYTES;
use crate::this_cpu::{Change, Word};

/// Where a thread's rseq area lies, from its thread pointer on; 0: restartable sequences are not used.
static RSEQ_OFFSET: AtomicIsize = AtomicIsize::new(0);

/// From one CPU's copies to the next one's, in bytes; known before the offset is.
static STRIDE: AtomicUsize = AtomicUsize::new(0);

/// CPUs below have memory for their copies. 0 as long as nothing is set up, and where restartable sequences are not
/// used: then every operation takes the slow way.
static HIGH_WATER: AtomicU32 = AtomicU32::new(0);

/// Starts to use restartable sequences, for units that are `stride_bytes` apart, if glibc has registered the calling
/// thread. To be called once, before any operation.
pub(super) fn detect(stride_bytes: usize) -> bool {
    // The rseq area as Linux 4.18 has it; what follows are extensions.
    const AREA_BYTES: u32 = 20;
    // SAFETY: dlsym looks the name up and changes nothing.
    let symbol = |name: &core::ffi::CStr| unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    let (offset, size) = (symbol(c"__rseq_offset"), symbol(c"__rseq_size"));
    if offset.is_null() || size.is_null() {
        return false;
    }
    // SAFETY: glibc defines both as constant integers of these types.
    let (offset, size) = unsafe { (*offset.cast::<isize>(), *size.cast::<u32>()) };
    if size < AREA_BYTES || offset == 0 {
        return false;
    }
    let cpu: u32;
    // SAFETY: the area exists: glibc says that its size is not 0.
    unsafe {
        asm!("mov {cpu:e}, dword ptr fs:[{rseq} + 4]", cpu = out(reg) cpu, rseq = in(reg) offset,
            options(nostack, readonly, preserves_flags));
    }
    // Negative: not registered, or the kernel refused.
    let is_registered = (cpu as i32) >= 0;
    if is_registered {
        adopt(offset, stride_bytes);
    }
    is_registered
}

/// From one CPU's copies to the next one's, in bytes; 0 if restartable sequences are not used.
pub(super) fn stride_bytes() -> usize {
    STRIDE.load(Ordering::Relaxed)
}

/// Where threads' rseq areas lie, from their thread pointers on; 0 if restartable sequences are not used.
pub(super) fn offset() -> isize {
    RSEQ_OFFSET.load(Ordering::Relaxed)
}

/// Starts to use restartable sequences as another copy of this crate in the process has found them, or stops to use them
/// if `offset` is 0. No CPU has memory at first.
pub(super) fn adopt(offset: isize, stride_bytes: usize) {
    HIGH_WATER.store(0, Ordering::Release);
    STRIDE.store(stride_bytes, Ordering::Release);
    RSEQ_OFFSET.store(offset, Ordering::Release);
}

/// Lets the fast way be used on CPUs up to `cpu`; their copies must have memory.
pub(super) fn raise_high_water(cpu: u32) {
    HIGH_WATER.fetch_max(cpu + 1, Ordering::Release);
}

/// The CPU that the calling thread runs on, or `None` if the thread is not registered.
pub(super) fn current_cpu() -> Option<u32> {
    let rseq = RSEQ_OFFSET.load(Ordering::Relaxed);
    if rseq == 0 {
        return None;
    }
    let cpu: u32;
    // SAFETY: `detect` found the area; every thread of the process has one at this offset.
    unsafe {
        asm!("mov {cpu:e}, dword ptr fs:[{rseq} + 4]", cpu = out(reg) cpu, rseq = in(reg) rseq,
            options(nostack, readonly, preserves_flags));
    }
    ((cpu as i32) >= 0).then_some(cpu)
}

/// What a section must know beforehand.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    /// Where the thread's rseq area lies, from its thread pointer on; 0: the slow way must be taken.
    rseq: isize,
    /// From one CPU's copies to the next one's.
    stride_bytes: usize,
    /// CPUs below have memory. An earlier number than the present one takes the slow way more often than need be.
    high_water: u32,
}

impl Way {
    /// The way as it was when the caller, or the loop that it is in, began: all numbers stay in registers over a loop.
    #[inline(always)]
    pub(super) fn known() -> Self {
        let (rseq, stride_bytes, high_water);
        // SAFETY: reads statics of ours, PC relative: no entry of the GOT is read. The offset and the stride change once, from
        // 0, before any handle exists that an operation could use, and the high water only rises; so the compiler may keep
        // an earlier answer. The high water is read first: if it is not 0 the others are known.
        unsafe {
            asm!(
                "mov {high:e}, dword ptr [rip + {high_water}]",
                "mov {rseq}, qword ptr [rip + {rseq_offset}]",
                "mov {stride}, qword ptr [rip + {stride_bytes}]",
                high = out(reg) high_water,
                rseq = out(reg) rseq,
                stride = out(reg) stride_bytes,
                high_water = sym HIGH_WATER,
                rseq_offset = sym RSEQ_OFFSET,
                stride_bytes = sym STRIDE,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        Self {
            rseq,
            stride_bytes,
            high_water,
        }
    }

    /// The way as it is now.
    pub(super) fn now() -> Self {
        let high_water = HIGH_WATER.load(Ordering::Acquire);
        Self {
            rseq: RSEQ_OFFSET.load(Ordering::Acquire),
            stride_bytes: STRIDE.load(Ordering::Acquire),
            high_water,
        }
    }

    /// The way, or `None` if the slow one must be taken.
    #[inline(always)]
    fn open(self) -> Option<Self> {
        (self.rseq != 0).then_some(self)
    }
}

/// What follows the commit. The kernel looks at the announced section again when the thread has been preempted, however
/// long the section is over, and ends the process if it lies in a library that has been unmapped meanwhile. Code that
/// can be unmapped takes the announcement back, on every way out of a section.
#[cfg(feature = "unloadable")]
macro_rules! leave {
    () => {
        "mov qword ptr fs:[{rseq} + 8], 0"
    };
}
#[cfg(not(feature = "unloadable"))]
macro_rules! leave {
    () => {
        ""
    };
}

/// [`leave!`], on a way out that does not pass the commit.
#[inline(always)]
fn leave(rseq: isize) {
    // SAFETY: writes to the thread's own rseq area that no section is announced, which is so: the caller has left it.
    #[cfg(feature = "unloadable")]
    unsafe {
        asm!(leave!(), rseq = in(reg) rseq, options(nostack, preserves_flags));
    }
    #[cfg(not(feature = "unloadable"))]
    let _ = rseq;
}

/// A critical section: `$body` up to its last instruction, which commits; `$slow` is where it goes if the CPU is none
/// that has memory.
macro_rules! section {
    ($way:ident, [$slow:literal $(, $way_out:literal)*], [$($body:expr),+ $(,)?], $($operands:tt)*) => {
        asm!(
            ".pushsection pcpu_rseq_cs, \"aw\", @progbits",
            ".balign 32",
            "77:",
            // struct rseq_cs: version, flags, start, length, abort.
            ".long 0, 0",
            ".quad 3f, 4f - 3f, 5f",
            ".popsection",
            "2:",
            "lea {t}, [rip + 77b]",
            "mov qword ptr fs:[{rseq} + 8], {t}",
            "3:",
            "mov {t:e}, dword ptr fs:[{rseq} + 4]",
            "cmp {t:e}, {high:e}",
            concat!("jae ", $slow),
            "imul {t}, {stride}",
            $($body,)+
            "4:",
            leave!(),
            ".pushsection pcpu_rseq_abort, \"ax\", @progbits",
            // The signature that glibc registers (RSEQ_SIG), as operand of an instruction that traps.
            ".byte 0x0f, 0xb9, 0x3d",
            ".long 0x53053053",
            "5:",
            "jmp 2b",
            $($way_out,)*
            ".popsection",
            t = out(reg) _,
            rseq = in(reg) $way.rseq,
            high = in(reg) $way.high_water,
            stride = in(reg) $way.stride_bytes,
            unit_0 = const WINDOW_BYTES,
            $($operands)*
        )
    };
}

/// A section that ends with one instruction between the copy and `value`.
macro_rules! store {
    ($class:ident, $size:literal, $modifier:literal, $operation:literal, $way:ident, $at:ident, $value:ident) => {
        // SAFETY: `at` is a word's neutral address (promise of the caller), so the CPU's copy lies where the section
        // computes it, and has memory: its CPU is below the high water.
        unsafe {
            section!($way, ["{slow}"],
                [concat!($operation, " ", $size, " ptr [{at} + {t} + {unit_0}], {value", $modifier, "}")],
                at = in(reg) $at, value = in($class) $value,
                slow = label { leave($way.rseq); return false }, options(nostack))
        }
    };
}

/// A section with results: `is_open` becomes 0 where the CPU has no memory.
macro_rules! commit {
    ($way:ident, $at:ident, $is_open:ident, [$($body:expr),+], $($operands:tt)*) => {
        // SAFETY: as in `store`.
        unsafe {
            section!($way, ["6f", "6:", "xor {is_open:e}, {is_open:e}", "jmp 4b"], [$($body),+],
                at = in(reg) $at, is_open = inout(reg) $is_open,
                $($operands)* options(nostack))
        }
    };
}

/// A section that stores the copy combined with `value` and results in what it was.
macro_rules! combine {
    ($class:ident, $size:literal, $modifier:literal, $operation:literal, $way:ident, $at:ident, $is_open:ident,
        $value:ident, $before:ident) => {
        commit!($way, $at, $is_open, [
            concat!("mov {before", $modifier, "}, ", $size, " ptr [{at} + {t} + {unit_0}]"),
            concat!("mov {after", $modifier, "}, {before", $modifier, "}"),
            concat!($operation, " {after", $modifier, "}, {value", $modifier, "}"),
            concat!("mov ", $size, " ptr [{at} + {t} + {unit_0}], {after", $modifier, "}")
        ], before = out($class) $before, after = out($class) _, value = in($class) $value,)
    };
}

mod compound;
mod conditional;
mod slots;

pub(super) use compound::{append, pop, push, read_pair, replace_pair, take};
pub(super) use conditional::{acquire, add_gated, add_within};
pub(super) use slots::{put_slot, replace_pair_gated, take_slot};

/// The operations of one width. The result of a change says whether the fast way was open; those of a fetch and a read
/// have the word as well.
macro_rules! width {
    ($word:ty, $class:ident, $size:literal, $modifier:literal, $change:ident, $fetch:ident, $read:ident) => {
        /// # Safety
        /// As `LocalOps::change`.
        #[inline(always)]
        unsafe fn $change(way: Way, at: usize, change: Change<$word>) -> bool {
            let Some(way) = way.open() else {
                return false;
            };
            match change {
                Change::Set(value) => store!($class, $size, $modifier, "mov", way, at, value),
                Change::Add(value) => store!($class, $size, $modifier, "add", way, at, value),
                Change::And(value) => store!($class, $size, $modifier, "and", way, at, value),
                Change::Or(value) => store!($class, $size, $modifier, "or", way, at, value),
                Change::Xor(value) => store!($class, $size, $modifier, "xor", way, at, value),
                // SAFETY: the promise of the caller.
                Change::Replace(..) => return unsafe { $fetch(way, at, change) }.is_some(),
            }
            true
        }

        /// # Safety
        /// As `LocalOps::fetch`.
        #[inline(always)]
        unsafe fn $fetch(way: Way, at: usize, change: Change<$word>) -> Option<$word> {
            let way = way.open()?;
            let mut is_open = 1_u32;
            let before: $word;
            match change {
                Change::Set(value) => commit!(way, at, is_open, [
                    concat!("mov {before", $modifier, "}, ", $size, " ptr [{at} + {t} + {unit_0}]"),
                    concat!("mov ", $size, " ptr [{at} + {t} + {unit_0}], {value", $modifier, "}")
                ], before = out($class) before, value = in($class) value,),
                Change::Add(value) => commit!(way, at, is_open, [
                    concat!("xadd ", $size, " ptr [{at} + {t} + {unit_0}], {before", $modifier, "}")
                ], before = inout($class) value => before,),
                Change::And(value) => {
                    combine!($class, $size, $modifier, "and", way, at, is_open, value, before)
                }
                Change::Or(value) => {
                    combine!($class, $size, $modifier, "or", way, at, is_open, value, before)
                }
                Change::Xor(value) => {
                    combine!($class, $size, $modifier, "xor", way, at, is_open, value, before)
                }
                Change::Replace(old, new) => commit!(way, at, is_open, [
                    concat!("mov {before", $modifier, "}, ", $size, " ptr [{at} + {t} + {unit_0}]"),
                    concat!("cmp {before", $modifier, "}, {old", $modifier, "}"),
                    "jne 4f",
                    concat!("mov ", $size, " ptr [{at} + {t} + {unit_0}], {new", $modifier, "}")
                ], before = out($class) before, old = in($class) old, new = in($class) new,),
            }
            (is_open != 0).then_some(before)
        }

        /// # Safety
        /// As `LocalOps::read`.
        #[inline(always)]
        unsafe fn $read(way: Way, at: usize) -> Option<$word> {
            let way = way.open()?;
            let mut is_open = 1_u32;
            let value: $word;
            // SAFETY: as in `store`. There is nothing to commit: a value of the CPU that the thread was on is all that can
            // be had, so no section is announced.
            unsafe {
                asm!(
                    "mov {t:e}, dword ptr fs:[{rseq} + 4]",
                    "cmp {t:e}, {high:e}",
                    "jae 6f",
                    "imul {t}, {stride}",
                    concat!("mov {value", $modifier, "}, ", $size, " ptr [{at} + {t} + {unit_0}]"),
                    "4:",
                    ".pushsection pcpu_rseq_abort, \"ax\", @progbits",
                    "6:",
                    "xor {is_open:e}, {is_open:e}",
                    "jmp 4b",
                    ".popsection",
                    t = out(reg) _,
                    rseq = in(reg) way.rseq,
                    high = in(reg) way.high_water,
                    stride = in(reg) way.stride_bytes,
                    unit_0 = const WINDOW_BYTES,
                    at = in(reg) at,
                    is_open = inout(reg) is_open,
                    value = out($class) value,
                    options(nostack, readonly)
                );
            }
            (is_open != 0).then_some(value)
        }
    };
}

width!(u8, reg_byte, "byte", "", change_8, fetch_8, read_8);
width!(u16, reg, "word", ":x", change_16, fetch_16, read_16);
width!(u32, reg, "dword", ":e", change_32, fetch_32, read_32);
width!(u64, reg, "qword", ":r", change_64, fetch_64, read_64);

/// Changes the current CPU's copy; false if the slow way must be taken, and then nothing has happened.
///
/// # Safety
/// As [`LocalOps::change`](crate::this_cpu::LocalOps::change).
#[inline(always)]
pub(super) unsafe fn change<W: Word>(way: Way, at: usize, change: Change<W>) -> bool {
    // SAFETY: the promise of the caller; the width is the word's.
    unsafe {
        match size_of::<W>() {
            1 => change_8(way, at, change.map(|word| word.widen() as u8)),
            2 => change_16(way, at, change.map(|word| word.widen() as u16)),
            4 => change_32(way, at, change.map(|word| word.widen() as u32)),
            _ => change_64(way, at, change.map(|word| word.widen())),
        }
    }
}

/// Changes the current CPU's copy and returns what it was; `None` if the slow way must be taken, and then nothing has
/// happened.
///
/// # Safety
/// As [`LocalOps::fetch`](crate::this_cpu::LocalOps::fetch).
#[inline(always)]
pub(super) unsafe fn fetch<W: Word>(way: Way, at: usize, change: Change<W>) -> Option<W> {
    // SAFETY: the promise of the caller; the width is the word's.
    let before = unsafe {
        match size_of::<W>() {
            1 => u64::from(fetch_8(way, at, change.map(|word| word.widen() as u8))?),
            2 => u64::from(fetch_16(way, at, change.map(|word| word.widen() as u16))?),
            4 => u64::from(fetch_32(way, at, change.map(|word| word.widen() as u32))?),
            _ => fetch_64(way, at, change.map(|word| word.widen()))?,
        }
    };
    Some(W::narrow(before))
}

/// Reads the current CPU's copy; `None` if the slow way must be taken.
///
/// # Safety
/// As [`LocalOps::read`](crate::this_cpu::LocalOps::read).
#[inline(always)]
pub(super) unsafe fn read<W: Word>(way: Way, at: usize) -> Option<W> {
    // SAFETY: the promise of the caller; the width is the word's.
    let value = unsafe {
        match size_of::<W>() {
            1 => u64::from(read_8(way, at)?),
            2 => u64::from(read_16(way, at)?),
            4 => u64::from(read_32(way, at)?),
            _ => read_64(way, at)?,
        }
    };
    Some(W::narrow(value))
}
