//! The end: QEMU's exit device, panics, and two names of unwinding that `core` refers to.
//!
//! QEMU exits with twice the written value plus 1. Only [`Outcome::Passed`] gives 33: a kernel that dies in another way
//! (a triple fault ends QEMU with 0) is never taken for one that passed.

use core::panic::PanicInfo;

use x86_64::instructions::port::PortWriteOnly;

use crate::serial;

const EXIT_PORT: u16 = 0xf4;

/// What is written to the exit device.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Outcome {
    /// QEMU exits with 33.
    Passed = 0x10,
    /// QEMU exits with 35.
    Failed = 0x11,
}

/// Ends the machine.
pub fn exit(outcome: Outcome) -> ! {
    // SAFETY: the port belongs to QEMU's exit device, which nothing else uses.
    unsafe { PortWriteOnly::new(EXIT_PORT).write(outcome as u32) };
    loop {
        x86_64::instructions::hlt();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    x86_64::instructions::interrupts::disable();
    serial::break_lock();
    crate::println!("PANIC: {info}");
    exit(Outcome::Failed)
}

/// The `core` that comes with rustc names it in its unwind tables. Nothing here unwinds.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit(Outcome::Failed)
}
