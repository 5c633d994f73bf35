//! Each operation, of plain instances, of those with caches and of hardened ones, with the allocator of frames failing at its first
//! call, its second, and so on until the operation succeeds: areas, counters, frames and page tables are as before.

use std::sync::atomic::Ordering;

use pcpu::cache::LockedSeat;
use pcpu::stats::Stats;
use pcpu::unit::CpuId;
use pcpu::{AllocError, AllocFlags, CpuError, FreeFlags, Request};

use crate::copies::{assert_stamped, assert_zero, stamp};
use crate::machine::{Front, Machine, Shape};

const ATOMIC: AllocFlags = AllocFlags::ATOMIC;
const SMALL: Request = Request::new(64, 8);
const LONG: Request = Request::new(9000, 8);
const LARGEST: Request = Request::new(31 << 10, 8);
/// What fills the first chunk, so that more takes a new one.
const FIRST: Op = Op::AllocateMany(Request::new(400, 8), 24);

#[derive(Debug, Clone, Copy)]
enum Op {
    AllocateMany(Request, usize),
    /// Live areas in the order in which they were allocated, from one number on, so many.
    Free(usize, usize),
    Drain,
    Upkeep,
    Trim,
    BringUp(u32),
}
use Op::{AllocateMany, BringUp, Drain, Free, Trim, Upkeep};

struct Row {
    before: &'static [Op],
    op: Op,
    /// Whether it is refused where all frames lack.
    is_refused: Refused,
    unit_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    Yes,
    No,
}
use Refused::{No, Yes};

const fn row(before: &'static [Op], op: Op, is_refused: Refused) -> Row {
    Row {
        before,
        op,
        is_refused,
        unit_bytes: 32 << 10,
    }
}

const ROWS: &[Row] = &[
    row(&[], AllocateMany(SMALL, 1), No),
    row(&[FIRST], AllocateMany(LONG, 1), Yes),
    // A level-1 table for each chunk.
    Row {
        unit_bytes: 2 << 20,
        ..row(&[AllocateMany(LARGEST, 64)], AllocateMany(LARGEST, 2), Yes)
    },
    row(&[FIRST], AllocateMany(LONG.with_flags(ATOMIC), 1), Yes),
    row(&[FIRST], AllocateMany(LONG, 9), Yes),
    row(&[FIRST, AllocateMany(LONG, 1)], AllocateMany(LONG, 7), Yes),
    row(&[FIRST], AllocateMany(SMALL, 900), Yes),
    row(&[FIRST], AllocateMany(SMALL.with_flags(ATOMIC), 900), Yes),
    row(&[FIRST], Upkeep, No),
    row(&[FIRST, AllocateMany(LONG, 6)], Free(3, 27), No),
    row(&[FIRST, AllocateMany(LONG, 6), Free(3, 27)], Trim, No),
    row(&[AllocateMany(SMALL, 300), Free(1, 298)], Drain, No),
    row(&[], BringUp(1), Yes),
    row(&[FIRST, AllocateMany(LONG, 6)], BringUp(3), Yes),
    row(&[FIRST, AllocateMany(LONG, 6), BringUp(1)], BringUp(2), Yes),
];

struct Owner<'m, 'p, 'h> {
    machine: &'m Machine<'p, 'h>,
    live: Vec<(usize, usize)>,
}

impl Owner<'_, '_, '_> {
    fn seat(&self) -> LockedSeat {
        // SAFETY: all seats of these instances are such.
        unsafe { LockedSeat::new(self.machine.pcpu.units(), CpuId::new(0)) }
    }

    /// Whether it succeeded.
    fn run(&mut self, op: Op) -> bool {
        let pcpu = self.machine.pcpu;
        match op {
            AllocateMany(request, count) => {
                let is_atomic = request.flags().contains(ATOMIC);
                let may_flush = &self.machine.host.may_flush;
                may_flush.store(!is_atomic, Ordering::Relaxed);
                let mut areas = vec![0; count];
                let result = match areas[..] {
                    [ref mut one] => pcpu
                        .allocate_at(&self.seat(), &request)
                        .map(|area| *one = area),
                    ref mut areas => pcpu.allocate_many_at(&self.seat(), &request, areas),
                };
                may_flush.store(true, Ordering::Relaxed);
                match result {
                    Ok(()) => {}
                    Err(AllocError::Backing(_)) => return false,
                    Err(error) => panic!("{error}"),
                }
                for &area in &areas {
                    for cpu in pcpu.units().possible().iter() {
                        assert_zero(pcpu, (area, request.bytes()), cpu);
                    }
                }
                for area in areas {
                    stamp(pcpu, (area, request.bytes()));
                    self.live.push((area, request.bytes()));
                }
            }
            Free(first, count) => {
                for (area, _) in self.live.drain(first..first + count).collect::<Vec<_>>() {
                    // SAFETY: the owner's, which looks at it no more.
                    unsafe { pcpu.free_at(&self.seat(), area, FreeFlags::empty()) }.unwrap();
                }
            }
            Drain => pcpu.drain(&self.seat()),
            Upkeep => drop(pcpu.upkeep()),
            Trim => drop(pcpu.trim(0)),
            BringUp(cpu) => {
                let cpu = CpuId::new(cpu);
                match pcpu.bring_up(cpu) {
                    Ok(()) => {}
                    Err(CpuError::NoMemory { .. }) => return false,
                    Err(error) => panic!("{error}"),
                }
                for &area in &self.live {
                    assert_zero(pcpu, area, cpu);
                    stamp(pcpu, area);
                }
            }
        }
        true
    }

    /// Gives back what idles.
    fn settle(&self) {
        self.machine.pcpu.drain(&self.seat());
        self.machine.pcpu.trim(0);
        // SAFETY: nobody frees meanwhile.
        unsafe { self.machine.pcpu.trim_metadata() };
    }

    fn check(&self) {
        let pcpu = self.machine.pcpu;
        self.machine.audit();
        let stats = pcpu.stats();
        assert_eq!(stats.live, self.live.len() as u64);
        assert_eq!((stats.late_errors, pcpu.check_areas()), (0, 0));
        for &area in &self.live {
            for cpu in pcpu.units().possible().iter() {
                match pcpu.units().materialised().contains(cpu) {
                    true => assert_stamped(pcpu, area, cpu),
                    false => assert_zero(pcpu, area, cpu),
                }
            }
        }
    }
}

/// Has a row's operation fail at the first allocation of a frame, then at the second, and so on, until it succeeds: at that one
/// alone, or at all from there on. How often it was refused.
fn until_it_succeeds(front: Front, row: &Row, count: u64) -> u64 {
    let shape = Shape {
        online: 1,
        unit_bytes: row.unit_bytes,
        front,
        ..Shape::default()
    };
    let mut refused = 0;
    shape.run(|machine| {
        let live = Vec::new();
        let machine = &machine;
        let mut owner = Owner { machine, live };
        assert!(row.before.iter().all(|&op| owner.run(op)));
        if !matches!(row.op, Trim | Drain) {
            owner.settle();
        }
        while !is_done(&mut owner, row.op, (refused, count)) {
            refused += 1;
        }
        owner.run(Free(0, owner.live.len()));
        owner.settle();
        owner.check();
        let stats = machine.pcpu.stats();
        assert_eq!((stats.live, stats.chunks), (0, 1));
    });
    refused
}

/// Whether an operation succeeds although allocations of frames fail: so many, from one on.
fn is_done(owner: &mut Owner<'_, '_, '_>, op: Op, (first, count): (u64, u64)) -> bool {
    let machine = owner.machine;
    let (host, pcpu) = (machine.host, machine.pcpu);
    let (before, frames, tables) = (pcpu.stats(), host.out(), machine.tables_of_cpus());
    host.set_faults(move |call| call >= first && call - first < count);
    let is_done = owner.run(op);
    host.set_faults(|_| false);
    owner.check();
    if is_done {
        return true;
    }
    owner.settle();
    let after = pcpu.stats();
    let counts = |stats: &Stats| {
        (
            (stats.allocs, stats.frees, stats.live_bytes),
            (stats.sizes, stats.live_sizes),
            (stats.chunks, stats.populated_pages),
        )
    };
    assert_eq!(counts(&before), counts(&after), "{op:?}");
    assert_eq!(machine.tables_of_cpus(), tables, "{op:?}");
    // Metadata that an atomic request could not give back waits for the next; a ledger has grown, maybe.
    let is_atomic = matches!(op, AllocateMany(request, _) if request.flags().contains(ATOMIC));
    if !is_atomic && !pcpu.is_hardened() {
        assert_eq!(host.out(), frames, "{op:?}");
    }
    false
}

#[test]
fn each_operation() {
    let mut all_refused = 0;
    for front in [Front::Nothing, Front::Caches, Front::Hardened] {
        for row in ROWS {
            let alone = until_it_succeeds(front, row, 1);
            let behind = until_it_succeeds(front, row, u64::MAX);
            assert!(alone <= behind, "{:?}, {front:?}", row.op);
            let is_refused = if behind > 0 { Yes } else { No };
            assert_eq!(is_refused, row.is_refused, "{:?}, {front:?}", row.op);
            all_refused += alone + behind;
        }
    }
    println!("{all_refused} refused");
    assert!(all_refused > 300, "{all_refused}");
}
