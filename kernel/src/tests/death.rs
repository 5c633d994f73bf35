//! Faults that must end the kernel as failed: `cargo xtask test kernel-dies` boots it once for each, with `die=NAME` on the
//! command line, and looks at what it prints.

use core::arch::asm;
use core::hint::black_box;

use crate::memory::image;

/// Dies of what has that name; returns if nothing does.
pub fn die_of(name: &str) {
    match name {
        "panic" => panic!("on purpose"),
        "overflow" => {
            overflow(0);
        }
        "no-stack" => no_stack(),
        "execute-data" => execute_data(),
        "breakpoint" => x86_64::instructions::interrupts::int3(),
        _ => {}
    }
}

/// Calls itself until the stack is used up: the page below it is not mapped.
fn overflow(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    if depth == u64::MAX {
        return depth;
    }
    overflow(depth + 1) + frame[7]
}

/// A stack that is not there: the exceptions have stacks of their own.
fn no_stack() {
    // SAFETY: it ends the machine.
    unsafe { asm!("mov rsp, 8", "push rax", options(noreturn)) };
}

fn execute_data() {
    let data = core::ptr::with_exposed_provenance::<()>(image::data().start as usize);
    // SAFETY: it ends the machine, for data cannot be executed.
    let code = unsafe { core::mem::transmute::<*const (), extern "C" fn()>(data) };
    code();
}
