//! The per-CPU caches in front of the allocator: what they hold, and who works on them.
//!
//! Every unit has a table of *runs*. A run is up to 32 areas of one class (length and alignment), one behind the other, that
//! one CPU hands out and takes back: a pair of words ([`slots`](crate::this_cpu::slots)) whose first says which areas are
//! free, and whose second, the `Run`, where they lie. The CPU changes the first by one step of its own, without a lock
//! and without a LOCKed instruction. To the rest of the allocator all of them are live areas.
//!
//! Who frees an area must learn whether it belongs to a run, and whose: `Cells` tell by its address. The owner puts it
//! back into the run. Any other CPU marks it as freed where all areas have their marks, and the run gets it back, or the
//! chunk, when the run is used up.

use crate::this_cpu::Pair;
use crate::unit::{CpuId, GRANULE_BYTES};

pub use locked_seat::LockedSeat;
pub use seat::{Here, Seat};

pub(crate) use cells::{Cells, CellsLayout, Look};
pub(crate) use key::{CacheKey, ClassLimit};
pub(crate) use stash::{First, MOST_GRANULES, OWN_PLACES, ROWS_BYTES, Stash};

mod cells;
mod key;
mod locked_seat;
mod seat;
mod stash;

/// Areas of a run.
pub(crate) const MAX_SLOTS: u32 = 32;

/// Runs that a CPU has at a time.
pub(crate) const RUNS: usize = if cfg!(all(loom, test)) { 2 } else { 64 };

/// Where in a unit's table its stashes are, in bytes: behind its runs.
pub(crate) const STASHES_AT: usize = RUNS * size_of::<Pair>();

/// Where in a unit's table is what its runs were like when they were looked at last, a word of 32 bits for each.
pub(crate) const STAMPS_AT: usize = STASHES_AT + stash::BYTES;

/// Bytes of a unit's table: whole windows of [`Cells`], so that runs behind it have theirs for themselves.
pub(crate) const TABLE_BYTES: usize =
    (STAMPS_AT + RUNS * size_of::<u32>()).next_multiple_of(cells::WINDOW_BYTES);

// The fields of a run's second word: where each begins, and how wide it is.
const BASE: (u32, u32) = (0, 28);
const LEN: (u32, u32) = (28, 10);
const ALIGN: (u32, u32) = (38, 4);
const LAST: (u32, u32) = (42, 5);
const CPU: (u32, u32) = (47, 13);
/// In a [`Cells`] entry: another CPU has freed an area of the run since it was collected last.
const IS_FOREIGN: u64 = 1 << 60;
/// Other CPUs free areas of the run: nobody puts any back, all are marked.
const IS_SHARED: u64 = 1 << 61;
/// There is no run: only the CPU is told.
const IS_CLOSED: u64 = 1 << 62;

#[inline]
const fn field(word: u64, (at, width): (u32, u32)) -> u32 {
    (word >> at) as u32 & ((1 << width) - 1)
}

const fn field_mask((at, width): (u32, u32)) -> u64 {
    ((1 << width) - 1) << at
}

/// Granules that runs can lie in, from the first chunk on: 1 GiB.
pub(crate) const REACH_GRANULES: usize = 1 << BASE.1;

/// The longest area that runs are made of, in granules.
pub(crate) const MAX_LEN: u32 = (1 << LEN.1) - 1;

/// Length and alignment of areas, as they stand in a run's second word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Class(u64);

impl Class {
    /// The bits of a run's second word that are its class.
    pub(crate) const MASK: u64 = field_mask(LEN) | field_mask(ALIGN) | IS_CLOSED;

    /// The class that serves a request; `None` if runs do not.
    ///
    /// Areas of a run lie one behind the other: their length is a multiple of the alignment, which may be more than was asked for by a
    /// third. Areas of an even length are aligned to 8 bytes, asked or not, so that requests that differ in that only share a run.
    #[inline]
    pub(crate) const fn of(bytes: usize, align: usize) -> Option<Self> {
        let len = bytes.wrapping_add(GRANULE_BYTES - 1) / GRANULE_BYTES;
        if len.wrapping_sub(1) >= MAX_LEN as usize {
            return None;
        }
        let (len, align_shift) = match align {
            // 1, 2, 4; 8 if the length is even.
            align if align < 16 && 0x0116 >> align & 1 != 0 && align >> 3 & len == 0 => {
                (len, !len & 1)
            }
            align => {
                let align_len = align / GRANULE_BYTES;
                if !align.is_power_of_two() || align_len > MAX_LEN as usize {
                    return None;
                }
                let padded = len.next_multiple_of(align_len);
                if padded > MAX_LEN as usize || padded - len > len / 3 {
                    return None;
                }
                (padded, align_len.trailing_zeros() as usize)
            }
        };
        Some(Self(
            (len as u64) << LEN.0 | (align_shift as u64) << ALIGN.0,
        ))
    }

    #[inline]
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    /// In granules.
    #[inline]
    pub(crate) const fn len(self) -> u32 {
        field(self.0, LEN)
    }

    /// In granules.
    #[inline]
    pub(crate) const fn align(self) -> u32 {
        1 << field(self.0, ALIGN)
    }

    /// Where in a CPU's table its run is, in bytes: small ones have a place each, the others share.
    #[inline]
    pub(crate) const fn table_offset(self) -> usize {
        let (len, align_shift) = (self.len() as usize, field(self.0, ALIGN));
        let place = if align_shift > 1 {
            // Of one length, those that are aligned more lie elsewhere.
            OWN_RUNS | (PLACES[len] as usize + align_shift as usize)
        } else if len <= OWN_RUNS {
            // As the table says.
            len.wrapping_sub(1)
        } else {
            PLACES[len] as usize
        };
        place % RUNS * size_of::<Pair>()
    }
}

/// Lengths of runs that have a place of their own.
const OWN_RUNS: usize = RUNS / 2;

/// The place of a length in a CPU's table.
static PLACES: [u8; 1 << LEN.1] = places(RUNS);

/// A place for every length: the first half of them are for the smallest ones, each for one, the others are shared.
const fn places(count: usize) -> [u8; 1 << LEN.1] {
    let mut table = [0; 1 << LEN.1];
    let own = count / 2;
    let mut len = 1;
    while len < table.len() {
        let hash = (len as u32).wrapping_mul(0x9e37_79b1);
        let hash = (hash as u64 * own as u64) >> u32::BITS;
        table[len] = match len <= own {
            true => len - 1,
            false => own + hash as usize,
        } as u8;
        len += 1;
    }
    table
}

/// The second word of a pair: where a run's areas lie, or that there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run(u64);

impl Run {
    /// No run, on `cpu`; `None` for a CPU that has none ever.
    pub(crate) fn closed(cpu: CpuId) -> Option<Self> {
        let has_runs = cpu.get() < 1 << CPU.1;
        has_runs.then(|| Self(u64::from(cpu.get()) << CPU.0 | IS_CLOSED))
    }

    /// `slots` areas of a class from the granule `base` on, for the CPU of `closed`.
    pub(crate) fn open(closed: Self, class: Class, base: u32, slots: u32) -> Self {
        debug_assert!((1..=MAX_SLOTS).contains(&slots) && (base as usize) < REACH_GRANULES);
        Self(
            closed.0 & field_mask(CPU)
                | class.bits()
                | u64::from(base) << BASE.0
                | u64::from(slots - 1) << LAST.0,
        )
    }

    #[inline]
    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    #[inline]
    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    /// Whether there is a run.
    #[inline]
    pub(crate) fn is_open(self) -> bool {
        self.0 & field_mask(LEN) != 0
    }

    #[inline]
    pub(crate) fn class(self) -> Class {
        Class(self.0 & Class::MASK)
    }

    /// Where the first area lies.
    #[inline]
    pub(crate) fn base(self) -> u32 {
        field(self.0, BASE)
    }

    /// How many areas there are.
    #[inline]
    pub(crate) fn slots(self) -> u32 {
        field(self.0, LAST) + 1
    }

    /// The CPU whose it is.
    #[inline]
    pub(crate) fn cpu(self) -> CpuId {
        CpuId::new(field(self.0, CPU))
    }

    /// Whether its areas are freed by marks only, for other CPUs free them too.
    #[inline]
    pub(crate) fn is_shared(self) -> bool {
        self.0 & IS_SHARED != 0
    }

    /// Whether another CPU has freed an area of it since it was collected last.
    #[inline]
    pub(crate) fn is_foreign(self) -> bool {
        self.0 & IS_FOREIGN != 0
    }

    /// Whether `bits` name the same run, as much shared, whatever they say of areas that others have freed.
    #[inline]
    pub(crate) fn is_but_for_foreign(self, bits: u64) -> bool {
        (self.0 ^ bits) & !IS_FOREIGN == 0
    }

    /// The same run, shared.
    pub(crate) fn shared(self) -> Self {
        Self(self.unshared().0 | IS_SHARED)
    }

    /// The same run, shared, and another CPU has just freed an area of it.
    pub(crate) fn foreign(self) -> Self {
        Self(self.0 | IS_SHARED | IS_FOREIGN)
    }

    /// The same run as it was opened.
    #[inline]
    pub(crate) fn unshared(self) -> Self {
        Self(self.0 & !(IS_SHARED | IS_FOREIGN))
    }

    /// Where area `slot` starts.
    #[inline]
    pub(crate) fn start(self, slot: u32) -> u32 {
        self.base() + slot * self.class().len()
    }

    /// The area that starts at `granule`, if it is one of the run's.
    #[inline]
    pub(crate) fn slot_at(self, granule: u32) -> Option<u32> {
        let len = self.class().len();
        debug_assert!(len > 0, "of an open run");
        self.slot_by(granule, RECIPROCALS[len as usize])
    }

    /// [`slot_at`](Self::slot_at) with the reciprocal of the run's length; `None` perhaps if it is that of another.
    #[inline(always)]
    fn slot_by(self, granule: u32, reciprocal: u32) -> Option<u32> {
        let from_base = granule.wrapping_sub(self.base());
        // Right for every start of a slot. What comes out for others is none that starts there.
        let slot = from_base.wrapping_mul(reciprocal) >> RECIPROCAL_SHIFT;
        let is_start = slot.wrapping_mul(self.class().len()) == from_base;
        (is_start && slot < self.slots()).then_some(slot)
    }
}

/// How whoever puts an area of a run back finds the slot and the pair, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Guide(u32);

impl Guide {
    /// A reciprocal is 2^16 at most.
    const PAIR_AT: u32 = RECIPROCAL_SHIFT + 1;

    fn of(run: Run) -> Self {
        const { assert!(TABLE_BYTES <= 1 << (u32::BITS - Self::PAIR_AT)) };
        let class = run.class();
        let pair_at = class.table_offset() as u32;
        Self(pair_at << Self::PAIR_AT | RECIPROCALS[class.len() as usize])
    }

    #[inline]
    fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    fn bits(self) -> u32 {
        self.0
    }

    /// Of the run's length.
    #[inline]
    fn reciprocal(self) -> u32 {
        self.0 & ((1 << Self::PAIR_AT) - 1)
    }

    /// Where the run's pair is in its CPU's table, in bytes.
    #[inline]
    fn pair_at(self) -> usize {
        (self.0 >> Self::PAIR_AT) as usize
    }
}

/// By how much what a reciprocal was multiplied by is shifted.
const RECIPROCAL_SHIFT: u32 = 16;

/// 2^16 / len, rounded up: `from_base` is less than 2^15 where it counts, so that the error stays below 1, and nothing overflows.
static RECIPROCALS: [u32; 1 << LEN.1] = {
    let mut table = [0; 1 << LEN.1];
    let mut len = 1;
    while len < table.len() {
        table[len] = (1_u32 << RECIPROCAL_SHIFT).div_ceil(len as u32);
        len += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_of_a_run_are_told_by_their_address() {
        let closed = Run::closed(CpuId::new(8191)).unwrap();
        assert!(!closed.is_open());
        for len in 1..=MAX_LEN {
            let class = Class((u64::from(len)) << LEN.0);
            for (base, slots) in [(0, 32), (12345, 7), ((1 << 28) - 32 * len, 32)] {
                let run = Run::open(closed, class, base, slots);
                assert_eq!((run.base(), run.slots(), run.class()), (base, slots, class));
                assert_eq!(run.cpu(), CpuId::new(8191));
                assert!(run.is_open());
                for slot in 0..slots {
                    assert_eq!(run.slot_at(run.start(slot)), Some(slot));
                    if len > 1 {
                        assert_eq!(run.slot_at(run.start(slot) + 1), None);
                        assert_eq!(run.slot_at(run.start(slot) + len - 1), None);
                    }
                }
                assert_eq!(run.slot_at(base.wrapping_sub(1)), None);
                assert_eq!(run.slot_at(run.start(slots)), None);
                assert_eq!(run.slot_at(run.start(slots) + 40 * len), None);
            }
        }
    }

    #[test]
    fn lengths_have_places() {
        for count in [2, 4, 32, 64] {
            let table = places(count);
            let (own, shared) = table[1..].split_at(count / 2);
            assert!((0..).zip(own).all(|(at, &place)| place == at));
            for place in count / 2..count {
                let lens = shared.iter().filter(|&&at| usize::from(at) == place);
                let share = shared.len() / (count - count / 2);
                assert!(lens.count() * 2 >= share, "{place} of {count}");
            }
            assert!(
                shared
                    .iter()
                    .all(|&at| (count / 2..count).contains(&at.into()))
            );
        }
    }

    /// A guide may be that of another run: it leads to the right slot, or to none.
    #[test]
    fn another_runs_guide_leads_nowhere_else() {
        let closed = Run::closed(CpuId::new(3)).unwrap();
        let lens = (1..=40).chain((41..=MAX_LEN).step_by(61)).chain([MAX_LEN]);
        for len in lens.clone() {
            let class = Class(u64::from(len) << LEN.0);
            let run = Run::open(closed, class, 64, 32);
            let own = Guide::of(run);
            assert_eq!(own.pair_at(), class.table_offset());
            for granule in 0..64 + 33 * len {
                let slot = run.slot_at(granule);
                assert_eq!(run.slot_by(granule, own.reciprocal()), slot);
                for other in lens.clone() {
                    let found = run.slot_by(granule, RECIPROCALS[other as usize]);
                    assert!(found.is_none() || found == slot, "{len} {other} {granule}");
                }
            }
        }
    }

    #[test]
    fn requests_have_the_class_that_serves_them() {
        let class = Class::of;
        for (bytes, align, len, aligned) in [
            (1, 1, 1, 1),
            (4, 4, 1, 1),
            (5, 1, 2, 2),
            (8, 8, 2, 2),
            (12, 4, 3, 1),
            (12, 8, 4, 2),
            (9, 8, 4, 2),
            (40, 16, 12, 4),
            (92, 32, 24, 8),
            (16, 4, 4, 2),
            (16, 8, 4, 2),
            (16, 16, 4, 4),
            (128, 64, 32, 16),
            (4092, 4, 1023, 1),
        ] {
            let class = class(bytes, align).unwrap();
            assert_eq!((class.len(), class.align()), (len, aligned));
            assert!(class.table_offset() < TABLE_BYTES);
        }
        for (bytes, align) in [
            (0, 8),
            (4, 8),
            (20, 16),
            (4092, 8),
            (4096, 8),
            (usize::MAX, 8),
            (8, 16),
            (8, 3),
            (176, 128),
            (4000, 4096),
            (8, 1 << 63),
        ] {
            assert_eq!(class(bytes, align), None, "{bytes} {align}");
        }
    }
}
