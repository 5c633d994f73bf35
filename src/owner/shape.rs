//! What an owner can own: a type with a size, or a slice of such.

use core::fmt;
use core::ptr::NonNull;

/// The content of a [`PerCpu`](super::PerCpu): any type with a size, or a slice whose length is the same on every CPU and
/// known at run time.
///
/// Sealed: both kinds of types have it, and there is no third.
pub trait Shape: sealed::Sealed {
    /// What a copy is a row of: the type itself, or the slice's element.
    type Item;
    /// What must be known besides the type.
    type Len: Copy + fmt::Debug + Send + Sync + 'static;

    /// How many items a copy has.
    #[doc(hidden)]
    fn items(len: Self::Len) -> usize;

    /// The copy that begins with `first`.
    #[doc(hidden)]
    fn copy(first: NonNull<Self::Item>, len: Self::Len) -> NonNull<Self>;
}

impl<T> Shape for T {
    type Item = T;
    type Len = ();

    #[inline]
    fn items((): ()) -> usize {
        1
    }

    #[inline]
    fn copy(first: NonNull<T>, (): ()) -> NonNull<T> {
        first
    }
}

impl<T> Shape for [T] {
    type Item = T;
    type Len = usize;

    #[inline]
    fn items(len: usize) -> usize {
        len
    }

    #[inline]
    fn copy(first: NonNull<T>, len: usize) -> NonNull<[T]> {
        NonNull::slice_from_raw_parts(first, len)
    }
}

mod sealed {
    pub trait Sealed {}
    impl<T> Sealed for T {}
    impl<T> Sealed for [T] {}
}
