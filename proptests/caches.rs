//! Any work on a few CPUs of an instance with caches, and of a hardened one, against a model (`seats.rs`).

#[path = "../tests/common/roomy.rs"]
mod roomy;
mod seats;
#[path = "../tests/common/small.rs"]
mod small;

use pcpu::backing::sim::Machine;
use pcpu::{AllocFlags, Request};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use roomy::roomy_machine;
use seats::{Front, Op, Run, Way};
use small::small_machine;

/// CPUs that there may be, and those that there are at first.
const CPUS: u32 = 4;
const ONLINE: u32 = 2;

fn requests() -> impl Strategy<Value = Request> {
    let sizes = prop_oneof![
        4 => (0_u32..7).prop_map(|shift| 4_usize << shift),
        2 => 1_usize..200,
        1 => 1_usize..5000,
    ];
    let aligns = prop_oneof![6 => 0_u32..4, 1 => 0_u32..13].prop_map(|shift| 1_usize << shift);
    let flags = prop_oneof![
        Just(AllocFlags::empty()),
        Just(AllocFlags::ATOMIC),
        Just(AllocFlags::TRY),
        Just(AllocFlags::NO_ZERO),
    ];
    (sizes, aligns, flags)
        .prop_map(|(bytes, align, flags)| Request::new(bytes, align).with_flags(flags))
}

fn ops() -> impl Strategy<Value = Op> {
    let seat = || 0..3_u32;
    let nth = || 0..1_usize << 16;
    let way = || prop_oneof![3 => seat().prop_map(Way::At), 1 => Just(Way::Plain)];
    prop_oneof![
        20 => (seat(), requests(), 1_usize..14).prop_map(|(a, b, c)| Op::Allocate(a, b, c)),
        16 => (seat(), nth(), 1_usize..14).prop_map(|(a, b, c)| Op::Free(a, b, c)),
        2 => nth().prop_map(Op::FreePlain),
        6 => (0..4_u32, nth()).prop_map(|(a, b)| Op::FreeAgain(a, b)),
        4 => (0..4_u32, nth(), 0_usize..300).prop_map(|(a, b, c)| Op::FreeNear(a, b, c)),
        2 => (0..4_u32).prop_map(Op::Drain),
        2 => Just(Op::Upkeep),
        2 => Just(Op::Trim),
        2 => (0..CPUS).prop_map(Op::BringUp),
        2 => Just(Op::Look),
        1 => prop_oneof![Just(0), any::<u64>()].prop_map(Op::Faults),
        2 => (0..4_u32, nth(), -40_isize..40, any::<u8>())
            .prop_map(|(a, b, c, d)| Op::WriteGuard(a, b, c, d)),
        2 => (0..4_u32, nth(), nth(), any::<u8>())
            .prop_map(|(a, b, c, d)| Op::FreeAndWrite(a, b, c, d)),
        6 => (way(), requests(), 0_usize..50).prop_map(|(a, b, c)| Op::AllocateMany(a, b, c)),
        4 => (way(), nth(), 0_usize..50).prop_map(|(a, b, c)| Op::FreeMany(a, b, c)),
        3 => (way(), nth(), 0_usize..20, nth())
            .prop_map(|(a, b, c, d)| Op::FreeManyAgain(a, b, c, d)),
    ]
}

fn run(front: Front, ops: &[Op]) {
    run_on(small_machine(CPUS), front, ops);
}

fn run_on(machine: Machine, front: Front, ops: &[Op]) {
    let machine = machine.online(ONLINE).dirty_memory();
    let mut run = Run::new(&machine, front);
    ops.iter().for_each(|op| run.step(op));
    run.end();
}

/// What fails is kept in a file beside this one and tried first from then on.
fn config() -> ProptestConfig {
    let found = FileFailurePersistence::Direct("proptests/caches.regressions");
    ProptestConfig {
        cases: 400,
        failure_persistence: Some(Box::new(found)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_plain_instance_does_what_the_model_says(ops in prop::collection::vec(ops(), 1..120)) {
        run(Front::Nothing, &ops);
    }

    #[test]
    fn caches_do_what_the_model_says(ops in prop::collection::vec(ops(), 1..120)) {
        run(Front::Caches, &ops);
    }

    #[test]
    fn caches_with_rows_of_names_do_what_the_model_says(
        ops in prop::collection::vec(ops(), 1..120),
    ) {
        run_on(roomy_machine(CPUS), Front::Caches, &ops);
    }

    #[test]
    fn a_hardened_instance_does_what_the_model_says(
        ops in prop::collection::vec(ops(), 1..120),
        granules in 1_usize..9,
        areas in 1_u32..40,
    ) {
        run(Front::Hardened(4 * granules, areas), &ops);
    }
}
