//! The copies of an area as its owner sees them.
//!
//! An owner stamps every copy with a pattern that no other area and no other CPU has, and finds it again later, unless
//! somebody else wrote there.

use std::slice;

use lock_api::RawMutex;
use pcpu::PerCpuAllocator;
use pcpu::backing::Backing;
use pcpu::unit::CpuId;

fn copy<B: Backing, R: RawMutex>(pcpu: &PerCpuAllocator<B, R>, area: usize, cpu: CpuId) -> *mut u8 {
    let address = pcpu
        .per_cpu_address(area, cpu)
        .expect("the CPU is possible");
    std::ptr::with_exposed_provenance_mut(address)
}

fn pattern(area: usize, cpu: CpuId) -> u64 {
    let seed = (area as u64) << 13 | u64::from(cpu.get()) << 1 | 1;
    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 56 | 1
}

/// Whether bytes are the pattern, over and over.
fn is_pattern(bytes: &[u8], pattern: [u8; 8]) -> bool {
    let mut words = bytes.chunks_exact(8);
    words.all(|word| word == pattern) && pattern.starts_with(words.remainder())
}

/// Panics unless `cpu`'s copy of the live area is zero.
pub fn assert_zero<B: Backing, R: RawMutex>(
    pcpu: &PerCpuAllocator<B, R>,
    (area, bytes): (usize, usize),
    cpu: CpuId,
) {
    // SAFETY: the area is live and the caller's own, so that nobody writes to it now.
    let copy = unsafe { slice::from_raw_parts(copy(pcpu, area, cpu), bytes) };
    if !is_pattern(copy, [0; 8]) {
        let at = copy.iter().position(|&byte| byte != 0).unwrap_or_default();
        panic!(
            "CPU {cpu}'s copy of {area:#x}, {bytes} bytes, holds {:#x} at {at}",
            copy[at]
        );
    }
}

/// Stamps the copies of the live area on all materialised CPUs.
pub fn stamp<B: Backing, R: RawMutex>(pcpu: &PerCpuAllocator<B, R>, area: (usize, usize)) {
    for cpu in pcpu.units().materialised().iter() {
        stamp_one(pcpu, area, cpu);
    }
}

/// Stamps the copy of the live area on a materialised CPU.
pub fn stamp_one<B: Backing, R: RawMutex>(
    pcpu: &PerCpuAllocator<B, R>,
    (area, bytes): (usize, usize),
    cpu: CpuId,
) {
    let pattern = pattern(area, cpu).to_le_bytes();
    let first = copy(pcpu, area, cpu);
    for at in (0..bytes).step_by(8) {
        // SAFETY: the area is live and the caller's own, and the CPU is materialised.
        unsafe {
            first
                .add(at)
                .copy_from_nonoverlapping(pattern.as_ptr(), 8.min(bytes - at));
        }
    }
}

/// Panics unless `cpu`'s copy is as it was stamped.
pub fn assert_stamped<B: Backing, R: RawMutex>(
    pcpu: &PerCpuAllocator<B, R>,
    (area, bytes): (usize, usize),
    cpu: CpuId,
) {
    // SAFETY: the area is live and the caller's own, so that nobody writes to it now.
    let copy = unsafe { slice::from_raw_parts(copy(pcpu, area, cpu), bytes) };
    assert!(
        is_pattern(copy, pattern(area, cpu).to_le_bytes()),
        "somebody wrote to CPU {cpu}'s copy of {area:#x}, {bytes} bytes"
    );
}
