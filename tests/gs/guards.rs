//! Staying on a CPU.

use std::sync::atomic::{AtomicU64, Ordering};

use pcpu::this_cpu::gs::KernelStatic;
use pcpu::this_cpu::pinned::{Pinned, Preemption, PreemptionChecked};
use pcpu::{LocalCell, PerCpu, this_cpu_ptr};

use crate::kernel::{Cpu, Kernel, cpus};
use crate::statics::{CHECKED, GUARDED};

#[test]
fn a_guard_names_its_cpu_and_lends_its_copies() {
    let dynamic = PerCpu::<AtomicU64, Kernel>::new().unwrap();
    for cpu in cpus() {
        let _on = Cpu::enter(cpu);
        let pinned = Pinned::<Kernel>::new();
        assert_eq!(pinned.cpu(), cpu);
        assert!(std::ptr::eq(pinned.of(&GUARDED), GUARDED.get(cpu).unwrap()));
        assert!(std::ptr::eq(pinned.of(&dynamic), dynamic.get(cpu).unwrap()));
        pinned.of(&GUARDED).fetch_add(3, Ordering::Relaxed);
        pinned.of(&dynamic).fetch_add(4, Ordering::Relaxed);
    }
    for cpu in cpus() {
        assert_eq!(GUARDED.get(cpu).unwrap().load(Ordering::Relaxed), 4);
        assert_eq!(dynamic.get(cpu).unwrap().load(Ordering::Relaxed), 4);
    }
}

#[test]
fn guards_nest() {
    let _on = Cpu::enter(cpus().next().unwrap());
    assert!(!Kernel::is_preemption_disabled());
    let outer = Pinned::<Kernel>::new();
    let inner = Pinned::<Kernel>::new();
    drop(outer);
    assert!(Kernel::is_preemption_disabled());
    drop(inner);
    assert!(!Kernel::is_preemption_disabled());
}

#[test]
fn checked_operations_are_operations() {
    let cpu = cpus().last().unwrap();
    let _on = Cpu::enter(cpu);
    let _pinned = Pinned::<Kernel>::new();
    CHECKED.checked().add(20);
    CHECKED.checked().inc();
    assert_eq!(CHECKED.checked().xchg(9), 21);
    assert_eq!(CHECKED.checked().cmpxchg(9, 8), Ok(9));
    CHECKED.checked().dec();
    assert_eq!(CHECKED.checked().read(), 7);
    let here = this_cpu_ptr(CHECKED.checked()).unwrap();
    let copy: *const _ = CHECKED.get(cpu).unwrap();
    assert_eq!(here.as_ptr().cast_const(), copy);
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "preemption is enabled")]
fn a_checked_operation_that_may_migrate_is_caught() {
    let _on = Cpu::enter(cpus().next().unwrap());
    CHECKED.checked().inc();
}
