//! Two threads at once on the process's instance, each on its CPU: pairs of their own, and areas that the other one frees.
//! `cargo bench --bench threads`.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pcpu::Global;
use pcpu_workloads::areas::{Heap, PerCpuAreas, Source, Zeroing, pairs};
use pcpu_workloads::exchange::{self, BATCH, FreedBy};
use pcpu_workloads::home::Home;
use pcpu_workloads::together;

/// The process's CPUs.
fn cpus() -> u32 {
    Home::of_process().expect("CPUs").cpus
}

/// Pairs of 64 bytes; those of 8 are in `pcpu bench threads`.
fn threads(criterion: &mut Criterion) {
    const BYTES: usize = 64;
    let cpus = cpus();
    for threads in [1, 2] {
        let parameter = format!("cpus={cpus} threads={threads} live=0 size={BYTES}");
        pairs_of(
            criterion,
            PerCpuAreas::<Global>::new(Zeroing::Off),
            BYTES,
            threads,
            &parameter,
        );
        pairs_of(criterion, Heap, BYTES, threads, &parameter);
    }
}

fn pairs_of<S: Source>(
    criterion: &mut Criterion,
    source: S,
    bytes: usize,
    threads: u32,
    parameter: &str,
) {
    let mut group = criterion.benchmark_group("threads");
    group.bench_function(BenchmarkId::new(S::NAME, parameter), |bencher| {
        bencher.iter_custom(|iters| {
            together::run(threads, || pairs(source, bytes, iters)).expect("there is room")
        });
    });
    group.finish();
}

/// Batches that two threads pass to each other, against batches that each keeps.
fn remote(criterion: &mut Criterion) {
    const BYTES: usize = 8;
    let parameter = format!("cpus={} threads=2 live={} size={BYTES}", cpus(), 2 * BATCH);
    let mut group = criterion.benchmark_group("remote-free");
    let ours = PerCpuAreas::<Global>::new(Zeroing::Off);
    group.bench_function(BenchmarkId::new("pcpu", &parameter), |bencher| {
        bencher.iter_custom(|iters| exchanged(ours, BYTES, FreedBy::Other, iters));
    });
    group.bench_function(BenchmarkId::new("local-free", &parameter), |bencher| {
        bencher.iter_custom(|iters| exchanged(ours, BYTES, FreedBy::Same, iters));
    });
    group.bench_function(BenchmarkId::new(Heap::NAME, &parameter), |bencher| {
        bencher.iter_custom(|iters| exchanged(Heap, BYTES, FreedBy::Other, iters));
    });
    group.finish();
}

/// The time for so many pairs of each thread, done in whole batches.
fn exchanged<S: Source>(
    source: S,
    bytes: usize,
    freed_by: FreedBy,
    iters: u64,
) -> std::time::Duration {
    let batches = iters.div_ceil(BATCH as u64);
    let time = exchange::run(source, bytes, freed_by, batches).expect("there is room");
    time.mul_f64(iters as f64 / (batches * BATCH as u64) as f64)
}

criterion_group!(benches, threads, remote);
criterion_main!(benches);
