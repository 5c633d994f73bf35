//! How far the units are open: which chunks' addresses can be read and written.
//!
//! ```text
//!  a unit's window:  | chunk 0 | 1  2  3  4 ... | ... no access
//!                              ^ 1              ^ end
//! ```
//! To open one chunk is a system call for every unit, which a process with many CPUs waits for longer than for all else that
//! a chunk is made of. So they are opened many at a time, and stay open when they are released, until most of them are
//! not needed. It costs addresses: what is open has no memory before it is touched. But it counts as data of the process, so
//! where there is a limit to that (`ulimit -d`) chunks are opened one by one. Two things are not asked for: where all memory is locked
//! (`mlockall`) what is open has memory at once, and where the system counts what may be touched (`vm.overcommit_memory=2`) it counts
//! what is open.
//!
//! What always holds:
//! - the chunks from 1 to `end` are open in every unit, and those behind are closed, but where the system would not close
//!   them; chunk 0 is its builder's matter;
//! - every reserved chunk lies below `end`.
//!
//! The lock is held during calls of the backing only, and by no signal handler: requests that must not wait make no chunk.
//! When an instance is at rest no such call is under way, so that a forked child finds it free.

use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Resource, getrlimit};

use super::numbers::Numbers;

/// What is open of each unit behind the first chunk, at least.
const LEAST_BYTES: usize = 2 << 20;

/// Chunks stay open as long as those in use reach as far as this part of them.
const KEPT_SHARE: usize = 4;

/// See above.
#[derive(Debug)]
pub(super) struct OpenChunks {
    /// Of a window.
    chunks: usize,
    /// Those that are always open, the first among them.
    least: usize,
    steps: Steps,
    state: Mutex<State>,
}

/// How much is opened at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Steps {
    /// As much again as is open.
    Doubling,
    /// What is wanted.
    Single,
}

impl Steps {
    /// The smaller of two.
    fn and(self, other: Self) -> Self {
        match self {
            Self::Doubling => other,
            Self::Single => Self::Single,
        }
    }

    /// What suits the process now.
    fn of_process() -> Self {
        match getrlimit(Resource::Data).current {
            None => Self::Doubling,
            Some(_) => Self::Single,
        }
    }
}

/// What changes about it.
#[derive(Debug)]
pub(super) struct State {
    /// One more than the last open chunk.
    end: usize,
    reserved: Numbers,
}

impl OpenChunks {
    /// For a window of so many chunks. Nothing is open.
    pub(super) fn new(chunks: usize, unit_bytes: usize) -> Self {
        Self::with_steps(chunks, unit_bytes, Steps::of_process())
    }

    fn with_steps(chunks: usize, unit_bytes: usize, steps: Steps) -> Self {
        let least = match steps {
            Steps::Doubling => 1 + (LEAST_BYTES / unit_bytes).max(1),
            Steps::Single => 1,
        };
        Self {
            chunks,
            least: least.min(chunks),
            steps,
            state: Mutex::new(State {
                end: 1,
                reserved: Numbers::below(chunks),
            }),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far to open the units when the first chunk is made.
    pub(super) fn at_set_up(&self) -> usize {
        self.least
    }

    /// How far to open the units where `chunk` is wanted, which is not open: the ends to be tried, one after the other.
    pub(super) fn wider(&self, state: &State, chunk: usize) -> [usize; 2] {
        let enough = chunk + 1;
        // The limit may have come since set-up.
        let ample = match self.steps.and(Steps::of_process()) {
            Steps::Doubling => self.least.max(2 * state.end).min(self.chunks),
            Steps::Single => enough,
        };
        [ample.max(enough), enough]
    }

    /// How far to leave the units open: all of it, unless hardly any of it is needed.
    pub(super) fn narrower(&self, state: &State) -> usize {
        let needed = state.reserved.last().map_or(1, |last| last + 1);
        match needed.saturating_mul(KEPT_SHARE) <= state.end {
            true => (state.end / 2).max(self.least).min(state.end),
            false => state.end,
        }
    }
}

impl State {
    /// One more than the last open chunk.
    pub(super) fn end(&self) -> usize {
        self.end
    }

    /// Notes that the chunks before `end` are open, and no others.
    pub(super) fn set_end(&mut self, end: usize) {
        self.end = end;
    }

    /// Whether the chunk can be used.
    pub(super) fn is_open(&self, chunk: usize) -> bool {
        chunk < self.end
    }

    /// Notes that an open chunk is reserved.
    pub(super) fn note_reserved(&mut self, chunk: usize) {
        debug_assert!(self.is_open(chunk));
        self.reserved.insert(chunk..chunk + 1);
    }

    /// Notes that a chunk is not reserved any more.
    pub(super) fn note_released(&mut self, chunk: usize) {
        self.reserved.remove(chunk..chunk + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT_BYTES: usize = 256 << 10;

    /// Reserves chunks, or releases them, and has what would be opened or closed be so.
    fn after(open: &OpenChunks, chunks: &[usize], note: fn(&mut State, usize)) -> usize {
        let mut state = open.lock();
        for &chunk in chunks {
            if !state.is_open(chunk) {
                state.end = open.wider(&state, chunk)[0];
            }
            note(&mut state, chunk);
            state.end = open.narrower(&state);
        }
        state.end
    }

    #[test]
    fn units_are_opened_by_doubling_and_closed_by_halving() {
        let open = OpenChunks::with_steps(100, UNIT_BYTES, Steps::Doubling);
        let reserve = |chunks: &[usize]| after(&open, chunks, State::note_reserved);
        let release = |chunks: &[usize]| after(&open, chunks, State::note_released);
        assert_eq!(reserve(&[1]), 9);
        assert_eq!(release(&[1]), 9);
        assert_eq!(reserve(&[1, 2, 3, 4, 5, 6, 7, 8]), 9);
        assert_eq!(reserve(&[9]), 18);
        assert_eq!(reserve(&[60]), 61);
        assert_eq!(reserve(&[61]), 100);
        // 61 still is reserved, then 9 is the last.
        assert_eq!(release(&[60]), 100);
        assert_eq!(release(&[61]), 50);
        // A chunk that comes and goes opens and closes nothing.
        assert_eq!(reserve(&[40]), 50);
        assert_eq!(release(&[40]), 25);
        assert_eq!(reserve(&[20]), 25);
        assert_eq!(release(&[20]), 25);
        assert_eq!(release(&[9, 8, 7, 6, 5, 4, 3, 2, 1]), 9);
    }

    #[test]
    fn what_is_wanted_is_tried_at_the_last() {
        let doubling =
            |chunks, unit_bytes| OpenChunks::with_steps(chunks, unit_bytes, Steps::Doubling);
        let open = doubling(20, UNIT_BYTES);
        assert_eq!(open.wider(&open.lock(), 1), [9, 2]);
        assert_eq!(open.wider(&open.lock(), 15), [16, 16]);
        open.lock().end = 16;
        assert_eq!(open.wider(&open.lock(), 16), [20, 17]);
        // Units that are longer, and a window that is shorter, than what is opened at least.
        let long = doubling(20, 4 << 20);
        assert_eq!(long.wider(&long.lock(), 1), [2, 2]);
        let short = doubling(4, UNIT_BYTES);
        assert_eq!(short.wider(&short.lock(), 1), [4, 2]);
    }

    #[test]
    fn where_data_is_limited_a_chunk_is_opened_at_a_time() {
        let open = OpenChunks::with_steps(20, UNIT_BYTES, Steps::Single);
        let reserve = |chunks: &[usize]| after(&open, chunks, State::note_reserved);
        let release = |chunks: &[usize]| after(&open, chunks, State::note_released);
        assert_eq!(open.at_set_up(), 1);
        assert_eq!(reserve(&[1]), 2);
        assert_eq!(reserve(&[2, 3, 4, 5, 6, 7]), 8);
        assert_eq!(release(&[7, 6, 5, 4, 3]), 8);
        assert_eq!(release(&[2]), 4);
        assert_eq!(release(&[1]), 2);
    }
}
