//! Counters: their values on one thread and under storms, their bounds, their limits; the same without restartable
//! sequences, in a child process.

#![cfg(target_os = "linux")]

mod noise;

use std::cmp::Ordering;
use std::env;
use std::num::NonZeroU32;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::thread;

use noise::Random;
use pcpu::backing::sim::{Machine, Sim};
use pcpu::counter::{Limit, LimitReached};
use pcpu::this_cpu::process::Method;
use pcpu::unit::CpuId;
use pcpu::{BatchCounter, Counter, Domain, Instance, PerCpuAllocator};

const THREADS: u64 = 8;

fn batch(batch: u32) -> NonZeroU32 {
    NonZeroU32::new(batch).unwrap()
}

#[test]
fn a_counter_counts() {
    let counter = Counter::new(-5).unwrap();
    assert_eq!(counter.sum(), -5);
    counter.inc();
    counter.add(10);
    counter.dec();
    assert_eq!(counter.sum(), 5);
    assert_eq!(format!("{counter:?}"), "Counter { sum: 5 }");
}

#[test]
fn counters_wrap() {
    let counter = Counter::new(i64::MAX).unwrap();
    counter.inc();
    assert_eq!(counter.sum(), i64::MIN);
    counter.add(i64::MIN);
    assert_eq!(counter.sum(), 0);

    let counter = BatchCounter::new(i64::MAX, batch(32)).unwrap();
    counter.inc();
    assert_eq!(counter.sum(), i64::MIN);
    assert_eq!(counter.read(), i64::MAX);
    for amount in [i64::MIN, i64::MAX, i64::MIN, i64::MAX, 1] {
        counter.add(amount);
    }
    assert_eq!(counter.sum(), i64::MIN.wrapping_sub(1));
}

#[test]
fn copies_are_folded_at_the_batch() {
    // (amounts, values of the shared number after each)
    let table: [(&[i64], &[i64]); 5] = [
        (&[1, 1, 1, 1, 1], &[0, 0, 0, 4, 4]),
        (&[-1, -1, -1, -1, -1], &[0, 0, 0, -4, -4]),
        (&[3, -3, 3, 1], &[0, 0, 0, 4]),
        (&[-3, 3, -3, -1], &[0, 0, 0, -4]),
        (&[4, 3, -10, i64::MAX], &[4, 4, -3, i64::MAX - 3]),
    ];
    for (amounts, values) in table {
        let counter = BatchCounter::new(0, batch(4)).unwrap();
        let is_on_one_cpu = on_one_cpu(|| {
            for (&amount, &value) in amounts.iter().zip(values) {
                counter.add(amount);
                assert_eq!(counter.read(), value, "after {amount} of {amounts:?}");
            }
        });
        assert!(is_on_one_cpu);
        assert_eq!(counter.sum(), amounts.iter().sum::<i64>());
    }
}

/// Does something on a thread that can't migrate.
fn on_one_cpu(work: impl FnOnce() + Send) -> bool {
    thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: the set is plain data of the size that is told.
                let is_bound = unsafe {
                    let mut set: libc::cpu_set_t = std::mem::zeroed();
                    libc::CPU_SET(libc::sched_getcpu() as usize, &mut set);
                    libc::sched_setaffinity(0, size_of_val(&set), &set) == 0
                };
                work();
                is_bound
            })
            .join()
            .unwrap()
    })
}

#[test]
fn a_batch_of_one_is_a_shared_number() {
    let counter = BatchCounter::new(7, batch(1)).unwrap();
    assert_eq!(counter.error_bound(), 0);
    for amount in [1, -3, 0, 100] {
        counter.add(amount);
        assert_eq!(counter.read(), counter.sum());
    }
    assert_eq!(counter.sum(), 105);
}

#[test]
fn the_largest_batch() {
    let counter = BatchCounter::new(0, batch(u32::MAX)).unwrap();
    let is_bound = on_one_cpu(|| {
        counter.add(i64::from(u32::MAX) - 1);
        assert_eq!(counter.read(), 0);
        counter.inc();
        assert_eq!(counter.read(), i64::from(u32::MAX));
    });
    assert!(is_bound);
}

#[test]
fn a_storm_loses_nothing() {
    const ADDS: u64 = 200_000;
    let plain = Counter::new(0).unwrap();
    let batched = BatchCounter::new(0, batch(16)).unwrap();
    let total = AtomicI64::new(0);
    noise::run(THREADS, |number| {
        if number == 0 {
            noise::become_stray();
        }
        let random = Random::new(number);
        let mut own = 0;
        for _ in 0..ADDS {
            let amount = random.below(41) as i64 - 20;
            plain.add(amount);
            batched.add(amount);
            own += amount;
        }
        total.fetch_add(own, SeqCst);
    });
    let total = total.load(SeqCst);
    assert_eq!(plain.sum(), total);
    assert_eq!(batched.sum(), total);
    assert!(batched.read().abs_diff(total) <= batched.error_bound());
}

#[test]
fn reads_stay_within_the_bound() {
    const ADDS: u64 = 300_000;
    const BATCH: u32 = 32;
    let counter = BatchCounter::new(0, batch(BATCH)).unwrap();
    let progress: Vec<AtomicU64> = (0..THREADS).map(|_| AtomicU64::new(0)).collect();
    let completed = || progress.iter().map(|adds| adds.load(SeqCst)).sum::<u64>();
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(SeqCst) {
                let before = completed();
                let value = counter.read() as u64;
                let after = completed() + THREADS;
                // What each thread may carry in a fold comes on top.
                let bound = counter.error_bound() + THREADS * u64::from(BATCH - 1);
                assert!(value <= after, "{value} of {after}");
                assert!(value + bound >= before, "{value} of {before}");
            }
        });
        noise::run(THREADS, |number| {
            for add in 1..=ADDS {
                counter.inc();
                progress[number as usize].store(add, SeqCst);
            }
        });
        is_done.store(true, SeqCst);
    });
    assert_eq!(counter.sum() as u64, THREADS * ADDS);
    assert!(counter.read().abs_diff(counter.sum()) <= counter.error_bound());
}

#[test]
fn comparing() {
    let counter = BatchCounter::new(1000, batch(50)).unwrap();
    (0..20).for_each(|_| counter.inc());
    for (limit, expected) in [
        (i64::MIN, Ordering::Greater),
        (0, Ordering::Greater),
        (1000, Ordering::Greater),
        (1019, Ordering::Greater),
        (1020, Ordering::Equal),
        (1021, Ordering::Less),
        (i64::MAX, Ordering::Less),
    ] {
        assert_eq!(counter.compare(limit), expected, "with {limit}");
    }
}

#[test]
fn a_limit_holds_on_one_thread() {
    for size in [1, 2, 16, 1000] {
        let counter = BatchCounter::new(0, batch(size)).unwrap();
        let taken = (0..10_000)
            .filter(|_| counter.try_add_limited(3, Limit(1000)).is_ok())
            .count();
        assert_eq!(taken, 333);
        assert_eq!(
            counter.try_add_limited(2, Limit(1000)),
            Err(LimitReached {
                amount: 2,
                limit: 1000,
                sum: 999
            })
        );
        assert_eq!(counter.try_add_limited(1, Limit(1000)), Ok(()));
        assert_eq!(counter.sum(), 1000);
        let given_back = (0..10_000)
            .filter(|_| counter.try_add_limited(-7, Limit(-1000)).is_ok())
            .count();
        assert_eq!(given_back, 285);
        assert_eq!(counter.sum(), 1000 - 285 * 7);
    }
}

#[test]
fn a_limit_at_the_end_of_the_numbers() {
    let counter = BatchCounter::new(i64::MAX - 5, batch(100)).unwrap();
    assert_eq!(counter.try_add_limited(5, Limit(i64::MAX)), Ok(()));
    assert!(counter.try_add_limited(1, Limit(i64::MAX)).is_err());
    assert_eq!(counter.sum(), i64::MAX);
    let counter = BatchCounter::new(i64::MIN, batch(100)).unwrap();
    assert!(counter.try_add_limited(-1, Limit(i64::MIN)).is_err());
    assert_eq!(counter.try_add_limited(i64::MAX, Limit(0)), Ok(()));
    assert_eq!(counter.sum(), -1);
}

#[test]
fn a_limit_under_a_storm() {
    const LIMIT: i64 = 20_000;
    const BATCH: u32 = 16;
    const MAX_AMOUNT: i64 = 7;
    for _ in 0..20 {
        let counter = BatchCounter::new(0, batch(BATCH)).unwrap();
        let granted = AtomicI64::new(0);
        noise::run(THREADS, |number| {
            let random = Random::new(number);
            let mut own = 0;
            let mut refusals = 0;
            while refusals < 100 {
                let amount = 1 + random.below(MAX_AMOUNT as u64) as i64;
                match counter.try_add_limited(amount, Limit(LIMIT)) {
                    Ok(()) => own += amount,
                    Err(_) => refusals += 1,
                }
            }
            granted.fetch_add(own, SeqCst);
        });
        let sum = counter.sum();
        assert_eq!(sum, granted.load(SeqCst));
        // All threads but one may have been late, and may have carried what they folded.
        let overshoot = (THREADS as i64 - 1) * (MAX_AMOUNT + i64::from(BATCH - 1));
        assert!(sum <= LIMIT + overshoot, "{sum}");
        assert!(sum > LIMIT - MAX_AMOUNT * THREADS as i64, "{sum}");
    }
}

/// A machine without restartable sequences.
enum Simulated {}

static INSTANCE: Instance<Sim, parking_lot::RawMutex> = Instance::new();

// SAFETY: `allocator` is always the same instance, of this domain only.
unsafe impl Domain for Simulated {
    type Backing = Sim;
    type Lock = parking_lot::RawMutex;
    type Ops = pcpu::this_cpu::portable::Portable<Self>;

    fn allocator() -> &'static PerCpuAllocator<Sim, parking_lot::RawMutex> {
        INSTANCE.get().expect("set up")
    }

    fn current_cpu() -> CpuId {
        thread_local!(static CPU: CpuId = {
            static NEXT: AtomicU64 = AtomicU64::new(0);
            CpuId::new((NEXT.fetch_add(1, SeqCst) % 4) as u32)
        });
        CPU.with(|cpu| *cpu)
    }
}

#[test]
fn in_another_domain() {
    INSTANCE.set_up(Machine::new(4).build().unwrap()).unwrap();
    let before = Simulated::allocator().stats();
    let plain = Counter::<Simulated>::new_in(1).unwrap();
    let batched = BatchCounter::<Simulated>::new_in(1, batch(10)).unwrap();
    noise::run(THREADS, |_| {
        for _ in 0..10_000 {
            plain.inc();
            batched.add(3);
        }
    });
    assert_eq!(plain.sum(), 80_001);
    assert_eq!(batched.sum(), 240_001);
    assert_eq!(batched.error_bound(), 4 * 9);
    assert!(batched.read().abs_diff(240_001) <= batched.error_bound());
    drop((plain, batched));
    let after = Simulated::allocator().stats();
    assert_eq!(after.live_bytes, before.live_bytes);
}

#[test]
fn all_of_this_without_restartable_sequences() {
    const TUNABLES: &str = "GLIBC_TUNABLES";
    if env::var_os(TUNABLES).is_some() {
        assert_eq!(pcpu::global::method(), Method::Locked);
        return;
    }
    let status = Command::new(env::current_exe().unwrap())
        .env(TUNABLES, "glibc.pthread.rseq=0")
        .status()
        .unwrap();
    assert!(status.success());
}
