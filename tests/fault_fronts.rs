//! Every operation of instances with caches, of hardened ones and of plain ones, with each call of the backing that it makes
//! failing, alone and with all behind it.
//!
//! What is refused has changed no area and no count of one, says so by a typed error, and is served once the backing serves; what
//! cannot be refused (frees, upkeep, what empties caches) does without. `fault_table.rs` says what calls plain instances make.

#[path = "common/copies.rs"]
mod copies;
#[path = "common/small.rs"]
mod small;

use std::collections::BTreeMap;

use pcpu::allocator::{Policy, UpkeepBy};
use pcpu::backing::BackingError;
use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::cache::LockedSeat;
use pcpu::hardened::{Finding, FindingHook, HardenError, Hardening};
use pcpu::stats::Stats;
use pcpu::unit::CpuId;
use pcpu::{AllocError, AllocFlags, CpuError, FreeFlags, Request, SetupError};

use copies::{assert_stamped, assert_zero, stamp};
use small::small_machine;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Front {
    Nothing,
    Caches,
    Hardened,
}

const FRONTS: [Front; 3] = [Front::Nothing, Front::Caches, Front::Hardened];

/// The first number is the CPU.
#[derive(Debug, Clone, Copy)]
enum Op {
    Allocate(u32, Request),
    AllocateMany(u32, Request, usize),
    /// Live areas in the order in which they were allocated, from one number on, so many.
    Free(u32, usize, usize),
    FreeMany(u32, usize, usize),
    Drain(u32),
    Upkeep,
    Trim,
    BringUp(u32),
}
use Op::{Allocate, AllocateMany, BringUp, Drain, Free, FreeMany, Trim, Upkeep};

struct Row {
    name: &'static str,
    before: &'static [Op],
    op: Op,
    /// On which fronts it is refused where a call fails and all behind it. One failure alone is often mended by what idles in
    /// caches or in quarantine.
    refused: &'static [Front],
}

/// A page's worth of small areas, and one that takes pages of its own.
const SMALL: Request = Request::new(64, 8);
const LONG: Request = Request::new(9000, 8);
const MODULE: Request = Request::new(600, 64).with_flags(AllocFlags::RESERVED);
/// What fills the first chunk, so that more takes a new one.
const FIRST: Op = AllocateMany(0, Request::new(400, 8), 24);

const ALL: &[Front] = &FRONTS;
const NONE: &[Front] = &[];

const ROWS: &[Row] = &[
    Row {
        name: "a run is opened in the first chunk",
        before: &[],
        op: Allocate(0, SMALL),
        refused: NONE,
    },
    Row {
        name: "a run is opened in a new chunk",
        before: &[FIRST, AllocateMany(0, Request::new(1000, 8), 4)],
        op: AllocateMany(1, Request::new(200, 8), 20),
        refused: ALL,
    },
    Row {
        name: "a run is opened, atomic",
        before: &[FIRST, AllocateMany(0, Request::new(1000, 8), 4)],
        op: AllocateMany(1, Request::new(200, 8).with_flags(AllocFlags::ATOMIC), 20),
        refused: ALL,
    },
    Row {
        name: "a long area",
        before: &[FIRST],
        op: Allocate(1, LONG),
        refused: ALL,
    },
    Row {
        name: "a long area beside idle ones, in caches and in quarantine",
        before: &[
            FIRST,
            AllocateMany(0, LONG, 6),
            AllocateMany(1, SMALL, 100),
            Free(1, 24, 5),
            Free(0, 30, 60),
        ],
        op: Allocate(0, Request::new(30_000, 8)),
        // Somewhere among what is freed there is room.
        refused: ALL,
    },
    Row {
        name: "a batch of many small ones, over chunks",
        before: &[AllocateMany(0, SMALL, 3), Free(0, 1, 1)],
        op: AllocateMany(0, SMALL, 500),
        refused: ALL,
    },
    Row {
        name: "a batch of long ones",
        before: &[AllocateMany(1, LONG, 3), Free(1, 1, 1)],
        op: AllocateMany(0, LONG, 9),
        refused: ALL,
    },
    Row {
        name: "a module's variables",
        before: &[Allocate(0, MODULE)],
        op: Allocate(0, MODULE),
        refused: NONE,
    },
    Row {
        name: "modules' variables at one go",
        before: &[],
        op: AllocateMany(0, MODULE, 3),
        refused: NONE,
    },
    Row {
        name: "a free into a run, and of a whole run",
        before: &[AllocateMany(0, SMALL, 90)],
        op: Free(0, 0, 80),
        refused: NONE,
    },
    Row {
        name: "a free from another CPU",
        before: &[AllocateMany(0, SMALL, 90)],
        op: Free(1, 5, 80),
        refused: NONE,
    },
    Row {
        name: "a batch is freed",
        before: &[FIRST, AllocateMany(0, LONG, 6)],
        op: FreeMany(1, 4, 26),
        refused: NONE,
    },
    Row {
        name: "a cache is emptied",
        before: &[AllocateMany(0, SMALL, 90), Free(0, 0, 80)],
        op: Drain(1),
        refused: NONE,
    },
    Row {
        name: "upkeep",
        before: &[FIRST, AllocateMany(0, LONG, 6), Free(0, 24, 6)],
        op: Upkeep,
        refused: NONE,
    },
    Row {
        name: "upkeep that prepares a chunk",
        before: &[FIRST, AllocateMany(0, Request::new(1000, 8), 4)],
        op: Upkeep,
        refused: NONE,
    },
    Row {
        name: "trim",
        before: &[FIRST, AllocateMany(0, LONG, 6), Free(0, 3, 27)],
        op: Trim,
        refused: NONE,
    },
    Row {
        name: "a CPU comes",
        before: &[FIRST, AllocateMany(0, LONG, 6), Free(0, 24, 2), Drain(0)],
        op: BringUp(2),
        refused: ALL,
    },
];

/// Nothing is to be found.
struct Deaf;

impl FindingHook for Deaf {
    fn found(&self, finding: &Finding) {
        panic!("{finding}");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Alloc(AllocError),
    Cpu(CpuError),
}

/// An instance, and the areas that its owner has: address and length.
struct Owner {
    pcpu: SimAllocator,
    live: Vec<(usize, usize)>,
}

/// What of the counters a refusal leaves as it was.
fn lasting(stats: &Stats) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        (stats.allocs, stats.frees, stats.live, stats.live_bytes),
        (stats.sizes, stats.live_sizes, stats.late_errors),
    )
}

impl Owner {
    fn new(machine: &Machine, front: Front, before: &[Op]) -> Self {
        let mut pcpu = machine.build().unwrap();
        match front {
            Front::Nothing => {}
            Front::Caches => pcpu.enable_caches().unwrap(),
            Front::Hardened => pcpu.harden(Hardening::new(&Deaf)).unwrap(),
        }
        let live = Vec::new();
        let mut owner = Self { pcpu, live };
        for &op in before {
            owner.run(op).unwrap();
        }
        owner
    }

    fn seat(&self, cpu: u32) -> LockedSeat {
        // SAFETY: all seats of these instances are such.
        unsafe { LockedSeat::new(self.pcpu.units(), CpuId::new(cpu)) }
    }

    fn take_over(&mut self, areas: &[usize], bytes: usize) {
        for &address in areas {
            for cpu in self.pcpu.units().possible().iter() {
                assert_zero(&self.pcpu, (address, bytes), cpu);
            }
        }
        for &address in areas {
            stamp(&self.pcpu, (address, bytes));
            self.live.push((address, bytes));
        }
    }

    fn free(&mut self, cpu: u32, areas: &[(usize, usize)]) {
        for &(address, _) in areas {
            let flags = self.flags_of(address);
            // SAFETY: the owner's, which looks at it no more.
            unsafe { self.pcpu.free_at(&self.seat(cpu), address, flags) }.unwrap();
        }
    }

    fn flags_of(&self, address: usize) -> FreeFlags {
        let reserved = self.pcpu.sizes().regions().reserved;
        match reserved.contains(&(address - self.pcpu.neutral_base())) {
            true => FreeFlags::RESERVED,
            false => FreeFlags::empty(),
        }
    }

    fn run(&mut self, op: Op) -> Result<(), Failure> {
        match op {
            Allocate(cpu, request) => {
                let served = self.pcpu.allocate_at(&self.seat(cpu), &request);
                self.take_over(&[served.map_err(Failure::Alloc)?], request.bytes());
            }
            AllocateMany(cpu, request, count) => {
                let mut areas = vec![0; count];
                self.pcpu
                    .allocate_many_at(&self.seat(cpu), &request, &mut areas)
                    .map_err(Failure::Alloc)?;
                self.take_over(&areas, request.bytes());
            }
            Free(cpu, first, count) => {
                let areas: Vec<_> = self.live.drain(first..first + count).collect();
                self.free(cpu, &areas);
            }
            FreeMany(cpu, first, count) => {
                let areas: Vec<_> = self.live.drain(first..first + count).collect();
                let areas: Vec<_> = areas.into_iter().map(|(address, _)| address).collect();
                // SAFETY: the owner's, which looks at them no more.
                unsafe {
                    self.pcpu
                        .free_many_at(&self.seat(cpu), &areas, FreeFlags::empty())
                }
                .unwrap();
            }
            Drain(cpu) => self.pcpu.drain(&self.seat(cpu)),
            Upkeep => drop(self.pcpu.upkeep()),
            Trim => drop(self.pcpu.trim(0)),
            BringUp(cpu) => {
                let cpu = CpuId::new(cpu);
                self.pcpu.bring_up(cpu).map_err(Failure::Cpu)?;
                for &area in &self.live {
                    assert_zero(&self.pcpu, area, cpu);
                    stamp(&self.pcpu, area);
                }
            }
        }
        Ok(())
    }

    /// Every area is there and as its owner left it, and nothing else is live.
    fn check(&self, what: &str) {
        let stats = self.pcpu.stats();
        assert_eq!(stats.live, self.live.len() as u64, "{what}");
        assert_eq!((stats.late_errors, self.pcpu.check_areas()), (0, 0));
        assert_eq!(stats.metadata_bytes, self.pcpu.backing().metadata_bytes());
        let lengths: BTreeMap<_, _> = self.live.iter().copied().collect();
        assert_eq!(lengths.len(), self.live.len());
        for &(address, bytes) in &self.live {
            let len = bytes.next_multiple_of(4);
            assert_eq!(self.pcpu.area_bytes(address), Some(len), "{what}");
            for cpu in self.pcpu.units().possible().iter() {
                match self.pcpu.units().materialised().contains(cpu) {
                    true => assert_stamped(&self.pcpu, (address, bytes), cpu),
                    false => assert_zero(&self.pcpu, (address, bytes), cpu),
                }
            }
        }
    }

    fn end(mut self) {
        let areas = std::mem::take(&mut self.live);
        self.free(0, &areas);
        self.pcpu.drain(&self.seat(0));
        self.pcpu.trim(0);
        self.check("at the end");
        let stats = self.pcpu.stats();
        let first_pages = self.pcpu.sizes().populated_pages() as u64;
        assert_eq!((stats.chunks, stats.populated_pages), (1, first_pages));
    }
}

/// Runs an operation with calls failing; how many calls it made, and why it was refused.
fn run_failing(
    machine: &Machine,
    front: Front,
    row: &Row,
    fails: impl Fn(u64) -> bool + Send + 'static,
) -> (u64, Option<Failure>) {
    let mut owner = Owner::new(machine, front, row.before);
    let before = owner.pcpu.stats();
    owner.pcpu.backing().set_faults(fails);
    let result = owner.run(row.op);
    let calls = owner.pcpu.backing().fallible_calls();
    owner.pcpu.backing().set_faults(|_| false);
    let what = format!("{}, {front:?}: {result:?}", row.name);
    owner.check(&what);
    if let Err(failure) = result {
        let after = owner.pcpu.stats();
        assert_eq!(lasting(&before), lasting(&after), "{what}");
        let failures = after.failures - before.failures;
        match (row.op, failure) {
            (Allocate(..) | AllocateMany(..), Failure::Alloc(AllocError::Backing(_))) => {
                assert_eq!(failures, 1, "{what}");
            }
            (BringUp(cpu), Failure::Cpu(CpuError::NoMemory { cpu: of, .. })) => {
                assert_eq!((of.get(), failures), (cpu, 0), "{what}");
                assert!(!owner.pcpu.units().materialised().contains(of), "{what}");
            }
            _ => panic!("{what}"),
        }
        owner.run(row.op).expect(&what);
        owner.check(&what);
    }
    owner.end();
    (calls, result.err())
}

fn machines() -> [Machine; 3] {
    let machine = small_machine(3).online(2).dirty_memory();
    let policy = Policy {
        upkeep: UpkeepBy::Callers,
        ..Policy::default()
    };
    [
        machine.clone(),
        machine.clone().policy(policy),
        machine.nodes(3).sleeping_reserve(),
    ]
}

#[test]
fn each_call_fails_alone_and_with_all_behind_it() {
    let mut runs = 0;
    for (nth_machine, machine) in machines().iter().enumerate() {
        for (row, front) in ROWS.iter().flat_map(|row| FRONTS.map(|front| (row, front))) {
            let (calls, failure) = run_failing(machine, front, row, |_| false);
            // An atomic request where chunks cannot be made without sleeping.
            let refused = failure.is_some();
            assert!(!refused || nth_machine == 2, "{}", row.name);
            let mut was_refused = false;
            for nth in 0..calls {
                let (_, alone) = run_failing(machine, front, row, move |call| call == nth);
                let two = move |call| call == nth || call == nth + 1;
                let (_, two) = run_failing(machine, front, row, two);
                let (_, behind) = run_failing(machine, front, row, move |call| call >= nth);
                assert!(alone.is_none() || behind.is_some(), "{}, {nth}", row.name);
                assert!(two.is_none() || behind.is_some(), "{}, {nth}", row.name);
                was_refused |= behind.is_some();
                runs += 3;
            }
            if nth_machine == 0 {
                let expected = row.refused.contains(&front);
                assert_eq!(was_refused, expected, "{}, {front:?}", row.name);
            }
        }
    }
    assert!(runs > 500, "{runs} runs");
}

/// Switching a front on fails at each call; the instance is as it was, and can be switched on afterwards.
#[test]
fn fronts_that_cannot_be_switched_on() {
    for nth in 0.. {
        let mut pcpu = small_machine(2).build().unwrap();
        let before = pcpu.stats();
        pcpu.backing().set_faults(move |call| call == nth);
        let result = pcpu.enable_caches();
        let calls = pcpu.backing().fallible_calls();
        if nth >= calls {
            assert_eq!((result, nth), (Ok(()), 1));
            break;
        }
        let error = SetupError::Backing(BackingError::OutOfMetadata);
        assert_eq!((result, pcpu.has_caches()), (Err(error), false));
        assert_eq!(before, pcpu.stats());
        assert_eq!(pcpu.enable_caches(), Ok(()));
    }
    for nth in 0.. {
        let mut pcpu = small_machine(2).build().unwrap();
        let before = pcpu.stats();
        pcpu.backing().set_faults(move |call| call == nth);
        let result = pcpu.harden(Hardening::new(&Deaf));
        let calls = pcpu.backing().fallible_calls();
        if nth >= calls {
            assert_eq!((result, nth), (Ok(()), 2));
            break;
        }
        let error = HardenError::Backing(BackingError::OutOfMetadata);
        assert_eq!((result, pcpu.is_hardened()), (Err(error), false));
        assert_eq!(before, pcpu.stats());
        assert_eq!(pcpu.harden(Hardening::new(&Deaf)), Ok(()));
    }
}
