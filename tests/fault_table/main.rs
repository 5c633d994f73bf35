//! Every operation, with every call of the backing that it makes failing: each one, and any two.
//!
//! The table says what calls a run makes that succeeds. An operation that a failure ends has changed nothing (the counters
//! of failures aside), or what the upkeep might have done as well; it says so by its typed error, and the same operation
//! succeeds once the backing does. At the end everything goes back; the simulated machine looks after that when it is
//! dropped.

#[path = "../common/audit.rs"]
mod audit;
#[path = "../common/copies.rs"]
mod copies;
#[path = "../common/free.rs"]
mod free;
#[path = "../common/same.rs"]
mod same;
#[path = "../common/small.rs"]
mod small;
#[path = "../common/undone.rs"]
mod undone;

mod owner;
mod running_out;
mod table;

use pcpu::backing::BackingError;
use pcpu::backing::sim::{Call, Machine, MachineError};
use pcpu::unit::{CpuId, FirstChunkKind};
use pcpu::{AllocError, AllocFlags, CpuError, Request, SetupError};

use audit::audit;
use owner::{Failure, Owner};
use same::assert_same;
use small::{UNIT_BYTES, small_machine};
use table::Kind::{BeginCpu, Metadata, Populate, Reserve};
use table::Op::{self, Allocate, BringUp, Free, Upkeep};
use table::{ATOMIC, FIRST, PAGE, PAGE_BYTES, ROWS, Row, WHOLE, kinds, plain, row};
use undone::assert_undone;

/// Machines with two nodes, of whose four CPUs one is up.
fn machines() -> [Machine; 3] {
    let machine = small_machine(4).nodes(2).online(1);
    [
        machine.clone(),
        machine.clone().dirty_memory(),
        machine.first_chunk(FirstChunkKind::Page),
    ]
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
            let atomic = u64::from(request.flags().contains(ATOMIC));
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
