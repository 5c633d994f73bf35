//! Freeing: areas of the process's instance in random order, on the thread that allocated them, all on one CPU.
//! `cargo bench --bench free`.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pcpu::Global;
use pcpu_workloads::areas::{Heap, Live, PerCpuAreas, Source, Zeroing};
use pcpu_workloads::home::Home;

const BYTES: usize = 8;
const LIVE: u32 = 10_000;

fn free(criterion: &mut Criterion) {
    let cpus = Home::of_process().expect("CPUs").cpus;
    let mut group = criterion.benchmark_group("free");
    let parameter = format!("cpus={cpus} live={LIVE} size={BYTES}");
    let ours = PerCpuAreas::<Global>::new(Zeroing::Off);
    group.bench_function(BenchmarkId::new(name(ours), &parameter), |bencher| {
        bencher.iter_custom(|iters| frees(ours, iters));
    });
    group.bench_function(BenchmarkId::new(name(Heap), &parameter), |bencher| {
        bencher.iter_custom(|iters| frees(Heap, iters));
    });
    group.finish();
}

fn name<S: Source>(_: S) -> &'static str {
    match S::NAME {
        "pcpu" => "pcpu",
        _ => "free of malloc",
    }
}

/// All but the frees is done outside the clock.
fn frees<S: Source>(source: S, iters: u64) -> Duration {
    let mut random = fastrand::Rng::with_seed(1);
    let _stay = Live::new(source, (0..LIVE).map(|_| BYTES)).expect("there is room");
    let (mut time, mut left) = (Duration::ZERO, iters);
    while left > 0 {
        let mut areas = Live::new(source, (0..LIVE).map(|_| BYTES)).expect("there is room");
        random.shuffle(areas.areas_mut());
        let now = left.min(LIVE.into());
        let start = Instant::now();
        areas.free_last(now as usize).expect("the areas are live");
        time += start.elapsed();
        left -= now;
    }
    time
}

criterion_group!(benches, free);
criterion_main!(benches);
