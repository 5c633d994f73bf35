//! The event hook and caches: it is told of every area, in order, so that they serve nobody meanwhile.

use pcpu::{FreeFlags, Request};

use crate::machine::{Watched, live_areas, seat, with_caches};
use crate::small::small_machine;
use crate::told::{Hook, Live};

#[test]
fn the_hook_is_told_of_all_areas_in_order() {
    static HOOK: Hook = Hook::new();
    let pcpu = with_caches(&small_machine(3));
    pcpu.set_event_hook(Some(&HOOK));
    let seats: Vec<_> = (0..3)
        .map(|cpu| Watched::new(seat(&pcpu, cpu), |_| ()))
        .collect();
    let mut numbers = fastrand::Rng::with_seed(5);
    let mut live = Live::new();
    let (mut allocs, mut frees) = (0, 0);
    for step in 0..3000 {
        let seat = &seats[numbers.usize(..3)];
        if numbers.u32(..100) == 0 {
            pcpu.drain(seat);
        }
        if numbers.bool() && live.len() < 100 {
            let bytes = [8, 24, 61, 128][numbers.usize(..4)];
            let request = Request::new(bytes, 4).with_owner(step);
            let address = pcpu.allocate_at(seat, &request).unwrap();
            live.insert(address, (bytes, step));
            allocs += 1;
        } else if !live.is_empty() {
            let nth = numbers.usize(..live.len());
            let &address = live.keys().nth(nth).unwrap();
            live.remove(&address);
            frees += 1;
            // SAFETY: nobody uses the area.
            unsafe {
                match numbers.u32(..4) {
                    0 => pcpu.free_with(address, FreeFlags::empty()),
                    _ => pcpu.free_at(seat, address, FreeFlags::ATOMIC),
                }
            }
            .unwrap();
            // What is refused is not told.
            // SAFETY: refused.
            let again = unsafe { pcpu.free_at(seat, address, FreeFlags::empty()) };
            assert!(again.is_err());
        }
        let told = HOOK.told();
        assert_eq!((told.allocs, told.frees), (allocs, frees));
        assert_eq!(told.live, live);
    }
    assert!(live_areas(&pcpu).into_keys().eq(live.into_keys()));
    assert_eq!((pcpu.stats().allocs, pcpu.stats().frees), (allocs, frees));
    let taken: u64 = seats.iter().map(Watched::taken).sum();
    assert_eq!(taken, 0);
    pcpu.set_event_hook(None);
    // A miss, which opens a run, and a hit.
    for _ in 0..2 {
        pcpu.allocate_at(&seats[0], &Request::new(8, 8)).unwrap();
    }
    assert_eq!(seats[0].taken(), 1);
}
