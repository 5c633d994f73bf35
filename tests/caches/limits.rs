//! What an instance does not serve its caches do not serve either, also where they have areas that would do.

use pcpu::allocator::Policy;
use pcpu::{AllocError, Request};

use crate::cached::{seat, with_caches};
use crate::free::FreeArea;
use crate::machine::free_at;
use crate::small::small_machine;

/// An instance of such a policy serves the first request over and over, from a run and from the stash, and never the second.
fn assert_limited(policy: Policy, served: (usize, usize), refused: (usize, usize)) -> AllocError {
    let pcpu = with_caches(&small_machine(2).policy(policy));
    let (here, there) = (seat(&pcpu, 0), seat(&pcpu, 1));
    let [request, too_much] = [served, refused].map(|(bytes, align)| Request::new(bytes, align));
    let mut error = None;
    let mut refuse = || {
        let found = pcpu.allocate_at(&here, &too_much).unwrap_err();
        assert_eq!(*error.get_or_insert(found), found);
    };
    refuse();
    // From a run; what another CPU's run has handed out goes into the stash when it has made way.
    let mut areas: Vec<usize> = (0..200)
        .map(|_| {
            let area = pcpu.allocate_at(&there, &request).unwrap();
            refuse();
            area
        })
        .collect();
    pcpu.drain(&there);
    let misses = pcpu.stats().cache_misses;
    for _ in 0..3 {
        for area in &mut areas {
            // SAFETY: nobody uses the area any more.
            unsafe {
                pcpu.free_at(&here, *area, pcpu::FreeFlags::empty())
                    .unwrap()
            };
            refuse();
            *area = pcpu.allocate_at(&here, &request).unwrap();
        }
    }
    assert!(pcpu.stats().cache_misses < misses + 50);
    for area in areas {
        pcpu.free_area(area, pcpu::FreeFlags::empty()).unwrap();
    }
    assert_eq!(pcpu.stats().live, 0);
    error.unwrap()
}

#[test]
fn a_size_that_is_rounded_up_is_not_what_was_asked_for() {
    let policy = Policy {
        max_alloc_bytes: 6,
        ..Policy::default()
    };
    assert_eq!(
        assert_limited(policy, (6, 4), (7, 4)),
        AllocError::TooLarge {
            bytes: 7,
            limit_bytes: 6
        }
    );
}

#[test]
fn an_alignment_that_areas_happen_to_have_is_not_served() {
    for (limit, served, align) in [(4, (8, 4), 8), (2, (12, 2), 4), (16, (64, 16), 64)] {
        let policy = Policy {
            max_align_bytes: limit,
            ..Policy::default()
        };
        assert_eq!(
            assert_limited(policy, served, (served.0, align)),
            AllocError::AlignTooLarge { align, limit }
        );
    }
}

/// A size that is no multiple of its alignment is served by longer areas, unless these are longer than the instance serves.
#[test]
fn a_size_that_is_no_multiple_of_its_alignment_is_served() {
    for (bytes, align) in [(12, 8), (9, 8), (44, 16), (96, 64)] {
        let pcpu = with_caches(&small_machine(2));
        let here = seat(&pcpu, 0);
        let request = Request::new(bytes, align);
        let mut areas = Vec::new();
        for round in 0..100 {
            let area = pcpu.allocate_at(&here, &request).unwrap();
            assert!(area.is_multiple_of(align));
            // Every fourth stays.
            match round % 4 {
                0 => areas.push(area),
                _ => free_at(&pcpu, &here, area).unwrap(),
            }
        }
        areas.sort_unstable();
        assert!(areas.windows(2).all(|two| two[1] - two[0] >= bytes));
        let stats = pcpu.stats();
        assert_eq!((stats.allocs, stats.live), (100, 25));
        assert!(stats.cache_misses < 25, "{stats}");
    }
}

#[test]
fn longer_areas_are_not_longer_than_the_largest_request() {
    let policy = Policy {
        max_alloc_bytes: 12,
        ..Policy::default()
    };
    let pcpu = with_caches(&small_machine(2).policy(policy));
    let here = seat(&pcpu, 0);
    let areas: Vec<_> = (0..50)
        .map(|_| pcpu.allocate_at(&here, &Request::new(12, 8)).unwrap())
        .collect();
    let stats = pcpu.stats();
    assert_eq!((stats.live, stats.live_bytes), (50, 50 * 12));
    for area in areas {
        free_at(&pcpu, &here, area).unwrap();
    }
}

/// Requests of other flags pass a cache by, whatever it has.
#[test]
fn a_reserved_request_is_not_served_by_a_cache() {
    let pcpu = with_caches(&small_machine(2));
    let here = seat(&pcpu, 0);
    let request = Request::new(8, 8);
    let area = pcpu.allocate_at(&here, &request).unwrap();
    let reserved = request.with_flags(pcpu::AllocFlags::RESERVED);
    let own = pcpu.allocate_at(&here, &reserved).unwrap();
    let region = pcpu.sizes().regions().reserved;
    assert!(region.contains(&(own - pcpu.neutral_base())));
    assert!(!region.contains(&(area - pcpu.neutral_base())));
    // With its flags taken back it is what it was.
    let again = reserved.with_flags(pcpu::AllocFlags::empty());
    assert_eq!(again, request);
    let misses = pcpu.stats().cache_misses;
    assert!(!region.contains(&(pcpu.allocate_at(&here, &again).unwrap() - pcpu.neutral_base())));
    assert_eq!(pcpu.stats().cache_misses, misses);
}
