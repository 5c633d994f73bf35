//! The sums, lists and trees of the state against a recount, again and again during random operations.

use std::vec::Vec;

use super::*;
use crate::backing::sim::{Machine, SimAllocator};
use crate::cache::LockedSeat;
use crate::chunk::Membership;
use crate::request::{AllocFlags, FreeFlags};
use crate::unit::FirstChunkSpec;

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Panics unless all that is kept in step is in step.
    fn check(&self) {
        let mut state = self.state.lock();
        state.sweep_all();
        let (mut populated, mut empty, mut areas, mut spares, mut chunks) = (0, 0, 0, 0, 0);
        for (place, chunk) in state.directory.chunks() {
            let body = state.body(chunk);
            body.check();
            assert!(body.is_entered());
            assert_eq!(body.counts.claimed, 0);
            let is_spare = body.membership == Membership::Spare;
            let room = body.room();
            if !is_spare {
                for granules in [1, room.ready.max(1), room.growing.max(1)] {
                    let ready = state.directory.find_ready(granules, place);
                    assert_eq!(ready == Some(place), room.ready >= granules);
                    let growing = state.directory.find_growing(granules, place);
                    assert_eq!(growing == Some(place), room.growing >= granules);
                }
            }
            chunks += 1;
            spares += u32::from(is_spare);
            empty += u64::from(body.counts.empty);
            areas += u64::from(body.areas);
            if place != 0 {
                populated += u64::from(body.counts.populated);
            }
        }
        if let Some(reserved) = state.reserved {
            state.body(reserved).check();
            areas += u64::from(state.body(reserved).areas);
        }
        populated += self.geometry.sizes.populated_pages() as u64;
        // The tables of runs are nobody's area.
        areas -= u64::from(self.has_caches());
        let stats = &state.stats;
        assert_eq!(
            (
                stats.populated_pages,
                stats.empty_pages,
                stats.live,
                stats.spare_chunks,
                stats.chunks
            ),
            (populated, empty, areas, spares, chunks)
        );
        assert_eq!(stats.live_sizes.iter().sum::<u64>(), areas);
    }
}

fn small_machine() -> Machine {
    let spec = FirstChunkSpec {
        static_bytes: 1001,
        reserved_bytes: 4096,
        dyn_bytes: 12 << 10,
        ..FirstChunkSpec::default()
    };
    Machine::new(2).spec(spec).unit_bytes(64 << 10).checked()
}

fn exercise(pcpu: &SimAllocator, rounds: u32, seed: u64) {
    let mut state = seed;
    let mut next = move |below: u32| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as u32 % below
    };
    let mut live = Vec::new();
    for round in 0..rounds {
        let grow = if round / 300 % 2 == 0 { 3 } else { 1 };
        if next(4) < grow {
            let bytes = [4, 8, 24, 64, 500, 4096, 9000, 32768][next(8) as usize];
            let request = Request::new(bytes, 4 << next(11)).with_flags(match next(3) {
                0 => AllocFlags::ATOMIC,
                _ => AllocFlags::empty(),
            });
            if let Ok(address) = pcpu.allocate(&request) {
                live.push(address);
            }
        } else if !live.is_empty() {
            let address = live.swap_remove(next(live.len() as u32) as usize);
            // SAFETY: the area is live, and nobody uses it.
            assert_eq!(unsafe { pcpu.free(address) }, Ok(()));
        }
        if next(10) == 0 {
            pcpu.upkeep();
        }
        if round % 16 == 0 {
            pcpu.check();
        }
    }
    for address in live {
        // SAFETY: the area is live, and nobody uses it.
        assert_eq!(unsafe { pcpu.free(address) }, Ok(()));
    }
    pcpu.trim(0);
    pcpu.check();
    assert_eq!(pcpu.stats().chunks, 1);
}

#[test]
fn all_stays_in_step() {
    exercise(
        &small_machine().build().unwrap(),
        2000,
        0x9e37_79b9_7f4a_7c15,
    );
}

#[test]
fn all_stays_in_step_while_the_backing_fails() {
    let pcpu = small_machine().build().unwrap();
    pcpu.backing().set_faults(|call| call % 3 == 0);
    exercise(&pcpu, 2000, 0x2545_f491_4f6c_dd1d);
}

/// With caches memory comes ahead of need, too; nobody's seat uses them here.
#[test]
fn all_stays_in_step_where_there_are_caches() {
    for fails_each in [0, 3] {
        let mut pcpu = small_machine().build().unwrap();
        pcpu.enable_caches().unwrap();
        if fails_each > 0 {
            pcpu.backing()
                .set_faults(move |call| call % fails_each == 0);
        }
        for seed in [0x9e37_79b9_7f4a_7c15, 0x2545_f491_4f6c_dd1d] {
            exercise(&pcpu, 2000, seed);
        }
    }
}

/// On CPUs side by side and others, and nothing beside it.
#[test]
fn zeroing_is_of_the_length_that_it_is_asked_for() {
    let pcpu = Machine::new(7).online(5).build().unwrap();
    pcpu.bring_up(CpuId::new(6)).unwrap();
    let bytes = 400;
    let area = pcpu.allocate(&Request::new(bytes, 8)).unwrap();
    let cpus: Vec<CpuId> = pcpu.units().materialised().iter().collect();
    assert_eq!(cpus.len(), 6);
    for len in (GRANULE_BYTES..bytes - 2 * GRANULE_BYTES).step_by(GRANULE_BYTES) {
        let zeroed = GRANULE_BYTES..GRANULE_BYTES + len;
        let copies = cpus.iter().map(|&cpu| {
            let copy = pcpu.per_cpu_address(area, cpu).unwrap();
            core::ptr::with_exposed_provenance_mut::<u8>(copy)
        });
        for copy in copies.clone() {
            // SAFETY: the area is live on the CPU, and nobody else uses it.
            unsafe { copy.write_bytes(0xa5, bytes) };
        }
        pcpu.zero(area + zeroed.start, len);
        for copy in copies {
            // SAFETY: as above.
            let found = unsafe { core::slice::from_raw_parts(copy, bytes) };
            let is_right = |(at, &byte): (usize, &u8)| (byte == 0) == zeroed.contains(&at);
            assert!(found.iter().enumerate().all(is_right), "{len} bytes");
        }
    }
}

/// Between a look at a run's pair and one at its marks, areas go from it to a holder and back by their marks: each is idle once.
#[test]
fn an_area_is_idle_once() {
    let mut pcpu = Machine::new(2).build().unwrap();
    pcpu.enable_caches().unwrap();
    // SAFETY: all seats of the instance are such.
    let [owner, other] =
        [0, 1].map(|cpu| unsafe { LockedSeat::new(pcpu.units(), CpuId::new(cpu)) });
    let allocate = || pcpu.allocate_at(&owner, &Request::new(64, 8)).unwrap();
    let free = |seat: &LockedSeat, area| {
        // SAFETY: nobody uses the area.
        unsafe { pcpu.free_at(seat, area, FreeFlags::empty()).unwrap() }
    };
    let (areas, held) = (20, 4);
    let all: Vec<_> = (0..areas).map(|_| allocate()).collect();
    all.into_iter().for_each(|area| free(&other, area));
    // All come back to the run; these are held until the end.
    (0..held).for_each(|_| _ = allocate());
    let _state = pcpu.state.lock();
    let mut runs = 0;
    pcpu.for_each_run(|run, slots| {
        (0..3).for_each(|_| free(&owner, allocate()));
        assert_eq!(
            (run.slots(), pcpu.idle_in(run, slots)),
            (areas, areas - held)
        );
        runs += 1;
    });
    assert_eq!(runs, 1);
}

/// A guide that leads to another run's pair leads nowhere: the way past it finds the area's own.
#[test]
fn a_guide_of_another_run_does_no_harm() {
    let mut pcpu = small_machine().build().unwrap();
    pcpu.enable_caches().unwrap();
    // SAFETY: nothing else works on the caches.
    let seat = unsafe { LockedSeat::new(pcpu.units(), CpuId::new(0)) };
    let areas = [8, 24].map(|bytes| pcpu.allocate_at(&seat, &Request::new(bytes, 8)).unwrap());
    let cells = &pcpu.caches.as_ref().unwrap().cells;
    let granules = areas.map(|area| pcpu.run_granule(area).unwrap());
    let runs = granules.map(|granule| cells.find(granule).unwrap().0);
    cells.mislead(granules[0], runs[1]);
    let put = || {
        let flags = FreeFlags::empty();
        // SAFETY: nobody looks at the copies.
        unsafe {
            pcpu.put_own_at(&seat, areas[0], flags)
                .map_err(|why| (why, pcpu.free_past_own_at(&seat, areas[0], flags, why)))
        }
    };
    assert_eq!(put(), Err((NotPut::LookAgain, Ok(()))));
    let again = FreeError::NotAllocated { address: areas[0] };
    assert_eq!(put(), Err((NotPut::LookAgain, Err(again))));
    cells.mislead(granules[0], runs[0]);
    assert_eq!(put(), Err((NotPut::WasFree, Err(again))));
    assert_eq!(pcpu.stats().live, 1);
    assert_eq!(pcpu.allocate_at(&seat, &Request::new(8, 8)), Ok(areas[0]));
    assert_eq!(put(), Ok(()));
}
