//! Writes to areas that were freed, and how long they are noticed.

use pcpu::hardened::FindingKind::WrittenAfterFree;
use pcpu::hardened::POISON;
use pcpu::unit::CpuId;
use pcpu::{AllocFlags, FreeFlags, Request};

use crate::copies::{assert_zero, stamp};
use crate::free::FreeArea;
use crate::machine::{hardened, write};
use crate::small::small_machine;

fn byte(pcpu: &pcpu::backing::sim::SimAllocator, address: usize, cpu: u32, at: usize) -> u8 {
    let copy = pcpu.per_cpu_address(address, CpuId::new(cpu)).unwrap();
    // SAFETY: the instance has the memory of areas in quarantine, and nobody writes to it now.
    unsafe { std::ptr::with_exposed_provenance::<u8>(copy + at).read_volatile() }
}

/// Every copy is filled, at once.
#[test]
fn every_copy_is_poisoned() {
    let (pcpu, _) = hardened(&small_machine(3), 8);
    let address = pcpu.allocate(&Request::new(27, 4)).unwrap();
    stamp(&pcpu, (address, 27));
    assert_eq!(pcpu.free_area(address, FreeFlags::empty()), Ok(()));
    for cpu in 0..3 {
        assert!((0..27).all(|at| byte(&pcpu, address, cpu, at) == POISON));
    }
}

/// Each byte of each copy, and of the guards: a check finds it, and mends it.
#[test]
fn a_check_finds_every_byte() {
    let (pcpu, told) = hardened(&small_machine(2), 8);
    let address = pcpu.allocate(&Request::new(27, 4)).unwrap();
    assert_eq!(pcpu.free_area(address, FreeFlags::empty()), Ok(()));
    for at_bytes in -16..27 + 16 {
        for (cpu, byte) in [(0, 0), (1, 0x42)] {
            assert_eq!(pcpu.check_areas(), 0);
            write(&pcpu, address, cpu, at_bytes, byte);
            assert_eq!(pcpu.check_areas(), 1);
            assert_eq!(
                told.only(),
                (WrittenAfterFree, address, 27, cpu, at_bytes, byte)
            );
        }
    }
}

/// Without a check it is found when as many have been freed as quarantine holds; the area is handed out again after that, not
/// before.
#[test]
fn it_is_found_when_the_area_leaves_quarantine() {
    const QUARANTINE: u32 = 5;
    let (pcpu, told) = hardened(&small_machine(2), QUARANTINE);
    let request = Request::new(64, 8);
    let first = pcpu.allocate(&request).unwrap();
    assert_eq!(pcpu.free_area(first, FreeFlags::empty()), Ok(()));
    write(&pcpu, first, 1, 63, 1);
    for _ in 0..QUARANTINE {
        assert_eq!(told.findings(), []);
        let next = pcpu.allocate(&request).unwrap();
        assert_ne!(next, first);
        assert_eq!(pcpu.free_area(next, FreeFlags::empty()), Ok(()));
    }
    assert_eq!(told.only(), (WrittenAfterFree, first, 64, 1, 63, 1));
    assert_eq!(pcpu.allocate(&request), Ok(first));
    assert_zero(&pcpu, (first, 64), CpuId::new(1));
}

/// A trim looks at all of quarantine, and gives it back.
#[test]
fn a_trim_ends_quarantine() {
    let (pcpu, told) = hardened(&small_machine(1), 100);
    let before = pcpu.populated_pages();
    let areas: Vec<_> = (0..20)
        .map(|_| pcpu.allocate(&Request::new(5000, 8)).unwrap())
        .collect();
    for &address in &areas {
        assert_eq!(pcpu.free_area(address, FreeFlags::empty()), Ok(()));
    }
    assert!(pcpu.populated_pages() > before);
    write(&pcpu, areas[7], 0, 4000, 1);
    pcpu.trim(0);
    assert_eq!(told.only(), (WrittenAfterFree, areas[7], 5000, 0, 4000, 1));
    assert_eq!(pcpu.populated_pages(), before);
    assert_eq!(pcpu.stats().live, 0);
}

/// Areas in quarantine are handed out before a request is refused, whatever it is for.
#[test]
fn quarantine_gives_way_to_requests() {
    for flags in [AllocFlags::empty(), AllocFlags::ATOMIC] {
        let (pcpu, told) = hardened(&small_machine(1).chunks(2), 1000);
        let request = Request::new(3000, 8).with_flags(flags);
        let mut areas = Vec::new();
        while let Ok(address) = pcpu.allocate(&request) {
            areas.push(address);
        }
        assert!(areas.len() > 5);
        for _ in 0..3 {
            let count = areas.len();
            for address in areas.drain(..) {
                assert_eq!(pcpu.free_area(address, FreeFlags::empty()), Ok(()));
            }
            let again = (0..count).map(|_| pcpu.allocate(&request).unwrap());
            areas.extend(again);
        }
        assert_eq!(told.findings(), []);
    }
}

/// A CPU that comes while an area is in quarantine finds zeroes, and may not write either.
#[test]
fn a_cpu_that_comes_late() {
    let (pcpu, told) = hardened(&small_machine(3).online(1).dirty_memory(), 8);
    let address = pcpu.allocate(&Request::new(300, 8)).unwrap();
    pcpu.bring_up(CpuId::new(1)).unwrap();
    assert_eq!(pcpu.free_area(address, FreeFlags::empty()), Ok(()));
    pcpu.bring_up(CpuId::new(2)).unwrap();
    assert_eq!(
        (byte(&pcpu, address, 1, 9), byte(&pcpu, address, 2, 9)),
        (POISON, 0)
    );
    assert_eq!(pcpu.check_areas(), 0);
    for (cpu, byte) in [(1, 0), (2, 3)] {
        write(&pcpu, address, cpu, 200, byte);
        assert_eq!(pcpu.check_areas(), 1);
        assert_eq!(
            told.only(),
            (WrittenAfterFree, address, 300, cpu, 200, byte)
        );
    }
}

/// What happens in the last moment is found at the end.
#[test]
fn the_end_of_an_instance_looks_once_more() {
    let (pcpu, told) = hardened(&small_machine(1), 8);
    let areas = [8, 16].map(|bytes| pcpu.allocate(&Request::new(bytes, 8)).unwrap());
    assert_eq!(pcpu.free_area(areas[0], FreeFlags::empty()), Ok(()));
    write(&pcpu, areas[0], 0, 0, 1);
    write(&pcpu, areas[1], 0, 17, 1);
    drop(pcpu);
    assert_eq!(told.findings().len(), 2);
}
