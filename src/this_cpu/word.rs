//! The scalars that are operated on, as words of a width that machines have, and the changes of one word.

use core::fmt;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use zerocopy::FromZeros;

/// An unsigned integer of a width that machines operate on: how scalars travel.
///
/// # Safety
/// Sealed: only this crate implements it, for `u8`, `u16`, `u32` and `u64`.
pub unsafe trait Word:
    Copy + Eq + fmt::Debug + Send + Sync + sealed::Sealed + 'static
{
    /// Reads one CPU's copy in one piece.
    ///
    /// # Safety
    /// `copy` points to a live, aligned word.
    unsafe fn load(copy: *const Self) -> Self;
    /// Writes one CPU's copy by a LOCKed or otherwise indivisible step.
    ///
    /// # Safety
    /// `copy` points to a live, aligned word that is only changed by such steps.
    unsafe fn locked(copy: *mut Self, change: Change<Self>) -> Self;
    /// `self + other`, wrapping.
    #[must_use]
    fn wrapping_add(self, other: Self) -> Self;
    /// `-self`, wrapping.
    #[must_use]
    fn wrapping_neg(self) -> Self;
    /// The same number, wider.
    fn widen(self) -> u64;
    /// The low bits of a number.
    fn narrow(wide: u64) -> Self;
}

/// A change of a word; the result is the word before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<W> {
    /// Replace it.
    Set(W),
    /// Add to it, wrapping.
    Add(W),
    /// Keep the bits of the operand only.
    And(W),
    /// Set the bits of the operand.
    Or(W),
    /// Flip the bits of the operand.
    Xor(W),
    /// Replace the first by the second, if it is the first.
    Replace(W, W),
}

impl<W> Change<W> {
    /// The same change of another width.
    #[inline]
    pub fn map<V>(self, convert: impl Fn(W) -> V) -> Change<V> {
        match self {
            Self::Set(value) => Change::Set(convert(value)),
            Self::Add(value) => Change::Add(convert(value)),
            Self::And(value) => Change::And(convert(value)),
            Self::Or(value) => Change::Or(convert(value)),
            Self::Xor(value) => Change::Xor(convert(value)),
            Self::Replace(old, new) => Change::Replace(convert(old), convert(new)),
        }
    }
}

/// An integer that [`CpuCell`](super::CpuCell) can hold.
///
/// # Safety
/// Sealed: only this crate implements it, for the integers of 1, 2, 4 and 8 bytes.
pub unsafe trait Scalar: Copy + Send + Sync + FromZeros + sealed::Sealed + 'static {
    /// The unsigned integer of the same width.
    type Word: Word;
    /// The same bits.
    fn to_word(self) -> Self::Word;
    /// The same bits.
    fn from_word(word: Self::Word) -> Self;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! words {
    ($($word:ty: $atomic:ident for $($scalar:ty),+;)+) => {$(
        // SAFETY: an integer of a width that the machine has operations for.
        unsafe impl Word for $word {
            #[inline]
            unsafe fn load(copy: *const Self) -> Self {
                // SAFETY: live and aligned (promise of the caller); all other accesses are indivisible too.
                unsafe { $atomic::from_ptr(copy.cast_mut()) }.load(Ordering::Relaxed)
            }

            unsafe fn locked(copy: *mut Self, change: Change<Self>) -> Self {
                // SAFETY: live and aligned (promise of the caller); all other accesses are indivisible too.
                let copy = unsafe { $atomic::from_ptr(copy) };
                match change {
                    Change::Set(value) => copy.swap(value, Ordering::Relaxed),
                    Change::Add(value) => copy.fetch_add(value, Ordering::Relaxed),
                    Change::And(value) => copy.fetch_and(value, Ordering::Relaxed),
                    Change::Or(value) => copy.fetch_or(value, Ordering::Relaxed),
                    Change::Xor(value) => copy.fetch_xor(value, Ordering::Relaxed),
                    Change::Replace(old, new) => copy
                        .compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed)
                        .unwrap_or_else(|found| found),
                }
            }

            #[inline]
            fn wrapping_add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }

            #[inline]
            fn wrapping_neg(self) -> Self {
                self.wrapping_neg()
            }

            #[inline]
            fn widen(self) -> u64 {
                self.into()
            }

            #[inline]
            fn narrow(wide: u64) -> Self {
                wide as Self
            }
        }

        $(
            impl sealed::Sealed for $scalar {}

            // SAFETY: an integer of the width of the word.
            unsafe impl Scalar for $scalar {
                type Word = $word;

                #[inline]
                fn to_word(self) -> $word {
                    self as $word
                }

                #[inline]
                fn from_word(word: $word) -> Self {
                    word as Self
                }
            }
        )+
    )+};
}

words! {
    u8: AtomicU8 for u8, i8;
    u16: AtomicU16 for u16, i16;
    u32: AtomicU32 for u32, i32;
    u64: AtomicU64 for u64, i64, usize, isize;
}
