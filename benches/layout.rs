//! Planning a first chunk: `cargo bench --bench layout`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pcpu::unit::{EvenNodes, FirstChunkSpec, UnitPlan, storage_words};

fn layout(criterion: &mut Criterion) {
    for (cpus, nodes) in [(16, 1), (256, 8), (8192, 64)] {
        let mut group = criterion.benchmark_group(format!("layout-{nodes}-nodes"));
        let topology = EvenNodes::new(cpus, nodes).expect("a topology");
        let mut words = vec![0; storage_words(cpus)];
        group.bench_function(
            BenchmarkId::new("pcpu", format!("cpus={cpus}")),
            |bencher| {
                bencher.iter(|| {
                    let spec = FirstChunkSpec::default();
                    UnitPlan::embed(black_box(&spec), &topology, &mut words)
                        .map(|plan| plan.nr_units())
                });
            },
        );
        group.finish();
    }
}

criterion_group!(benches, layout);
criterion_main!(benches);
