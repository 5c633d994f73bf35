//! Writes before and behind areas.

use pcpu::hardened::FindingKind::{WrittenBefore, WrittenBehind};
use pcpu::unit::CpuId;
use pcpu::{FreeFlags, Request};

use crate::copies::{assert_stamped, assert_zero, stamp};
use crate::free::FreeArea;
use crate::machine::{hardened, write};
use crate::small::small_machine;

/// Sizes and alignments, the ends of granules and of pages among them.
const KINDS: [(usize, usize); 9] = [
    (1, 1),
    (3, 1),
    (4, 4),
    (13, 8),
    (24, 8),
    (64, 64),
    (100, 128),
    (4096, 4096),
    (9001, 4),
];

/// Each byte of the guards, on each CPU: `check_areas` finds it, names it, and mends it.
#[test]
fn every_byte_is_found_on_every_cpu() {
    for (bytes, align) in KINDS {
        let (pcpu, told) = hardened(&small_machine(3), 8);
        let address = pcpu.allocate(&Request::new(bytes, align)).unwrap();
        assert!(address.is_multiple_of(align));
        let end = bytes as isize;
        for at_bytes in (-16..0).chain(end..end + 16) {
            for (cpu, byte) in [(0, 0), (1, 0x42), (2, 0xff)] {
                assert_eq!(pcpu.check_areas(), 0);
                write(&pcpu, address, cpu, at_bytes, byte);
                assert_eq!(pcpu.check_areas(), 1, "{bytes} {at_bytes}");
                let kind = if at_bytes < 0 {
                    WrittenBefore
                } else {
                    WrittenBehind
                };
                assert_eq!(told.only(), (kind, address, bytes, cpu, at_bytes, byte));
            }
        }
        assert_eq!(pcpu.free_area(address, FreeFlags::empty()), Ok(()));
        assert_eq!(told.findings(), []);
    }
}

/// A free looks too, at both sides of every copy.
#[test]
fn a_free_finds_it() {
    let (pcpu, told) = hardened(&small_machine(2), 8);
    let request = Request::new(10, 2).with_owner(77);
    let address = pcpu.allocate(&request).unwrap();
    write(&pcpu, address, 0, -1, 5);
    write(&pcpu, address, 1, 10, 6);
    write(&pcpu, address, 1, 11, 7);
    assert_eq!(pcpu.free_area(address, FreeFlags::empty()), Ok(()));
    let found = told.findings();
    let found: Vec<_> = found.iter().map(ToString::to_string).collect();
    assert_eq!(
        found,
        [
            format!(
                "CPU 0's copy of the area of 10 bytes at {address:#x} (owner 0x4d): written before its start, 0x05 at byte -1"
            ),
            format!(
                "CPU 1's copy of the area of 10 bytes at {address:#x} (owner 0x4d): written behind its end, 0x06 at byte 10"
            ),
        ]
    );
}

/// The guards before areas that are aligned further are as long as the alignment.
#[test]
fn the_guard_before_an_aligned_area() {
    let (pcpu, told) = hardened(&small_machine(1), 8);
    let address = pcpu.allocate(&Request::new(8, 256)).unwrap();
    for at_bytes in [-256, -255, -1] {
        write(&pcpu, address, 0, at_bytes, 1);
        assert_eq!(pcpu.check_areas(), 1);
        assert_eq!(told.only().4, at_bytes);
    }
}

/// What lies within an area is its owner's.
#[test]
fn the_area_itself_is_nobodys_business() {
    for (bytes, align) in KINDS {
        let (pcpu, told) = hardened(&small_machine(2), 8);
        let address = pcpu.allocate(&Request::new(bytes, align)).unwrap();
        stamp(&pcpu, (address, bytes));
        assert_eq!(pcpu.check_areas(), 0);
        for cpu in [0, 1] {
            assert_stamped(&pcpu, (address, bytes), CpuId::new(cpu));
        }
        assert_eq!(pcpu.free_area(address, FreeFlags::empty()), Ok(()));
        assert_eq!(told.findings(), []);
    }
}

/// A CPU that comes after an area was made has no guards there, and needs none: what is written there is found.
#[test]
fn a_cpu_that_comes_late() {
    let (pcpu, told) = hardened(&small_machine(3).online(1).dirty_memory(), 8);
    let areas = [1, 30, 5000].map(|bytes| pcpu.allocate(&Request::new(bytes, 8)).unwrap());
    pcpu.bring_up(CpuId::new(2)).unwrap();
    assert_eq!(pcpu.check_areas(), 0);
    assert_zero(&pcpu, (areas[1], 30), CpuId::new(2));
    write(&pcpu, areas[1], 2, 30, 9);
    assert_eq!(pcpu.check_areas(), 1);
    assert_eq!(told.only(), (WrittenBehind, areas[1], 30, 2, 30, 9));
    write(&pcpu, areas[2], 2, -3, 9);
    assert_eq!(pcpu.free_area(areas[2], FreeFlags::empty()), Ok(()));
    assert_eq!(told.only(), (WrittenBefore, areas[2], 5000, 2, -3, 9));
    assert_eq!(pcpu.free_area(areas[0], FreeFlags::empty()), Ok(()));
    assert_eq!(told.findings(), []);
}
