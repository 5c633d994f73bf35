//! What is counted of areas that go through caches: the same as a plain model counts.

use std::collections::BTreeMap;

use pcpu::backing::sim::SimAllocator;
use pcpu::stats::{SIZE_CLASSES, Stats};
use pcpu::unit::GRANULE_BYTES;
use pcpu::{FreeFlags, Request};

use crate::machine::{free_at, live_areas, seats, with_caches};
use crate::small::small_machine;

/// Counts as one does on paper.
#[derive(Default)]
struct Model {
    live: BTreeMap<usize, usize>,
    allocs: u64,
    sizes: [u64; SIZE_CLASSES],
}

impl Model {
    fn enter(&mut self, address: usize, bytes: usize) {
        let rounded_bytes = bytes.next_multiple_of(GRANULE_BYTES);
        let before = self.live.insert(address, rounded_bytes);
        assert_eq!(before, None, "handed out twice");
        self.allocs += 1;
        self.sizes[Stats::size_class(rounded_bytes)] += 1;
    }

    fn compare(&self, pcpu: &SimAllocator) {
        assert_eq!(live_areas(pcpu), self.live);
        let stats = pcpu.stats();
        let live = self.live.len() as u64;
        let live_bytes: usize = self.live.values().sum();
        let mut live_sizes = [0; SIZE_CLASSES];
        for &bytes in self.live.values() {
            live_sizes[Stats::size_class(bytes)] += 1;
        }
        assert_eq!(
            (stats.allocs, stats.frees, stats.live, stats.live_bytes),
            (self.allocs, self.allocs - live, live, live_bytes as u64)
        );
        assert_eq!((stats.sizes, stats.live_sizes), (self.sizes, live_sizes));
        assert!(stats.live_peak >= live && stats.live_peak_bytes >= stats.live_bytes);
        assert_eq!((stats.late_errors, stats.failures), (0, 0));
    }
}

#[test]
fn counters_are_those_of_a_model() {
    for seed in 0..6 {
        let pcpu = with_caches(&small_machine(4));
        let seats = seats(&pcpu, 4);
        let first_pages = pcpu.stats().populated_pages;
        let mut numbers = fastrand::Rng::with_seed(seed);
        let mut model = Model::default();
        for step in 0..4000 {
            let seat = &seats[numbers.usize(..4)];
            match numbers.u32(..100) {
                0 => pcpu.drain(seat),
                1 => {
                    pcpu.upkeep();
                }
                2 => {
                    pcpu.trim(0);
                }
                3..52 if model.live.len() < 300 => {
                    let bytes = match numbers.u32(..10) {
                        0 => numbers.usize(1..5000),
                        1..4 => numbers.usize(1..300),
                        _ => 8 << numbers.u32(..5),
                    };
                    let align = 1 << numbers.u32(..7);
                    let address = pcpu.allocate_at(seat, &Request::new(bytes, align)).unwrap();
                    model.enter(address, bytes);
                }
                _ => {
                    let nth = numbers.usize(..model.live.len() + 1);
                    let Some(&address) = model.live.keys().nth(nth) else {
                        continue;
                    };
                    model.live.remove(&address);
                    match numbers.u32(..4) {
                        // SAFETY: nobody uses the area.
                        0 => unsafe { pcpu.free_with(address, FreeFlags::empty()) },
                        _ => free_at(&pcpu, seat, address),
                    }
                    .unwrap();
                }
            }
            // Looking sweeps what was freed: seldom enough that sweeps have something to do.
            if step % 97 == 0 {
                model.compare(&pcpu);
            }
        }
        model.compare(&pcpu);
        while let Some((address, _)) = model.live.pop_first() {
            free_at(&pcpu, &seats[numbers.usize(..4)], address).unwrap();
        }
        model.compare(&pcpu);
        pcpu.drain(&seats[2]);
        model.compare(&pcpu);
        pcpu.trim(0);
        model.compare(&pcpu);
        let stats = pcpu.stats();
        assert_eq!((stats.populated_pages, stats.chunks), (first_pages, 1));
        assert_eq!(pcpu.backing().reserved_chunks(), []);
    }
}
