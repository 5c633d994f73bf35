//! Interrupts and NMIs at every instruction of the two steps that per-CPU caches are made of, on a bare run: a slot is taken by one of
//! two, and none is lost. A step that is made of a look and a store shows that it would be seen.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use pcpu::this_cpu::gs::Gs;
use pcpu::this_cpu::slots::{FRESH, MAP};
use pcpu::this_cpu::{LocalOps, Put};
use pcpu::{CpuPair, Handle, LocalPair, PerCpu};

use super::sweep::{at_every_instruction_between, interrupted};
use super::{Test, Why};
use crate::cpus::local_apic::TimerKind;
use crate::ensure;
use crate::interrupts::{Frame, Hook};
use crate::percpu::Kernel;

pub const TESTS: &[Test] = &[Test::new(
    "a torn step of a run gives slots out twice and loses them; the real one does not",
    slots,
)];

/// What a run's second word says, and the bits of it that are looked at.
const CLASS: u64 = 7;

/// The pair that the handler works on.
static AT: AtomicUsize = AtomicUsize::new(0);
/// The slots that the handler got.
static GOT: AtomicU64 = AtomicU64::new(0);

/// A step on a run: which slots it got.
type Step = fn(usize) -> u64;

/// The two ways to do it, on the bare pair.
fn slots() -> Result<(), Why> {
    let run = PerCpu::<CpuPair<u64>, Kernel>::new()?;
    AT.store(run.handle().neutral(), Ordering::Relaxed);
    let cases: [(&str, Step, Hook, u64); 4] = [
        ("a torn take", take_torn, take_another, 3),
        ("a take", take_slot, take_another, 0),
        ("a torn put", put_torn, put_another, 2),
        ("a put", put_slot, put_another, 0),
    ];
    for (name, step, handler, expected) in cases {
        for kind in [TimerKind::Once, TimerKind::OnceNmi] {
            // Slots 0 and 1 are out when a put comes; a take takes any two.
            let is_put = name.ends_with("put");
            let start = if is_put { MAP - 0b11 } else { MAP };
            let mut wrong = 0;
            let before = || {
                GOT.store(0, Ordering::Relaxed);
                run.xchg((FRESH | start, CLASS));
            };
            let operation = |()| step(run.handle().neutral());
            let after = |own: u64| {
                let by_handler = GOT.load(Ordering::Relaxed);
                let slots = run.read().0 & MAP;
                let right = match is_put {
                    true => start | own | by_handler,
                    false => start & !own & !by_handler,
                };
                wrong += u64::from(own & by_handler != 0 || own == 0 || slots != right);
            };
            let sweep = at_every_instruction_between(kind, handler, before, operation, after);
            ensure!(
                wrong == expected,
                "{kind:?}: {name} goes wrong {wrong} times in {}, not {expected}",
                sweep.interrupts
            );
        }
    }
    Ok(())
}

/// Always open.
static GATE: AtomicU32 = AtomicU32::new(0);

fn take_slot(at: usize) -> u64 {
    // SAFETY: a live pair of this CPU's, changed by such operations and the handler's.
    let taken = unsafe { Gs::<Kernel>::take_slot(at, CLASS, u64::MAX, &GATE) };
    taken.map_or(0, |[slots, _]| slots & slots.wrapping_neg())
}

fn put_slot(at: usize) -> u64 {
    // SAFETY: as in `take_slot`.
    match unsafe { Gs::<Kernel>::put_slot(at, CLASS, 1, &GATE) } {
        Put::Done => 1,
        Put::WasFree | Put::Elsewhere => 0,
    }
}

fn take_another(_: &Frame) {
    interrupted();
    GOT.store(take_slot(AT.load(Ordering::Relaxed)), Ordering::Relaxed);
}

fn put_another(_: &Frame) {
    interrupted();
    // SAFETY: as in `take_slot`.
    let put = unsafe { Gs::<Kernel>::put_slot(AT.load(Ordering::Relaxed), CLASS, 2, &GATE) };
    GOT.store(if put == Put::Done { 2 } else { 0 }, Ordering::Relaxed);
}

/// Takes the lowest slot by a look and a store.
fn take_torn(at: usize) -> u64 {
    let slots: u64;
    // SAFETY: changes this CPU's copy of a pair, which is the point.
    unsafe {
        asm!("mov {slots}, gs:[{at}]", "lea {rest}, [{slots} - 1]", "and {rest}, {slots}", "mov gs:[{at}], {rest}",
            at = in(reg) at, slots = out(reg) slots, rest = out(reg) _, options(nostack));
    }
    slots & slots.wrapping_neg()
}

/// Puts slot 0 by a look and a store.
fn put_torn(at: usize) -> u64 {
    // SAFETY: as above.
    unsafe {
        asm!("mov {slots}, gs:[{at}]", "or {slots}, 1", "mov gs:[{at}], {slots}",
            at = in(reg) at, slots = out(reg) _, options(nostack));
    }
    1
}
