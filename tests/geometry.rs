//! How far apart the units of a process lie whose variables are aligned to lines: where the copies of a variable are, and
//! which alignment is served and which refused.

#![cfg(target_os = "linux")]

use std::collections::HashSet;

use pcpu::backing::mmap::Geometry;
use pcpu::{
    AllocError, AllocFlags, CpuCell, FromZeros, Global, InitError, PerCpu, Request,
    alloc_percpu_bytes, define_per_cpu, free_percpu, global, per_cpu_ptr,
};

const PAGE_BYTES: usize = 4096;
const LINE_BYTES: usize = 64;
const MAX_ALIGN_BYTES: usize = 128;

/// Padded as against lines that are fetched in pairs: the most that a variable can want.
#[repr(align(128))]
#[derive(Debug, FromZeros)]
#[zerocopy(crate = "pcpu::zerocopy")]
struct Padded(u8);

/// More than that.
#[repr(align(256))]
#[derive(Debug, FromZeros)]
#[zerocopy(crate = "pcpu::zerocopy")]
struct Wide(u8);

define_per_cpu! {
    static COUNT: CpuCell<u64> = CpuCell::new(0);
    #[percpu(cache_aligned)]
    static ALIGNED: CpuCell<u64> = CpuCell::new(0);
}

#[test]
fn units_are_a_stride_apart() {
    let geometry = global().backing().geometry();
    assert_eq!(geometry, Geometry::lines(geometry.window_bytes()));
    assert_eq!(
        geometry.stride_bytes(),
        geometry.window_bytes() + PAGE_BYTES + 128
    );
    for cpu in global().units().possible().iter() {
        let offset = geometry.window_bytes() + cpu.index() * geometry.stride_bytes();
        assert_eq!(global().units().offset(cpu), Some(offset));
    }
}

/// The copies of a variable lie in different sets of a cache that looks at the place in the page, as small ones do.
#[test]
fn copies_lie_in_different_sets() {
    let lines_of_a_page = PAGE_BYTES / MAX_ALIGN_BYTES;
    let cpus: Vec<_> = global()
        .units()
        .possible()
        .iter()
        .take(lines_of_a_page)
        .collect();
    let set_of = |cpu| {
        let copy = per_cpu_ptr(COUNT, cpu).expect("possible");
        copy.as_ptr().addr() % PAGE_BYTES / LINE_BYTES
    };
    let sets: HashSet<_> = cpus.iter().map(|cpu| set_of(*cpu)).collect();
    assert_eq!(sets.len(), cpus.len());
}

#[test]
fn copies_are_aligned_as_asked_for() {
    assert_eq!(global().max_align_bytes(), MAX_ALIGN_BYTES);
    let mut align = 1;
    while align <= MAX_ALIGN_BYTES {
        let areas: Vec<_> = (0..7)
            .map(|_| alloc_percpu_bytes::<Global>(&Request::new(24, align)).expect("an alignment"))
            .collect();
        for area in areas {
            for cpu in global().units().possible().iter() {
                let copy = per_cpu_ptr(area, cpu).expect("possible");
                assert!(copy.as_ptr().addr().is_multiple_of(align), "{align}");
            }
            // SAFETY: nobody uses it.
            unsafe { free_percpu(area) }.expect("it is allocated");
        }
        align *= 2;
    }
    let padded = PerCpu::<Padded>::new().expect("an alignment of 128");
    for cpu in global().units().possible().iter() {
        assert!(per_cpu_ptr(&padded, cpu).expect("possible").is_aligned());
        assert!(per_cpu_ptr(ALIGNED, cpu).expect("possible").is_aligned());
    }
}

#[test]
fn what_is_aligned_further_is_refused() {
    let refused = |align| AllocError::AlignTooLarge {
        align,
        limit: MAX_ALIGN_BYTES,
    };
    let error = PerCpu::<Wide>::new().expect_err("too far aligned");
    assert_eq!(error, refused(256));
    assert_eq!(
        error.to_string(),
        "an alignment of 256, the limit is 128; a page where units lie whole pages apart, in a process by \
         pcpu::page_geometry!()"
    );
    let made = PerCpu::<Wide>::try_new_with(|_| Ok::<_, ()>(Wide(1)));
    assert!(matches!(made, Err(InitError::Alloc(error)) if error == refused(256)));
    // As for the variables of a module.
    for flags in [AllocFlags::RESERVED, AllocFlags::empty()] {
        let request = Request::new(PAGE_BYTES, PAGE_BYTES).with_flags(flags);
        let area = alloc_percpu_bytes::<Global>(&request);
        assert_eq!(area, Err(refused(PAGE_BYTES)));
    }
}
