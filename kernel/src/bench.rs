//! How many instructions the operations take. It needs a machine whose clock counts instructions
//! (`cargo xtask kernel --bench`): there the numbers are exact, and the same on every machine.

use core::arch::x86_64::_rdtsc;
use core::hint::black_box;
use core::sync::atomic::{AtomicU64, Ordering};

use pcpu::{
    AllocFlags, Counter, CpuCell, LocalCell, PerCpu, alloc_percpu_in, alloc_percpu_with,
    define_per_cpu_in, free_percpu,
};

use crate::percpu::Kernel;
use crate::println;

/// How often an operation is repeated; the compiler unrolls so short a loop.
const REPEATS: u64 = 8;

define_per_cpu_in! {
    in Kernel;

    static NUMBER: CpuCell<u64> = CpuCell::new(0);
}

static SHARED: AtomicU64 = AtomicU64::new(0);

/// Prints a line for each operation: its name and its instructions.
///
/// # Panics
/// If there is no memory for a variable.
pub fn run() {
    let cell = PerCpu::<CpuCell<u64>, Kernel>::new().expect("room for a number");
    let counter = Counter::<Kernel>::new_in(0).expect("room for a number");
    measure("atomic add, for comparison", || {
        SHARED.fetch_add(1, Ordering::Relaxed);
    });
    measure("static: increment by gs", || NUMBER.inc());
    measure("static: read by gs", || {
        black_box(NUMBER.read());
    });
    measure("dynamic: increment", || cell.inc());
    measure("counter: increment", || counter.inc());
    measure("allocate and free 8 bytes", || {
        let variable = alloc_percpu_in::<u64, Kernel>().expect("room for a number");
        // SAFETY: nobody else knows of it.
        unsafe { free_percpu(variable) }.expect("it was allocated");
    });
    measure("allocate and free 8 bytes, atomic", || {
        let variable = alloc_percpu_with::<u64, Kernel>(AllocFlags::ATOMIC);
        let variable = variable.expect("room for a number");
        // SAFETY: nobody else knows of it.
        unsafe { free_percpu(variable) }.expect("it was allocated");
    });
}

fn measure(name: &str, mut operation: impl FnMut()) {
    operation();
    let start = ticks();
    let empty = ticks() - start;
    let start = ticks();
    for _ in 0..REPEATS {
        operation();
        // Each turn stands for itself.
        black_box(());
    }
    let tenths = (ticks() - start - empty) * 10 / REPEATS;
    println!("bench {name}: {}.{} instructions", tenths / 10, tenths % 10);
}

fn ticks() -> u64 {
    // SAFETY: every CPU of this kind counts.
    unsafe { _rdtsc() }
}
