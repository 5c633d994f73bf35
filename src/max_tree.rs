//! A tree of maxima (fan-out 8): the lowest of many values that is large enough, at a cost that does not depend on how
//! many there are.
//!
//! Both levels of the search for room use it: over the chunks of an instance, and over the pages of a chunk.
//!
//! Invariants: every node up to level `top` is the largest of the eight below it; all values that are not 0 lie below
//! the first node of level `top`, which is `max`, so that a table that is hardly used has a flat tree. Levels are filled up with zeroes
//! to whole groups of eight.

use core::ptr::NonNull;

use crate::metadata::{BlockLayout, MetaSlice};

/// Values that a node stands for, as a shift.
const FANOUT_SHIFT: u32 = 3;

/// Values that a node stands for.
const FANOUT: u32 = 1 << FANOUT_SHIFT;

/// Levels that any tree over 32-bit indices can have, the values and the end of the last level included.
const MAX_LEVELS: usize = 13;

/// Layout of a [`MaxTree`] in a metadata block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MaxTreeLayout {
    leaves: u32,
    values_at: usize,
}

impl MaxTreeLayout {
    /// Adds a tree over `leaves` values (at least one) to `block`.
    pub(crate) fn add(
        block: &mut BlockLayout,
        leaves: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        let (_, len) = levels(leaves);
        Ok(Self {
            leaves,
            values_at: block.array::<u32>(len)?,
        })
    }
}

/// Where each level begins, the end of the last one behind it, and how long all of them are.
fn levels(leaves: u32) -> ([usize; MAX_LEVELS], usize) {
    let mut level_at = [usize::MAX; MAX_LEVELS];
    let (mut width, mut end) = (leaves as usize, 0);
    for at in &mut level_at {
        *at = end;
        if width == 0 {
            break;
        }
        end += width.next_multiple_of(FANOUT as usize);
        width = match width {
            1 => 0,
            _ => width.div_ceil(FANOUT as usize),
        };
    }
    (level_at, end)
}

/// Values, all 0 at first, and the maxima of eight, sixty-four ... of them.
#[derive(Debug)]
pub(crate) struct MaxTree {
    /// Level 0, the values themselves, and behind it the levels above.
    values: MetaSlice<u32>,
    /// Where in `values` each level begins; one entry more is the end of the last.
    level_at: [usize; MAX_LEVELS],
    /// The level that searches begin at.
    top: usize,
    /// The first node of that level.
    max: u32,
}

impl MaxTree {
    /// A tree of zeroes.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, and nothing else uses this part of it while
    /// the tree lives.
    pub(crate) unsafe fn new(block: NonNull<u8>, layout: &MaxTreeLayout) -> Self {
        let (level_at, len) = levels(layout.leaves);
        Self {
            // SAFETY: the offset comes from laying this array out in this block (promise of the caller).
            values: unsafe { MetaSlice::new(block, layout.values_at, len, 0) },
            level_at,
            top: 0,
            max: 0,
        }
    }

    /// Value `at`.
    #[inline]
    pub(crate) fn get(&self, at: u32) -> u32 {
        self.values[at as usize]
    }

    /// The largest value.
    #[inline]
    pub(crate) fn max(&self) -> u32 {
        self.max
    }

    /// Sets value `at`.
    #[inline]
    pub(crate) fn set(&mut self, at: u32, value: u32) {
        let place = &mut self.values[at as usize];
        let old = *place;
        if old != value {
            *place = value;
            self.update(at, old, value);
        }
    }

    /// Brings the nodes above value `at`, which was `old` and is `new`, up to date, as far as something changes.
    fn update(&mut self, at: u32, mut old: u32, mut new: u32) {
        while u64::from(at) >> (FANOUT_SHIFT * self.top as u32) != 0 {
            self.top += 1;
            self.values[self.level_at[self.top]] = self.max;
        }
        let values = &mut *self.values;
        let mut index = at as usize;
        for levels in self.level_at[..=self.top].windows(2) {
            let group = levels[0] + (index & !(FANOUT as usize - 1));
            index >>= FANOUT_SHIFT;
            let node = levels[1] + index;
            let was = values[node];
            if new < was {
                if old < was {
                    // What was the largest still is.
                    return;
                }
                let children: Option<&[u32; FANOUT as usize]> = values[group..].first_chunk();
                new = children.map_or(new, |all| all.iter().fold(0, |max, &child| max.max(child)));
            }
            if new == was {
                return;
            }
            values[node] = new;
            old = was;
        }
        self.max = new;
    }

    /// The lowest index whose value is at least `least`, which is not 0.
    #[inline]
    pub(crate) fn first(&self, least: u32) -> Option<u32> {
        debug_assert!(least > 0);
        match self.max() >= least {
            true => self.descend(self.top, 0, least),
            false => None,
        }
    }

    /// The lowest index, `from` or above, whose value is at least `least`, which is not 0.
    pub(crate) fn find(&self, least: u32, from: u32) -> Option<u32> {
        debug_assert!(least > 0);
        let (mut level, mut index) = (0, from as usize);
        // Up, to the right of what has been seen, to a node with such a value below it.
        loop {
            let start = self.level_at[level] + index;
            if start >= self.level_at[level + 1] {
                return None;
            }
            let end = (index | (FANOUT as usize - 1)) + 1;
            let siblings = &self.values[start..self.level_at[level] + end];
            if let Some(skip) = siblings.iter().position(|&value| value >= least) {
                return self.descend(level, index + skip, least);
            }
            level += 1;
            if level > self.top {
                return None;
            }
            index = end >> FANOUT_SHIFT;
        }
    }

    /// The lowest index below node `index` of `level`, which is at least `least`, whose value is that.
    #[inline]
    fn descend(&self, mut level: usize, mut index: usize, least: u32) -> Option<u32> {
        while level > 0 {
            level -= 1;
            index <<= FANOUT_SHIFT;
            let group = &self.values[self.level_at[level] + index..][..FANOUT as usize];
            index += group.iter().position(|&value| value >= least)?;
        }
        Some(index as u32)
    }

    /// Panics unless every node that counts is the largest of those below it.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        assert_eq!(self.max, self.values[self.level_at[self.top]]);
        for level in 1..=self.top {
            let (below, at) = (self.level_at[level - 1], self.level_at[level]);
            for (index, group) in self.values[below..at].chunks(FANOUT as usize).enumerate() {
                let is_below_top = index >> (FANOUT_SHIFT as usize * (self.top - level)) == 0;
                let max = group.iter().copied().max().unwrap_or(0);
                match is_below_top {
                    true => assert_eq!(self.values[at + index], max, "level {level} node {index}"),
                    false => assert_eq!(max, 0, "level {level} node {index}"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::alloc::alloc;
    use std::vec;

    #[test]
    fn find_agrees_with_a_walk() {
        for leaves in [1, 7, 8, 9, 64, 65, 512, 600, 4097] {
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
                assert_eq!(tree.find(least, leaves), None);
                assert_eq!(tree.first(least), tree.find(least, 0));
                assert_eq!(tree.max(), plain.iter().copied().max().unwrap_or(0));
                assert_eq!(tree.get(at), value);
            }
            tree.check();
        }
    }
    /// Every tree of ten leaves (two levels above them) with values up to 2, and every change of every leaf.
    #[test]
    fn all_small_trees_agree_with_a_walk() {
        const LEAVES: u32 = 10;
        const VALUES: u32 = 3;
        let mut block = BlockLayout::new();
        let layout = MaxTreeLayout::add(&mut block, LEAVES).unwrap();
        // SAFETY: the layout is not empty, and the leaked block belongs to the one tree that lives.
        let block = unsafe { NonNull::new(alloc(block.finish())).unwrap() };
        for number in 0..VALUES.pow(LEAVES) {
            // SAFETY: as above; the last tree is gone.
            let mut tree = unsafe { MaxTree::new(block, &layout) };
            let mut plain = [0; LEAVES as usize];
            for at in 0..LEAVES {
                plain[at as usize] = number / VALUES.pow(at) % VALUES;
                tree.set(at, plain[at as usize]);
            }
            for at in 0..LEAVES {
                let old = plain[at as usize];
                for value in (0..VALUES).chain([old]) {
                    tree.set(at, value);
                    plain[at as usize] = value;
                    tree.check();
                    assert_eq!(tree.max(), plain.into_iter().max().unwrap_or(0));
                    for least in 1..=VALUES {
                        let first = plain.iter().position(|&value| value >= least);
                        assert_eq!(tree.first(least), first.map(|at| at as u32), "{plain:?}");
                    }
                }
            }
            for least in 1..=VALUES {
                for from in 0..=LEAVES {
                    let found = (from..LEAVES).find(|&at| plain[at as usize] >= least);
                    assert_eq!(tree.find(least, from), found, "{plain:?} {least} {from}");
                }
            }
        }
    }
}
