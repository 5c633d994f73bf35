//! One range of a Linux process's address space that holds all units: a window for neutral addresses, which nothing
//! can be read through, and above it a window per unit.
//!
//! ```text
//!   | neutral window |  unit 0 window  | gap |  unit 1 window  | gap | ...
//!   ^ base           ^ base + window         ^ base + window + stride
//! ```
//! The stride need not be a whole number of pages, but leaves a page between windows at least: no two units have a part
//! of one page.
//!
//! Memory comes to a page when it is first touched, and goes when it is given back. Huge pages are kept away: one touch
//! would give memory to hundreds of pages. All addresses that come in here are multiples of a page.

use std::io;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use rustix::mm::{self, Advice, MapFlags, MprotectFlags, ProtFlags};
use rustix::param;

use super::mmap::Geometry;

/// What can be done with a part of the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Nothing: a touch is a fault.
    None,
    /// Reading and writing.
    ReadWrite,
}

/// The range; unmapped when dropped.
#[derive(Debug)]
pub(super) struct AddressRange {
    base: NonNull<u8>,
    bytes: usize,
    geometry: Geometry,
    units: usize,
    /// Units whose windows have been handed to a builder.
    units_taken: usize,
}

// SAFETY: the range belongs to this value alone; what is done through it are system calls.
unsafe impl Send for AddressRange {}
// SAFETY: as above; shared use is limited to system calls on parts that the caller owns.
unsafe impl Sync for AddressRange {}

impl AddressRange {
    /// Reserves a neutral window and `units` unit windows, all without access, at a multiple of `align_bytes` (a power of
    /// two, at least a page).
    ///
    /// # Errors
    /// What the system says, or that the size overflows.
    pub(super) fn reserve(
        units: usize,
        geometry: Geometry,
        align_bytes: usize,
    ) -> io::Result<Self> {
        // The gap behind the last window is its own: the window ends in the middle of a page, maybe.
        let bytes = units
            .checked_mul(geometry.stride_bytes())
            .and_then(|bytes| bytes.checked_add(geometry.window_bytes()))
            .and_then(|bytes| bytes.checked_next_multiple_of(param::page_size()));
        let (Some(bytes), Some(padded)) = (
            bytes,
            bytes.and_then(|bytes| bytes.checked_add(align_bytes)),
        ) else {
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address that the system chooses touches nothing that exists.
        let start =
            unsafe { mm::mmap_anonymous(ptr::null_mut(), padded, ProtFlags::empty(), flags)? };
        let head = start.addr().next_multiple_of(align_bytes) - start.addr();
        // What lies before and behind the aligned range goes back. Not being able to would cost addresses only.
        for (skip, len) in [(0, head), (head + bytes, align_bytes - head)] {
            if len > 0 {
                // SAFETY: a part of the mapping made above that nothing uses.
                let _ = unsafe { mm::munmap(start.byte_add(skip), len) };
            }
        }
        let base = NonNull::new(start.cast::<u8>().wrapping_add(head))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        base.as_ptr().expose_provenance();
        // Kernels without huge pages refuse it; nothing is lost then.
        // SAFETY: the range is ours; the advice changes no contents.
        let _ = unsafe { mm::madvise(base.as_ptr().cast(), bytes, Advice::LinuxNoHugepage) };
        Ok(Self {
            base,
            bytes,
            geometry,
            units,
            units_taken: 0,
        })
    }

    /// Where the neutral window begins.
    pub(super) fn neutral_base(&self) -> usize {
        self.base.as_ptr().addr()
    }

    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub(super) fn stride_bytes(&self) -> usize {
        self.geometry.stride_bytes()
    }

    /// Address of the windows of the next `units` units, which are not handed out again until they are returned.
    pub(super) fn take_units(&mut self, units: usize) -> Option<NonNull<u8>> {
        if units > self.units - self.units_taken {
            return None;
        }
        let at = self.geometry.window_bytes() + self.units_taken * self.stride_bytes();
        self.units_taken += units;
        // SAFETY: there are so many units in the range.
        Some(unsafe { self.base.add(at) })
    }

    /// Hands all unit windows back, for another try of a builder.
    pub(super) fn return_units(&mut self) {
        self.units_taken = 0;
    }

    /// Sets what can be done with a part of the range.
    ///
    /// # Safety
    /// The part lies in the range, and nothing uses it if its access is taken away.
    pub(super) unsafe fn set_access(
        &self,
        address: usize,
        bytes: usize,
        access: Access,
    ) -> io::Result<()> {
        let flags = match access {
            Access::None => MprotectFlags::empty(),
            Access::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        #[cfg(test)]
        if access == Access::ReadWrite {
            faults::next()?;
        }
        // SAFETY: the promise of the caller.
        unsafe { mm::mprotect(self.pointer(address), bytes, flags)? };
        Ok(())
    }

    /// Gives the memory of whole pages back; they read as zero when touched again.
    ///
    /// # Safety
    /// The pages lie in the range, hold no part of a file, and nothing needs what they hold.
    pub(super) unsafe fn discard(&self, address: usize, bytes: usize) {
        // SAFETY: the promise of the caller.
        let done = unsafe { mm::madvise(self.pointer(address), bytes, Advice::LinuxDontNeed) };
        // Only locked memory or a bad range is refused. What is promised is zero pages: keep it the slow way.
        if done.is_err() {
            // SAFETY: the promise of the caller; the pages are readable and writable, or were never touched.
            unsafe { self.pointer(address).cast::<u8>().write_bytes(0, bytes) };
        }
    }

    /// Has whole pages begin as the pages of a file, readable and writable: what is written to them is theirs alone.
    ///
    /// # Safety
    /// The pages lie in the range, nothing uses them, and nobody changes the file any more.
    pub(super) unsafe fn map_file(
        &self,
        address: usize,
        bytes: usize,
        file: impl AsFd,
        offset: usize,
    ) -> io::Result<()> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the promise of the caller.
        unsafe {
            mm::mmap(
                self.pointer(address),
                bytes,
                access,
                flags,
                file,
                offset as u64,
            )?
        };
        Ok(())
    }

    fn pointer(&self, address: usize) -> *mut core::ffi::c_void {
        self.base.as_ptr().with_addr(address).cast()
    }
}

impl Drop for AddressRange {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever used it is gone. It cannot fail: the range is a whole mapping.
        let _ = unsafe { mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Which calls of [`set_access`](AddressRange::set_access) fail that give access, on the thread of a test.
#[cfg(test)]
pub(super) mod faults {
    use std::cell::Cell;
    use std::io;
    use std::ops::Range;

    std::thread_local! {
        static CALLS: Cell<u32> = const { Cell::new(0) };
        static FAILING: Cell<(u32, u32)> = const { Cell::new((0, 0)) };
    }

    /// Has calls fail, counted from the next one.
    pub(in crate::backing) fn set(failing: Range<u32>) {
        CALLS.set(0);
        FAILING.set((failing.start, failing.end));
    }

    /// How many calls there have been since.
    pub(in crate::backing) fn calls() -> u32 {
        CALLS.get()
    }

    pub(super) fn next() -> io::Result<()> {
        let call = CALLS.replace(CALLS.get() + 1);
        let (start, end) = FAILING.get();
        match (start..end).contains(&call) {
            true => Err(io::ErrorKind::OutOfMemory.into()),
            false => Ok(()),
        }
    }
}
