//! The table: operations, what precedes them, and the calls of the backing that can fail in each.

use pcpu::allocator::{Policy, UpkeepBy};
use pcpu::backing::sim::{Call, Machine};
use pcpu::{AllocFlags, Request};

use crate::small::UNIT_BYTES;

use Kind::{BeginCpu, Metadata, Populate, Reserve};
use Op::{Allocate, BringUp, Free, Trim, Upkeep};

pub const PAGE_BYTES: usize = 4096;

/// What fills the first chunk's dynamic region but for less than a page.
pub const FIRST: Request = Request::new(13_000, 4);
pub const PAGE: Request = Request::new(PAGE_BYTES, PAGE_BYTES);
pub const WHOLE: Request = Request::new(UNIT_BYTES, PAGE_BYTES);
pub const ATOMIC: AllocFlags = AllocFlags::ATOMIC;

/// Calls that can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Metadata,
    Reserve,
    Populate,
    BeginCpu,
}

/// What an owner of an instance does.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    Allocate(Request),
    /// Frees the live area of this number.
    Free(usize),
    Upkeep,
    Trim(u32),
    BringUp(u32),
}

/// An operation with what is to be known of it.
pub struct Row {
    pub name: &'static str,
    pub machine: fn(Machine) -> Machine,
    /// What is done before the faults begin.
    pub before: &'static [Op],
    pub op: Op,
    /// The calls of a run that succeeds, those that can fail.
    pub calls: &'static [Kind],
}

pub const fn row(
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

pub fn plain(machine: Machine) -> Machine {
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

pub const ROWS: &[Row] = &[
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

/// The calls that can fail.
pub fn kinds(calls: &[Call]) -> Vec<Kind> {
    let kind = |call: &Call| match call {
        Call::AllocateMetadata { .. } => Some(Metadata),
        Call::Reserve { .. } => Some(Reserve),
        Call::Populate { .. } => Some(Populate),
        Call::BeginCpu { .. } => Some(BeginCpu),
        _ => None,
    };
    calls.iter().filter_map(kind).collect()
}
