//! What memory comes when it grows, and what makes room for it.

use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::{AllocFlags, FreeFlags, Request};

use crate::machine::{free_at, seat, with_caches};

/// A request that no cache serves: of as many granules as a page has.
const PAGE: Request = Request::new(4096, 8);

/// How many pages come when an area of a page is allocated, which no page there has room for.
fn pages_that_come(pcpu: &SimAllocator) -> (usize, u64) {
    let before = pcpu.stats().populated_pages;
    let address = pcpu.allocate_at(&seat(pcpu, 0), &PAGE).unwrap();
    (address, pcpu.stats().populated_pages - before)
}

/// A machine that had more memory, and has given it back.
fn machine_with_a_past() -> SimAllocator {
    let pcpu = with_caches(&Machine::new(2).checked());
    let areas: Vec<_> = (0..40).map(|_| pages_that_come(&pcpu)).collect();
    let most = areas.iter().map(|&(_, pages)| pages).max();
    assert_eq!(most, Some(1), "no more than is needed the first time");
    for (address, _) in areas {
        free_at(&pcpu, &seat(&pcpu, 0), address).unwrap();
    }
    pcpu.drain(&seat(&pcpu, 0));
    pcpu.trim(0);
    // What the first chunk has room for.
    while let (_, 0) = pages_that_come(&pcpu) {}
    pcpu.trim(0);
    pcpu
}

#[test]
fn where_memory_was_it_comes_several_pages_at_a_time() {
    let pcpu = machine_with_a_past();
    let mut came = Vec::new();
    for _ in 0..4 {
        came.push(pages_that_come(&pcpu).1);
    }
    assert_eq!(came, [4, 0, 0, 0]);
    assert_eq!(pcpu.stats().failures, 0);
}

#[test]
fn pages_ahead_of_need_can_be_done_without() {
    let pcpu = machine_with_a_past();
    pcpu.backing().set_faults(|call| call == 0);
    assert_eq!(pages_that_come(&pcpu).1, 1);
    assert_eq!(pcpu.backing().fallible_calls(), 2);
    pcpu.backing().set_faults(|_| true);
    let error = pcpu.allocate_at(&seat(&pcpu, 0), &PAGE).unwrap_err();
    assert_eq!(error.to_string(), "no memory for pages");
    pcpu.backing().set_faults(|_| false);
    assert_eq!(pages_that_come(&pcpu).1, 4);
}

/// Neither beyond what memory ever had, nor for those who cannot wait.
#[test]
fn pages_ahead_of_need_take_nothing_from_anybody() {
    let pcpu = machine_with_a_past();
    let request = PAGE.with_flags(AllocFlags::ATOMIC);
    let before = pcpu.stats().populated_pages;
    pcpu.allocate_at(&seat(&pcpu, 0), &request).unwrap();
    assert_eq!(pcpu.stats().populated_pages, before + 1);

    // Half of each page is live, and so is less than there was.
    let pcpu = with_caches(&Machine::new(2).checked());
    let seat = seat(&pcpu, 0);
    let half = Request::new(2048, 8);
    let areas: Vec<_> = (0..200)
        .map(|_| pcpu.allocate_at(&seat, &half).unwrap())
        .collect();
    for &address in areas.iter().step_by(2) {
        free_at(&pcpu, &seat, address).unwrap();
    }
    let stats = pcpu.stats();
    assert_eq!(stats.populated_pages, stats.populated_peak_pages);
    assert_eq!(pages_that_come(&pcpu).1, 1);
}

/// What an atomic request has had to populate, the next ones find.
#[test]
fn an_upkeep_populates_for_atomic_requests() {
    let pcpu = machine_with_a_past();
    let seat = seat(&pcpu, 0);
    let request = PAGE.with_flags(AllocFlags::ATOMIC);
    let pages_that_come = || {
        let before = pcpu.stats().populated_pages;
        pcpu.allocate_at(&seat, &request).unwrap();
        pcpu.stats().populated_pages - before
    };
    assert!(!pcpu.is_upkeep_due());
    assert_eq!(pages_that_come(), 1);
    assert!(pcpu.is_upkeep_due());
    // There is no harm if it cannot.
    pcpu.backing().set_faults(|_| true);
    assert_eq!(pcpu.upkeep().pages_populated, 0);
    assert!(!pcpu.is_upkeep_due());
    pcpu.backing().set_faults(|_| false);
    assert_eq!(pages_that_come(), 1);
    pcpu.upkeep_if_due();
    let ahead = pcpu.stats().empty_pages;
    assert!(ahead > 4, "{ahead} pages");
    for _ in 0..ahead {
        assert!(!pcpu.is_upkeep_due());
        assert_eq!(pages_that_come(), 0);
    }
    assert_eq!(pages_that_come(), 1);

    // Not beyond what there ever was.
    for _ in 0..100 {
        pages_that_come();
        pcpu.upkeep_if_due();
    }
    let stats = pcpu.stats();
    assert_eq!(stats.populated_pages, stats.populated_peak_pages);
    assert_eq!(stats.empty_pages, 0);
}

/// One that is called for leaves what the policy says.
#[test]
fn an_upkeep_that_is_called_for_populates_less() {
    let pcpu = machine_with_a_past();
    let request = PAGE.with_flags(AllocFlags::ATOMIC);
    pcpu.allocate_at(&seat(&pcpu, 0), &request).unwrap();
    assert_eq!(pcpu.upkeep().pages_populated, 1);
    let again = pcpu.upkeep();
    assert_eq!((again.pages_populated, again.pages_given_back), (0, 1));
    // Who trims has seen to it.
    pcpu.allocate_at(&seat(&pcpu, 0), &request).unwrap();
    assert!(pcpu.is_upkeep_due());
    pcpu.trim(0);
    assert!(!pcpu.is_upkeep_due());
}

/// Pages come from the lowest chunk that has any to populate, and what room is left for the largest request stays.
#[test]
fn an_upkeep_populates_in_any_chunk() {
    let pcpu = with_caches(&Machine::new(2).checked());
    let seat = seat(&pcpu, 0);
    let areas: Vec<_> = (0..400)
        .map(|_| pcpu.allocate_at(&seat, &PAGE).unwrap())
        .collect();
    // Two pages in the second chunk, and the end of all.
    for &address in areas[60..62].iter().chain(&areas[300..]) {
        free_at(&pcpu, &seat, address).unwrap();
    }
    pcpu.drain(&seat);
    pcpu.trim(0);
    let three_pages = Request::new(3 * 4096, 8).with_flags(AllocFlags::ATOMIC);
    let mut came = Vec::new();
    for _ in 0..12 {
        let before = pcpu.stats().pages_populated;
        pcpu.allocate_at(&seat, &three_pages).unwrap();
        let needed = pcpu.stats().pages_populated;
        pcpu.upkeep_if_due();
        came.push((needed - before, pcpu.stats().pages_populated - needed));
    }
    assert_eq!(came[0], (3, 2), "those between others");
    assert!(came[1..].contains(&(3, 6)), "{came:?}");
    assert!(came[1..].contains(&(0, 0)), "{came:?}");
    assert_eq!(pcpu.stats().spare_shortfalls, 0);
}

/// What is empty and not too much stays when an atomic request has had to populate pages.
#[test]
fn an_upkeep_for_atomic_requests_gives_nothing_back() {
    let pcpu = with_caches(&Machine::new(2).checked());
    let seat = seat(&pcpu, 0);
    let areas: Vec<_> = (0..90)
        .map(|_| pcpu.allocate_at(&seat, &PAGE).unwrap())
        .collect();
    let free = |address: &usize| free_at(&pcpu, &seat, *address).unwrap();
    areas[60..].iter().for_each(free);
    pcpu.trim(0);
    areas.iter().step_by(2).take(10).for_each(free);
    assert!(!pcpu.is_upkeep_due());
    let two_pages = Request::new(2 * 4096, 8).with_flags(AllocFlags::ATOMIC);
    let before = pcpu.stats();
    assert!(before.empty_pages >= 7, "{} pages", before.empty_pages);
    pcpu.allocate_at(&seat, &two_pages).unwrap();
    assert!(pcpu.is_upkeep_due());
    pcpu.upkeep_if_due();
    let after = pcpu.stats();
    assert_eq!(after.pages_depopulated, before.pages_depopulated);
    assert!(!pcpu.is_upkeep_due());
}

/// Areas that idle in a run whose CPU has turned to others are free for these.
#[test]
fn a_run_that_is_not_used_makes_room() {
    let pcpu = with_caches(&Machine::new(2).checked());
    let (first, other) = (seat(&pcpu, 0), seat(&pcpu, 1));
    let idle_areas = || {
        let mut idle = 0;
        pcpu.visit_chunks(|chunk| idle += chunk.idle_areas);
        idle
    };
    let tables = idle_areas();
    let mut areas = vec![
        pcpu.allocate_at(&first, &Request::new(16, 8)).unwrap(),
        pcpu.allocate_at(&other, &Request::new(16, 8)).unwrap(),
    ];
    let idle = idle_areas() - tables;
    assert!(idle > 2, "two runs are open");
    let large = Request::new(1000, 8);
    while pcpu.stats().populated_pages < 300 {
        areas.push(pcpu.allocate_at(&first, &large).unwrap());
    }
    let left = idle_areas() - tables;
    assert!(
        left >= idle / 2 && left <= idle / 2 + 3,
        "the other CPU's run stays: {left} of {idle}"
    );
    for address in areas {
        free_at(&pcpu, &first, address).unwrap();
    }
}

/// A large instance grows before it sweeps; what cannot grow is served by what was freed.
#[test]
fn a_large_instance_that_cannot_grow_sweeps() {
    let pcpu = with_caches(&Machine::new(1).chunks(256));
    let seat = seat(&pcpu, 0);
    let allocate = |request: &Request| pcpu.allocate_at(&seat, request);
    let mut areas = Vec::new();
    while pcpu.stats().populated_pages < 3000 {
        areas.push(allocate(&Request::new(200, 8)).unwrap());
    }
    let reserved = Request::new(1000, 8).with_flags(AllocFlags::RESERVED);
    let held: Vec<_> = core::iter::from_fn(|| allocate(&reserved).ok()).collect();
    for &address in &held {
        // SAFETY: nobody uses the area.
        unsafe { pcpu.free_at(&seat, address, FreeFlags::RESERVED) }.unwrap();
    }
    for _ in &held {
        allocate(&reserved).unwrap();
    }

    // As many as a stash names: nobody has swept them.
    areas.sort_unstable();
    for &address in &areas[..80] {
        free_at(&pcpu, &seat, address).unwrap();
    }
    pcpu.backing().set_faults(|_| true);
    allocate(&Request::new(12_000, 8).with_flags(AllocFlags::ATOMIC)).unwrap();
}

/// A large instance grows a little rather than sweep page by page for what was freed there, and not on and on.
#[test]
fn a_large_instance_grows_a_little_before_it_sweeps() {
    let pcpu = with_caches(&Machine::new(1).chunks(256));
    let seat = seat(&pcpu, 0);
    let mut state = 1_u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % below
    };
    let allocate = |bytes: usize| pcpu.allocate_at(&seat, &Request::new(bytes, 4)).unwrap();
    let mut areas = Vec::new();
    while pcpu.stats().populated_pages < 3000 {
        areas.push(allocate(4 + random(400)));
    }
    let needed = pcpu.stats().populated_pages;
    // Each time it is refused all is swept; that is no growth of what is needed.
    let reserved = Request::new(1000, 8).with_flags(AllocFlags::RESERVED);
    while pcpu.allocate_at(&seat, &reserved).is_ok() {}
    for step in 0..10 * areas.len() {
        if step.is_multiple_of(2000) {
            pcpu.allocate_at(&seat, &reserved).unwrap_err();
        }
        let at = random(areas.len());
        free_at(&pcpu, &seat, areas[at]).unwrap();
        areas[at] = allocate(4 + random(400));
    }
    let most = pcpu.stats().populated_peak_pages;
    // Holes that nothing fits take most of it: 306 pages.
    assert!(most < needed + needed / 8, "{most} pages, {needed} before");
    for address in areas {
        free_at(&pcpu, &seat, address).unwrap();
    }
    pcpu.drain(&seat);
    pcpu.trim(0);
    assert_eq!(pcpu.stats().chunks, 1);
}
