//! CPUs that come up later: their copies read zero and get memory, those that never come cost none, and whatever
//! fails leaves no trace.

#[path = "common/audit.rs"]
mod audit;
#[path = "common/copies.rs"]
mod copies;
#[path = "common/free.rs"]
mod free;
#[path = "common/gate.rs"]
mod gate;
#[path = "common/newcomers.rs"]
mod newcomers;
#[path = "common/same.rs"]
mod same;
#[path = "common/small.rs"]
mod small;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::Duration;

use pcpu::backing::BackingError;
use pcpu::backing::sim::{Call, SimAllocator};
use pcpu::unit::{CpuId, FirstChunkSpec};
use pcpu::{AllocFlags, CpuError, FreeFlags, Request};

use audit::audit;
use copies::{assert_stamped, assert_zero, stamp};
use free::FreeArea;
use gate::{Step, Verdict, assert_pages_agree, gated_machine};
use newcomers::bring_up_amid_churn;
use same::assert_same;
use small::{UNIT_BYTES, small_machine};

const PAGE: Request = Request::new(4096, 4096);

/// Areas of many sizes, with holes between them, on some three chunks; stamped.
fn areas_with_holes(pcpu: &SimAllocator) -> Vec<(usize, usize)> {
    let sizes = [13_000, 5000, 9000, 100, 4096, 12_000, 20_000, 3000, 17_000];
    let areas: Vec<_> = sizes
        .iter()
        .map(|&bytes| (pcpu.allocate(&Request::new(bytes, 8)).unwrap(), bytes))
        .collect();
    for hole in [2, 5] {
        pcpu.free_area(areas[hole].0, FreeFlags::empty()).unwrap();
    }
    pcpu.trim(0);
    let is_left =
        |(index, area): (usize, &(usize, usize))| (![2, 5].contains(&index)).then_some(*area);
    let left: Vec<_> = areas.iter().enumerate().filter_map(is_left).collect();
    for &area in &left {
        stamp(pcpu, area);
    }
    left
}

#[test]
fn copies_start_at_zero_with_pages_of_their_own() {
    for machine in [small_machine(4), small_machine(4).dirty_memory()] {
        let pcpu = machine.online(2).build().unwrap();
        let areas = areas_with_holes(&pcpu);
        let late = CpuId::new(3);
        // Memory of the third chunk that was used before, and is to be used by the new CPU too.
        let before = audit(&pcpu);
        assert!(before.stats.chunks > 2);
        pcpu.bring_up(late).unwrap();
        // The recount compares the pages of all materialised CPUs.
        assert_same(&before, &audit(&pcpu));
        for &area in &areas {
            assert_zero(&pcpu, area, late);
            for cpu in [0, 1].map(CpuId::new) {
                assert_stamped(&pcpu, area, cpu);
            }
            stamp(&pcpu, area);
        }
        // What is handed out from now on is zero there too, whatever it held before.
        for &(address, bytes) in &areas {
            pcpu.free_area(address, FreeFlags::empty()).unwrap();
            let again = pcpu.allocate(&Request::new(bytes, 8)).unwrap();
            for cpu in pcpu.units().possible().iter() {
                assert_zero(&pcpu, (again, bytes), cpu);
            }
            stamp(&pcpu, (again, bytes));
        }
        audit(&pcpu);
    }
}

#[test]
fn static_copies_are_there_from_the_start() {
    let pcpu = small_machine(3).online(0).build().unwrap();
    let base = pcpu.neutral_base();
    for cpu in pcpu.units().possible().iter() {
        assert_zero(&pcpu, (base, 1001), cpu);
    }
    assert_eq!(pcpu.units().materialised().count(), 0);
    pcpu.allocate(&Request::new(UNIT_BYTES, 4)).unwrap();
    audit(&pcpu);
}

#[test]
fn cpus_that_never_come_cost_nothing() {
    let machine = small_machine(240).online(2).spec(FirstChunkSpec::default());
    let pcpu = machine.build().unwrap();
    pcpu.backing().record();
    let areas = areas_with_holes(&pcpu);
    for (address, _) in areas {
        pcpu.free_area(address, FreeFlags::empty()).unwrap();
    }
    pcpu.trim(0);
    let (mut populated, mut given_back) = (0, 0);
    for call in pcpu.backing().recorded() {
        match call {
            Call::Populate { pages, cpus, .. } => {
                assert_eq!(cpus, [0, 1].map(CpuId::new));
                populated += pages.iter().flat_map(Clone::clone).count();
            }
            Call::Depopulate { pages, cpus, .. } => {
                assert_eq!(cpus, [0, 1].map(CpuId::new));
                given_back += pages.iter().flat_map(Clone::clone).count();
            }
            _ => {}
        }
    }
    assert!(populated > 8);
    assert_eq!(populated, given_back);
}

#[test]
fn a_cpu_comes_up_once() {
    let pcpu = small_machine(2).online(1).build().unwrap();
    let areas = areas_with_holes(&pcpu);
    let cpu = CpuId::new(1);
    pcpu.bring_up(cpu).unwrap();
    for &area in &areas {
        stamp(&pcpu, area);
    }
    // Coming back after having been offline takes no call at all, even where each would fail.
    pcpu.backing().record();
    pcpu.backing().set_faults(|_| true);
    for cpu in [0, 1].map(CpuId::new) {
        pcpu.bring_up(cpu).unwrap();
    }
    assert_eq!(pcpu.backing().recorded(), []);
    for &area in &areas {
        assert_stamped(&pcpu, area, cpu);
    }
}

#[test]
fn only_the_pages_that_areas_have_are_populated() {
    let pcpu = small_machine(2).online(1).build().unwrap();
    areas_with_holes(&pcpu);
    let pages: usize = audit(&pcpu)
        .sections
        .iter()
        .filter(|section| section.place != 0)
        .map(|section| section.pages.len())
        .sum();
    pcpu.backing().record();
    let cpu = CpuId::new(1);
    pcpu.bring_up(cpu).unwrap();
    let populated = pcpu
        .backing()
        .recorded()
        .into_iter()
        .map(|call| match call {
            Call::Populate { pages, cpus, .. } => {
                assert_eq!(cpus, [cpu]);
                pages.into_iter().flatten().count()
            }
            Call::BeginCpu { .. } | Call::FinishCpu { .. } => 0,
            other => panic!("{other:?}"),
        });
    assert_eq!(populated.sum::<usize>(), pages);
}

#[test]
fn a_failure_at_any_step_is_undone() {
    let pcpu = small_machine(3).online(1).build().unwrap();
    let areas = areas_with_holes(&pcpu);
    let cpu = CpuId::new(2);
    let before = audit(&pcpu);
    let mut steps = 0;
    loop {
        pcpu.backing().set_faults(move |call| call == steps);
        let result = pcpu.bring_up(cpu);
        assert_same(&before, &audit(&pcpu));
        if result.is_ok() {
            break;
        }
        let error = BackingError::OutOfFrames;
        assert_eq!(result, Err(CpuError::NoMemory { cpu, error }));
        assert!(!pcpu.units().materialised().contains(cpu));
        for &area in &areas {
            assert_zero(&pcpu, area, cpu);
            assert_stamped(&pcpu, area, CpuId::new(0));
        }
        steps += 1;
    }
    assert!(steps > 2, "beside the beginning there were several chunks");
    for &area in &areas {
        assert_zero(&pcpu, area, cpu);
    }
}

#[test]
fn cpus_come_up_amid_allocations() {
    let rounds = 30;
    for round in 0..rounds {
        let machine = small_machine(6).online(1);
        let machine = match round % 2 {
            0 => machine,
            _ => machine.dirty_memory(),
        };
        let pcpu = machine.build().unwrap();
        pcpu.backing().set_faults(move |call| call % 23 == round);
        bring_up_amid_churn(&pcpu, 1..6);
        pcpu.backing().set_faults(|_| false);
        pcpu.trim(0);
        let end = audit(&pcpu);
        assert_eq!((end.stats.live, end.stats.chunks), (0, 1));
    }
}

/// Pages that were about to be given back when a CPU began to come up: it waits for that.
#[test]
fn pages_on_their_way_back_do_not_stay() {
    let pcpu = gated_machine(2, 1);
    let [_, gone] = [(); 2].map(|()| pcpu.allocate(&PAGE).unwrap());
    pcpu.free_area(gone, FreeFlags::empty()).unwrap();
    let late = CpuId::new(1);
    let (sender, receiver) = mpsc::channel();
    let sender = Mutex::new(sender);
    pcpu.backing().set_guard(move |step| {
        if step == Step::Depopulate {
            let other = thread::spawn(move || pcpu.bring_up(late));
            // Time enough to begin, and to go wrong.
            thread::sleep(Duration::from_millis(30));
            assert!(!pcpu.units().materialised().contains(late));
            sender.lock().unwrap().send(other).unwrap();
        }
        Verdict::Pass
    });
    assert_eq!(pcpu.trim(0).pages_given_back, 1);
    receiver.recv().unwrap().join().unwrap().unwrap();
    assert!(pcpu.units().materialised().contains(late));
    assert_pages_agree(pcpu);
}

/// Pages that began to be populated before a CPU began to come up, and have their memory only after.
#[test]
fn pages_on_their_way_are_waited_for() {
    let pcpu = gated_machine(2, 1);
    let late = CpuId::new(1);
    static HAS_BEGUN: AtomicBool = AtomicBool::new(false);
    pcpu.backing().set_guard(move |step| {
        if let Step::Populate(_) = step {
            HAS_BEGUN.store(true, Ordering::Release);
            // Time enough for the CPU to come up, if it did not wait.
            thread::sleep(Duration::from_millis(30));
            assert!(!pcpu.units().materialised().contains(late));
        }
        Verdict::Pass
    });
    let other = thread::spawn(move || {
        while !HAS_BEGUN.load(Ordering::Acquire) {
            thread::yield_now();
        }
        pcpu.bring_up(late)
    });
    let page = pcpu.allocate(&PAGE).unwrap();
    other.join().unwrap().unwrap();
    assert_pages_agree(pcpu);
    assert_zero(pcpu, (page, 4096), late);
}

/// What is allocated, freed and given back in the midst of a CPU's coming up.
#[test]
fn nothing_waits_for_a_cpu_to_come_up() {
    let pcpu = gated_machine(2, 1);
    let late = CpuId::new(1);
    let [first, second, third] = [(); 3].map(|()| pcpu.allocate(&PAGE).unwrap());
    pcpu.free_area(second, FreeFlags::empty()).unwrap();
    static WAS_HERE: AtomicBool = AtomicBool::new(false);
    pcpu.backing().set_guard(move |step| {
        if step == Step::PopulateFor(late) && !WAS_HERE.swap(true, Ordering::Relaxed) {
            pcpu.free_area(third, FreeFlags::empty()).unwrap();
            assert_eq!(
                pcpu.upkeep().pages_given_back,
                0,
                "no page loses its memory"
            );
            let new = [(); 3].map(|()| pcpu.allocate(&PAGE).unwrap());
            for page in new {
                stamp(pcpu, (page, 4096));
            }
            pcpu.free_area(new[2], FreeFlags::empty()).unwrap();
        }
        Verdict::Pass
    });
    pcpu.bring_up(late).unwrap();
    assert!(WAS_HERE.load(Ordering::Relaxed));
    assert_pages_agree(pcpu);
    assert_zero(pcpu, (first, 4096), late);
    pcpu.upkeep();
    pcpu.trim(0);
    assert_pages_agree(pcpu);
}

/// Pages get memory for a CPU that is on its way too, and only after it failed to come.
#[test]
fn what_was_populated_for_a_cpu_that_did_not_come_is_given_back() {
    let pcpu = gated_machine(2, 1);
    let late = CpuId::new(1);
    // Page 1 alone has memory, so that three pages take two runs of new ones.
    let pages = [(); 3].map(|()| pcpu.allocate(&PAGE).unwrap());
    let rest = Request::new(UNIT_BYTES - 3 * 4096, 4);
    pcpu.allocate(&rest).unwrap();
    pcpu.free_area(pages[0], FreeFlags::empty()).unwrap();
    pcpu.free_area(pages[2], FreeFlags::empty()).unwrap();
    pcpu.trim(0);
    pcpu.free_area(pages[1], FreeFlags::empty()).unwrap();

    static IS_WANTED: AtomicBool = AtomicBool::new(false);
    static IS_HALF_DONE: AtomicBool = AtomicBool::new(false);
    let wait_for = |flag: &AtomicBool| {
        while !flag.load(Ordering::Acquire) {
            thread::yield_now();
        }
    };
    pcpu.backing().set_guard(move |step| match step {
        Step::PopulateFor(_) => {
            IS_WANTED.store(true, Ordering::Release);
            wait_for(&IS_HALF_DONE);
            Verdict::Fail
        }
        Step::Populate(0) => {
            IS_HALF_DONE.store(true, Ordering::Release);
            // Time for the other thread to see its failure; it waits for this call then.
            thread::sleep(Duration::from_millis(50));
            Verdict::Pass
        }
        _ => Verdict::Pass,
    });
    let other = thread::spawn(move || pcpu.bring_up(late));
    wait_for(&IS_WANTED);
    let three = Request::new(3 * 4096, 4096).with_flags(AllocFlags::ATOMIC);
    let area = pcpu.allocate(&three).unwrap();
    assert!(other.join().unwrap().is_err());
    assert_pages_agree(pcpu);
    assert_zero(pcpu, (area, 3 * 4096), late);
}

/// CPUs side by side and apart, at the borders of 64: each copy is zeroed, of any length, and nothing beside it.
#[test]
fn copies_of_any_cpus_are_zeroed_and_no_more() {
    let pcpu = small_machine(200).online(1).build().unwrap();
    for cpu in [1, 2, 5, 62, 63, 64, 65, 127, 130, 190, 191, 192, 199] {
        pcpu.bring_up(CpuId::new(cpu)).unwrap();
    }
    let materialised = || pcpu.units().materialised().iter();
    assert_eq!(materialised().count(), 14);
    for bytes in (4..=136).step_by(4) {
        let request = Request::new(bytes, 4);
        let areas = [0; 3].map(|_| (pcpu.allocate(&request).unwrap(), bytes));
        areas.iter().for_each(|&area| stamp(&pcpu, area));
        let [before, (area, _), behind] = areas;
        pcpu.free_area(area, FreeFlags::empty()).unwrap();
        pcpu.upkeep();
        let again = pcpu.allocate(&request).unwrap();
        assert_eq!(again, area, "{bytes} bytes");
        for cpu in materialised() {
            assert_zero(&pcpu, (again, bytes), cpu);
            assert_stamped(&pcpu, before, cpu);
            assert_stamped(&pcpu, behind, cpu);
        }
        // The next ones come behind these.
        stamp(&pcpu, (again, bytes));
    }
}
