//! Threads of a process that allocate, hand areas over and free what they are handed, while they move between CPUs and
//! somebody closes all runs again and again.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use pcpu::global::{allowed_cpus, method};
use pcpu::this_cpu::process::Method;
use pcpu::{AllocFlags, Domain, FreeFlags, Global, Request, drain_caches, global};

use crate::child::run_in_child;
use crate::copies::{assert_stamped, stamp};
use crate::crew::{Parcel, allocate, free, move_to};

const THREADS: usize = 6;
const LASTS: Duration = Duration::from_millis(2000);

/// What a process of a test has time for.
const ALARM_SECONDS: libc::c_uint = 60;

/// Tells that the test is over, also if it has failed.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn work() {
    // SAFETY: an alarm without a handler ends the process, which is the test's own.
    unsafe { libc::alarm(ALARM_SECONDS) };
    let cpus = allowed_cpus();
    for cpu in global().units().possible().iter() {
        global().bring_up(cpu).unwrap();
    }
    let before = global().stats();
    let end = Instant::now() + LASTS;
    let is_over = AtomicBool::new(false);
    let (senders, inboxes): (Vec<_>, Vec<_>) =
        (0..THREADS).map(|_| mpsc::channel::<Parcel>()).unzip();
    thread::scope(|scope| {
        let end_of_all = End(&is_over);
        let workers: Vec<_> = inboxes
            .into_iter()
            .enumerate()
            .map(|(worker, inbox)| {
                let outbox = senders[(worker + 1) % THREADS].clone();
                let cpus = &cpus;
                scope.spawn(move || {
                    let mut numbers = fastrand::Rng::with_seed(worker as u64);
                    let mut live = Vec::new();
                    while Instant::now() < end {
                        if numbers.u32(..200) == 0 {
                            move_to(cpus[numbers.usize(..cpus.len())]);
                        }
                        if live.len() < 100 {
                            live.extend(allocate(&mut numbers));
                        }
                        if numbers.usize(..100) < live.len() {
                            let parcel = live.swap_remove(numbers.usize(..live.len()));
                            match numbers.bool() {
                                true => free(parcel),
                                false => outbox
                                    .send(parcel)
                                    .expect("the other works until all are sent"),
                            }
                        }
                        inbox.try_iter().for_each(free);
                    }
                    drop(outbox);
                    live.into_iter().for_each(free);
                    inbox.iter().for_each(free);
                })
            })
            .collect();
        drop(senders);
        scope.spawn(|| {
            while !is_over.load(Relaxed) {
                drain_caches::<Global>();
                global().trim(0);
                assert_eq!(global().stats().late_errors, 0);
                thread::yield_now();
            }
        });
        for worker in workers {
            worker.join().unwrap();
        }
        drop(end_of_all);
    });
    let after = global().stats();
    assert_eq!((after.live, after.late_errors), (before.live, 0));
    let allocs = after.allocs - before.allocs;
    assert_eq!(after.frees - before.frees, allocs);
    assert!(allocs > 1000, "{allocs} areas");
}

#[test]
fn threads_hand_areas_over_while_runs_are_closed() {
    if !run_in_child(
        "threads::threads_hand_areas_over_while_runs_are_closed",
        |_| (),
    ) {
        work();
    }
}

#[test]
fn threads_hand_areas_over_without_restartable_sequences() {
    let name = "threads::threads_hand_areas_over_without_restartable_sequences";
    if run_in_child(name, |command| {
        command.env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    }) {
        return;
    }
    assert_eq!(method(), Method::Locked);
    work();
}

/// A process's first chunk has room for names of what is stashed: who frees an area leaves its memory alone.
#[test]
fn a_process_leaves_what_it_frees_as_it_is() {
    if run_in_child("threads::a_process_leaves_what_it_frees_as_it_is", |_| ()) {
        return;
    }
    let request = Request::new(64, 8).with_flags(AllocFlags::NO_ZERO);
    let allocate = || -> Vec<usize> {
        (0..200)
            .map(|_| Global::allocate(&request).unwrap())
            .collect()
    };
    let areas = allocate();
    areas.iter().for_each(|&area| stamp(global(), (area, 64)));
    for &area in &areas {
        // SAFETY: nobody uses the area.
        unsafe { Global::free(area, FreeFlags::empty()) }.unwrap();
    }
    let again = allocate();
    let mut seen = 0;
    for area in again.into_iter().filter(|area| areas.contains(area)) {
        let cpus = global().units().materialised();
        cpus.iter()
            .for_each(|cpu| assert_stamped(global(), (area, 64), cpu));
        seen += 1;
    }
    assert!(seen > 100, "{seen} of {}", areas.len());
}
