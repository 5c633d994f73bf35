//! Signals are to a thread what interrupts are to a CPU: a handler works on the same copy, between any two instructions.
//! What it changes must not get lost, nor what it interrupted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use pcpu::this_cpu;
use pcpu::{CpuCell, Handle, PerCpuPtr};

use crate::kernel::{Cpu, Kernel};
use crate::statics::STORM;

/// How many signals come to pass, at least.
const SIGNALS: u64 = 5_000;

static TAKEN: AtomicU64 = AtomicU64::new(0);
/// What exchanges put in: a number that no other puts in.
static PUT: AtomicU64 = AtomicU64::new(0);
/// The sum of what exchanges took out.
static EXCHANGED: AtomicU64 = AtomicU64::new(0);

fn lane(index: usize) -> PerCpuPtr<CpuCell<u64>, Kernel> {
    STORM.handle().cast().byte_add(index * 8).unwrap()
}

/// One of each kind of operation, whose effects can be told apart from any order of them.
fn operations(bit: u64) {
    // SAFETY: a static variable is live.
    unsafe {
        this_cpu::add(lane(0), 3);
        this_cpu::inc(lane(1));
        this_cpu::sub(lane(2), 5);
        this_cpu::add_return(lane(3), 7);
        // Each takes out what another put in, or the last one what is left.
        let own = PUT.fetch_add(1, Ordering::Relaxed);
        let found = this_cpu::xchg(lane(4), own);
        EXCHANGED.fetch_add(found, Ordering::Relaxed);
        let mut old = this_cpu::read(lane(5));
        while let Err(found) = this_cpu::cmpxchg(lane(5), old, old.wrapping_mul(3) + 1) {
            old = found;
        }
        // An even number of times.
        this_cpu::xor(lane(6), bit);
        this_cpu::xor(lane(6), bit);
        this_cpu::or(lane(7), bit);
        this_cpu::and(lane(7), !bit);
    }
}

extern "C" fn on_signal(_: libc::c_int) {
    operations(1 << 8);
    TAKEN.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn nothing_is_lost_between_a_thread_and_its_signals() {
    // SAFETY: the handler does what is allowed in one.
    unsafe { libc::signal(libc::SIGUSR1, on_signal as *const () as libc::sighandler_t) };
    let is_over = AtomicBool::new(false);
    let mut rounds = 0_u64;
    let cpu = Cpu::enter(pcpu::unit::CpuId::new(0));
    // SAFETY: names the calling thread, which outlives the scope.
    let here = unsafe { libc::pthread_self() };
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // SAFETY: the thread lives: it waits for this one.
                unsafe { libc::pthread_kill(here, libc::SIGUSR1) };
                thread::yield_now();
            }
        });
        while TAKEN.load(Ordering::Relaxed) < SIGNALS {
            operations(1);
            rounds += 1;
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let taken = TAKEN.load(Ordering::Relaxed);
    let all = rounds + taken;
    // SAFETY: a static variable is live.
    let left: [u64; 8] = std::array::from_fn(|index| unsafe { this_cpu::read(lane(index)) });
    drop(cpu);
    assert_eq!(left[..4], [3 * all, all, (5 * all).wrapping_neg(), 7 * all]);
    let put = all * (all - 1) / 2;
    assert_eq!(EXCHANGED.load(Ordering::Relaxed) + left[4], put);
    let mut tripled = 0_u64;
    for _ in 0..all {
        tripled = tripled.wrapping_mul(3).wrapping_add(1);
    }
    assert_eq!(left[5], tripled, "{all} times three and one");
    assert_eq!(left[6..], [0, 0]);
    println!("{rounds} rounds, {taken} signals");
}
