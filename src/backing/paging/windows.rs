//! The address space of the backing: a window of 1 GiB for its metadata, then one for every unit.
//!
//! ```text
//!   level 4     level 3 (visible)          level 2: a directory             level 1
//!   entry  -->  | metadata           | --> its own
//!               | unit 0, CPU is up  | --> its own                     -->  tables with the CPU's pages
//!               | unit 1, never came | --> \                                 read only:
//!               | unit 2, never came | -->  > the absent directory     -->  zeroes, and the initial values
//!               | ...                | --> /
//! ```
//! The level-4 entries are made at set-up and never change, so that every address space may have a copy of them. A window is
//! one level-3 entry: what a CPU's copies are changes as a whole, when that entry changes. What is being made for a CPU is
//! reached through the table of *own* directories beside the visible ones, at whatever time.
//!
//! A unit's window is in one of these states:
//! - absent: its own directory is none, the visible one is the absent directory;
//! - built: its own is none, the visible one has the first chunk's pages and is as the absent directory elsewhere;
//! - begun: its own is there and not visible yet;
//! - up: its own is the visible one.

use core::ops::Range;

use x86_64::structures::paging::PhysFrame;

use super::frames::{Frames, Pool};
use super::tables::{
    DIRECTORY_BYTES, ENTRIES, Entry, PAGE_BYTES, Physical, TABLE_BYTES, Table, UPPER_BYTES,
    page_index, table_index,
};
use crate::backing::BackingError;
use crate::unit::{MAX_CPUS, NodeId};

/// The most level-4 entries: for the units that the largest topology may have (a third of them unused), and metadata.
pub(super) const MAX_UPPERS: usize = (MAX_CPUS as usize * 4 / 3 + 1).div_ceil(ENTRIES);

/// What a window is known by: 0 is the metadata's, the others are units'.
pub(super) type Slot = usize;

/// The window of the metadata.
pub(super) const METADATA: Slot = 0;

/// The tables at the top, and those that all CPUs that never came share.
#[derive(Debug)]
pub(super) struct Windows {
    physical: Physical,
    level_4: Table,
    start: usize,
    slots: usize,
    uppers: [Option<Upper>; MAX_UPPERS],
    absent: Absent,
}

/// 512 windows.
#[derive(Debug, Clone, Copy)]
struct Upper {
    /// The level-3 table.
    visible: Table,
    /// As the level-3 table, but what a CPU is to have, and nothing where it has nothing of its own.
    own: Table,
}

/// What CPUs that never came share.
#[derive(Debug, Clone, Copy)]
struct Absent {
    directory: Table,
    /// A level-1 table that leads to zeroes everywhere.
    zeroes: Table,
    zero: PhysFrame,
}

impl Windows {
    /// Makes the tables: `slots` windows from `start` on, a multiple of what a level-3 table maps. Those of units are absent.
    /// Its entries of level 4 are unused, which the caller has seen to.
    pub(super) fn new<K: Frames>(
        pool: &Pool<K>,
        level_4: Table,
        start: usize,
        slots: usize,
        node: NodeId,
    ) -> Result<Self, BackingError> {
        let mut made = pool.chain();
        let uppers = slots.div_ceil(ENTRIES);
        // All frames first: two tables for each upper one, three to share, one directory.
        for _ in 0..uppers * 2 + 4 {
            made.allocate(node)?;
        }
        let mut frame = || made.pop_zeroed().ok_or(BackingError::OutOfFrames);
        // SAFETY: each is used for one table, and is zero.
        let mut table = || frame().map(|frame| unsafe { Table::new(frame) });
        let physical = pool.physical;
        let (directory, zeroes, zero, metadata) = (table()?, table()?, table()?.frame(), table()?);
        for index in 0..ENTRIES {
            physical.set(zeroes, index, Entry::shared_page(zero));
            physical.set(directory, index, Entry::shared_table(zeroes));
        }
        let mut windows = Self {
            physical,
            level_4,
            start,
            slots,
            uppers: [None; MAX_UPPERS],
            absent: Absent {
                directory,
                zeroes,
                zero,
            },
        };
        for upper in windows.uppers.iter_mut().take(uppers) {
            *upper = Some(Upper {
                visible: table()?,
                own: table()?,
            });
        }
        for slot in 1..slots {
            windows.show(slot, windows.absent_entry());
        }
        windows.set_own(METADATA, Some(metadata));
        windows.show(METADATA, Entry::table(metadata));
        for (index, upper) in windows.uppers.iter().flatten().enumerate() {
            let entry = Entry::table(upper.visible);
            physical.set(level_4, start / UPPER_BYTES + index, entry);
        }
        Ok(windows)
    }

    /// All windows but the metadata's.
    pub(super) fn units(&self) -> Range<Slot> {
        1..self.slots
    }

    /// Where a window begins.
    pub(super) fn address(&self, slot: Slot) -> usize {
        self.start + slot * DIRECTORY_BYTES
    }

    /// The window that an address lies in.
    pub(super) fn slot_of(&self, address: usize) -> Option<Slot> {
        let slot = address.checked_sub(self.start)? / DIRECTORY_BYTES;
        (slot < self.slots).then_some(slot)
    }

    fn upper(&self, slot: Slot) -> Upper {
        self.uppers[slot / ENTRIES].expect("made for all slots")
    }

    /// The directory that CPUs see.
    pub(super) fn visible(&self, slot: Slot) -> Table {
        let entry = self.physical.get(self.upper(slot).visible, slot);
        entry.below().unwrap_or(self.absent.directory)
    }

    /// Changes what CPUs see; what they saw may be in their caches still.
    fn show(&self, slot: Slot, entry: Entry) {
        self.physical.set(self.upper(slot).visible, slot, entry);
    }

    /// Lets CPUs see this directory.
    pub(super) fn show_directory(&self, slot: Slot, directory: Table) {
        self.show(slot, Entry::table(directory));
    }

    /// Lets CPUs see what those that never came share.
    pub(super) fn show_absent(&self, slot: Slot) {
        self.show(slot, self.absent_entry());
    }

    fn absent_entry(&self) -> Entry {
        Entry::shared_table(self.absent.directory)
    }

    /// Whether CPUs see pages of the unit's own there.
    pub(super) fn is_absent(&self, slot: Slot) -> bool {
        self.visible(slot) == self.absent.directory
    }

    /// The directory that is being made or is in use for a unit; none if the CPU has not begun.
    pub(super) fn own(&self, slot: Slot) -> Option<Table> {
        self.physical.get(self.upper(slot).own, slot).below()
    }

    pub(super) fn set_own(&self, slot: Slot, directory: Option<Table>) {
        let entry = directory.map_or(Entry::EMPTY, Entry::table);
        self.physical.set(self.upper(slot).own, slot, entry);
    }

    /// The directory that CPUs that never came share.
    pub(super) fn absent_directory(&self) -> Table {
        self.absent.directory
    }

    /// The frame of zeroes.
    pub(super) fn zero_frame(&self) -> PhysFrame {
        self.absent.zero
    }

    /// The level-1 table of zeroes.
    pub(super) fn zero_table(&self) -> Table {
        self.absent.zeroes
    }

    /// The frame that a CPU that never came shows `bytes` into its window.
    pub(super) fn absent_frame(&self, bytes: usize) -> PhysFrame {
        let page = self
            .table(self.absent.directory, bytes)
            .and_then(|table| self.physical.get(table, page_index(bytes)).frame());
        page.unwrap_or(self.absent.zero)
    }

    /// The level-1 table for an address, in a directory.
    pub(super) fn table(&self, directory: Table, address: usize) -> Option<Table> {
        self.physical.get(directory, table_index(address)).below()
    }

    /// The frame behind an address that CPUs see.
    pub(super) fn frame_at(&self, address: usize) -> Option<PhysFrame> {
        let table = self.table(self.visible(self.slot_of(address)?), address)?;
        self.physical.get(table, page_index(address)).frame()
    }

    /// Gives up the tables at the top and those that CPUs share.
    ///
    /// # Safety
    /// Nobody uses the windows, no address space has a copy of the level-4 entries, and no other table is left but those
    /// shared ones that lead to zeroes.
    pub(super) unsafe fn free<K: Frames>(&self, pool: &Pool<K>, forget: impl FnOnce()) {
        let uppers = || self.uppers.iter().flatten();
        for index in 0..uppers().count() {
            let entry = self.start / UPPER_BYTES + index;
            self.physical.set(self.level_4, entry, Entry::EMPTY);
        }
        forget();
        let shared = [self.absent.directory, self.absent.zeroes].map(Table::frame);
        let tops = uppers().flat_map(|upper| [upper.visible, upper.own].map(Table::frame));
        let metadata = self.own(METADATA).map(Table::frame);
        let all = tops.chain(shared).chain([self.absent.zero]);
        for frame in metadata.into_iter().chain(all) {
            // SAFETY: they came from the pool, and no CPU sees them any more.
            unsafe { pool.free(frame) };
        }
    }
}

/// The tables that a range of bytes of a window lies in: indices into its directory.
pub(super) fn tables_of(bytes: Range<usize>) -> Range<usize> {
    bytes.start / TABLE_BYTES..bytes.end.div_ceil(TABLE_BYTES)
}

/// The pages of a range of addresses.
pub(super) fn pages_of(address: usize, bytes: usize) -> impl Iterator<Item = usize> {
    (address..address + bytes).step_by(PAGE_BYTES)
}
