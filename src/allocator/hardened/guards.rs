//! The bytes of one CPU's copy of an area that nobody may write: how they are set, and what was done to them.
//!
//! A copy is of a CPU that had memory when the guards were set, or of one that came later and finds zeroes: then both its
//! guards are zero, or, once it was freed, all of it.

use crate::hardened::{FindingKind, GUARD, POISON};

/// Where a copy and its guards lie: `front`, the copy of `bytes`, `rear` one behind the other, from `start` on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    /// The address of the guard before the copy.
    pub(super) start: usize,
    pub(super) front_bytes: usize,
    pub(super) bytes: usize,
    pub(super) rear_bytes: usize,
}

/// A byte that was changed: the first of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) kind: FindingKind,
    /// From the start of the copy.
    pub(super) at_bytes: isize,
    pub(super) found: u8,
}

impl Extent {
    fn rear(&self) -> usize {
        self.start + self.front_bytes + self.bytes
    }

    fn len_bytes(&self) -> usize {
        self.front_bytes + self.bytes + self.rear_bytes
    }

    /// Sets both guards.
    ///
    /// # Safety
    /// The memory is there, and nobody but the instance may use the guards.
    pub(super) unsafe fn set_guards(&self) {
        // SAFETY: the promise of the caller.
        unsafe {
            fill(self.start, self.front_bytes, GUARD);
            fill(self.rear(), self.rear_bytes, GUARD);
        }
    }

    /// Fills the copy and its guards with the bytes of freed areas.
    ///
    /// # Safety
    /// The memory is there, and nobody may use it.
    pub(super) unsafe fn poison(&self) {
        // SAFETY: the promise of the caller.
        unsafe { fill(self.start, self.len_bytes(), POISON) };
    }

    /// What was done to the guards of a live copy, on either side.
    ///
    /// # Safety
    /// The memory is there.
    pub(super) unsafe fn guards_changed(&self) -> [Option<Change>; 2] {
        // SAFETY: the promise of the caller.
        let first_other = |from, bytes, byte| unsafe { first_other(from, bytes, byte) };
        let front = |byte| first_other(self.start, self.front_bytes, byte);
        let rear = |byte| first_other(self.rear(), self.rear_bytes, byte);
        let set = [front(GUARD), rear(GUARD)];
        let zero = [front(0), rear(0)];
        // What one side is says what the other should be.
        let is_late = zero.contains(&None) && !set.contains(&None);
        let [front, rear] = if is_late { zero } else { set };
        let from_copy = |kind, at: usize, (offset, found): (usize, u8)| Change {
            kind,
            at_bytes: (at + offset) as isize - self.front_bytes as isize,
            found,
        };
        [
            front.map(|other| from_copy(FindingKind::WrittenBefore, 0, other)),
            rear.map(|other| {
                from_copy(
                    FindingKind::WrittenBehind,
                    self.front_bytes + self.bytes,
                    other,
                )
            }),
        ]
    }

    /// What was done to a freed copy.
    ///
    /// # Safety
    /// The memory is there.
    pub(super) unsafe fn poison_changed(&self) -> Option<Change> {
        // SAFETY: the promise of the caller.
        let (poison, zero, front) = unsafe {
            (
                first_other(self.start, self.len_bytes(), POISON)?,
                first_other(self.start, self.len_bytes(), 0),
                first_other(self.start, self.front_bytes, 0),
            )
        };
        // Of a CPU that came after the free: all of it is zero. Its guard says that it did.
        let (offset, found) = match (front, zero) {
            (None, None) => return None,
            (None, Some(other)) => other,
            (Some(_), _) => poison,
        };
        Some(Change {
            kind: FindingKind::WrittenAfterFree,
            at_bytes: offset as isize - self.front_bytes as isize,
            found,
        })
    }
}

/// # Safety
/// The memory is there, and may be written.
unsafe fn fill(from: usize, bytes: usize, byte: u8) {
    // SAFETY: the promise of the caller.
    unsafe { core::ptr::with_exposed_provenance_mut::<u8>(from).write_bytes(byte, bytes) };
}

/// The first of some bytes that is not `byte`: its offset, and what it is.
///
/// # Safety
/// The memory is there.
unsafe fn first_other(from: usize, bytes: usize, byte: u8) -> Option<(usize, u8)> {
    /// What is looked at by one comparison, in bytes.
    const BLOCK_BYTES: usize = 64;
    let expected = u32::from_ne_bytes([byte; 4]);
    let mut at = 0;
    while at < bytes {
        let start = from + at;
        if start.is_multiple_of(4) && bytes - at >= 4 {
            let end = (bytes - at).min(BLOCK_BYTES) & !3;
            let words = (start..start + end).step_by(4);
            // Volatile: whoever writes where nobody may does it at any moment.
            let other = words.fold(0, |other, address| {
                // SAFETY: the word lies within the bytes and is aligned; the memory is there (promise of the caller).
                let word =
                    unsafe { core::ptr::with_exposed_provenance::<u32>(address).read_volatile() };
                other | word ^ expected
            });
            if other == 0 {
                at += end;
                continue;
            }
        }
        // SAFETY: the byte lies within the bytes.
        let found = unsafe { core::ptr::with_exposed_provenance::<u8>(start).read_volatile() };
        if found != byte {
            return Some((at, found));
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// 8 bytes, 10 of a copy, 6 bytes.
    fn memory(front: u8, copy: u8, rear: u8) -> Vec<u32> {
        let bytes = [vec_of(front, 8), vec_of(copy, 10), vec_of(rear, 6)].concat();
        let words = bytes.chunks(4);
        words
            .map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
            .collect()
    }

    fn vec_of(byte: u8, len: usize) -> Vec<u8> {
        std::vec![byte; len]
    }

    fn extent(memory: &mut [u32]) -> Extent {
        Extent {
            start: memory.as_mut_ptr().expose_provenance(),
            front_bytes: 8,
            bytes: 10,
            rear_bytes: 6,
        }
    }

    /// Writes a byte, counted from the start of the copy.
    fn write(memory: &mut [u32], at_bytes: isize, byte: u8) {
        let at = (8 + at_bytes) as usize;
        let mut word = memory[at / 4].to_ne_bytes();
        word[at % 4] = byte;
        memory[at / 4] = u32::from_ne_bytes(word);
    }

    fn guards(memory: &mut [u32]) -> [Option<(isize, u8)>; 2] {
        // SAFETY: the memory is that long.
        let changed = unsafe { extent(memory).guards_changed() };
        changed.map(|change| change.map(|change| (change.at_bytes, change.found)))
    }

    fn poison(memory: &mut [u32]) -> Option<(isize, u8)> {
        // SAFETY: the memory is that long.
        let change = unsafe { extent(memory).poison_changed() };
        change.map(|change| (change.at_bytes, change.found))
    }

    /// Every byte of the guards, with guards that were set and with those of a CPU that came late.
    #[test]
    fn each_byte_of_the_guards_counts() {
        for (guard, byte) in [(GUARD, 0), (GUARD, 1), (0, 1), (0, GUARD)] {
            for at_bytes in -8..16 {
                let mut memory = memory(guard, 0x55, guard);
                assert_eq!(guards(&mut memory), [None; 2]);
                write(&mut memory, at_bytes, byte);
                let expected = match at_bytes {
                    ..0 => [Some((at_bytes, byte)), None],
                    0..10 => [None; 2],
                    _ => [None, Some((at_bytes, byte))],
                };
                assert_eq!(guards(&mut memory), expected, "{guard} {byte} {at_bytes}");
            }
        }
    }

    /// One side is as it should be and tells that of the other all has been overwritten, by zeroes too.
    #[test]
    fn a_whole_guard_overwritten() {
        assert_eq!(guards(&mut memory(GUARD, 1, 0)), [None, Some((10, 0))]);
        assert_eq!(guards(&mut memory(0, 1, GUARD)), [Some((-8, 0)), None]);
        assert_eq!(guards(&mut memory(7, 1, 8)), [Some((-8, 7)), Some((10, 8))]);
        assert_eq!(guards(&mut memory(0, 1, 8)), [None, Some((10, 8))]);
    }

    #[test]
    fn each_byte_of_a_freed_copy_counts() {
        for (poisoned, byte) in [(POISON, 0), (POISON, 1), (0, 1), (0, POISON)] {
            for at_bytes in -8..16 {
                let mut memory = memory(poisoned, poisoned, poisoned);
                assert_eq!(poison(&mut memory), None);
                write(&mut memory, at_bytes, byte);
                let found = poison(&mut memory).expect("one was changed");
                // Where the guard of a late CPU was written, its first byte is told.
                if poisoned == POISON || at_bytes >= 0 {
                    assert_eq!(found, (at_bytes, byte));
                }
            }
        }
    }

    /// Blocks, words and bytes, from each place of a word to each.
    #[test]
    fn the_first_other_byte_of_any_stretch() {
        let mut memory = std::vec![0x1111_1111_u32; 60];
        let from = memory.as_mut_ptr().expose_provenance();
        for start in 0..9 {
            for end in start..230 {
                // SAFETY: the memory is that long, and nobody else uses it.
                unsafe {
                    assert_eq!(first_other(from + start, end - start, 0x11), None);
                    for at in [start, usize::midpoint(start, end), end.saturating_sub(1)] {
                        fill(from + at, 1, 7);
                        let found = first_other(from + start, end - start, 0x11);
                        let is_inside = (start..end).contains(&at);
                        assert_eq!(found, is_inside.then(|| (at - start, 7)));
                        fill(from + at, 1, 0x11);
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_set_is_found_as_it_was_set() {
        let mut memory = memory(1, 2, 3);
        // SAFETY: the memory is that long.
        unsafe { extent(&mut memory).set_guards() };
        assert_eq!(guards(&mut memory), [None; 2]);
        assert_eq!(memory[2].to_ne_bytes(), [2; 4]);
        // SAFETY: as above.
        unsafe { extent(&mut memory).poison() };
        assert_eq!(poison(&mut memory), None);
    }
}
