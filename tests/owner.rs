//! Owners of per-CPU variables: what they make they drop, on every CPU, whatever fails meanwhile; copies are zero unless
//! somebody wrote; sums lose nothing.
//!
//! Each test has an instance of its own, so that its counters are the test's. Values count themselves per thread, and
//! a test makes and drops its values on its own thread.

use std::cell::Cell;
use std::mem::size_of;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use pcpu::backing::BackingError;
use pcpu::backing::sim::{Machine, Sim, SimAllocator};
use pcpu::this_cpu::portable::Portable;
use pcpu::unit::CpuId;
use pcpu::{
    AllocError, CpuCell, CpuError, Domain, InitError, LocalCell, PerCpu, RemoteCell, StaticVar,
    define_per_cpu, global, per_cpu_ptr,
};
use zerocopy::FromZeros;

thread_local! {
    static CURRENT_CPU: Cell<u32> = const { Cell::new(0) };
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static DROPS: Cell<u64> = const { Cell::new(0) };
    static PANIC_AT_DROP: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// A machine of a test's own.
macro_rules! machine {
    ($name:ident, $machine:expr) => {
        enum $name {}

        // SAFETY: the instance is made once, and is no other domain's.
        unsafe impl Domain for $name {
            type Backing = Sim;
            type Lock = parking_lot::RawMutex;
            type Ops = Portable<Self>;

            fn allocator() -> &'static SimAllocator {
                static INSTANCE: OnceLock<SimAllocator> = OnceLock::new();
                INSTANCE.get_or_init(|| $machine.checked().build().unwrap())
            }

            fn current_cpu() -> CpuId {
                CpuId::new(CURRENT_CPU.get())
            }
        }
    };
}

fn on_cpu<T>(cpu: u32, act: impl FnOnce() -> T) -> T {
    let before = CURRENT_CPU.replace(cpu);
    let result = act();
    CURRENT_CPU.set(before);
    result
}

machine!(Poor, Machine::new(2).online(1));

/// What cannot be done on a CPU's own copy, for lack of memory, is done on another's, and no copy is written that has
/// no memory.
#[test]
fn an_operation_on_a_cpu_without_memory() {
    // Too long for the first chunk: to bring a CPU up takes memory.
    let counts = PerCpu::<[CpuCell<u64>], Poor>::new_slice(4000).unwrap();
    let count = counts.at(3999);
    Poor::allocator().backing().set_faults(|_| true);
    on_cpu(1, || count.add(5));
    assert_eq!(
        (count.read_on(cpu(0)), count.read_on(cpu(1))),
        (Ok(5), Ok(0))
    );
    Poor::allocator().backing().set_faults(|_| false);
    on_cpu(1, || count.add(7));
    assert_eq!(
        (count.read_on(cpu(0)), count.read_on(cpu(1))),
        (Ok(5), Ok(7))
    );
    assert_eq!(count.sum(), 12);
}

fn cpu(id: u32) -> CpuId {
    CpuId::new(id)
}

fn materialised<D: Domain>() -> Vec<u32> {
    let cpus = D::allocator().units().materialised().iter();
    cpus.map(CpuId::get).collect()
}

fn live_areas<D: Domain>() -> u64 {
    D::allocator().stats().live
}

/// A value that counts itself.
#[derive(Debug)]
struct Counted(u64);

impl Counted {
    fn new(value: u64) -> Self {
        LIVE.set(LIVE.get() + 1);
        Self(value)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        LIVE.set(LIVE.get() - 1);
        DROPS.set(DROPS.get() + 1);
        if DROPS.get() == PANIC_AT_DROP.get() {
            panic!("drop {}", DROPS.get());
        }
    }
}

/// A value that starts as zero, counts its drops, and writes as it is dropped.
#[derive(FromZeros)]
#[repr(transparent)]
struct Writing(u64);

impl Drop for Writing {
    fn drop(&mut self) {
        assert_eq!(self.0, 0);
        self.0 = u64::MAX;
        std::hint::black_box(self);
        DROPS.set(DROPS.get() + 1);
        if DROPS.get() == PANIC_AT_DROP.get() {
            panic!("drop {}", DROPS.get());
        }
    }
}

#[test]
fn an_owner_is_as_large_as_its_handle() {
    assert_eq!(size_of::<PerCpu<[u64; 100]>>(), size_of::<usize>());
    assert_eq!(size_of::<Option<PerCpu<u8>>>(), size_of::<usize>());
    assert_eq!(size_of::<PerCpu<[u8]>>(), 2 * size_of::<usize>());
}

#[test]
fn every_possible_cpu_gets_its_copy_and_drops_it() {
    machine!(M, Machine::new(5).online(2));
    let owner = PerCpu::<_, M>::new_with(|cpu| Counted::new(cpu.get().into())).unwrap();
    assert_eq!(LIVE.get(), 5);
    assert_eq!(materialised::<M>(), [0, 1, 2, 3, 4]);
    let values: Vec<u64> = owner.iter().map(|(_, value)| value.0).collect();
    assert_eq!(values, [0, 1, 2, 3, 4]);
    drop(owner);
    assert_eq!((LIVE.get(), DROPS.get()), (0, 5));
    assert_eq!(live_areas::<M>(), 0);
}

#[test]
fn an_error_rolls_back_at_every_cpu() {
    machine!(M, Machine::new(6).online(1).dirty_memory());
    for failing in 0..6 {
        let result = PerCpu::<_, M>::try_new_with(|cpu| match cpu.get() {
            id if id == failing => Err(id * 10),
            id => Ok(Counted::new(id.into())),
        });
        assert_eq!(
            result.err(),
            Some(InitError::Init {
                cpu: cpu(failing),
                error: failing * 10
            })
        );
        assert_eq!((LIVE.get(), DROPS.replace(0)), (0, failing.into()));
        assert_eq!(live_areas::<M>(), 0);
    }
}

#[test]
fn an_error_rolls_back_at_every_element() {
    machine!(M, Machine::new(3));
    for failing in 0..12 {
        let mut made = 0;
        let result = PerCpu::<[_], M>::try_new_slice_with(4, |cpu, index| {
            assert_eq!(made, u64::from(cpu.get()) * 4 + index as u64);
            if made == failing {
                return Err(made);
            }
            made += 1;
            Ok(Counted::new(made))
        });
        assert!(matches!(result, Err(InitError::Init { error, .. }) if error == failing));
        assert_eq!((LIVE.get(), DROPS.replace(0)), (0, failing));
        assert_eq!(live_areas::<M>(), 0);
    }
}

#[test]
fn a_panic_rolls_back_at_every_cpu() {
    machine!(M, Machine::new(4));
    for failing in 0..4 {
        let result = catch_unwind(|| {
            PerCpu::<_, M>::new_with(|cpu| {
                assert!(cpu.get() != failing, "CPU {cpu} fails");
                Counted::new(1)
            })
        });
        assert!(result.is_err());
        assert_eq!((LIVE.get(), DROPS.replace(0)), (0, failing.into()));
        assert_eq!(live_areas::<M>(), 0);
    }
}

#[test]
fn a_panicking_drop_leaves_nothing_behind() {
    machine!(M, Machine::new(3).online(1));
    for failing in 1..=6 {
        DROPS.set(0);
        let owner = PerCpu::<[_], M>::new_slice_with(2, |_, _| Counted::new(1)).unwrap();
        PANIC_AT_DROP.set(failing);
        assert!(catch_unwind(AssertUnwindSafe(|| drop(owner))).is_err());
        PANIC_AT_DROP.set(u64::MAX);
        assert_eq!((LIVE.get(), DROPS.get()), (0, 6));
        assert_eq!(live_areas::<M>(), 0);
    }
}

#[test]
fn a_panicking_drop_of_zero_leaves_nothing_behind() {
    machine!(M, Machine::new(3).online(1));
    for failing in 1..=6 {
        DROPS.set(0);
        let owner = PerCpu::<[Writing], M>::new_slice(2).unwrap();
        PANIC_AT_DROP.set(failing);
        assert!(catch_unwind(AssertUnwindSafe(|| drop(owner))).is_err());
        PANIC_AT_DROP.set(u64::MAX);
        assert_eq!(DROPS.get(), 6);
        assert_eq!(live_areas::<M>(), 0);
    }
}

#[test]
fn a_drop_writes_to_no_copy_of_a_cpu_that_never_ran() {
    machine!(M, Machine::new(4).online(2));
    let owner = PerCpu::<Writing, M>::new().unwrap();
    let handle = owner.as_ptr();
    drop(owner);
    assert_eq!(DROPS.get(), 4);
    assert_eq!(materialised::<M>(), [0, 1]);
    for id in 2..4 {
        let copy = per_cpu_ptr(handle, cpu(id)).unwrap().cast::<u64>();
        // SAFETY: the first chunk's memory never goes away, and nobody else has this machine.
        assert_eq!(unsafe { copy.read() }, 0);
    }
}

#[test]
fn nothing_is_left_when_memory_runs_out() {
    machine!(M, Machine::new(4).online(1));
    // A chunk beyond the first, whose pages have to be populated for CPUs that come up.
    let far = PerCpu::<[u8], M>::new_slice(32 << 10).unwrap();
    let sim = M::allocator().backing();
    // Two calls bring a CPU up. CPU 1 fails at each; CPU 1 succeeds and stays, CPU 2 fails; CPU 2 fails again.
    for (failing, left) in [(0, vec![0]), (1, vec![0]), (2, vec![0, 1]), (1, vec![0, 1])] {
        sim.set_faults(move |call| call == failing);
        let result = PerCpu::<_, M>::new_with(|_| Counted::new(1));
        sim.set_faults(|_| false);
        let no_memory = AllocError::Backing(BackingError::OutOfFrames);
        assert_eq!(result.err(), Some(no_memory));
        assert_eq!((LIVE.get(), DROPS.get(), live_areas::<M>()), (0, 0, 1));
        assert_eq!(materialised::<M>(), left);
    }
    let no_memory = CpuError::NoMemory {
        cpu: cpu(3),
        error: BackingError::OutOfFrames,
    };
    sim.set_faults(|_| true);
    assert_eq!(far.get(cpu(3)).err(), Some(no_memory));
    sim.set_faults(|_| false);
    assert!(PerCpu::<_, M>::new_with(|_| Counted::new(1)).is_ok());
    drop(far);
}

#[test]
fn what_was_written_through_a_reference_is_zero_for_the_next_owner() {
    machine!(M, Machine::new(4).online(1));
    let zero = |owner: &PerCpu<AtomicU64, M>| {
        owner
            .iter_on((0..4).map(cpu))
            .all(|copy| copy.unwrap().1.load(Relaxed) == 0)
    };
    let mut owner = PerCpu::<AtomicU64, M>::new().unwrap();
    assert_eq!(
        materialised::<M>(),
        [0],
        "making an owner costs the others nothing"
    );
    owner.get(cpu(2)).unwrap().store(7, Relaxed);
    *owner.get_mut(cpu(3)).unwrap().get_mut() = 8;
    assert_eq!(materialised::<M>(), [0, 2, 3]);
    let handle = owner.as_ptr();
    drop(owner);
    let next = PerCpu::<AtomicU64, M>::new().unwrap();
    assert_eq!(next.as_ptr(), handle, "the same memory again");
    assert!(zero(&next));
}

#[test]
fn reading_cells_materialises_nobody() {
    machine!(M, Machine::new(8).online(1));
    let cells = PerCpu::<CpuCell<i32>, M>::new().unwrap();
    on_cpu(0, || cells.add(5));
    on_cpu(6, || cells.sub(7));
    assert_eq!(cells.sum(), -2);
    assert_eq!(
        cells.values().collect::<Vec<_>>(),
        [(cpu(0), 5), (cpu(6), -7)]
    );
    assert_eq!(cells.iter().count(), 2);
    let all: Vec<i32> = (0..8).map(|id| cells.read_on(cpu(id)).unwrap()).collect();
    assert_eq!(all, [5, 0, 0, 0, 0, 0, -7, 0]);
    assert_eq!(materialised::<M>(), [0, 6]);
    let not_possible = CpuError::NotPossible {
        cpu: cpu(8),
        nr_cpu_ids: 8,
    };
    assert_eq!(cells.read_on(cpu(8)), Err(not_possible));
    assert_eq!(cells.get(cpu(8)).err(), Some(not_possible));
}

#[test]
fn elements_are_where_the_slice_has_them() {
    machine!(M, Machine::new(3));
    let mut slice = PerCpu::<[CpuCell<u16>], M>::new_slice_with(5, |cpu, index| {
        CpuCell::new((cpu.get() * 100) as u16 + index as u16)
    })
    .unwrap();
    for index in 0..5 {
        on_cpu(1, || {
            assert_eq!(slice.at(index).xchg(1000), 100 + index as u16)
        });
        assert_eq!(slice.at(index).sum(), 1000 + 200 + 2 * index as u16);
        assert_eq!(slice.get(cpu(1)).unwrap()[index].read_remote(), 1000);
    }
    slice
        .iter_mut()
        .for_each(|(_, copy)| copy[4] = CpuCell::new(9));
    let sums: Vec<u16> = slice.elements().map(|element| element.sum()).collect();
    assert_eq!(sums, [1200, 1202, 1204, 1206, 27]);
    assert_eq!((slice.len(), slice.try_at(5).is_none()), (5, true));
    assert!(catch_unwind(AssertUnwindSafe(|| slice.at(5))).is_err());
    let (first, len) = slice.into_ptr_and_len();
    assert_eq!(live_areas::<M>(), 1);
    // SAFETY: given up in the line before.
    drop(unsafe { PerCpu::<[_], M>::from_ptr_and_len(first, len) });
    assert_eq!(live_areas::<M>(), 0);
}

#[test]
fn sizes_that_cannot_be_served_are_refused() {
    machine!(M, Machine::new(2).online(1));
    let limit_bytes = M::allocator().policy().max_alloc_bytes;
    let words = |len| PerCpu::<[u64], M>::new_slice(len).err();
    let too_large = |bytes| Some(AllocError::TooLarge { bytes, limit_bytes });
    assert_eq!(words(0), Some(AllocError::ZeroSize));
    assert_eq!(words(limit_bytes / 8), None);
    assert_eq!(words(limit_bytes / 8 + 1), too_large(limit_bytes + 8));
    assert_eq!(words(usize::MAX / 8 + 1), too_large(usize::MAX));
    assert_eq!(words(usize::MAX), too_large(usize::MAX));
    assert_eq!(PerCpu::<(), M>::new().err(), Some(AllocError::ZeroSize));
    assert_eq!(
        PerCpu::<_, M>::new_with(|_| ()).err(),
        Some(AllocError::ZeroSize)
    );
    assert_eq!(materialised::<M>(), [0], "for nothing, no memory");
}

#[test]
fn threads_lose_no_count() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 50_000;
    let total = PerCpu::<CpuCell<u64>>::new().unwrap();
    let histogram = PerCpu::<[CpuCell<u32>]>::new_slice(7).unwrap();
    let started = PerCpu::<CpuCell<u64>>::new_with(|_| CpuCell::new(1)).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for round in 0..ROUNDS {
                    total.add(round);
                    histogram.at(round as usize % 7).inc();
                    started.inc();
                }
            });
        }
    });
    assert_eq!(total.sum(), THREADS * ROUNDS * (ROUNDS - 1) / 2);
    for (index, element) in histogram.elements().enumerate() {
        let rounds = (0..ROUNDS).filter(|round| round % 7 == index as u64);
        assert_eq!(u64::from(element.sum()), THREADS * rounds.count() as u64);
    }
    let possible = u64::from(global().units().possible().count());
    assert_eq!(started.sum(), possible + THREADS * ROUNDS);
}

#[test]
fn a_static_counts_its_initial_value_on_every_possible_cpu() {
    define_per_cpu! {
        static TEN: CpuCell<u64> = CpuCell::new(10);
    }
    TEN.inc();
    let possible = u64::from(global().units().possible().count());
    assert_eq!(TEN.sum(), 10 * possible + 1);
    let last = global().units().possible().iter().last().unwrap();
    assert_eq!(
        TEN.get(last).unwrap().read_remote(),
        TEN.read_on(last).unwrap()
    );
}

#[test]
fn owners_cross_threads_as_their_values_do() {
    fn is_send<T: Send>() {}
    fn is_sync<T: Sync>() {}
    is_send::<PerCpu<CpuCell<u64>>>();
    is_sync::<PerCpu<CpuCell<u64>>>();
    is_send::<PerCpu<Cell<u8>>>();
    is_sync::<PerCpu<[AtomicU64]>>();
    is_send::<pcpu::Part<'_, AtomicU64, pcpu::Global>>();
}
