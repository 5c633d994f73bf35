//! A function for every operation of a kernel, to look at its machine code; see `tests/gs_disassembly.rs`.
//!
//! Each is exported as `op.OPERATION.WIDTH.WHERE`. Where is `here` for a static variable of this crate, `there` for one
//! of another crate, `dynamic` for a handle that comes in a register.

use std::hint::black_box;

use counters::{Kernel, THERE_U8, THERE_U16, THERE_U32, THERE_U64};
use pcpu::this_cpu::gs::{Masked, replace_pair};
use pcpu::{CpuCell, Handle, LocalCell, PerCpuPtr, define_per_cpu_in, this_cpu};

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

/// One function, kept although nobody calls it.
macro_rules! keep {
    ($operation:literal, $type:ident, $place:literal, ($($name:ident: $argument:ty),*) $(-> $result:ty)?, $body:expr) => {{
        #[unsafe(export_name = concat!("op.", $operation, ".", stringify!($type), ".", $place))]
        extern "C" fn function($($name: $argument),*) $(-> $result)? {
            $body
        }
        black_box(function as *const ());
    }};
}

macro_rules! on_static {
    ($type:ident, $place:literal, $cell:ident) => {
        keep!("read", $type, $place, () -> $type, $cell.read());
        keep!("write", $type, $place, (value: $type), $cell.write(value));
        keep!("add", $type, $place, (value: $type), $cell.add(value));
        keep!("sub", $type, $place, (value: $type), $cell.sub(value));
        keep!("inc", $type, $place, (), $cell.inc());
        keep!("dec", $type, $place, (), $cell.dec());
        keep!("and", $type, $place, (value: $type), $cell.and(value));
        keep!("or", $type, $place, (value: $type), $cell.or(value));
        keep!("xor", $type, $place, (value: $type), $cell.xor(value));
        keep!("add_return", $type, $place, (value: $type) -> $type, $cell.add_return(value));
        keep!("xchg", $type, $place, (value: $type) -> $type, $cell.xchg(value));
        keep!("cmpxchg", $type, $place, (old: $type, new: $type) -> bool, $cell.cmpxchg(old, new).is_ok());
    };
}

/// A handle in a register.
type Cell<T> = PerCpuPtr<CpuCell<T>, Kernel>;

macro_rules! on_dynamic {
    ($type:ident) => {
        on_dynamic!($type, "read", (cell: usize) -> $type, read(cell));
        on_dynamic!($type, "write", (cell: usize, value: $type), write(cell, value));
        on_dynamic!($type, "add", (cell: usize, value: $type), add(cell, value));
        on_dynamic!($type, "sub", (cell: usize, value: $type), sub(cell, value));
        on_dynamic!($type, "inc", (cell: usize), inc(cell));
        on_dynamic!($type, "dec", (cell: usize), dec(cell));
        on_dynamic!($type, "and", (cell: usize, value: $type), and(cell, value));
        on_dynamic!($type, "or", (cell: usize, value: $type), or(cell, value));
        on_dynamic!($type, "xor", (cell: usize, value: $type), xor(cell, value));
        on_dynamic!($type, "add_return", (cell: usize, value: $type) -> $type, add_return(cell, value));
        on_dynamic!($type, "xchg", (cell: usize, value: $type) -> $type, xchg(cell, value));
        on_dynamic!($type, "cmpxchg", (cell: usize, old: $type, new: $type) -> bool, cmpxchg(cell, old, new).is_ok());
    };
    ($type:ident, $operation:literal, ($cell:ident: usize $(, $name:ident: $argument:ty)*) $(-> $result:ty)?,
        $function:ident($($operand:expr),+) $(.$then:ident())?) => {
        keep!($operation, $type, "dynamic", ($cell: usize $(, $name: $argument)*) $(-> $result)?, {
            // SAFETY: nobody calls it; and a handle is not 0.
            unsafe {
                let $cell = Cell::<$type>::from_neutral_unchecked($cell);
                this_cpu::$function($($operand),+) $(.$then())?
            }
        });
    };
}

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
