//! A machine whose caches keep the names of what is stashed in rows.

use pcpu::allocator::Policy;
use pcpu::backing::sim::Machine;
use pcpu::unit::FirstChunkSpec;

use crate::small::{UNIT_BYTES, small_machine};

/// The small machine with units that are larger for it.
pub fn roomy_machine(cpus: u32) -> Machine {
    let spec = FirstChunkSpec {
        dyn_bytes: 96 << 10,
        ..FirstChunkSpec::default()
    };
    let policy = Policy {
        names_in_rows: true,
        ..Policy::default()
    };
    let machine = small_machine(cpus).unit_bytes(4 * UNIT_BYTES);
    machine.spec(spec).policy(policy)
}
