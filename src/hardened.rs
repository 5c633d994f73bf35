//! The hardened mode of an instance: what is asked of it, and what it finds.
//!
//! [`PerCpuAllocator::harden`](crate::PerCpuAllocator::harden) switches it on before anything is allocated. It is for finding
//! mistakes of the code that uses per-CPU memory, and costs time and memory for it:
//!
//! - every area lies between *guards*, bytes that nobody may write. They are looked at when the area is freed, and by
//!   [`check_areas`](crate::PerCpuAllocator::check_areas): a write before or behind a CPU's copy is found;
//! - an area that is freed is filled with [`POISON`] on every CPU, and kept in *quarantine* until so many others have been freed
//!   after it, or memory runs short; when it leaves, and by `check_areas`, a write after the free is found;
//! - which areas there are stands in a *ledger* of its own, under a lock: of two frees of one area exactly one succeeds,
//!   at whatever moment they come;
//! - when the instance is dropped it tells which areas were never freed, by their sizes.
//!
//! What is found is told to a [`FindingHook`], and mended, so that it is told once. Errors are those of any instance. Memory is
//! zero when it is handed out, as always. There are no caches.
//!
//! # What is different
//! - The largest request may be smaller: area and guards must fit into a unit.
//! - Guards are looked at while the ledger's lock is held; with an interrupt-saving lock interrupts are off for that
//!   long: areas times CPUs, for `check_areas`.
//! - Counters and maps ([`stats`](crate::stats)) count areas with their guards. To the counters an area in quarantine is freed, but
//!   for the peaks; maps and the figures of chunks show what takes room, and so those in quarantine too. Events carry what the
//!   caller sees; `Free` comes when an area goes into quarantine.
//! - Areas of the reserved region have neither guards nor poison: a module that fits fits in hardened mode too.
//! - A CPU that comes late finds zero bytes where others have guards; all of a copy's guards may be zero.
//!
//! # In a process
//! The environment variable [`PCPU_HARDENED`](mod@crate::global#hardened-mode) hardens the process's instance.
//!
//! ```
//! use pcpu::backing::sim::Machine;
//! use pcpu::hardened::{Finding, FindingHook, FindingKind, Hardening, Leaks};
//! use pcpu::unit::CpuId;
//! use pcpu::Request;
//! use std::sync::Mutex;
//!
//! /// Keeps what is found.
//! #[derive(Default)]
//! struct Kept(Mutex<Vec<Finding>>, Mutex<String>);
//!
//! impl FindingHook for Kept {
//!     fn found(&self, finding: &Finding) {
//!         self.0.lock().unwrap().push(*finding);
//!     }
//!     fn leaked(&self, leaks: &Leaks<'_>) {
//!         *self.1.lock().unwrap() = leaks.to_string();
//!     }
//! }
//!
//! let kept: &'static Kept = Box::leak(Box::default());
//! let mut pcpu = Machine::new(2).build()?;
//! pcpu.harden(Hardening::new(kept))?;
//! let counter = pcpu.allocate(&Request::new(24, 8))?;
//! let copy = pcpu.per_cpu_address(counter, CpuId::new(1))?;
//! // SAFETY: the guard behind the copy is memory of the instance. (This is the mistake that is to be found.)
//! unsafe { std::ptr::with_exposed_provenance_mut::<u8>(copy + 24).write(7) };
//! assert_eq!(pcpu.check_areas(), 1);
//! let found = kept.0.lock().unwrap()[0];
//! assert_eq!((found.kind, found.cpu, found.at_bytes), (FindingKind::WrittenBehind, CpuId::new(1), 24));
//! drop(pcpu);
//! assert_eq!(*kept.1.lock().unwrap(), "never freed: 1 area, 24 bytes\n  of 24 bytes: 1\n");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use core::fmt;

use crate::backing::BackingError;
use crate::unit::{CpuId, GRANULE_BYTES};

/// What every byte of a freed area is: pointers made of it are no addresses on the machines that there are.
pub const POISON: u8 = 0xdf;

/// What every byte of a guard is.
pub const GUARD: u8 = 0xb9;

/// The longest guard, in bytes.
pub const MAX_GUARD_BYTES: usize = 1024;

/// The most areas in quarantine.
pub const MAX_QUARANTINE_AREAS: u32 = 1 << 20;

/// How an instance is to be hardened.
#[derive(Clone, Copy)]
pub struct Hardening {
    /// The length of the guards, in bytes: a multiple of 4, at least 4, at most [`MAX_GUARD_BYTES`]. Before an area that is aligned
    /// further the guard is as long as the alignment.
    pub guard_bytes: usize,
    /// How many freed areas are kept from being handed out again: at least 1, at most [`MAX_QUARANTINE_AREAS`].
    pub quarantine_areas: u32,
    /// Who is told of findings.
    pub hook: &'static dyn FindingHook,
}

impl Hardening {
    /// Guards of 16 bytes, 256 areas in quarantine.
    pub const fn new(hook: &'static dyn FindingHook) -> Self {
        Self {
            guard_bytes: 16,
            quarantine_areas: 256,
            hook,
        }
    }

    pub(crate) fn check(&self) -> Result<(), HardenError> {
        let bytes = self.guard_bytes;
        if !(GRANULE_BYTES..=MAX_GUARD_BYTES).contains(&bytes)
            || !bytes.is_multiple_of(GRANULE_BYTES)
        {
            return Err(HardenError::GuardBytes { bytes });
        }
        let areas = self.quarantine_areas;
        if !(1..=MAX_QUARANTINE_AREAS).contains(&areas) {
            return Err(HardenError::QuarantineAreas { areas });
        }
        Ok(())
    }
}

impl fmt::Debug for Hardening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hardening")
            .field("guard_bytes", &self.guard_bytes)
            .field("quarantine_areas", &self.quarantine_areas)
            .finish_non_exhaustive()
    }
}

/// What was done to memory that nobody may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// Before a copy of a live area.
    WrittenBefore,
    /// Behind a copy of a live area.
    WrittenBehind,
    /// To a copy of an area, or to its guards, after it was freed.
    WrittenAfterFree,
}

/// A mistake that a hardened instance has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// What was done.
    pub kind: FindingKind,
    /// The neutral address of the area.
    pub address: usize,
    /// Its size as asked for, in bytes.
    pub bytes: usize,
    /// The tag of the request for it.
    pub owner: usize,
    /// The CPU whose copy it is.
    pub cpu: CpuId,
    /// The first byte that was written, in bytes from the start of the copy.
    pub at_bytes: isize,
    /// What stood there.
    pub found: u8,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            bytes,
            owner,
            cpu,
            at_bytes,
            found,
            ..
        } = *self;
        let what = match self.kind {
            FindingKind::WrittenBefore => "written before its start",
            FindingKind::WrittenBehind => "written behind its end",
            FindingKind::WrittenAfterFree => "written after it was freed",
        };
        write!(
            f,
            "CPU {cpu}'s copy of the area of {bytes} bytes at {address:#x} (owner {owner:#x}): {what}, {found:#04x} at byte \
             {at_bytes}"
        )
    }
}

/// An area of a hardened instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LiveArea {
    /// Its neutral address.
    pub address: usize,
    /// Its size as asked for, in bytes.
    pub bytes: usize,
    /// The tag of the request for it.
    pub owner: usize,
}

/// What became of an area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Live,
    /// In quarantine.
    Freed,
}

/// What a hardened instance knows of an area.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record {
    pub(crate) area: LiveArea,
    /// The length of the guard before it, in bytes.
    pub(crate) front_bytes: usize,
    pub(crate) fate: Fate,
}

impl Record {
    /// The record of no area.
    pub(crate) const VACANT: Self = Self {
        area: LiveArea {
            address: 0,
            bytes: 0,
            owner: 0,
        },
        front_bytes: 0,
        fate: Fate::Live,
    };

    pub(crate) fn is_vacant(&self) -> bool {
        self.area.address == 0
    }
}

/// The areas that were never freed of an instance that ends. `Display` says how many there are of each size.
#[derive(Debug, Clone, Copy)]
pub struct Leaks<'a> {
    /// In the order of their sizes.
    records: &'a [Record],
}

impl<'a> Leaks<'a> {
    /// `records` are in the order of their sizes.
    pub(crate) fn new(records: &'a [Record]) -> Self {
        Self { records }
    }

    /// The areas, smallest first. At least one.
    pub fn areas(&self) -> impl Iterator<Item = LiveArea> + use<'a> {
        self.records.iter().map(|record| record.area)
    }

    /// The sizes as asked for, smallest first, in bytes, and how many areas there are of each.
    pub fn sizes(&self) -> impl Iterator<Item = (usize, usize)> + use<'a> {
        let same = |a: &Record, b: &Record| a.area.bytes == b.area.bytes;
        let groups = self.records.chunk_by(same);
        groups.filter_map(|group| Some((group.first()?.area.bytes, group.len())))
    }
}

impl fmt::Display for Leaks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: usize = self.areas().map(|area| area.bytes).sum();
        let areas = self.records.len();
        let plural = if areas == 1 { "" } else { "s" };
        writeln!(f, "never freed: {areas} area{plural}, {bytes} bytes")?;
        self.sizes()
            .try_for_each(|(bytes, count)| writeln!(f, "  of {bytes} bytes: {count}"))
    }
}

/// Is told what a hardened instance finds.
///
/// It is called with locks of the instance held: it must not call the instance, by whatever way. A call by `TRY` from an
/// interrupt or a signal handler may find something too.
pub trait FindingHook: Sync {
    /// Takes note of a mistake.
    fn found(&self, finding: &Finding);

    /// Takes note of areas that were not freed before the instance was dropped. By default it does nothing.
    fn leaked(&self, leaks: &Leaks<'_>) {
        let _ = leaks;
    }
}

/// Why an instance could not be hardened. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HardenError {
    /// No such guards.
    GuardBytes {
        /// The length asked for, in bytes.
        bytes: usize,
    },
    /// No such quarantine.
    QuarantineAreas {
        /// How many areas were asked for.
        areas: u32,
    },
    /// Areas have been handed out.
    Live {
        /// How many.
        areas: u64,
    },
    /// The instance has caches.
    Caches,
    /// The instance is hardened.
    Again,
    /// The backing lacks metadata.
    Backing(BackingError),
}

impl fmt::Display for HardenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuardBytes { bytes } => write!(
                f,
                "guards of {bytes} bytes, they are a multiple of 4 and at least 4, at most {MAX_GUARD_BYTES}"
            ),
            Self::QuarantineAreas { areas } => write!(
                f,
                "a quarantine of {areas} areas, it is at least 1 and at most {MAX_QUARANTINE_AREAS}"
            ),
            Self::Live { areas } => write!(f, "{areas} areas have been handed out already"),
            Self::Caches => f.write_str("the instance has caches"),
            Self::Again => f.write_str("the instance is hardened already"),
            Self::Backing(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for HardenError {}
