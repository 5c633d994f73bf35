//! Parts of per-CPU variables: fields and elements are those of the structure on every CPU, and neighbours are left alone.

use std::sync::OnceLock;

use pcpu::backing::sim::{Machine, Sim, SimAllocator};
use pcpu::this_cpu::portable::Portable;
use pcpu::unit::CpuId;
use pcpu::{
    CpuCell, Domain, Field, FromZeros, Handle, LocalCell, Parts, PerCpu, RemoteCell, StaticVar,
    define_per_cpu, field,
};

/// Derived without a dependency on the crate that the trait comes from.
#[derive(FromZeros)]
#[zerocopy(crate = "pcpu::zerocopy")]
struct Stats {
    open: CpuCell<i8>,
    hits: CpuCell<u64>,
    small: CpuCell<u16>,
    times: Times,
    by_size: [CpuCell<u32>; 4],
    grid: [[CpuCell<u8>; 3]; 2],
    name: u32,
}

#[derive(FromZeros)]
#[zerocopy(crate = "pcpu::zerocopy")]
struct Times(CpuCell<u32>, CpuCell<i64>);

impl Stats {
    const HITS: Field<Stats, CpuCell<u64>> = field!(Stats, hits);
    const SPENT: Field<Stats, CpuCell<i64>> = field!(Stats, times.1);
}

enum Four {}

// SAFETY: the instance is made once, and is no other domain's.
unsafe impl Domain for Four {
    type Backing = Sim;
    type Lock = parking_lot::RawMutex;
    type Ops = Portable<Self>;

    fn allocator() -> &'static SimAllocator {
        static INSTANCE: OnceLock<SimAllocator> = OnceLock::new();
        INSTANCE.get_or_init(|| Machine::new(4).checked().build().unwrap())
    }

    fn current_cpu() -> CpuId {
        CpuId::new(2)
    }
}

/// What a copy holds.
#[derive(Debug, Default, PartialEq, Clone, Copy)]
struct Values {
    open: i8,
    hits: u64,
    small: u16,
    times: (u32, i64),
    by_size: [u32; 4],
    grid: [[u8; 3]; 2],
    name: u32,
}

impl Values {
    /// Read by the structure's own names.
    fn of(stats: &Stats) -> Self {
        let row = |row: &[CpuCell<u8>; 3]| row.each_ref().map(CpuCell::read_remote);
        Self {
            open: stats.open.read_remote(),
            hits: stats.hits.read_remote(),
            small: stats.small.read_remote(),
            times: (stats.times.0.read_remote(), stats.times.1.read_remote()),
            by_size: stats.by_size.each_ref().map(CpuCell::read_remote),
            grid: stats.grid.each_ref().map(row),
            name: stats.name,
        }
    }
}

/// Changes every field by a part, each to another value.
fn change(stats: &(impl Parts + Handle<Target = Stats>)) {
    stats.field(field!(Stats, open)).dec();
    stats.field(Stats::HITS).add(u64::MAX);
    stats.field(field!(Stats, small)).write(0x0202);
    stats
        .field(field!(Stats, times))
        .field(field!(Times, 0))
        .or(3);
    stats.field(Stats::SPENT).sub(4);
    for index in 0..4 {
        stats
            .field(field!(Stats, by_size))
            .element(index)
            .add(index as u32 + 5);
    }
    let grid = stats.field(field!(Stats, grid));
    let last = grid.element(1).element(2);
    assert_eq!(last.add_return(9), 9);
    assert_eq!((last.sum(), grid.element(0).element(2).sum()), (9, 0));
}

const CHANGED: Values = Values {
    open: -1,
    hits: u64::MAX,
    small: 0x0202,
    times: (3, -4),
    by_size: [5, 6, 7, 8],
    grid: [[0; 3], [0, 0, 9]],
    name: 0,
};

#[test]
fn fields_of_an_owner() {
    let stats = PerCpu::<Stats, Four>::new().unwrap();
    change(&stats);
    for cpu in (0..4).map(CpuId::new) {
        let expected = match cpu == Four::current_cpu() {
            true => CHANGED,
            false => Values::default(),
        };
        assert_eq!(Values::of(stats.get(cpu).unwrap()), expected, "{cpu:?}");
        assert_eq!(stats.field(Stats::HITS).read_on(cpu), Ok(expected.hits));
    }
    assert_eq!(stats.field(Stats::SPENT).sum(), -4);
}

define_per_cpu! {
    static STATS: Stats = Stats {
        open: CpuCell::new(0),
        hits: CpuCell::new(0),
        small: CpuCell::new(0),
        times: Times(CpuCell::new(0), CpuCell::new(0)),
        by_size: [const { CpuCell::new(0) }; 4],
        grid: [const { [const { CpuCell::new(0) }; 3] }; 2],
        name: 77,
    };
    static ROW: [CpuCell<u32>; 3] = [const { CpuCell::new(1) }; 3];
}

/// A part of a static variable stays as long as the process.
#[test]
fn fields_of_a_static() {
    let hits: pcpu::Part<'static, _, _> = STATS.field(Stats::HITS);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(move || (0..1000).for_each(|_| hits.inc()));
        }
    });
    assert_eq!(hits.sum(), 4000);
    let cpus = pcpu::global().units().possible();
    let sum: u64 = cpus
        .iter()
        .map(|cpu| STATS.get(cpu).unwrap().hits.read_remote())
        .sum();
    assert_eq!(sum, 4000);
    assert!(cpus.iter().all(|cpu| STATS.get(cpu).unwrap().name == 77));
    ROW.element(2).add(5);
    assert_eq!(ROW.element(2).sum(), cpus.count() + 5);
    assert_eq!(ROW.element(1).sum(), cpus.count());
}

#[test]
fn fields_of_an_element() {
    let rows = PerCpu::<[Stats], Four>::new_slice(3).unwrap();
    rows.at(1).field(Stats::HITS).add(6);
    let hits = |index| rows.at(index).field(Stats::HITS).sum();
    assert_eq!([0, 1, 2].map(hits), [0, 6, 0]);
}

#[test]
#[should_panic(expected = "element 4 of a per-CPU slice of 4")]
fn an_element_that_is_not_there() {
    STATS.field(field!(Stats, by_size)).element(4);
}

#[test]
#[should_panic(expected = "element 3 of a per-CPU slice of 3")]
fn an_element_of_a_variable_that_is_not_there() {
    ROW.element(3);
}

#[test]
fn places_are_those_of_the_structure() {
    assert_eq!(
        Stats::HITS.offset_bytes(),
        std::mem::offset_of!(Stats, hits)
    );
    assert_eq!(
        Stats::SPENT.offset_bytes(),
        std::mem::offset_of!(Stats, times.1)
    );
}
