//! The operations on a static cell, a function for each: `cargo xtask test kernel-code` looks at their machine code in the
//! kernel as it was built and linked. Here they run.

use pcpu::{CpuCell, LocalCell, define_per_cpu_in};

use super::{Test, Why};
use crate::ensure;
use crate::percpu::Kernel;

pub const TESTS: &[Test] = &[Test::new(
    "operations of one instruction do what they should",
    each_once,
)];

define_per_cpu_in! {
    in Kernel;

    static NUMBER: CpuCell<u64> = CpuCell::new(0);
}

/// A function for each operation, and the table of them: what the copy is afterwards, and what is returned, if the copy was
/// 12 and the arguments are 12 and 10.
macro_rules! functions {
    ($($symbol:literal $name:ident($old:ident, $value:ident) -> $after:literal, $result:literal: $operation:expr;)+) => {
        $(
            #[inline(never)]
            #[unsafe(export_name = $symbol)]
            extern "C" fn $name($old: u64, $value: u64) -> u64 {
                let _ = ($old, $value);
                $operation
            }
        )+

        const OPERATIONS: &[(&str, extern "C" fn(u64, u64) -> u64, u64, u64)] =
            &[$(($symbol, $name, $after, $result)),+];
    };
}

functions! {
    "op.read" read(old, value) -> 12, 12: NUMBER.read();
    "op.write" write(old, value) -> 10, 0: { NUMBER.write(value); 0 };
    "op.add" add(old, value) -> 22, 0: { NUMBER.add(value); 0 };
    "op.sub" sub(old, value) -> 2, 0: { NUMBER.sub(value); 0 };
    "op.inc" inc(old, value) -> 13, 0: { NUMBER.inc(); 0 };
    "op.dec" dec(old, value) -> 11, 0: { NUMBER.dec(); 0 };
    "op.and" and(old, value) -> 8, 0: { NUMBER.and(value); 0 };
    "op.or" or(old, value) -> 14, 0: { NUMBER.or(value); 0 };
    "op.xor" xor(old, value) -> 6, 0: { NUMBER.xor(value); 0 };
    "op.add_return" add_return(old, value) -> 22, 22: NUMBER.add_return(value);
    "op.xchg" xchg(old, value) -> 10, 12: NUMBER.xchg(value);
    "op.cmpxchg" cmpxchg(old, value) -> 10, 1: u64::from(NUMBER.cmpxchg(old, value).is_ok());
}

fn each_once() -> Result<(), Why> {
    for (name, operation, after, result) in OPERATIONS {
        NUMBER.write(12);
        let found = (operation(12, 10), NUMBER.read());
        ensure!(
            found == (*result, *after),
            "{name}: {found:?}, not {result} and {after}"
        );
    }
    Ok(())
}
