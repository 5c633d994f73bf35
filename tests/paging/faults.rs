//! Every allocation of a frame fails in turn: whatever it was for is refused by a typed error, leaves nothing behind, and
//! succeeds the next time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use pcpu::unit::CpuId;
use pcpu::{AllocError, AllocFlags, CpuError, FreeFlags, Request};

use crate::copies::{assert_stamped, assert_zero, stamp, stamp_one};
use crate::free::FreeArea;
use crate::machine::{BASE, Front, Machine, Shape};

const SHAPE: Shape = Shape {
    cpus: 4,
    nodes: 1,
    online: 1,
    // A level-1 table for each chunk.
    unit_bytes: 2 << 20,
    static_bytes: 5001,
    reserved_bytes: 2048,
    frames_of_a_node: 4000,
    max_chunks: u32::MAX,
    front: Front::Nothing,
};

#[derive(Debug, Clone, Copy)]
enum Step {
    Alloc(usize, AllocFlags),
    /// By its number.
    Free(usize),
    Trim,
    BringUp(u32),
}
use Step::{Alloc, BringUp, Free, Trim};

const PLAIN: AllocFlags = AllocFlags::empty();
const LARGEST: usize = 32 << 10;

/// A chunk for two CPUs, twice, and for one more while there is a chunk.
const SCRIPT: &[Step] = &[
    Alloc(100, PLAIN),
    Alloc(9000, AllocFlags::ATOMIC),
    BringUp(1),
    Alloc(LARGEST, PLAIN),
    Free(2),
    Trim,
    Alloc(LARGEST, AllocFlags::ATOMIC),
    Alloc(20_000, PLAIN),
    Free(3),
    BringUp(3),
    Alloc(LARGEST, PLAIN),
    Trim,
    BringUp(0),
    BringUp(2),
];

/// Runs the script on a machine where allocations of frames fail. A step that fails is repeated without failures. How many
/// allocations there were, and how many steps failed, the boot among them.
fn run(steps: &[Step], fails: impl Fn(u64) -> bool + Send + 'static) -> (u64, u32) {
    let is_on = Arc::new(AtomicBool::new(true));
    let failed = AtomicU32::new(0);
    let host = SHAPE.host();
    let faults = is_on.clone();
    host.set_faults(move |call| faults.load(Ordering::Relaxed) && fails(call));
    let act = |machine: Machine<'_, '_>| {
        let mut live: Vec<Option<(usize, usize)>> = Vec::new();
        for &step in steps {
            let before = host.out();
            machine.host.may_flush.store(true, Ordering::Relaxed);
            if !try_step(&machine, step, &mut live) {
                failed.fetch_add(1, Ordering::Relaxed);
                machine.audit();
                // A chunk that was made before its pages failed stays as a spare one; an atomic request that could not make
                // a chunk leaves its metadata to the next.
                machine.pcpu.trim(0);
                // SAFETY: nobody frees meanwhile.
                unsafe { machine.pcpu.trim_metadata() };
                let kept = machine.paging.stats().metadata_pages_kept as usize;
                let is_atomic = matches!(step, Alloc(_, AllocFlags::ATOMIC));
                assert!(kept == 0 || is_atomic, "{step:?}: {kept} pages of metadata");
                // With them a table to map them by.
                let left = kept + usize::from(kept > 0);
                assert!(host.out().len() <= before.len() + left, "{step:?}");
                is_on.store(false, Ordering::Relaxed);
                assert!(try_step(&machine, step, &mut live), "{step:?} again");
                is_on.store(true, Ordering::Relaxed);
            }
        }
        machine.audit();
        for area in live.into_iter().flatten() {
            machine.pcpu.free_area(area.0, FreeFlags::empty()).unwrap();
        }
        machine.pcpu.trim(0);
        // SAFETY: nobody frees meanwhile.
        unsafe { machine.pcpu.trim_metadata() };
        machine.audit();
    };
    if let Err(error) = SHAPE.run_on(&host, act) {
        assert!(!error.to_string().contains('\n'), "{error}");
        failed.fetch_add(1, Ordering::Relaxed);
        is_on.store(false, Ordering::Relaxed);
        SHAPE
            .run_on(&host, |machine| machine.audit())
            .expect("nothing fails");
    }
    (host.calls(), failed.load(Ordering::Relaxed))
}

/// Whether the step succeeded.
fn try_step(machine: &Machine<'_, '_>, step: Step, live: &mut Vec<Option<(usize, usize)>>) -> bool {
    let pcpu = machine.pcpu;
    match step {
        Alloc(bytes, flags) => {
            let is_atomic = flags.contains(AllocFlags::ATOMIC);
            machine.host.may_flush.store(!is_atomic, Ordering::Relaxed);
            let result = pcpu.allocate(&Request::new(bytes, 8).with_flags(flags));
            machine.host.may_flush.store(true, Ordering::Relaxed);
            match result {
                Ok(address) => {
                    for cpu in pcpu.units().possible().iter() {
                        assert_zero(pcpu, (address, bytes), cpu);
                    }
                    stamp(pcpu, (address, bytes));
                    live.push(Some((address, bytes)));
                    true
                }
                Err(AllocError::Backing(_)) => false,
                Err(error) => panic!("{error}"),
            }
        }
        Free(number) => {
            let area = live[number].take().expect("it is live");
            for cpu in pcpu.units().materialised().iter() {
                assert_stamped(pcpu, area, cpu);
            }
            pcpu.free_area(area.0, FreeFlags::empty()).unwrap();
            true
        }
        Trim => {
            pcpu.trim(0);
            // SAFETY: nobody frees meanwhile.
            unsafe { pcpu.trim_metadata() };
            true
        }
        BringUp(cpu) => {
            let cpu = CpuId::new(cpu);
            let was_up = pcpu.units().materialised().contains(cpu);
            match pcpu.bring_up(cpu) {
                Ok(()) => {
                    for &area in live.iter().flatten() {
                        if !was_up {
                            assert_zero(pcpu, area, cpu);
                        }
                        stamp(pcpu, area);
                    }
                    true
                }
                Err(CpuError::NoMemory { .. }) => {
                    assert!(!pcpu.units().materialised().contains(cpu));
                    for &area in live.iter().flatten() {
                        assert_zero(pcpu, area, cpu);
                        assert_stamped(pcpu, area, CpuId::new(0));
                    }
                    false
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn each_allocation_fails_once() {
    let (calls, failed) = run(SCRIPT, |_| false);
    assert_eq!(failed, 0);
    println!("{calls} allocations of a frame");
    for nth in 0..calls {
        let (_, failed) = run(SCRIPT, move |call| call == nth);
        assert!(failed <= 1, "{failed} steps failed by allocation {nth}");
    }
}

#[test]
fn all_allocations_from_one_on_fail() {
    let (calls, _) = run(SCRIPT, |_| false);
    for nth in (0..calls).step_by(5) {
        let (_, failed) = run(SCRIPT, move |call| call >= nth);
        assert!(failed > 0, "from allocation {nth} on");
    }
}

/// The boot CPU has the first chunk from its builder: failing to bring it up takes nothing of that away.
#[test]
fn a_cpu_that_was_built_keeps_its_first_chunk() {
    let shape = Shape { online: 0, ..SHAPE };
    shape.run(|machine| {
        let (pcpu, boot_cpu) = (machine.pcpu, CpuId::new(0));
        let area = (pcpu.allocate(&Request::new(20_000, 8)).unwrap(), 20_000);
        let first = pcpu.sizes().static_bytes();
        let written = (BASE + first + 100, 1000);
        stamp_one(pcpu, written, boot_cpu);
        let before = machine.host.out();
        let mut failures = 0;
        loop {
            machine.host.set_faults(move |call| call == failures);
            let result = pcpu.bring_up(boot_cpu);
            assert_stamped(pcpu, written, boot_cpu);
            if result.is_ok() {
                break;
            }
            assert_eq!(machine.host.out(), before);
            assert_zero(pcpu, area, boot_cpu);
            failures += 1;
        }
        // A directory, two tables, five pages.
        assert_eq!(failures, 8);
        stamp(pcpu, area);
        assert_stamped(pcpu, area, boot_cpu);
        machine.audit();
    });
}
