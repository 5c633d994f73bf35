//! Operations of the allocator, against a model that recounts the instance after each: slow, so few of them. `operations.rs` does
//! many.

use pcpu::allocator::{Policy, UpkeepBy};
use pcpu::unit::FirstChunkKind;
use pcpu::{AllocFlags, FreeFlags, Request};

use crate::input::Input;
use crate::model::{Faults, Fresh, Making, Op, Run, Shape};

/// The most operations of an input.
const MAX_OPS: usize = 60;

/// Makes a machine and does what the bytes say, comparing the instance with the model after each operation.
pub fn audited(data: &[u8]) {
    let mut input = Input(data);
    let mut run = Run::new(shape(&mut input));
    for _ in 0..MAX_OPS {
        if input.is_empty() {
            break;
        }
        run.step(&op(&mut input));
    }
    run.end();
}

fn shape(input: &mut Input<'_>) -> Shape {
    let cpus = 1 + u32::from(input.byte() % 6);
    let spare_chunks = u32::from(input.byte() % 3);
    let low = u32::from(input.byte() % 3);
    Shape {
        cpus,
        online: u32::from(input.byte()) % (cpus + 1),
        nodes: 1 + u32::from(input.byte()) % cpus.min(3),
        page_bytes: 4096,
        unit_pages: 8 + input.below(4),
        chunks: 1 + u32::from(input.byte() % 10),
        static_bytes: input.below(3000),
        reserved_bytes: 4 * input.below(1000),
        kind: input.one_of(&[FirstChunkKind::Embed, FirstChunkKind::Page]),
        contents: input.one_of(&[Fresh::Zeroed, Fresh::Dirty]),
        making: input.one_of(&[Making::Anytime, Making::Sleeping]),
        policy: Policy {
            upkeep: input.one_of(&[UpkeepBy::Owner, UpkeepBy::Callers]),
            spare_chunks,
            spare_chunks_max: spare_chunks * 4,
            empty_pages_low: low,
            empty_pages_high: low + u32::from(input.byte() % 6),
            quiet_frees: 1 + u32::from(input.byte() % 20),
            ..Policy::default()
        },
    }
}

fn op(input: &mut Input<'_>) -> Op {
    match input.byte() {
        0..110 => Op::Alloc(request(input)),
        110..190 => Op::Free(input.below(1 << 16)),
        190..200 => {
            let by = isize::from(input.byte() as i8) / 8;
            Op::FreeNear(input.below(1 << 16), by, free_flags(input))
        }
        200..210 => Op::FreeAnywhere(input.number(3) as usize, free_flags(input)),
        210..215 => Op::FreeAgain,
        215..225 => Op::Upkeep,
        225..232 => Op::Trim(u32::from(input.byte() % 3)),
        232..240 => Op::BringUp(u32::from(input.byte() % 8)),
        240..251 => Op::Faults(match input.byte() {
            0..100 => Faults::None,
            100..130 => Faults::All,
            130..220 => Faults::Call(u64::from(input.byte() % 6)),
            _ => Faults::Pattern(input.number(8)),
        }),
        // What came later has the last numbers, so that inputs made before mean what they meant.
        251..254 => Op::AllocMany(request(input), input.below(40)),
        _ => Op::FreeMany {
            index: input.below(1 << 16),
            count: input.below(40),
            again_behind: input.byte().into(),
        },
    }
}

fn request(input: &mut Input<'_>) -> Request {
    let bytes = match input.byte() {
        0..4 => input.size(),
        4..90 => 1 + input.below(64),
        90..160 => 1 + input.below(2048),
        160..230 => 1 + input.below(9000),
        _ => 1 + input.below(32 << 10),
    };
    let align = match input.byte() {
        0..4 => input.size(),
        shift => 1 << (shift % 13),
    };
    let flags = match input.byte() {
        0..120 => AllocFlags::empty(),
        120..180 => AllocFlags::ATOMIC,
        180..200 => AllocFlags::RESERVED,
        200..210 => AllocFlags::RESERVED | AllocFlags::ATOMIC,
        210..235 => AllocFlags::NO_ZERO,
        _ => AllocFlags::TRY | AllocFlags::NO_WARN,
    };
    Request::new(bytes, align).with_flags(flags)
}

fn free_flags(input: &mut Input<'_>) -> FreeFlags {
    input.one_of(&[
        FreeFlags::empty(),
        FreeFlags::RESERVED,
        FreeFlags::ATOMIC | FreeFlags::TRY,
    ])
}
