//! What `pcpu bench` and the benchmarks in `benches/` measure, so that both measure the same.
//!
//! | module | what it has |
//! |---|---|
//! | [`home`] | instances of any number of CPUs, beside that of the process |
//! | [`areas`] | where areas come from: an instance, or libc's heap |
//! | [`churn`] | many live areas of mixed sizes |
//! | [`dirty`] | areas whose copies are all written to |
//! | [`exchange`] | areas that are freed on another CPU |
//! | [`stores`] | the bare loop over all CPUs' copies |
//! | [`together`] | threads that work at once, each on its CPU |
//!
//! Only [`together`] and [`dirty`] keep a clock, and nothing knows of a figure.

use std::fmt;

use pcpu::{AllocError, CpuError, FreeError};

pub mod areas;
pub mod churn;
pub mod dirty;
pub mod exchange;
pub mod home;
pub mod stores;
pub mod together;

/// Why a workload cannot go on.
#[derive(Debug)]
pub enum WorkloadError {
    /// A request was refused.
    Alloc {
        /// The size asked for.
        bytes: usize,
        /// Why.
        error: AllocError,
    },
    /// `malloc` has no memory.
    Malloc {
        /// The size asked for.
        bytes: usize,
    },
    /// A live area was not taken back.
    Free(FreeError),
    /// A CPU cannot be used.
    Cpu(CpuError),
    /// An instance could not be made.
    Home {
        /// The CPUs that it was to have.
        cpus: u32,
        /// Why.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl fmt::Display for WorkloadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alloc { bytes, error } => write!(f, "{bytes} bytes: {error}"),
            Self::Malloc { bytes } => write!(f, "{bytes} bytes: malloc has no memory"),
            Self::Free(error) => write!(f, "a live area was not taken back: {error}"),
            Self::Cpu(error) => error.fmt(f),
            Self::Home { cpus, error } => write!(f, "an instance with {cpus} CPUs: {error}"),
        }
    }
}

impl std::error::Error for WorkloadError {}

impl From<CpuError> for WorkloadError {
    fn from(error: CpuError) -> Self {
        Self::Cpu(error)
    }
}
