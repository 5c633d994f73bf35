//! One chunk: a unit's worth of address space per CPU, which areas of it are used, and which of its pages have memory.
//!
//! A [`Chunk`] is shared (lists and the directory point to it, and whoever frees an area looks at its marks); what changes lies in its
//! [`Body`], which only the holder of the allocator's lock touches.

use core::alloc::{Layout, LayoutError};
use core::cell::UnsafeCell;
use core::ops::Range;
use core::ptr::NonNull;

use intrusive_collections::{LinkedListLink, UnsafeRef, intrusive_adapter};

use crate::metadata::BlockLayout;
use area_map::AreaMapLayout;
use marks::Marks;

pub(crate) mod area_map;
pub(crate) mod bitmap;
mod body;
mod free_runs;
mod growth;
mod marks;
mod page_len;

pub(crate) use body::{Body, Counts};
pub(crate) use marks::{Seen, note};

/// Pages that a [`PageMask`] can name, and so those that one area may touch.
pub(crate) const MAX_MASK_PAGES: u32 = u64::BITS;

/// What a chunk's pages are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nature {
    /// A region of the first chunk: memory that was there before the allocator and never goes away.
    First,
    /// Pages populated on demand.
    Mapped,
}

/// The list that a chunk is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Membership {
    /// None: a chunk in use without a page to give back, or the first chunk.
    None,
    /// Chunks with neither areas nor memory, ready to be used.
    Spare,
    /// Chunks with populated pages that no area touches.
    Drain,
}

/// Up to 64 pages of a chunk: bit `i` is page `first + i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PageMask {
    first: u32,
    bits: u64,
}

impl PageMask {
    /// No pages, of those from `first` on.
    const fn none(first: u32) -> Self {
        Self { first, bits: 0 }
    }

    /// The pages from 0 on whose bits are set.
    #[cfg(all(test, not(loom)))]
    pub(crate) const fn of_bits(bits: u64) -> Self {
        Self { first: 0, bits }
    }

    fn insert(&mut self, page: u32) {
        self.bits |= 1 << (page - self.first);
    }

    pub(crate) fn is_empty(self) -> bool {
        self.bits == 0
    }

    pub(crate) fn count(self) -> u32 {
        self.bits.count_ones()
    }

    /// The same pages, counted from a page that lies `pages` before.
    pub(crate) fn shifted(self, pages: u32) -> Self {
        Self {
            first: self.first + pages,
            ..self
        }
    }

    /// The runs of neighbouring pages.
    pub(crate) fn runs(self) -> impl Iterator<Item = Range<u32>> + use<> {
        let mut at = 0;
        core::iter::from_fn(move || {
            let left = self.bits.checked_shr(at).filter(|&left| left != 0)?;
            let start = at + left.trailing_zeros();
            at = start + (self.bits >> start).trailing_ones();
            Some(self.first + start..self.first + at)
        })
    }
}

/// A chunk. What a free into a stash, and a request out of one, look at lies on its first line.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Chunk {
    /// The granule of the unit that the marks begin with.
    first_granule: u32,
    /// Its place in the window.
    pub(crate) place: u32,
    /// The marks of its granules, for whoever frees without the lock.
    marks: Marks,
    link: LinkedListLink,
    /// Its metadata block.
    pub(crate) block: (NonNull<u8>, Layout),
    body: UnsafeCell<Body>,
}

intrusive_adapter!(pub(crate) ChunkAdapter = UnsafeRef<Chunk>: Chunk { link => LinkedListLink });

/// What is laid out in a chunk's metadata block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChunkLayout {
    /// The block to ask for.
    pub(crate) block: Layout,
    chunk_at: usize,
    map: AreaMapLayout,
    clean_at: usize,
    pages: u32,
    granules_per_page: u32,
}

impl ChunkLayout {
    /// The layout of a chunk that keeps track of `pages` pages.
    pub(crate) fn new(pages: u32, granules_per_page: u32) -> Result<Self, LayoutError> {
        let mut block = BlockLayout::new();
        let chunk_at = block.array::<Chunk>(1)?;
        let map = AreaMapLayout::add(&mut block, pages, granules_per_page)?;
        let clean_at = block.array::<u16>(pages as usize)?;
        Ok(Self {
            block: block.finish(),
            chunk_at,
            map,
            clean_at,
            pages,
            granules_per_page,
        })
    }
}

impl Chunk {
    /// Writes a chunk into `block`. Its region, in granules of the unit, is `region`; pages before the one that the
    /// region starts in are not kept track of.
    ///
    /// # Safety
    /// `block` has the layout `layout.block` and belongs to the chunk until the chunk is given up; the region lies in
    /// the `layout.pages` pages from the one that it starts in.
    pub(crate) unsafe fn new(
        block: NonNull<u8>,
        layout: &ChunkLayout,
        place: u32,
        nature: Nature,
        region: Range<u32>,
    ) -> NonNull<Self> {
        // SAFETY: the promise of the caller.
        let body = unsafe { Body::new(block, layout, nature, region) };
        // SAFETY: `chunk_at` lies inside the block.
        let chunk = unsafe { block.add(layout.chunk_at) }.cast::<Self>();
        let value = Self {
            link: LinkedListLink::new(),
            place,
            block: (block, layout.block),
            // SAFETY: the marks lie in the chunk's own block.
            marks: unsafe { body.map.marks.view() },
            first_granule: body.first_granule(),
            body: UnsafeCell::new(body),
        };
        // SAFETY: the block has room for a chunk there, aligned.
        unsafe { chunk.write(value) };
        chunk
    }

    /// The granule of the map that `granule` of the unit is; one beyond its end if it lies before the map.
    #[inline(always)]
    fn in_map(&self, granule: u32) -> u32 {
        granule.wrapping_sub(self.first_granule)
    }

    /// Frees the live area that starts at `granule` of the unit, without the lock, and results in its granule in the map;
    /// `None` if there is none.
    #[inline]
    pub(crate) fn free(&self, granule: u32) -> Option<u32> {
        let granule = self.in_map(granule);
        self.marks.end(granule).then_some(granule)
    }

    /// Counts an area that was freed at `granule` of the map; says whether sweeping its page is worth the while now.
    #[inline]
    pub(crate) fn ripen(&self, granule: u32) -> bool {
        self.marks.ripen(granule)
    }

    /// The live area that starts at `granule` of the unit: its granule in the map, and its length.
    #[inline]
    pub(crate) fn live_area(&self, granule: u32) -> Option<(u32, (u32, Seen<'_>))> {
        let granule = self.in_map(granule);
        Some((granule, self.marks.live_len(granule)?))
    }

    /// Makes the freed area of `len` granules that starts at `granule` of the unit live again; false if there is none.
    #[inline]
    pub(crate) fn reuse(&self, granule: u32, len: u32) -> bool {
        self.marks.reuse(self.in_map(granule), len)
    }

    /// Which of so many areas of `len` granules, one behind the other from `granule` of the unit on, are freed: bit `i` is area `i`.
    pub(crate) fn freed_among(&self, granule: u32, len: u32, count: u32) -> u32 {
        self.marks.freed_among(self.in_map(granule), len, count)
    }

    /// Makes those of them live again; which they are.
    pub(crate) fn reuse_among(&self, granule: u32, len: u32, count: u32) -> u32 {
        self.marks.reuse_among(self.in_map(granule), len, count)
    }

    /// Marks the live area that starts at `granule` of the map, and was found so, as freed; false if it is not live any more.
    #[inline]
    pub(crate) fn end(&self, granule: u32, seen: &Seen<'_>) -> bool {
        self.marks.end_seen(granule, seen)
    }

    /// Whether the next sweep looks at the page of `granule` of the map, which a LOCKed step has changed just now.
    #[inline]
    pub(crate) fn is_noted(&self, granule: u32) -> bool {
        self.marks.is_noted(granule)
    }

    /// Has the page of `granule` of the map looked at by the next sweep; says whether it would not have been.
    #[inline]
    pub(crate) fn note_granule(&self, granule: u32) -> bool {
        self.marks.note_page_of(granule)
    }

    /// Marks the live area that starts at `granule` of the unit as freed, and has nobody sweep it; false if there is none.
    #[inline]
    pub(crate) fn mark(&self, granule: u32) -> bool {
        self.marks.end(self.in_map(granule))
    }

    /// Has the page of `granule` of the unit looked at by the next sweep.
    pub(crate) fn note(&self, granule: u32) {
        self.marks.note_page_of(granule - self.first_granule);
    }

    /// Has every page looked at by the next sweep.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(crate) fn note_all(&self) {
        self.marks.note_all();
    }

    /// What changes about the chunk; only the holder of the allocator's lock may follow the pointer.
    pub(crate) fn body(&self) -> *mut Body {
        self.body.get()
    }
}
