//! A module that lies out of the reach of 32 bits: it is compiled for the large code model, and its assembly has all addresses in
//! registers, of 64 bits.

#![no_std]

use core::arch::asm;
use core::cell::UnsafeCell;

/// A per-CPU variable: only its address is used.
#[repr(transparent)]
pub struct PerCpuVar<T>(UnsafeCell<T>);

// SAFETY: nobody uses the value but by GS base.
unsafe impl<T> Sync for PerCpuVar<T> {}

/// Calls on each CPU, from 2000 on.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".data..percpu")]
pub static FAR_HITS: PerCpuVar<u64> = PerCpuVar(UnsafeCell::new(2000));

unsafe extern "C" {
    /// The kernel's.
    static SHARED_HITS: PerCpuVar<u64>;
}

/// What the compiler finds by an address of its own making: data of the module.
static STEP: [u64; 4] = [1, 2, 3, 4];

/// Counts in the module's variable and in the kernel's; what is in the module's then.
#[unsafe(no_mangle)]
pub extern "C" fn far_hit() -> u64 {
    // SAFETY: a constant; volatile, so that it is loaded.
    let step = unsafe { core::ptr::read_volatile(&STEP[1]) };
    let value;
    // SAFETY: the loader gave both variables copies on every CPU, at GS base + their addresses.
    unsafe {
        asm!(
            "movabs {own}, offset {own_handle}",
            "movabs {shared}, offset {shared_handle}",
            "inc qword ptr gs:[{own}]",
            "add qword ptr gs:[{shared}], {step}",
            "mov {value}, qword ptr gs:[{own}]",
            own_handle = sym FAR_HITS, shared_handle = sym SHARED_HITS,
            own = out(reg) _, shared = out(reg) _, step = in(reg) step, value = lateout(reg) value, options(nostack),
        );
    }
    value
}
