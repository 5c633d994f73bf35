//! Areas that are freed on another CPU than they were allocated on: two threads, each on its CPU, pass each other batches.
//!
//! A batch is passed by an exchange of two vectors, which costs far less than the pairs in it.

use std::hint;
use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::WorkloadError;
use crate::areas::Source;
use crate::together;

/// Areas of a batch.
pub const BATCH: usize = 64;

/// The threads.
const THREADS: u32 = 2;

/// About 10 us.
const SPINS_PER_YIELD: u32 = 1 << 10;

/// Who frees a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreedBy {
    /// The thread that has allocated it.
    Same,
    /// The other one.
    Other,
}

/// Each of two threads allocates and frees so many batches; how long that took a thread, on average.
///
/// # Errors
/// As the source; areas on their way are lost then.
pub fn run<S: Source>(
    source: S,
    bytes: usize,
    freed_by: FreedBy,
    batches: u64,
) -> Result<Duration, WorkloadError> {
    let mailboxes = [Mailbox::new(), Mailbox::new()];
    let failed = AtomicBool::new(false);
    together::run_numbered(THREADS, |number| {
        let [to, from] = match number {
            0 => [&mailboxes[0], &mailboxes[1]],
            _ => [&mailboxes[1], &mailboxes[0]],
        };
        let kind = source.kind(bytes);
        let mut batch = Vec::with_capacity(BATCH);
        let mut work = || {
            for _ in 0..batches {
                for _ in 0..BATCH {
                    batch.push(source.allocate(&kind)?);
                }
                if freed_by == FreedBy::Other {
                    to.put(&mut batch);
                    if !from.take(&mut batch, &failed) {
                        return Ok(());
                    }
                }
                for area in batch.drain(..) {
                    // SAFETY: the area is live, nobody uses it, and nobody else has it now.
                    unsafe { source.free(area)? };
                }
            }
            Ok(())
        };
        let done = work();
        failed.fetch_or(done.is_err(), Ordering::Relaxed);
        done
    })
}

/// Where a thread leaves a batch for the other one. It is empty when the next one comes: before it leaves another, a thread
/// takes one that the other leaves only after it has taken this.
struct Mailbox<A> {
    is_full: AtomicBool,
    batch: Mutex<Vec<A>>,
}

impl<A> Mailbox<A> {
    fn new() -> Self {
        Self {
            is_full: AtomicBool::new(false),
            batch: Mutex::new(Vec::with_capacity(BATCH)),
        }
    }

    fn swap(&self, batch: &mut Vec<A>) {
        mem::swap(
            batch,
            &mut *self.batch.lock().unwrap_or_else(PoisonError::into_inner),
        );
    }

    fn put(&self, batch: &mut Vec<A>) {
        let mut turns: u32 = 0;
        while self.is_full.load(Ordering::Acquire) {
            pause(&mut turns);
        }
        self.swap(batch);
        self.is_full.store(true, Ordering::Release);
    }

    /// False if none will come.
    fn take(&self, batch: &mut Vec<A>, failed: &AtomicBool) -> bool {
        let mut turns: u32 = 0;
        while !self.is_full.load(Ordering::Acquire) {
            if failed.load(Ordering::Relaxed) {
                return false;
            }
            pause(&mut turns);
        }
        self.swap(batch);
        self.is_full.store(false, Ordering::Release);
        true
    }
}

fn pause(turns: &mut u32) {
    *turns = turns.wrapping_add(1);
    match *turns % SPINS_PER_YIELD {
        0 => thread::yield_now(),
        _ => hint::spin_loop(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::sync::atomic::AtomicUsize;
    use std::thread::ThreadId;

    /// Remembers who allocated an area; counts what others freed, and fails after some allocations.
    #[derive(Clone, Copy)]
    struct Watched<'a> {
        next: &'a AtomicUsize,
        live: &'a Mutex<HashMap<usize, ThreadId>>,
        freed_by_others: &'a AtomicUsize,
        limit: usize,
    }

    impl Source for Watched<'_> {
        const NAME: &'static str = "watched";
        type Area = usize;
        type Kind = usize;

        fn kind(self, bytes: usize) -> usize {
            bytes
        }

        fn allocate(self, &bytes: &usize) -> Result<usize, WorkloadError> {
            let area = self.next.fetch_add(1, Ordering::Relaxed);
            if area >= self.limit {
                return Err(WorkloadError::Malloc { bytes });
            }
            self.live
                .lock()
                .unwrap()
                .insert(area, thread::current().id());
            Ok(area)
        }

        unsafe fn free(self, area: usize) -> Result<(), WorkloadError> {
            let owner = self.live.lock().unwrap().remove(&area).expect("it is live");
            let by_other = owner != thread::current().id();
            self.freed_by_others
                .fetch_add(usize::from(by_other), Ordering::Relaxed);
            Ok(())
        }
    }

    /// Frees by the other thread, and areas left, of 2 x 10 batches.
    fn watch(freed_by: FreedBy, limit: usize) -> (Result<Duration, WorkloadError>, usize, usize) {
        let (next, freed_by_others) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let live = Mutex::new(HashMap::new());
        let source = Watched {
            next: &next,
            live: &live,
            freed_by_others: &freed_by_others,
            limit,
        };
        let result = run(source, 8, freed_by, 10);
        (
            result,
            freed_by_others.into_inner(),
            live.into_inner().unwrap().len(),
        )
    }

    #[test]
    fn all_are_freed_by_the_other_thread() {
        let (result, by_others, left) = watch(FreedBy::Other, usize::MAX);
        result.unwrap();
        assert_eq!((by_others, left), (2 * 10 * BATCH, 0));
    }

    #[test]
    fn all_are_freed_by_the_same_thread() {
        let (result, by_others, left) = watch(FreedBy::Same, usize::MAX);
        result.unwrap();
        assert_eq!((by_others, left), (0, 0));
    }

    #[test]
    fn a_thread_does_not_wait_for_one_that_failed() {
        let (result, ..) = watch(FreedBy::Other, 5 * BATCH);
        assert!(result.is_err());
    }
}
