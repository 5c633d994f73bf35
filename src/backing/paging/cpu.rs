//! Units from never came to up: tables of their own, which take the place of the shared ones at once.
//!
//! What has been begun for a unit is reached through its own directory only. CPUs see it from `finish_unit` on, when all is
//! there; so no page of a CPU on its way is ever half there, and one flush serves all of them.

use lock_api::RawMutex;

use super::Paging;
use super::frames::Frames;
use super::shootdown::{Shootdown, Stale};
use super::tables::{DIRECTORY_BYTES, ENTRIES, PAGE_BYTES, TABLE_BYTES, Table};
use super::windows::{Slot, pages_of};
use crate::backing::{BackingError, CpuArea};

/// What becomes of the pages when tables are given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaves {
    /// Other tables lead to them.
    Keep,
    /// They are given back too.
    Free,
}

impl<K: Frames + Shootdown, R: RawMutex> Paging<K, R> {
    pub(super) fn begin_unit(&self, unit: CpuArea) -> Result<(), BackingError> {
        let slot = self.windows.slot_of(unit.address);
        let slot = slot.ok_or(BackingError::OutOfAddressSpace)?;
        let directory = self.pool.table(unit.node)?;
        {
            // Chunks that are reserved from here on are made for this unit too.
            let _usage = self.usage.lock();
            self.windows.set_own(slot, Some(directory));
        }
        let made = self.fill_directory(slot, unit);
        if made.is_err() {
            self.cancel_unit(unit);
        }
        made
    }

    fn fill_directory(&self, slot: Slot, unit: CpuArea) -> Result<(), BackingError> {
        for index in 0..ENTRIES {
            let is_used = self.usage.lock().is_used(slot, index);
            if is_used {
                self.make_table(slot, index, unit.node)?;
            }
        }
        let pages = || pages_of(unit.address, self.geometry.first_bytes);
        if !self.windows.is_absent(slot) {
            // The pages that the builder gave it.
            for page in pages() {
                let frame = self.windows.frame_at(page);
                self.map_page(page, frame.ok_or(BackingError::OutOfFrames)?);
            }
            return Ok(());
        }
        let mut frames = self.pool.chain();
        pages().try_for_each(|_| frames.allocate(unit.node))?;
        for page in pages() {
            let frame = frames.pop_zeroed().ok_or(BackingError::OutOfFrames)?;
            let initial = self.windows.absent_frame(page - unit.address);
            if initial != self.windows.zero_frame() {
                self.pool.physical.copy(initial, frame);
            }
            self.map_page(page, frame);
        }
        Ok(())
    }

    pub(super) fn finish_unit(&self, unit: CpuArea) {
        let Some(slot) = self.windows.slot_of(unit.address) else {
            return;
        };
        let Some(own) = self.windows.own(slot) else {
            return;
        };
        let before = self.windows.visible(slot);
        self.windows.show_directory(slot, own);
        // What read as zero is memory now.
        self.flush_window(slot);
        if before != self.windows.absent_directory() {
            self.free_built(before, Leaves::Keep);
        }
    }

    pub(super) fn cancel_unit(&self, unit: CpuArea) {
        let Some(slot) = self.windows.slot_of(unit.address) else {
            return;
        };
        let own = {
            let _usage = self.usage.lock();
            let own = self.windows.own(slot);
            self.windows.set_own(slot, None);
            own
        };
        let leaves = match self.windows.is_absent(slot) {
            true => Leaves::Free,
            // They are the builder's.
            false => Leaves::Keep,
        };
        if let Some(own) = own {
            self.free_own(own, leaves);
        }
    }

    /// Takes all away that a unit has.
    pub(super) fn dismantle_unit(&self, slot: Slot) {
        let (own, visible) = (self.windows.own(slot), self.windows.visible(slot));
        if visible == self.windows.absent_directory() {
            return;
        }
        self.windows.show_absent(slot);
        self.flush_window(slot);
        match own {
            Some(own) => {
                self.windows.set_own(slot, None);
                self.free_own(own, Leaves::Free);
            }
            None => self.free_built(visible, Leaves::Free),
        }
    }

    pub(super) fn flush_window(&self, slot: Slot) {
        let address = self.windows.address(slot);
        self.flush(Stale::range(address, DIRECTORY_BYTES));
    }

    /// Gives up a directory of a unit's own, which no CPU sees, with its tables.
    fn free_own(&self, directory: Table, leaves: Leaves) {
        let physical = self.pool.physical;
        for index in 0..ENTRIES {
            let Some(table) = physical.get(directory, index).below() else {
                continue;
            };
            for page in (0..ENTRIES).filter(|_| leaves == Leaves::Free) {
                if let Some(frame) = physical.get(table, page).frame() {
                    // SAFETY: a page of this unit alone, which nobody uses.
                    unsafe { self.pool.free(frame) };
                }
            }
            // SAFETY: it came from the pool; no CPU sees it.
            unsafe { self.pool.free(table.frame()) };
        }
        // SAFETY: as above.
        unsafe { self.pool.free(directory.frame()) };
    }

    /// Gives up a directory that the builder made, which no CPU sees, with the tables that are not the shared ones.
    pub(super) fn free_built(&self, directory: Table, leaves: Leaves) {
        let physical = self.pool.physical;
        let absent = self.windows.absent_directory();
        for index in 0..ENTRIES {
            let below = |directory| physical.get(directory, index).below();
            let Some(table) = below(directory).filter(|&table| below(absent) != Some(table)) else {
                continue;
            };
            for page in (0..ENTRIES).filter(|_| leaves == Leaves::Free) {
                let shared = self
                    .windows
                    .absent_frame(index * TABLE_BYTES + page * PAGE_BYTES);
                let frame = physical.get(table, page).frame();
                if let Some(frame) = frame.filter(|&frame| frame != shared) {
                    // SAFETY: a page of this unit alone, which nobody uses.
                    unsafe { self.pool.free(frame) };
                }
            }
            // SAFETY: it came from the pool; no CPU sees it.
            unsafe { self.pool.free(table.frame()) };
        }
        // SAFETY: as above.
        unsafe { self.pool.free(directory.frame()) };
    }
}
