//! Which level-1 tables are in use, and which pages of the metadata: what the lock guards.
//!
//! A level-1 table exists while something lies in the 2 MiB that it maps: chunks, in the windows of units that have begun;
//! blocks, in the metadata's window. Counts say how much lies there. A count rises together with the table's being put into its
//! place, and the table goes when it falls to 0: nobody takes away a table that somebody counts on.

use core::ops::Range;
use core::sync::atomic::Ordering;

use super::metadata::Kept;
use super::tables::{ENTRIES, Physical, Table};
use super::windows::{METADATA, Slot};

/// The pages that metadata may take: as many as one frame has bits for, 128 MiB.
pub(super) const METADATA_PAGES: usize = ENTRIES * u64::BITS as usize;
const METADATA_TABLES: usize = METADATA_PAGES / ENTRIES;

#[derive(Debug)]
pub(super) struct Usage {
    /// Chunks in the 2 MiB of each level-1 table of a unit's window; the same for all units.
    chunks: [u16; ENTRIES],
    /// Blocks in the 2 MiB of each level-1 table of the metadata's window.
    blocks: [u16; METADATA_TABLES],
    /// A bit for each page of metadata.
    bitmap: Table,
    /// No page below is free.
    lowest_free: usize,
    /// Blocks that are free and mapped.
    pub(super) kept: Kept,
}

impl Usage {
    /// Nothing is in use; `bitmap` is zero.
    pub(super) fn new(bitmap: Table) -> Self {
        Self {
            chunks: [0; ENTRIES],
            blocks: [0; METADATA_TABLES],
            bitmap,
            lowest_free: 0,
            kept: Kept::default(),
        }
    }

    pub(super) fn bitmap(&self) -> Table {
        self.bitmap
    }

    /// Whether something lies in the 2 MiB of a table.
    pub(super) fn is_used(&self, slot: Slot, table: usize) -> bool {
        let count = match slot {
            METADATA => self.blocks.get(table),
            _ => self.chunks.get(table),
        };
        count.is_some_and(|&count| count > 0)
    }

    pub(super) fn take_chunk(&mut self, tables: Range<usize>) {
        self.chunks[tables].iter_mut().for_each(|count| *count += 1);
    }

    /// Calls `act` for the tables where nothing lies any more.
    pub(super) fn give_chunk_back(&mut self, tables: Range<usize>, act: impl FnMut(usize)) {
        fall(&mut self.chunks, tables, act);
    }

    pub(super) fn take_block(&mut self, tables: Range<usize>) {
        self.blocks[tables].iter_mut().for_each(|count| *count += 1);
    }

    /// Calls `act` for the tables where nothing lies any more.
    pub(super) fn give_block_back(&mut self, tables: Range<usize>, act: impl FnMut(usize)) {
        fall(&mut self.blocks, tables, act);
    }

    /// Takes the lowest run of so many free pages of metadata.
    pub(super) fn take_pages(&mut self, physical: Physical, pages: usize) -> Option<usize> {
        let mut run = self.lowest_free..self.lowest_free;
        let mut lowest = None;
        while run.len() < pages {
            if run.end == METADATA_PAGES {
                return None;
            }
            if self.is_free(physical, run.end) {
                lowest = lowest.or(Some(run.end));
                run.end += 1;
            } else {
                run = run.end + 1..run.end + 1;
            }
        }
        self.flip(physical, run.clone());
        // What is free below the run is what the search found first.
        self.lowest_free = match lowest {
            Some(lowest) if lowest < run.start => lowest,
            _ => run.end,
        };
        Some(run.start)
    }

    pub(super) fn give_pages_back(&mut self, physical: Physical, pages: Range<usize>) {
        self.lowest_free = self.lowest_free.min(pages.start);
        self.flip(physical, pages);
    }

    fn is_free(&self, physical: Physical, page: usize) -> bool {
        let word = physical
            .entry(self.bitmap, page / 64)
            .load(Ordering::Relaxed);
        word >> (page % 64) & 1 == 0
    }

    fn flip(&self, physical: Physical, pages: Range<usize>) {
        for page in pages {
            let word = physical.entry(self.bitmap, page / 64);
            word.fetch_xor(1 << (page % 64), Ordering::Relaxed);
        }
    }
}

fn fall(counts: &mut [u16], tables: Range<usize>, mut act: impl FnMut(usize)) {
    for table in tables {
        counts[table] -= 1;
        if counts[table] == 0 {
            act(table);
        }
    }
}
