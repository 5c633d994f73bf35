//! A CPU's list of areas of one length that were freed on it, to be handed out there again.
//!
//! To the rest of the allocator they are what all freed areas are: marked as freed, and to be swept by whoever needs the
//! room. So the list is a hint, and what it names may be gone: an area that is taken from it is handed out only if its mark
//! could be turned back. One word in the CPU's unit names the last area put. The name of the one before it stands in a row of names
//! that the CPU has for the stash; if there are no rows, in the area's first granule on that CPU.
//!
//! With rows nobody who frees an area touches it. What stands there is of use as a hint only: who is interrupted on the way may write a
//! name where another one stands by then.
//!
//! That word also counts the areas that were handed out again; whoever holds the allocator's lock adds that up.

use super::cells::WINDOW_BYTES;
use super::{Class, MAX_LEN, RUNS, field, field_mask, places};

/// Stashes that a CPU has.
const STASHES: usize = RUNS;

/// Bytes of a unit's table of stashes.
pub(super) const BYTES: usize = STASHES * size_of::<u64>();

/// Granules that a stash may name, at most; the last area may go beyond.
pub(crate) const MOST_GRANULES: u32 = if cfg!(all(loom, test)) { 256 } else { 4096 };

/// Where the names of each stash begin in a CPU's rows, counted in names; at the end, how many there are.
static ROWS: [u16; STASHES + 1] = {
    let mut rows = [0; STASHES + 1];
    let mut place = 0;
    while place < STASHES {
        // The shortest length there.
        let own = if place < OWN_PLACES as usize {
            place
        } else {
            OWN_PLACES as usize
        };
        let most = MOST_GRANULES.div_ceil(own as u32 + 1);
        let names = if most < DEPTH_MAX { most } else { DEPTH_MAX };
        rows[place + 1] = rows[place] + names as u16;
        place += 1;
    }
    rows
};

/// Bytes of a CPU's rows of names: whole windows, as the tables have, so that what lies behind is aligned as it was.
pub(crate) const ROWS_BYTES: usize =
    (ROWS[STASHES] as usize * size_of::<u32>()).next_multiple_of(WINDOW_BYTES);

/// The place of a length in a CPU's table: small ones have a place each, the others share.
static PLACES: [u8; 1 << LEN.1] = places(STASHES);

/// Lengths up to that have a place of their own, in their order.
pub(crate) const OWN_PLACES: u32 = (STASHES / 2) as u32;

// The fields of the word: where each begins, and how wide it is. The bit between the depth and the length is clear: it is set
// in the difference if one is taken of none.
const HEAD: (u32, u32) = (0, 28);
const TAKEN: (u32, u32) = (28, 15);
const DEPTH: (u32, u32) = (43, 10);
const LEN: (u32, u32) = (54, 10);

const ONE: u64 = 1 << DEPTH.0;
const ONE_TAKEN: u64 = 1 << TAKEN.0;
const NONE_LEFT: u64 = 1 << (DEPTH.0 + DEPTH.1);

/// Areas that it names, at most.
const DEPTH_MAX: u32 = (1 << DEPTH.1) - 1;
/// Areas taken that must be added up before more are taken: whoever interrupts has as many left.
const TAKEN_MAX: u32 = (1 << (TAKEN.1 - 1)) - 1;

const _: () =
    assert!(LEN.1 == super::LEN.1 && LEN.0 + LEN.1 == u64::BITS && NONE_LEFT << 1 == 1 << LEN.0);

/// What a stash is to be when the area is taken that was put last, but for the name of the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct First(u64);

impl First {
    /// The area.
    #[inline]
    pub(crate) fn granule(self) -> u32 {
        field(self.0, HEAD)
    }

    /// The stash without it; it held `link`.
    #[inline]
    pub(crate) fn taken(self, link: u32) -> Stash {
        Stash(self.0 & !field_mask(HEAD) | u64::from(link) & field_mask(HEAD))
    }
}

/// The word of a stash: an empty one of no length at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stash(u64);

impl Stash {
    /// Where in a CPU's table the stash for areas of `len` granules is, in bytes.
    #[inline]
    pub(crate) const fn table_offset(len: u32) -> usize {
        PLACES[len as usize] as usize * size_of::<u64>()
    }

    /// Where in a CPU's rows of names the one is, in bytes, that stands before what is put into the stash at `offset` of the table, if
    /// it names `depth` areas with that.
    #[inline]
    pub(crate) fn name_offset(offset: usize, depth: u32) -> usize {
        let row = ROWS[offset / size_of::<u64>() % STASHES];
        (usize::from(row) + depth as usize - 1) * size_of::<u32>()
    }

    /// [`table_offset`](Self::table_offset) for a length that has a place of its own.
    #[inline]
    pub(crate) fn own_offset(len: u32) -> usize {
        debug_assert!((1..=OWN_PLACES).contains(&len));
        (len as usize - 1) * size_of::<u64>()
    }

    /// Where all their words are, in bytes.
    pub(crate) fn table_offsets() -> impl Iterator<Item = usize> {
        (0..STASHES).map(|place| place * size_of::<u64>())
    }

    /// An empty one for areas of `len` granules.
    fn empty(len: u32) -> Self {
        debug_assert!((1..=MAX_LEN).contains(&len));
        Self(u64::from(len) << LEN.0)
    }

    #[inline]
    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    #[inline]
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    /// The length of its areas, in granules; 0 if it is for none yet.
    #[inline]
    pub(crate) fn len(self) -> u32 {
        field(self.0, LEN)
    }

    /// How many areas it names.
    #[inline]
    pub(crate) fn depth(self) -> u32 {
        field(self.0, DEPTH)
    }

    /// How many were taken since it was empty and new.
    #[inline]
    pub(crate) fn taken(self) -> u32 {
        field(self.0, TAKEN)
    }

    /// The area put last, if one of a class's length may be taken.
    #[inline]
    pub(crate) fn first(self, class: Class) -> Option<First> {
        // The length is at the end of both words.
        const UP: u32 = LEN.0 - super::LEN.0;
        const TOO_MANY: u64 = 1 << (TAKEN.0 + TAKEN.1 - 1);
        let rest = self.0.wrapping_add(ONE_TAKEN.wrapping_sub(ONE));
        let named = rest & (field_mask(LEN) | NONE_LEFT | TOO_MANY);
        (named == class.bits() << UP & field_mask(LEN)).then_some(First(rest))
    }

    /// The area put last, if it names any.
    #[inline]
    pub(crate) fn head(self) -> u32 {
        field(self.0, HEAD)
    }

    /// What to write into an area before it is put: the one put before it, and bits that whoever reads it leaves out.
    #[inline]
    pub(crate) fn link(self) -> u32 {
        self.0 as u32
    }

    /// With the area of `len` granules at `granule` put; `None` if it is not such a stash, names `most` granules already, or holds
    /// no more. Areas of an even length are of use where they are aligned to as much.
    #[inline]
    pub(crate) fn with(self, granule: u32, len: u32, most: u32) -> Option<Self> {
        // Too much if the length is another.
        let depth = ((self.0 >> DEPTH.0) as u32).wrapping_sub(len << (LEN.0 - DEPTH.0));
        let has_room = depth < DEPTH_MAX && depth * len < most;
        (has_room && (granule & 1 == 0 || len & 1 != 0))
            .then(|| Self((self.0 & !field_mask(HEAD) | u64::from(granule)) + ONE))
    }

    /// With the area at `granule` taken, which it may have lost meanwhile, and which held `link`.
    #[inline]
    pub(crate) fn without(self, granule: u32, link: u32) -> Self {
        let taken = self.0.wrapping_add(ONE_TAKEN);
        if self.depth() == 0 || self.head() != granule {
            return Self(taken);
        }
        let next = u64::from(link) & field_mask(HEAD);
        Self((taken & !field_mask(HEAD) | next) - ONE)
    }

    /// Without the area that was put last, which was put after `link`.
    #[inline]
    pub(crate) fn dropped(self, link: u32) -> Self {
        debug_assert!(self.depth() > 0);
        Self((self.0 & !field_mask(HEAD) | u64::from(link) & field_mask(HEAD)) - ONE)
    }

    /// Whether it must be settled before it serves areas of `len` granules.
    pub(crate) fn is_due(self, len: u32) -> bool {
        self.len() != len || self.taken() >= TAKEN_MAX
    }

    /// For areas of `len` granules, with those that it names if they are such, and none counted.
    pub(crate) fn settled(self, len: u32) -> Self {
        match self.len() == len {
            true => Self(self.0 & !field_mask(TAKEN)),
            false => Self::empty(len),
        }
    }

    /// Without all that it names.
    #[inline]
    pub(crate) fn cleared(self) -> Self {
        Self(self.0 & !(field_mask(HEAD) | field_mask(DEPTH)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unit::GRANULE_BYTES;

    fn first(stash: Stash, len: u32) -> Option<u32> {
        let class = Class::of(len as usize * GRANULE_BYTES, GRANULE_BYTES)?;
        stash.first(class).map(First::granule)
    }

    #[test]
    fn areas_are_taken_in_the_order_in_which_they_were_put_last_first() {
        let empty = Stash::empty(5);
        assert_eq!((first(empty, 5), empty.len(), empty.taken()), (None, 5, 0));
        let one = empty.with(7, 5, 10).unwrap();
        let two = one.with(9, 5, 10).unwrap();
        assert_eq!(
            (first(two, 5), first(two, 4), two.link()),
            (Some(9), None, 9)
        );
        let left = two.without(9, one.link());
        let class = Class::of(20, 4).unwrap();
        assert_eq!(two.first(class).unwrap().taken(one.link()), left);
        assert_eq!(
            (first(left, 5), left.depth(), left.taken()),
            (Some(7), 1, 1)
        );
        let left = left.without(7, u32::MAX);
        assert_eq!((first(left, 5), left.depth(), left.taken()), (None, 0, 2));
        assert_eq!(left.len(), 5);
    }

    #[test]
    fn an_area_that_is_not_named_any_more_is_counted_only() {
        let one = Stash::empty(1).with(7, 1, 1).unwrap();
        assert_eq!(first(one.without(8, 3), 1), Some(7));
        assert_eq!(one.without(8, 3).taken(), 1);
        let none = one.cleared();
        assert_eq!(
            (none.without(7, 3).depth(), none.without(7, 3).taken()),
            (0, 1)
        );
    }

    /// Each stash has its own names, as many as it ever names areas of any length.
    #[test]
    fn rows_have_room_for_all_names() {
        let mut ends = [0; STASHES];
        for len in 1..=MAX_LEN {
            let (mut stash, mut depth) = (Stash::empty(len), 0);
            while let Some(more) = stash.with(2, len, MOST_GRANULES) {
                (stash, depth) = (more, depth + 1);
            }
            let offset = Stash::table_offset(len);
            let end = Stash::name_offset(offset, depth) + size_of::<u32>();
            let place = offset / size_of::<u64>();
            ends[place] = ends[place].max(end);
        }
        let mut start = 0;
        for (place, end) in ends.into_iter().enumerate() {
            let offset = place * size_of::<u64>();
            assert_eq!(Stash::name_offset(offset, 1), start, "{place}");
            start = Stash::name_offset((offset + size_of::<u64>()) % BYTES, 1);
            let most = if start == 0 { ROWS_BYTES } else { start };
            assert!(end <= most, "{place}: {end} of {most}");
        }
    }

    #[test]
    fn what_it_can_hold_and_count_is_bounded() {
        let mut stash = Stash::empty(MAX_LEN);
        let mut depth = 0;
        while let Some(more) = stash.with(1, MAX_LEN, u32::MAX) {
            stash = more;
            depth += 1;
        }
        assert_eq!((depth, stash.depth(), stash.len()), (1023, 1023, MAX_LEN));
        for _ in 0..TAKEN_MAX {
            assert!(first(stash, MAX_LEN).is_some());
            stash = stash.without(2, 0);
        }
        assert_eq!((first(stash, MAX_LEN), stash.taken()), (None, TAKEN_MAX));
    }
}
