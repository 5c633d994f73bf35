//! Reference counts: what each call does on one thread, storms with a kill in the middle, and the ways in which there is no
//! per-CPU mode: without restartable sequences, without the fence, with the fence taken away later.

#![cfg(target_os = "linux")]

mod noise;

use std::env;
use std::ffi::OsStr;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{
    AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst,
};
use std::thread;
use std::time::Duration;

use noise::Random;
use pcpu::refcount::{Kill, RawRefCount};
use pcpu::this_cpu::FenceError;
use pcpu::this_cpu::process::Method;
use pcpu::{Ref, RefCount};

const THREADS: u64 = 8;

#[test]
fn one_thread() {
    let zeroes = AtomicU32::new(0);
    let count = RefCount::new(|| {
        zeroes.fetch_add(1, SeqCst);
    })
    .unwrap();
    assert_eq!(count.references(), 1);
    let first = count.try_get().unwrap();
    let second = count.try_get().unwrap();
    let third = second.clone();
    assert_eq!(count.references(), 4);
    drop(second);
    assert_eq!(count.references(), 3);
    assert!(!count.is_killed());

    assert_eq!(count.kill(), Ok(Kill::Held));
    assert!(count.is_killed());
    assert_eq!(count.references(), 2);
    assert!(count.try_get().is_none());
    assert_eq!(count.kill(), Ok(Kill::Again));
    let fourth = first.clone();
    assert_eq!(count.references(), 3);
    drop(first);
    drop(third);
    assert!(!count.is_zero());
    assert_eq!(zeroes.load(SeqCst), 0);
    drop(fourth);
    assert!(count.is_zero());
    assert_eq!(zeroes.load(SeqCst), 1);
    assert!(count.try_get().is_none());
    assert_eq!(count.kill(), Ok(Kill::Again));
    drop(count);
    assert_eq!(zeroes.load(SeqCst), 1);
}

#[test]
fn a_kill_that_finds_no_reference() {
    let zeroes = AtomicU32::new(0);
    let count = RefCount::new(|| {
        zeroes.fetch_add(1, SeqCst);
    })
    .unwrap();
    drop(count.try_get());
    assert_eq!(count.kill(), Ok(Kill::Zero));
    assert_eq!(zeroes.load(SeqCst), 1);
    assert!(count.is_zero());
}

#[test]
fn a_count_that_is_never_killed_or_never_zero() {
    let count = RefCount::new(|| panic!("not zero")).unwrap();
    drop(count.try_get());
    drop(count);
    let count = RefCount::new(|| panic!("not zero")).unwrap();
    std::mem::forget(count.try_get());
    assert_eq!(count.kill(), Ok(Kill::Held));
    assert_eq!(count.references(), 1);
}

#[test]
fn references_put_elsewhere() {
    let zeroes = AtomicU32::new(0);
    let count = RefCount::new(|| {
        zeroes.fetch_add(1, SeqCst);
    })
    .unwrap();
    let references: Vec<_> = (0..1000).map(|_| count.try_get().unwrap()).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            // Puts go to the shared count, before there is anything in it.
            noise::become_stray();
            drop(references);
        });
    });
    assert_eq!(count.references(), 1);
    assert_eq!(count.kill(), Ok(Kill::Zero));
    assert_eq!(zeroes.load(SeqCst), 1);
}

/// References in passing from one thread to another.
type Bin<'a, F> = Mutex<Vec<Ref<'a, F>>>;

/// What all threads of a round look at.
struct Round<'a, F: Fn()> {
    count: &'a RefCount<F>,
    held: &'a AtomicI64,
    bin: Bin<'a, F>,
    is_killed: AtomicBool,
    gets: AtomicU64,
}

impl<'a, F: Fn()> Round<'a, F> {
    /// A reference is counted in `held` after it is taken and until before it is put, so that `held` is 0 at zero.
    fn put(&self, reference: Ref<'a, F>) {
        self.held.fetch_sub(1, SeqCst);
        drop(reference);
    }

    /// Takes and puts references in many ways, until the kill.
    fn work(&self, random: &Random) {
        let mut own = Vec::new();
        loop {
            let must_refuse = self.is_killed.load(SeqCst);
            let Some(reference) = self.count.try_get() else {
                break;
            };
            self.held.fetch_add(1, SeqCst);
            assert!(!must_refuse, "a reference after the kill");
            self.gets.fetch_add(1, SeqCst);
            match random.below(8) {
                0 => own.push(reference),
                1 => {
                    own.push(reference.clone());
                    self.held.fetch_add(1, SeqCst);
                    self.put(reference);
                }
                2 => {
                    let other = {
                        let mut bin = self.bin.lock().unwrap();
                        bin.push(reference);
                        let index = random.below(bin.len() as u64) as usize;
                        bin.swap_remove(index)
                    };
                    self.put(other);
                }
                _ => self.put(reference),
            }
            if own.len() > 10 {
                own.drain(..).for_each(|reference| self.put(reference));
            }
        }
        if random.below(2) == 0 {
            thread::yield_now();
        }
        own.drain(..).for_each(|reference| self.put(reference));
    }
}

#[test]
fn storms_with_a_kill_in_the_middle() {
    const ROUNDS: u64 = 100;
    let mut gets = 0;
    for round in 0..ROUNDS {
        let zeroes = AtomicU32::new(0);
        let held = AtomicI64::new(0);
        let held_at_zero = AtomicI64::new(0);
        let count = RefCount::new(|| {
            held_at_zero.store(held.load(SeqCst), SeqCst);
            zeroes.fetch_add(1, SeqCst);
        })
        .unwrap();
        let shared = Round {
            count: &count,
            held: &held,
            bin: Mutex::default(),
            is_killed: AtomicBool::new(false),
            gets: AtomicU64::new(0),
        };
        let kills = Mutex::new(Vec::new());
        noise::run(THREADS, |number| {
            let random = Random::new(round * THREADS + number);
            match number {
                // Two killers, at about the same time.
                0 | 1 => {
                    thread::sleep(Duration::from_micros(round % 20 * 50));
                    let kill = count.kill().unwrap();
                    shared.is_killed.store(true, SeqCst);
                    assert!(count.try_get().is_none());
                    kills.lock().unwrap().push(kill);
                }
                2 | 3 => {
                    noise::become_stray();
                    shared.work(&random);
                }
                _ => shared.work(&random),
            }
        });
        gets += shared.gets.load(SeqCst);
        let kills = kills.into_inner().unwrap();
        assert_eq!(kills.iter().filter(|&&kill| kill == Kill::Again).count(), 1);

        let rest = shared.bin.into_inner().unwrap();
        let was_rest = !rest.is_empty();
        assert_eq!(count.references(), rest.len() as u64);
        assert_eq!(zeroes.load(SeqCst), u32::from(!was_rest));
        rest.into_iter().for_each(|reference| {
            held.fetch_sub(1, SeqCst);
            drop(reference);
        });
        assert_eq!(zeroes.load(SeqCst), 1, "round {round}");
        assert_eq!(held_at_zero.load(SeqCst), 0, "round {round}");
        assert!(count.is_zero());
        assert_eq!(held.load(SeqCst), 0);
    }
    println!("{gets} references in {ROUNDS} rounds");
}

/// Kills while another CPU is in the middle of sections, over and over: what the fence is for. Without it an add is lost
/// once in some thousand kills.
#[test]
fn kills_against_a_running_section() {
    const COUNTS: usize = 1000;
    const ROUNDS: u64 = 15;
    let random = Random::new(1);
    for _ in 0..ROUNDS {
        let zeroes = AtomicU32::new(0);
        let counts: Vec<_> = (0..COUNTS)
            .map(|_| {
                RefCount::new(|| {
                    zeroes.fetch_add(1, SeqCst);
                })
                .unwrap()
            })
            .collect();
        let current = AtomicUsize::new(0);
        let killed = AtomicUsize::new(0);
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                for (index, count) in counts.iter().enumerate() {
                    current.store(index, SeqCst);
                    for tries in 1_u32.. {
                        // The killer may be waiting for this CPU.
                        if tries.is_multiple_of(4096) {
                            thread::yield_now();
                        }
                        let must_refuse = killed.load(SeqCst) > index;
                        let Some(reference) = count.try_get() else {
                            break;
                        };
                        drop(reference);
                        assert!(!must_refuse, "a reference after the kill");
                    }
                }
            });
            for (index, count) in counts.iter().enumerate() {
                while current.load(SeqCst) < index {
                    assert!(!worker.is_finished());
                    thread::yield_now();
                }
                // A copy that this CPU has just read takes the other one longer to change.
                (0..=random.below(20)).for_each(|_| {
                    count.references();
                });
                count.kill().unwrap();
                killed.store(index + 1, SeqCst);
            }
        });
        for (index, count) in counts.iter().enumerate() {
            assert_eq!(count.references(), 0, "of count {index}");
            assert!(count.is_zero());
        }
        assert_eq!(zeroes.load(SeqCst), COUNTS as u32);
    }
}

#[test]
fn a_storm_without_a_kill_loses_nothing() {
    let count = RefCount::new(|| {}).unwrap();
    noise::run(THREADS, |number| {
        if number == 0 {
            noise::become_stray();
        }
        for _ in 0..200_000 {
            let first = count.try_get().unwrap();
            let second = first.clone();
            drop(first);
            drop(second);
        }
    });
    assert_eq!(count.references(), 1);
    assert_eq!(count.kill(), Ok(Kill::Zero));
}

/// Objects that are freed by their last reference, while others still return from giving theirs up.
#[test]
fn the_last_put_frees() {
    struct Object {
        count: RawRefCount,
        payload: [u64; 4],
    }
    struct Pointer(*mut Object);
    // SAFETY: the object is shared by its references.
    unsafe impl Send for Pointer {}
    // SAFETY: as above.
    unsafe impl Sync for Pointer {}

    let frees = AtomicU32::new(0);
    const ROUNDS: u32 = 2000;
    for _ in 0..ROUNDS {
        let object = Pointer(Box::into_raw(Box::new(Object {
            count: RawRefCount::new().unwrap(),
            payload: [7; 4],
        })));
        let free = |object: &Pointer| {
            frees.fetch_add(1, SeqCst);
            // SAFETY: the count is zero, which happens once.
            drop(unsafe { Box::from_raw(object.0) });
        };
        // SAFETY: a reference for each thread is taken under the first one; each is given up once.
        unsafe {
            (0..3).for_each(|_| (*object.0).count.get());
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        (0..100).for_each(|_| {
                            (*object.0).count.get();
                            assert_eq!((*object.0).payload, [7; 4]);
                            assert!(!RawRefCount::put(&raw const (*object.0).count));
                        });
                        if RawRefCount::put(&raw const (*object.0).count) {
                            free(&object);
                        }
                    });
                }
                if RawRefCount::kill(&raw const (*object.0).count) == Ok(Kill::Zero) {
                    free(&object);
                }
            });
        }
    }
    assert_eq!(frees.load(SeqCst), ROUNDS);
}

/// Has the system refuse `membarrier` to the calling thread and those that it makes from now on.
fn forbid_membarrier() {
    const fn step(code: u32, k: u32, jump_false: u8) -> libc::sock_filter {
        libc::sock_filter {
            code: code as u16,
            jt: 0,
            jf: jump_false,
            k,
        }
    }
    let mut steps = [
        // The number of the system call is the first word of what the filter sees.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            libc::SYS_membarrier as u32,
            1,
        ),
        step(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32,
            0,
        ),
        step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: the program is a valid filter, and is copied.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let filter = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, filter, &program), 0);
    }
}

#[test]
fn the_fence_is_taken_away_later() {
    if pcpu::global::method() == Method::Locked {
        return;
    }
    let count = RefCount::new(|| {}).unwrap();
    let reference = count.try_get().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            forbid_membarrier();
            let errno = libc::ENOSYS;
            assert_eq!(count.kill(), Err(FenceError::Refused { errno }));
        });
    });
    assert!(!count.is_killed());
    let other = count.try_get().unwrap();
    drop(reference);
    assert_eq!(count.references(), 2);
    assert_eq!(count.kill(), Ok(Kill::Held));
    drop(other);
    assert!(count.is_zero());
}

const IS_CHILD: &str = "PCPU_TEST_IS_CHILD";

fn run_again(name: impl AsRef<OsStr>, value: &str, args: &[&str]) {
    let status = Command::new(env::current_exe().unwrap())
        .args(args)
        .env(IS_CHILD, "1")
        .env(name, value)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn all_of_this_without_restartable_sequences() {
    if env::var_os(IS_CHILD).is_some() {
        return;
    }
    run_again("GLIBC_TUNABLES", "glibc.pthread.rseq=0", &[]);
}

#[test]
fn some_of_this_without_the_fence() {
    if env::var_os(IS_CHILD).is_none() {
        let this = "some_of_this_without_the_fence";
        run_again("PCPU_TEST_FENCE", "0", &[this, "--exact"]);
    }
    if env::var_os("PCPU_TEST_FENCE").is_some() {
        // The first count of the process, made under the filter.
        forbid_membarrier();
        one_thread();
        references_put_elsewhere();
        a_storm_without_a_kill_loses_nothing();
        storms_with_a_kill_in_the_middle();
    }
}
