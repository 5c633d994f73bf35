//! Every operation, with every call of the backing that it makes failing: each one, and any two.
//!
//! The table says what calls a run makes that succeeds. An operation that a failure ends has changed nothing (the counters
//! of failures aside), or what the upkeep might have done as well; it says so by its typed error, and the same operation
//! succeeds once the backing does. At the end everything goes back; the simulated machine looks after that when it is
//! dropped.

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

use pcpu::allocator::{Policy, UpkeepBy};
use pcpu::backing::BackingError;
use pcpu::backing::sim::{Call, Machine, MachineError, SimAllocator};
use pcpu::unit::{CpuId, FirstChunkKind, NodeId};
use pcpu::{AllocError, AllocFlags, CpuError, FreeFlags, Request, SetupError};

use audit::audit;
use copies::{assert_stamped, assert_zero, stamp};
use free::FreeArea;
use same::assert_same;
use small::{UNIT_BYTES, small_machine};
use undone::assert_undone;

const PAGE_BYTES: usize = 4096;

/// What fills the first chunk's dynamic region but for less than a page.
const FIRST: Request = Request::new(13_000, 4);
const PAGE: Request = Request::new(PAGE_BYTES, PAGE_BYTES);
const WHOLE: Request = Request::new(UNIT_BYTES, PAGE_BYTES);
const ATOMIC: AllocFlags = AllocFlags::ATOMIC;

/// Calls that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Metadata,
    Reserve,
    Populate,
    BeginCpu,
}
use Kind::{BeginCpu, Metadata, Populate, Reserve};

/// Live areas: address and length.
type Live = Vec<(usize, usize)>;

#[derive(Debug, Clone, Copy)]
enum Op {
    Allocate(Request),
    /// Frees the live area of this number.
    Free(usize),
    Upkeep,
    Trim(u32),
    BringUp(u32),
}

#[derive(Debug)]
enum Failure {
    Alloc(AllocError),
    Cpu(CpuError),
}

struct Row {
    name: &'static str,
    machine: fn(Machine) -> Machine,
    /// What is done before the faults begin.
    before: &'static [Op],
    op: Op,
    /// The calls of a run that succeeds, those that can fail.
    calls: &'static [Kind],
}

const fn row(
    name: &'static str,
    machine: fn(Machine) -> Machine,
    before: &'static [Op],
    op: Op,
    calls: &'static [Kind],
) -> Row {
    Row {
        name,
        machine,
        before,
        op,
        calls,
    }
}

fn plain(machine: Machine) -> Machine {
    machine
}

fn without_spares(machine: Machine) -> Machine {
    machine.policy(Policy {
        spare_chunks: 0,
        spare_chunks_max: 0,
        ..Policy::default()
    })
}

fn with_three_spares(machine: Machine) -> Machine {
    machine.policy(Policy {
        spare_chunks: 3,
        spare_chunks_max: 3,
        ..Policy::default()
    })
}

fn by_callers(machine: Machine) -> Machine {
    machine.policy(Policy {
        upkeep: UpkeepBy::Callers,
        ..Policy::default()
    })
}

use Op::{Allocate, BringUp, Free, Trim, Upkeep};

const ROWS: &[Row] = &[
    row("in the first chunk", plain, &[], Allocate(PAGE), &[]),
    row(
        "in the reserved region",
        plain,
        &[],
        Allocate(Request::new(100, 4).with_flags(AllocFlags::RESERVED)),
        &[],
    ),
    row(
        "new chunk",
        plain,
        &[Allocate(FIRST)],
        Allocate(PAGE),
        &[Metadata, Reserve, Populate],
    ),
    row(
        "new chunk, atomic",
        plain,
        &[Allocate(FIRST)],
        Allocate(PAGE.with_flags(ATOMIC)),
        &[Metadata, Reserve, Populate],
    ),
    row(
        "new chunk, not zeroed",
        Machine::dirty_memory,
        &[Allocate(FIRST)],
        Allocate(PAGE.with_flags(AllocFlags::NO_ZERO)),
        &[Metadata, Reserve, Populate],
    ),
    row(
        "the largest request, a whole chunk",
        plain,
        &[],
        Allocate(WHOLE),
        &[Metadata, Reserve, Populate],
    ),
    row(
        "the second new chunk",
        plain,
        &[Allocate(WHOLE)],
        Allocate(WHOLE),
        &[Metadata, Reserve, Populate],
    ),
    row(
        "a spare chunk",
        plain,
        &[Allocate(FIRST), Upkeep],
        Allocate(PAGE),
        &[Populate],
    ),
    row(
        "a spare chunk, atomic",
        plain,
        &[Allocate(FIRST), Upkeep],
        Allocate(PAGE.with_flags(ATOMIC)),
        &[Populate],
    ),
    row(
        "growth by a page",
        plain,
        &[Allocate(FIRST), Allocate(PAGE)],
        Allocate(PAGE),
        &[Populate],
    ),
    row(
        "growth over pages, atomic",
        plain,
        &[Allocate(FIRST), Allocate(PAGE)],
        Allocate(Request::new(3 * PAGE_BYTES + 4, 4).with_flags(ATOMIC)),
        &[Populate],
    ),
    row(
        "growth on both sides of a page that has memory",
        plain,
        &[
            Allocate(FIRST),
            Allocate(PAGE),
            Allocate(PAGE),
            Allocate(PAGE),
            Allocate(PAGE),
            Free(1),
            Free(2),
            Trim(1),
            Free(1),
        ],
        Allocate(Request::new(3 * PAGE_BYTES, PAGE_BYTES).with_flags(ATOMIC)),
        &[Populate],
    ),
    row(
        "TRY where there is memory",
        plain,
        &[Allocate(FIRST), Allocate(Request::new(8, 8))],
        Allocate(Request::new(8, 8).with_flags(AllocFlags::TRY)),
        &[],
    ),
    row(
        "beside idle memory",
        plain,
        &[Allocate(WHOLE), Allocate(WHOLE), Free(0), Allocate(FIRST)],
        Allocate(PAGE),
        &[],
    ),
    row("free", plain, &[Allocate(PAGE)], Free(0), &[]),
    row(
        "free of the last area of a chunk",
        plain,
        &[Allocate(WHOLE)],
        Free(0),
        &[],
    ),
    row(
        "free by a caller that runs the upkeep",
        by_callers,
        &[Allocate(WHOLE)],
        Free(0),
        &[],
    ),
    row(
        "allocation by a caller that runs the upkeep",
        by_callers,
        &[],
        Allocate(FIRST),
        &[Metadata, Reserve],
    ),
    row(
        "upkeep that prepares a chunk",
        plain,
        &[Allocate(FIRST)],
        Upkeep,
        &[Metadata, Reserve],
    ),
    row(
        "upkeep that prepares three",
        with_three_spares,
        &[Allocate(FIRST)],
        Upkeep,
        &[Metadata, Reserve, Metadata, Reserve, Metadata, Reserve],
    ),
    row(
        "upkeep that gives back",
        without_spares,
        &[Allocate(WHOLE), Free(0)],
        Upkeep,
        &[],
    ),
    row("trim", plain, &[Allocate(WHOLE), Free(0)], Trim(0), &[]),
    row("a CPU, no later chunk", plain, &[], BringUp(1), &[BeginCpu]),
    row(
        "a CPU, one chunk",
        plain,
        &[Allocate(WHOLE)],
        BringUp(1),
        &[BeginCpu, Populate],
    ),
    row(
        "a CPU, three chunks, one of them spare",
        plain,
        &[Allocate(WHOLE), Allocate(WHOLE), Allocate(FIRST), Upkeep],
        BringUp(3),
        &[BeginCpu, Populate, Populate],
    ),
    row(
        "a CPU that is up already",
        plain,
        &[Allocate(WHOLE)],
        BringUp(0),
        &[],
    ),
];

/// An instance with what its owner knows of it.
struct Owner {
    pcpu: SimAllocator,
    live: Live,
}

impl Owner {
    fn new(row: &Row, machine: &Machine) -> Self {
        let pcpu = (row.machine)(machine.clone()).build().unwrap();
        let mut owner = Self {
            pcpu,
            live: Live::new(),
        };
        for &op in row.before {
            owner.run(op).unwrap();
        }
        owner.pcpu.backing().record();
        owner.pcpu.backing().set_faults(|_| false);
        owner
    }

    fn run(&mut self, op: Op) -> Result<(), Failure> {
        let pcpu = &self.pcpu;
        match op {
            Allocate(request) => {
                let address = pcpu.allocate(&request).map_err(Failure::Alloc)?;
                let area = (address, request.bytes);
                if !request.flags.contains(AllocFlags::NO_ZERO) {
                    for cpu in pcpu.units().possible().iter() {
                        assert_zero(pcpu, area, cpu);
                    }
                }
                stamp(pcpu, area);
                self.live.push(area);
            }
            Free(nth) => {
                let (address, _) = self.live.remove(nth);
                pcpu.free_area(address, FreeFlags::empty()).unwrap();
            }
            Upkeep => drop(pcpu.upkeep()),
            Trim(spares) => drop(pcpu.trim(spares)),
            BringUp(cpu) => {
                pcpu.bring_up(CpuId::new(cpu)).map_err(Failure::Cpu)?;
                self.live.iter().for_each(|&area| stamp(pcpu, area));
            }
        }
        Ok(())
    }

    fn check_copies(&self) {
        for &area in &self.live {
            for cpu in self.pcpu.units().materialised().iter() {
                assert_stamped(&self.pcpu, area, cpu);
            }
        }
    }

    /// Frees everything, and finds only the first chunk.
    fn end(self) {
        self.check_copies();
        let reserved = self.pcpu.neutral_base() + self.pcpu.sizes().regions().reserved.start
            ..self.pcpu.neutral_base() + self.pcpu.sizes().regions().reserved.end;
        for (address, _) in &self.live {
            let flags = match reserved.contains(address) {
                true => FreeFlags::RESERVED,
                false => FreeFlags::empty(),
            };
            self.pcpu.free_area(*address, flags).unwrap();
        }
        self.pcpu.trim(0);
        let end = audit(&self.pcpu).stats;
        let first_pages = self.pcpu.sizes().populated_pages() as u64;
        assert_eq!(
            (end.live, end.chunks, end.populated_pages),
            (0, 1, first_pages)
        );
        assert_eq!(end.empty_pages, 0);
    }
}

/// Machines with two nodes, of whose four CPUs one is up.
fn machines() -> [Machine; 3] {
    let machine = small_machine(4).nodes(2).online(1);
    [
        machine.clone(),
        machine.clone().dirty_memory(),
        machine.first_chunk(FirstChunkKind::Page),
    ]
}

fn kinds(calls: &[Call]) -> Vec<Kind> {
    let kind = |call: &Call| match call {
        Call::AllocateMetadata { .. } => Some(Metadata),
        Call::Reserve { .. } => Some(Reserve),
        Call::Populate { .. } => Some(Populate),
        Call::BeginCpu { .. } => Some(BeginCpu),
        _ => None,
    };
    calls.iter().filter_map(kind).collect()
}

/// A unit made by the page builder is as short as the sizes allow: some rows need the room of a whole one.
fn suits(row: &Row, machine: &Machine) -> bool {
    let unit_bytes = machine.build().unwrap().sizes().unit_bytes();
    unit_bytes == UNIT_BYTES || row.calls.is_empty() && row.before.is_empty()
}

#[test]
fn each_operation_makes_the_calls_of_the_table() {
    for row in ROWS {
        for machine in machines() {
            if !suits(row, &machine) {
                continue;
            }
            let mut owner = Owner::new(row, &machine);
            owner.run(row.op).unwrap();
            assert_eq!(
                kinds(&owner.pcpu.backing().recorded()),
                row.calls,
                "{}",
                row.name
            );
            let fallible_calls = owner.pcpu.backing().fallible_calls();
            assert_eq!(fallible_calls, row.calls.len() as u64, "{}", row.name);
            owner.end();
        }
    }
}

/// Runs the row's operation with the calls failing that `fails` names; whether it failed.
fn run_failing(row: &Row, machine: &Machine, fails: [u64; 2]) -> bool {
    let mut owner = Owner::new(row, machine);
    let before = audit(&owner.pcpu);
    owner
        .pcpu
        .backing()
        .set_faults(move |call| fails.contains(&call));
    let result = owner.run(row.op);
    owner.pcpu.backing().set_faults(|_| false);
    let after = audit(&owner.pcpu);
    owner.check_copies();
    let what = || format!("{}, calls {fails:?}: {result:?}", row.name);
    match (&result, row.op) {
        (Ok(()), _) => {}
        (Err(Failure::Alloc(error)), Allocate(request)) => {
            let kind = row.calls[fails[0] as usize];
            let expected = match kind {
                Metadata => BackingError::OutOfMetadata,
                Reserve => BackingError::OutOfAddressSpace,
                Populate | BeginCpu => BackingError::OutOfFrames,
            };
            assert_eq!(*error, AllocError::Backing(expected), "{}", what());
            assert_eq!(after.stats.failures, before.stats.failures + 1);
            let atomic = u64::from(request.flags.contains(ATOMIC));
            let atomic_failures = after.stats.atomic_failures - before.stats.atomic_failures;
            assert_eq!(atomic_failures, atomic, "{}", what());
            // A chunk that was made for it, and did not get pages, stays: spare. Idle pages may have gone back.
            let is_exact = !(kind == Populate
                && (row.calls.contains(&Reserve) || before.stats.empty_pages > 0));
            match is_exact {
                true => assert_same(&before, &after),
                false => assert_undone(&before, &after, PAGE_BYTES),
            }
        }
        (Err(Failure::Cpu(error)), BringUp(cpu)) => {
            let cpu = CpuId::new(cpu);
            let error_expected = CpuError::NoMemory {
                cpu,
                error: BackingError::OutOfFrames,
            };
            assert_eq!(*error, error_expected, "{}", what());
            assert!(!owner.pcpu.units().materialised().contains(cpu));
            assert_same(&before, &after);
            let recorded = owner.pcpu.backing().recorded();
            let has_begun = recorded.contains(&Call::BeginCpu { cpu });
            let is_cancelled = recorded.contains(&Call::CancelCpu { cpu });
            assert_eq!(is_cancelled, has_begun, "{}", what());
        }
        _ => panic!("{}", what()),
    }
    let has_failed = result.is_err();
    if has_failed {
        owner
            .run(row.op)
            .unwrap_or_else(|again| panic!("{}, again: {again:?}", row.name));
        audit(&owner.pcpu);
    }
    owner.end();
    has_failed
}

/// Whether the row's operation may succeed although a call failed: what is prepared ahead may be missing.
fn does_without(row: &Row) -> bool {
    matches!(row.op, Upkeep) || row.name.contains("runs the upkeep")
}

#[test]
fn each_call_fails_once_and_any_two_do() {
    let mut runs = 0;
    for row in ROWS {
        for machine in machines() {
            if !suits(row, &machine) {
                continue;
            }
            let calls = row.calls.len() as u64;
            for first in 0..calls {
                // The last `second` is no call at all: one failure alone. More calls may come once the first failed.
                for second in first + 1..calls + 4 {
                    let has_failed = run_failing(row, &machine, [first, second]);
                    assert_eq!(has_failed, !does_without(row), "{}", row.name);
                    runs += 1;
                }
            }
        }
    }
    assert!(runs > 250, "{runs} runs");
}

/// A request that may sleep gives idle pages back and asks again, so that it takes two failures to refuse it.
#[test]
fn two_failures_refuse_what_one_does_not() {
    const BEFORE: &[Op] = &[
        Allocate(WHOLE),
        Allocate(WHOLE),
        Free(0),
        Allocate(FIRST),
        Allocate(Request::new(20_000, 4)),
    ];
    let whole = row(
        "beside idle pages",
        plain,
        BEFORE,
        Allocate(WHOLE),
        &[Metadata, Reserve, Populate],
    );
    let machine = &machines()[0];
    assert!(run_failing(&whole, machine, [0, 9]));
    assert!(run_failing(&whole, machine, [1, 9]));
    assert!(!run_failing(&whole, machine, [2, 9]));
    assert!(run_failing(&whole, machine, [2, 3]));
}

/// Setting up fails at every call in turn: the builder's, the allocator's metadata, the CPUs that come up.
#[test]
fn setting_up_fails_at_each_call() {
    for kind in [FirstChunkKind::Embed, FirstChunkKind::Page] {
        for cpus in [1, 3, 4] {
            let machine = small_machine(cpus).nodes(1 + cpus / 4).first_chunk(kind);
            let calls = |online| {
                let pcpu = machine.clone().online(online).build().unwrap();
                pcpu.backing().fallible_calls()
            };
            // One call for each CPU that comes up, three blocks of metadata; what is left is the builder's.
            let all = calls(cpus);
            let setup = calls(0);
            assert_eq!(all - setup, u64::from(cpus));
            let builder = setup - 3;
            assert!(builder > 0);
            for nth in 0..=all {
                let built = machine.build_with_faults(move |call| call == nth);
                match built {
                    Err(MachineError::Build(_)) => assert!(nth < builder),
                    Err(MachineError::Setup(error)) => {
                        assert_eq!(error, SetupError::Backing(BackingError::OutOfMetadata));
                        assert!((builder..setup).contains(&nth));
                    }
                    Err(MachineError::BringUp(CpuError::NoMemory { cpu, error })) => {
                        assert_eq!(u64::from(cpu.get()), nth - setup);
                        assert_eq!(error, BackingError::OutOfFrames);
                    }
                    Err(other) => panic!("call {nth}: {other:?}"),
                    Ok(pcpu) => {
                        assert_eq!(nth, all);
                        audit(&pcpu);
                    }
                }
            }
        }
    }
}

/// What is never waited for is no failure of the backing: it is not asked.
#[test]
fn what_must_not_wait_asks_for_nothing() {
    let whole = WHOLE.with_flags(AllocFlags::TRY);
    let page = PAGE.with_flags(AllocFlags::TRY);
    let pcpu = small_machine(2).build().unwrap();
    pcpu.allocate(&FIRST).unwrap();
    for (before, request) in [(None, whole), (None, page), (Some(PAGE), page)] {
        if let Some(before) = before {
            pcpu.allocate(&before).unwrap();
        }
        let picture = audit(&pcpu);
        pcpu.backing().record();
        assert_eq!(pcpu.allocate(&request), Err(AllocError::Busy));
        assert_same(&picture, &audit(&pcpu));
        assert_eq!(pcpu.backing().recorded(), []);
    }
}

/// Serves `request` until it is refused; the areas and the error.
fn exhaust(pcpu: &SimAllocator, request: &Request) -> (Live, AllocError) {
    let mut live = Live::new();
    loop {
        match pcpu.allocate(request) {
            Ok(address) => live.push((address, request.bytes)),
            Err(error) => return (live, error),
        }
    }
}

#[test]
fn whatever_runs_out_comes_back() {
    let metadata_bytes = small_machine(2).build().unwrap().stats().metadata_bytes;
    let chunk_bytes = small_machine(2).build().unwrap();
    let chunk_bytes = chunk_bytes.chunk_metadata_layout().size();
    for (machine, error, chunks) in [
        (
            small_machine(2).metadata_bytes(metadata_bytes + 2 * chunk_bytes),
            BackingError::OutOfMetadata,
            2,
        ),
        (
            small_machine(2).chunks(4),
            BackingError::OutOfAddressSpace,
            3,
        ),
        // Three chunks' pages on two CPUs, and two pages that are not enough for a fourth.
        (
            small_machine(2).node_frames(3 * 8 * 2 + 2),
            BackingError::OutOfFrames,
            3,
        ),
    ] {
        for flags in [AllocFlags::empty(), ATOMIC] {
            let pcpu = machine.build().unwrap();
            let whole = WHOLE.with_flags(flags);
            let metadata_bytes = pcpu.stats().metadata_bytes;
            let (live, refused) = exhaust(&pcpu, &whole);
            assert_eq!(refused, AllocError::Backing(error));
            assert_eq!(live.len(), chunks);
            let before = audit(&pcpu);
            for _ in 0..3 {
                assert_eq!(pcpu.allocate(&whole), Err(AllocError::Backing(error)));
                assert_same(&before, &audit(&pcpu));
            }
            // What is small still finds room in the first chunk.
            let small = pcpu.allocate(&Request::new(64, 64)).unwrap();
            pcpu.free_area(small, FreeFlags::empty()).unwrap();
            pcpu.free_area(live[1].0, FreeFlags::empty()).unwrap();
            assert_eq!(pcpu.allocate(&whole), Ok(live[1].0));
            for (address, _) in live {
                pcpu.free_area(address, FreeFlags::empty()).unwrap();
            }
            pcpu.trim(0);
            // SAFETY: nobody frees meanwhile.
            unsafe { pcpu.trim_metadata() };
            let end = audit(&pcpu).stats;
            assert_eq!((end.chunks, end.metadata_bytes), (1, metadata_bytes));
            assert_eq!(exhaust(&pcpu, &whole).0.len(), chunks);
        }
    }
}

/// A node whose frames are out takes another's, page by page; what it borrowed goes back to where it came from.
#[test]
fn an_empty_node_borrows() {
    // CPUs 0 and 1 on node 0, of which both are up; 2 and 3 on node 1, of which none is.
    let pcpu = small_machine(4)
        .nodes(2)
        .online(2)
        .node_frames(20)
        .build()
        .unwrap();
    let left = || [0, 1].map(|node| pcpu.backing().frames_left(NodeId::new(node)));
    let first = pcpu.allocate(&WHOLE).unwrap();
    assert_eq!(left(), [Some(4), Some(20)]);
    assert_eq!(pcpu.backing().frames_from_afar(), 0);
    let second = pcpu.allocate(&WHOLE).unwrap();
    assert_eq!(left(), [Some(0), Some(8)]);
    assert_eq!(pcpu.backing().frames_from_afar(), 12);
    // Sixteen more are not to be had, eight for a CPU of the other node neither with two chunks of eight pages.
    let out = AllocError::Backing(BackingError::OutOfFrames);
    assert_eq!(pcpu.allocate(&WHOLE), Err(out));
    let cpu = CpuId::new(2);
    let before = audit(&pcpu);
    let no_memory = CpuError::NoMemory {
        cpu,
        error: BackingError::OutOfFrames,
    };
    assert_eq!(pcpu.bring_up(cpu), Err(no_memory));
    assert_same(&before, &audit(&pcpu));
    assert_eq!(left(), [Some(0), Some(8)]);
    pcpu.free_area(first, FreeFlags::empty()).unwrap();
    pcpu.trim(0);
    assert_eq!(left(), [Some(16), Some(8)]);
    assert_eq!(pcpu.backing().frames_from_afar(), 12);
    assert_eq!(pcpu.bring_up(cpu), Ok(()));
    assert_eq!(left(), [Some(16), Some(0)]);
    pcpu.free_area(second, FreeFlags::empty()).unwrap();
    pcpu.trim(0);
    assert_eq!(left(), [Some(20), Some(20)]);
}
