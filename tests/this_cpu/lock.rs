//! The lock of a CPU: one holder at a time, wherever the holder is, and holders of other CPUs' values among them.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use pcpu::{CpuLock, LocalLock, PerCpu, StaticVar, define_per_cpu, global};

use crate::crew::{Crew, without_restartable_sequences};
use crate::mix::mix;
use crate::system::{allowed_cpus, keep_on, on_cpu};
use crate::whirl::{Handlers, whirl};

define_per_cpu! {
    static NUMBERS: CpuLock<[u64; 2]> = CpuLock::new([5, 5]);
}

#[test]
fn each_cpu_has_a_value() {
    for cpu in allowed_cpus() {
        on_cpu(cpu, || {
            NUMBERS.with(|numbers| numbers[0] += u64::from(cpu.get()));
            assert_eq!(
                NUMBERS.try_with(|numbers| numbers[0]),
                Some(5 + u64::from(cpu.get()))
            );
        });
    }
    for cpu in allowed_cpus() {
        assert_eq!(
            NUMBERS.with_on(cpu, |numbers| *numbers),
            Ok([5 + u64::from(cpu.get()), 5])
        );
    }
    assert!(
        NUMBERS
            .with_on(pcpu::unit::CpuId::new(1 << 20), |_| ())
            .is_err()
    );
}

#[test]
fn a_holder_keeps_the_value_on_another_cpu() {
    let lock = PerCpu::<CpuLock<u32>>::new().expect("there is memory");
    let cpus = allowed_cpus();
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    let (holds, is_held) = mpsc::channel();
    let (ends, may_end) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let lock = &lock;
        scope.spawn(move || {
            keep_on(0, &[first]);
            lock.with(|value| {
                keep_on(0, &[last]);
                holds.send(()).expect("the test waits");
                may_end.recv().expect("the test goes on");
                *value += 1;
            });
        });
        is_held.recv().expect("the thread lives");
        on_cpu(first, || assert_eq!(lock.try_with(|_| ()), None));
        if first != last {
            on_cpu(last, || assert_eq!(lock.try_with(|value| *value), Some(0)));
        }
        ends.send(()).expect("the thread lives");
        assert_eq!(lock.with_on(first, |value| *value), Ok(1));
    });
}

#[test]
fn a_thread_that_waits_for_itself() {
    let lock = PerCpu::<CpuLock<u32>>::new().expect("there is memory");
    let cpu = allowed_cpus()[0];
    on_cpu(cpu, || {
        let again = || lock.with(|_| lock.with(|_| ()));
        assert!(catch_unwind(AssertUnwindSafe(again)).is_err());
        let from_afar = || lock.with(|_| lock.with_on(cpu, |_| ()));
        assert!(catch_unwind(AssertUnwindSafe(from_afar)).is_err());
        assert_eq!(lock.with(|_| lock.try_with(|_| ())), None);
        // All of it was given back, and the gate is open.
        assert_eq!(lock.try_with(|value| *value), Some(0));
    });
}

#[test]
fn a_closure_that_panics_gives_the_lock_back() {
    let lock = PerCpu::<CpuLock<u32>>::new().expect("there is memory");
    let cpu = allowed_cpus()[0];
    on_cpu(cpu, || {
        let panics = || {
            lock.with(|value| {
                *value = 3;
                panic!("on purpose");
            })
        };
        assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
        let panics = || lock.with_on(cpu, |_| panic!("on purpose"));
        assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
        assert_eq!(lock.try_with(|value| *value), Some(3));
    });
}

/// Two threads that want the value from elsewhere keep its gate up between them for ever.
#[test]
fn threads_elsewhere_do_not_keep_a_cpu_out() {
    const WANTED: u64 = 200;
    let lock = PerCpu::<CpuLock<u64>>::new().expect("there is memory");
    let cpus = allowed_cpus();
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (lock, is_over) = (&lock, &is_over);
        for _ in 0..3 {
            scope.spawn(move || {
                keep_on(0, &[last]);
                while !is_over.load(Ordering::Relaxed) {
                    lock.with_on(first, |_| ()).expect("the CPU is possible");
                }
            });
        }
        on_cpu(first, || {
            (0..WANTED).for_each(|_| lock.with(|value| *value += 1))
        });
        is_over.store(true, Ordering::Relaxed);
    });
    assert_eq!(lock.with_on(first, |value| *value), Ok(WANTED));
}

fn storm(crew: Crew, part: u64) {
    let mut lock = PerCpu::<CpuLock<[u64; 2]>>::new().expect("there is memory");
    let cpus = allowed_cpus();
    let add = |values: &mut [u64; 2]| {
        assert_eq!(values[0], values[1], "somebody else is at it");
        values[0] += 1;
        std::hint::black_box(&mut *values);
        values[1] += 1;
    };
    let accounts = whirl(
        crew,
        Handlers::Idle,
        part,
        |number| (Cell::new(0_u64), Cell::new(number as u64)),
        |(count, random)| {
            random.set(mix(random.get().wrapping_add(1)));
            let cpu = cpus[(random.get() >> 32) as usize % cpus.len()];
            let is_done = match random.get() % 4096 {
                0 => lock.with_on(cpu, add).is_ok(),
                // Long enough for others to find it held.
                1 => lock.with(|values| {
                    std::thread::yield_now();
                    add(values);
                    true
                }),
                2..1024 => lock.try_with(add).is_some(),
                _ => lock.with(|values| {
                    add(values);
                    true
                }),
            };
            count.set(count.get() + u64::from(is_done));
        },
    );
    let accounted: u64 = accounts.iter().map(|(count, _)| count.get()).sum();
    let found: u64 = lock.iter_mut().map(|(_, copy)| copy.get_mut()[1]).sum();
    assert_eq!(accounted, found);
}

#[test]
fn one_holder_at_a_time_in_a_storm() {
    storm(Crew::REGISTERED, 10);
}

#[test]
fn one_holder_at_a_time_among_strays() {
    storm(Crew::HALF_STRAYS, 50);
}

#[test]
fn one_holder_at_a_time_without_restartable_sequences() {
    let name = "lock::one_holder_at_a_time_without_restartable_sequences";
    without_restartable_sequences(name, || {
        storm(Crew::REGISTERED, 50);
        let possible = global().units().possible();
        assert!(possible.iter().all(|cpu| NUMBERS.get(cpu).is_ok()));
    });
}
