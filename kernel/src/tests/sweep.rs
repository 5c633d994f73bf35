//! Interrupts at every instruction of an operation, one after the other. This needs a machine whose clock counts
//! instructions (`cargo xtask kernel --icount`): there a timer set to `k` interrupts exactly `k` instructions later.
//!
//! It is how to show that an operation is safe against interrupts, and not only that it seemed so.

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpus::local_apic::{self, TimerKind};
use crate::interrupts::{self, Hook};

/// Instructions before and after the operation that do nothing.
const PAD: u64 = 32;

/// Interrupts since the last look.
static INTERRUPTS: AtomicU64 = AtomicU64::new(0);

/// What a sweep did.
pub struct Sweep {
    /// How often the operation ran, interrupted or not.
    pub runs: u64,
    /// How often it was interrupted.
    pub interrupts: u64,
}

/// Runs `operation` again and again on this CPU, each time with the interrupt one instruction later, until it gets through
/// before the interrupt comes. `handler` is called with every interrupt and must call [`interrupted`].
///
/// The other CPUs must be asleep: the clock counts the instructions of all CPUs.
///
/// # Panics
/// If a run but the last was not interrupted exactly once.
pub fn at_every_instruction(kind: TimerKind, handler: Hook, mut operation: impl FnMut()) -> Sweep {
    at_every_instruction_between(kind, handler, || {}, |()| operation(), |()| {})
}

/// [`at_every_instruction`], with something before and after each run that is not interrupted.
///
/// # Panics
/// As [`at_every_instruction`].
pub fn at_every_instruction_between<T, U>(
    kind: TimerKind,
    handler: Hook,
    mut before: impl FnMut() -> T,
    mut operation: impl FnMut(T) -> U,
    mut after: impl FnMut(U),
) -> Sweep {
    match kind {
        TimerKind::OnceNmi => interrupts::on_nmi(Some(handler)),
        TimerKind::Once | TimerKind::Periodic => interrupts::on_timer(Some(handler)),
    }
    let mut sweep = Sweep {
        runs: 0,
        interrupts: 0,
    };
    for count in 1.. {
        let prepared = before();
        INTERRUPTS.store(0, Ordering::Relaxed);
        local_apic::start_timer(kind, count);
        pad();
        let result = operation(prepared);
        pad();
        local_apic::stop_timer();
        after(result);
        sweep.runs += 1;
        let came = INTERRUPTS.load(Ordering::Relaxed);
        sweep.interrupts += came;
        assert!(came <= 1, "interrupted {came} times by a timer of {count}");
        if came == 0 {
            break;
        }
    }
    interrupts::on_timer(None);
    interrupts::on_nmi(None);
    // At least at every instruction that only fills.
    assert!(
        sweep.interrupts >= 2 * PAD,
        "only {} interrupts",
        sweep.interrupts
    );
    sweep
}

/// Some instructions that do nothing: the timer becomes exact a few instructions after it was set, and is stopped by
/// several.
fn pad() {
    // SAFETY: it does nothing.
    unsafe {
        asm!(
            ".rept {pad}",
            "nop",
            ".endr",
            pad = const PAD,
            options(nomem, nostack, preserves_flags)
        )
    };
}

/// To be called by a handler: counts the interrupt.
pub fn interrupted() {
    INTERRUPTS.fetch_add(1, Ordering::Relaxed);
}
