//! What a batch hands out, by whatever way: as many areas as single requests would.

use pcpu::{AllocError, AllocFlags, FreeFlags, Request};

use crate::audit::audit;
use crate::batch::{assert_undone, audit_of, free_many, free_many_at, lasting, take_over};
use crate::cached::{seat, with_caches};
use crate::copies::assert_stamped;
use crate::small::{UNIT_BYTES, small_machine};

/// Sizes, alignments and how many; some in rows, some that cannot lie in one, some longer than a page.
const BATCHES: &[(usize, usize, usize)] = &[
    (8, 8, 1),
    (8, 8, 16),
    (4, 4, 700),
    (12, 4, 33),
    (24, 16, 9),
    (4, 64, 40),
    (100, 4, 64),
    (4096, 4096, 3),
    (5000, 8, 5),
    (UNIT_BYTES, 4, 2),
];

#[test]
fn a_batch_is_as_many_areas() {
    for machine in [small_machine(3), small_machine(3).dirty_memory()] {
        let pcpu = machine.online(2).build().unwrap();
        for round in 0..3 {
            let mut all = Vec::new();
            for &(bytes, align, count) in BATCHES {
                let before = audit(&pcpu).stats;
                let mut areas = vec![0; count];
                pcpu.allocate_many(&Request::new(bytes, align), &mut areas)
                    .unwrap_or_else(|error| panic!("{bytes} {align} {count}: {error}"));
                take_over(&pcpu, &areas, (bytes, align));
                let after = audit(&pcpu).stats;
                assert_eq!(after.allocs, before.allocs + count as u64, "round {round}");
                assert_eq!(after.live, before.live + count as u64);
                all.push((areas, bytes));
            }
            for (areas, bytes) in all {
                for &address in &areas {
                    for cpu in pcpu.units().materialised().iter() {
                        assert_stamped(&pcpu, (address, bytes), cpu);
                    }
                }
                free_many(&pcpu, &areas).unwrap();
            }
            assert_eq!(audit(&pcpu).stats.live, 0);
        }
    }
}

/// What memory that is there has room for lies in one row, and holes that have room for two are filled.
#[test]
fn areas_lie_one_behind_the_other() {
    let pcpu = small_machine(2).build().unwrap();
    let request = Request::new(8, 8);
    let mut row = [0; 16];
    pcpu.allocate_many(&request, &mut row).unwrap();
    assert!(row.windows(2).all(|pair| pair[0] + 8 == pair[1]));
    let hole = [row[3], row[4], row[5], row[8]];
    free_many(&pcpu, &hole).unwrap();
    // Swept, so that the holes are free.
    assert_eq!(pcpu.stats().live, 12);
    let mut again = [0; 6];
    pcpu.allocate_many(&request, &mut again).unwrap();
    let end = row[15];
    assert_eq!(again, [row[3], row[4], row[5], end + 8, end + 16, end + 24]);
    // One that is alone goes into the hole for one.
    let mut last = [0];
    pcpu.allocate_many(&request, &mut last).unwrap();
    assert_eq!(last, [row[8]]);
}

#[test]
fn no_areas_are_nothing() {
    for pcpu in [
        small_machine(2).build().unwrap(),
        with_caches(&small_machine(2)),
    ] {
        let before = pcpu.stats();
        for request in [
            Request::new(8, 8),
            Request::new(0, 3),
            Request::new(usize::MAX, 8),
        ] {
            pcpu.allocate_many(&request, &mut []).unwrap();
            pcpu.allocate_many_at(&seat(&pcpu, 0), &request, &mut [])
                .unwrap();
        }
        free_many(&pcpu, &[]).unwrap();
        assert_eq!(before, pcpu.stats());
    }
}

#[test]
fn the_reserved_region_serves_batches() {
    let pcpu = small_machine(2).build().unwrap();
    let request = Request::new(100, 4).with_flags(AllocFlags::RESERVED);
    let region = pcpu.sizes().regions().reserved;
    let fits = region.len() / 100;
    let before = audit(&pcpu);
    let free_bytes = region.len() - fits * 100;
    for flags in [AllocFlags::RESERVED, AllocFlags::RESERVED | AllocFlags::TRY] {
        let refused = pcpu.allocate_many(&request.with_flags(flags), &mut vec![0; fits + 1]);
        let error = AllocError::ReservedExhausted {
            bytes: 100,
            free_bytes,
        };
        assert_eq!(refused, Err(error));
    }
    assert_eq!(before.areas, audit(&pcpu).areas);
    assert_eq!(lasting(&before.stats), lasting(&pcpu.stats()));
    let mut out = vec![0; fits];
    pcpu.allocate_many(&request, &mut out).unwrap();
    take_over(&pcpu, &out, (100, 4));
    // SAFETY: nobody uses the areas.
    unsafe { pcpu.free_many(&out, FreeFlags::RESERVED) }.unwrap();
    assert_eq!(before.areas, audit(&pcpu).areas);
}

/// Who may only try gets all that memory has room for, however many rows that are, and otherwise nothing.
#[test]
fn trying_is_all_or_nothing_too() {
    let pcpu = small_machine(2).dirty_memory().build().unwrap();
    let mut areas = vec![0; 120];
    let request = Request::new(32, 32);
    pcpu.allocate_many(&request, &mut areas).unwrap();
    take_over(&pcpu, &areas, (32, 32));
    let (odd, even): (Vec<_>, Vec<_>) = areas.iter().partition(|address| *address & 32 != 0);
    free_many(&pcpu, &odd).unwrap();
    let request = request.with_flags(AllocFlags::TRY);
    let mut again = vec![0; odd.len()];
    pcpu.allocate_many(&request, &mut again).unwrap();
    take_over(&pcpu, &again, (32, 32));
    let before = audit(&pcpu);
    let mut too_many = vec![0; UNIT_BYTES / 32];
    assert_eq!(
        pcpu.allocate_many(&request, &mut too_many),
        Err(AllocError::Busy)
    );
    assert_undone(&before, &audit(&pcpu));
    free_many(&pcpu, &even).unwrap();
    free_many(&pcpu, &again).unwrap();
    assert_eq!(audit(&pcpu).stats.live, 0);
}

/// Out of the cache first, the rest past it; what was taken out of the cache for a batch that fails is in there again.
#[test]
fn the_cache_serves_what_it_can() {
    let pcpu = with_caches(&small_machine(2));
    let here = seat(&pcpu, 0);
    let request = Request::new(64, 8);
    let first = pcpu.allocate_at(&here, &request).unwrap();
    let misses = pcpu.stats().cache_misses;
    let mut from_run = [0; 4];
    pcpu.allocate_many_at(&here, &request, &mut from_run)
        .unwrap();
    take_over(&pcpu, &from_run, (64, 8));
    assert!(from_run.windows(2).all(|pair| pair[0] + 64 == pair[1]));
    assert_eq!(
        (from_run[0], pcpu.stats().cache_misses),
        (first + 64, misses)
    );
    let mut more = [0; 20];
    pcpu.allocate_many_at(&here, &request, &mut more).unwrap();
    take_over(&pcpu, &more, (64, 8));
    assert_eq!(more[0], from_run[3] + 64, "the run goes on");
    assert_eq!(pcpu.stats().live, 25);

    free_many_at(&pcpu, &here, &from_run);
    let before = audit_of(&pcpu);
    let trying = request.with_flags(AllocFlags::TRY);
    let refused = pcpu.allocate_many_at(&here, &trying, &mut [0; 2000]);
    assert_eq!(refused, Err(AllocError::Busy));
    let after = audit_of(&pcpu);
    assert_eq!((before.1, lasting(&before.0)), (after.1, lasting(&after.0)));
    let misses = after.0.cache_misses;
    let mut back = [0; 4];
    pcpu.allocate_many_at(&here, &request, &mut back).unwrap();
    back.sort_unstable();
    assert_eq!((back, pcpu.stats().cache_misses), (from_run, misses));
    take_over(&pcpu, &back, (64, 8));

    free_many_at(&pcpu, &here, &back);
    free_many_at(&pcpu, &here, &more);
    free_many_at(&pcpu, &here, &[first]);
    assert_eq!(pcpu.stats().live, 0);
}

/// A batch past the cache has its areas stashed when they are freed; those that lie apart are zeroed one by one, however many they are.
#[test]
fn areas_of_a_batch_that_lie_apart_are_zeroed() {
    let pcpu = with_caches(&small_machine(3));
    let here = seat(&pcpu, 0);
    let mut all = [0; 120];
    // 48 bytes, so that the areas are no whole lines.
    let (request, size) = (Request::new(48, 8), (48, 8));
    pcpu.allocate_many_at(&here, &request, &mut all).unwrap();
    take_over(&pcpu, &all, size);
    let some: Vec<usize> = all.into_iter().step_by(6).collect();
    free_many_at(&pcpu, &here, &some);
    // Nobody asks for the counters: that would have everything swept.
    let mut again = [0; 20];
    pcpu.allocate_many_at(&here, &request, &mut again).unwrap();
    assert!(again.iter().all(|area| some.contains(area)));
    take_over(&pcpu, &again, size);
}

/// Batches and single calls on several CPUs, some of which fail, against a plain model.
#[test]
fn batches_and_single_calls_mix() {
    for seed in 0..8 {
        let pcpu = with_caches(&small_machine(3).chunks(4));
        let seats: Vec<_> = (0..3).map(|cpu| seat(&pcpu, cpu)).collect();
        let mut numbers = fastrand::Rng::with_seed(seed);
        let mut live: Vec<(usize, usize)> = Vec::new();
        let (mut allocs, mut refused) = (0, 0);
        for step in 0..1500 {
            let here = &seats[numbers.usize(..3)];
            let bytes = [4, 8, 12, 64, 200][numbers.usize(..5)];
            let flags = match numbers.u32(..4) {
                0 => AllocFlags::TRY,
                1 => AllocFlags::ATOMIC,
                _ => AllocFlags::empty(),
            };
            let request = Request::new(bytes, 4).with_flags(flags);
            let count = match numbers.u32(..12) {
                0..4 => numbers.usize(..40),
                4 => 2000,
                5..7 => 1,
                7 => {
                    pcpu.trim(0);
                    0
                }
                _ => {
                    for _ in 0..numbers.usize(..30).min(live.len()) {
                        let (address, bytes) = live.swap_remove(numbers.usize(..live.len()));
                        for cpu in pcpu.units().materialised().iter() {
                            assert_stamped(&pcpu, (address, bytes), cpu);
                        }
                        free_many_at(&pcpu, here, &[address]);
                    }
                    0
                }
            };
            let mut out = vec![0; count];
            match pcpu.allocate_many_at(here, &request, &mut out) {
                Ok(()) => {
                    take_over(&pcpu, &out, (bytes, 4));
                    live.extend(out.into_iter().map(|address| (address, bytes)));
                    allocs += count as u64;
                }
                Err(_) => refused += 1,
            }
            if step % 50 == 0 {
                let stats = pcpu.stats();
                let bytes: usize = live.iter().map(|(_, bytes)| bytes).sum();
                assert_eq!((stats.allocs, stats.live), (allocs, live.len() as u64));
                assert_eq!((stats.live_bytes, stats.failures), (bytes as u64, refused));
                assert_eq!(stats.sizes.iter().sum::<u64>(), allocs);
            }
        }
        assert!(refused > 10);
        let areas: Vec<_> = live.iter().map(|&(address, _)| address).collect();
        free_many_at(&pcpu, &seats[0], &areas);
        assert_eq!((pcpu.stats().live, pcpu.stats().late_errors), (0, 0));
    }
}
