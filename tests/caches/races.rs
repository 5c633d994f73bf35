//! An area that two CPUs free at the same moment: one of them is told, or it is counted later; and nobody else ever gets an
//! area that lives.

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::thread;

use pcpu::backing::sim::SimAllocator;
use pcpu::stats::{Event, EventHook};
use pcpu::{FreeError, FreeFlags};

use crate::free::FreeArea;
use crate::machine::{REQUEST, SLOTS, Watched, free_at, seat, with_caches};
use crate::small::small_machine;

/// Allocates so many areas on a CPU, none of which may be one of `live`.
fn allocate(pcpu: &SimAllocator, cpu: u32, count: usize, live: &mut BTreeSet<usize>) {
    for _ in 0..count {
        let address = pcpu.allocate_at(&seat(pcpu, cpu), &REQUEST).unwrap();
        assert!(live.insert(address), "{address:#x} is handed out twice");
    }
}

/// The other CPU frees when the area's own has looked, and has not put it back.
#[test]
fn freed_by_another_cpu_on_the_way_into_the_run() {
    let pcpu = with_caches(&small_machine(2));
    let other = seat(&pcpu, 1);
    let mut live = BTreeSet::new();
    allocate(&pcpu, 0, SLOTS, &mut live);
    let &freed = live.first().unwrap();
    let owner = Watched::new(seat(&pcpu, 0), || {
        assert_eq!(free_at(&pcpu, &other, freed), Ok(()));
    });
    live.remove(&freed);
    let is_told = free_at(&pcpu, &owner, freed).is_err();
    // The run is used up, and gets areas back from the other CPU.
    allocate(&pcpu, 0, 1, &mut live);
    for _ in 0..3 {
        let last = live.pop_last().unwrap();
        free_at(&pcpu, &other, last).unwrap();
    }
    allocate(&pcpu, 0, 3 * SLOTS, &mut live);
    allocate(&pcpu, 1, 3 * SLOTS, &mut live);
    pcpu.drain(&other);
    allocate(&pcpu, 0, 3 * SLOTS, &mut live);
    let late_errors = pcpu.stats().late_errors;
    assert_eq!(u64::from(is_told) + late_errors, 1);
}

static MARKED: Barrier = Barrier::new(2);
static PUT: Barrier = Barrier::new(2);

/// Holds whoever frees up when the area is marked, until it was put into its run.
struct BetweenMarkAndLook;

impl EventHook for BetweenMarkAndLook {
    fn event(&self, event: &Event) {
        if let Event::Free { .. } = event {
            MARKED.wait();
            PUT.wait();
        }
    }
}

/// The area's own CPU puts it back when another one, which does not say where it is, has marked it and has not looked at the run
/// again: the mark is taken back, and who made it is told.
#[test]
fn put_by_its_cpu_when_another_has_marked_it() {
    let pcpu = &with_caches(&small_machine(2));
    let mut live = BTreeSet::new();
    allocate(pcpu, 0, SLOTS - 1, &mut live);
    let freed = live.pop_first().unwrap();
    let begin = &Barrier::new(2);
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            begin.wait();
            pcpu.free_area(freed, FreeFlags::empty())
        });
        let owner = Watched::new(seat(pcpu, 0), || {
            pcpu.set_event_hook(Some(&BetweenMarkAndLook));
            begin.wait();
            MARKED.wait();
        });
        assert_eq!(free_at(pcpu, &owner, freed), Ok(()));
        PUT.wait();
        let address = freed;
        let told = other.join().unwrap();
        assert_eq!(told, Err(FreeError::NotAllocated { address }));
    });
    pcpu.set_event_hook(None);
    let stats = pcpu.stats();
    assert_eq!((stats.live, stats.late_errors), (SLOTS as u64 - 2, 1));
    // It is handed out once, is whoever's it is then, and can be freed.
    allocate(pcpu, 0, SLOTS, &mut live);
    allocate(pcpu, 1, SLOTS, &mut live);
    assert!(live.contains(&freed));
    assert_eq!(pcpu.area_bytes(freed), Some(64));
    for address in live {
        assert_eq!(free_at(pcpu, &seat(pcpu, 0), address), Ok(()));
    }
    assert_eq!((pcpu.stats().live, pcpu.stats().late_errors), (0, 1));
}

/// Two threads, each on a CPU of its own; neither owns the area, or one of them does.
#[test]
fn freed_by_two_threads_at_once() {
    const ROUNDS: u32 = 3000;
    for cpus in [[0, 1], [1, 2]] {
        let pcpu = &with_caches(&small_machine(3));
        let barrier = &Barrier::new(2);
        let mut live = BTreeSet::new();
        let mut told = 0;
        for _ in 0..ROUNDS / 100 {
            let mut areas = BTreeSet::new();
            allocate(pcpu, 0, 100, &mut areas);
            assert!(areas.is_disjoint(&live));
            let free_all = |cpu: u32| {
                let seat = seat(pcpu, cpu);
                let mut errors = 0;
                for &address in &areas {
                    barrier.wait();
                    match free_at(pcpu, &seat, address) {
                        Ok(()) => {}
                        Err(error) => {
                            assert_eq!(error, FreeError::NotAllocated { address });
                            errors += 1;
                        }
                    }
                }
                errors
            };
            told += thread::scope(|scope| {
                let threads = cpus.map(|cpu| scope.spawn(move || free_all(cpu)));
                threads
                    .map(|thread| thread.join().unwrap())
                    .iter()
                    .sum::<u64>()
            });
            // Nothing of it may be handed out twice.
            for cpu in 0..3 {
                allocate(pcpu, cpu, 10, &mut live);
            }
        }
        pcpu.drain(&seat(pcpu, 2));
        let late_errors = pcpu.stats().late_errors;
        assert_eq!(told + late_errors, ROUNDS.into(), "{told} {late_errors}");
        for address in live {
            free_at(pcpu, &seat(pcpu, 1), address).unwrap();
        }
        assert_eq!(pcpu.stats().live, 0);
    }
}
