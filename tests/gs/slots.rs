//! Slots in a kernel: against the model, and that none is lost or of two owners between a CPU and its interrupts, nor between
//! CPUs.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::thread;

use pcpu::this_cpu::gs::Gs;
use pcpu::this_cpu::{LocalOps, Pair, RemotePairs};
use pcpu::{CpuPair, Handle, PerCpu};

use crate::kernel::{Cpu, Kernel, cpus};
use crate::model_of_slots::{Gates, Hand, Ledger, check_model};

fn runs() -> PerCpu<CpuPair<u64>, Kernel> {
    PerCpu::new().expect("there is memory")
}

#[test]
fn slots_are_taken_and_put_as_in_the_model() {
    const STEPS: u64 = 100_000;
    assert_eq!(Gs::<Kernel>::remote_pairs(), RemotePairs::Never);
    for cpu in cpus() {
        let runs = runs();
        let at = runs.handle().neutral();
        let on = Cpu::enter(cpu);
        // SAFETY: the pair lives; the thread has the CPU.
        unsafe { check_model::<Gs<Kernel>>(at, cpu.get().into(), STEPS, Gates::Ignored) };
        drop(on);
        let others = runs.iter().filter(|&(other, _)| other != cpu);
        assert!(
            others
                .map(|(_, copy)| copy.read_remote())
                .all(|pair| pair == (0, 0))
        );
    }
}

/// What a signal handler works with.
struct Interrupted {
    ledger: Ledger,
    hand: Hand,
    at: usize,
}

/// Null: no thread is to be interrupted.
static INTERRUPTED: AtomicPtr<Interrupted> = AtomicPtr::new(ptr::null_mut());
static TAKEN: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(_: libc::c_int) {
    // SAFETY: it is not null while the thread that is interrupted keeps it alive.
    let interrupted = unsafe { INTERRUPTED.load(Ordering::Acquire).as_ref() };
    if let Some(Interrupted { ledger, hand, at }) = interrupted {
        // Enough for a slot to be taken, and one to be put.
        for _ in 0..8 {
            // SAFETY: the pair lives, and only the ledger changes it.
            unsafe { ledger.step::<Gs<Kernel>>(*at, hand) };
        }
        TAKEN.fetch_add(1, Ordering::Relaxed);
    }
}

/// Says that it is over, also if the test fails.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        INTERRUPTED.store(ptr::null_mut(), Ordering::Release);
    }
}

#[test]
fn a_slot_has_one_owner() {
    const SIGNALS: u64 = 5_000;
    let runs = runs();
    let at = runs.handle().neutral();
    let interrupted = Interrupted {
        ledger: Ledger::new(),
        hand: Hand::new(1),
        at,
    };
    let ledger = &interrupted.ledger;
    // SAFETY: the handler does what is allowed in one.
    unsafe { libc::signal(libc::SIGUSR2, on_signal as *const () as libc::sighandler_t) };
    let is_over = AtomicBool::new(false);
    let hands = thread::scope(|scope| {
        let is_over = &is_over;
        let ending = Ending(is_over);
        let others = cpus().skip(1).map(|cpu| {
            let hand = Hand::new(10 + cpu.index());
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let _on = Cpu::enter(cpu);
                    // SAFETY: the pair lives, and only the ledger changes it.
                    (0..1000).for_each(|_| unsafe { ledger.step::<Gs<Kernel>>(at, &hand) });
                }
                hand
            })
        });
        let others: Vec<_> = others.collect();
        let on = Cpu::enter(cpus().next().expect("some"));
        // SAFETY: names the calling thread, which outlives the scope.
        let here = unsafe { libc::pthread_self() };
        INTERRUPTED.store((&raw const interrupted).cast_mut(), Ordering::Release);
        scope.spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                // SAFETY: the thread lives: it waits for this one.
                unsafe { libc::pthread_kill(here, libc::SIGUSR2) };
                thread::yield_now();
            }
        });
        let hand = Hand::new(2);
        let copies = runs
            .iter()
            .map(|(_, copy)| (&raw const *copy).cast_mut().cast());
        // SAFETY: these are the copies; and nothing is done to them, for no CPU changes another's pair here.
        unsafe { ledger.drain::<Gs<Kernel>>(&hand, copies) };
        while TAKEN.load(Ordering::Relaxed) < SIGNALS {
            // SAFETY: the pair lives, and only the ledger changes it.
            unsafe { ledger.step::<Gs<Kernel>>(at, &hand) };
        }
        drop(ending);
        drop(on);
        let others = others.into_iter();
        let mut hands: Vec<_> = others
            .map(|other| other.join().expect("it passes"))
            .collect();
        hands.push(hand);
        hands
    });
    let Interrupted { ledger, hand, .. } = interrupted;
    let hands: Vec<_> = hands.into_iter().chain([hand]).collect();
    let words = |copy: &CpuPair<u64>| Pair::from(copy.read_remote());
    ledger.settle(&hands, runs.iter().map(|(_, copy)| words(copy)));
}
