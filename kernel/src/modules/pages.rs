//! The pages of a module's code and data: in the low 2 GiB, from where its instructions reach the kernel and all handles by 32 bits,
//! or far away.
//!
//! They are written through the physical map: the mapping that is executed cannot be written, not even while the module
//! is loaded.

use core::sync::atomic::{AtomicUsize, Ordering};

use pcpu::backing::paging::Stale;
use pcpu::unit::NodeId;

use super::PlaceError;
use crate::cpus::shootdown;
use crate::memory::paging::{self, Access};
use crate::memory::{FAR_MODULES, MODULES, PAGE_BYTES, PHYSICAL_MAP, frames};

/// Addresses are used once.
static NEXT_NEAR: AtomicUsize = AtomicUsize::new(MODULES);
static NEXT_FAR: AtomicUsize = AtomicUsize::new(FAR_MODULES);

/// Where a module's code and data come to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Within 2 GiB of the kernel and of all handles.
    Near,
    /// Farther away than 32 bits reach: the module must be made for that (the large code model).
    Far,
}

/// The most pages of a section.
const MAX_PAGES: usize = 16;

/// Some pages side by side.
pub struct Pages {
    start: usize,
    pages: usize,
}

impl Pages {
    /// Zeroed pages for so many bytes.
    ///
    /// # Errors
    /// [`PlaceError::TooLong`] for more than [`MAX_PAGES`], [`PlaceError::OutOfFrames`]; nothing stays mapped.
    pub fn map(bytes: usize, access: Access, code: Code) -> Result<Self, PlaceError> {
        let wanted = bytes.div_ceil(PAGE_BYTES);
        if wanted > MAX_PAGES {
            let limit_bytes = MAX_PAGES * PAGE_BYTES;
            return Err(PlaceError::TooLong { bytes, limit_bytes });
        }
        let next = match code {
            Code::Near => &NEXT_NEAR,
            Code::Far => &NEXT_FAR,
        };
        let start = next.fetch_add(wanted * PAGE_BYTES, Ordering::Relaxed);
        let mut pages = Self { start, pages: 0 };
        while pages.pages < wanted {
            let address = start + pages.pages * PAGE_BYTES;
            let frame = paging::map_new(address, NodeId::new(0), access)?;
            pages.pages += 1;
            let alias = PHYSICAL_MAP + frame.start_address().as_u64() as usize;
            // SAFETY: a fresh frame.
            unsafe {
                core::ptr::with_exposed_provenance_mut::<u8>(alias).write_bytes(0, PAGE_BYTES)
            };
        }
        Ok(pages)
    }

    /// Where they begin.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Their length.
    pub fn bytes(&self) -> usize {
        self.pages * PAGE_BYTES
    }

    /// Writes to the pages, from a place in them on.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.bytes());
        for (address, &byte) in (self.start + offset..).zip(bytes) {
            let physical = paging::physical_address(address).expect("it is mapped");
            let alias = PHYSICAL_MAP + physical.as_u64() as usize;
            // SAFETY: the frame is this module's, which does not run yet.
            unsafe { core::ptr::with_exposed_provenance_mut::<u8>(alias).write(byte) };
        }
    }
}

impl Drop for Pages {
    /// Unmaps the pages; the frames are free only when no CPU has a translation of them.
    fn drop(&mut self) {
        let addresses = || (0..self.pages).map(|page| self.start + page * PAGE_BYTES);
        let mut frames_of_pages = [None; MAX_PAGES];
        for (address, frame) in addresses().zip(&mut frames_of_pages) {
            // SAFETY: the module is gone.
            *frame = Some(unsafe { paging::unmap(address) });
        }
        if self.pages > 0 {
            shootdown::flush(Stale::range(self.start, self.bytes()));
        }
        for frame in frames_of_pages.into_iter().flatten() {
            // SAFETY: it was this module's, and no CPU can reach it any more.
            unsafe { frames::free(frame) };
        }
    }
}
