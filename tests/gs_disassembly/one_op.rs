//! A function for every operation of a kernel, to look at its machine code; see `tests/gs_disassembly.rs`.
//!
//! Each is exported as `op.OPERATION.WIDTH.WHERE`. Where is `here` for a static variable of this crate, `there` for one
//! of another crate, `dynamic` for a handle that comes in a register.

#[macro_use]
#[path = "../common/one_op_macros.rs"]
mod one_op_macros;

use std::hint::black_box;

use counters::{Kernel, THERE_U8, THERE_U16, THERE_U32, THERE_U64};
use pcpu::this_cpu::gs::{Masked, replace_pair};
use pcpu::{CpuCell, Handle, LocalCell, PerCpuPtr, define_per_cpu_in};

define_per_cpu_in! {
    in Kernel;

    static HERE_U8: CpuCell<u8> = CpuCell::new(0);
    static HERE_U16: CpuCell<u16> = CpuCell::new(0);
    static HERE_U32: CpuCell<u32> = CpuCell::new(0);
    static HERE_U64: CpuCell<u64> = CpuCell::new(0);

    #[percpu(first)]
    static FIRST: CpuCell<u8> = CpuCell::new(0);
    #[percpu(page_aligned)]
    static PAGE_ALIGNED: CpuCell<u8> = CpuCell::new(0);
    #[percpu(read_mostly)]
    static READ_MOSTLY: CpuCell<u8> = CpuCell::new(0);
    #[percpu(cache_aligned)]
    static CACHE_ALIGNED: CpuCell<u8> = CpuCell::new(0);
}

/// A handle in a register.
type Cell<T> = PerCpuPtr<CpuCell<T>, Kernel>;

fn main() {
    on_static!(u8, "here", HERE_U8);
    on_static!(u16, "here", HERE_U16);
    on_static!(u32, "here", HERE_U32);
    on_static!(u64, "here", HERE_U64);
    on_static!(u8, "there", THERE_U8);
    on_static!(u16, "there", THERE_U16);
    on_static!(u32, "there", THERE_U32);
    on_static!(u64, "there", THERE_U64);
    on_dynamic!(u8);
    on_dynamic!(u16);
    on_dynamic!(u32);
    on_dynamic!(u64);
    // Code that does not know which variable it is given.
    fn count(cell: &impl LocalCell<u64>) {
        cell.inc();
    }
    keep!("count", u64, "anyone", (), count(&&THERE_U64));
    keep!("handle", u64, "there", () -> usize, THERE_U64.handle().neutral());
    keep!("replace_pair", u64, "dynamic", (at: usize, old: u64, new: u64) -> bool, {
        // SAFETY: nobody calls it.
        unsafe { replace_pair(at, [old, old], [new, new]) }.is_ok()
    });
    keep!("masked", u64, "here", (), {
        // SAFETY: nobody calls it.
        let _masked = unsafe { Masked::new() };
        HERE_U64.inc();
    });
    for variable in [FIRST.handle(), PAGE_ALIGNED.handle(), READ_MOSTLY.handle(), CACHE_ALIGNED.handle()] {
        black_box(variable);
    }
}
