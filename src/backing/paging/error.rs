//! Why a paging backing cannot be set up, its first chunk not be built, an instance not be made of both, and initial values not
//! be set.

use core::fmt;

use crate::backing::BackingError;
use crate::request::SetupError;
use crate::unit::BuildError;

/// Why a [`Paging`](super::Paging) could not be set up. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PagingError {
    /// The plan is for pages of another size than 4 KiB.
    PageSize {
        /// The page size of the plan.
        page_bytes: usize,
    },
    /// A unit does not fit in its window.
    UnitTooLarge {
        /// Length of a unit.
        unit_bytes: usize,
        /// Length of a window.
        limit_bytes: usize,
    },
    /// The window does not begin where a level-4 entry does.
    WindowMisaligned {
        /// Where it begins.
        address: usize,
        /// What that must be a multiple of.
        align_bytes: usize,
    },
    /// The windows of all units reach over the end of their half of the address space.
    WindowTooLong {
        /// Where they begin.
        address: usize,
        /// Their length together.
        bytes: usize,
    },
    /// A level-4 entry of the window is in use.
    WindowInUse {
        /// The first address that it maps.
        address: usize,
    },
    /// The distance from the template to a unit is no address that a GS base can be.
    OffsetNotCanonical {
        /// The distance.
        offset: usize,
    },
    /// No frames for tables.
    Backing(BackingError),
}

impl fmt::Display for PagingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PageSize { page_bytes } => {
                write!(
                    f,
                    "a plan for pages of {page_bytes} bytes, they have 4096 here"
                )
            }
            Self::UnitTooLarge {
                unit_bytes,
                limit_bytes,
            } => {
                write!(f, "units of {unit_bytes} bytes, the limit is {limit_bytes}")
            }
            Self::WindowMisaligned {
                address,
                align_bytes,
            } => {
                write!(
                    f,
                    "a window at {address:#x}, which is no multiple of {align_bytes:#x}"
                )
            }
            Self::WindowTooLong { address, bytes } => {
                write!(
                    f,
                    "a window of {bytes} bytes at {address:#x} reaches over the end of its half of the address space"
                )
            }
            Self::WindowInUse { address } => {
                write!(f, "the level-4 entry for {address:#x} is in use")
            }
            Self::OffsetNotCanonical { offset } => {
                write!(
                    f,
                    "a unit lies {offset:#x} from the template, which no GS base can be"
                )
            }
            Self::Backing(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for PagingError {}

/// Why a first chunk could not be built. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FirstChunkError {
    /// The plan or the template is another than that of the set-up.
    OtherPlan {
        /// What differs.
        what: &'static str,
        /// What it is now.
        given: usize,
        /// What it was at set-up.
        set_up_for: usize,
    },
    /// It has been built before.
    Again,
    /// As builders have it.
    Build(BuildError<BackingError>),
}

impl From<BuildError<BackingError>> for FirstChunkError {
    fn from(error: BuildError<BackingError>) -> Self {
        Self::Build(error)
    }
}

impl fmt::Display for FirstChunkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherPlan {
                what,
                given,
                set_up_for,
            } => {
                write!(
                    f,
                    "{what}: {given:#x}, but the set-up was for {set_up_for:#x}"
                )
            }
            Self::Again => f.write_str("the first chunk has been built before"),
            Self::Build(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for FirstChunkError {}

/// Why there is no instance by [`Paging::set_up`](super::Paging::set_up).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InstanceError {
    /// There are no windows. Nothing has changed.
    Windows(PagingError),
    /// There is no first chunk. Nothing has changed.
    FirstChunk(FirstChunkError),
    /// There is no allocator. What it was to stand on is lost: frames, and the level-4 entries of the windows.
    Allocator(SetupError),
}

impl fmt::Display for InstanceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Windows(error) => error.fmt(f),
            Self::FirstChunk(error) => error.fmt(f),
            Self::Allocator(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for InstanceError {}

/// Why initial values could not be set. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InitialError {
    /// They do not lie in the static or the reserved region.
    Outside {
        /// The neutral address of the first.
        neutral: usize,
        /// Their length.
        bytes: usize,
        /// Where the two regions begin.
        base: usize,
        /// Length of the two regions.
        limit_bytes: usize,
    },
    /// The first chunk has not been built.
    NoFirstChunk,
}

impl fmt::Display for InitialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outside {
                neutral,
                bytes,
                base,
                limit_bytes,
            } => {
                write!(
                    f,
                    "{bytes} bytes at {neutral:#x} are not among the {limit_bytes} at {base:#x} that have initial values"
                )
            }
            Self::NoFirstChunk => f.write_str("the first chunk has not been built"),
        }
    }
}

impl core::error::Error for InitialError {}
