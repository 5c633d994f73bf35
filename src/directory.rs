//! The table of chunks: which place of the window holds which chunk, and which is the lowest chunk whose longest free
//! run suffices.
//!
//! The second question is answered by a tree of maxima (fan-out 8) over the places, so that a search costs the same
//! with one chunk and with thousands, all of them full or not. A place that holds no chunk, or a spare one, counts
//! as full.

use core::ptr::NonNull;

use crate::chunk::Chunk;
use crate::chunk::summary::{FANOUT, TreeShape};
use crate::metadata::{BlockLayout, MetaSlice};

/// What a place of the window holds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// Nothing.
    Vacant,
    /// A chunk that is being made or destroyed.
    Busy,
    /// A chunk.
    Chunk(NonNull<Chunk>),
}

/// Layout of a [`Directory`] in a metadata block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DirectoryLayout {
    places: u32,
    places_at: usize,
    longest_at: usize,
    nodes_at: usize,
}

impl DirectoryLayout {
    pub(crate) fn add(
        block: &mut BlockLayout,
        places: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        Ok(Self {
            places,
            places_at: block.array::<Place>(places as usize)?,
            longest_at: block.array::<u32>(places as usize)?,
            nodes_at: block.array::<u32>(TreeShape::new(places).nodes())?,
        })
    }
}

/// Levels that any directory can have.
const MAX_LEVELS: usize = 11;

/// The table of chunks of one instance.
#[derive(Debug)]
pub(crate) struct Directory {
    places: MetaSlice<Place>,
    longest: MetaSlice<u32>,
    nodes: MetaSlice<u32>,
    level_at: [u32; MAX_LEVELS],
    levels: u32,
    /// No place below is vacant.
    vacant_from: u32,
    /// No place from here on has ever held a chunk.
    used_to: u32,
}

impl Directory {
    /// An empty table.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, and nothing else uses this part of it while
    /// the table lives.
    pub(crate) unsafe fn new(block: NonNull<u8>, layout: &DirectoryLayout) -> Self {
        let shape = TreeShape::new(layout.places);
        let mut level_at = [0; MAX_LEVELS];
        for level in 1..shape.levels() {
            level_at[level as usize + 1] = level_at[level as usize] + shape.width(level);
        }
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        unsafe {
            Self {
                places: MetaSlice::new(
                    block,
                    layout.places_at,
                    layout.places as usize,
                    Place::Vacant,
                ),
                longest: MetaSlice::new(block, layout.longest_at, layout.places as usize, 0),
                nodes: MetaSlice::new(block, layout.nodes_at, shape.nodes(), 0),
                level_at,
                levels: shape.levels(),
                vacant_from: 0,
                used_to: 0,
            }
        }
    }

    /// What place `at` holds.
    pub(crate) fn get(&self, at: u32) -> Place {
        self.places
            .get(at as usize)
            .copied()
            .unwrap_or(Place::Vacant)
    }

    /// Puts `place` at `at`.
    pub(crate) fn put(&mut self, at: u32, place: Place) {
        self.places[at as usize] = place;
        self.used_to = self.used_to.max(at + 1);
        if matches!(place, Place::Vacant) {
            self.vacant_from = self.vacant_from.min(at);
        }
    }

    /// The lowest vacant place.
    pub(crate) fn vacant(&mut self) -> Option<u32> {
        let from = self.vacant_from as usize;
        let skip = self.places[from..]
            .iter()
            .position(|place| matches!(place, Place::Vacant))?;
        self.vacant_from = (from + skip) as u32;
        Some(self.vacant_from)
    }

    /// All chunks, in order of their places.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = (u32, NonNull<Chunk>)> + '_ {
        (0..self.used_to).filter_map(|at| match self.get(at) {
            Place::Chunk(chunk) => Some((at, chunk)),
            Place::Vacant | Place::Busy => None,
        })
    }

    /// The longest run that any chunk has free, in granules.
    pub(crate) fn longest(&self) -> u32 {
        self.nodes[self.level_at[self.levels as usize] as usize]
    }

    /// Notes that the chunk at `at` has `longest` granules free in one run, as far as searches are concerned.
    pub(crate) fn set_longest(&mut self, at: u32, longest: u32) {
        if self.longest[at as usize] == longest {
            return;
        }
        self.longest[at as usize] = longest;
        let mut index = at;
        for level in 1..=self.levels {
            index /= FANOUT;
            let joined = self
                .children(level, index)
                .map(|child| self.value(level - 1, child))
                .max()
                .unwrap_or(0);
            let node = &mut self.nodes[(self.level_at[level as usize] + index) as usize];
            if *node == joined {
                return;
            }
            *node = joined;
        }
    }

    /// The lowest place, `from` or above, whose chunk has `granules` free in one run.
    pub(crate) fn find(&self, granules: u32, from: u32) -> Option<u32> {
        self.find_below(self.levels, 0, granules, from)
    }

    fn find_below(&self, level: u32, index: u32, granules: u32, from: u32) -> Option<u32> {
        if level == 0 {
            return Some(index);
        }
        let whole = FANOUT.saturating_pow(level - 1);
        self.children(level, index)
            .filter(|&child| {
                (child + 1).saturating_mul(whole) > from && self.value(level - 1, child) >= granules
            })
            .find_map(|child| self.find_below(level - 1, child, granules, from))
    }

    fn value(&self, level: u32, index: u32) -> u32 {
        match level {
            0 => self.longest[index as usize],
            _ => self.nodes[(self.level_at[level as usize] + index) as usize],
        }
    }

    fn children(&self, level: u32, index: u32) -> core::ops::Range<u32> {
        let width = match level {
            1 => self.places.len() as u32,
            _ => self.level_at[level as usize] - self.level_at[level as usize - 1],
        };
        index * FANOUT..((index + 1) * FANOUT).min(width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::alloc::alloc;
    use std::vec;

    fn directory(places: u32) -> Directory {
        let mut block = BlockLayout::new();
        let layout = DirectoryLayout::add(&mut block, places).unwrap();
        // SAFETY: the layout is not empty, and the leaked block belongs to the table alone.
        unsafe { Directory::new(NonNull::new(alloc(block.finish())).unwrap(), &layout) }
    }

    #[test]
    fn find_agrees_with_a_walk() {
        for places in [1, 7, 8, 9, 64, 65, 600] {
            let mut directory = directory(places);
            let mut plain = vec![0; places as usize];
            let mut state = 0x2545_f491_4f6c_dd1d_u64;
            for _ in 0..2000 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let (at, value) = ((state >> 33) as u32 % places, (state >> 20) as u32 % 9);
                directory.set_longest(at, value);
                plain[at as usize] = value;
                let (from, granules) =
                    ((state >> 40) as u32 % places, (state >> 13) as u32 % 9 + 1);
                let found = (from..places).find(|&at| plain[at as usize] >= granules);
                assert_eq!(directory.find(granules, from), found);
                assert_eq!(directory.longest(), *plain.iter().max().unwrap());
            }
        }
    }

    #[test]
    fn vacant_places_are_reused_lowest_first() {
        let mut directory = directory(3);
        for at in 0..3 {
            assert_eq!(directory.vacant(), Some(at));
            directory.put(at, Place::Busy);
        }
        assert_eq!(directory.vacant(), None);
        directory.put(1, Place::Vacant);
        assert_eq!(directory.vacant(), Some(1));
    }
}
