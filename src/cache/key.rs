//! What serves a request is worked out when the request is made, and what an instance serves when that is set up: so one comparison
//! tells whether an instance's caches serve a request.

use super::{ALIGN, Class, LEN, MAX_LEN, Stash, TABLE_BYTES, field_mask};
use crate::request::AllocFlags;
use crate::unit::GRANULE_BYTES;

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
    /// The same in bytes.
    len_bytes: u16,
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
        len_bytes: 0,
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
                len_bytes: (class.len() as usize * GRANULE_BYTES) as u16,
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

    #[inline]
    pub(crate) fn len_bytes(self) -> usize {
        self.len_bytes.into()
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

#[cfg(test)]
mod tests {
    use super::super::{OWN_PLACES, OWN_RUNS, PLACES, RUNS};
    use super::*;
    use crate::this_cpu::Pair;

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
                let Some(class) = key.class().filter(|class| class.len() == len) else {
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
}
