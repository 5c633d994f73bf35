//! Memory for the allocator's own data: whole pages in a window of their own, the lowest that are free.
//!
//! Blocks of an instance are few and of some pages each (one for each chunk), so that pages are not shared. A block that
//! comes back in atomic context stays mapped, for to unmap it takes a flush: the next request for as many pages gets it,
//! or it goes when something else is given back.

use core::alloc::Layout;
use core::ptr::NonNull;

use lock_api::RawMutex;

use super::Paging;
use super::frames::Frames;
use super::shootdown::{Shootdown, Stale};
use super::tables::{Entry, PAGE_BYTES};
use super::windows::{METADATA, pages_of, tables_of};
use crate::backing::BackingError;

/// Blocks that are free and mapped: each names the next in its first words.
#[derive(Debug, Default)]
pub(super) struct Kept {
    first: Option<KeptBlock>,
    pages: u64,
}

#[derive(Debug, Clone, Copy)]
struct KeptBlock {
    address: usize,
    bytes: usize,
}

impl KeptBlock {
    fn of(block: NonNull<u8>, layout: Layout) -> Self {
        Self {
            address: block.as_ptr().addr(),
            bytes: layout.size().next_multiple_of(PAGE_BYTES),
        }
    }
}

impl Kept {
    /// Pages of all blocks.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// # Safety
    /// The block is mapped, of whole pages, and nobody's.
    unsafe fn push(&mut self, block: KeptBlock) {
        let words = core::ptr::with_exposed_provenance_mut::<Option<KeptBlock>>(block.address);
        // SAFETY: a block has at least a page, aligned to one (promise of the caller).
        unsafe { words.write(self.first) };
        self.first = Some(block);
        self.pages += (block.bytes / PAGE_BYTES) as u64;
    }

    /// Takes the last block that came, if it is one that `suits`.
    fn pop(&mut self, suits: impl FnOnce(&KeptBlock) -> bool) -> Option<KeptBlock> {
        let block = self.first.filter(suits)?;
        let words = core::ptr::with_exposed_provenance::<Option<KeptBlock>>(block.address);
        // SAFETY: written by `push`; nobody else has used the block since.
        self.first = unsafe { words.read() };
        self.pages -= (block.bytes / PAGE_BYTES) as u64;
        Some(block)
    }
}

impl<K: Frames + Shootdown, R: RawMutex> Paging<K, R> {
    pub(super) fn map_metadata(&self, layout: Layout) -> Result<NonNull<u8>, BackingError> {
        if layout.align() > PAGE_BYTES {
            return Err(BackingError::OutOfMetadata);
        }
        let pages = layout.size().div_ceil(PAGE_BYTES);
        let bytes = pages * PAGE_BYTES;
        let kept = self.usage.lock().kept.pop(|block| block.bytes == bytes);
        if let Some(block) = kept {
            return NonNull::new(core::ptr::with_exposed_provenance_mut(block.address))
                .ok_or(BackingError::OutOfMetadata);
        }
        let mut frames = self.pool.chain();
        for _ in 0..pages {
            frames
                .allocate(self.geometry.node)
                .map_err(|_| BackingError::OutOfMetadata)?;
        }
        let address = self.windows.address(METADATA) + self.take_run(pages)?;
        for page in pages_of(address, bytes) {
            let frame = frames.pop_zeroed().ok_or(BackingError::OutOfMetadata)?;
            self.map_page(page, frame);
        }
        NonNull::new(core::ptr::with_exposed_provenance_mut(address))
            .ok_or(BackingError::OutOfMetadata)
    }

    /// Takes so many free pages of the window, with tables to map them by; where they begin in it.
    fn take_run(&self, pages: usize) -> Result<usize, BackingError> {
        let physical = self.pool.physical;
        let directory = self.windows.own(METADATA);
        let directory = directory.ok_or(BackingError::OutOfMetadata)?;
        // No table is put into its place before all are there: taking it out would need a flush.
        let mut made = self.pool.chain();
        loop {
            let lacking = {
                let mut usage = self.usage.lock();
                let first = usage.take_pages(physical, pages);
                let first = first.ok_or(BackingError::OutOfMetadata)?;
                let tables = tables_of(first * PAGE_BYTES..(first + pages) * PAGE_BYTES);
                let is_missing = |&index: &usize| physical.get(directory, index) == Entry::EMPTY;
                let missing = tables.clone().filter(is_missing).count();
                if missing <= made.tables() {
                    for index in tables.clone().filter(is_missing) {
                        if let Some(table) = made.pop_table() {
                            physical.set(directory, index, Entry::table(table));
                        }
                    }
                    usage.take_block(tables);
                    return Ok(first * PAGE_BYTES);
                }
                usage.give_pages_back(physical, first..first + pages);
                missing - made.tables()
            };
            for _ in 0..lacking {
                made.allocate_table(self.geometry.node)
                    .map_err(|_| BackingError::OutOfMetadata)?;
            }
        }
    }

    /// # Safety
    /// `block` came from [`map_metadata`](Self::map_metadata) with this layout, and is not used any more.
    pub(super) unsafe fn unmap_metadata(&self, block: NonNull<u8>, layout: Layout) {
        self.free_kept();
        // SAFETY: the promise of the caller.
        unsafe { self.unmap_block(KeptBlock::of(block, layout)) };
    }

    /// [`unmap_metadata`](Self::unmap_metadata) without a flush: the block waits for its next use.
    ///
    /// # Safety
    /// As [`unmap_metadata`](Self::unmap_metadata).
    pub(super) unsafe fn keep_metadata(&self, block: NonNull<u8>, layout: Layout) {
        let block = KeptBlock::of(block, layout);
        // SAFETY: it is mapped, and nobody's any more (promise of the caller).
        unsafe { self.usage.lock().kept.push(block) };
    }

    /// Gives up the blocks that wait.
    pub(super) fn free_kept(&self) {
        loop {
            let kept = self.usage.lock().kept.pop(|_| true);
            let Some(block) = kept else {
                return;
            };
            // SAFETY: nobody uses a block that waits.
            unsafe { self.unmap_block(block) };
        }
    }

    /// # Safety
    /// The block is mapped, and not used any more.
    unsafe fn unmap_block(&self, KeptBlock { address, bytes }: KeptBlock) {
        let mut out = self.pool.chain();
        // SAFETY: the promise of the caller; flushed below.
        unsafe { self.take_pages_out(address, bytes, &mut out) };
        self.flush(Stale::range(address, bytes));
        drop(out);
        self.give_metadata_back(address, bytes);
    }

    /// Gives back pages of the window that have no memory any more, and tables that nothing needs.
    fn give_metadata_back(&self, address: usize, bytes: usize) {
        let first = address - self.windows.address(METADATA);
        let mut out = self.pool.chain();
        {
            let mut usage = self.usage.lock();
            usage.give_block_back(tables_of(first..first + bytes), |index| {
                self.take_table_out(METADATA, index, &mut out);
            });
            let pages = first / PAGE_BYTES..(first + bytes) / PAGE_BYTES;
            usage.give_pages_back(self.pool.physical, pages);
        }
        if !out.is_empty() {
            self.flush(Stale::range(address, bytes));
        }
    }
}
