//! Functions of one operation each, to look at their machine code: exported as `op.OPERATION.WIDTH.WHERE`.
//!
//! The programs that use these macros are compiled by `rustc` alone, see `machine_code.rs`. Each has a type `Cell<T>`: a
//! handle in a register.

/// One function, kept although nobody calls it.
macro_rules! keep {
    ($operation:literal, $type:ident, $place:literal, ($($name:ident: $argument:ty),*) $(-> $result:ty)?, $body:expr) => {{
        #[unsafe(export_name = concat!("op.", $operation, ".", stringify!($type), ".", $place))]
        extern "C" fn function($($name: $argument),*) $(-> $result)? {
            $body
        }
        std::hint::black_box(function as *const ());
    }};
}

/// Every operation on a static variable.
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

/// Every operation on a variable whose handle is an argument.
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
                pcpu::this_cpu::$function($($operand),+) $(.$then())?
            }
        });
    };
}
