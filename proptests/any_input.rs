//! Anything at all as a request, an address, a CPU or a policy: an answer, never a panic, and an instance that is whole
//! afterwards.
//!
//! Overflow checks and debug assertions are on where the tests are built without optimisation, and the release run of the
//! same tests shows what the code does without them.

#[path = "../tests/common/audit.rs"]
mod audit;
#[path = "../tests/common/free.rs"]
mod free;

use std::collections::BTreeMap;

use free::FreeArea;
use pcpu::allocator::{Policy, UpkeepBy};
use pcpu::backing::sim::{Machine, MachineError};
use pcpu::unit::{CpuId, FirstChunkKind, FirstChunkSpec};
use pcpu::{AllocFlags, FreeFlags, PerCpuPtr, Request, SetupError};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use audit::audit;

/// Values near every power of two and near 0 and the highest, and any others.
fn any_size() -> impl Strategy<Value = usize> {
    prop_oneof![
        (0_u32..usize::BITS, -2_isize..3)
            .prop_map(|(shift, by)| (1_usize << shift).wrapping_add_signed(by)),
        (-40_isize..40).prop_map(|by| 0_usize.wrapping_add_signed(by)),
        any::<usize>(),
        1_usize..100_000,
    ]
}

fn any_count() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), Just(1), Just(u32::MAX), any::<u32>(), 0_u32..20]
}

#[derive(Debug, Clone)]
enum Op {
    Allocate(usize, usize, u32),
    /// Counted from the base of the window if it is near.
    Free(Address, u32),
    Ask(Address, u32),
    BringUp(u32),
    Trim(u32),
    Upkeep,
    AllocateMany(usize, usize, u32, usize),
    FreeMany(Vec<Address>, u32),
}

#[derive(Debug, Clone, Copy)]
enum Address {
    Any(usize),
    InWindow(usize),
    Live(prop::sample::Index),
}

fn addresses() -> impl Strategy<Value = Address> {
    prop_oneof![
        any_size().prop_map(Address::Any),
        any_size().prop_map(Address::InWindow),
        (0_usize..2 << 20).prop_map(Address::InWindow),
        any::<prop::sample::Index>().prop_map(Address::Live),
    ]
}

fn any_flags() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), 0_u32..32, any::<u32>()]
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (any_size(), any_size(), any_flags()).prop_map(|(a, b, c)| Op::Allocate(a, b, c)),
        4 => (1_usize..40_000, (0_u32..13).prop_map(|shift| 1 << shift), 0_u32..32)
            .prop_map(|(a, b, c)| Op::Allocate(a, b, c)),
        6 => (addresses(), any_flags()).prop_map(|(a, b)| Op::Free(a, b)),
        4 => (addresses(), any_count()).prop_map(|(a, b)| Op::Ask(a, b)),
        1 => any_count().prop_map(Op::BringUp),
        1 => any_count().prop_map(Op::Trim),
        1 => Just(Op::Upkeep),
        3 => (any_size(), any_size(), any_flags(), 0_usize..9)
            .prop_map(|(a, b, c, d)| Op::AllocateMany(a, b, c, d)),
        3 => (1_usize..10_000, (0_u32..13).prop_map(|shift| 1 << shift), 0_u32..32, 0_usize..40)
            .prop_map(|(a, b, c, d)| Op::AllocateMany(a, b, c, d)),
        3 => (prop::collection::vec(addresses(), 0..5), any_flags())
            .prop_map(|(a, b)| Op::FreeMany(a, b)),
    ]
}

fn freed_by(flags: AllocFlags) -> FreeFlags {
    match flags.contains(AllocFlags::RESERVED) {
        true => FreeFlags::RESERVED,
        false => FreeFlags::empty(),
    }
}

/// Machines whose first units have several pages of tail, none, and padding between the regions.
fn machines() -> impl Strategy<Value = Machine> {
    let small = FirstChunkSpec {
        static_bytes: 1001,
        reserved_bytes: 2048,
        ..FirstChunkSpec::default()
    };
    let kind = prop_oneof![Just(FirstChunkKind::Embed), Just(FirstChunkKind::Page)];
    let machine = prop_oneof![
        Just(Machine::new(3).nodes(2).chunks(7)),
        Just(Machine::new(1).spec(small).unit_bytes(48 << 10).chunks(4)),
    ];
    (machine, kind, 0_u32..2)
        .prop_map(|(machine, kind, online)| machine.first_chunk(kind).online(online).checked())
}

/// What fails is kept in a file beside this one and tried first from then on.
fn config() -> ProptestConfig {
    let found = FileFailurePersistence::Direct("proptests/any_input.regressions");
    ProptestConfig {
        cases: 400,
        failure_persistence: Some(Box::new(found)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_call_is_answered(
        machine in machines(),
        ops in prop::collection::vec(ops(), 1..80),
    ) {
        let pcpu = machine.build().unwrap();
        let mut live = BTreeMap::new();
        for op in ops {
            let at = |address, live: &BTreeMap<usize, FreeFlags>| match address {
                Address::Any(address) => address,
                Address::InWindow(offset) => pcpu.neutral_base().wrapping_add(offset),
                Address::Live(_) if live.is_empty() => 0,
                Address::Live(index) => *live.keys().nth(index.index(live.len())).unwrap(),
            };
            match op {
                Op::Allocate(bytes, align, flags) => {
                    let flags = AllocFlags::from_bits_retain(flags);
                    let request = Request::new(bytes, align).with_flags(flags);
                    match pcpu.allocate(&request) {
                        Ok(address) => {
                            prop_assert!(bytes > 0 && address.is_multiple_of(align));
                            prop_assert!(live.insert(address, freed_by(flags)).is_none());
                        }
                        Err(error) => prop_assert!(!error.to_string().contains('\n')),
                    }
                }
                Op::Free(address, flags) => {
                    let address = at(address, &live);
                    let flags = FreeFlags::from_bits_retain(flags);
                    match pcpu.free_area(address, flags) {
                        Ok(()) => prop_assert!(live.remove(&address).is_some()),
                        Err(error) => prop_assert!(!error.to_string().contains('\n')),
                    }
                }
                Op::Ask(address, cpu) => {
                    let address = at(address, &live);
                    let cpu = CpuId::new(cpu);
                    prop_assert_eq!(pcpu.area_bytes(address).is_some(), live.contains_key(&address));
                    prop_assert_eq!(
                        pcpu.per_cpu_address(address, cpu).is_ok(),
                        pcpu.units().possible().contains(cpu)
                    );
                    if let Some(info) = pcpu.address_info(address) {
                        let text = format!("{info:?}");
                        prop_assert!(!text.is_empty());
                    }
                    let handle = PerCpuPtr::<u64>::from_neutral(address);
                    prop_assert_eq!(handle.is_some(), address != 0);
                    let _ = handle.and_then(|handle| handle.byte_add(address));
                }
                Op::BringUp(cpu) => drop(pcpu.bring_up(CpuId::new(cpu))),
                Op::Trim(spares) => drop(pcpu.trim(spares)),
                Op::Upkeep => drop(pcpu.upkeep()),
                Op::AllocateMany(bytes, align, flags, count) => {
                    let flags = AllocFlags::from_bits_retain(flags);
                    let request = Request::new(bytes, align).with_flags(flags);
                    let mut batch = vec![0; count];
                    match pcpu.allocate_many(&request, &mut batch) {
                        Ok(()) => for address in batch {
                            prop_assert!(bytes > 0 && address.is_multiple_of(align));
                            prop_assert!(live.insert(address, freed_by(flags)).is_none());
                        },
                        Err(error) => prop_assert!(count > 0 && !error.to_string().contains('\n')),
                    }
                }
                Op::FreeMany(addresses, flags) => {
                    let batch: Vec<_> =
                        addresses.into_iter().map(|address| at(address, &live)).collect();
                    let flags = FreeFlags::from_bits_retain(flags);
                    // SAFETY: the areas are not used; anything else is refused.
                    let freed = match unsafe { pcpu.free_many(&batch, flags) } {
                        Ok(()) => batch.len(),
                        Err(error) => {
                            prop_assert!(!error.to_string().contains('\n'));
                            error.freed
                        }
                    };
                    for address in &batch[..freed] {
                        prop_assert!(live.remove(address).is_some());
                    }
                }
            }
        }
        let areas: Vec<_> = audit(&pcpu).areas.into_keys().collect();
        prop_assert!(areas.iter().eq(live.keys()));
        for (address, flags) in live {
            prop_assert_eq!(pcpu.free_area(address, flags), Ok(()));
        }
    }

    #[test]
    fn any_policy_is_answered(
        max_alloc_bytes in any_size(),
        max_align_bytes in any_size(),
        spare_chunks in any_count(),
        spare_chunks_max in any_count(),
        empty_pages_low in any_count(),
        empty_pages_high in any_count(),
        quiet_frees in any_count(),
        by_callers in any::<bool>(),
        names_in_rows in any::<bool>(),
        requests in prop::collection::vec((any_size(), 0_u32..14), 1..20),
    ) {
        let policy = Policy {
            max_alloc_bytes,
            max_align_bytes,
            spare_chunks,
            spare_chunks_max,
            empty_pages_low,
            empty_pages_high,
            quiet_frees,
            upkeep: match by_callers {
                true => UpkeepBy::Callers,
                false => UpkeepBy::Owner,
            },
            names_in_rows,
        };
        let machine = Machine::new(2).chunks(5).checked().policy(policy);
        let pcpu = match machine.build() {
            Ok(pcpu) => pcpu,
            Err(MachineError::Setup(error)) => {
                let is_limit = matches!(
                    error,
                    SetupError::MaxAlloc { .. } | SetupError::MaxAlign { .. }
                );
                prop_assert!(is_limit);
                return Ok(());
            }
            Err(other) => panic!("{other:?}"),
        };
        prop_assert!(pcpu.max_align_bytes().is_power_of_two());
        for (bytes, shift) in requests {
            if let Ok(address) = pcpu.allocate(&Request::new(bytes, 1 << shift)) {
                prop_assert!(bytes <= max_alloc_bytes && 1 << shift <= max_align_bytes);
                if bytes % 2 == 0 {
                    prop_assert_eq!(pcpu.free_area(address, FreeFlags::empty()), Ok(()));
                }
            }
            pcpu.upkeep_if_due();
        }
        pcpu.upkeep();
        audit(&pcpu);
    }
}
