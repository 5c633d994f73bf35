//! The allocator against a simple model: random operations on machines of many shapes whose backing fails at random.
//!
//! What is compared after every operation: `model.rs`.

#[path = "../tests/common/audit.rs"]
mod audit;
#[path = "../tests/common/copies.rs"]
mod copies;
#[path = "../tests/common/free.rs"]
mod free;
#[path = "../tests/common/same.rs"]
mod same;
#[path = "../tests/common/undone.rs"]
mod undone;

mod model;

use free::FreeArea;

use pcpu::allocator::{Policy, UpkeepBy};
use pcpu::backing::sim::Machine;
use pcpu::unit::{FirstChunkKind, FirstChunkSpec};
use pcpu::{AllocFlags, FreeFlags, Request};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use audit::audit;
use model::{Faults, Fresh, Making, Op, Run, Shape};

fn shapes() -> impl Strategy<Value = Shape> {
    let cpus = (1_u32..=8).prop_flat_map(|cpus| (Just(cpus), 0..=cpus, 1..=cpus.min(3)));
    // Pages, and pages per unit: at least 32 KiB, and room for the three regions.
    let pages = prop_oneof![
        4 => prop_oneof![Just(8_usize), Just(9), Just(16)].prop_map(|pages| (4 << 10, pages)),
        1 => (2_usize..=4).prop_map(|pages| (16 << 10, pages)),
        1 => (1_usize..=2).prop_map(|pages| (64 << 10, pages)),
    ];
    let regions = (
        0_usize..3000,
        (0_usize..1000).prop_map(|granules| granules * 4),
    );
    let kind = prop_oneof![Just(FirstChunkKind::Embed), Just(FirstChunkKind::Page)];
    let contents = prop_oneof![Just(Fresh::Zeroed), Just(Fresh::Dirty)];
    let making = prop_oneof![Just(Making::Anytime), Just(Making::Sleeping)];
    let upkeep = prop_oneof![3 => Just(UpkeepBy::Owner), 1 => Just(UpkeepBy::Callers)];
    let policy = (upkeep, 0_u32..3, 0_u32..3, 0_u32..6, 1_u32..20);
    let policy = policy.prop_map(|(upkeep, spare_chunks, low, more, quiet_frees)| Policy {
        upkeep,
        spare_chunks,
        spare_chunks_max: spare_chunks * 4,
        empty_pages_low: low,
        empty_pages_high: low + more,
        quiet_frees,
        ..Policy::default()
    });
    let rest = (kind, contents, making, policy);
    (cpus, pages, 1_u32..14, regions, rest).prop_map(
        |(
            (cpus, online, nodes),
            (page_bytes, unit_pages),
            chunks,
            (static_bytes, reserved_bytes),
            (kind, contents, making, policy),
        )| Shape {
            cpus,
            online,
            nodes,
            page_bytes,
            unit_pages,
            chunks,
            static_bytes,
            reserved_bytes,
            kind,
            contents,
            making,
            policy,
        },
    )
}

fn ops() -> impl Strategy<Value = Op> {
    let bytes = prop_oneof![
        6 => 1_usize..=64,
        4 => 65_usize..=2048,
        4 => 2049_usize..=9000,
        2 => 9001_usize..=32 << 10,
        1 => prop_oneof![Just(0), Just(32 << 10), Just((32 << 10) + 1), Just(usize::MAX)],
    ];
    let align = prop_oneof![
        8 => (0_u32..=6).prop_map(|shift| 1 << shift),
        4 => (7_u32..=12).prop_map(|shift| 1 << shift),
        1 => prop_oneof![Just(0), Just(24), Just(1 << 14), Just(1 << 16), Just(1 << 17)],
    ];
    let flags = prop_oneof![
        8 => Just(AllocFlags::empty()),
        4 => Just(AllocFlags::ATOMIC),
        2 => Just(AllocFlags::RESERVED),
        1 => Just(AllocFlags::RESERVED | AllocFlags::ATOMIC),
        2 => Just(AllocFlags::NO_ZERO),
        1 => Just(AllocFlags::TRY | AllocFlags::NO_WARN),
    ];
    let free_flags = prop_oneof![
        4 => Just(FreeFlags::empty()),
        2 => Just(FreeFlags::RESERVED),
        1 => Just(FreeFlags::ATOMIC | FreeFlags::TRY),
    ];
    let faults = prop_oneof![
        3 => Just(Faults::None),
        1 => Just(Faults::All),
        3 => (0_u64..6).prop_map(Faults::Call),
        1 => any::<u64>().prop_map(Faults::Pattern),
    ];
    let request = (bytes, align, flags)
        .prop_map(|(bytes, align, flags)| Request::new(bytes, align).with_flags(flags));
    let request = request.boxed();
    prop_oneof![
        24 => request.clone().prop_map(Op::Alloc),
        16 => any::<usize>().prop_map(Op::Free),
        2 => (any::<usize>(), -9_isize..20, free_flags.clone())
            .prop_map(|(index, by, flags)| Op::FreeNear(index, by, flags)),
        2 => (0_usize..1 << 20, free_flags)
            .prop_map(|(at, flags)| Op::FreeAnywhere(at, flags)),
        1 => Just(Op::FreeAgain),
        2 => Just(Op::Upkeep),
        1 => (0_u32..3).prop_map(Op::Trim),
        1 => (0_u32..9).prop_map(Op::BringUp),
        3 => faults.prop_map(Op::Faults),
        4 => (request, 0_usize..40).prop_map(|(request, count)| Op::AllocMany(request, count)),
        3 => (any::<usize>(), 0_usize..40, any::<usize>())
            .prop_map(|(index, count, again_behind)| Op::FreeMany { index, count, again_behind }),
    ]
}

/// What fails is kept in a file beside this one and tried first from then on.
fn config() -> ProptestConfig {
    let found = FileFailurePersistence::Direct("proptests/regions.regressions");
    ProptestConfig {
        cases: 2048,
        failure_persistence: Some(Box::new(found)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn regions_agree_with_the_model(shape in shapes(), ops in prop::collection::vec(ops(), 1..160)) {
        let mut run = Run::new(shape);
        for op in &ops {
            run.step(op);
        }
        run.end();
    }
}

/// A request, or the free of an area.
#[derive(Debug, Clone)]
enum AtomicOp {
    Alloc(usize),
    Free(prop::sample::Index),
}

proptest! {
    #![proptest_config(config())]

    /// Where chunks cannot be made in atomic context, and the upkeep runs whenever it is due, nothing is refused.
    #[test]
    fn atomic_requests_are_prepared_for(
        unit_pages in 8_usize..20,
        ops in prop::collection::vec(
            prop_oneof![
                2 => prop_oneof![1_usize..200, 200_usize..6000, 6000_usize..=32 << 10]
                    .prop_map(AtomicOp::Alloc),
                1 => any::<prop::sample::Index>().prop_map(AtomicOp::Free),
            ],
            1..120,
        ),
    ) {
        let machine = Machine::new(1).spec(FirstChunkSpec::default());
        let machine = machine.unit_bytes(unit_pages * 4096).sleeping_reserve().checked();
        let pcpu = machine.build().expect("nothing fails");
        let mut live = Vec::new();
        for op in ops {
            pcpu.upkeep_if_due();
            match op {
                AtomicOp::Alloc(bytes) => {
                    let request = Request::new(bytes, 4).with_flags(AllocFlags::ATOMIC);
                    live.push(pcpu.allocate(&request).expect("the upkeep has prepared for it"));
                }
                AtomicOp::Free(index) if !live.is_empty() => {
                    let address = live.swap_remove(index.index(live.len()));
                    pcpu.free_area(address, FreeFlags::ATOMIC).expect("it is live");
                }
                AtomicOp::Free(_) => {}
            }
        }
        audit(&pcpu);
    }
}
