//! How many instructions the operations take. It needs a machine whose clock counts instructions
//! (`cargo xtask kernel --bench`): there the numbers are exact, and the same on every machine.
//!
//! Rows of allocations tell what they find. `cached_pair` finds an area in the CPU's cache and puts it back there, as most do. Those
//! without caches (`percpu_cache=off` on the command line) take the lock: `pair` is among areas in use, the others say what else is
//! to be done for them. Memory is zeroed on every CPU that is up.

use core::arch::x86_64::_rdtsc;
use core::fmt::Display;
use core::hint::black_box;
use core::mem::MaybeUninit;
use core::num::NonZeroU32;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pcpu::this_cpu::gs::Masked;
use pcpu::{
    AllocFlags, BatchCounter, Counter, CpuBuffer, CpuCell, CpuPair, CpuStack, Domain, LocalBuffer,
    LocalCell, LocalPair, LocalStack, PerCpu, PerCpuPtr, RefCount, RemoteCell, Request,
    alloc_percpu_bytes, define_per_cpu_in, drain_caches, free_percpu,
};

use crate::cpus::work::{nr_online, on_all_cpus};
use crate::memory::areas;
use crate::percpu::Kernel;
use crate::println;
use crate::tests::ops::Item;

/// How often an operation is repeated; the compiler unrolls so short a loop.
const REPEATS: u64 = 8;

/// How often a pair of an allocation and a free is repeated: some frees are paid for later, all of them together.
const PAIR_REPEATS: u64 = 256;

/// Areas that are there at once: more than a cache of a few could hold.
const MANY: usize = 256;

/// Large areas: one and a filler are more than the first chunk has room for, and no unit is smaller than one.
const FILLER_BYTES: usize = 14 << 10;
const LARGE_BYTES: usize = 20 << 10;

define_per_cpu_in! {
    in Kernel;

    static NUMBER: CpuCell<u64> = CpuCell::new(0);
    static PAIR: CpuPair<u64> = CpuPair::new(0, 0);
    static STACK: CpuStack<&'static mut Item> = CpuStack::new();
    static BUFFER: CpuBuffer<u64, 8> = CpuBuffer::new();
}

static SHARED: AtomicU64 = AtomicU64::new(0);

type Area = PerCpuPtr<u8, Kernel>;

/// Prints a line for each operation: its name and its instructions. Without caches there are those that the caches change.
///
/// # Panics
/// If there is no memory for a variable.
pub fn run() {
    if Kernel::allocator().has_caches() {
        cells();
        words();
        owners();
        cached_pairs();
    } else {
        pairs();
    }
}

/// A row for each operation of a cell.
macro_rules! cell_rows {
    ($kind:literal, $cell:expr) => {
        measure(concat!($kind, "_read"), || {
            black_box($cell.read());
        });
        measure(concat!($kind, "_write"), || $cell.write(1));
        measure(concat!($kind, "_add"), || $cell.add(3));
        measure(concat!($kind, "_inc"), || $cell.inc());
        measure(concat!($kind, "_or"), || $cell.or(3));
        measure(concat!($kind, "_add_return"), || {
            black_box($cell.add_return(3));
        });
        measure(concat!($kind, "_xchg"), || {
            black_box($cell.xchg(3));
        });
        measure(concat!($kind, "_cmpxchg"), || {
            let _ = black_box($cell.cmpxchg(3, 4));
        });
    };
}

fn cells() {
    let cell = PerCpu::<CpuCell<u64>, Kernel>::new().expect("room for a number");
    measure("atomic_add", || {
        SHARED.fetch_add(1, Ordering::Relaxed);
    });
    cell_rows!("static", NUMBER);
    cell_rows!("dynamic", cell);
}

fn words() {
    measure("pair_of_words_update", || {
        PAIR.update(|(one, two)| (one + 1, two + 2));
    });
    let [item] = areas::made(1, |index| Item::new(index as u64)) else {
        panic!("one was asked for")
    };
    STACK.push(item);
    measure("stack_pop_and_push", || {
        STACK.push(STACK.pop().expect("it was pushed"));
    });
    let mut room = [MaybeUninit::uninit(); 8];
    measure("buffer_append_and_take", || {
        BUFFER.append(1).expect("it is empty");
        black_box(BUFFER.take(&mut room));
    });
    measure("interrupts_masked", || {
        // SAFETY: in ring 0, and there is no other.
        drop(unsafe { Masked::new() });
    });
}

fn owners() {
    let counter = Counter::<Kernel>::new_in(0).expect("room for a number");
    measure("counter_inc", || counter.inc());
    let batch = NonZeroU32::new(32).expect("not 0");
    let batched = BatchCounter::<Kernel>::new_in(0, batch).expect("room for a number");
    measure("batch_counter_add", || batched.add(1));
    let count = RefCount::<_, Kernel>::new_in(|| {}).expect("room for a number");
    measure("refcount_get_and_put", || drop(count.try_get()));
    count.kill().expect("it is alive");
    let cell = PerCpu::<CpuCell<u64>, Kernel>::new().expect("room for a number");
    measure("sum", || {
        black_box(cell.sum());
    });
    measure("static_sum", || {
        black_box(NUMBER.sum());
    });
}

/// What it takes to allocate an area and to free it with caches.
fn cached_pairs() {
    let small = Request::new(8, 8);
    measure_pair("cached_pair", &small);
    let dirty = small.with_flags(AllocFlags::NO_ZERO);
    measure_pair("cached_pair_not_zeroed", &dirty);
    let line = Request::new(64, 64);
    measure_pair("cached_pair_of_64_bytes", &line);
    measure_after(
        "cached_pair_that_opens_a_run",
        drain_caches::<Kernel>,
        || {
            free(allocate(&small));
        },
    );
    measure_after(
        "drain_of_a_run",
        || free(allocate(&small)),
        drain_caches::<Kernel>,
    );
    measure_many("cached_", &small);
    if nr_online() > 1 {
        free_from_afar(&small);
    }
}

/// A row for the frees of areas that another CPU has allocated.
fn free_from_afar(request: &Request) {
    let areas = [const { AtomicUsize::new(0) }; 16];
    on_all_cpus(&|cpu| {
        if cpu.get() == 1 {
            for area in &areas {
                area.store(allocate(request).neutral(), Ordering::Relaxed);
            }
        }
    });
    let areas = areas.map(|area| Area::from_neutral(area.into_inner()));
    let total = measured(|| areas.into_iter().flatten().for_each(free));
    print_row("free_from_afar", total * 10 / areas.len() as u64);
}

/// Rows for areas that are all allocated before the first is freed.
fn measure_many(prefix: &str, request: &Request) {
    let mut areas = [None; MANY];
    let many = measured(|| areas.fill_with(|| Some(allocate(request))));
    print_row(
        format_args!("{prefix}alloc_of_256"),
        many * 10 / MANY as u64,
    );
    let many = measured(|| areas.iter_mut().filter_map(Option::take).for_each(free));
    print_row(format_args!("{prefix}free_of_256"), many * 10 / MANY as u64);
}

/// What it takes to allocate an area and to free it, each with the lock.
fn pairs() {
    let allocator = Kernel::allocator();
    let small = Request::new(8, 8);
    measure_pair("pair_from_longest_run", &small);
    // A hole among areas in use.
    let [one, hole, other] = [(); 3].map(|()| allocate(&small));
    free(hole);
    measure_pair("pair", &small);
    let atomic = small.with_flags(AllocFlags::ATOMIC);
    measure_pair("pair_atomic", &atomic);
    let dirty = small.with_flags(AllocFlags::NO_ZERO);
    measure_pair("pair_not_zeroed", &dirty);
    measure_pair("pair_of_64_bytes", &Request::new(64, 64));
    free(one);
    free(other);

    measure_many("", &small);

    // Nothing else is in the chunk, so that it goes and comes.
    let filler = allocate(&Request::new(FILLER_BYTES, 8));
    let large = Request::new(LARGE_BYTES, 8);
    measure_pair("pair_of_20_kib", &large);
    assert!(allocator.stats().chunks > 1, "the first chunk has room");
    measure_after(
        "pair_of_new_chunk",
        || {
            allocator.trim(0);
        },
        || free(allocate(&large)),
    );
    let kept = allocate(&large);
    measure_after(
        "pair_of_5_new_pages",
        || {
            allocator.trim(0);
        },
        || free(allocate(&large)),
    );
    free(kept);
    free(filler);
    measure("trim_nothing", || {
        allocator.trim(0);
    });
}

fn allocate(request: &Request) -> Area {
    alloc_percpu_bytes(request).expect("room for an area")
}

fn free(area: Area) {
    // SAFETY: nobody else knows of it.
    unsafe { free_percpu(area) }.expect("it was allocated");
}

/// A row for an operation that is repeated.
fn measure(name: &str, operation: impl FnMut()) {
    measure_times(REPEATS, name, operation);
}

/// A row for an allocation and its free.
fn measure_pair(name: &str, request: &Request) {
    measure_times(PAIR_REPEATS, name, || free(allocate(request)));
}

fn measure_times(repeats: u64, name: &str, mut operation: impl FnMut()) {
    operation();
    let total = measured(|| {
        for _ in 0..repeats {
            operation();
            // Each turn stands for itself.
            black_box(());
        }
    });
    print_row(name, total * 10 / repeats);
}

/// A row for an operation that something else precedes each time, which is not counted.
fn measure_after(name: &str, mut before: impl FnMut(), mut operation: impl FnMut()) {
    let total: u64 = (0..REPEATS)
        .map(|_| {
            before();
            measured(&mut operation)
        })
        .sum();
    print_row(name, total * 10 / REPEATS);
}

fn print_row(name: impl Display, tenths: u64) {
    println!("bench {name}: {}.{} instructions", tenths / 10, tenths % 10);
}

/// The instructions of something.
fn measured(operation: impl FnOnce()) -> u64 {
    let start = ticks();
    let empty = ticks() - start;
    let start = ticks();
    operation();
    ticks() - start - empty
}

fn ticks() -> u64 {
    // SAFETY: every CPU of this kind counts.
    unsafe { _rdtsc() }
}
