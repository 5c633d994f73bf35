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

fn pattern_bytes(area: usize, cpu: CpuId, bytes: usize) -> Vec<u8> {
    let mut whole = pattern(area, cpu).to_le_bytes().repeat(bytes.div_ceil(8));
    whole.truncate(bytes);
    whole
}

/// Panics unless `cpu`'s copy of the live area is zero.
pub fn assert_zero<B: Backing, R: RawMutex>(
    pcpu: &PerCpuAllocator<B, R>,
    (area, bytes): (usize, usize),
    cpu: CpuId,
) {
    // SAFETY: the area is live and the caller's own, so that nobody writes to it now.
    let copy = unsafe { slice::from_raw_parts(copy(pcpu, area, cpu), bytes) };
    // Comparing with zeroes is one call; looking at each byte is not.
    let dirty = (copy != vec![0; bytes]).then(|| copy.iter().position(|&byte| byte != 0));
    if let Some(at) = dirty {
        panic!(
            "CPU {cpu}'s copy of {area:#x}, {bytes} bytes, holds {:#x} at {at:?}",
            copy[at.unwrap_or(0)]
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
    let whole = pattern_bytes(area, cpu, bytes);
    // SAFETY: the area is live and the caller's own, and the CPU is materialised.
    unsafe { copy(pcpu, area, cpu).copy_from_nonoverlapping(whole.as_ptr(), bytes) };
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
        copy == pattern_bytes(area, cpu, bytes),
        "somebody wrote to CPU {cpu}'s copy of {area:#x}, {bytes} bytes"
    );
}
