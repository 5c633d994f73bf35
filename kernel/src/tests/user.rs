//! Users on every CPU, and the border between their GS base and the kernel's.

use core::sync::atomic::{AtomicU64, Ordering};

use pcpu::LocalCell;

use super::{Test, Why, by_turns, copy_of};
use crate::cpus::local_apic::{self, TimerKind};
use crate::cpus::work::online;
use crate::interrupts::Frame;
use crate::user::{self, CALLS, TICKS_IN_USER};
use crate::{ensure, interrupts};

pub const TESTS: &[Test] = &[Test::new(
    "users on every CPU: calls counted exactly under the timer",
    users_count,
)];

const CALLS_WANTED: u64 = 200;
const TICKS_WANTED: u64 = 5;

/// In ticks of 1 ns.
const TIMER_PERIOD: u32 = 300_000;

/// Counts the timer's interrupts that find a user.
pub fn tick(frame: &Frame) {
    if frame.cs & 3 == 3 {
        TICKS_IN_USER.inc();
    }
}

fn users_count() -> Result<(), Why> {
    let (lost, calls) = (AtomicU64::new(0), AtomicU64::new(0));
    let counted = || online().map(|cpu| copy_of(&CALLS, cpu)).sum::<u64>();
    let before = counted();
    interrupts::on_timer(Some(tick));
    by_turns(|cpu| {
        local_apic::start_timer(TimerKind::Periodic, TIMER_PERIOD);
        let ended = user::run(cpu, CALLS_WANTED, TICKS_WANTED);
        local_apic::stop_timer();
        lost.fetch_add(u64::from(ended.status != 0), Ordering::Relaxed);
        calls.fetch_add(ended.calls, Ordering::Relaxed);
    });
    interrupts::on_timer(None);
    let (lost, calls, counted) = (lost.into_inner(), calls.into_inner(), counted() - before);
    ensure!(lost == 0, "{lost} users lost their GS base");
    ensure!(
        counted == calls,
        "{counted} calls counted, {calls} were made"
    );
    for cpu in online() {
        let (calls, ticks) = (copy_of(&CALLS, cpu), copy_of(&TICKS_IN_USER, cpu));
        ensure!(
            calls >= CALLS_WANTED && ticks >= TICKS_WANTED,
            "CPU {cpu}: {calls} calls, {ticks} ticks"
        );
    }
    Ok(())
}
