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

use core::marker::PhantomData;

use crate::alloc_api::Domain;
use crate::request::AllocFlags;
use crate::sync::AtomicU32;
use crate::this_cpu::{Change, FenceError, LocalOps, Pair, Put, RemotePairs};
use crate::unit::{CpuId, GRANULE_BYTES};

pub use locked_seat::LockedSeat;

pub(crate) use cells::{Cells, CellsLayout};
pub(crate) use stash::{OWN_PLACES, Stash};

mod cells;
mod locked_seat;
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
    /// Areas of a run lie one behind the other: the length must be a multiple of the alignment. Areas of an even length
    /// are aligned to 8 bytes, asked or not, so that requests that differ in that only share a run.
    #[inline]
    pub(crate) const fn of(bytes: usize, align: usize) -> Option<Self> {
        let len = bytes.wrapping_add(GRANULE_BYTES - 1) / GRANULE_BYTES;
        if len.wrapping_sub(1) >= MAX_LEN as usize {
            return None;
        }
        let align_shift = match align {
            // 1, 2, 4; 8 if the length is even.
            align if align < 16 && 0x0116 >> align & 1 != 0 && align >> 3 & len == 0 => !len & 1,
            align => {
                let is_possible =
                    align.is_power_of_two() && (len * GRANULE_BYTES) & (align - 1) == 0;
                if !is_possible {
                    return None;
                }
                (align / GRANULE_BYTES).trailing_zeros() as usize
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

/// What a request is served by in a CPU's cache: its class, and where in the CPU's table the run and the stash are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CacheKey {
    /// The class; 0 if caches do not serve the request.
    class: u64,
    /// Offset of the run in a CPU's table, in bytes.
    run_at: u16,
    /// Offset of the stash among the stashes, in bytes.
    stash_at: u16,
    /// The class's length, in granules.
    len: u16,
    /// Bits that are clear in the granules that areas of the class start at.
    misaligned: u16,
}

impl CacheKey {
    /// Of a request that caches do not serve.
    const NONE: Self = Self {
        class: 0,
        run_at: 0,
        stash_at: 0,
        len: 0,
        misaligned: 0,
    };

    #[inline]
    pub(crate) const fn of(bytes: usize, align: usize, flags: AllocFlags) -> Self {
        const { assert!(TABLE_BYTES <= u16::MAX as usize) };
        let usual = AllocFlags::ATOMIC
            .union(AllocFlags::NO_ZERO)
            .union(AllocFlags::TRY);
        match Class::of(bytes, align) {
            Some(class) if usual.contains(flags) => Self {
                class: class.0,
                run_at: class.table_offset() as u16,
                stash_at: Stash::table_offset(class.len()) as u16,
                len: class.len() as u16,
                misaligned: (class.align() - 1) as u16,
            },
            _ => Self::NONE,
        }
    }

    /// The class, if caches serve the request.
    #[inline]
    pub(crate) fn class(self) -> Option<Class> {
        (self.class != 0).then_some(Class(self.class))
    }

    /// The class, if caches serve the request and it is within `limit`.
    #[inline]
    pub(crate) fn class_within(self, limit: ClassLimit) -> Option<Class> {
        (self.class.wrapping_sub(1) < limit.0).then_some(Class(self.class))
    }

    #[inline]
    pub(crate) fn run_at(self) -> usize {
        self.run_at.into()
    }

    #[inline]
    pub(crate) fn stash_at(self) -> usize {
        self.stash_at.into()
    }

    /// In granules.
    #[inline]
    pub(crate) fn len(self) -> u32 {
        self.len.into()
    }

    /// Whether an area of the class may start at `granule`.
    #[inline]
    pub(crate) fn is_aligned(self, granule: u32) -> bool {
        granule & u32::from(self.misaligned) == 0
    }
}

/// What classes are sure to be within the limits of an instance: those whose word is no higher, 0 if none is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClassLimit(u64);

impl ClassLimit {
    /// None is.
    pub(crate) const NONE: Self = Self(0);

    #[inline]
    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    /// Of an instance that serves so many bytes, and such alignments.
    pub(crate) fn new(max_bytes: usize, max_align_bytes: usize) -> Self {
        let longest = MAX_LEN as usize * GRANULE_BYTES;
        // The alignment stands above the length.
        const { assert!(ALIGN.0 == LEN.0 + LEN.1) };
        match max_align_bytes / GRANULE_BYTES {
            1.. if max_bytes >= longest => {
                let most_shift = (1 << ALIGN.1) - 1;
                let shift = (max_align_bytes / GRANULE_BYTES).ilog2().min(most_shift);
                Self(u64::from(shift) << ALIGN.0 | field_mask(LEN))
            }
            _ => Self::NONE,
        }
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
        let from_base = granule.wrapping_sub(self.base());
        if from_base >= len * MAX_SLOTS {
            return None;
        }
        // Right where the quotient is whole, and never too high.
        let scaled = u64::from(from_base) * u64::from(RECIPROCALS[len as usize]);
        let slot = (scaled >> 31) as u32;
        (slot * len == from_base && slot < self.slots()).then_some(slot)
    }
}

/// 2^31 / len, rounded up: `from_base` is less than 2^15, so that the error stays below 1.
static RECIPROCALS: [u32; 1 << LEN.1] = {
    let mut table = [0; 1 << LEN.1];
    let mut len = 1;
    while len < table.len() {
        table[len] = (1_u32 << 31).div_ceil(len as u32);
        len += 1;
    }
    table
};

/// Who works on the runs of the CPU that it is on.
///
/// A [`Domain`] has such operations ([`LocalOps`]), and [`Domain::allocate`] and [`Domain::free`] use them. For an instance
/// that is no domain's, who plays its CPUs implements them.
///
/// # Safety
/// Each is what the operation of that name of [`LocalOps`] is, on the pairs of one instance, and nothing changes these
/// pairs in another way.
pub unsafe trait Seat {
    /// The CPU, or the one that the caller was on a moment ago.
    fn cpu(&self) -> CpuId;

    /// [`LocalOps::take_slot`].
    ///
    /// # Safety
    /// As there.
    unsafe fn take_slot(
        &self,
        at: usize,
        class: u64,
        class_mask: u64,
        gate: &AtomicU32,
    ) -> Option<Pair>;

    /// [`LocalOps::put_slot`].
    ///
    /// # Safety
    /// As there.
    unsafe fn put_slot(&self, at: usize, run: u64, slot: u64, gate: &AtomicU32) -> Put;

    /// [`LocalOps::replace_pair_gated`].
    ///
    /// # Safety
    /// As there.
    unsafe fn replace_pair_gated(&self, at: usize, old: Pair, new: Pair, gate: &AtomicU32) -> bool;

    /// [`LocalOps::peek_pair`].
    ///
    /// # Safety
    /// As there.
    unsafe fn peek_pair(&self, at: usize) -> Option<Pair>;

    /// [`LocalOps::peek_word`].
    ///
    /// # Safety
    /// As there.
    unsafe fn peek_word(&self, at: usize) -> Option<u64>;

    /// [`LocalOps::replace_word`].
    ///
    /// # Safety
    /// As there.
    unsafe fn replace_word(&self, at: usize, old: u64, new: u64) -> bool;

    /// [`LocalOps::read`] of a word of 32 bits; whatever is there may be the result.
    ///
    /// # Safety
    /// As there.
    unsafe fn read_link(&self, at: usize) -> u32;

    /// Sets a word of 32 bits, as [`LocalOps::change`] does.
    ///
    /// # Safety
    /// As there.
    unsafe fn write_link(&self, at: usize, link: u32);

    /// [`LocalOps::remote_pairs`].
    fn remote_pairs(&self) -> RemotePairs;

    /// [`LocalOps::replace_remote_pair`].
    ///
    /// # Safety
    /// As there.
    unsafe fn replace_remote_pair(&self, copy: *mut Pair, old: Pair, new: Pair) -> bool;

    /// [`LocalOps::wait_for_gated`].
    ///
    /// # Errors
    /// As there.
    fn wait_for_gated(&self) -> Result<(), FenceError>;
}

/// The CPU that the caller is on, in a domain.
#[derive(Debug, Clone, Copy)]
pub struct Here<D>(PhantomData<D>);

impl<D> Here<D> {
    /// Here.
    ///
    /// # Safety
    /// It is used with the instance of the domain, and no other.
    #[inline]
    pub const unsafe fn new() -> Self {
        Self(PhantomData)
    }
}

// SAFETY: these are the domain's operations, and nothing works on the copies of a domain in another way.
unsafe impl<D: Domain> Seat for Here<D> {
    fn cpu(&self) -> CpuId {
        D::current_cpu()
    }

    #[inline(always)]
    unsafe fn take_slot(
        &self,
        at: usize,
        class: u64,
        class_mask: u64,
        gate: &AtomicU32,
    ) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::take_slot(at, class, class_mask, gate) }
    }

    #[inline(always)]
    unsafe fn put_slot(&self, at: usize, run: u64, slot: u64, gate: &AtomicU32) -> Put {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::put_slot(at, run, slot, gate) }
    }

    unsafe fn replace_pair_gated(&self, at: usize, old: Pair, new: Pair, gate: &AtomicU32) -> bool {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::replace_pair_gated(at, old, new, gate) }
    }

    unsafe fn peek_pair(&self, at: usize) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::peek_pair(at) }
    }

    #[inline(always)]
    unsafe fn peek_word(&self, at: usize) -> Option<u64> {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::peek_word(at) }
    }

    #[inline(always)]
    unsafe fn replace_word(&self, at: usize, old: u64, new: u64) -> bool {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::replace_word(at, old, new) }
    }

    #[inline(always)]
    unsafe fn read_link(&self, at: usize) -> u32 {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::read(at) }
    }

    #[inline(always)]
    unsafe fn write_link(&self, at: usize, link: u32) {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::change(at, Change::Set(link)) }
    }

    fn remote_pairs(&self) -> RemotePairs {
        D::Ops::remote_pairs()
    }

    unsafe fn replace_remote_pair(&self, copy: *mut Pair, old: Pair, new: Pair) -> bool {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::replace_remote_pair(copy, old, new) }
    }

    fn wait_for_gated(&self) -> Result<(), FenceError> {
        D::Ops::wait_for_gated()
    }
}

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

    /// A class within the limit is one that the instance serves, whatever was asked for; without limits of note all are.
    #[test]
    fn what_is_within_the_limit_is_served() {
        let none = AllocFlags::empty();
        for (max_bytes, max_align) in [(1, 1), (6, 4), (4092, 1), (4092, 2), (4092, 4), (5000, 8)]
            .into_iter()
            .chain((4..20).map(|shift| (32 << 10, 1 << shift)))
        {
            let limit = ClassLimit::new(max_bytes, max_align);
            let mut within = 0;
            for bytes in 0..4200 {
                for align in [0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 512, 1024, 2048, 4096] {
                    let key = CacheKey::of(bytes, align, none);
                    assert_eq!(key.class(), Class::of(bytes, align));
                    if let Some(class) = key.class_within(limit) {
                        assert!(bytes <= max_bytes && align <= max_align);
                        assert_eq!(Some(class), key.class());
                        within += 1;
                    } else if max_bytes >= 4092 && max_align >= 2048 {
                        assert_eq!(key.class(), None);
                    }
                }
            }
            assert_eq!(within > 0, max_bytes >= 4092 && max_align >= 4);
        }
        assert_eq!(CacheKey::of(8, 8, AllocFlags::RESERVED), CacheKey::NONE);
        assert_eq!(CacheKey::of(8, 8, AllocFlags::NO_WARN), CacheKey::NONE);
    }

    /// What a key says is what its class says.
    #[test]
    fn keys_lead_to_the_places_of_their_classes() {
        for len in 1..=MAX_LEN {
            for align_shift in 0..=9 {
                let (bytes, align) = (len as usize * GRANULE_BYTES, GRANULE_BYTES << align_shift);
                let key = CacheKey::of(bytes, align, AllocFlags::TRY);
                let Some(class) = key.class() else {
                    continue;
                };
                assert_eq!((key.len(), key.run_at()), (len, class.table_offset()));
                assert_eq!(key.stash_at(), Stash::table_offset(len));
                assert!((0..64).all(|at| key.is_aligned(at) == (at % class.align() == 0)));
                let table_place = match align_shift {
                    0 | 1 => PLACES[len as usize] as usize,
                    more => OWN_RUNS | (PLACES[len as usize] as usize + more),
                };
                assert_eq!(key.run_at() / size_of::<Pair>(), table_place % RUNS);
            }
            if len <= OWN_PLACES {
                assert_eq!(Stash::own_offset(len), Stash::table_offset(len));
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
        for (bytes, align) in [(0, 8), (4096, 8), (usize::MAX, 8), (12, 8), (8, 16), (8, 3)] {
            assert_eq!(class(bytes, align), None, "{bytes} {align}");
        }
    }
}
