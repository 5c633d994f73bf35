//! Operations of several CPUs on a plain instance, one with caches, or a hardened one, against the model of the property tests
//! that looks at little, and so can do much.

use pcpu::allocator::{Policy, UpkeepBy};
use pcpu::backing::sim::Machine;
use pcpu::{AllocFlags, Request};

use crate::input::Input;
use crate::roomy::roomy_machine;
use crate::seats::{Front, Op, Run, Way};
use crate::small::small_machine;

/// The most operations of an input.
const MAX_OPS: usize = 100;

/// Makes a machine and does what the bytes say.
pub fn operations(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte() % 4;
    let front = match kind {
        0 => Front::Nothing,
        1 | 2 => Front::Caches,
        _ => Front::Hardened(4 * (1 + input.below(8)), 1 + u32::from(input.byte() % 24)),
    };
    let mut run = Run::new(&machine(kind == 2, &mut input), front);
    for _ in 0..MAX_OPS {
        if input.is_empty() {
            break;
        }
        run.step(&op(&mut input));
    }
    run.end();
}

fn machine(has_rows: bool, input: &mut Input<'_>) -> Machine {
    let cpus = 1 + u32::from(input.byte() % 4);
    let spare_chunks = u32::from(input.byte() % 2);
    let policy = Policy {
        upkeep: input.one_of(&[UpkeepBy::Owner, UpkeepBy::Callers]),
        spare_chunks,
        spare_chunks_max: spare_chunks * 4,
        empty_pages_high: u32::from(input.byte() % 6),
        quiet_frees: 1 + u32::from(input.byte() % 20),
        names_in_rows: has_rows,
        ..Policy::default()
    };
    // Caches have their tables on every CPU: one is there from the start.
    let machine = if has_rows {
        roomy_machine
    } else {
        small_machine
    };
    let machine = machine(cpus)
        .online(1 + u32::from(input.byte()) % cpus)
        .chunks(1 + u32::from(input.byte() % 6))
        .policy(policy);
    match input.byte() % 3 {
        0 => machine,
        1 => machine.dirty_memory(),
        _ => machine.sleeping_reserve(),
    }
}

fn op(input: &mut Input<'_>) -> Op {
    let what = input.byte();
    let cpu = u32::from(input.byte() % 4);
    match what {
        0..100 => Op::Allocate(cpu, request(input), 1 + input.below(12)),
        100..180 => Op::Free(cpu, input.below(1 << 16), 1 + input.below(12)),
        180..190 => Op::FreePlain(input.below(1 << 16)),
        190..205 => Op::FreeAgain(cpu, input.below(1 << 16)),
        205..212 => Op::FreeNear(cpu, input.below(1 << 16), input.below(300)),
        212..218 => Op::Drain(cpu),
        218..222 => Op::Upkeep,
        222..226 => Op::Trim,
        226..232 => Op::BringUp(cpu),
        232..235 => Op::Look,
        235..241 => Op::Faults(match input.byte() {
            0..100 => 0,
            _ => input.number(8),
        }),
        241..249 => {
            let by = isize::from(input.byte() as i8);
            Op::WriteGuard(cpu, input.below(1 << 16), by, input.byte())
        }
        249..251 => Op::FreeAndWrite(
            cpu,
            input.below(1 << 16),
            input.below(1 << 16),
            input.byte(),
        ),
        // What came later has the last numbers, so that inputs made before mean what they meant.
        251..253 => Op::AllocateMany(way(cpu, input), request(input), input.below(50)),
        253..=254 => Op::FreeMany(way(cpu, input), input.below(1 << 16), input.below(50)),
        _ => Op::FreeManyAgain(
            way(cpu, input),
            input.below(1 << 16),
            input.below(20),
            input.byte().into(),
        ),
    }
}

fn request(input: &mut Input<'_>) -> Request {
    let bytes = match input.byte() {
        0..150 => 1 + input.below(64),
        150..230 => 1 + input.below(600),
        _ => 1 + input.below(9000),
    };
    let align = 1 << (input.byte() % 16).min(12);
    let flags = match input.byte() {
        0..160 => AllocFlags::empty(),
        160..190 => AllocFlags::ATOMIC,
        190..220 => AllocFlags::NO_ZERO,
        _ => AllocFlags::TRY,
    };
    Request::new(bytes, align).with_flags(flags)
}

fn way(cpu: u32, input: &mut Input<'_>) -> Way {
    match input.byte() % 4 {
        0 => Way::Plain,
        _ => Way::At(cpu),
    }
}
