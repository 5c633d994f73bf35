//! Page tables in physical memory: entries, and how they are reached.
//!
//! Every access to an entry is one atomic step: two CPUs populate pages at the same time, and processors set bits in
//! entries by themselves. That is why tables are no `&mut PageTable` here, and no `Mapper` is used: it would need a lock
//! over all of them.

use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::structures::paging::{PageTableFlags, PhysFrame};
use x86_64::{PhysAddr, VirtAddr};

/// Entries of a table.
pub(super) const ENTRIES: usize = 512;
/// What an entry of a level-1 table maps.
pub(super) const PAGE_BYTES: usize = 1 << 12;
/// What a level-1 table maps.
pub(super) const TABLE_BYTES: usize = 1 << 21;
/// What a level-2 table maps.
pub(super) const DIRECTORY_BYTES: usize = 1 << 30;
/// What a level-3 table maps.
pub(super) const UPPER_BYTES: usize = 1 << 39;

/// The physical address in an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    pub(super) const EMPTY: Self = Self(0);

    /// A page that is readable and writable, never executable.
    pub(super) fn page(frame: PhysFrame) -> Self {
        Self::new(frame, Self::shared_flags() | PageTableFlags::WRITABLE)
    }

    /// A page that is readable only.
    pub(super) fn shared_page(frame: PhysFrame) -> Self {
        Self::new(frame, Self::shared_flags())
    }

    /// A table below, which says what may be done.
    pub(super) fn table(table: Table) -> Self {
        Self::new(table.0, Self::shared_flags() | PageTableFlags::WRITABLE)
    }

    /// A table below which nothing is writable, whatever it says.
    pub(super) fn shared_table(table: Table) -> Self {
        Self::new(table.0, Self::shared_flags())
    }

    fn shared_flags() -> PageTableFlags {
        PageTableFlags::PRESENT | PageTableFlags::NO_EXECUTE
    }

    fn new(frame: PhysFrame, flags: PageTableFlags) -> Self {
        Self(frame.start_address().as_u64() | flags.bits())
    }

    /// The page's frame, or the table's; `None` if the entry is not present.
    pub(super) fn frame(self) -> Option<PhysFrame> {
        let is_present = self.0 & PageTableFlags::PRESENT.bits() != 0;
        is_present.then(|| PhysFrame::containing_address(PhysAddr::new(self.0 & ADDRESS)))
    }

    /// The table below; `None` if the entry is not present.
    pub(super) fn below(self) -> Option<Table> {
        self.frame().map(Table)
    }
}

/// A frame that holds 512 words: a page table, or a table of the backing's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Table(PhysFrame);

impl Table {
    /// # Safety
    /// The frame is the caller's for as long as the table is used, or a page table that the kernel uses; its words are
    /// accessed whole.
    pub(super) unsafe fn new(frame: PhysFrame) -> Self {
        Self(frame)
    }

    pub(super) fn frame(self) -> PhysFrame {
        self.0
    }
}

/// Physical memory as the kernel sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Physical {
    offset: VirtAddr,
}

impl Physical {
    /// # Safety
    /// Every frame that is used with the result is readable and writable at its physical address plus `offset`.
    pub(super) unsafe fn new(offset: VirtAddr) -> Self {
        Self { offset }
    }

    pub(super) fn bytes(self, frame: PhysFrame) -> *mut u8 {
        let address = self.offset.as_u64() + frame.start_address().as_u64();
        core::ptr::with_exposed_provenance_mut(address as usize)
    }

    /// Zeroes a frame that nobody uses.
    pub(super) fn zero(self, frame: PhysFrame) {
        // SAFETY: the frame is mapped there (promise of `new`), and the caller's alone.
        unsafe { self.bytes(frame).write_bytes(0, PAGE_BYTES) };
    }

    /// Copies a frame into one that nobody uses.
    pub(super) fn copy(self, from: PhysFrame, to: PhysFrame) {
        // SAFETY: both are mapped there (promise of `new`), `to` is the caller's alone, so that they are two.
        unsafe {
            self.bytes(to)
                .copy_from_nonoverlapping(self.bytes(from), PAGE_BYTES)
        };
    }

    /// An entry of a table.
    pub(super) fn entry(&self, table: Table, index: usize) -> &AtomicU64 {
        let entries = self.bytes(table.0).cast::<u64>();
        // SAFETY: the table has 512 words, all accessed whole (promise of `Table::new`), and is mapped there (promise of
        // `new`); nobody keeps the reference longer than the table.
        unsafe { AtomicU64::from_ptr(entries.add(index % ENTRIES)) }
    }

    pub(super) fn get(self, table: Table, index: usize) -> Entry {
        Entry(self.entry(table, index).load(Ordering::Acquire))
    }

    pub(super) fn set(self, table: Table, index: usize, entry: Entry) {
        self.entry(table, index).store(entry.0, Ordering::Release);
    }

    /// Sets an entry; returns what it was.
    pub(super) fn swap(self, table: Table, index: usize, entry: Entry) -> Entry {
        Entry(self.entry(table, index).swap(entry.0, Ordering::AcqRel))
    }

    /// Fills a table with the entries of another.
    pub(super) fn copy_entries(self, from: Table, to: Table) {
        for index in 0..ENTRIES {
            self.set(to, index, self.get(from, index));
        }
    }
}

/// The entry of a level-1 table for an address.
pub(super) fn page_index(address: usize) -> usize {
    address / PAGE_BYTES % ENTRIES
}

/// The entry of a level-2 table for an address.
pub(super) fn table_index(address: usize) -> usize {
    address / TABLE_BYTES % ENTRIES
}
