//! Batches as tests ask for them, look at them and free them.

use std::collections::BTreeMap;

use pcpu::backing::BackingError;
use pcpu::backing::sim::SimAllocator;
use pcpu::cache::Seat;
use pcpu::stats::{MapItem, Stats};
use pcpu::{AllocError, FreeFlags, FreeManyError};

use crate::audit::{Picture, Section, audit};
use crate::copies::{assert_zero, stamp};

pub const PLAIN: FreeFlags = FreeFlags::empty();

pub const OUT_OF_PLACES: AllocError = AllocError::Backing(BackingError::OutOfAddressSpace);

pub fn free_many(pcpu: &SimAllocator, areas: &[usize]) -> Result<(), FreeManyError> {
    // SAFETY: no test frees another's areas, nor looks at the copies of an area that it has freed.
    unsafe { pcpu.free_many(areas, PLAIN) }
}

pub fn free_many_at(pcpu: &SimAllocator, seat: &impl Seat, areas: &[usize]) {
    // SAFETY: as above.
    unsafe { pcpu.free_many_at(seat, areas, PLAIN) }.unwrap();
}

/// Panics unless areas are there for their caller: aligned, apart, zero on every CPU. Then they are stamped.
pub fn take_over(pcpu: &SimAllocator, areas: &[usize], (bytes, align): (usize, usize)) {
    let mut sorted = areas.to_vec();
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        assert!(
            pair[0] + bytes <= pair[1],
            "{:#x} and {:#x}",
            pair[0],
            pair[1]
        );
    }
    for &address in areas {
        assert!(address.is_multiple_of(align.max(4)));
        assert_eq!(pcpu.area_bytes(address), Some(bytes.next_multiple_of(4)));
        for cpu in pcpu.units().possible().iter() {
            assert_zero(pcpu, (address, bytes), cpu);
        }
    }
    areas.iter().for_each(|&area| stamp(pcpu, (area, bytes)));
}

/// What of the counters a batch that fails leaves as it was: all but failures, what memory it got, and the most there ever was.
pub fn lasting(stats: &Stats) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        (stats.allocs, stats.frees, stats.live, stats.live_bytes),
        (stats.sizes, stats.live_sizes, stats.late_errors),
    )
}

/// Panics unless nothing is left of a batch. Pages that it had populated are idle.
pub fn assert_undone(before: &Picture, after: &Picture) {
    assert_eq!(before.areas, after.areas);
    assert_eq!(lasting(&before.stats), lasting(&after.stats));
    assert_eq!(before.stats.failures + 1, after.stats.failures);
    for new in &after.sections {
        let is_same =
            |old: &&Section| (old.place, old.region.start) == (new.place, new.region.start);
        match before.sections.iter().find(is_same) {
            Some(old) => assert_eq!(old.free, new.free),
            None => assert!(new.areas.is_empty()),
        }
    }
}

/// The counters and the live areas; and a recount, which is for instances without caches.
pub fn audit_of(pcpu: &SimAllocator) -> (Stats, BTreeMap<usize, usize>, Option<Picture>) {
    let picture = (!pcpu.has_caches()).then(|| audit(pcpu));
    let mut areas = BTreeMap::new();
    pcpu.visit_map(|place, item| {
        if let MapItem::Area(area) = item {
            areas.insert((place as usize) << 32 | area.start, area.len());
        }
    });
    (pcpu.stats(), areas, picture)
}
