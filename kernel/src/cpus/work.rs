//! Work for all CPUs at once: the boot processor gives it out and waits; the others sleep until there is some.

use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use pcpu::unit::CpuId;
use x86_64::instructions::interrupts;

use super::local_apic;
use crate::interrupts::WORK_VECTOR;
use crate::machine::MAX_CPUS;
use crate::percpu::current_cpu;

/// What is to be done.
type Work<'a> = &'a (dyn Fn(CpuId) + Sync);

/// Points to a [`Work`] that is there until all CPUs have done it.
static WORK: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());
/// Counts the pieces of work; it changes after [`WORK`] was set.
static TURN: AtomicU32 = AtomicU32::new(0);
/// CPUs that have not finished yet.
static BUSY: AtomicU32 = AtomicU32::new(0);
/// CPUs that take part, besides the boot processor.
static HELPERS: AtomicU32 = AtomicU32::new(0);
/// Which ones.
static IS_HELPER: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];
/// Which ones are to leave.
static LEAVES: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];

/// Calls `work` once on every CPU that is online, at the same time, and returns when all are done. To be called by the
/// boot processor, from no interrupt and from no work.
pub fn on_all_cpus(work: Work<'_>) {
    assert_eq!(current_cpu(), CpuId::new(0), "work comes from CPU 0");
    assert_eq!(BUSY.load(Ordering::Relaxed), 0, "work within work");
    BUSY.store(HELPERS.load(Ordering::Relaxed), Ordering::Relaxed);
    WORK.store((&raw const work).cast_mut().cast(), Ordering::Relaxed);
    TURN.fetch_add(1, Ordering::Release);
    local_apic::interrupt_others(WORK_VECTOR);
    work(current_cpu());
    while BUSY.load(Ordering::Acquire) != 0 {
        core::hint::spin_loop();
    }
}

/// How many CPUs are online.
pub fn nr_online() -> u32 {
    HELPERS.load(Ordering::Acquire) + 1
}

/// The CPUs that are online.
pub fn online() -> impl Iterator<Item = CpuId> {
    let is_online = |cpu: &CpuId| cpu.get() == 0 || IS_HELPER[cpu.index()].load(Ordering::Acquire);
    (0..MAX_CPUS as u32).map(CpuId::new).filter(is_online)
}

/// Asks a CPU to leave, and waits until it has. To be called by the boot processor, from no interrupt and from no work.
///
/// # Panics
/// If the CPU is not online, or if it is the boot processor.
pub fn dismiss(cpu: CpuId) {
    assert!(
        IS_HELPER[cpu.index()].load(Ordering::Acquire),
        "CPU {cpu} is not online, or it is the boot processor"
    );
    LEAVES[cpu.index()].store(true, Ordering::Release);
    local_apic::interrupt_others(WORK_VECTOR);
    while IS_HELPER[cpu.index()].load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
}

/// What a CPU does after it was started: it counts as online from here on. It returns when it is to leave, with interrupts
/// enabled and nothing under way; it still answers shootdowns. [`left`] is to follow.
pub fn help() {
    let mut done = TURN.load(Ordering::Acquire);
    IS_HELPER[current_cpu().index()].store(true, Ordering::Release);
    HELPERS.fetch_add(1, Ordering::AcqRel);
    loop {
        // Masked, so that an interrupt that comes after the look still ends the sleep.
        interrupts::disable();
        let turn = TURN.load(Ordering::Acquire);
        if turn == done {
            if LEAVES[current_cpu().index()].swap(false, Ordering::Acquire) {
                return interrupts::enable();
            }
            interrupts::enable_and_hlt();
            continue;
        }
        interrupts::enable();
        done = turn;
        // SAFETY: the giver waits in `on_all_cpus`, where the reference lives, until `BUSY` is 0.
        let work = unsafe { *WORK.load(Ordering::Relaxed).cast::<Work<'_>>() };
        work(current_cpu());
        BUSY.fetch_sub(1, Ordering::Release);
    }
}

/// This CPU does not count as online any more.
pub fn left(cpu: CpuId) {
    HELPERS.fetch_sub(1, Ordering::AcqRel);
    // Last of all: who waits for it may start the CPU anew.
    IS_HELPER[cpu.index()].store(false, Ordering::Release);
}
