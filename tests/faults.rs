//! Failures of the backing, every one of them: a script is run again and again, each time with another call failing.
//!
//! Whatever fails, the operation says so by its typed error or does without, all areas stay as they were, nothing is
//! left behind (the simulated machine looks after that when it is dropped), and the same operation succeeds once the
//! backing does.

#[path = "common/audit.rs"]
mod audit;
#[path = "common/copies.rs"]
mod copies;
#[path = "common/free.rs"]
mod free;
#[path = "common/same.rs"]
mod same;
#[path = "common/small.rs"]
mod small;
#[path = "common/undone.rs"]
mod undone;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use pcpu::allocator::Policy;
use pcpu::backing::BackingError;
use pcpu::backing::sim::{Call, Machine, MachineError, SimAllocator};
use pcpu::unit::{CpuId, FirstChunkKind};
use pcpu::{AllocError, AllocFlags, CpuError, FreeFlags, Request, SetupError};

use audit::{Picture, audit};
use copies::{assert_stamped, assert_zero, stamp};
use free::FreeArea;
use same::assert_same;
use small::{UNIT_BYTES, small_machine};
use undone::assert_undone;

const PAGE_BYTES: usize = 4096;
const ATOMIC: AllocFlags = AllocFlags::ATOMIC;
const PLAIN: AllocFlags = AllocFlags::empty();

#[derive(Debug, Clone, Copy)]
enum Step {
    /// Name, size, alignment, flags.
    Alloc(&'static str, usize, usize, AllocFlags),
    Free(&'static str),
    Upkeep,
    Trim(u32),
    BringUp(u32),
}
use Step::{Alloc, BringUp, Free, Trim, Upkeep};

#[derive(Debug)]
enum Failure {
    Alloc(AllocError),
    Cpu(CpuError),
}

/// Chunks come and go; areas straddle pages; one needs two runs of pages at once; CPUs come in between.
const SCRIPT: &[Step] = &[
    Alloc("first", 100, 64, PLAIN),
    Alloc("rest of the first chunk", 13_000, 4, PLAIN),
    Alloc("straddling", 5000, 8, PLAIN),
    Alloc("atomic", 6000, 8, ATOMIC),
    BringUp(1),
    Alloc("a whole chunk", UNIT_BYTES, PAGE_BYTES, PLAIN),
    Upkeep,
    Alloc("another", UNIT_BYTES, 4, ATOMIC),
    Free("straddling"),
    Free("atomic"),
    Trim(0),
    Free("a whole chunk"),
    Trim(1),
    Alloc("page 0", PAGE_BYTES, PAGE_BYTES, PLAIN),
    Alloc("page 1", PAGE_BYTES, PAGE_BYTES, PLAIN),
    Alloc("page 2", PAGE_BYTES, PAGE_BYTES, PLAIN),
    Alloc(
        "the other pages",
        UNIT_BYTES - 3 * PAGE_BYTES,
        PAGE_BYTES,
        PLAIN,
    ),
    Free("page 0"),
    Free("page 2"),
    Upkeep,
    BringUp(2),
    Free("page 1"),
    Alloc("pages 0 and 2 anew", 3 * PAGE_BYTES, PAGE_BYTES, PLAIN),
    Free("another"),
    Alloc("from empty pages", 3 * PAGE_BYTES, 4, PLAIN),
    Alloc("beside empty pages", UNIT_BYTES, 4, PLAIN),
    BringUp(3),
    Free("the other pages"),
    Upkeep,
    BringUp(0),
];

struct Run {
    pcpu: SimAllocator,
    live: BTreeMap<&'static str, (usize, usize)>,
}

impl Run {
    fn new(pcpu: SimAllocator) -> Self {
        let live = BTreeMap::new();
        Self { pcpu, live }
    }

    fn step(&mut self, step: Step) -> Result<(), Failure> {
        match step {
            Alloc(name, bytes, align, flags) => {
                let request = Request::new(bytes, align).with_flags(flags);
                let address = self.pcpu.allocate(&request).map_err(Failure::Alloc)?;
                for cpu in self.pcpu.units().possible().iter() {
                    assert_zero(&self.pcpu, (address, bytes), cpu);
                }
                stamp(&self.pcpu, (address, bytes));
                self.live.insert(name, (address, bytes));
            }
            Free(name) => {
                let (address, bytes) = self.live.remove(name).expect("allocated before");
                self.check_copies((address, bytes));
                self.pcpu
                    .free_area(address, FreeFlags::empty())
                    .expect("it is live");
            }
            Upkeep => {
                self.pcpu.upkeep();
            }
            Trim(spares) => {
                self.pcpu.trim(spares);
            }
            BringUp(cpu) => {
                let cpu = CpuId::new(cpu);
                let is_new = !self.pcpu.units().materialised().contains(cpu);
                self.pcpu.bring_up(cpu).map_err(Failure::Cpu)?;
                for &area in self.live.values() {
                    if is_new {
                        assert_zero(&self.pcpu, area, cpu);
                    }
                    stamp(&self.pcpu, area);
                }
            }
        }
        Ok(())
    }

    fn check_copies(&self, area: (usize, usize)) {
        for cpu in self.pcpu.units().possible().iter() {
            if self.pcpu.units().materialised().contains(cpu) {
                assert_stamped(&self.pcpu, area, cpu);
            } else {
                assert_zero(&self.pcpu, area, cpu);
            }
        }
    }

    /// Panics unless a step that failed has changed nothing but what it may.
    fn check_failed(&self, step: Step, failure: &Failure, before: &Picture) {
        let after = audit(&self.pcpu);
        match (step, failure) {
            (Alloc(_, _, _, flags), Failure::Alloc(AllocError::Backing(_))) => {
                assert_undone(before, &after, PAGE_BYTES);
                assert_eq!(after.stats.failures, before.stats.failures + 1);
                let atomic = u64::from(flags.contains(ATOMIC));
                assert_eq!(
                    after.stats.atomic_failures,
                    before.stats.atomic_failures + atomic
                );
            }
            (BringUp(cpu), Failure::Cpu(CpuError::NoMemory { cpu: of, error })) => {
                assert_eq!((of.get(), *error), (cpu, BackingError::OutOfFrames));
                assert!(!self.pcpu.units().materialised().contains(*of));
                assert_same(before, &after);
            }
            other => panic!("{other:?}"),
        }
        for &area in self.live.values() {
            self.check_copies(area);
        }
    }

    /// Frees what is left and sees it all back.
    fn end(self) {
        for &area in self.live.values() {
            self.check_copies(area);
            self.pcpu
                .free_area(area.0, FreeFlags::empty())
                .expect("it is live");
        }
        self.pcpu.trim(0);
        let end = audit(&self.pcpu);
        assert_eq!((end.stats.live, end.stats.chunks), (0, 1));
        let first_pages = self.pcpu.sizes().populated_pages() as u64;
        assert_eq!(end.stats.populated_pages, first_pages);
    }
}

/// Runs a script on a machine whose calls fail where `fails` says so. A step that fails is repeated without failures.
/// Returns how many calls there were that could fail, and how many steps failed.
fn run(
    machine: &Machine,
    script: &[Step],
    fails: impl Fn(u64) -> bool + Send + 'static,
) -> (u64, u32) {
    let is_on = Arc::new(AtomicBool::new(true));
    let hits = Arc::new(AtomicU32::new(0));
    let faults = {
        let (is_on, hits) = (is_on.clone(), hits.clone());
        move |call| {
            let hit = is_on.load(Ordering::Relaxed) && fails(call);
            hits.fetch_add(u32::from(hit), Ordering::Relaxed);
            hit
        }
    };
    let mut failed = 0;
    let pcpu = match machine.build_with_faults(faults) {
        Ok(pcpu) => pcpu,
        Err(error) => {
            assert!(
                matches!(
                    error,
                    MachineError::Build(_)
                        | MachineError::Setup(SetupError::Backing(BackingError::OutOfMetadata))
                        | MachineError::BringUp(CpuError::NoMemory { .. })
                ),
                "{error:?}"
            );
            assert!(!error.to_string().contains('\n'));
            failed += 1;
            is_on.store(false, Ordering::Relaxed);
            machine.build().expect("nothing fails any more")
        }
    };
    let mut run = Run::new(pcpu);
    for &step in script {
        let before = audit(&run.pcpu);
        let hits_before = hits.load(Ordering::Relaxed);
        let result = run.step(step);
        if hits.load(Ordering::Relaxed) != hits_before {
            // Only what is prepared ahead may be missing, and idle memory may take the place of new memory.
            let may_do_without = match step {
                Upkeep | Trim(_) => true,
                Alloc(_, _, _, flags) => !flags.contains(ATOMIC) && before.stats.empty_pages > 0,
                Free(_) | BringUp(_) => false,
            };
            assert!(result.is_err() || may_do_without, "{step:?}");
        }
        if let Err(failure) = result {
            failed += 1;
            run.check_failed(step, &failure, &before);
            is_on.store(false, Ordering::Relaxed);
            run.step(step)
                .unwrap_or_else(|failure| panic!("{step:?} again: {failure:?}"));
            is_on.store(true, Ordering::Relaxed);
        }
        audit(&run.pcpu);
    }
    let calls = run.pcpu.backing().fallible_calls();
    is_on.store(false, Ordering::Relaxed);
    run.end();
    (calls, failed)
}

fn machines() -> [Machine; 3] {
    let machine = small_machine(4).nodes(2).online(1);
    [
        machine.clone(),
        machine.clone().first_chunk(FirstChunkKind::Page),
        machine.dirty_memory(),
    ]
}

#[test]
fn each_call_fails_once() {
    for machine in machines() {
        let (calls, failed) = run(&machine, SCRIPT, |_| false);
        assert_eq!(failed, 0);
        for nth in 0..calls {
            let (_, failed) = run(&machine, SCRIPT, move |call| call == nth);
            assert!(failed <= 1, "{failed} steps failed by call {nth}");
        }
    }
}

#[test]
fn all_calls_from_one_on_fail() {
    for machine in machines() {
        let (calls, _) = run(&machine, SCRIPT, |_| false);
        for nth in 0..calls {
            let (_, failed) = run(&machine, SCRIPT, move |call| call >= nth);
            assert!(failed > 0 || nth + 4 > calls, "from call {nth} on");
        }
    }
}

#[test]
fn any_two_calls_fail() {
    let script = &SCRIPT[..9];
    let machine = &machines()[0];
    let (calls, _) = run(machine, script, |_| false);
    for first in 0..calls {
        for second in first + 1..calls + 3 {
            run(machine, script, move |call| call == first || call == second);
        }
    }
}

/// An area that takes two runs of pages asks for both in one call: it is served whole, or nothing has happened.
#[test]
fn an_area_is_populated_in_one_call() {
    let pcpu = small_machine(3).online(2).build().unwrap();
    let page = Request::new(PAGE_BYTES, PAGE_BYTES);
    pcpu.allocate(&Request::new(13_000, 4)).unwrap();
    let pages = [(); 8].map(|()| pcpu.allocate(&page).unwrap());
    for at in [1, 3] {
        pcpu.free_area(pages[at], FreeFlags::empty()).unwrap();
    }
    pcpu.trim(0);
    pcpu.free_area(pages[2], FreeFlags::empty()).unwrap();
    let before = audit(&pcpu);
    let wanted = Request::new(3 * PAGE_BYTES, PAGE_BYTES).with_flags(ATOMIC);

    pcpu.backing().record();
    pcpu.backing().set_faults(|call| call == 0);
    let refused = pcpu.allocate(&wanted);
    let out_of_frames = AllocError::Backing(BackingError::OutOfFrames);
    assert_eq!(refused, Err(out_of_frames));
    assert_same(&before, &audit(&pcpu));
    assert_eq!(pcpu.backing().recorded(), []);

    pcpu.backing().set_faults(|_| false);
    assert_eq!(pcpu.allocate(&wanted), Ok(pages[1]));
    let recorded = pcpu.backing().recorded();
    let [Call::Populate { pages, .. }] = &recorded[..] else {
        panic!("{recorded:?}");
    };
    assert_eq!(pages, &[1..2, 3..4]);
}

/// A request that may sleep takes memory back from empty pages before it gives up.
#[test]
fn idle_memory_is_used_before_a_request_fails() {
    let pcpu = small_machine(2).build().unwrap();
    let whole = Request::new(UNIT_BYTES, 4);
    let idle = pcpu.allocate(&whole).unwrap();
    pcpu.allocate(&whole).unwrap();
    pcpu.free_area(idle, FreeFlags::empty()).unwrap();
    // Too long for the idle chunk next to this one, so that new pages are needed.
    pcpu.allocate(&Request::new(4, 4)).unwrap();
    pcpu.allocate(&Request::new(13_300, 4)).unwrap();
    pcpu.allocate(&Request::new(20_000, 4)).unwrap();
    let empty_pages = audit(&pcpu).stats.empty_pages;
    assert!(empty_pages > 0);
    // The first populating call fails, as if memory came back with what is given back.
    pcpu.backing().set_faults(|call| call == 2);
    let atomic = pcpu.allocate(&whole.with_flags(ATOMIC));
    assert_eq!(
        atomic,
        Err(AllocError::Backing(BackingError::OutOfFrames)),
        "an atomic request gives nothing back"
    );
    assert_eq!(audit(&pcpu).stats.empty_pages, empty_pages);
    pcpu.backing().set_faults(|call| call == 0);
    assert!(pcpu.allocate(&whole).is_ok());
    assert_eq!(audit(&pcpu).stats.empty_pages, 0);
}

/// However often a request fails, what it leaves behind does not grow.
#[test]
fn failing_over_and_over_leaves_no_more_behind() {
    let pcpu = small_machine(2).build().unwrap();
    let whole = Request::new(UNIT_BYTES, 4);
    let is_populate_only = |calls: &[Call]| {
        let metadata = |call: &&Call| matches!(call, Call::Reserve { .. });
        calls.iter().filter(metadata).count() <= 1
    };
    pcpu.backing().record();
    for round in 0..10 {
        // Metadata and address space are to be had, pages are not.
        let spared = if round == 0 { 2 } else { 0 };
        pcpu.backing().set_faults(move |call| call >= spared);
        assert!(pcpu.allocate(&whole).is_err());
        assert_eq!(audit(&pcpu).stats.chunks, 2);
    }
    assert!(is_populate_only(&pcpu.backing().recorded()));
    pcpu.backing().set_faults(|_| false);
    assert!(pcpu.allocate(&whole).is_ok());
}

/// A machine where making a chunk may sleep, so that atomic requests live on spare ones.
fn sleeping_machine(policy: Policy) -> SimAllocator {
    let machine = small_machine(2).sleeping_reserve().policy(policy);
    machine.build().unwrap()
}

const WHOLE: Request = Request::new(UNIT_BYTES, 4).with_flags(ATOMIC);
const WOULD_SLEEP: AllocError = AllocError::Backing(BackingError::WouldSleep);

#[test]
fn atomic_requests_fail_only_when_the_spares_are_out() {
    let pcpu = sleeping_machine(Policy {
        spare_chunks: 2,
        spare_chunks_max: 2,
        ..Policy::default()
    });
    assert!(pcpu.is_upkeep_due(), "there are no spares yet");
    assert_eq!(pcpu.allocate(&WHOLE), Err(WOULD_SLEEP));
    assert_eq!(pcpu.stats().spare_shortfalls, 1);
    assert_eq!(pcpu.upkeep().chunks_prepared, 2);
    assert!(!pcpu.is_upkeep_due());

    let served = [(); 2].map(|()| pcpu.allocate(&WHOLE).unwrap());
    assert!(pcpu.is_upkeep_due(), "the spares are out");
    let before = audit(&pcpu);
    assert_eq!(before.stats.spare_chunks, 0);
    assert_eq!(pcpu.allocate(&WHOLE), Err(WOULD_SLEEP));
    let after = audit(&pcpu);
    assert_same(&before, &after);
    assert_eq!(after.stats.spare_shortfalls, 2);
    assert_eq!(after.stats.atomic_failures, 2);

    // A chunk that has run empty is a spare one; its pages are populated on the way.
    pcpu.free_area(served[0], FreeFlags::empty()).unwrap();
    pcpu.trim(1);
    assert!(pcpu.allocate(&WHOLE).is_ok());
    assert_eq!(pcpu.stats().spare_shortfalls, 2);
    // And one that may sleep makes its own.
    assert!(pcpu.allocate(&WHOLE.with_flags(PLAIN)).is_ok());
}

/// Spares are prepared whenever the largest request could not be served, also where something was freed since.
#[test]
fn a_little_room_is_not_taken_for_enough() {
    let pcpu = sleeping_machine(Policy::default());
    pcpu.allocate(&Request::new(13_000, 4)).unwrap();
    pcpu.allocate(&Request::new(PAGE_BYTES, 4)).unwrap();
    let small = pcpu.allocate(&Request::new(1000, 4)).unwrap();
    assert_eq!(audit(&pcpu).stats.chunks, 2);
    pcpu.free_area(small, FreeFlags::empty()).unwrap();
    pcpu.upkeep();
    assert_eq!(pcpu.stats().spare_chunks, 1);
    assert!(pcpu.allocate(&WHOLE).is_ok());
}

#[test]
fn the_number_of_spares_follows_the_need() {
    let pcpu = sleeping_machine(Policy {
        spare_chunks: 1,
        spare_chunks_max: 6,
        ..Policy::default()
    });
    let mut live = Vec::new();
    let mut targets = Vec::new();
    for _ in 0..3 {
        pcpu.upkeep();
        targets.push(pcpu.stats().spare_target);
        assert_eq!(pcpu.stats().spare_chunks, pcpu.stats().spare_target);
        while let Ok(address) = pcpu.allocate(&WHOLE) {
            live.push(address);
        }
    }
    assert_eq!(targets, [1, 4, 6], "twice what was wanted, to a limit");
    for address in live {
        pcpu.free_area(address, FreeFlags::empty()).unwrap();
    }
    let targets = [(); 5].map(|()| {
        pcpu.upkeep();
        let stats = audit(&pcpu).stats;
        assert!(stats.spare_chunks <= stats.spare_target);
        stats.spare_target
    });
    assert_eq!(targets, [6, 5, 4, 3, 2], "one fewer while left alone");
}

#[test]
fn an_upkeep_that_fails_is_not_due_at_once_again() {
    let pcpu = sleeping_machine(Policy::default());
    pcpu.backing().set_faults(|_| true);
    assert_eq!(pcpu.upkeep().chunks_prepared, 0);
    assert!(!pcpu.is_upkeep_due());
    audit(&pcpu);
    // An upkeep that is asked for tries again.
    pcpu.backing().set_faults(|_| false);
    assert_eq!(pcpu.upkeep().chunks_prepared, 1);
}
