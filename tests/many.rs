//! Several areas at one go: what a batch hands out is what single requests would, and one that fails leaves nothing behind.

#[path = "common/audit.rs"]
mod audit;
#[path = "common/copies.rs"]
mod copies;
#[path = "common/small.rs"]
mod small;

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::sync::Mutex;
use std::thread;

use pcpu::backing::BackingError;
use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::cache::{LockedSeat, Seat};
use pcpu::hardened::{Finding, FindingHook, Hardening};
use pcpu::stats::{Event, EventHook, Stats};
use pcpu::unit::CpuId;
use pcpu::{
    AllocError, AllocFlags, CpuCell, FreeError, FreeFlags, FreeManyError, Global, LocalCell,
    PerCpu, RemoteCell, Request, alloc_percpu_many, alloc_percpu_many_with, free_percpu_many,
    global,
};

use audit::{Picture, audit};
use copies::{assert_stamped, assert_zero, stamp};
use small::{UNIT_BYTES, small_machine};

const PLAIN: FreeFlags = FreeFlags::empty();
const OUT_OF_PLACES: AllocError = AllocError::Backing(BackingError::OutOfAddressSpace);

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

fn free_many(pcpu: &SimAllocator, areas: &[usize]) -> Result<(), FreeManyError> {
    // SAFETY: no test frees another's areas, nor looks at the copies of an area that it has freed.
    unsafe { pcpu.free_many(areas, PLAIN) }
}

fn free_many_at(pcpu: &SimAllocator, seat: &impl Seat, areas: &[usize]) {
    // SAFETY: as above.
    unsafe { pcpu.free_many_at(seat, areas, PLAIN) }.unwrap();
}

fn seat(pcpu: &SimAllocator, cpu: u32) -> LockedSeat {
    // SAFETY: all seats of the tests do LockedSeat's steps.
    unsafe { LockedSeat::new(pcpu.units(), CpuId::new(cpu)) }
}

fn with_caches(machine: &Machine) -> SimAllocator {
    let mut pcpu = machine.build().unwrap();
    pcpu.enable_caches().unwrap();
    pcpu
}

/// Panics unless areas are there for their caller: aligned, apart, zero on every CPU. Then they are stamped.
fn take_over(pcpu: &SimAllocator, areas: &[usize], (bytes, align): (usize, usize)) {
    let mut sorted = areas.to_vec();
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        assert!(
            pair[0] + bytes <= pair[1],
            "{:#x} and {:#x}",
            pair[0],
            pair[1]
        );
    }
    for &address in areas {
        assert!(address.is_multiple_of(align.max(4)));
        assert_eq!(pcpu.area_bytes(address), Some(bytes.next_multiple_of(4)));
        for cpu in pcpu.units().possible().iter() {
            assert_zero(pcpu, (address, bytes), cpu);
        }
    }
    areas.iter().for_each(|&area| stamp(pcpu, (area, bytes)));
}

/// What of the counters a batch that fails leaves as it was: all but failures, what memory it got, and the most there ever was.
fn lasting(stats: &Stats) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        (stats.allocs, stats.frees, stats.live, stats.live_bytes),
        (stats.sizes, stats.live_sizes, stats.late_errors),
    )
}

/// Panics unless nothing is left of a batch. Pages that it had populated are idle.
fn assert_undone(before: &Picture, after: &Picture) {
    assert_eq!(before.areas, after.areas);
    assert_eq!(lasting(&before.stats), lasting(&after.stats));
    assert_eq!(before.stats.failures + 1, after.stats.failures);
    for new in &after.sections {
        let is_same =
            |old: &&audit::Section| (old.place, old.region.start) == (new.place, new.region.start);
        match before.sections.iter().find(is_same) {
            Some(old) => assert_eq!(old.free, new.free),
            None => assert!(new.areas.is_empty()),
        }
    }
}

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
fn wrong_requests_change_nothing() {
    for pcpu in [
        small_machine(2).build().unwrap(),
        with_caches(&small_machine(2)),
    ] {
        let limit_bytes = pcpu.policy().max_alloc_bytes;
        let unknown = AllocFlags::from_bits_retain(1 << 31);
        for (request, error) in [
            (Request::new(0, 8), AllocError::ZeroSize),
            (
                Request::new(usize::MAX, 8),
                AllocError::TooLarge {
                    bytes: usize::MAX,
                    limit_bytes,
                },
            ),
            (
                Request::new(8, 3),
                AllocError::AlignNotPowerOfTwo { align: 3 },
            ),
            (
                Request::new(8, 8).with_flags(unknown),
                AllocError::UnknownFlags { bits: 1 << 31 },
            ),
        ] {
            let before = pcpu.stats();
            let mut out = [0; 4];
            assert_eq!(pcpu.allocate_many(&request, &mut out), Err(error));
            let at = pcpu.allocate_many_at(&seat(&pcpu, 1), &request, &mut out);
            assert_eq!(at, Err(error));
            let after = pcpu.stats();
            assert_eq!(lasting(&before), lasting(&after));
            assert_eq!(after.failures, before.failures + 2);
        }
    }
}

/// Each call of the backing that a batch makes fails in turn, alone and with all behind it.
#[test]
fn a_batch_that_fails_leaves_nothing_behind() {
    let machine = small_machine(4).nodes(2).online(2);
    let machines = [machine.clone(), machine.clone().dirty_memory()];
    let mut failed = 0;
    for machine in &machines {
        for is_cached in [false, true] {
            for flags in [AllocFlags::empty(), AllocFlags::ATOMIC] {
                for &(bytes, align, count) in &[(100, 4, 500), (5000, 8, 12), (12_000, 4096, 4)] {
                    let request = Request::new(bytes, align).with_flags(flags);
                    for nth in 0.. {
                        let (result, calls) =
                            fail_batch(machine, is_cached, &request, count, nth, |call, nth| {
                                call == nth
                            });
                        failed += u32::from(result.is_err());
                        let (result, _) =
                            fail_batch(machine, is_cached, &request, count, nth, |call, nth| {
                                call >= nth
                            });
                        assert!(result.is_err() || nth >= calls);
                        if nth >= calls {
                            break;
                        }
                    }
                }
            }
        }
    }
    assert!(failed > 20, "only {failed} failed");
}

/// Asks for a batch that touches live areas, idle ones and memory that is not there; says how it went, and how many calls there were.
fn fail_batch(
    machine: &Machine,
    is_cached: bool,
    request: &Request,
    count: usize,
    nth: u64,
    fails: fn(u64, u64) -> bool,
) -> (Result<(), AllocError>, u64) {
    let mut pcpu = machine.build().unwrap();
    if is_cached {
        pcpu.enable_caches().unwrap();
    }
    let here = seat(&pcpu, 0);
    let kept: Vec<_> = (0..5)
        .map(|_| pcpu.allocate_at(&here, request).unwrap())
        .collect();
    let size = (request.bytes, request.align);
    take_over(&pcpu, &kept, size);
    // SAFETY: it is the test's, and not used any more.
    unsafe { pcpu.free_at(&here, kept[1], PLAIN) }.unwrap();
    let live = [kept[0], kept[2], kept[3], kept[4]];
    let before = audit_of(&pcpu);
    pcpu.backing().set_faults(move |call| fails(call, nth));
    let mut out = vec![0; count];
    let result = pcpu.allocate_many_at(&here, request, &mut out);
    let calls = pcpu.backing().fallible_calls();
    pcpu.backing().set_faults(|_| false);
    let after = audit_of(&pcpu);
    match result {
        Ok(()) => take_over(&pcpu, &out, size),
        Err(error) => {
            assert!(matches!(error, AllocError::Backing(_)), "{error:?}");
            if is_cached {
                assert_eq!(before.1, after.1);
                assert_eq!(lasting(&before.0), lasting(&after.0));
            } else {
                assert_undone(&before.2.unwrap(), &after.2.unwrap());
            }
            pcpu.allocate_many_at(&here, request, &mut out).unwrap();
            take_over(&pcpu, &out, size);
        }
    }
    for address in live {
        for cpu in pcpu.units().materialised().iter() {
            assert_stamped(&pcpu, (address, request.bytes), cpu);
        }
    }
    free_many_at(&pcpu, &here, &out);
    free_many_at(&pcpu, &here, &live);
    assert_eq!(pcpu.stats().live, 0);
    (result, calls)
}

/// The counters and the live areas; and a recount, which is for instances without caches.
fn audit_of(pcpu: &SimAllocator) -> (Stats, BTreeMap<usize, usize>, Option<Picture>) {
    let picture = (!pcpu.has_caches()).then(|| audit(pcpu));
    let mut areas = BTreeMap::new();
    pcpu.visit_map(|place, item| {
        if let pcpu::stats::MapItem::Area(area) = item {
            areas.insert((place as usize) << 32 | area.start, area.len());
        }
    });
    (pcpu.stats(), areas, picture)
}

#[test]
fn a_full_window_refuses_the_whole_batch() {
    for is_cached in [false, true] {
        let mut pcpu = small_machine(2).chunks(3).build().unwrap();
        if is_cached {
            pcpu.enable_caches().unwrap();
        }
        let here = seat(&pcpu, 1);
        let mut few = [0; 3];
        let request = Request::new(1000, 8);
        pcpu.allocate_many_at(&here, &request, &mut few).unwrap();
        let before = audit_of(&pcpu);
        let mut out = [0; 200];
        assert_eq!(
            pcpu.allocate_many_at(&here, &request, &mut out),
            Err(OUT_OF_PLACES)
        );
        let after = audit_of(&pcpu);
        assert_eq!((before.1, lasting(&before.0)), (after.1, lasting(&after.0)));
        assert_eq!(after.0.failures, 1);
        pcpu.allocate_many_at(&here, &request, &mut out[..60])
            .unwrap();
        free_many_at(&pcpu, &here, &out[..60]);
        free_many_at(&pcpu, &here, &few);
        assert_eq!(pcpu.stats().live, 0);
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

/// What a hook is told.
#[derive(Default)]
struct Told {
    live: BTreeMap<usize, (usize, usize)>,
    failures: u32,
}

struct Hook(Mutex<Told>);

impl EventHook for Hook {
    fn event(&self, event: &Event) {
        let mut told = self.0.lock().unwrap();
        match *event {
            Event::Alloc {
                address,
                bytes,
                owner,
                ..
            } => assert_eq!(told.live.insert(address, (bytes, owner)), None),
            Event::Free { address, .. } => assert!(told.live.remove(&address).is_some()),
            Event::Failure { .. } => told.failures += 1,
            _ => {}
        }
    }
}

#[test]
fn the_hook_is_told_of_each_area_or_of_one_failure() {
    static HOOK: Hook = Hook(Mutex::new(Told {
        live: BTreeMap::new(),
        failures: 0,
    }));
    for is_cached in [false, true] {
        let mut pcpu = small_machine(2).chunks(3).build().unwrap();
        if is_cached {
            pcpu.enable_caches().unwrap();
        }
        pcpu.set_event_hook(Some(&HOOK));
        let here = seat(&pcpu, 0);
        let request = Request::new(1000, 8).with_owner(77);
        // Some of them in memory that is there, some in chunks to be made.
        let mut out = [0; 40];
        pcpu.allocate_many_at(&here, &request, &mut out).unwrap();
        let told = || HOOK.0.lock().unwrap().live.clone();
        let expected: BTreeMap<_, _> = out.iter().map(|&address| (address, (1000, 77))).collect();
        assert_eq!(told(), expected);
        let refused = pcpu.allocate_many_at(&here, &request, &mut [0; 100]);
        assert_eq!(refused, Err(OUT_OF_PLACES));
        assert_eq!(told(), expected);
        assert_eq!(HOOK.0.lock().unwrap().failures, 1 + u32::from(is_cached));
        free_many_at(&pcpu, &here, &out);
        assert!(told().is_empty());
    }
}

#[derive(Debug)]
struct Findings(Mutex<Vec<Finding>>);

impl FindingHook for Findings {
    fn found(&self, finding: &Finding) {
        self.0.lock().unwrap().push(*finding);
    }
}

#[test]
fn a_hardened_instance_serves_batches() {
    static FINDINGS: Findings = Findings(Mutex::new(Vec::new()));
    let mut pcpu = small_machine(2).chunks(3).build().unwrap();
    let hardening = Hardening::new(&FINDINGS);
    pcpu.harden(hardening).unwrap();
    let live = || {
        let mut live = 0;
        pcpu.visit_live_areas(|_| live += 1);
        live
    };
    let mut out = [0; 10];
    pcpu.allocate_many_at(&seat(&pcpu, 0), &Request::new(20, 4), &mut out)
        .unwrap();
    out.iter().for_each(|&address| stamp(&pcpu, (address, 20)));
    assert_eq!((live(), pcpu.check_areas()), (10, 0));
    let refused = pcpu.allocate_many(&Request::new(3000, 4), &mut [0; 50]);
    assert_eq!(refused, Err(OUT_OF_PLACES));
    assert_eq!((live(), pcpu.check_areas()), (10, 0));
    let trying = Request::new(8, 4).with_flags(AllocFlags::TRY);
    assert_eq!(
        pcpu.allocate_many(&trying, &mut [0; 2]),
        Err(AllocError::Busy)
    );
    free_many(&pcpu, &out).unwrap();
    assert_eq!(live(), 0);
    assert_eq!(pcpu.stats().failures, 2);
    assert!(FINDINGS.0.lock().unwrap().is_empty());
}

#[test]
fn a_free_that_is_refused_says_where() {
    let pcpu = small_machine(2).build().unwrap();
    let mut out = [0; 5];
    pcpu.allocate_many(&Request::new(16, 8), &mut out).unwrap();
    let [a, b, c, d, e] = out;
    let error = FreeError::NotAllocated { address: b };
    let refused = free_many(&pcpu, &[a, b, b, c]);
    assert_eq!(refused, Err(FreeManyError { freed: 2, error }));
    assert!(
        refused
            .unwrap_err()
            .to_string()
            .contains(&error.to_string())
    );
    assert_eq!(pcpu.area_bytes(c), Some(16), "what is behind is live");
    free_many(&pcpu, &[c, d, e]).unwrap();
    assert_eq!(pcpu.stats().live, 0);
}

#[test]
fn typed_batches_in_a_process() {
    let [left, right] = PerCpu::<CpuCell<u32>>::new_many().unwrap();
    left.add(3);
    right.add(4);
    assert_eq!((left.sum(), right.sum()), (3, 4));
    assert!(alloc_percpu_many::<[u64; 0], 0>().unwrap().is_empty());
    let refused = alloc_percpu_many::<[u64; 0], 2>();
    assert_eq!(refused, Err(AllocError::ZeroSize));

    let mut out = [const { MaybeUninit::uninit() }; 40];
    let variables =
        alloc_percpu_many_with::<CpuCell<u64>, Global>(AllocFlags::NO_ZERO, &mut out).unwrap();
    let owners: Vec<_> = variables
        .iter()
        // SAFETY: allocated above, and given up to the owner.
        .map(|&variable| unsafe { PerCpu::from_ptr(variable) })
        .collect();
    for (nth, owner) in owners.iter().enumerate() {
        assert_eq!(owner.sum(), 0);
        owner.add(nth as u64);
    }
    for (nth, owner) in owners.into_iter().enumerate() {
        assert_eq!(owner.sum(), nth as u64);
    }
}

/// Batches of several threads, freed by their own threads and by others.
#[test]
fn threads_do_not_share_areas() {
    thread::scope(|scope| {
        for id in 1..=4_u64 {
            scope.spawn(move || {
                for _ in 0..500 {
                    let variables = alloc_percpu_many::<CpuCell<u64>, 24>().unwrap();
                    let owners = variables.map(|variable| {
                        // SAFETY: allocated above, and given up to the owner.
                        unsafe { PerCpu::from_ptr(variable) }
                    });
                    owners.iter().for_each(|owner| owner.add(id));
                    assert!(owners.iter().all(|owner| owner.sum() == id));
                    let variables = owners.map(PerCpu::into_ptr);
                    let free = move || {
                        // SAFETY: given up above.
                        unsafe { free_percpu_many(&variables) }.unwrap();
                    };
                    match id % 2 {
                        0 => free(),
                        _ => thread::spawn(free).join().unwrap(),
                    }
                }
            });
        }
    });
    assert_eq!(global().stats().late_errors, 0);
}
