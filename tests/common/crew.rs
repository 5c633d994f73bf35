//! What threads of a process do that allocate and free each other's areas, from CPU to CPU: the steps of a storm. Every copy
//! of every area is zero when it comes, is stamped, and is found as it was stamped when it goes.

use pcpu::unit::CpuId;
use pcpu::{
    AllocError, AllocFlags, FreeError, FreeFlags, Global, PerCpuPtr, Request, alloc_percpu_bytes,
    free_percpu_with, global,
};

use crate::copies::{assert_stamped, assert_zero, stamp};

/// A handle, its size, and the flags to free it with.
pub type Parcel = (PerCpuPtr<u8>, usize, FreeFlags);

/// Has the caller's thread run on a CPU, and no other.
pub fn move_to(cpu: CpuId) {
    // SAFETY: a set of CPUs is plain memory; the thread is the caller's own.
    let moved = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu.get() as usize, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    assert_eq!(moved, 0, "{}", std::io::Error::last_os_error());
}

/// Allocates an area of any size, in any way that a process has; all CPUs have been brought up. `None` if the lock is not to be
/// had for one that must not wait.
pub fn allocate(numbers: &mut fastrand::Rng) -> Option<Parcel> {
    let bytes = match numbers.u32(..10) {
        0 => numbers.usize(1..20_000),
        1..4 => numbers.usize(1..2000),
        _ => 8 << numbers.u32(..5),
    };
    let align = 1 << numbers.u32(..7);
    let (flags, free_flags) = match numbers.u32(..6) {
        0 => (AllocFlags::TRY, FreeFlags::TRY),
        1 => (AllocFlags::ATOMIC, FreeFlags::ATOMIC),
        _ => (AllocFlags::empty(), FreeFlags::empty()),
    };
    let request = Request::new(bytes, align).with_flags(flags);
    match alloc_percpu_bytes::<Global>(&request) {
        Ok(handle) => {
            let area = (handle.neutral(), bytes);
            for cpu in global().units().possible().iter() {
                assert_zero(global(), area, cpu);
            }
            stamp(global(), area);
            Some((handle, bytes, free_flags))
        }
        Err(AllocError::Busy) => {
            assert!(flags.contains(AllocFlags::TRY));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Frees an area, from wherever the caller is.
pub fn free((handle, bytes, flags): Parcel) {
    for cpu in global().units().possible().iter() {
        assert_stamped(global(), (handle.neutral(), bytes), cpu);
    }
    // SAFETY: the parcel is the only handle, and nobody uses the area.
    while let Err(error) = unsafe { free_percpu_with(handle, flags) } {
        assert_eq!(error, FreeError::Busy);
        assert!(flags.contains(FreeFlags::TRY));
    }
}
