//! A tree of maxima (fan-out 8): the lowest of many values that is large enough, at a cost that does not depend on how
//! many there are.

use core::ops::Range;
use core::ptr::NonNull;

use crate::chunk::summary::{FANOUT, TreeShape};
use crate::metadata::{BlockLayout, MetaSlice};

/// Levels that any tree over 32-bit indices can have.
const MAX_LEVELS: usize = 12;

/// Layout of a [`MaxTree`] in a metadata block.
#[derive(Debug, Clone, Copy)]
pub(super) struct MaxTreeLayout {
    leaves: u32,
    values_at: usize,
    nodes_at: usize,
}

impl MaxTreeLayout {
    pub(super) fn add(
        block: &mut BlockLayout,
        leaves: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        Ok(Self {
            leaves,
            values_at: block.array::<u32>(leaves as usize)?,
            nodes_at: block.array::<u32>(TreeShape::new(leaves).nodes())?,
        })
    }
}

/// Values, all 0 at first, and the maxima of eight, sixty-four ... of them.
#[derive(Debug)]
pub(super) struct MaxTree {
    values: MetaSlice<u32>,
    nodes: MetaSlice<u32>,
    /// Index in `nodes` of the first node of each level; level 0 (the values) has none.
    level_at: [u32; MAX_LEVELS],
    levels: u32,
}

impl MaxTree {
    /// A tree of zeroes.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, and nothing else uses this part of it while
    /// the tree lives.
    pub(super) unsafe fn new(block: NonNull<u8>, layout: &MaxTreeLayout) -> Self {
        let shape = TreeShape::new(layout.leaves);
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        unsafe {
            Self {
                values: MetaSlice::new(block, layout.values_at, layout.leaves as usize, 0),
                nodes: MetaSlice::new(block, layout.nodes_at, shape.nodes(), 0),
                level_at: shape.level_offsets(),
                levels: shape.levels(),
            }
        }
    }

    /// Sets value `at`.
    pub(super) fn set(&mut self, at: u32, value: u32) {
        if self.values[at as usize] == value {
            return;
        }
        self.values[at as usize] = value;
        let mut index = at;
        for level in 1..=self.levels {
            index /= FANOUT;
            let children = self.children(level, index);
            let max = children
                .map(|child| self.value(level - 1, child))
                .max()
                .unwrap_or(0);
            let node = &mut self.nodes[(self.level_at[level as usize] + index) as usize];
            if *node == max {
                return;
            }
            *node = max;
        }
    }

    /// The lowest index, `from` or above, whose value is at least `least`.
    pub(super) fn find(&self, least: u32, from: u32) -> Option<u32> {
        self.find_below(self.levels, 0, least, from)
    }

    fn find_below(&self, level: u32, index: u32, least: u32, from: u32) -> Option<u32> {
        if level == 0 {
            return Some(index);
        }
        let whole = FANOUT.saturating_pow(level - 1);
        self.children(level, index)
            .filter(|&child| {
                (child + 1).saturating_mul(whole) > from && self.value(level - 1, child) >= least
            })
            .find_map(|child| self.find_below(level - 1, child, least, from))
    }

    fn value(&self, level: u32, index: u32) -> u32 {
        match level {
            0 => self.values[index as usize],
            _ => self.nodes[(self.level_at[level as usize] + index) as usize],
        }
    }

    fn children(&self, level: u32, index: u32) -> Range<u32> {
        let width = match level {
            1 => self.values.len() as u32,
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

    #[test]
    fn find_agrees_with_a_walk() {
        for leaves in [1, 7, 8, 9, 64, 65, 600] {
            let mut block = BlockLayout::new();
            let layout = MaxTreeLayout::add(&mut block, leaves).unwrap();
            // SAFETY: the layout is not empty, and the leaked block belongs to the tree alone.
            let mut tree =
                unsafe { MaxTree::new(NonNull::new(alloc(block.finish())).unwrap(), &layout) };
            let mut plain = vec![0; leaves as usize];
            let mut state = 0x2545_f491_4f6c_dd1d_u64;
            for _ in 0..2000 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let (at, value) = ((state >> 33) as u32 % leaves, (state >> 20) as u32 % 9);
                tree.set(at, value);
                plain[at as usize] = value;
                let (from, least) = ((state >> 40) as u32 % leaves, (state >> 13) as u32 % 9 + 1);
                let found = (from..leaves).find(|&at| plain[at as usize] >= least);
                assert_eq!(tree.find(least, from), found);
            }
        }
    }
}
