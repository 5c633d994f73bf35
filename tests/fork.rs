//! A child that `fork` makes while other threads of the parent allocate, free and give memory back: it can do all that its
//! parent can, on copies of its own.
//!
//! Each test runs in a process of its own, whose threads are the test's. A child that hangs is ended by its alarm, and
//! then the test fails.

#![cfg(target_os = "linux")]

#[path = "common/child.rs"]
mod child;
#[path = "common/forked.rs"]
mod forked;

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use pcpu::global::method;
use pcpu::refcount::Kill;
use pcpu::stats::MapItem;
use pcpu::this_cpu::process::Method;
use pcpu::{
    CpuCell, Global, LocalCell, PerCpu, PerCpuPtr, RefCount, RemoteCell, Request,
    alloc_percpu_bytes, define_per_cpu, free_percpu, global,
};

use child::run_in_child;
use forked::in_forked_child;

/// How many children a test makes.
const CHILDREN: u32 = 400;

define_per_cpu! {
    static COUNTED: CpuCell<u64> = CpuCell::new(0);
}

/// Tells the other threads that the test is over, also if it has failed.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Allocates areas of many sizes and frees them, from `start` on, until `is_over`: chunks come and go.
fn churn(start: u64, is_over: &AtomicBool) {
    let mut number = start;
    let mut areas: Vec<PerCpuPtr<u8>> = Vec::new();
    let mut next = |limit: u64| {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        (number >> 11) % limit
    };
    while !is_over.load(Relaxed) {
        match next(100) {
            0 => {
                global().trim(0);
            }
            1 => {
                global().upkeep();
            }
            2..50 if !areas.is_empty() => {
                let area = areas.swap_remove(next(areas.len() as u64) as usize);
                // SAFETY: allocated below, and not used any more.
                unsafe { free_percpu(area) }.expect("it is allocated");
            }
            _ if areas.len() < 60 => areas.push(allocate(1 << next(16))),
            _ => {}
        }
    }
    for area in areas {
        // SAFETY: as above.
        unsafe { free_percpu(area) }.expect("it is allocated");
    }
}

fn allocate(bytes: u64) -> PerCpuPtr<u8> {
    let request = Request::new(bytes.min(32 << 10) as usize, 8);
    alloc_percpu_bytes::<Global>(&request).expect("there is memory")
}

/// What a child does with the allocator: everything.
fn use_all() {
    // More than a chunk has room for, so that one is made.
    let areas: Vec<_> = (0..24).map(|_| allocate(32 << 10)).collect();
    for area in areas {
        // SAFETY: just allocated.
        unsafe { free_percpu(area) }.expect("it is allocated");
    }
    global().upkeep();
    assert_at_rest();

    let counter = PerCpu::<CpuCell<u64>>::new().expect("there is memory");
    (0..100).for_each(|_| counter.inc());
    assert_eq!(counter.sum(), 100);

    let zeroes = AtomicU64::new(0);
    let users = RefCount::new(|| {
        zeroes.fetch_add(1, Relaxed);
    })
    .expect("there is memory");
    let user = users.try_get().expect("in service");
    assert_eq!(users.kill(), Ok(Kill::Held));
    drop(user);
    assert_eq!(zeroes.load(Relaxed), 1);
    drop(users);
    drop(counter);
    assert_at_rest();
}

/// Panics unless the counters agree with the maps once all memory without an area is given back: no page and no chunk is
/// left in the middle of something.
fn assert_at_rest() {
    global().trim(0);
    let stats = global().stats();
    assert_eq!((stats.empty_pages, stats.spare_chunks), (0, 0));
    let (mut areas, mut chunks) = (0, 0);
    global().visit_map(|_, item| areas += u64::from(matches!(item, MapItem::Area(_))));
    global().visit_chunks(|_| chunks += 1);
    assert_eq!(areas, stats.live);
    assert!(chunks >= stats.chunks);
}

#[test]
fn a_child_of_a_busy_process() {
    if !run_in_child("a_child_of_a_busy_process", |_| ()) {
        fork_while_busy();
    }
}

/// Where there are no restartable sequences, a child has none either.
#[test]
fn a_child_of_a_busy_process_without_restartable_sequences() {
    let name = "a_child_of_a_busy_process_without_restartable_sequences";
    if !run_in_child(name, |command| {
        command.env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    }) {
        assert_eq!(method(), Method::Locked);
        fork_while_busy();
    }
}

fn fork_while_busy() {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _end = End(&is_over);
        for start in 1..=3 {
            let is_over = &is_over;
            scope.spawn(move || churn(start * 0x9e37_79b9, is_over));
        }
        let forks = || {
            for child in 0..CHILDREN / 2 {
                COUNTED.inc();
                if child.is_multiple_of(50) {
                    // No handlers run for a child that only becomes another program.
                    let is_done = Command::new("true").status().expect("it can be run");
                    assert!(is_done.success());
                }
                in_forked_child(|| {
                    let before = COUNTED.sum();
                    COUNTED.add(1000);
                    assert_eq!(COUNTED.sum(), before + 1000);
                    use_all();
                });
            }
        };
        let other = scope.spawn(forks);
        forks();
        other.join().expect("the other passes");
    });
    assert_eq!(
        COUNTED.sum(),
        u64::from(CHILDREN),
        "what children count is theirs"
    );
    use_all();
    assert_eq!(global().stats().live, 0);
}
