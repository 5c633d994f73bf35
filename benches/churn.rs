//! Churn on a machine of 16 CPUs, and how its areas come to be there: `cargo bench --bench churn`. (On this machine's own
//! CPUs: `pcpu bench churn`.)

use std::time::Instant;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pcpu_workloads::areas::{Heap, PerCpuAreas, Source, Zeroing};
use pcpu_workloads::churn::Churn;
use pcpu_workloads::home::{Home, Machine};

const CPUS: u32 = 16;

fn ours(zeroing: Zeroing) -> PerCpuAreas<Machine<0>> {
    Home::<Machine<0>>::with_cpus(CPUS).expect("a machine");
    PerCpuAreas::new(zeroing)
}

/// A random area is replaced. Zeroing is left out, and so the copies of CPUs take no memory.
fn churn(criterion: &mut Criterion) {
    for live in [100, 10_000, 1_000_000] {
        let parameter = format!("cpus={CPUS} live={live}");
        replace(criterion, ours(Zeroing::Off), live, &parameter);
        replace(criterion, Heap, live, &parameter);
    }
    let parameter = format!("cpus={CPUS} live=10000 zeroed");
    replace(criterion, ours(Zeroing::On), 10_000, &parameter);
    replace(criterion, Heap, 10_000, &parameter);
}

fn replace<S: Source>(criterion: &mut Criterion, source: S, live: u32, parameter: &str) {
    let mut group = criterion.benchmark_group("churn");
    let mut areas = None;
    group.bench_function(BenchmarkId::new(S::NAME, parameter), |bencher| {
        // Only if it is asked for: this takes a while.
        let areas = areas.get_or_insert_with(|| Churn::new(source, live).expect("there is room"));
        bencher.iter_custom(|iters| {
            let start = Instant::now();
            areas.replace(iters).expect("there is room");
            start.elapsed()
        });
    });
    group.finish();
}

/// The time to an area of an empty instance, of so many.
fn fill(criterion: &mut Criterion) {
    const LIVE: u32 = 100_000;
    let parameter = format!("cpus={CPUS} live={LIVE}");
    fill_from(criterion, ours(Zeroing::Off), LIVE, &parameter);
    fill_from(criterion, Heap, LIVE, &parameter);
}

fn fill_from<S: Source>(criterion: &mut Criterion, source: S, live: u32, parameter: &str) {
    let mut group = criterion.benchmark_group("fill");
    let name = match S::NAME {
        "pcpu" => "pcpu",
        _ => "malloc",
    };
    group.bench_function(BenchmarkId::new(name, parameter), |bencher| {
        bencher.iter_custom(|iters| {
            let fills = iters.div_ceil(live.into());
            let mut time = std::time::Duration::ZERO;
            for _ in 0..fills {
                let start = Instant::now();
                let areas = Churn::new(source, live).expect("there is room");
                time += start.elapsed();
                drop(areas);
            }
            time.mul_f64(iters as f64 / (fills * u64::from(live)) as f64)
        });
    });
    group.finish();
}

criterion_group!(benches, churn, fill);
criterion_main!(benches);
