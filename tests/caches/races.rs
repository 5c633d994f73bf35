//! An area that two CPUs free at the same moment: one of them is told, or it is counted later; and nobody else ever gets an
//! area that lives.

use std::collections::BTreeSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use pcpu::backing::sim::SimAllocator;
use pcpu::stats::{Event, EventHook};
use pcpu::{AllocError, AllocFlags, FreeError, FreeFlags};

use crate::free::FreeArea;
use crate::machine::{REQUEST, SLOTS, Step, Watched, free_at, seat, with_caches};
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
    let owner = Watched::new(seat(&pcpu, 0), |step| {
        assert_eq!(step, Step::Put);
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
        let owner = Watched::new(seat(pcpu, 0), |step| {
            assert_eq!(step, Step::Put);
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

/// Frees that [`HoldsTheLast`] is told of.
const TOLD: u32 = 5;

static FREED: AtomicU32 = AtomicU32::new(0);
static LAST_IS_MARKED: Barrier = Barrier::new(2);
static REQUEST_IS_OVER: Barrier = Barrier::new(2);

/// Holds up who frees the last of some areas, when that is marked, until another's request is over.
struct HoldsTheLast;

impl EventHook for HoldsTheLast {
    fn event(&self, event: &Event) {
        if let Event::Free { .. } = event
            && FREED.fetch_add(1, Ordering::Relaxed) + 1 == TOLD
        {
            LAST_IS_MARKED.wait();
            REQUEST_IS_OVER.wait();
        }
    }
}

/// A request that began before there was a hook is not given an area of its run that the hook is just being told of.
#[test]
fn an_area_stays_freed_until_the_hook_has_been_told() {
    let pcpu = &with_caches(&small_machine(2));
    let other = seat(pcpu, 1);
    let mut live = BTreeSet::new();
    allocate(pcpu, 0, SLOTS, &mut live);
    // The run is shared from now on.
    free_at(pcpu, &other, live.pop_first().unwrap()).unwrap();
    let begun = &Barrier::new(2);
    let request = REQUEST.with_flags(AllocFlags::TRY);
    thread::scope(|scope| {
        let owner = scope.spawn(move || {
            let owner = Watched::new(seat(pcpu, 0), |_| {
                begun.wait();
                LAST_IS_MARKED.wait();
            });
            let result = pcpu.allocate_at(&owner, &request);
            REQUEST_IS_OVER.wait();
            result
        });
        begun.wait();
        pcpu.set_event_hook(Some(&HoldsTheLast));
        for _ in 0..TOLD {
            free_at(pcpu, &other, live.pop_first().unwrap()).unwrap();
        }
        assert_eq!(owner.join().unwrap(), Err(AllocError::Busy));
    });
    pcpu.set_event_hook(None);
    assert_eq!(pcpu.stats().live, live.len() as u64);
    allocate(pcpu, 0, SLOTS, &mut live);
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
