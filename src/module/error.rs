//! Why a module cannot be attached, or a library not be loaded.

use core::error::Error;
use core::fmt;
use std::path::PathBuf;
use std::string::String;

use crate::request::{AllocError, CpuError};

/// Why a module was not attached. Nothing has changed then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttachError {
    /// Host and module are of versions of this crate that do not fit together.
    Abi {
        /// The version of the other side's table.
        theirs: u32,
        /// The version of the side that refuses.
        ours: u32,
    },
    /// Host and module have been built for windows of different sizes.
    Window {
        /// What the module's instructions count with, in bytes.
        module_bytes: usize,
        /// What the host has, in bytes.
        host_bytes: usize,
    },
    /// The reserved region has no room that is large enough, or none that is aligned far enough.
    ReservedExhausted {
        /// The size of all variables of the module.
        bytes: usize,
        /// Their alignment.
        align_bytes: usize,
        /// What is free there, in all, in bytes.
        free_bytes: usize,
    },
    /// The host has no area for the variables.
    Alloc(AllocError),
    /// A CPU could not be given memory for the variables.
    NoMemory(CpuError),
    /// Another instance of the process has attached it.
    AttachedElsewhere,
    /// The module must stay mapped, for its operations leave traces in threads, and the system refuses that.
    NotPinned,
    /// The caller is itself a module: the program must do it.
    NoHost,
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Abi { theirs, ours } => write!(
                f,
                "the other side's table of functions has version {theirs} or another length, ours has version {ours}"
            ),
            Self::Window {
                module_bytes,
                host_bytes,
            } => write!(
                f,
                "the module wants windows of {module_bytes} bytes, the host's have {host_bytes}"
            ),
            Self::ReservedExhausted {
                bytes,
                align_bytes,
                free_bytes,
            } => write!(
                f,
                "no room for the {bytes} bytes of the module, aligned to {align_bytes}, in the reserved region, {free_bytes} are free"
            ),
            Self::Alloc(error) => error.fmt(f),
            Self::NoMemory(error) => error.fmt(f),
            Self::AttachedElsewhere => {
                f.write_str("the module is attached to another instance of the process")
            }
            Self::NotPinned => f.write_str("the module cannot be kept from being unmapped"),
            Self::NoHost => f.write_str("a module cannot be a host"),
        }
    }
}

impl Error for AttachError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Alloc(error) => Some(error),
            Self::NoMemory(error) => Some(error),
            _ => None,
        }
    }
}

/// Why a library was not loaded. It has been closed again.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LoadError {
    /// The system does not load it.
    Open {
        /// The library.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// It is no module: it does not export [`SYMBOL`](super::SYMBOL).
    NotAModule {
        /// The library.
        path: PathBuf,
    },
    /// It cannot be attached.
    Attach {
        /// The library.
        path: PathBuf,
        /// Why not.
        error: AttachError,
    },
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open { path, reason } => write!(f, "{}: {reason}", path.display()),
            Self::NotAModule { path } => {
                write!(f, "{}: no symbol {:?}", path.display(), super::SYMBOL)
            }
            Self::Attach { path, error } => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl Error for LoadError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Attach { error, .. } => Some(error),
            Self::Open { .. } | Self::NotAModule { .. } => None,
        }
    }
}
