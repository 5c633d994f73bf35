//! Pairs: what an exchange does, and that the two words never part.

use std::cell::Cell;

use pcpu::{CpuPair, Handle, LocalPair, PerCpu, StaticVar, define_per_cpu, global, this_cpu};

use crate::crew::{Crew, without_restartable_sequences};
use crate::mix::mix;
use crate::system::{allowed_cpus, on_cpu};
use crate::whirl::{Handlers, whirl};

define_per_cpu! {
    static PAIR: CpuPair<u64, i64> = CpuPair::new(7, -7);
}

#[test]
fn both_words_are_compared_and_set() {
    for cpu in allowed_cpus() {
        on_cpu(cpu, || {
            assert_eq!(PAIR.read(), (7, -7));
            assert_eq!(PAIR.cmpxchg((7, -8), (1, 1)), Err((7, -7)));
            assert_eq!(PAIR.cmpxchg((8, -7), (1, 1)), Err((7, -7)));
            assert_eq!(PAIR.read(), (7, -7));
            assert_eq!(PAIR.cmpxchg((7, -7), (u64::MAX, i64::MIN)), Ok((7, -7)));
            assert_eq!(PAIR.xchg((3, 4)), (u64::MAX, i64::MIN));
            assert_eq!(PAIR.update(|(a, b)| (a * 2, b * 2)), (3, 4));
            assert_eq!(PAIR.get(cpu).expect("it is possible").read_remote(), (6, 8));
            // SAFETY: a static variable lives.
            unsafe {
                assert_eq!(this_cpu::read_pair(PAIR.handle()), (6, 8));
                assert_eq!(
                    this_cpu::cmpxchg_pair(PAIR.handle(), (6, 8), (0, 0)),
                    Ok((6, 8))
                );
            }
        });
    }
}

/// The second word belongs to the first.
fn second_of(first: u64) -> u64 {
    first.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn storm(crew: Crew, part: u64) {
    let pair = PerCpu::<CpuPair<u64>>::new().expect("there is memory");
    let check = |(first, second): (u64, u64)| {
        assert_eq!(second, second_of(first), "the words of a pair have parted");
        first
    };
    let accounts = whirl(
        crew,
        Handlers::Work,
        part,
        |number| (Cell::new(0_u64), Cell::new(number as u64)),
        |(sum, random)| {
            random.set(mix(random.get().wrapping_add(1)));
            check(pair.read());
            pair.update(|words| {
                let first = check(words).wrapping_add(random.get());
                (first, second_of(first))
            });
            sum.set(sum.get().wrapping_add(random.get()));
        },
    );
    let accounted = accounts
        .iter()
        .fold(0, |sum: u64, account| sum.wrapping_add(account.0.get()));
    let found = pair.iter().fold(0, |sum: u64, (_, copy)| {
        sum.wrapping_add(check(copy.read_remote()))
    });
    assert_eq!(accounted, found);
}

#[test]
fn words_stay_together_in_a_storm() {
    storm(Crew::REGISTERED, 1);
}

#[test]
fn words_stay_together_among_strays() {
    storm(Crew::HALF_STRAYS, 20);
}

#[test]
fn words_stay_together_without_restartable_sequences() {
    let name = "pair::words_stay_together_without_restartable_sequences";
    without_restartable_sequences(name, || {
        storm(Crew::REGISTERED, 20);
        let possible = global().units().possible();
        assert!(possible.iter().all(|cpu| PAIR.get(cpu).is_ok()));
    });
}
