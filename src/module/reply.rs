//! How an answer goes from one copy of this crate to another: errors as numbers.
//!
//! A code of 0 is a success, and its first word the result. Every error has a code and at most two words.

use crate::allocator::Region;
use crate::backing::BackingError;
use crate::request::{AllocError, CpuError, FreeError};
use crate::unit::CpuId;

use super::error::AttachError;

/// The answer of a C function of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Reply {
    code: u32,
    words: [usize; 2],
}

/// What travels as a [`Reply`].
pub(super) trait Answer: Sized {
    /// The code, not 0, and the words.
    fn encode(self) -> (u32, [usize; 2]);
    /// What [`encode`](Self::encode) made these of; `None` if it makes no such code.
    fn decode(code: u32, words: [usize; 2]) -> Option<Self>;
}

impl Reply {
    pub(super) fn new<E: Answer>(result: Result<usize, E>) -> Self {
        let (code, words) = match result {
            Ok(word) => (0, [word, 0]),
            Err(error) => error.encode(),
        };
        Self { code, words }
    }

    /// # Panics
    /// If the other side answers what no version of the table has.
    pub(super) fn result<E: Answer>(self) -> Result<usize, E> {
        if self.code == 0 {
            return Ok(self.words[0]);
        }
        match E::decode(self.code, self.words) {
            Some(error) => Err(error),
            None => panic!("the host or module answers {self:?}, which means nothing"),
        }
    }
}

fn backing_code(error: BackingError) -> usize {
    match error {
        BackingError::OutOfFrames => 0,
        BackingError::OutOfAddressSpace => 1,
        BackingError::OutOfMetadata => 2,
        BackingError::WouldSleep => 3,
    }
}

fn backing_error(code: usize) -> Option<BackingError> {
    use BackingError::{OutOfAddressSpace, OutOfFrames, OutOfMetadata, WouldSleep};
    [OutOfFrames, OutOfAddressSpace, OutOfMetadata, WouldSleep]
        .get(code)
        .copied()
}

impl Answer for AllocError {
    fn encode(self) -> (u32, [usize; 2]) {
        match self {
            Self::ZeroSize => (1, [0; 2]),
            Self::TooLarge { bytes, limit_bytes } => (2, [bytes, limit_bytes]),
            Self::AlignNotPowerOfTwo { align } => (3, [align, 0]),
            Self::AlignTooLarge { align, limit } => (4, [align, limit]),
            Self::UnknownFlags { bits } => (5, [bits as usize, 0]),
            Self::ReservedExhausted { bytes, free_bytes } => (6, [bytes, free_bytes]),
            Self::Backing(error) => (7, [backing_code(error), 0]),
            Self::Busy => (8, [0; 2]),
        }
    }

    fn decode(code: u32, [first, second]: [usize; 2]) -> Option<Self> {
        Some(match code {
            1 => Self::ZeroSize,
            2 => Self::TooLarge {
                bytes: first,
                limit_bytes: second,
            },
            3 => Self::AlignNotPowerOfTwo { align: first },
            4 => Self::AlignTooLarge {
                align: first,
                limit: second,
            },
            5 => Self::UnknownFlags { bits: first as u32 },
            6 => Self::ReservedExhausted {
                bytes: first,
                free_bytes: second,
            },
            7 => Self::Backing(backing_error(first)?),
            8 => Self::Busy,
            _ => return None,
        })
    }
}

impl Answer for FreeError {
    fn encode(self) -> (u32, [usize; 2]) {
        match self {
            Self::Foreign { address } => (1, [address, 0]),
            Self::Misaligned { address } => (2, [address, 0]),
            Self::Static { address } => (3, [address, 0]),
            Self::Reserved { address } => (4, [address, 0]),
            Self::NotReserved { address } => (5, [address, 0]),
            Self::NotAllocated { address } => (6, [address, 0]),
            Self::Interior { address, start } => (7, [address, start]),
            Self::UnknownFlags { bits } => (8, [bits as usize, 0]),
            Self::Busy => (9, [0; 2]),
        }
    }

    fn decode(code: u32, [address, start]: [usize; 2]) -> Option<Self> {
        Some(match code {
            1 => Self::Foreign { address },
            2 => Self::Misaligned { address },
            3 => Self::Static { address },
            4 => Self::Reserved { address },
            5 => Self::NotReserved { address },
            6 => Self::NotAllocated { address },
            7 => Self::Interior { address, start },
            8 => Self::UnknownFlags {
                bits: address as u32,
            },
            9 => Self::Busy,
            _ => return None,
        })
    }
}

impl Answer for CpuError {
    fn encode(self) -> (u32, [usize; 2]) {
        match self {
            Self::NotPossible { cpu, nr_cpu_ids } => (1, [cpu.index(), nr_cpu_ids as usize]),
            Self::NoMemory { cpu, error } => (2, [cpu.index(), backing_code(error)]),
        }
    }

    fn decode(code: u32, [first, second]: [usize; 2]) -> Option<Self> {
        let cpu = CpuId::new(first as u32);
        Some(match code {
            1 => Self::NotPossible {
                cpu,
                nr_cpu_ids: second as u32,
            },
            2 => Self::NoMemory {
                cpu,
                error: backing_error(second)?,
            },
            _ => return None,
        })
    }
}

/// What a module itself can have against being attached.
impl Answer for AttachError {
    fn encode(self) -> (u32, [usize; 2]) {
        match self {
            Self::Abi { theirs, ours } => (1, [theirs as usize, ours as usize]),
            Self::Window {
                module_bytes,
                host_bytes,
            } => (2, [module_bytes, host_bytes]),
            Self::NotPinned => (3, [0; 2]),
            Self::AttachedElsewhere => (4, [0; 2]),
            Self::ReservedExhausted { .. } | Self::Alloc(_) | Self::NoMemory(_) | Self::NoHost => {
                unreachable!("only a host says so")
            }
        }
    }

    fn decode(code: u32, [first, second]: [usize; 2]) -> Option<Self> {
        Some(match code {
            1 => Self::Abi {
                theirs: first as u32,
                ours: second as u32,
            },
            2 => Self::Window {
                module_bytes: first,
                host_bytes: second,
            },
            3 => Self::NotPinned,
            4 => Self::AttachedElsewhere,
            _ => return None,
        })
    }
}

/// A region, or none, as the word of a success.
pub(super) fn region_word(region: Option<Region>) -> usize {
    match region {
        None => 0,
        Some(Region::Static) => 1,
        Some(Region::Reserved) => 2,
        Some(Region::Dynamic) => 3,
    }
}

pub(super) fn region_of_word(word: usize) -> Option<Region> {
    match word {
        1 => Some(Region::Static),
        2 => Some(Region::Reserved),
        3 => Some(Region::Dynamic),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use core::fmt::Debug;
    use std::collections::HashSet;
    use std::vec;

    use super::*;

    /// Every error comes back as it was, by a code of its own.
    fn assert_round_trip<E: Answer + Debug + Copy + PartialEq>(errors: &[E]) {
        let mut codes = HashSet::new();
        for &error in errors {
            let reply = Reply::new(Err(error));
            assert_eq!(reply.result(), Err(error));
            assert!(
                reply.code != 0 && codes.insert((reply.code, reply.words)),
                "{reply:?}"
            );
        }
        assert_eq!(Reply::new::<E>(Ok(77)).result::<E>(), Ok(77));
        assert!(E::decode(99, [0; 2]).is_none());
    }

    #[test]
    fn errors_travel_whole() {
        let backing = [
            BackingError::OutOfFrames,
            BackingError::OutOfAddressSpace,
            BackingError::OutOfMetadata,
            BackingError::WouldSleep,
        ];
        let mut alloc = vec![
            AllocError::ZeroSize,
            AllocError::TooLarge {
                bytes: usize::MAX,
                limit_bytes: 32768,
            },
            AllocError::AlignNotPowerOfTwo { align: 3 },
            AllocError::AlignTooLarge {
                align: 8192,
                limit: 4096,
            },
            AllocError::UnknownFlags { bits: 1 << 31 },
            AllocError::ReservedExhausted {
                bytes: 9000,
                free_bytes: 8192,
            },
            AllocError::Busy,
        ];
        alloc.extend(backing.map(AllocError::Backing));
        assert_round_trip(&alloc);

        let address = usize::MAX - 3;
        assert_round_trip(&[
            FreeError::Foreign { address },
            FreeError::Misaligned { address },
            FreeError::Static { address },
            FreeError::Reserved { address },
            FreeError::NotReserved { address },
            FreeError::NotAllocated { address },
            FreeError::Interior { address, start: 4 },
            FreeError::UnknownFlags { bits: u32::MAX },
            FreeError::Busy,
        ]);

        let cpu = CpuId::new(8191);
        let mut of_cpu = vec![CpuError::NotPossible { cpu, nr_cpu_ids: 3 }];
        of_cpu.extend(backing.map(|error| CpuError::NoMemory { cpu, error }));
        assert_round_trip(&of_cpu);

        assert_round_trip(&[
            AttachError::Abi { theirs: 7, ours: 1 },
            AttachError::Window {
                module_bytes: 1 << 30,
                host_bytes: 1 << 24,
            },
            AttachError::NotPinned,
            AttachError::AttachedElsewhere,
        ]);
    }

    #[test]
    fn regions_travel_too() {
        let regions = [Region::Static, Region::Reserved, Region::Dynamic].map(Some);
        for region in regions.into_iter().chain([None]) {
            assert_eq!(region_of_word(region_word(region)), region);
        }
    }
}
