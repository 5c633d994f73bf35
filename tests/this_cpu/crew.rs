//! Who takes part in a storm, and the process without restartable sequences that one may be in.

use crate::child::run_in_child;

/// How many threads of each kind there are.
#[derive(Debug, Clone, Copy)]
pub struct Crew {
    /// Threads as glibc makes them.
    pub threads: usize,
    /// Strays: threads that have had their registration for restartable sequences taken.
    pub strays: usize,
}

impl Crew {
    pub const REGISTERED: Self = Self {
        threads: 8,
        strays: 0,
    };
    pub const HALF_STRAYS: Self = Self {
        threads: 4,
        strays: 4,
    };
    pub const FEW_STRAYS: Self = Self {
        threads: 6,
        strays: 2,
    };

    /// How many threads there are in all.
    pub fn size(self) -> usize {
        self.threads + self.strays
    }
}

/// Has the test of this name run in a process whose glibc registers nothing: `work` there.
pub fn without_restartable_sequences(test: &str, work: impl FnOnce()) {
    if !run_in_child(test, |command| {
        command.env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    }) {
        work();
    }
}
