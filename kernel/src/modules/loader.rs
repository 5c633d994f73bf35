//! The loader: where the kernel puts the sections of an [object](super::object), and what it exports to it.
//!
//! What always holds: what was made for a module that cannot be loaded goes when the half-made object is dropped, as what
//! was made for a loaded one does.

use super::object::{Home, Kind, Loaded, Wanted};
use super::pages::{Code, Pages};
use super::{LoadError, PerCpuArea, PlaceError, Placement, exported};
use crate::memory::PAGE_BYTES;
use crate::memory::paging::Access;

/// A module that is loaded. Dropping it unloads it: no CPU may run its code any more.
pub struct Module(Loaded<'static, Place>);

/// Where a section is.
enum Place {
    Pages(Pages),
    PerCpu(PerCpuArea),
}

/// The kernel as the home of a module that is being loaded.
struct Kernel<'a> {
    code: Code,
    placement: Placement,
    others: &'a [&'a Module],
}

/// Where what is loaded already is looked for.
const LOADED: Kernel<'static> = Kernel {
    code: Code::Near,
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
        Ok(Place::Pages(Pages::map(bytes, access, self.code)?))
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
    /// Loads an object, with its per-CPU variables at `placement` and its code near. What it uses is looked up in the kernel's
    /// exports and in `others`, which must stay loaded as long as it.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load(
        object: &'static [u8],
        placement: Placement,
        others: &[&Module],
    ) -> Result<Self, LoadError> {
        Self::load_to(Code::Near, object, placement, others)
    }

    /// [`load`](Self::load), with its code and data elsewhere.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load_to(
        code: Code,
        object: &'static [u8],
        placement: Placement,
        others: &[&Module],
    ) -> Result<Self, LoadError> {
        let mut home = Kernel {
            code,
            placement,
            others,
        };
        Ok(Self(Loaded::load(object, &mut home)?))
    }

    /// The address of something that the module defines: of a per-CPU variable the handle.
    pub fn symbol(&self, name: &str) -> Option<usize> {
        self.0.symbol(&LOADED, name)
    }
}
