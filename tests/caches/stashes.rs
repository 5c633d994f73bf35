//! Areas of no run that were freed on a CPU, and that it hands out again.

use std::collections::BTreeSet;

use pcpu::backing::sim::SimAllocator;
use pcpu::unit::CpuId;
use pcpu::{AllocFlags, FreeError, Request};

use crate::copies::{assert_stamped, assert_zero, stamp};
use crate::machine::{REQUEST, SLOTS, free_at, live_areas, seat, with_caches};
use crate::roomy::roomy_machine;
use crate::small::small_machine;

/// A machine whose stashes name areas in the areas themselves, and one that has rows for the names.
fn machines() -> [SimAllocator; 2] {
    [with_caches(&small_machine(2)), roomy()]
}

/// One that has rows. Both CPUs have had runs, so that they are as short as on the other.
fn roomy() -> SimAllocator {
    let pcpu = with_caches(&roomy_machine(2));
    for cpu in [0, 1] {
        let seat = seat(&pcpu, cpu);
        let area = pcpu.allocate_at(&seat, &Request::new(4, 4)).unwrap();
        free_at(&pcpu, &seat, area).unwrap();
        pcpu.drain(&seat);
    }
    pcpu
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
        for cpu in [0, 1].map(CpuId::new) {
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
                for cpu in [0, 1].map(CpuId::new) {
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

/// Whoever frees an area does not touch its memory, if there are rows for the names.
#[test]
fn what_is_freed_is_left_as_it_is() {
    let pcpu = roomy();
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
