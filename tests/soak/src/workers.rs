//! The threads that allocate and free, twice as many as there are CPUs, so that the system takes them off theirs in the
//! middle of things.

use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};

use pcpu::unit::CpuId;

use crate::crew::{Parcel, allocate, free, move_to};

/// Areas that a worker holds at most.
const HELD: usize = 100;

/// Areas that one worker hands to another at a time.
const BATCH: usize = 16;

/// Operations between two looks at what there is still to do.
const STRETCH: u64 = 1024;

/// What the workers have in common.
pub struct Crew {
    pub cpus: Vec<CpuId>,
    operations: u64,
    done: AtomicU64,
    /// Areas that were handed to each worker.
    inboxes: Vec<Mutex<Vec<Parcel>>>,
    /// The system's numbers of the threads; 0: it has not begun, or has ended.
    threads: Vec<AtomicI32>,
}

impl Crew {
    /// A crew for so many operations.
    pub fn new(cpus: Vec<CpuId>, operations: u64) -> Self {
        let workers = 2 * cpus.len();
        Self {
            cpus,
            operations,
            done: AtomicU64::new(0),
            inboxes: (0..workers).map(|_| Mutex::default()).collect(),
            threads: (0..workers).map(|_| AtomicI32::new(0)).collect(),
        }
    }

    pub fn workers(&self) -> usize {
        self.inboxes.len()
    }

    /// Operations done so far.
    pub fn done(&self) -> u64 {
        self.done.load(Relaxed)
    }

    /// Has the others stop as soon as they look.
    pub fn stop(&self) {
        self.done.store(self.operations, Relaxed);
    }

    pub fn is_over(&self) -> bool {
        self.done() >= self.operations
    }

    /// The system's number of a worker's thread, while it works.
    pub fn thread(&self, worker: usize) -> Option<libc::pid_t> {
        Some(self.threads[worker].load(Relaxed)).filter(|&thread| thread != 0)
    }

    /// Works until all operations are done; ends with areas in inboxes, perhaps.
    pub fn work(&self, worker: usize) {
        let end = End(self);
        // SAFETY: asks for a number.
        self.threads[worker].store(unsafe { libc::gettid() }, Relaxed);
        let mut numbers = fastrand::Rng::with_seed(worker as u64);
        let mut live = Vec::with_capacity(2 * HELD);
        while !self.is_over() {
            if numbers.u32(..4) == 0 {
                move_to(self.cpus[numbers.usize(..self.cpus.len())]);
            }
            let mut left = STRETCH;
            while left > 0 {
                left -= 1;
                if numbers.usize(..HELD) >= live.len() {
                    live.extend(allocate(&mut numbers));
                } else {
                    free(live.swap_remove(numbers.usize(..live.len())));
                }
            }
            self.done.fetch_add(STRETCH, Relaxed);
            self.hand_over(&mut numbers, &mut live);
            let received = std::mem::take(&mut *self.inbox(worker));
            // The frees of what others have allocated.
            self.done.fetch_add(received.len() as u64, Relaxed);
            received.into_iter().for_each(free);
        }
        self.threads[worker].store(0, Relaxed);
        live.into_iter().for_each(free);
        std::mem::forget(end);
    }

    fn inbox(&self, worker: usize) -> std::sync::MutexGuard<'_, Vec<Parcel>> {
        self.inboxes[worker].lock().expect("no worker panics there")
    }

    fn hand_over(&self, numbers: &mut fastrand::Rng, live: &mut Vec<Parcel>) {
        let count = numbers.usize(..=BATCH).min(live.len());
        let mut inbox = self.inbox(numbers.usize(..self.workers()));
        inbox.extend(live.drain(live.len() - count..));
    }

    /// Frees what nobody has fetched.
    pub fn free_rest(&self) {
        for worker in 0..self.workers() {
            let rest = std::mem::take(&mut *self.inbox(worker));
            rest.into_iter().for_each(free);
        }
    }
}

/// A worker that panics ends the work of all.
struct End<'a>(&'a Crew);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}
