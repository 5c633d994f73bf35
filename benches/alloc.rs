//! Allocating: an area and its free on machines of many CPUs, zeroed and not; memory that nobody has touched; chunks that
//! are full; several areas at one go. `cargo bench --bench alloc`.
//!
//! The words of a benchmark's parameter are columns of the figures that `cargo xtask measure` writes.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pcpu::backing::sim;
use pcpu::{AllocFlags, Domain, Request, drain_caches};
use pcpu_workloads::areas::{Heap, HeapArea, Live, PerCpuAreas, Source, Zeroing, pairs};
use pcpu_workloads::dirty::{AT_ONCE, DirtyPairs};
use pcpu_workloads::home::{Home, Machine};
use pcpu_workloads::stores::Stores;

const BYTES: usize = 8;
const LIVE: u32 = 100;

fn pair(criterion: &mut Criterion) {
    pair_on::<0>(criterion, 16);
    pair_on::<1>(criterion, 64);
    pair_on::<2>(criterion, 256);
}

/// One area that comes and goes, on a machine of so many CPUs. Nobody writes to it. Its caches work by LOCKed steps; with the
/// process's own instance `pcpu bench pair --possible-cpus` does the same.
fn pair_on<const SLOT: usize>(criterion: &mut Criterion, cpus: u32) {
    Home::<Machine<SLOT>>::with_cpus(cpus).expect("a machine");
    let mut group = criterion.benchmark_group("pair-locked");
    let parameter = format!("cpus={cpus} live={LIVE} size={BYTES}");
    let ours = PerCpuAreas::<Machine<SLOT>>::new(Zeroing::Off);
    let _live = Live::new(ours, (0..LIVE).map(|_| BYTES)).expect("there is room");
    group.bench_function(BenchmarkId::new("pcpu", &parameter), |bencher| {
        bencher.iter_custom(|iters| timed(|| pairs(ours, BYTES, iters).expect("there is room")));
    });
    group.bench_function(BenchmarkId::new("malloc+free", &parameter), |bencher| {
        bencher.iter_custom(|iters| timed(|| pairs(Heap, BYTES, iters).expect("there is room")));
    });
    group.finish();
}

fn dirty(criterion: &mut Criterion) {
    dirty_on::<3>(criterion, 2);
    dirty_on::<0>(criterion, 16);
    dirty_on::<1>(criterion, 64);
    dirty_on::<2>(criterion, 256);
}

/// Areas whose copies are written to on all CPUs before they are freed, outside the clock: what is handed out again has to
/// be zeroed. By LOCKed steps; `pcpu bench dirty` does the same with the process's own instance.
fn dirty_on<const SLOT: usize>(criterion: &mut Criterion, cpus: u32) {
    let home = Home::<Machine<SLOT>>::with_cpus(cpus).expect("a machine");
    let mut group = criterion.benchmark_group("pair-dirty-locked");
    let parameter = format!("cpus={cpus} live={LIVE} size={BYTES} zeroed");
    let ours = PerCpuAreas::<Machine<SLOT>>::new(Zeroing::On);
    let _live = Live::new(ours, (0..LIVE).map(|_| BYTES)).expect("there is room");
    let mut pairs = DirtyPairs::new(home, BYTES, Zeroing::On);
    group.bench_function(BenchmarkId::new("pcpu", &parameter), |bencher| {
        bencher.iter_custom(|iters| pairs.run(iters).expect("there is room"));
    });
    let mut stores = Stores::new(&home, AT_ONCE, BYTES).expect("there is room");
    group.bench_function(BenchmarkId::new("bare-loop", &parameter), |bencher| {
        bencher.iter_custom(|iters| timed(|| stores.store(iters)));
    });
    group.finish();
}

fn fresh(criterion: &mut Criterion) {
    fresh_on::<3>(criterion, 2);
    fresh_on::<2>(criterion, 256);
}

/// Memory that nobody has touched, and the first write to it, on one CPU: in each round a chunk is made, and all of its pages
/// are populated and written to. What is freed goes back to the system, the chunk with it, outside the clock.
fn fresh_on<const SLOT: usize>(criterion: &mut Criterion, cpus: u32) {
    const BYTES: usize = 64;
    let home = Home::<Machine<SLOT>>::with_cpus(cpus).expect("a machine");
    let mut group = criterion.benchmark_group("fresh");
    let parameter = format!("cpus={cpus} live=0 size={BYTES} zeroed");
    let ours = PerCpuAreas::<Machine<SLOT>>::new(Zeroing::On);
    let pcpu = Machine::<SLOT>::allocator();
    let at_once = pcpu.sizes().unit_bytes() / BYTES;
    // The first chunk's memory never goes back, and so is to be in use, to the last area: past the caches, which would have
    // some that are free. Then all that comes lies in a page of its own.
    let filler = Request::new(BYTES, BYTES);
    let pages = pcpu.stats().populated_pages;
    let mut fillers = Vec::new();
    while pcpu.stats().populated_pages == pages {
        fillers.push(pcpu.allocate(&filler).expect("there is room"));
    }
    free_all(ours, &mut fillers.split_off(fillers.len() - 1));
    group.bench_function(BenchmarkId::new("pcpu", &parameter), |bencher| {
        bencher.iter_custom(|iters| {
            let copy = |area| home.copy(area, 0).ok();
            let give_back = || {
                drain_caches::<Machine<SLOT>>();
                pcpu.trim(0);
                assert_eq!(pcpu.stats().populated_pages, pages, "all is fresh");
            };
            fresh_areas(ours, BYTES, at_once, iters, copy, give_back)
        });
    });
    free_all(ours, &mut fillers);
    pcpu.trim(0);
    group.bench_function(BenchmarkId::new("malloc", &parameter), |bencher| {
        bencher.iter_custom(|iters| {
            let copy = |area: HeapArea| Some(area.address());
            let give_back = || {
                // SAFETY: it may be called at any time.
                unsafe { libc::malloc_trim(0) };
            };
            fresh_areas(Heap, BYTES, at_once, iters, copy, give_back)
        });
    });
    group.finish();
}

/// The time for so many areas, allocated in whole rounds of `at_once`: what is made once for all of them counts for each.
fn fresh_areas<S: Source>(
    source: S,
    bytes: usize,
    at_once: usize,
    iters: u64,
    copy: impl Fn(S::Area) -> Option<*mut u64>,
    give_back: impl Fn(),
) -> Duration {
    let mut areas = Vec::with_capacity(at_once);
    let kind = source.kind(bytes);
    let mut time = Duration::ZERO;
    let rounds = iters.div_ceil(at_once as u64);
    for _ in 0..rounds {
        give_back();
        time += timed(|| {
            for _ in 0..at_once {
                let area = source.allocate(&kind).expect("there is room");
                let copy = copy(area).expect("a possible CPU");
                // SAFETY: the area is live, and nobody else uses it.
                unsafe { copy.write_volatile(1) };
                areas.push(area);
            }
        });
        free_all(source, &mut areas);
    }
    time.mul_f64(iters as f64 / (rounds * at_once as u64) as f64)
}

fn free_all<S: Source>(source: S, areas: &mut Vec<S::Area>) {
    for area in areas.drain(..) {
        // SAFETY: the area is live, and nobody uses it.
        unsafe { source.free(area) }.expect("the area is live");
    }
}

/// A request for which there is no room in 400 chunks, with holes that are too small in every page, against one in the first
/// chunk that has room at once. The simulated machine: its first chunk is small.
fn full_chunks(criterion: &mut Criterion) {
    const CHUNKS: u32 = 400;
    let request = Request::new(4096, 8).with_flags(AllocFlags::NO_ZERO);
    let mut group = criterion.benchmark_group("full-chunks");
    for (name, chunks) in [("pcpu", CHUNKS), ("one-chunk", 1)] {
        let pcpu = sim::Machine::new(2).build().expect("a machine");
        let mut areas = Vec::new();
        // Pairs of areas that fill a page, of which one is freed.
        let half = Request::new(2048, 2048).with_flags(AllocFlags::NO_ZERO);
        while pcpu.stats().chunks < chunks + 1 {
            areas.push(pcpu.allocate(&half).expect("there is room"));
        }
        for &area in areas.iter().step_by(2) {
            // SAFETY: the area is live, and nobody uses it.
            unsafe { pcpu.free(area) }.expect("the area is live");
        }
        let parameter = format!("cpus=2 size={}", request.bytes());
        group.bench_function(BenchmarkId::new(name, parameter), |bencher| {
            bencher.iter(|| {
                let address = pcpu.allocate(black_box(&request)).expect("there is room");
                // SAFETY: the area has just been allocated, and nobody uses it.
                unsafe { pcpu.free(black_box(address)) }.expect("the area is live");
            });
        });
    }
    group.finish();
}

fn batch(criterion: &mut Criterion) {
    batch_on::<3>(criterion, 2);
    batch_on::<2>(criterion, 256);
}

/// Areas that are wanted together, at one go and singly; they are freed outside the clock, and zeroed when they come again.
fn batch_on<const SLOT: usize>(criterion: &mut Criterion, cpus: u32) {
    const AREAS: usize = 16;
    Home::<Machine<SLOT>>::with_cpus(cpus).expect("a machine");
    let mut group = criterion.benchmark_group(format!("batch-of-{AREAS}"));
    let parameter = format!("cpus={cpus} live={LIVE} size={BYTES} zeroed");
    let ours = PerCpuAreas::<Machine<SLOT>>::new(Zeroing::On);
    let kind = ours.kind(BYTES);
    let _live = Live::new(ours, (0..LIVE).map(|_| BYTES)).expect("there is room");
    let at_once = |areas: &mut [usize; AREAS]| {
        Machine::<SLOT>::allocate_many(&kind, areas).expect("there is room");
    };
    let singly = |areas: &mut [usize; AREAS]| {
        for area in areas {
            *area = ours.allocate(&kind).expect("there is room");
        }
    };
    group.bench_function(BenchmarkId::new("pcpu", &parameter), |bencher| {
        bencher.iter_custom(|iters| batches(ours, iters, at_once));
    });
    group.bench_function(BenchmarkId::new("pcpu-singly", &parameter), |bencher| {
        bencher.iter_custom(|iters| batches(ours, iters, singly));
    });
    group.finish();
}

fn batches<const AREAS: usize>(
    source: impl Source<Area = usize>,
    iters: u64,
    mut fill: impl FnMut(&mut [usize; AREAS]),
) -> Duration {
    let mut time = Duration::ZERO;
    let mut areas = [0; AREAS];
    for _ in 0..iters {
        time += timed(|| fill(black_box(&mut areas)));
        free_all(source, &mut areas.to_vec());
    }
    time
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

criterion_group!(benches, pair, dirty, fresh, full_chunks, batch);
criterion_main!(benches);
