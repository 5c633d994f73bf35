//! A module whose per-CPU variable takes most of the reserved region: a second one like it finds no room there.

#![no_std]

/// 5 KiB on every CPU.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".data..percpu")]
pub static LARGE: [u64; 640] = [7; 640];

/// The current CPU's last word.
#[unsafe(no_mangle)]
pub extern "C" fn large_read() -> u64 {
    let value;
    // SAFETY: the loader gave the variable a copy on every CPU, at GS base + its address.
    unsafe {
        core::arch::asm!("mov {value}, qword ptr gs:[rip + {large} + 5112]", large = sym LARGE,
            value = out(reg) value, options(nostack, preserves_flags, readonly));
    }
    value
}
