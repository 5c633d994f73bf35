//! What is counted of areas that go through caches: the same as a plain model counts.

use std::collections::BTreeMap;

use pcpu::backing::sim::SimAllocator;
use pcpu::stats::{MapItem, SIZE_CLASSES, Stats};
use pcpu::unit::GRANULE_BYTES;
use pcpu::{FreeFlags, Request};

use crate::machine::{REQUEST, SLOTS, free_at, live_areas, seats, with_caches};
use crate::roomy::roomy_machine;
use crate::small::{UNIT_BYTES, small_machine};

/// Counts as one does on paper.
#[derive(Default)]
struct Model {
    live: BTreeMap<usize, usize>,
    allocs: u64,
    sizes: [u64; SIZE_CLASSES],
}

impl Model {
    /// An area of a request, which has so many bytes.
    fn enter(&mut self, address: usize, request: &Request, area_bytes: usize) {
        let rounded_bytes = request.bytes().next_multiple_of(GRANULE_BYTES);
        match rounded_bytes.is_multiple_of(request.align()) {
            true => assert_eq!(area_bytes, rounded_bytes),
            false => assert!((rounded_bytes..=rounded_bytes * 4 / 3).contains(&area_bytes)),
        }
        let before = self.live.insert(address, area_bytes);
        assert_eq!(before, None, "handed out twice");
        self.allocs += 1;
        self.sizes[Stats::size_class(area_bytes)] += 1;
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
    for seed in 0..8 {
        let machine = if seed < 6 {
            small_machine
        } else {
            roomy_machine
        };
        let pcpu = with_caches(&machine(4));
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
                    let request = Request::new(bytes, align);
                    let address = pcpu.allocate_at(seat, &request).unwrap();
                    model.enter(address, &request, pcpu.area_bytes(address).unwrap());
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

/// Live areas, areas that nobody has, and free runs fill every chunk; what idles is counted as such, chunk by chunk.
#[test]
fn maps_tell_what_idles() {
    let pcpu = with_caches(&small_machine(2));
    let seats = seats(&pcpu, 2);
    let areas = [(); 5].map(|()| pcpu.allocate_at(&seats[0], &REQUEST).unwrap());
    // By its own CPU: into the run; by another one: it waits for the run.
    free_at(&pcpu, &seats[0], areas[0]).unwrap();
    free_at(&pcpu, &seats[1], areas[3]).unwrap();
    free_at(&pcpu, &seats[1], areas[4]).unwrap();
    let long = pcpu.allocate(&Request::new(20_000, 8)).unwrap();

    let mut fills: BTreeMap<(u32, usize), usize> = BTreeMap::new();
    let mut counted: BTreeMap<u32, (u32, u32, usize)> = BTreeMap::new();
    pcpu.visit_map(|place, item| {
        let of_chunk = counted.entry(place).or_default();
        let range = match item {
            MapItem::Area(range) => {
                of_chunk.0 += 1;
                range
            }
            MapItem::Idle(range) => {
                of_chunk.1 += 1;
                of_chunk.2 += range.len();
                range
            }
            MapItem::Free(range) => range,
            _ => return,
        };
        assert_eq!(fills.insert((place, range.start), range.end), None);
    });
    let regions = pcpu.sizes().regions();
    let mut at = (0, regions.reserved.start);
    for ((place, start), end) in fills {
        if place != at.0 {
            assert_eq!(at, (0, regions.dynamic.end));
            at = (place, 0);
        }
        assert_eq!((place, start), at);
        at = (place, end);
    }
    assert_eq!(at, (1, UNIT_BYTES));

    // The run's other areas, two that wait, and the tables.
    let idle = SLOTS as u32 - 4 + 2 + 1;
    assert_eq!(counted[&0], (2, idle, (idle as usize - 1) * 64 + 1792));
    assert_eq!(counted[&1], (1, 0, 0));
    let mut figures = BTreeMap::new();
    pcpu.visit_chunks(|chunk| {
        let of_chunk: &mut (u32, u32) = figures.entry(chunk.place).or_default();
        *of_chunk = (of_chunk.0 + chunk.areas, of_chunk.1 + chunk.idle_areas);
        assert!(
            chunk.place != 0 || chunk.largest_bytes <= 64,
            "the tables are nobody's"
        );
    });
    assert_eq!(figures, BTreeMap::from([(0, (2, idle)), (1, (1, 0))]));
    assert_eq!(pcpu.stats().live, 3);
    pcpu.drain(&seats[0]);
    let mut idle = 0;
    pcpu.visit_chunks(|chunk| idle += chunk.idle_areas);
    assert_eq!(idle, 1, "the tables alone");
    for address in [areas[1], areas[2], long] {
        free_at(&pcpu, &seats[0], address).unwrap();
    }
}
