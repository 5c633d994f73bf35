//! Which is the lowest chunk that can serve a request, from memory that is there or from pages that could be populated;
//! and which place is vacant.
//!
//! Both questions are answered by a [`MaxTree`] over the places, so that a search costs the same with one chunk and
//! with thousands, all of them full or not. A place that holds no chunk, or a spare one, counts as full.

use core::ops::Range;
use core::ptr::NonNull;

use crate::chunk::Chunk;
use crate::max_tree::{MaxTree, MaxTreeLayout};
use crate::metadata::BlockLayout;
use crate::places::{Place, Places};

/// The free runs of a chunk as far as searches are concerned, in granules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Room {
    /// The longest run in memory that is there.
    pub(crate) ready: u32,
    /// No run is longer if pages are populated; 0 if there is no page to populate.
    pub(crate) growing: u32,
    /// What is certain to be had at any alignment if pages are populated.
    pub(crate) certain: u32,
}

/// Layout of a [`Directory`] in a metadata block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DirectoryLayout {
    ready: MaxTreeLayout,
    growing: MaxTreeLayout,
    certain: MaxTreeLayout,
}

impl DirectoryLayout {
    pub(crate) fn add(
        block: &mut BlockLayout,
        places: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        Ok(Self {
            ready: MaxTreeLayout::add(block, places)?,
            growing: MaxTreeLayout::add(block, places)?,
            certain: MaxTreeLayout::add(block, places)?,
        })
    }
}

/// The chunks of one instance, as the holder of the lock sees them.
#[derive(Debug)]
pub(crate) struct Directory {
    places: Places,
    ready: MaxTree,
    growing: MaxTree,
    certain: MaxTree,
    /// No place below is vacant.
    vacant_from: u32,
    /// No place from here on has ever held a chunk.
    used_to: u32,
}

impl Directory {
    /// A directory of `places`, all vacant.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, for as many places, and nothing else uses this
    /// part of it while the directory lives.
    pub(crate) unsafe fn new(block: NonNull<u8>, layout: &DirectoryLayout, places: Places) -> Self {
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        unsafe {
            Self {
                places,
                ready: MaxTree::new(block, &layout.ready),
                growing: MaxTree::new(block, &layout.growing),
                certain: MaxTree::new(block, &layout.certain),
                vacant_from: 0,
                used_to: 0,
            }
        }
    }

    /// What place `at` holds.
    #[inline]
    pub(crate) fn get(&self, at: u32) -> Place {
        self.places.get(at)
    }

    /// Puts `place` at `at`.
    pub(crate) fn put(&mut self, at: u32, place: Place) {
        self.places.put(at, place);
        self.used_to = self.used_to.max(at + 1);
        if matches!(place, Place::Vacant | Place::Parked(_)) {
            self.vacant_from = self.vacant_from.min(at);
        }
    }

    /// The lowest vacant place.
    pub(crate) fn vacant(&mut self) -> Option<u32> {
        let is_vacant = |&at: &u32| matches!(self.get(at), Place::Vacant | Place::Parked(_));
        self.vacant_from = (self.vacant_from..self.places.len()).find(is_vacant)?;
        Some(self.vacant_from)
    }

    /// The lowest place whose chunk has areas that were freed and not swept; they count as swept from now on.
    #[inline]
    pub(crate) fn take_freed(&self) -> Option<u32> {
        self.places.take_freed()
    }

    /// Says that the chunk at `at` has areas that were freed and not swept.
    pub(crate) fn note_freed(&self, at: u32) {
        self.places.note_place(at);
    }

    /// Takes the metadata of a chunk that has been destroyed; its place holds nothing then.
    pub(crate) fn take_parked(&mut self) -> Option<(u32, NonNull<Chunk>)> {
        let (at, chunk) = self.used_places().find_map(|at| match self.get(at) {
            Place::Parked(chunk) => Some((at, chunk)),
            Place::Vacant | Place::Busy | Place::Chunk(_) => None,
        })?;
        self.put(at, Place::Vacant);
        Some((at, chunk))
    }

    /// All chunks, in order of their places.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = (u32, NonNull<Chunk>)> + '_ {
        (0..self.used_to).filter_map(|at| match self.get(at) {
            Place::Chunk(chunk) => Some((at, chunk)),
            Place::Vacant | Place::Parked(_) | Place::Busy => None,
        })
    }

    /// The places of later chunks that have ever been used.
    pub(crate) fn used_places(&self) -> Range<u32> {
        1..self.used_to.max(1)
    }

    /// Notes what the chunk at `at` has free.
    pub(crate) fn set_room(&mut self, at: u32, room: Room) {
        self.ready.set(at, room.ready);
        self.growing.set(at, room.growing);
        self.certain.set(at, room.certain);
    }

    /// The lowest place whose chunk has `granules` in one run in memory that is there.
    #[inline]
    pub(crate) fn first_ready(&self, granules: u32) -> Option<u32> {
        self.ready.first(granules)
    }

    /// The lowest place, `from` or above, whose chunk has `granules` in one run in memory that is there.
    pub(crate) fn find_ready(&self, granules: u32, from: u32) -> Option<u32> {
        self.ready.find(granules, from)
    }

    /// The lowest place, `from` or above, whose chunk may have `granules` in one run if pages are populated.
    pub(crate) fn find_growing(&self, granules: u32, from: u32) -> Option<u32> {
        self.growing.find(granules, from)
    }

    /// The longest run in memory that is there.
    pub(crate) fn longest_ready(&self) -> u32 {
        self.ready.max()
    }

    /// What some chunk has for certain, at any alignment, if pages are populated.
    pub(crate) fn longest_certain(&self) -> u32 {
        self.certain.max()
    }

    /// The lowest place whose chunk has `granules` for certain, at any alignment, if pages are populated.
    pub(crate) fn find_certain(&self, granules: u32) -> Option<u32> {
        self.certain.first(granules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::places::PlacesLayout;
    use std::alloc::alloc;

    #[test]
    fn vacant_places_are_reused_lowest_first() {
        let mut block = BlockLayout::new();
        let places = PlacesLayout::add(&mut block, 3).unwrap();
        let layout = DirectoryLayout::add(&mut block, 3).unwrap();
        // SAFETY: the layout is not empty, and the leaked block belongs to the tables alone.
        let mut directory = unsafe {
            let block = NonNull::new(alloc(block.finish())).unwrap();
            Directory::new(block, &layout, Places::new(block, &places))
        };
        for at in 0..3 {
            assert_eq!(directory.vacant(), Some(at));
            directory.put(at, Place::Busy);
        }
        assert_eq!(directory.vacant(), None);
        directory.put(1, Place::Vacant);
        assert_eq!(directory.vacant(), Some(1));
    }
}
