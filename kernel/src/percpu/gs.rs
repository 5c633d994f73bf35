//! Static per-CPU variables, and operations on the current CPU's copy by one instruction.
//!
//! The linker places a variable in the template, so its address is its handle. GS base holds the distance from the
//! template to the CPU's unit: `gs:[address]` is the current CPU's copy. One instruction is one step: neither an
//! interrupt nor another CPU comes between its parts.

use core::cell::UnsafeCell;

use pcpu::{Handle, PerCpuPtr};

use super::Kernel;

/// A static per-CPU variable: its initial value, in the template. To be placed in a section `.data..percpu`.
#[repr(transparent)]
pub struct PerCpuVar<T>(UnsafeCell<T>);

// SAFETY: the value in the template is never used as a `T`; a copy is reached by raw pointers and by the macros below.
unsafe impl<T> Sync for PerCpuVar<T> {}

impl<T> PerCpuVar<T> {
    /// The value that all copies start from.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }
}

impl<T> Handle for PerCpuVar<T> {
    type Target = T;
    type Domain = Kernel;

    fn handle(&self) -> PerCpuPtr<T, Kernel> {
        PerCpuPtr::from_neutral((&raw const self.0).addr()).expect("no static lies at 0")
    }
}

/// Checks the type of a variable that the macros operate on.
pub const fn is_u64(_: &PerCpuVar<u64>) {}

/// Adds to the current CPU's copy of a `static` [`PerCpuVar<u64>`].
#[macro_export]
macro_rules! this_cpu_add {
    ($variable:path, $value:expr) => {{
        $crate::percpu::gs::is_u64(&$variable);
        let value: u64 = $value;
        // SAFETY: a copy of the variable lies at GS base + its address on every CPU that runs.
        unsafe {
            core::arch::asm!("add qword ptr gs:[rip + {variable}], {value}",
                variable = sym $variable, value = in(reg) value, options(nostack));
        }
    }};
}

/// Adds 1 to the current CPU's copy of a `static` [`PerCpuVar<u64>`].
#[macro_export]
macro_rules! this_cpu_inc {
    ($variable:path) => {{
        $crate::percpu::gs::is_u64(&$variable);
        // SAFETY: as in `this_cpu_add`.
        unsafe {
            core::arch::asm!("inc qword ptr gs:[rip + {variable}]", variable = sym $variable, options(nostack));
        }
    }};
}

/// The current CPU's copy of a `static` [`PerCpuVar<u64>`].
#[macro_export]
macro_rules! this_cpu_read {
    ($variable:path) => {{
        $crate::percpu::gs::is_u64(&$variable);
        let value: u64;
        // SAFETY: as in `this_cpu_add`.
        unsafe {
            core::arch::asm!("mov {value}, qword ptr gs:[rip + {variable}]",
                variable = sym $variable, value = out(reg) value,
                options(nostack, preserves_flags, readonly));
        }
        value
    }};
}

/// Sets the current CPU's copy of a `static` [`PerCpuVar<u64>`].
#[macro_export]
macro_rules! this_cpu_write {
    ($variable:path, $value:expr) => {{
        $crate::percpu::gs::is_u64(&$variable);
        let value: u64 = $value;
        // SAFETY: as in `this_cpu_add`.
        unsafe {
            core::arch::asm!("mov qword ptr gs:[rip + {variable}], {value}",
                variable = sym $variable, value = in(reg) value, options(nostack, preserves_flags));
        }
    }};
}
