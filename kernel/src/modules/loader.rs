//! The loader: where the kernel puts the sections of an [object](super::object), and what it exports to it.
//!
//! What always holds: what was made for a module that cannot be loaded goes when the half-made object is dropped, as what
//! was made for a loaded one does.

use core::fmt;

use pcpu::{AllocError, CpuError};

use super::object::{Home, Kind, Loaded, ObjectError, Wanted};
use super::pages::Pages;
use super::{PerCpuArea, Placement, exported};
use crate::memory::PAGE_BYTES;
use crate::memory::paging::{Access, OutOfFrames};

/// A module that is loaded. Dropping it unloads it: no CPU may run its code any more.
pub struct Module(Loaded<'static, Place>);

/// Where a section is.
enum Place {
    Pages(Pages),
    PerCpu(PerCpuArea),
}

/// Why a module cannot be loaded. Nothing is left of it.
pub type LoadError = ObjectError<'static, PlaceError>;

/// Why a section has no memory.
#[derive(Debug)]
pub enum PlaceError {
    /// No room for its per-CPU variables.
    PerCpu(AllocError),
    /// A CPU has no memory for its copies.
    Cpu(CpuError),
    /// No memory for its code or data.
    OutOfFrames,
    /// It must lie at a multiple of more than a page.
    Align {
        /// What it asks for, in bytes.
        align: usize,
    },
}

impl fmt::Display for PlaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerCpu(error) => error.fmt(f),
            Self::Cpu(error) => error.fmt(f),
            Self::OutOfFrames => f.write_str("no memory for code or data"),
            Self::Align { align } => {
                write!(
                    f,
                    "an alignment of {align} bytes, the limit is {PAGE_BYTES}"
                )
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

/// The kernel as the home of a module that is being loaded.
struct Kernel<'a> {
    placement: Placement,
    others: &'a [&'a Module],
}

/// Where what is loaded already is looked for.
const LOADED: Kernel<'static> = Kernel {
    placement: Placement::Dynamic,
    others: &[],
};

impl Home for Kernel<'_> {
    type Place = Place;
    type Error = PlaceError;

    fn place(&mut self, wanted: Wanted) -> Result<Place, PlaceError> {
        let Wanted { kind, bytes, align } = wanted;
        let access = match kind {
            Kind::PerCpu => {
                let area = PerCpuArea::allocate(bytes, align, self.placement)?;
                return Ok(Place::PerCpu(area));
            }
            Kind::Execute => Access::Execute,
            Kind::ReadWrite => Access::ReadWrite,
            Kind::Read => Access::Read,
        };
        if align > PAGE_BYTES {
            return Err(PlaceError::Align { align });
        }
        Ok(Place::Pages(Pages::map(bytes, access)?))
    }

    fn address(&self, place: &Place) -> usize {
        match place {
            Place::Pages(pages) => pages.start(),
            Place::PerCpu(area) => area.start.neutral(),
        }
    }

    fn write(&self, place: &Place, offset: usize, bytes: &[u8]) -> Result<(), PlaceError> {
        match place {
            Place::Pages(pages) => pages.write(offset, bytes),
            Place::PerCpu(area) => area.write(offset, bytes)?,
        }
        Ok(())
    }

    fn exported(&self, name: &str) -> Option<usize> {
        let of_others = || self.others.iter().find_map(|other| other.symbol(name));
        exported(name).or_else(of_others)
    }
}

impl Module {
    /// Loads an object, with its per-CPU variables at `placement`. What it uses is looked up in the kernel's exports and
    /// in `others`, which must stay loaded as long as it.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load(
        object: &'static [u8],
        placement: Placement,
        others: &[&Module],
    ) -> Result<Self, LoadError> {
        let mut home = Kernel { placement, others };
        Ok(Self(Loaded::load(object, &mut home)?))
    }

    /// The address of something that the module defines: of a per-CPU variable the handle.
    pub fn symbol(&self, name: &str) -> Option<usize> {
        self.0.symbol(&LOADED, name)
    }
}
