//! Areas of no run that were freed on a CPU, and that it hands out again.

use std::collections::BTreeSet;

use pcpu::backing::sim::SimAllocator;
use pcpu::unit::CpuId;
use pcpu::{AllocFlags, FreeError, Request};

use crate::copies::{assert_stamped, assert_zero, stamp};
use crate::machine::{REQUEST, SLOTS, Watched, free_at, idle_areas, live_areas, seat, with_caches};
use crate::roomy::roomy_machine;
use crate::small::small_machine;

const CPUS: [CpuId; 2] = [CpuId::new(0), CpuId::new(1)];

/// A machine whose stashes name areas in the areas themselves, and one that has rows for the names.
fn machines() -> [SimAllocator; 2] {
    [small_machine(2), roomy_machine(2)].map(|machine| with_caches(&machine))
}

/// So many areas of a CPU, of which the first belong to no run any more.
fn allocate(pcpu: &SimAllocator, cpu: u32, count: usize) -> Vec<usize> {
    let seat = seat(pcpu, cpu);
    let areas = (0..count).map(|_| pcpu.allocate_at(&seat, &REQUEST).unwrap());
    areas.collect()
}

#[test]
fn handed_out_again_by_the_cpu_that_freed_them() {
    for pcpu in machines() {
        let here = seat(&pcpu, 0);
        let mut live = allocate(&pcpu, 0, 4 * SLOTS);
        // Nothing is left of the run.
        for cpu in CPUS {
            live.iter()
                .for_each(|&area| assert_zero(&pcpu, (area, 64), cpu));
        }
        let misses = pcpu.stats().cache_misses;
        for _ in 0..3 {
            let freed: Vec<_> = live.drain(..3).collect();
            for &area in &freed {
                stamp(&pcpu, (area, 64));
                free_at(&pcpu, &here, area).unwrap();
            }
            for &area in freed.iter().rev() {
                assert_eq!(
                    pcpu.allocate_at(&here, &REQUEST),
                    Ok(area),
                    "the last first"
                );
                for cpu in CPUS {
                    assert_zero(&pcpu, (area, 64), cpu);
                }
                live.push(area);
            }
        }
        assert_eq!(pcpu.stats().cache_misses, misses);
        assert_eq!(live.iter().collect::<BTreeSet<_>>().len(), 4 * SLOTS);
    }
}

#[test]
fn freed_twice() {
    for pcpu in machines() {
        let live = allocate(&pcpu, 0, 4 * SLOTS);
        let seats = [0, 1].map(|cpu| seat(&pcpu, cpu));
        for (first, &address) in seats.iter().cycle().zip(&live[..2 * SLOTS]) {
            free_at(&pcpu, first, address).unwrap();
            let is_free = Err(FreeError::NotAllocated { address });
            for second in &seats {
                assert_eq!(free_at(&pcpu, second, address), is_free);
            }
            // SAFETY: it is refused.
            assert_eq!(unsafe { pcpu.free(address) }, is_free);
        }
        assert_eq!(pcpu.stats().live, 2 * SLOTS as u64);
    }
}

/// A stash may name what has been swept, and is something else by now.
#[test]
fn swept_and_handed_out_as_something_else() {
    for pcpu in machines() {
        let seats = [0, 1].map(|cpu| seat(&pcpu, cpu));
        let mut areas = allocate(&pcpu, 0, 4 * SLOTS);
        for &area in &areas[..2 * SLOTS] {
            free_at(&pcpu, &seats[0], area).unwrap();
        }
        areas.drain(..2 * SLOTS);
        // Looking at the counters sweeps.
        assert_eq!(pcpu.stats().live, 2 * SLOTS as u64);
        for bytes in [4, 12, 100, 64, 200] {
            let request = Request::new(bytes, 4);
            let others = (0..6).map(|_| pcpu.allocate_at(&seats[1], &request).unwrap());
            areas.extend(others);
        }
        // Some of them are freed again, and start where something else did.
        for area in areas.split_off(4 * SLOTS) {
            free_at(&pcpu, &seats[1], area).unwrap();
        }
        areas.extend(allocate(&pcpu, 0, 4 * SLOTS));
        let all = live_areas(&pcpu);
        let starts: BTreeSet<_> = areas.iter().copied().collect();
        assert_eq!(starts.len(), areas.len(), "handed out twice");
        assert!(areas.iter().all(|area| all.contains_key(area)));
        let mut end = 0;
        for (start, len) in all {
            assert!(start >= end, "{start:#x} overlaps what is before it");
            end = start + len;
        }
    }
}

/// A stash names an area that has been swept, and a shorter one that was freed starts there by now.
#[test]
fn a_shorter_one_in_its_place() {
    for pcpu in machines() {
        let here = seat(&pcpu, 0);
        let areas = allocate(&pcpu, 0, 4 * SLOTS);
        free_at(&pcpu, &here, areas[0]).unwrap();
        // Looking at the counters sweeps.
        assert_eq!(pcpu.stats().live, 4 * SLOTS as u64 - 1);
        let shorter = pcpu.allocate(&Request::new(32, 8)).unwrap();
        assert_eq!(shorter, areas[0], "the lowest place");
        // SAFETY: just allocated.
        unsafe { pcpu.free(shorter) }.unwrap();
        let again = pcpu.allocate_at(&here, &REQUEST).unwrap();
        assert!(live_areas(&pcpu)[&again] >= 64);
    }
}

/// A stash counts in few bits, which overflow into the counters.
#[test]
fn everything_is_counted() {
    for pcpu in machines() {
        let here = seat(&pcpu, 0);
        let live = allocate(&pcpu, 0, 2 * SLOTS);
        let before = pcpu.stats();
        // Only the first belong to no run.
        let mut area = live[0];
        const ROUNDS: u64 = 100_000;
        for _ in 0..ROUNDS {
            free_at(&pcpu, &here, area).unwrap();
            area = pcpu.allocate_at(&here, &REQUEST).unwrap();
        }
        let after = pcpu.stats();
        assert_eq!(after.allocs - before.allocs, ROUNDS);
        assert_eq!(after.frees - before.frees, ROUNDS);
        assert_eq!(after.live, before.live);
        assert!(after.cache_misses - before.cache_misses < 20, "{after}");
        assert_eq!(after.late_errors, 0);
    }
}

/// Areas of one length may be aligned to more or to less.
#[test]
fn aligned_as_asked_for() {
    for pcpu in machines() {
        let here = seat(&pcpu, 0);
        let request = |align| Request::new(32, align);
        let mut live: Vec<_> = (0..64)
            .map(|_| pcpu.allocate_at(&here, &request(8)).unwrap())
            .collect();
        for align in [64, 8, 32, 4, 128, 16] {
            for area in live.drain(..live.len() / 2) {
                free_at(&pcpu, &here, area).unwrap();
            }
            for _ in 0..32 {
                let area = pcpu.allocate_at(&here, &request(align)).unwrap();
                assert!(area.is_multiple_of(align));
                live.push(area);
            }
        }
    }
}

/// What a stash names keeps no page from going when the owner asks.
#[test]
fn memory_goes_back() {
    for pcpu in machines() {
        let before = pcpu.populated_pages();
        let here = seat(&pcpu, 0);
        let live = allocate(&pcpu, 0, 100 * SLOTS);
        assert!(pcpu.populated_pages() > before);
        for area in live {
            free_at(&pcpu, &here, area).unwrap();
        }
        pcpu.drain(&here);
        pcpu.trim(0);
        assert_eq!(pcpu.populated_pages(), before);
        assert_eq!(pcpu.stats().live, 0);
    }
}

/// Whatever stands where names are read, no area is handed out twice, none is lost, all are aligned, and all are counted.
#[test]
fn names_that_are_anything() {
    for seed in 0..4 {
        for pcpu in machines() {
            let mut numbers = fastrand::Rng::with_seed(seed);
            let seats = [0, 1].map(|cpu| {
                let watched = Watched::new(seat(&pcpu, cpu), |_| ());
                watched.mislead(numbers.fork());
                watched
            });
            let mut live = Vec::new();
            let mut allocs = pcpu.stats().allocs;
            for step in 0..10_000 {
                let here = &seats[numbers.usize(..2)];
                if numbers.bool() && live.len() < 300 {
                    let shapes = [(132, 4), (136, 8), (12, 8), (16, 16), (64, 8), (64, 64)];
                    let (bytes, align) = match numbers.usize(..8) {
                        6 => (numbers.usize(129..400), 4),
                        7 => (numbers.usize(1..2000), 1 << numbers.u32(..9)),
                        shape => shapes[shape],
                    };
                    let area = pcpu.allocate_at(here, &Request::new(bytes, align)).unwrap();
                    assert!(area.is_multiple_of(align));
                    CPUS.iter()
                        .for_each(|&cpu| assert_zero(&pcpu, (area, bytes), cpu));
                    stamp(&pcpu, (area, bytes));
                    live.push((area, bytes));
                    allocs += 1;
                } else if !live.is_empty() {
                    let (area, bytes) = live.swap_remove(numbers.usize(..live.len()));
                    CPUS.iter()
                        .for_each(|&cpu| assert_stamped(&pcpu, (area, bytes), cpu));
                    free_at(&pcpu, here, area).unwrap();
                    free_at(&pcpu, here, area).unwrap_err();
                }
                if step % 499 == 0 {
                    let stats = pcpu.stats();
                    let counted = (stats.allocs, stats.live, stats.late_errors);
                    assert_eq!(counted, (allocs, live.len() as u64, 0));
                    let areas: BTreeSet<_> = live.iter().map(|area| area.0).collect();
                    assert!(live_areas(&pcpu).into_keys().eq(areas));
                }
            }
        }
    }
}

/// What is named behind areas that were swept is still handed out, if the names stand in rows.
#[test]
fn behind_what_was_swept() {
    let pcpu = with_caches(&roomy_machine(2));
    let here = seat(&pcpu, 0);
    let live = allocate(&pcpu, 0, 300);
    let of_page = |page: usize| -> Vec<usize> {
        let pages = live
            .iter()
            .filter(|&&area| area / 4096 == live[0] / 4096 + page);
        pages.copied().collect()
    };
    let [first, second] = [1, 2].map(of_page);
    let (kept, swept) = (&second[..4], &first[..4]);
    for &area in kept.iter().chain(swept) {
        free_at(&pcpu, &here, area).unwrap();
    }
    // So many of them that their page is swept.
    for &area in &first[4..40] {
        // SAFETY: nobody uses the area.
        unsafe { pcpu.free(area) }.unwrap();
    }
    // What is left of the run comes before.
    let mut next = core::iter::repeat_with(|| pcpu.allocate_at(&here, &REQUEST).unwrap());
    let from_stash = next.by_ref().take(SLOTS).position(|area| area == kept[3]);
    assert!(from_stash.is_some());
    assert!(next.take(3).eq(kept[..3].iter().rev().copied()));
}

/// Rows need room in the first chunk. Neither they nor the tables are requests that the counters tell of.
#[test]
fn what_caches_take_of_the_first_chunk() {
    let policy = *with_caches(&roomy_machine(2)).policy();
    let cramped = with_caches(&small_machine(2).policy(policy));
    let [without, with] = machines();
    for (pcpu, tables) in [(cramped, 1), (without, 1), (with, 2)] {
        assert_eq!(idle_areas(&pcpu).len(), tables);
        pcpu.visit_chunks(|chunk| assert_eq!(chunk.largest_ever_bytes, 0));
        let stats = pcpu.stats();
        assert_eq!((stats.allocs, stats.live, stats.live_peak), (0, 0, 0));
    }
}

/// Whoever frees an area does not touch its memory, if there are rows for the names.
#[test]
fn what_is_freed_is_left_as_it_is() {
    let pcpu = with_caches(&roomy_machine(2));
    let here = seat(&pcpu, 0);
    let mut freed = allocate(&pcpu, 0, 4 * SLOTS);
    freed.truncate(2 * SLOTS);
    for &area in &freed {
        stamp(&pcpu, (area, 64));
        free_at(&pcpu, &here, area).unwrap();
    }
    let request = REQUEST.with_flags(AllocFlags::NO_ZERO);
    for &area in freed.iter().rev() {
        assert_eq!(pcpu.allocate_at(&here, &request), Ok(area));
        assert_stamped(&pcpu, (area, 64), CpuId::new(0));
    }
}
