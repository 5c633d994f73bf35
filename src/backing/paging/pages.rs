//! Pages and level-1 tables: made and taken away, in windows that have a directory of their own.
//!
//! Who changes what: an entry of a directory is changed with the lock held; an entry of a level-1 table by whoever has
//! claimed the page, without.

use lock_api::RawMutex;
use x86_64::structures::paging::PhysFrame;

use super::Paging;
use super::frames::{Chain, Frames};
use super::shootdown::{Shootdown, Stale};
use super::tables::{DIRECTORY_BYTES, Entry, TABLE_BYTES, Table, page_index};
use super::windows::{Slot, pages_of};
use crate::backing::{BackingError, ChunkSpace, CpuArea, PageSpan};
use crate::unit::{Contents, NodeId};

impl<K: Frames + Shootdown, R: RawMutex> Paging<K, R> {
    /// The level-1 table of an address in a window with a directory of its own.
    pub(super) fn own_table(&self, address: usize) -> Option<Table> {
        let directory = self.windows.own(self.windows.slot_of(address)?)?;
        self.windows.table(directory, address)
    }

    /// Makes a window's level-1 table where something lies in its 2 MiB, unless the window has it, or no directory.
    pub(super) fn make_table(
        &self,
        slot: Slot,
        index: usize,
        node: NodeId,
    ) -> Result<(), BackingError> {
        let physical = self.pool.physical;
        let is_missing = |directory| physical.get(directory, index) == Entry::EMPTY;
        if !self.windows.own(slot).is_some_and(is_missing) {
            return Ok(());
        }
        let table = self.pool.table(node)?;
        {
            let usage = self.usage.lock();
            // Both may have changed, and another may have made it.
            let directory = self.windows.own(slot).filter(|&own| is_missing(own));
            if let Some(directory) = directory.filter(|_| usage.is_used(slot, index)) {
                physical.set(directory, index, Entry::table(table));
                return Ok(());
            }
        }
        // SAFETY: nobody has seen it.
        unsafe { self.pool.free(table.frame()) };
        Ok(())
    }

    /// Takes a window's level-1 table out of its directory. Called with the lock held.
    pub(super) fn take_table_out(&self, slot: Slot, index: usize, out: &mut Chain<'_, K>) {
        let Some(directory) = self.windows.own(slot) else {
            return;
        };
        let entry = self.pool.physical.swap(directory, index, Entry::EMPTY);
        if let Some(frame) = entry.frame() {
            // SAFETY: it came from the pool; it maps nothing any more, and is forgotten before the chain is dropped.
            unsafe { out.push(frame) };
        }
    }

    /// Makes the tables of a chunk for all CPUs that are up or on their way: all of them, or none. One that CPUs have seen could
    /// not be given up in atomic context.
    pub(super) fn reserve_tables(&self, space: ChunkSpace<'_>) -> Result<(), BackingError> {
        let physical = self.pool.physical;
        let tables = self.geometry.tables(space.chunk());
        let units = || {
            let directory = |area: CpuArea| {
                let directory = self.windows.own(self.windows.slot_of(area.address)?)?;
                Some((directory, area.node))
            };
            space.areas().filter_map(directory)
        };
        let mut made = self.pool.chain();
        loop {
            let lacking = {
                // Neither does a unit begin or give up meanwhile, nor does a table go.
                let mut usage = self.usage.lock();
                let missing = || {
                    let entry = |directory| tables.clone().map(move |index| (directory, index));
                    let entries = units().flat_map(move |(directory, _)| entry(directory));
                    entries.filter(|&(directory, index)| {
                        physical.get(directory, index) == Entry::EMPTY
                    })
                };
                let count = missing().count();
                if count <= made.tables() {
                    for (directory, index) in missing() {
                        if let Some(table) = made.pop_table() {
                            physical.set(directory, index, Entry::table(table));
                        }
                    }
                    // From here on a unit that begins makes its own.
                    usage.take_chunk(tables.clone());
                    return Ok(());
                }
                count - made.tables()
            };
            // As a rule they are missing in all units or in none; then each comes from its unit's node.
            let nodes = units().flat_map(|(_, node)| tables.clone().map(move |_| node));
            let mut nodes = nodes.skip(made.tables());
            for _ in 0..lacking {
                let node = nodes.next().unwrap_or(self.geometry.node);
                made.allocate_table(node)
                    .map_err(|_| BackingError::OutOfAddressSpace)?;
            }
        }
    }

    /// Takes away the tables of a chunk that no other chunk needs.
    pub(super) fn release_tables(&self, chunk: u32) {
        let tables = self.geometry.tables(chunk);
        let mut out = self.pool.chain();
        let mut usage = self.usage.lock();
        usage.give_chunk_back(tables.clone(), |index| {
            for slot in self.windows.units() {
                self.take_table_out(slot, index, &mut out);
            }
        });
        drop(usage);
        if !out.is_empty() {
            // Processors remember tables, not only pages.
            let units = self.windows.units();
            self.flush(Stale::strided(
                self.windows.address(units.start) + tables.start * TABLE_BYTES,
                tables.len() * TABLE_BYTES,
                DIRECTORY_BYTES,
                units.len(),
            ));
        }
    }

    /// Gives all pages of a span frames that have none, all or none of them.
    pub(super) fn map_pages(&self, span: PageSpan<'_>) -> Result<Contents, BackingError> {
        let missing = || {
            let pages = |area: CpuArea| {
                pages_of(area.address, area.bytes).map(move |address| (address, area.node))
            };
            let is_missing = |&(address, _): &(usize, NodeId)| self.own_frame(address).is_none();
            span.areas().flat_map(pages).filter(is_missing)
        };
        // No page is mapped before all frames are there: to take one back would need a flush, which must not be waited for here.
        let mut frames = self.pool.chain();
        missing().try_for_each(|(_, node)| frames.allocate(node))?;
        for (address, _) in missing() {
            let frame = frames.pop_zeroed().ok_or(BackingError::OutOfFrames)?;
            self.map_page(address, frame);
        }
        Ok(Contents::Zeroed)
    }

    fn own_frame(&self, address: usize) -> Option<PhysFrame> {
        let table = self.own_table(address)?;
        self.pool.physical.get(table, page_index(address)).frame()
    }

    /// Maps a page where a table has been made.
    pub(super) fn map_page(&self, address: usize, frame: PhysFrame) {
        match self.own_table(address) {
            Some(table) => {
                let entry = Entry::page(frame);
                self.pool.physical.set(table, page_index(address), entry);
            }
            None => {
                unreachable!("a page at {address:#x} without a table: its chunk is not reserved")
            }
        }
    }

    /// Takes the frames of a span's pages away.
    ///
    /// # Safety
    /// Nothing uses the pages any more.
    pub(super) unsafe fn unmap_pages(&self, span: PageSpan<'_>) {
        let mut out = self.pool.chain();
        for area in span.areas() {
            // SAFETY: the promise of the caller.
            unsafe { self.take_pages_out(area.address, area.bytes, &mut out) };
        }
        if !out.is_empty() {
            self.flush(Stale::span(span));
        }
    }

    /// Takes pages out of their tables.
    ///
    /// # Safety
    /// Nothing uses the pages any more; they are forgotten before the chain is dropped.
    pub(super) unsafe fn take_pages_out(
        &self,
        address: usize,
        bytes: usize,
        out: &mut Chain<'_, K>,
    ) {
        for address in pages_of(address, bytes) {
            let Some(table) = self.own_table(address) else {
                continue;
            };
            let index = page_index(address);
            let entry = self.pool.physical.swap(table, index, Entry::EMPTY);
            if let Some(frame) = entry.frame() {
                // SAFETY: it came from the pool; the rest is the promise of the caller.
                unsafe { out.push(frame) };
            }
        }
    }
}
