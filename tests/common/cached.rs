//! A simulated machine with per-CPU caches, and the seats of its CPUs.

use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::cache::LockedSeat;
use pcpu::unit::CpuId;

/// The machine with caches.
pub fn with_caches(machine: &Machine) -> SimAllocator {
    let mut pcpu = machine.build().unwrap();
    pcpu.enable_caches().unwrap();
    pcpu
}

/// The seat of `cpu`.
pub fn seat(pcpu: &SimAllocator, cpu: u32) -> LockedSeat {
    // SAFETY: all seats of the tests do LockedSeat's steps.
    unsafe { LockedSeat::new(pcpu.units(), CpuId::new(cpu)) }
}
