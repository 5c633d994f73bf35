//! A program without std, alloc and libc that uses the library, for x86-64 Linux; see `src/freestanding.rs`.
//!
//! It lays out the first chunk of eight CPUs and exits with 0 if that is as it should be.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::panic::PanicInfo;

use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, LayoutError, UnitPlan, storage_words};

// The kernel enters with the stack pointer at the arguments, aligned for a call.
global_asm!(".globl _start", "_start: xor ebp, ebp", "call {run}", "ud2", run = sym run);

extern "C" fn run() -> ! {
    exit(match lays_out_eight_cpus() {
        Ok(true) => 0,
        _ => 1,
    })
}

fn lays_out_eight_cpus() -> Result<bool, LayoutError> {
    let spec = FirstChunkSpec {
        static_bytes: 212_992,
        reserved_bytes: 8192,
        dyn_bytes: 28_672,
        ..FirstChunkSpec::default()
    };
    let mut words = [0; storage_words(8)];
    let plan = UnitPlan::embed(&spec, &EvenNodes::new(8, 2)?, &mut words)?;
    Ok(plan.nr_groups() == 2 && plan.unit_of_cpu(CpuId::new(7)).is_some())
}

fn exit(status: i32) -> ! {
    // SAFETY: `exit_group` (231) takes the status and does not return.
    unsafe { asm!("syscall", in("rax") 231, in("rdi") status, options(noreturn, nostack)) }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    exit(101)
}

/// The `core` that comes with rustc names it in its unwind tables. Nothing here unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

// The memory functions that `core` expects from the platform; a kernel has its own as well. They are made of
// string instructions, since a loop may be compiled into a call of the same function.

/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= bytes {
        // SAFETY: copied upwards, no byte is written before it has been read.
        return unsafe { memcpy(to, from, bytes) };
    }
    // SAFETY: the caller vouches for both ranges; downwards from their last bytes.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") bytes => _,
            inout("rdi") to.wrapping_add(bytes).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(bytes).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    for at in 0..bytes {
        // SAFETY: the caller vouches for both ranges. Volatile, so that the loop stays a loop.
        let (left, right) =
            unsafe { (left.add(at).read_volatile(), right.add(at).read_volatile()) };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}
