//! Recorded traces of real kernels in the memory of a process, through a domain, on a machine of 16 CPUs: `cargo bench
//! --bench replay`. (On the simulated machine, with all checks: `pcpu replay`.)

#[path = "../tests/common/recorded.rs"]
mod recorded;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pcpu::{AllocFlags, Domain, FreeFlags, Request, drain_caches};
use pcpu_workloads::areas::Zeroing;
use pcpu_workloads::home::{Home, Machine};
use recorded::Op;

const TRACES: [&str; 6] = ["bpf", "cg", "fork", "ns", "boot8", "numa32"];
const CPUS: u32 = 16;

type Sixteen = Machine<0>;

/// A step; areas are numbered in the order of their allocations.
#[derive(Clone, Copy)]
enum Step {
    Allocate(Request),
    Free(usize),
}

fn replay(criterion: &mut Criterion) {
    Home::<Sixteen>::with_cpus(CPUS).expect("a machine");
    for name in TRACES {
        let mut group = criterion.benchmark_group(format!("replay-process-{name}"));
        let steps = steps(&recorded::read(name));
        for (zeroing, words) in [(Zeroing::Off, ""), (Zeroing::On, " zeroed")] {
            let id = BenchmarkId::new("pcpu", format!("cpus={CPUS}{words}"));
            group.bench_function(id, |bencher| {
                bencher.iter_custom(|iters| run(&steps, zeroing, iters));
            });
        }
        group.finish();
    }
}

/// Allocations and the frees that match them; what the recorded kernel refused is freed at once. Units of a process lie at
/// multiples of 128 bytes: the few requests that want more (of 99,062 steps of numa32 25) get that.
fn steps(trace: &[Op]) -> Vec<Step> {
    let limit = Sixteen::allocator().max_align_bytes();
    let adapted = |request: Request| request.with_size(request.bytes(), request.align().min(limit));
    let mut live: HashMap<u64, Vec<usize>> = HashMap::new();
    let (mut areas, mut steps) = (0, Vec::new());
    for op in trace {
        match *op {
            Op::Alloc { ptr, request } => {
                live.entry(ptr).or_default().push(areas);
                steps.push(Step::Allocate(adapted(request)));
                areas += 1;
            }
            Op::Refused { request } => {
                steps.extend([Step::Allocate(adapted(request)), Step::Free(areas)]);
                areas += 1;
            }
            Op::Free { ptr } => steps.extend(live.get_mut(&ptr).and_then(Vec::pop).map(Step::Free)),
        }
    }
    steps
}

/// The time for so many steps, done in whole runs; what is left is freed and given back outside the clock.
fn run(steps: &[Step], zeroing: Zeroing, iters: u64) -> Duration {
    let runs = iters.div_ceil(steps.len() as u64);
    let flags = match zeroing {
        Zeroing::On => AllocFlags::empty(),
        Zeroing::Off => AllocFlags::NO_ZERO,
    };
    let mut areas: Vec<Option<usize>> = Vec::with_capacity(steps.len());
    let mut time = Duration::ZERO;
    for _ in 0..runs {
        let start = Instant::now();
        for step in steps {
            match *step {
                Step::Allocate(request) => {
                    let request = request.with_flags(request.flags() | flags);
                    areas.push(Some(Sixteen::allocate(&request).expect("there is room")));
                }
                Step::Free(area) => free(&mut areas[area]),
            }
        }
        time += start.elapsed();
        areas.iter_mut().for_each(free);
        areas.clear();
        drain_caches::<Sixteen>();
        Sixteen::allocator().trim(0);
    }
    time.mul_f64(iters as f64 / (runs * steps.len() as u64) as f64)
}

fn free(area: &mut Option<usize>) {
    if let Some(area) = area.take() {
        // SAFETY: the area is live, and nobody uses it.
        unsafe { Sixteen::free(area, FreeFlags::empty()) }.expect("the area is live");
    }
}

criterion_group!(benches, replay);
criterion_main!(benches);
