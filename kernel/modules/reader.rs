//! A module that uses another module's per-CPU variable, declared here and resolved when it is loaded.

#![no_std]

use core::arch::asm;

unsafe extern "C" {
    /// The variable of the module `counter`.
    static MODULE_HITS: u64;
}

/// Its handle, in a constant that the loader fills in.
#[unsafe(no_mangle)]
pub static READER_HANDLE: Handle = Handle(&raw const MODULE_HITS);

/// An address that is never followed.
#[repr(transparent)]
pub struct Handle(*const u64);

// SAFETY: only a number.
unsafe impl Sync for Handle {}

/// The current CPU's copy, by the absolute form of the address.
#[unsafe(no_mangle)]
pub extern "C" fn reader_read() -> u64 {
    let value;
    // SAFETY: the loader resolved the variable, which has a copy on every CPU at GS base + its address.
    unsafe {
        asm!("mov {value}, qword ptr gs:[{hits}]", hits = sym MODULE_HITS, value = out(reg) value,
            options(nostack, preserves_flags, readonly));
    }
    value
}
