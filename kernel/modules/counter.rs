//! A module with a per-CPU variable of its own, which other modules use too, and that uses one of the kernel's.

#![no_std]

use core::arch::asm;
use core::cell::UnsafeCell;

/// A per-CPU variable: only its address is used.
#[repr(transparent)]
pub struct PerCpuVar<T>(UnsafeCell<T>);

// SAFETY: nobody uses the value but by GS base.
unsafe impl<T> Sync for PerCpuVar<T> {}

/// Calls on each CPU, from 1000 on.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".data..percpu")]
pub static MODULE_HITS: PerCpuVar<u64> = PerCpuVar(UnsafeCell::new(1000));

unsafe extern "C" {
    /// The kernel's.
    static SHARED_HITS: PerCpuVar<u64>;
}

/// Counts in the module's variable and in the kernel's; what is in the module's then.
#[unsafe(no_mangle)]
pub extern "C" fn counter_hit() -> u64 {
    let value;
    // SAFETY: the loader gave both variables copies on every CPU, at GS base + their addresses.
    unsafe {
        asm!(
            "inc qword ptr gs:[rip + {own}]",
            "add qword ptr gs:[rip + {shared}], 2",
            "mov {value}, qword ptr gs:[rip + {own}]",
            own = sym MODULE_HITS, shared = sym SHARED_HITS, value = out(reg) value, options(nostack),
        );
    }
    value
}
