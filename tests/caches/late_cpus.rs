//! A CPU that is brought up when others have used their caches for long: it has one too, and what it is handed is zero.

use pcpu::Request;
use pcpu::backing::sim::SimAllocator;
use pcpu::cache::Seat;
use pcpu::unit::CpuId;

use crate::copies::{assert_stamped, assert_zero, stamp};
use crate::machine::{REQUEST, SLOTS, Watched, free_at, live_areas, seat, with_caches};
use crate::small::small_machine;

/// Allocates so many areas of 64 bytes, which must be zero on every CPU, and stamps them.
fn allocate(pcpu: &SimAllocator, seat: &impl Seat, count: usize) -> Vec<usize> {
    let allocate = |_| {
        let address = pcpu.allocate_at(seat, &REQUEST).unwrap();
        for cpu in pcpu.units().possible().iter() {
            assert_zero(pcpu, (address, 64), cpu);
        }
        stamp(pcpu, (address, 64));
        address
    };
    (0..count).map(allocate).collect()
}

#[test]
fn a_cpu_that_comes_late_has_a_cache() {
    let machine = small_machine(4).online(2);
    for machine in [machine.clone(), machine.dirty_memory()] {
        let pcpu = with_caches(&machine);
        let first = seat(&pcpu, 0);
        let late = CpuId::new(3);
        // Half of a fresh run is handed out later; a run of another class is used over and over.
        let mut live = allocate(&pcpu, &first, SLOTS / 2);
        let other = Request::new(32, 32);
        for _ in 0..3 {
            let areas: Vec<_> = (0..16)
                .map(|_| pcpu.allocate_at(&first, &other).unwrap())
                .collect();
            for address in areas {
                stamp(&pcpu, (address, 32));
                free_at(&pcpu, &first, address).unwrap();
            }
        }

        let absent = Watched::new(seat(&pcpu, 3), || ());
        live.extend(allocate(&pcpu, &absent, 3));
        assert_eq!(absent.taken(), 0, "a CPU without memory has no runs");
        pcpu.bring_up(late).unwrap();
        for &address in &live {
            assert_zero(&pcpu, (address, 64), late);
            stamp(&pcpu, (address, 64));
        }
        live.extend(allocate(&pcpu, &first, SLOTS / 2));
        let again = pcpu.allocate_at(&first, &other).unwrap();
        assert_zero(&pcpu, (again, 32), late);

        let here = Watched::new(seat(&pcpu, 3), || ());
        let mine = allocate(&pcpu, &here, 2 * SLOTS);
        assert!(here.taken() >= SLOTS as u64, "it has runs of its own");
        // Reused: put by their own CPU, and collected from others.
        for &address in &mine[SLOTS..] {
            free_at(&pcpu, &here, address).unwrap();
        }
        let reused = allocate(&pcpu, &here, SLOTS);
        assert_eq!(sorted(&reused), sorted(&mine[SLOTS..]));
        for &address in &reused {
            free_at(&pcpu, &first, address).unwrap();
        }
        let collected = allocate(&pcpu, &here, SLOTS);
        assert_eq!(sorted(&collected), sorted(&reused));

        live.extend(&mine[..SLOTS]);
        live.extend(collected);
        for cpu in [0, 1, 3].map(CpuId::new) {
            live.iter()
                .for_each(|&address| assert_stamped(&pcpu, (address, 64), cpu));
        }
        live.push(again);
        assert!(live_areas(&pcpu).into_keys().eq(sorted(&live)));
        for address in live {
            free_at(&pcpu, &here, address).unwrap();
        }
        pcpu.drain(&here);
        assert_eq!((pcpu.stats().live, pcpu.stats().late_errors), (0, 0));
    }
}

fn sorted(addresses: &[usize]) -> Vec<usize> {
    let mut addresses = addresses.to_vec();
    addresses.sort_unstable();
    addresses
}
