//! Runs of which other CPUs free areas: what it costs those, and that a run is its own CPU's again when they have gone.

use crate::machine::{REQUEST, SLOTS, Watched, free_at, seat, with_caches};
use crate::small::small_machine;

/// Where areas always go on to another CPU, that one changes its neighbour's run, and so waits for it, once and not for every
/// run; where the areas stay again, their CPU takes and puts them by itself.
#[test]
fn neighbours_wait_once() {
    let pcpu = with_caches(&small_machine(2));
    let owner = seat(&pcpu, 0);
    let other = Watched::new(seat(&pcpu, 1), |_| ());
    for round in 0..20 {
        let areas: Vec<_> = (0..3 * SLOTS)
            .map(|_| pcpu.allocate_at(&owner, &REQUEST).unwrap())
            .collect();
        for address in areas {
            free_at(&pcpu, &other, address).unwrap();
        }
        assert_eq!(other.changed(), 1, "in round {round}");
    }
    let misses = pcpu.stats().cache_misses;
    for _ in 0..20 * SLOTS {
        let address = pcpu.allocate_at(&owner, &REQUEST).unwrap();
        free_at(&pcpu, &owner, address).unwrap();
    }
    let misses = pcpu.stats().cache_misses - misses;
    // What is left of the shared run, perhaps once more, and one that is not shared.
    assert!((1..=3).contains(&misses), "{misses}");
}

/// A run that could not get its areas back at once is shared as before, and nobody waits for it again.
#[test]
fn a_collection_that_fails_leaves_the_run_shared() {
    let pcpu = with_caches(&small_machine(2));
    let [owner, other] = [0, 1].map(|cpu| Watched::new(seat(&pcpu, cpu), |_| ()));
    for round in 0..10 {
        let areas: Vec<_> = (0..SLOTS)
            .map(|_| pcpu.allocate_at(&owner, &REQUEST).unwrap())
            .collect();
        for address in areas {
            free_at(&pcpu, &other, address).unwrap();
        }
        assert_eq!(other.changed(), 1, "in round {round}");
        owner.refuse_next();
    }
    assert_eq!(pcpu.stats().live, 0);
}
