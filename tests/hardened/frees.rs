//! Wrong frees, those that race among them.

use std::sync::Barrier;
use std::thread;

use pcpu::cache::LockedSeat;
use pcpu::unit::CpuId;
use pcpu::{AllocError, AllocFlags, FreeError, FreeFlags, Request};

use crate::free::FreeArea;
use crate::machine::hardened;
use crate::small::small_machine;

const PLAIN: FreeFlags = FreeFlags::empty();

/// Of frees of one area at the same moment exactly one succeeds, whichever way they come.
#[test]
fn one_of_racing_frees_succeeds() {
    const THREADS: u32 = 3;
    const ROUNDS: usize = 2000;
    let (pcpu, told) = &hardened(&small_machine(THREADS), 16);
    let barrier = &Barrier::new(THREADS as usize);
    let request = Request::new(32, 8);
    for _ in 0..ROUNDS / 100 {
        let areas: Vec<_> = (0..100).map(|_| pcpu.allocate(&request).unwrap()).collect();
        let areas = &areas;
        let free_all = |cpu: u32| {
            // SAFETY: nothing else works on caches of the instance, which has none.
            let seat = unsafe { LockedSeat::new(pcpu.units(), CpuId::new(cpu)) };
            let results = areas.iter().map(|&address| {
                barrier.wait();
                // SAFETY: nobody uses the areas.
                unsafe { pcpu.free_at(&seat, address, PLAIN) }
            });
            results.collect::<Vec<_>>()
        };
        let results: Vec<Vec<_>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|cpu| scope.spawn(move || free_all(cpu)))
                .collect();
            threads.into_iter().map(|it| it.join().unwrap()).collect()
        });
        for (nth, &address) in areas.iter().enumerate() {
            let wrong = Err(FreeError::NotAllocated { address });
            let right = results.iter().filter(|of| of[nth] == Ok(())).count();
            let refused = results.iter().filter(|of| of[nth] == wrong).count();
            assert_eq!((right, refused), (1, 2));
        }
    }
    assert_eq!(told.findings(), []);
    pcpu.trim(0);
    assert_eq!(pcpu.stats().live, 0);
}

/// Before an area, in its guards, inside it, behind it, twice, and when its granules are free again.
#[test]
fn wrong_frees_are_told_apart() {
    let (pcpu, told) = hardened(&small_machine(1), 4);
    let start = pcpu.allocate(&Request::new(40, 8)).unwrap();
    for (address, expected) in [
        (
            start - 16,
            FreeError::NotAllocated {
                address: start - 16,
            },
        ),
        (start - 4, FreeError::NotAllocated { address: start - 4 }),
        (
            start + 4,
            FreeError::Interior {
                address: start + 4,
                start,
            },
        ),
        (
            start + 36,
            FreeError::Interior {
                address: start + 36,
                start,
            },
        ),
        (
            start + 40,
            FreeError::NotAllocated {
                address: start + 40,
            },
        ),
        (start + 1, FreeError::Misaligned { address: start + 1 }),
        (8, FreeError::Foreign { address: 8 }),
    ] {
        assert_eq!(pcpu.free_area(address, PLAIN), Err(expected));
    }
    let as_reserved = FreeError::NotReserved { address: start };
    assert_eq!(pcpu.free_area(start, FreeFlags::RESERVED), Err(as_reserved));
    assert_eq!(pcpu.free_area(start, PLAIN), Ok(()));
    let twice = Err(FreeError::NotAllocated { address: start });
    assert_eq!(pcpu.free_area(start, PLAIN), twice);
    pcpu.trim(0);
    assert_eq!(pcpu.free_area(start, PLAIN), twice);
    assert_eq!(told.findings(), []);
}

/// Areas of the reserved region are as in any instance.
#[test]
fn reserved_areas_are_as_ever() {
    let (pcpu, told) = hardened(&small_machine(2), 4);
    let bytes = pcpu.sizes().regions().reserved.len();
    let request = Request::new(bytes, 4).with_flags(AllocFlags::RESERVED);
    let address = pcpu.allocate(&request).expect("it fits without guards");
    assert_eq!(pcpu.area_bytes(address), Some(bytes));
    let refused = Err(FreeError::Reserved { address });
    assert_eq!(pcpu.free_area(address, PLAIN), refused);
    assert_eq!(pcpu.free_area(address, FreeFlags::RESERVED), Ok(()));
    let twice = Err(FreeError::NotAllocated { address });
    assert_eq!(pcpu.free_area(address, FreeFlags::RESERVED), twice);
    assert_eq!(pcpu.allocate(&request), Ok(address));
    assert_eq!(told.findings(), []);
}

/// What must not wait does not, and changes nothing.
#[test]
fn a_busy_ledger_refuses_tries() {
    let (pcpu, _) = hardened(&small_machine(1), 4);
    let request = Request::new(8, 8);
    let address = pcpu.allocate(&request).unwrap();
    let mut seen = Vec::new();
    pcpu.visit_live_areas(|area| {
        seen.push((area.address, area.bytes));
        let tried = pcpu.allocate(&request.with_flags(AllocFlags::TRY));
        assert_eq!(tried, Err(AllocError::Busy));
        assert_eq!(
            pcpu.free_area(address, FreeFlags::TRY),
            Err(FreeError::Busy)
        );
    });
    assert_eq!(seen, [(address, 8)]);
    assert_eq!(pcpu.free_area(address, FreeFlags::TRY), Ok(()));
    assert!(pcpu.allocate(&request.with_flags(AllocFlags::TRY)).is_ok());
}

/// Quarantine that is full makes room for tries too.
#[test]
fn tries_go_through_quarantine() {
    let (pcpu, told) = hardened(&small_machine(1), 2);
    for _ in 0..10 {
        let request = Request::new(100, 8).with_flags(AllocFlags::TRY);
        let address = pcpu.allocate(&request).unwrap();
        assert_eq!(pcpu.free_area(address, FreeFlags::TRY), Ok(()));
    }
    let mut areas = 0;
    pcpu.visit_chunks(|chunk| areas += chunk.areas);
    assert_eq!(areas, 2, "in quarantine");
    assert_eq!(told.findings(), []);
}
