//! A machine whose caches have room in the first chunk for names of what is stashed.

use pcpu::backing::sim::Machine;
use pcpu::unit::FirstChunkSpec;

use crate::small::{UNIT_BYTES, small_machine};

/// The small machine with units that are larger for it.
pub fn roomy_machine(cpus: u32) -> Machine {
    let spec = FirstChunkSpec {
        dyn_bytes: 96 << 10,
        ..FirstChunkSpec::default()
    };
    small_machine(cpus).spec(spec).unit_bytes(4 * UNIT_BYTES)
}
