//! The parts of the kernel's image, as `kernel.ld` lays them out.

use super::PhysicalRange;

unsafe extern "C" {
    static __text_start: [u8; 0];
    static __text_end: [u8; 0];
    static __rodata_start: [u8; 0];
    static __rodata_end: [u8; 0];
    static __user_start: [u8; 0];
    static __user_end: [u8; 0];
    static __data_start: [u8; 0];
    static __data_end: [u8; 0];
    static __boot_stack_start: [u8; 0];
    static __boot_stack_end: [u8; 0];
    static __per_cpu_start: [u8; 0];
    static __image_end: [u8; 0];
}

fn range(start: *const [u8; 0], end: *const [u8; 0]) -> PhysicalRange {
    PhysicalRange::new(start.addr() as u64, end.addr() as u64)
}

/// All of it.
pub fn whole() -> PhysicalRange {
    range(&raw const __text_start, &raw const __image_end)
}

/// The code.
pub fn text() -> PhysicalRange {
    range(&raw const __text_start, &raw const __text_end)
}

/// Constants, the user programs among them.
pub fn rodata() -> PhysicalRange {
    range(&raw const __rodata_start, &raw const __rodata_end)
}

/// The user programs.
pub fn user() -> PhysicalRange {
    range(&raw const __user_start, &raw const __user_end)
}

/// Variables.
pub fn data() -> PhysicalRange {
    range(&raw const __data_start, &raw const __data_end)
}

/// The stack that the boot processor starts with.
pub fn boot_stack() -> PhysicalRange {
    range(&raw const __boot_stack_start, &raw const __boot_stack_end)
}

/// The pages of the template of the per-CPU variables.
pub fn template() -> PhysicalRange {
    range(&raw const __per_cpu_start, &raw const __image_end)
}
