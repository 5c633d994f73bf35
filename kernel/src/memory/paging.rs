//! The kernel's page tables.
//!
//! What always holds: no mapping can be both written and executed. [`Access`] has no such variant; the tests walk the
//! tables and look.

use lock_api::Mutex;
use pcpu::this_cpu::gs::IrqLock;
use pcpu::unit::NodeId;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::mapper::{MapToError, UnmapError};
use x86_64::structures::paging::{
    Mapper, OffsetPageTable, Page, PageSize, PageTable, PageTableFlags, PhysFrame, Size2MiB,
    Size4KiB, Translate,
};
use x86_64::{PhysAddr, VirtAddr};

use super::frames::{self, TableFrames};
use super::{PHYSICAL_MAP, PhysicalRange, image};
use crate::machine::Machine;

static ROOT: Mutex<IrqLock, Option<PhysFrame>> = Mutex::new(None);

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Constants.
    Read,
    /// Variables.
    ReadWrite,
    /// Code.
    Execute,
    /// Registers of a device.
    Device,
    /// A user program's code.
    UserExecute,
    /// A user program's variables.
    UserReadWrite,
}

impl Access {
    fn flags(self) -> PageTableFlags {
        use PageTableFlags as F;
        F::PRESENT
            | match self {
                Self::Read => F::NO_EXECUTE,
                Self::ReadWrite => F::WRITABLE | F::NO_EXECUTE,
                Self::Execute => F::empty(),
                Self::Device => F::WRITABLE | F::NO_EXECUTE | F::NO_CACHE | F::WRITE_THROUGH,
                Self::UserExecute => F::USER_ACCESSIBLE,
                Self::UserReadWrite => F::USER_ACCESSIBLE | F::WRITABLE | F::NO_EXECUTE,
            }
    }
}

/// Builds the kernel's own tables and changes over to them.
///
/// # Panics
/// If memory does not suffice for them.
pub fn init(machine: &Machine) {
    let root = frames::allocate(NodeId::new(0)).expect("no frame for the highest page table");
    // SAFETY: the frame is fresh, and mapped by the boot tables.
    unsafe { table(root).write(PageTable::new()) };
    *ROOT.lock() = Some(root);
    for (part, access) in [
        (image::text(), Access::Execute),
        (image::rodata(), Access::Read),
        (image::data(), Access::ReadWrite),
        (image::boot_stack(), Access::ReadWrite),
        (image::template(), Access::Read),
    ] {
        for address in part.addresses(Size4KiB::SIZE) {
            map_image_page(address, address as usize, access);
        }
    }
    for &ram in machine.start_info.ram() {
        map_physical(ram);
    }
    // SAFETY: the new tables map all that the old ones did and that is in use: image, boot stack, RAM.
    unsafe { Cr3::write(root, Cr3Flags::empty()) };
}

/// Maps a fresh frame from `node`.
///
/// # Errors
/// [`OutOfFrames`].
///
/// # Panics
/// If something is mapped there.
pub fn map_new(address: usize, node: NodeId, access: Access) -> Result<PhysFrame, OutOfFrames> {
    let frame = frames::allocate(node).ok_or(OutOfFrames)?;
    // SAFETY: the frame is fresh, so nothing else refers to it.
    if let Err(error) = unsafe { map(address, frame, access) } {
        // SAFETY: it was not mapped.
        unsafe { frames::free(frame) };
        return Err(error);
    }
    Ok(frame)
}

/// There is no frame left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfFrames;

/// Maps a frame.
///
/// # Errors
/// [`OutOfFrames`] if a table could not be had.
///
/// # Panics
/// If something is mapped there.
///
/// # Safety
/// What the frame is used for otherwise, if at all, allows this kind of access.
pub unsafe fn map(address: usize, frame: PhysFrame, access: Access) -> Result<(), OutOfFrames> {
    let page = Page::<Size4KiB>::containing_address(VirtAddr::new(address as u64));
    with_mapper(|mapper| {
        let mut tables = TableFrames(NodeId::new(0));
        // SAFETY: the promise of the caller.
        match unsafe { mapper.map_to(page, frame, access.flags(), &mut tables) } {
            Ok(flush) => {
                flush.flush();
                Ok(())
            }
            Err(MapToError::FrameAllocationFailed) => Err(OutOfFrames),
            Err(error) => panic!("{address:#x} cannot be mapped: {error:?}"),
        }
    })
}

/// Takes a mapping of one page away, and its translation on this CPU. Other CPUs may still have one.
///
/// # Panics
/// If no page is mapped there.
///
/// # Safety
/// Nothing uses it any more.
pub unsafe fn unmap(address: usize) -> PhysFrame {
    let page = Page::<Size4KiB>::containing_address(VirtAddr::new(address as u64));
    let (frame, flush) = with_mapper(|mapper| mapper.unmap(page))
        .unwrap_or_else(|error: UnmapError| panic!("{address:#x} cannot be unmapped: {error:?}"));
    flush.flush();
    frame
}

/// Changes the access to a page of the physical map.
///
/// # Safety
/// It is a page of 4 KiB, and what it is used for allows the access.
pub unsafe fn set_physical_access(frame: PhysFrame, access: Access) {
    let address = VirtAddr::new(PHYSICAL_MAP as u64 + frame.start_address().as_u64());
    let page = Page::<Size4KiB>::containing_address(address);
    with_mapper(|mapper| {
        // SAFETY: the promise of the caller.
        match unsafe { mapper.update_flags(page, access.flags()) } {
            Ok(flush) => flush.flush(),
            Err(error) => panic!("the access to {address:?} cannot be changed: {error:?}"),
        }
    });
}

/// The physical address behind an address, if it is mapped.
pub fn physical_address(address: usize) -> Option<PhysAddr> {
    with_mapper(|mapper| mapper.translate_addr(VirtAddr::new(address as u64)))
}

/// The frame of the highest table.
///
/// # Panics
/// Before [`init`].
pub fn root() -> PhysFrame {
    ROOT.lock().expect("the tables are built")
}

/// A page table, through the physical map.
pub fn table(frame: PhysFrame) -> *mut PageTable {
    let address = PHYSICAL_MAP + frame.start_address().as_u64() as usize;
    core::ptr::with_exposed_provenance_mut(address)
}

fn with_mapper<T>(work: impl FnOnce(&mut OffsetPageTable<'_>) -> T) -> T {
    let root = ROOT.lock();
    let root_table = table(root.expect("the tables are built"));
    // SAFETY: the lock is held, so nobody else has the tables; the physical map covers all of them.
    let mut mapper =
        unsafe { OffsetPageTable::new(&mut *root_table, VirtAddr::new(PHYSICAL_MAP as u64)) };
    work(&mut mapper)
}

/// Maps a page of the image at an address.
fn map_image_page(physical: u64, address: usize, access: Access) {
    let frame = PhysFrame::containing_address(PhysAddr::new(physical));
    // SAFETY: the access is that of the part, or less.
    unsafe { map(address, frame, access) }.expect("no frames for the page tables");
}

/// Maps a piece of RAM into the physical map, in large pages where that is possible. What is read only in the image is
/// read only here.
fn map_physical(ram: PhysicalRange) {
    let image = image::whole();
    let constant = [image::text(), image::rodata(), image::template()];
    let mut address = ram.start.next_multiple_of(Size4KiB::SIZE);
    while address + Size4KiB::SIZE <= ram.end {
        let large_end = address + Size2MiB::SIZE;
        let has_image = image.start < large_end && address < image.end;
        if address.is_multiple_of(Size2MiB::SIZE) && large_end <= ram.end && !has_image {
            map_large(address);
            address = large_end;
            continue;
        }
        let is_constant = constant.iter().any(|part| part.contains(address));
        let access = if is_constant {
            Access::Read
        } else {
            Access::ReadWrite
        };
        map_image_page(address, PHYSICAL_MAP + address as usize, access);
        address += Size4KiB::SIZE;
    }
}

fn map_large(physical: u64) {
    let page = Page::<Size2MiB>::containing_address(VirtAddr::new(PHYSICAL_MAP as u64 + physical));
    let frame = PhysFrame::containing_address(PhysAddr::new(physical));
    let mut tables = TableFrames(NodeId::new(0));
    with_mapper(|mapper| {
        let flags = Access::ReadWrite.flags();
        // SAFETY: RAM, to be read and written; nothing of the image lies there.
        match unsafe { mapper.map_to(page, frame, flags, &mut tables) } {
            Ok(flush) => flush.flush(),
            Err(error) => panic!("{physical:#x} cannot be mapped: {error:?}"),
        }
    });
}
