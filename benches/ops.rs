//! Working on copies: adding, reading, and adding up over all CPUs. `cargo bench --bench ops`. (Adding against what one
//! would use otherwise: `pcpu bench add`.)

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pcpu::unit::CpuId;
use pcpu::{BatchCounter, Counter, CpuCell, Domain, Global, LocalCell, Parts, PerCpu, RemoteCell};
use pcpu_workloads::home::{Home, Machine};

const COUNTERS: usize = 8;

/// One addition: to one counter, and to eight in turn.
fn add(criterion: &mut Criterion) {
    let parameter = parameter(Home::of_process().expect("CPUs").cpus);
    let counters = PerCpu::<[CpuCell<u64>; COUNTERS]>::new().expect("there is room");
    let mut group = criterion.benchmark_group("add-one");
    group.bench_function(BenchmarkId::new("pcpu", &parameter), |bencher| {
        let counter = counters.element(0);
        bencher.iter(|| counter.inc());
    });
    group.finish();
    let mut group = criterion.benchmark_group("add-in-turn");
    group.bench_function(BenchmarkId::new("pcpu", &parameter), |bencher| {
        let mut next = 0;
        bencher.iter(|| {
            next = (next + 1) & (COUNTERS - 1);
            counters.element(next).inc();
        });
    });
    group.finish();
}

/// One CPU's copy, and the current one's, against an element of a vector.
fn get(criterion: &mut Criterion) {
    let cpus = Home::of_process().expect("CPUs").cpus;
    let counter = PerCpu::<CpuCell<u64>>::new().expect("there is room");
    let vector = vec![0_u64; cpus as usize];
    let mut group = criterion.benchmark_group("get");
    group.bench_function(BenchmarkId::new("pcpu", parameter(cpus)), |bencher| {
        bencher.iter(|| counter.get(black_box(CpuId::new(0))).is_ok());
    });
    group.bench_function(BenchmarkId::new("vec-get", parameter(cpus)), |bencher| {
        bencher.iter(|| vector.get(black_box(0)).is_some());
    });
    group.finish();
    let mut group = criterion.benchmark_group("read-current");
    group.bench_function(BenchmarkId::new("pcpu", parameter(cpus)), |bencher| {
        bencher.iter(|| counter.read());
    });
    group.finish();
}

/// The value of a counter, exact and to within a bound.
fn counter(criterion: &mut Criterion) {
    let cpus = Home::of_process().expect("CPUs").cpus;
    let exact = Counter::<Global>::new(0).expect("there is room");
    let batch = std::num::NonZeroU32::new(64).expect("not 0");
    let bounded = BatchCounter::<Global>::new(0, batch).expect("there is room");
    let mut group = criterion.benchmark_group("counter-sum");
    group.bench_function(BenchmarkId::new("pcpu", parameter(cpus)), |bencher| {
        bencher.iter(|| exact.sum());
    });
    group.bench_function(BenchmarkId::new("batch-read", parameter(cpus)), |bencher| {
        bencher.iter(|| bounded.read());
    });
    group.finish();
}

fn sum(criterion: &mut Criterion) {
    sum_on::<3>(criterion, 2);
    sum_on::<0>(criterion, 16);
    sum_on::<1>(criterion, 64);
    sum_on::<2>(criterion, 256);
}

/// The sum over the copies on so many CPUs, against a bare loop over the same copies.
fn sum_on<const SLOT: usize>(criterion: &mut Criterion, cpus: u32) {
    let home = Home::<Machine<SLOT>>::with_cpus(cpus).expect("a machine");
    let counter = PerCpu::<CpuCell<u64>, Machine<SLOT>>::new().expect("there is room");
    let first = home.copy(counter.as_ptr().neutral(), 0).expect("CPU 0");
    let stride_bytes = home.stride_bytes();
    assert_eq!(Machine::<SLOT>::units().materialised().count(), cpus);
    let mut group = criterion.benchmark_group("sum");
    group.bench_function(BenchmarkId::new("pcpu", parameter(cpus)), |bencher| {
        bencher.iter(|| counter.sum());
    });
    group.bench_function(BenchmarkId::new("bare-loop", parameter(cpus)), |bencher| {
        bencher.iter(|| {
            let copies = (0..cpus as usize).map(|cpu| first.wrapping_byte_add(cpu * stride_bytes));
            // SAFETY: the variable's copies, a stride apart, all brought up; nobody writes to them meanwhile.
            let values = copies.map(|copy| unsafe { copy.read_volatile() });
            values.fold(0, u64::wrapping_add)
        });
    });
    group.finish();
}

fn parameter(cpus: u32) -> String {
    format!("cpus={cpus} size={}", size_of::<u64>())
}

criterion_group!(benches, add, get, counter, sum);
criterion_main!(benches);
