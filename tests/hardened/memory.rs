//! What the ledger takes, and what is told at the end.

use std::collections::BTreeMap;
use std::sync::Mutex;

use pcpu::backing::BackingError;
use pcpu::backing::sim::Machine;
use pcpu::stats::{Event, EventHook, SIZE_CLASSES};
use pcpu::{AllocError, AllocFlags, FreeFlags, Request};

use crate::free::FreeArea;
use crate::machine::{Told, hardened};
use crate::small::small_machine;

const PLAIN: FreeFlags = FreeFlags::empty();

/// The ledger grows with the areas and knows each of them, whatever was freed in between.
#[test]
fn thousands_of_areas() {
    let (pcpu, told) = hardened(&Machine::new(2), 50);
    let mut live = BTreeMap::new();
    let mut number = 1_u64;
    for nth in 0..12_000_usize {
        number = number
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let bytes = 1 + (number >> 40) as usize % 40;
        let request = Request::new(bytes, 4).with_owner(nth);
        live.insert(pcpu.allocate(&request).unwrap(), (bytes, nth));
        if number >> 60 < 6 {
            let at = (number >> 30) as usize % live.len();
            let address = *live.keys().nth(at).unwrap();
            live.remove(&address);
            assert_eq!(pcpu.free_area(address, PLAIN), Ok(()));
        }
    }
    assert!(live.len() > 5000);
    let mut seen = BTreeMap::new();
    pcpu.visit_live_areas(|area| {
        seen.insert(area.address, (area.bytes, area.owner));
    });
    assert_eq!(seen, live);
    for (&address, &(bytes, _)) in &live {
        assert_eq!(pcpu.area_bytes(address), Some(bytes.next_multiple_of(4)));
        assert_eq!(pcpu.free_area(address, PLAIN), Ok(()));
        assert_eq!(pcpu.area_bytes(address), None);
    }
    assert_eq!(pcpu.stats().metadata_bytes, pcpu.backing().metadata_bytes());
    pcpu.trim(0);
    assert_eq!((pcpu.stats().live, told.findings().len()), (0, 0));
}

/// Where the ledger cannot grow, areas are refused, and served again when others are freed.
#[test]
fn no_memory_for_the_ledger() {
    for flags in [AllocFlags::empty(), AllocFlags::ATOMIC, AllocFlags::TRY] {
        let (pcpu, _) = hardened(&Machine::new(1), 1);
        pcpu.backing().set_faults(|_| true);
        let request = Request::new(4, 4).with_flags(flags);
        let mut areas = Vec::new();
        let error = loop {
            match pcpu.allocate(&request) {
                Ok(address) => areas.push(address),
                Err(error) => break error,
            }
        };
        let expected = match flags {
            AllocFlags::TRY => AllocError::Busy,
            _ => AllocError::Backing(BackingError::OutOfMetadata),
        };
        assert_eq!((error, areas.len()), (expected, 224));
        assert_eq!(pcpu.free_area(areas[0], PLAIN), Ok(()));
        assert_eq!(pcpu.free_area(areas[1], PLAIN), Ok(()));
        assert!(pcpu.allocate(&request).is_ok());
        pcpu.backing().set_faults(|_| false);
        assert!(pcpu.allocate(&Request::new(4, 4)).is_ok());
    }
}

/// Who may sleep makes room in time for those who must not.
#[test]
fn room_ahead_of_tries() {
    let (pcpu, _) = hardened(&Machine::new(1), 1);
    for _ in 0..130 {
        pcpu.allocate(&Request::new(4, 4)).unwrap();
    }
    let request = Request::new(4, 4).with_flags(AllocFlags::TRY);
    let tries = (0..1000).take_while(|_| pcpu.allocate(&request).is_ok());
    assert_eq!(130 + tries.count(), 512 * 7 / 8);
}

/// To the counters an area is freed when its owner has freed it; its room is its until it leaves quarantine.
#[test]
fn what_is_in_quarantine_counts_as_freed() {
    let (pcpu, _) = hardened(&small_machine(2), 3);
    let allocate = |bytes| pcpu.allocate(&Request::new(bytes, 4)).unwrap();
    let kept = allocate(40);
    let before = pcpu.stats();
    assert_eq!((before.live, before.frees), (1, 0));
    // More than quarantine holds.
    for freed in 1..=5 {
        assert_eq!(pcpu.free_area(allocate(100 * freed), PLAIN), Ok(()));
        let now = pcpu.stats();
        assert_eq!((now.live, now.frees), (1, freed as u64));
        assert_eq!(now.live_bytes, before.live_bytes);
        assert_eq!(now.live_sizes, before.live_sizes);
    }
    let mut areas = 0;
    pcpu.visit_chunks(|chunk| areas += chunk.areas);
    assert_eq!(areas, 4, "three in quarantine");
    pcpu.trim(0);
    let emptied = pcpu.stats();
    assert_eq!((emptied.live, emptied.frees), (1, 5));
    assert_eq!(emptied.live_bytes, before.live_bytes);
    assert_eq!(pcpu.free_area(kept, PLAIN), Ok(()));
    assert_eq!((pcpu.stats().live, pcpu.stats().live_bytes), (0, 0));
    assert_eq!(pcpu.stats().live_sizes, [0; SIZE_CLASSES]);
}

/// Sizes as asked for, and how many there are of each; areas in quarantine are no leaks, nor are those of the reserved region.
#[test]
fn leaks_are_told_by_their_sizes() {
    let (pcpu, told) = hardened(&small_machine(1), 10);
    for bytes in [24, 7, 24, 4096, 24, 7] {
        pcpu.allocate(&Request::new(bytes, 4)).unwrap();
    }
    let freed = pcpu.allocate(&Request::new(99, 4)).unwrap();
    assert_eq!(pcpu.free_area(freed, PLAIN), Ok(()));
    let reserved = Request::new(8, 8).with_flags(AllocFlags::RESERVED);
    pcpu.allocate(&reserved).unwrap();
    drop(pcpu);
    let expected =
        "never freed: 6 areas, 4182 bytes\n  of 7 bytes: 2\n  of 24 bytes: 3\n  of 4096 bytes: 1\n";
    assert_eq!(told.leaks(), [expected]);
}

/// Nothing is told where nothing was leaked.
#[test]
fn no_leaks() {
    let (pcpu, told) = hardened(&small_machine(1), 10);
    let address = pcpu.allocate(&Request::new(8, 8)).unwrap();
    assert_eq!(pcpu.free_area(address, PLAIN), Ok(()));
    drop(pcpu);
    assert_eq!(told.leaks(), [""; 0]);
}

/// The event hook is told what the caller knows: no guards, and each area once.
#[test]
fn events_are_those_of_the_caller() {
    #[derive(Default)]
    struct Seen(Mutex<Vec<(char, usize, usize)>>);
    impl EventHook for Seen {
        fn event(&self, event: &Event) {
            let seen = match *event {
                Event::Alloc { address, bytes, .. } => ('a', address, bytes),
                Event::Free { address, bytes, .. } => ('f', address, bytes),
                Event::Failure { bytes, .. } => ('x', 0, bytes),
                _ => return,
            };
            self.0.lock().unwrap().push(seen);
        }
    }
    let seen: &'static Seen = Box::leak(Box::default());
    let mut pcpu = small_machine(1).build().unwrap();
    pcpu.set_event_hook(Some(seen));
    pcpu.harden(pcpu::hardened::Hardening::new(Told::new()))
        .unwrap();
    let address = pcpu.allocate(&Request::new(10, 4)).unwrap();
    assert_eq!(pcpu.free_area(address, PLAIN), Ok(()));
    assert!(pcpu.allocate(&Request::new(40_000, 4)).is_err());
    pcpu.trim(0);
    pcpu.set_event_hook(None);
    // Without a hook, it is hardened still.
    let next = pcpu.allocate(&Request::new(10, 4)).unwrap();
    assert_eq!(pcpu.free_area(next, PLAIN), Ok(()));
    assert_eq!((pcpu.stats().allocs, pcpu.stats().live), (2, 0));
    let seen = seen.0.lock().unwrap().clone();
    assert_eq!(
        seen,
        [('a', address, 10), ('f', address, 12), ('x', 0, 40_000)]
    );
}
