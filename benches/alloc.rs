//! Allocating and freeing on a simulated machine, and layouts: `cargo bench --bench alloc`.

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::unit::{EvenNodes, FirstChunkSpec, UnitPlan, storage_words};
use pcpu::{AllocFlags, Request};
use std::hint::black_box;

fn allocate_and_free(pcpu: &SimAllocator, request: &Request) {
    let address = pcpu.allocate(black_box(request)).expect("there is room");
    // SAFETY: the area has just been allocated, and nobody uses it.
    unsafe { pcpu.free(black_box(address)) }.expect("the area is live");
}

/// One area of 8 bytes, with 100 others live.
fn pair(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pair");
    for cpus in [2, 16, 64, 256] {
        let pcpu = Machine::new(cpus).build().expect("a machine");
        let zeroed = Request::new(8, 8);
        let not_zeroed = zeroed.with_flags(AllocFlags::NO_ZERO);
        for _ in 0..100 {
            pcpu.allocate(&zeroed).expect("there is room");
        }
        group.bench_function(BenchmarkId::new("not zeroed", cpus), |bencher| {
            bencher.iter(|| allocate_and_free(&pcpu, &not_zeroed));
        });
        group.bench_function(BenchmarkId::new("zeroed", cpus), |bencher| {
            bencher.iter(|| allocate_and_free(&pcpu, &zeroed));
        });
    }
    group.finish();
}

/// The plan of a first chunk.
fn layout(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("layout");
    for (cpus, nodes) in [(16, 1), (256, 8), (8192, 64)] {
        let topology = EvenNodes::new(cpus, nodes).expect("a topology");
        let mut words = vec![0; storage_words(cpus)];
        group.bench_function(BenchmarkId::new("embed", cpus), |bencher| {
            bencher.iter(|| {
                let spec = FirstChunkSpec::default();
                UnitPlan::embed(black_box(&spec), &topology, &mut words).map(|plan| plan.nr_units())
            });
        });
    }
    group.finish();
}

criterion_group!(benches, pair, layout);
criterion_main!(benches);
