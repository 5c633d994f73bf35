//! Why a module cannot be loaded: what is wrong with the [object](super::object), or that the kernel has no place for a section.

use core::fmt;

use pcpu::{AllocError, CpuError};

use super::object::ObjectError;
use crate::memory::PAGE_BYTES;
use crate::memory::paging::OutOfFrames;

/// Why a module cannot be loaded. Nothing is left of it.
pub type LoadError = ObjectError<'static, PlaceError>;

/// Why a section has no memory.
#[derive(Debug)]
pub enum PlaceError {
    /// No room for its per-CPU variables.
    PerCpu(AllocError),
    /// A CPU has no memory for its copies.
    Cpu(CpuError),
    /// No memory for its code or data, or for the initial values of its per-CPU variables.
    OutOfFrames,
    /// More code or data than a section may have.
    TooLong {
        /// So many bytes.
        bytes: usize,
        /// And so many are possible.
        limit_bytes: usize,
    },
    /// It must lie at a multiple of more than a page.
    Align {
        /// What it asks for, in bytes.
        align: usize,
    },
    /// Too many areas of per-CPU variables that do not lie in the reserved region.
    Areas {
        /// So many are possible.
        limit: usize,
    },
}

impl fmt::Display for PlaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerCpu(error) => error.fmt(f),
            Self::Cpu(error) => error.fmt(f),
            Self::OutOfFrames => f.write_str("no memory for code, data or initial values"),
            Self::TooLong { bytes, limit_bytes } => {
                write!(f, "a section of {bytes} bytes, the limit is {limit_bytes}")
            }
            Self::Align { align } => {
                write!(
                    f,
                    "an alignment of {align} bytes, the limit is {PAGE_BYTES}"
                )
            }
            Self::Areas { limit } => {
                write!(f, "more areas outside of the reserved region than {limit}")
            }
        }
    }
}

impl core::error::Error for PlaceError {}

impl From<AllocError> for PlaceError {
    fn from(error: AllocError) -> Self {
        Self::PerCpu(error)
    }
}

impl From<CpuError> for PlaceError {
    fn from(error: CpuError) -> Self {
        Self::Cpu(error)
    }
}

impl From<OutOfFrames> for PlaceError {
    fn from(_: OutOfFrames) -> Self {
        Self::OutOfFrames
    }
}
