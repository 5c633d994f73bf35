//! A small machine: its chunks are eight pages long and come and go quickly.

use pcpu::backing::sim::Machine;
use pcpu::unit::FirstChunkSpec;

/// Length of a unit, in bytes: the largest request fills a chunk.
pub const UNIT_BYTES: usize = 32 << 10;

/// A checked machine with units of eight pages. The static variables end in the middle of a granule.
pub fn small_machine(cpus: u32) -> Machine {
    let spec = FirstChunkSpec {
        static_bytes: 1001,
        reserved_bytes: 2048,
        ..FirstChunkSpec::default()
    };
    Machine::new(cpus)
        .spec(spec)
        .unit_bytes(UNIT_BYTES)
        .chunks(16)
        .checked()
}
