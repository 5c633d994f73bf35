//! A program without std, alloc and libc that uses the library, for x86-64 Linux; see `src/freestanding.rs`.
//!
//! It lays out the first chunk of eight CPUs and exits with 0 if that is as it should be.

#![no_std]
#![no_main]

// A kernel has them as well.
#[path = "../../kernel/src/mem_functions.rs"]
mod mem_functions;

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
