//! Random requests on many chunks; what goes back and when; CPUs that come up meanwhile.

use std::sync::atomic::Ordering;

use proptest::prelude::*;

use pcpu::unit::CpuId;
use pcpu::{AllocError, AllocFlags, FreeFlags, Request};

use crate::copies::{assert_stamped, assert_zero, stamp, stamp_one};
use crate::free::FreeArea;
use crate::machine::{Machine, Shape};
use crate::newcomers::bring_up_amid_churn;

#[derive(Debug, Clone)]
enum Step {
    Alloc(usize, u32, bool),
    Free(usize),
    Upkeep,
    Trim(u32),
    BringUp(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1_usize..30_000, 2_u32..13, any::<bool>())
            .prop_map(|(bytes, align, is_atomic)| Step::Alloc(bytes, align, is_atomic)),
        6 => any::<usize>().prop_map(Step::Free),
        2 => Just(Step::Upkeep),
        1 => (0_u32..3).prop_map(Step::Trim),
        1 => (0_u32..6).prop_map(Step::BringUp),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_requests(
        steps in prop::collection::vec(step(), 1..120),
        unit_pages in prop::sample::select(vec![8, 12, 64, 513]),
        nodes in 1_u32..4,
    ) {
        let shape = Shape { cpus: 6, nodes, unit_bytes: unit_pages * 4096, frames_of_a_node: 9000, ..Shape::default() };
        shape.run(|machine| {
            let pcpu = machine.pcpu;
            let frames_before = machine.host.out().len();
            let mut late = 0;
            let mut live: Vec<(usize, usize)> = Vec::new();
            for (index, step) in steps.iter().enumerate() {
                match *step {
                    Step::Alloc(bytes, align, is_atomic) => {
                        let flags = if is_atomic { AllocFlags::ATOMIC } else { AllocFlags::empty() };
                        machine.host.may_flush.store(!is_atomic, Ordering::Relaxed);
                        let address = pcpu.allocate(&Request::new(bytes, 1 << align).with_flags(flags)).unwrap();
                        machine.host.may_flush.store(true, Ordering::Relaxed);
                        for cpu in pcpu.units().possible().iter() {
                            assert_zero(pcpu, (address, bytes), cpu);
                        }
                        stamp(pcpu, (address, bytes));
                        live.push((address, bytes));
                    }
                    Step::Free(which) if !live.is_empty() => {
                        let area = live.swap_remove(which % live.len());
                        for cpu in pcpu.units().materialised().iter() {
                            assert_stamped(pcpu, area, cpu);
                        }
                        pcpu.free_area(area.0, FreeFlags::empty()).unwrap();
                    }
                    Step::Free(_) => {}
                    Step::Upkeep => {
                        pcpu.upkeep();
                    }
                    Step::Trim(spares) => {
                        pcpu.trim(spares);
                    }
                    Step::BringUp(cpu) => {
                        let cpu = CpuId::new(cpu);
                        let is_new = !pcpu.units().materialised().contains(cpu);
                        pcpu.bring_up(cpu).unwrap();
                        for &area in live.iter().filter(|_| is_new) {
                            assert_zero(pcpu, area, cpu);
                            stamp_one(pcpu, area, cpu);
                        }
                        late += usize::from(is_new);
                    }
                }
                if index % 10 == 0 {
                    machine.audit();
                }
            }
            machine.audit();
            for area in live {
                for cpu in pcpu.units().materialised().iter() {
                    assert_stamped(pcpu, area, cpu);
                }
                pcpu.free_area(area.0, FreeFlags::empty()).unwrap();
            }
            pcpu.trim(0);
            // SAFETY: nobody frees meanwhile.
            unsafe { pcpu.trim_metadata() };
            machine.audit();
            // A CPU that came has a directory, tables and the first chunk's pages.
            let first_pages = pcpu.sizes().populated_pages();
            let tables = (unit_pages * 4096).div_ceil(2 << 20);
            let expected = frames_before + late * (first_pages + tables + 1);
            assert_eq!(machine.host.out().len(), expected);
        });
    }
}

#[test]
fn a_batch_is_flushed_once() {
    Shape::default().run(|machine| {
        let pcpu = machine.pcpu;
        // The first chunk's pages stay.
        let rest = pcpu.sizes().regions().dynamic.len();
        pcpu.allocate(&Request::new(rest, 4)).unwrap();
        let pages = [(); 7].map(|()| pcpu.allocate(&Request::new(4096, 4096)).unwrap());
        for page in pages {
            stamp(pcpu, (page, 4096));
        }
        // Three runs of pages on two CPUs.
        for page in [0, 2, 3, 5].map(|index| pages[index]) {
            pcpu.free_area(page, FreeFlags::empty()).unwrap();
        }
        machine.host.flushes.lock().unwrap().clear();
        assert_eq!(pcpu.trim(9).pages_given_back, 4);
        assert_eq!(*machine.host.flushes.lock().unwrap(), [8]);
        // Pages that had no memory are not remembered.
        pcpu.allocate(&Request::new(3 * 4096, 4096)).unwrap();
        assert_eq!(machine.host.flushes.lock().unwrap().len(), 1);
    });
}

/// Frames that come zeroed are handed on as they are.
#[test]
fn zeroed_frames_stay_zeroed() {
    let shape = Shape::default();
    let host = shape.host();
    host.has_zeroed_frames.store(true, Ordering::Relaxed);
    let act = |machine: Machine<'_, '_>| {
        let pcpu = machine.pcpu;
        for _ in 0..3 {
            let areas =
                [(); 6].map(|()| (pcpu.allocate(&Request::new(30_000, 8)).unwrap(), 30_000));
            for area in areas {
                for cpu in pcpu.units().possible().iter() {
                    assert_zero(pcpu, area, cpu);
                }
                stamp(pcpu, area);
            }
            machine.audit();
            for (address, _) in areas {
                pcpu.free_area(address, FreeFlags::empty()).unwrap();
            }
            pcpu.trim(0);
            // SAFETY: nobody frees meanwhile.
            unsafe { pcpu.trim_metadata() };
        }
        pcpu.bring_up(CpuId::new(3)).unwrap();
        machine.audit();
    };
    shape.run_on(&host, act).unwrap();
}

/// Without a place there is no chunk, and with one again there is.
#[test]
fn no_more_chunks_than_wanted() {
    let shape = Shape {
        max_chunks: 3,
        ..Shape::default()
    };
    shape.run(|machine| {
        let pcpu = machine.pcpu;
        let mut areas = Vec::new();
        let error = loop {
            match pcpu.allocate(&Request::new(30_000, 8)) {
                Ok(area) => areas.push(area),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, AllocError::Backing(_)), "{error}");
        assert_eq!((areas.len(), pcpu.stats().chunks), (2, 3));
        machine.audit();
        let last = areas.pop().unwrap();
        pcpu.free_area(last, FreeFlags::empty()).unwrap();
        areas.push(pcpu.allocate(&Request::new(30_000, 8)).unwrap());
        for area in areas {
            pcpu.free_area(area, FreeFlags::empty()).unwrap();
        }
    });
}

/// Tables of level 1 come with the first chunk in their 2 MiB and go with the last.
#[test]
fn tables_come_and_go_with_chunks() {
    let shape = Shape {
        unit_bytes: 1 << 20,
        ..Shape::default()
    };
    shape.run(|machine| {
        let pcpu = machine.pcpu;
        pcpu.trim(0);
        // SAFETY: nobody frees meanwhile.
        unsafe { pcpu.trim_metadata() };
        let before = machine.host.out().len();
        let mut areas = Vec::new();
        while pcpu.stats().chunks < 8 {
            areas.push(pcpu.allocate(&Request::new(32 << 10, 4096)).unwrap());
        }
        machine.audit();
        // Behind the others, so that holes in the tables are left.
        pcpu.bring_up(CpuId::new(3)).unwrap();
        machine.audit();
        while let Some(area) = areas.pop() {
            pcpu.free_area(area, FreeFlags::empty()).unwrap();
            if areas.len() % 32 == 0 {
                pcpu.trim(0);
                // SAFETY: nobody frees meanwhile.
                unsafe { pcpu.trim_metadata() };
                machine.audit();
            }
        }
        let of_late_cpu = pcpu.sizes().populated_pages() + 2;
        assert_eq!(machine.host.out().len(), before + of_late_cpu);
    });
}

#[test]
fn cpus_come_up_amid_requests() {
    for round in 0..6 {
        let shape = Shape {
            cpus: 6,
            online: 1,
            ..Shape::default()
        };
        shape.run(|machine| {
            let pcpu = machine.pcpu;
            machine.host.set_faults(move |call| call % 37 == round);
            bring_up_amid_churn(pcpu, 1..6);
            machine.host.set_faults(|_| false);
            pcpu.trim(0);
            // SAFETY: nobody frees meanwhile.
            unsafe { pcpu.trim_metadata() };
            machine.audit();
            assert_eq!(pcpu.stats().live, 0);
        });
    }
}
