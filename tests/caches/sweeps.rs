//! What is freed while somebody holds the lock is swept later: an upkeep is due for it.

use std::thread;

use pcpu::allocator::{Policy, UpkeepBy};
use pcpu::backing::sim::SimAllocator;
use pcpu::{FreeFlags, Request};

use crate::free::FreeArea;
use crate::machine::{seat, with_caches};
use crate::small::small_machine;

/// Longer than what caches serve, and several to a page.
const REQUEST: Request = Request::new(1000, 8);

/// Frees areas on another thread while this one holds the lock: while it looks at the map.
fn free_while_locked(pcpu: &SimAllocator, areas: &[usize]) {
    let mut left = Some(areas);
    pcpu.visit_map(|_, _| {
        if let Some(areas) = left.take() {
            // Who must not wait does not run the upkeep, either.
            let free = |&area: &usize| pcpu.free_area(area, FreeFlags::TRY).unwrap();
            thread::scope(|scope| scope.spawn(|| areas.iter().for_each(free)).join()).unwrap();
        }
    });
}

/// An instance whose first chunk is filled, none of whose upkeep is due.
fn filled(
    upkeep: UpkeepBy,
    caches: impl Fn(&pcpu::backing::sim::Machine) -> SimAllocator,
) -> (SimAllocator, Vec<usize>) {
    let policy = Policy {
        upkeep,
        ..Policy::default()
    };
    let pcpu = caches(&small_machine(2).policy(policy));
    let areas = (0..40).map(|_| pcpu.allocate(&REQUEST).unwrap()).collect();
    pcpu.upkeep();
    assert!(!pcpu.is_upkeep_due());
    (pcpu, areas)
}

#[test]
fn an_upkeep_is_due_that_sweeps() {
    for caches in [with_caches, |machine: &pcpu::backing::sim::Machine| {
        machine.build().unwrap()
    }] {
        let (pcpu, areas) = filled(UpkeepBy::Owner, caches);
        let (freed, kept) = areas.split_at(30);
        free_while_locked(&pcpu, freed);
        assert!(pcpu.is_upkeep_due(), "nobody could sweep");
        // Once, and whatever it found is free then: it is not due again.
        pcpu.upkeep_if_due();
        assert!(!pcpu.is_upkeep_due());
        let pages = pcpu.populated_pages();
        pcpu.upkeep();
        assert!(pcpu.populated_pages() <= pages);
        kept.iter()
            .for_each(|&area| pcpu.free_area(area, FreeFlags::empty()).unwrap());
        assert_eq!(pcpu.stats().live, 0);
    }
}

/// Where callers run the upkeep the next one does it, also one that is served by its cache.
#[test]
fn the_next_caller_sweeps() {
    for is_cached in [false, true] {
        let (pcpu, areas) = filled(UpkeepBy::Callers, with_caches);
        let small = Request::new(16, 16);
        let here = seat(&pcpu, 0);
        let first = pcpu.allocate_at(&here, &small).unwrap();
        free_while_locked(&pcpu, &areas[..30]);
        assert!(pcpu.is_upkeep_due(), "nobody could sweep");
        let second = match is_cached {
            true => pcpu.allocate_at(&here, &small),
            false => pcpu.allocate(&small),
        };
        assert!(!pcpu.is_upkeep_due(), "cached: {is_cached}");
        let rest = areas[30..].iter().copied();
        for area in rest.chain([first, second.unwrap()]) {
            pcpu.free_area(area, FreeFlags::empty()).unwrap();
        }
        assert_eq!(pcpu.stats().live, 0);
    }
}
