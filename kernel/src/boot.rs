//! From power-on to Rust: the entry that QEMU calls, and what it hands over.
//!
//! QEMU enters by the PVH protocol: 32-bit code, paging off, `ebx` = the physical address of the start info. A few lines
//! of assembly map the kernel, switch to 64-bit code and call [`crate::kernel_main`].
//!
//! What always holds: from the first instruction with paging on, no mapping can be both written and executed. The boot
//! tables map the image page by page with the access that its sections need, and the first 4 GiB of physical memory once
//! more at [`crate::memory::PHYSICAL_MAP`], to be read and written. The kernel makes its own tables as soon as it has frames.

use core::arch::global_asm;

use x86_64::PhysAddr;
use x86_64::structures::paging::PhysFrame;

pub mod start_info;

global_asm!(
    include_str!("boot/entry.s"),
    kernel_main = sym crate::kernel_main,
);

unsafe extern "C" {
    static boot_pml4: u8;
}

/// The highest of the tables that the kernel began with.
pub fn page_tables() -> PhysFrame {
    // The image lies where it is loaded.
    let address = (&raw const boot_pml4).addr() as u64;
    PhysFrame::containing_address(PhysAddr::new(address))
}
