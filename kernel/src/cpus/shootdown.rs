//! Making all CPUs forget translations: whoever changed the tables interrupts the others and waits for their answers.
//!
//! One CPU asks at a time. Nobody masks interrupts while it waits for its turn or for answers, so that CPUs that ask at the
//! same time answer each other.
//!
//! What always holds: a CPU that counts as running has its APIC enabled, so that no question is lost; it has forgotten
//! all that it knew from before it counted; and it leaves in a turn of its own, so that nobody waits for it. Nothing here is
//! a per-CPU variable: what is being flushed may be one's own copies.

use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering, fence};

use pcpu::backing::paging::Stale;
use pcpu::unit::CpuId;
use x86_64::VirtAddr;
use x86_64::instructions::{interrupts, tlb};

use super::local_apic;
use crate::interrupts::FLUSH_VECTOR;
use crate::machine::MAX_CPUS;
use crate::memory::PAGE_BYTES;
use crate::percpu::current_cpu;

/// The most pages that are forgotten one by one.
const MAX_PAGES: usize = 64;

/// Whether a CPU is asking.
static TURN: AtomicBool = AtomicBool::new(false);
/// Points to a [`Stale`] that is there until all CPUs have answered.
static STALE: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());
/// Which CPUs answer.
static RUNS: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];
/// Which of them have not answered yet.
static ASKED: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];

/// This CPU answers from here on. To be called with interrupts masked, after its APIC is enabled.
pub fn join(cpu: CpuId) {
    RUNS[cpu.index()].store(true, Ordering::Relaxed);
    // Either who changes tables sees it here, or the flush comes after the change.
    fence(Ordering::SeqCst);
    tlb::flush_all();
}

/// This CPU does not answer any more. To be called with interrupts enabled: it answers until it has its turn.
pub fn leave(cpu: CpuId) {
    with_turn(|| RUNS[cpu.index()].store(false, Ordering::Relaxed));
}

/// Makes all CPUs that run forget what is stale.
///
/// # Panics
/// If interrupts are masked while other CPUs run: two CPUs could wait for each other.
pub fn flush(stale: Stale<'_>) {
    // The tables were changed before.
    fence(Ordering::SeqCst);
    let runs = |&cpu: &usize| RUNS[cpu].load(Ordering::Relaxed);
    if !(0..MAX_CPUS).any(|cpu| runs(&cpu)) {
        // The boot processor, on its way up: it does not even know its number.
        return flush_here(stale);
    }
    let this = current_cpu();
    let others = || (0..MAX_CPUS).filter(|&cpu| cpu != this.index());
    if !others().any(|cpu| runs(&cpu)) {
        return flush_here(stale);
    }
    with_turn(|| {
        STALE.store((&raw const stale).cast_mut().cast(), Ordering::Relaxed);
        others()
            .filter(runs)
            .for_each(|cpu| ASKED[cpu].store(true, Ordering::Release));
        local_apic::interrupt_others(FLUSH_VECTOR);
        flush_here(stale);
        for cpu in others() {
            while ASKED[cpu].load(Ordering::Acquire) {
                spin_loop();
            }
        }
    });
}

/// Does something while no other CPU asks, and none leaves.
fn with_turn(act: impl FnOnce()) {
    assert!(
        interrupts::are_enabled(),
        "a shootdown with interrupts masked"
    );
    while TURN.swap(true, Ordering::Acquire) {
        spin_loop();
    }
    act();
    TURN.store(false, Ordering::Release);
}

/// The answer: called by the interrupt handler of a CPU that may have been asked.
pub fn answer() {
    let asked = &ASKED[current_cpu().index()];
    if asked.load(Ordering::Acquire) {
        // SAFETY: who asked waits in `flush`, where the ranges live, until this CPU is not asked any more.
        flush_here(unsafe { *STALE.load(Ordering::Relaxed).cast::<Stale<'_>>() });
        asked.store(false, Ordering::Release);
    }
}

fn flush_here(stale: Stale<'_>) {
    if stale.pages() > MAX_PAGES {
        return tlb::flush_all();
    }
    for range in stale.ranges() {
        range
            .step_by(PAGE_BYTES)
            .for_each(|page| tlb::flush(VirtAddr::new(page as u64)));
    }
}
