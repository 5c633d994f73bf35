//! Slots: what taking and putting does to a run, who may do it, and that no slot gets lost or is of two threads.

use std::cell::Cell;
use std::sync::atomic::AtomicU32;

use pcpu::global::method;
use pcpu::this_cpu::process::{Method, ProcessOps};
use pcpu::this_cpu::slots::FRESH;
use pcpu::this_cpu::{LocalOps, Pair, Put, RemotePairs};
use pcpu::{CpuCell, CpuPair, Handle, PerCpu, RemoteCell, global};

use crate::child::run_in_child;
use crate::crew::{Crew, without_restartable_sequences};
use crate::model_of_slots::{Gates, Hand, Ledger, check_model};
use crate::system::{allowed_cpus, on_cpu, unregister};
use crate::whirl::{Handlers, whirl};

fn runs() -> PerCpu<CpuPair<u64>> {
    PerCpu::new().expect("there is memory")
}

fn check_on_every_cpu() {
    const STEPS: u64 = 200_000;
    let gates = match method() {
        Method::RestartableSequences => Gates::Tested,
        Method::Locked => Gates::Ignored,
    };
    for cpu in allowed_cpus() {
        let runs = runs();
        let at = runs.handle().neutral();
        // SAFETY: the pair lives; the thread stays on the CPU.
        on_cpu(cpu, || unsafe {
            check_model::<ProcessOps>(at, cpu.get().into(), STEPS, gates);
        });
        let others = runs.iter().filter(|&(other, _)| other != cpu);
        assert!(
            others
                .map(|(_, copy)| copy.read_remote())
                .all(|pair| pair == (0, 0))
        );
    }
}

#[test]
fn slots_are_taken_and_put_as_in_the_model() {
    check_on_every_cpu();
}

#[test]
fn slots_are_taken_and_put_without_restartable_sequences() {
    let name = "slots::slots_are_taken_and_put_without_restartable_sequences";
    without_restartable_sequences(name, || {
        assert_eq!(method(), Method::Locked);
        assert_eq!(ProcessOps::remote_pairs(), RemotePairs::ByLockedStep);
        assert!(!ProcessOps::has_gates());
        check_on_every_cpu();
    });
}

/// A word is replaced by its CPU, and only if it is what it was taken for.
fn check_words_on_every_cpu() {
    for cpu in allowed_cpus() {
        let words = PerCpu::<CpuCell<u64>>::new().expect("there is memory");
        let at = words.handle().neutral();
        // SAFETY: the word lives, and is changed by these operations only.
        on_cpu(cpu, || unsafe {
            assert_eq!(ProcessOps::peek_word(at), Some(0));
            assert!(!ProcessOps::replace_word(at, 1, 2));
            assert_eq!(ProcessOps::peek_word(at), Some(0));
            assert!(ProcessOps::replace_word(at, 0, u64::MAX));
            assert!(!ProcessOps::replace_word(at, 0, 3));
            assert_eq!(ProcessOps::peek_word(at), Some(u64::MAX));
        });
        assert_eq!(words.sum(), u64::MAX, "no other copy has changed");
    }
}

#[test]
fn words_are_replaced_as_they_were() {
    check_words_on_every_cpu();
}

#[test]
fn words_are_replaced_without_restartable_sequences() {
    let name = "slots::words_are_replaced_without_restartable_sequences";
    without_restartable_sequences(name, check_words_on_every_cpu);
}

/// A thread that is not registered has no run to work on where others have.
#[test]
fn a_stray_has_no_slots() {
    const RUN: Pair = [FRESH | 1, 7];
    static GATE: AtomicU32 = AtomicU32::new(0);
    let runs = runs();
    let at = runs.handle().neutral();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let is_stray = unregister() && method() == Method::RestartableSequences;
            // SAFETY: the pair lives, and is changed by these operations only.
            unsafe {
                assert_eq!(ProcessOps::peek_pair(at), (!is_stray).then_some([0; 2]));
                let is_open = ProcessOps::replace_pair_gated(at, [0; 2], RUN, &GATE);
                assert_eq!(is_open, !is_stray);
                if is_stray {
                    assert_eq!(ProcessOps::take_slot(at, 0, 0, &GATE), None);
                    assert_eq!(ProcessOps::put_slot(at, 0, 1, &GATE), Put::Elsewhere);
                    let is_untouched = |(_, copy): (_, &CpuPair<u64>)| copy.read_remote() == (0, 0);
                    assert!(runs.iter().all(is_untouched));
                }
            }
        });
    });
}

/// What the first operation on a CPU without memory is, it comes to pass there. See `homes` for the way to such a CPU.
fn first_operations(first: usize) {
    static GATE: AtomicU32 = AtomicU32::new(0);
    let cpus = allowed_cpus();
    let cpu = cpus[cpus.len() - 1];
    if cpu == cpus[0] {
        println!("there is one CPU, which the allocator has opened");
        return;
    }
    // Allocating opens the CPU that it is done on, and those below.
    let runs = on_cpu(cpus[0], runs);
    let at = runs.handle().neutral();
    // SAFETY: the pair lives, and is changed by these operations only.
    on_cpu(cpu, || unsafe {
        assert!(!global().units().materialised().contains(cpu));
        match first {
            0 => assert_eq!(ProcessOps::take_slot(at, 0, 0, &GATE), None),
            1 => assert_eq!(ProcessOps::put_slot(at, 0, 1, &GATE), Put::Done),
            2 => assert!(ProcessOps::replace_pair_gated(
                at,
                [0; 2],
                [FRESH | 1, 7],
                &GATE
            )),
            _ => assert_eq!(ProcessOps::peek_pair(at), Some([0; 2])),
        }
        assert!(global().units().materialised().contains(cpu));
        let expected = [[0; 2], [1, 0], [FRESH | 1, 7], [0; 2]][first];
        assert_eq!(ProcessOps::peek_pair(at), Some(expected));
    });
}

macro_rules! first_operation {
    ($($name:ident: $first:literal;)+) => {$(
        #[test]
        fn $name() {
            let name = concat!("slots::", stringify!($name));
            if !run_in_child(name, |command| { command.env("PCPU_TEST_FIRST", ""); }) {
                first_operations($first);
            }
        }
    )+};
}

first_operation! {
    a_take_opens_its_cpu: 0;
    a_put_opens_its_cpu: 1;
    a_replacement_opens_its_cpu: 2;
    a_look_opens_its_cpu: 3;
}

fn storm(crew: Crew, part: u64) {
    // How many operations there are to one that takes all free slots from all CPUs.
    const UNTIL_DRAIN: u64 = 1024;
    let runs = runs();
    let at = runs.handle().neutral();
    let ledger = Ledger::new();
    let copy = |cpu| {
        let copy: *const CpuPair<u64> = runs.get(cpu).expect("a possible CPU");
        copy.cast_mut().cast::<Pair>()
    };
    let hands = whirl(crew, Handlers::Work, part, Hand::new, |hand| {
        if hand.random().is_multiple_of(UNTIL_DRAIN) {
            let cpus = global().units().materialised().iter();
            // SAFETY: these are the copies of the pair.
            unsafe { ledger.drain::<ProcessOps>(hand, cpus.map(copy)) };
        } else {
            // SAFETY: the pair lives, and only the ledger changes it.
            unsafe { ledger.step::<ProcessOps>(at, hand) };
        }
    });
    let words = |copy: &CpuPair<u64>| Pair::from(copy.read_remote());
    ledger.settle(&hands, runs.iter().map(|(_, copy)| words(copy)));
}

#[test]
fn a_slot_has_one_owner_in_a_storm() {
    storm(Crew::REGISTERED, 1);
}

#[test]
fn a_slot_has_one_owner_among_strays() {
    storm(Crew::FEW_STRAYS, 10);
}

#[test]
fn a_slot_has_one_owner_without_restartable_sequences() {
    let name = "slots::a_slot_has_one_owner_without_restartable_sequences";
    without_restartable_sequences(name, || storm(Crew::REGISTERED, 10));
}

/// The second word belongs to the first.
fn second_of(first: u64) -> u64 {
    first.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Adds to pairs, by a look and a replacement, until it has come to pass.
fn storm_of_replacements(crew: Crew, part: u64) {
    static GATE: AtomicU32 = AtomicU32::new(0);
    let pairs = runs();
    let at = pairs.handle().neutral();
    let hands = whirl(
        crew,
        Handlers::Work,
        part,
        |number| (Hand::new(number), Cell::new(0_u64)),
        |(hand, sum)| {
            let value = hand.random();
            sum.set(sum.get().wrapping_add(value));
            loop {
                // SAFETY: the pair lives, and is changed here only.
                let is_replaced = unsafe {
                    let old = ProcessOps::peek_pair(at).expect("every thread is registered");
                    let first = old[0].wrapping_add(value);
                    let new = [first, second_of(first)];
                    let is_replaced = ProcessOps::replace_pair_gated(at, old, new, &GATE);
                    // What was only looked at may be of two times.
                    assert!(
                        !is_replaced || old[1] == second_of(old[0]),
                        "the words have parted"
                    );
                    is_replaced
                };
                if is_replaced {
                    break;
                }
            }
        },
    );
    let add = |sum: u64, value: u64| sum.wrapping_add(value);
    let accounted = hands.iter().map(|(_, sum)| sum.get()).fold(0, add);
    let copies = pairs.iter().map(|(_, copy)| copy.read_remote());
    let check = |(first, second)| {
        assert_eq!(second, second_of(first), "the words have parted");
        first
    };
    assert_eq!(accounted, copies.map(check).fold(0, add));
}

#[test]
fn pairs_are_replaced_whole_in_a_storm() {
    storm_of_replacements(Crew::REGISTERED, 1);
}

#[test]
fn pairs_are_replaced_whole_without_restartable_sequences() {
    let name = "slots::pairs_are_replaced_whole_without_restartable_sequences";
    without_restartable_sequences(name, || storm_of_replacements(Crew::REGISTERED, 20));
}
