//! What is asked of an instance, and why it is refused: flags, requests, errors. `docs/misuse.md` has a row for each
//! wrong call.

use core::alloc::Layout;
use core::fmt;
use core::mem::{align_of, size_of};

use bitflags::bitflags;

use crate::backing::{BackingError, Context, Window};
use crate::cache::CacheKey;
use crate::unit::CpuId;

bitflags! {
    /// How a request is to be served.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct AllocFlags: u32 {
        /// The caller must not sleep. Pages may still be populated and spare chunks used.
        const ATOMIC = 1 << 0;
        /// From the reserved region of the first chunk: static variables of modules.
        const RESERVED = 1 << 1;
        /// The area need not be zero. This allows what would cost less, and asks for nothing: calls that hand out values of a
        /// type ([`alloc_percpu_with`](crate::alloc_percpu_with)) need the zeroes, and get them all the same.
        const NO_ZERO = 1 << 2;
        /// A refusal is expected: the event hook should stay quiet about it.
        const NO_WARN = 1 << 3;
        /// The caller may have interrupted the allocator itself (NMI, signal handler): never wait for the lock, and
        /// populate nothing; [`AllocError::Busy`] otherwise.
        const TRY = 1 << 4;
    }
}

bitflags! {
    /// How an area is to be freed.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct FreeFlags: u32 {
        /// The caller must not sleep.
        const ATOMIC = 1 << 0;
        /// The area lies in the reserved region.
        const RESERVED = 1 << 1;
        /// Never wait for the lock; [`FreeError::Busy`] otherwise.
        const TRY = 1 << 4;
    }
}

/// A request for an area.
///
/// What a CPU's cache goes by is worked out when a request is made: one that is asked for often should be a constant, or made
/// once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub(crate) bytes: usize,
    pub(crate) align: usize,
    pub(crate) flags: AllocFlags,
    pub(crate) owner: usize,
    /// Follows from the others: requests are made by [`made`](Self::made) only.
    pub(crate) key: CacheKey,
}

impl fmt::Debug for Request {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Request")
            .field("bytes", &self.bytes)
            .field("align", &self.align)
            .field("flags", &self.flags)
            .field("owner", &self.owner)
            .finish()
    }
}

/// The request for a layout, which cannot mix up size and alignment.
///
/// ```
/// use core::alloc::Layout;
/// use pcpu::Request;
///
/// let request = Request::from(Layout::new::<[u32; 3]>());
/// assert_eq!(request, Request::new(12, 4));
/// ```
impl From<Layout> for Request {
    fn from(layout: Layout) -> Self {
        Self::new(layout.size(), layout.align())
    }
}

impl Request {
    /// A request for so many bytes, so aligned, that may sleep, for zeroed memory of the dynamic regions.
    #[inline]
    pub const fn new(bytes: usize, align: usize) -> Self {
        Self::made(bytes, align, AllocFlags::empty(), 0)
    }

    #[inline]
    const fn made(bytes: usize, align: usize, flags: AllocFlags, owner: usize) -> Self {
        Self {
            bytes,
            align,
            flags,
            owner,
            key: CacheKey::of(bytes, align, flags),
        }
    }

    /// Size of each CPU's copy, in bytes.
    #[inline]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Alignment in bytes: a power of two.
    #[inline]
    pub const fn align(&self) -> usize {
        self.align
    }

    /// How to serve it.
    #[inline]
    pub const fn flags(&self) -> AllocFlags {
        self.flags
    }

    /// Passed on to the event hook: who asks (a call site, an account). The allocator makes nothing of it.
    #[inline]
    pub const fn owner(&self) -> usize {
        self.owner
    }

    /// The request for a `T`.
    #[inline]
    pub const fn of<T>() -> Self {
        Self::new(size_of::<T>(), align_of::<T>())
    }

    /// The same request for so many bytes, so aligned.
    #[must_use]
    #[inline]
    pub const fn with_size(self, bytes: usize, align: usize) -> Self {
        Self::made(bytes, align, self.flags, self.owner)
    }

    /// The same request with `flags`.
    #[must_use]
    #[inline]
    pub const fn with_flags(self, flags: AllocFlags) -> Self {
        Self::made(self.bytes, self.align, flags, self.owner)
    }

    /// The same request with a tag for the event hook.
    #[must_use]
    pub const fn with_owner(self, owner: usize) -> Self {
        Self { owner, ..self }
    }

    /// How to free what the request was served with.
    pub(crate) fn free_flags(&self) -> FreeFlags {
        let pairs = [
            (AllocFlags::ATOMIC, FreeFlags::ATOMIC),
            (AllocFlags::RESERVED, FreeFlags::RESERVED),
            (AllocFlags::TRY, FreeFlags::TRY),
        ];
        let is_wanted = |(flag, _): &(AllocFlags, FreeFlags)| self.flags.contains(*flag);
        let wanted = pairs.into_iter().filter(is_wanted);
        wanted.map(|(_, flag)| flag).collect()
    }

    pub(crate) fn context(&self) -> Context {
        match self.flags.intersects(AllocFlags::ATOMIC | AllocFlags::TRY) {
            true => Context::Atomic,
            false => Context::MaySleep,
        }
    }
}

/// No page is smaller.
const LEAST_PAGE_BYTES: usize = 4096;

/// Why a request was refused. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AllocError {
    /// A size of 0 was asked for.
    ZeroSize,
    /// More than the largest request was asked for.
    TooLarge {
        /// The size asked for.
        bytes: usize,
        /// The largest size served.
        limit_bytes: usize,
    },
    /// The alignment is no power of two.
    AlignNotPowerOfTwo {
        /// The alignment asked for.
        align: usize,
    },
    /// The geometry of the instance serves no such alignment.
    AlignTooLarge {
        /// The alignment asked for.
        align: usize,
        /// The largest alignment served. It is a page where units lie a whole number of pages apart.
        limit: usize,
    },
    /// Flags that do not exist.
    UnknownFlags {
        /// The bits that mean nothing.
        bits: u32,
    },
    /// The reserved region has no room left for it.
    ReservedExhausted {
        /// The size asked for.
        bytes: usize,
        /// What is free there, in all.
        free_bytes: usize,
    },
    /// The backing could not provide pages, address space or metadata.
    Backing(BackingError),
    /// The lock is taken or memory would have to be populated, and the request was [`AllocFlags::TRY`].
    Busy,
}

impl From<BackingError> for AllocError {
    fn from(error: BackingError) -> Self {
        Self::Backing(error)
    }
}

impl fmt::Display for AllocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ZeroSize => f.write_str("a size of 0 bytes"),
            Self::TooLarge { bytes, limit_bytes } => {
                write!(f, "a size of {bytes} bytes, the limit is {limit_bytes}")
            }
            Self::AlignNotPowerOfTwo { align } => {
                write!(f, "an alignment of {align}, which is no power of two")
            }
            Self::AlignTooLarge { align, limit } => {
                write!(f, "an alignment of {align}, the limit is {limit}")?;
                match *limit < LEAST_PAGE_BYTES {
                    true => f.write_str(
                        "; a page where units lie whole pages apart, in a process by pcpu::page_geometry!()",
                    ),
                    false => Ok(()),
                }
            }
            Self::UnknownFlags { bits } => write!(f, "unknown flags {bits:#x}"),
            Self::ReservedExhausted { bytes, free_bytes } => {
                write!(
                    f,
                    "no room for {bytes} bytes in the reserved region, {free_bytes} are free"
                )
            }
            Self::Backing(error) => error.fmt(f),
            Self::Busy => f.write_str("the allocator is busy"),
        }
    }
}

impl core::error::Error for AllocError {}

/// Why an address was not freed. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FreeError {
    /// No neutral address of this instance.
    Foreign {
        /// The address.
        address: usize,
    },
    /// No multiple of the 4-byte grain.
    Misaligned {
        /// The address.
        address: usize,
    },
    /// A static variable.
    Static {
        /// The address.
        address: usize,
    },
    /// In the reserved region, and [`FreeFlags::RESERVED`] was not given.
    Reserved {
        /// The address.
        address: usize,
    },
    /// Not in the reserved region, and [`FreeFlags::RESERVED`] was given.
    NotReserved {
        /// The address.
        address: usize,
    },
    /// Free already, or never allocated.
    NotAllocated {
        /// The address.
        address: usize,
    },
    /// Inside an area.
    Interior {
        /// The address.
        address: usize,
        /// Where the area starts.
        start: usize,
    },
    /// Flags that do not exist.
    UnknownFlags {
        /// The bits that mean nothing.
        bits: u32,
    },
    /// The lock is taken, and the call was [`FreeFlags::TRY`].
    Busy,
}

impl fmt::Display for FreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign { address } => {
                write!(f, "{address:#x} is no per-CPU address of this instance")
            }
            Self::Misaligned { address } => write!(f, "{address:#x} is no multiple of 4"),
            Self::Static { address } => write!(f, "{address:#x} is a static variable"),
            Self::Reserved { address } => write!(f, "{address:#x} lies in the reserved region"),
            Self::NotReserved { address } => {
                write!(f, "{address:#x} does not lie in the reserved region")
            }
            Self::NotAllocated { address } => write!(f, "{address:#x} is not allocated"),
            Self::UnknownFlags { bits } => write!(f, "unknown flags {bits:#x}"),
            Self::Interior { address, start } => {
                write!(f, "{address:#x} is inside the area at {start:#x}")
            }
            Self::Busy => f.write_str("the allocator is busy"),
        }
    }
}

impl core::error::Error for FreeError {}

/// Why not all of many areas were freed: those before it were, it and those behind it stay as they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FreeManyError {
    /// How many were freed, and so the index of the one that was not.
    pub freed: usize,
    /// Why that one was not.
    pub error: FreeError,
}

impl fmt::Display for FreeManyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "after {} that were freed: {}", self.freed, self.error)
    }
}

impl core::error::Error for FreeManyError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// Why a CPU cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CpuError {
    /// No possible CPU.
    NotPossible {
        /// The CPU asked for.
        cpu: CpuId,
        /// One more than the highest possible CPU.
        nr_cpu_ids: u32,
    },
    /// Its copies could not be given memory.
    NoMemory {
        /// The CPU asked for.
        cpu: CpuId,
        /// What was lacking.
        error: BackingError,
    },
}

impl fmt::Display for CpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPossible { cpu, nr_cpu_ids } => {
                write!(
                    f,
                    "CPU {cpu} is not possible, possible CPUs lie below {nr_cpu_ids}"
                )
            }
            Self::NoMemory { cpu, error } => write!(f, "CPU {cpu} has no memory: {error}"),
        }
    }
}

impl core::error::Error for CpuError {}

/// Why an instance could not be set up. Nothing is left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SetupError {
    /// The window begins elsewhere than the first chunk.
    WindowBase {
        /// Where the window begins.
        base: usize,
        /// Neutral address of the first chunk.
        first_chunk: usize,
    },
    /// The window's pitch is less than a unit, or no multiple of the page size.
    WindowPitch {
        /// The pitch.
        pitch_bytes: usize,
        /// Length of a unit.
        unit_bytes: usize,
    },
    /// The window is empty, begins at 0 or at no multiple of the grain, or wraps around the end of the address space.
    Window {
        /// The window.
        window: Window,
    },
    /// Units are too long.
    UnitBytes {
        /// Length of a unit.
        unit_bytes: usize,
        /// The longest possible.
        limit_bytes: usize,
    },
    /// The policy allows larger requests than a unit, or the pages that one request may touch, can serve; or none at all.
    MaxAlloc {
        /// The policy's largest request.
        bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// The policy's largest alignment is 0.
    MaxAlign {
        /// The policy's largest alignment.
        align: usize,
    },
    /// The backing lacks metadata.
    Backing(BackingError),
    /// The instance has been set up before.
    Again,
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WindowBase { base, first_chunk } => {
                write!(
                    f,
                    "the window begins at {base:#x}, the first chunk at {first_chunk:#x}"
                )
            }
            Self::WindowPitch {
                pitch_bytes,
                unit_bytes,
            } => {
                write!(
                    f,
                    "a pitch of {pitch_bytes} bytes is no whole number of pages or less than a unit of {unit_bytes}"
                )
            }
            Self::Window {
                window:
                    Window {
                        base,
                        pitch_bytes,
                        chunks,
                    },
            } => {
                write!(
                    f,
                    "a window of {chunks} chunks of {pitch_bytes} bytes at {base:#x}"
                )
            }
            Self::UnitBytes {
                unit_bytes,
                limit_bytes,
            } => {
                write!(f, "units of {unit_bytes} bytes, the limit is {limit_bytes}")
            }
            Self::MaxAlloc { bytes, limit_bytes } => {
                write!(
                    f,
                    "a largest request of {bytes} bytes, it is at least 1 and at most {limit_bytes}"
                )
            }
            Self::MaxAlign { align } => {
                write!(f, "a largest alignment of {align} bytes, it is at least 1")
            }
            Self::Backing(error) => error.fmt(f),
            Self::Again => f.write_str("the instance is set up already"),
        }
    }
}

impl core::error::Error for SetupError {}
