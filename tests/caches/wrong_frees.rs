//! Addresses that are not those of live areas, freed on every CPU and on none: refused at once, and nothing changes.

use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::cache::LockedSeat;
use pcpu::{FreeError, FreeFlags};

use crate::machine::{REQUEST, SLOTS, free_at, idle_areas, live_areas, seats, with_caches};
use crate::roomy::roomy_machine;
use crate::small::small_machine;

const CPUS: u32 = 4;

/// Who frees: a CPU, or somebody who does not say where it is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum By {
    Cpu(usize),
    Nobody,
}

const ALL: [By; 5] = [By::Cpu(0), By::Cpu(1), By::Cpu(2), By::Cpu(3), By::Nobody];

struct Scene {
    pcpu: SimAllocator,
    seats: Vec<LockedSeat>,
}

impl Scene {
    fn new() -> Self {
        Self::on(&small_machine(CPUS))
    }

    fn on(machine: &Machine) -> Self {
        let pcpu = with_caches(machine);
        let seats = seats(&pcpu, CPUS);
        Self { pcpu, seats }
    }

    fn allocate(&self, cpu: usize, count: usize) -> Vec<usize> {
        let allocate = || self.pcpu.allocate_at(&self.seats[cpu], &REQUEST).unwrap();
        (0..count).map(|_| allocate()).collect()
    }

    fn free(&self, by: By, address: usize) -> Result<(), FreeError> {
        match by {
            By::Cpu(cpu) => free_at(&self.pcpu, &self.seats[cpu], address),
            // SAFETY: the tests' own areas, which nobody uses.
            By::Nobody => unsafe { self.pcpu.free_with(address, FreeFlags::empty()) },
        }
    }

    /// Frees wrong addresses in all ways. `live` are the areas that live, and stay so.
    fn assert_refused(
        &self,
        live: &[usize],
        wrong: &[usize],
        is_right: impl Fn(usize, FreeError) -> bool,
    ) {
        let refuse_all = || {
            for by in ALL {
                for &address in wrong {
                    let error = self.free(by, address).expect_err("nothing lives there");
                    assert!(is_right(address, error), "{by:?}: {error:?}");
                }
            }
        };
        // Once while freed areas wait to be swept, for looking at the counters sweeps them.
        refuse_all();
        let mut live = live.to_vec();
        live.sort_unstable();
        let before = self.pcpu.stats();
        assert!(live_areas(&self.pcpu).into_keys().eq(live.iter().copied()));
        assert_eq!(before.live, live.len() as u64);
        refuse_all();
        assert_eq!(self.pcpu.stats(), before);
        assert!(live_areas(&self.pcpu).into_keys().eq(live.iter().copied()));
        assert_eq!(before.late_errors, 0);
    }

    fn assert_not_allocated(&self, live: &[usize], wrong: &[usize]) {
        self.assert_refused(live, wrong, |address, error| {
            error == FreeError::NotAllocated { address }
        });
    }

    /// All CPUs go on, no area is handed out that lives, and all can be freed.
    fn end(self, mut live: Vec<usize>) {
        for cpu in 0..CPUS as usize {
            live.extend(self.allocate(cpu, 3 * SLOTS));
        }
        assert_eq!(
            live_areas(&self.pcpu).len(),
            live.len(),
            "one is there twice"
        );
        for (index, &address) in live.iter().enumerate() {
            self.free(ALL[index % ALL.len()], address).unwrap();
        }
        self.pcpu.drain(&self.seats[0]);
        self.pcpu.trim(0);
        let stats = self.pcpu.stats();
        assert_eq!((stats.live, stats.late_errors, stats.chunks), (0, 0, 1));
    }
}

/// What is freed twice was freed by its CPU, or by another, or by nobody's; the second free comes from anywhere.
#[test]
fn freed_twice() {
    for first in ALL {
        for second in ALL {
            let scene = Scene::new();
            let mut live = scene.allocate(0, SLOTS - 2);
            let freed = live.remove(3);
            scene.free(first, freed).unwrap();
            let error = Err(FreeError::NotAllocated { address: freed });
            assert_eq!(scene.free(second, freed), error, "{first:?} {second:?}");
            scene.assert_not_allocated(&live, &[freed]);
            scene.end(live);
        }
    }
}

/// As above, with frees by other CPUs of the same run before: it is shared.
#[test]
fn freed_twice_in_a_shared_run() {
    for first in ALL {
        for second in ALL {
            let scene = Scene::new();
            let mut live = scene.allocate(0, SLOTS - 2);
            let freed = [live.remove(3), live.remove(1)];
            scene.free(By::Cpu(3), freed[0]).unwrap();
            scene.free(first, freed[1]).unwrap();
            let error = Err(FreeError::NotAllocated { address: freed[1] });
            assert_eq!(scene.free(second, freed[1]), error, "{first:?} {second:?}");
            scene.assert_not_allocated(&live, &freed);
            scene.end(live);
        }
    }
}

#[test]
fn freed_twice_with_the_run_closed_between() {
    for first in ALL {
        let scene = Scene::new();
        let mut live = scene.allocate(0, SLOTS - 2);
        let freed = live.remove(2);
        scene.free(first, freed).unwrap();
        scene.pcpu.drain(&scene.seats[1]);
        scene.assert_not_allocated(&live, &[freed]);
        scene.end(live);
    }
}

#[test]
fn freed_twice_after_the_run_was_closed() {
    for first in ALL {
        let scene = Scene::new();
        let mut live = scene.allocate(0, SLOTS - 2);
        scene.pcpu.drain(&scene.seats[1]);
        let freed = live.remove(2);
        scene.free(first, freed).unwrap();
        scene.assert_not_allocated(&live, &[freed]);
        scene.end(live);
    }
}

/// Areas that another CPU freed, and that their run has got back.
#[test]
fn freed_twice_with_the_run_collected_between() {
    for first in [By::Cpu(1), By::Nobody] {
        let scene = Scene::new();
        let mut live = scene.allocate(0, SLOTS);
        let mut freed = live.split_off(3);
        for &address in &freed {
            scene.free(first, address).unwrap();
        }
        let again = scene.allocate(0, 1)[0];
        assert!(freed.contains(&again), "the run has got its areas back");
        freed.retain(|&address| address != again);
        live.push(again);
        scene.assert_not_allocated(&live, &freed);
        // What was collected is an area like any other.
        let others = scene.allocate(0, freed.len());
        assert!(others.iter().all(|address| freed.contains(address)));
        live.extend(others);
        scene.free(By::Cpu(2), again).unwrap();
        live.retain(|&address| address != again);
        scene.assert_not_allocated(&live, &[again]);
        scene.end(live);
    }
}

#[test]
fn inside_an_area_of_a_run() {
    let scene = Scene::new();
    let live = scene.allocate(0, SLOTS - 2);
    let insides: Vec<_> = live
        .iter()
        .flat_map(|start| [start + 4, start + 60])
        .collect();
    scene.assert_refused(&live, &insides, |address, error| {
        let start = address - (address - live[0]) % 64;
        error == FreeError::Interior { address, start }
    });
    let between: Vec<_> = live.iter().map(|start| start + 2).collect();
    scene.assert_refused(&live, &between, |address, error| {
        error == FreeError::Misaligned { address }
    });
    scene.end(live);
}

/// Free in a run, and never anybody's.
#[test]
fn never_handed_out() {
    let scene = Scene::new();
    let live = scene.allocate(0, 1);
    let others: Vec<_> = (1..SLOTS).map(|slot| live[0] + 64 * slot).collect();
    scene.assert_not_allocated(&live, &others);
    // Inside of them there is nothing either.
    let insides: Vec<_> = others.iter().map(|start| start + 8).collect();
    scene.assert_refused(&live, &insides, |at, error| match error {
        FreeError::NotAllocated { address } | FreeError::Interior { address, .. } => at == address,
        _ => false,
    });
    assert_eq!(
        scene.allocate(0, SLOTS - 1),
        others,
        "they are there to be handed out"
    );
    let live = [live, others].concat();
    scene.end(live);
}

/// The tables that runs are kept in are no area of anybody's, nor are the rows of names.
#[test]
fn the_tables_of_runs() {
    for (machine, tables) in [(small_machine(CPUS), 1), (roomy_machine(CPUS), 2)] {
        let scene = Scene::on(&machine);
        assert!(live_areas(&scene.pcpu).is_empty());
        let idle: Vec<_> = idle_areas(&scene.pcpu).into_keys().collect();
        assert_eq!(idle.len(), tables);
        scene.assert_not_allocated(&[], &idle);
        let insides: Vec<_> = idle.iter().map(|start| start + 16).collect();
        scene.assert_refused(&[], &insides, |at, error| match error {
            FreeError::NotAllocated { address } | FreeError::Interior { address, .. } => {
                at == address
            }
            _ => false,
        });
        scene.end(Vec::new());
    }
}
