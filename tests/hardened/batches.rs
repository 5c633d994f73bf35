//! Batches: those that are refused leave neither a count, nor an area in quarantine, nor a word to the event hook.

use std::collections::BTreeMap;
use std::sync::Mutex;

use pcpu::backing::BackingError;
use pcpu::hardened::Hardening;
use pcpu::stats::{Event, EventHook, Stats};
use pcpu::{AllocError, AllocFlags, FreeFlags, Request};

use crate::free::FreeArea;
use crate::machine::{Told, hardened};
use crate::small::small_machine;

const PLAIN: FreeFlags = FreeFlags::empty();

/// What of the counters a batch that is refused leaves as it was.
fn lasting(stats: &Stats) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        (stats.allocs, stats.frees, stats.live, stats.live_bytes),
        (stats.sizes, stats.live_sizes, stats.late_errors),
    )
}

#[test]
fn a_refused_batch_is_not_counted() {
    let (pcpu, told) = hardened(&small_machine(2).chunks(3), 7);
    let areas = || {
        let mut areas = 0;
        pcpu.visit_chunks(|chunk| areas += chunk.areas);
        areas
    };
    let kept = [10, 200].map(|bytes| pcpu.allocate(&Request::new(bytes, 8)).unwrap());
    let before = (lasting(&pcpu.stats()), areas());
    let plain = Request::new(1000, 8);
    let refused = pcpu.allocate_many(&plain, &mut [0; 200]);
    let out = AllocError::Backing(BackingError::OutOfAddressSpace);
    assert_eq!(refused, Err(out));
    assert_eq!((lasting(&pcpu.stats()), areas()), before);
    let reserved = Request::new(100, 4).with_flags(AllocFlags::RESERVED);
    let refused = pcpu.allocate_many(&reserved, &mut [0; 200]);
    assert!(matches!(refused, Err(AllocError::ReservedExhausted { .. })));
    assert_eq!((lasting(&pcpu.stats()), areas()), before);
    assert_eq!(pcpu.stats().failures, 2);
    for area in kept {
        assert_eq!(pcpu.free_area(area, PLAIN), Ok(()));
    }
    assert_eq!((pcpu.check_areas(), told.findings().len()), (0, 0));
}

#[derive(Default)]
struct Seen(Mutex<(BTreeMap<usize, usize>, u32)>);

impl EventHook for Seen {
    fn event(&self, event: &Event) {
        let mut seen = self.0.lock().unwrap();
        match *event {
            Event::Alloc { address, bytes, .. } => assert_eq!(seen.0.insert(address, bytes), None),
            Event::Free { address, .. } => assert!(seen.0.remove(&address).is_some()),
            Event::Failure { .. } => seen.1 += 1,
            _ => {}
        }
    }
}

#[test]
fn the_hook_is_told_of_each_area_or_of_one_failure() {
    let seen: &'static Seen = Box::leak(Box::default());
    let mut pcpu = small_machine(1).chunks(3).build().unwrap();
    pcpu.set_event_hook(Some(seen));
    pcpu.harden(Hardening::new(Told::new())).unwrap();
    let request = Request::new(1000, 8);
    let mut areas = [0; 5];
    pcpu.allocate_many(&request, &mut areas).unwrap();
    let trying = request.with_flags(AllocFlags::TRY);
    let mut one = [0];
    let tried = pcpu.allocate_many(&trying, &mut one);
    let reserved = Request::new(100, 4).with_flags(AllocFlags::RESERVED);
    let mut two = [0; 2];
    pcpu.allocate_many(&reserved, &mut two).unwrap();
    let expected: BTreeMap<_, _> = areas
        .iter()
        .chain(tried.is_ok().then_some(&one[0]))
        .map(|&area| (area, 1000))
        .chain(two.map(|area| (area, 100)))
        .collect();
    let failures = u32::from(tried.is_err());
    assert_eq!(*seen.0.lock().unwrap(), (expected.clone(), failures));
    assert!(pcpu.allocate_many(&request, &mut [0; 200]).is_err());
    assert_eq!(*seen.0.lock().unwrap(), (expected, failures + 1));
    pcpu.set_event_hook(None);
}
