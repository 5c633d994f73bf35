//! Arrays in metadata memory.
//!
//! The core has no `alloc`: what it must remember lies in blocks that the backing gives
//! ([`Backing::allocate_metadata`](crate::backing::Backing::allocate_metadata)). A [`MetaSlice`] is one array in such a
//! block. It does not own the block: whoever carved the block gives it back after the last use of its slices.

use core::alloc::{Layout, LayoutError};
use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

/// An array of plain values in metadata memory, reached only through this value.
pub(crate) struct MetaSlice<T> {
    first: NonNull<T>,
    len: usize,
}

// SAFETY: a MetaSlice is the only way to its array (promise of `new`), as a Box would be.
unsafe impl<T: Send> Send for MetaSlice<T> {}
// SAFETY: as above; a shared MetaSlice gives shared references only.
unsafe impl<T: Sync> Sync for MetaSlice<T> {}

impl<T: Clone> MetaSlice<T> {
    /// Makes `len` copies of `value` at `at` bytes into `block`.
    ///
    /// # Safety
    /// As [`filled`](Self::filled).
    pub(crate) unsafe fn new(block: NonNull<u8>, at: usize, len: usize, value: T) -> Self {
        // SAFETY: the promise of the caller.
        unsafe { Self::filled(block, at, len, || value.clone()) }
    }
}

#[cfg(all(feature = "std", target_os = "linux"))]
impl<T> MetaSlice<T> {
    /// An array of nothing.
    pub(crate) const fn empty() -> Self {
        Self {
            first: NonNull::dangling(),
            len: 0,
        }
    }
}

impl<T> MetaSlice<T> {
    /// An array that somebody else has made.
    ///
    /// # Safety
    /// There are `len` aligned values at `first`, which live as long as the result, and are never changed through it but by
    /// means of a shared reference.
    pub(crate) unsafe fn view(first: *const T, len: usize) -> Self {
        // SAFETY: values are at no null pointer (promise of the caller).
        let first = unsafe { NonNull::new_unchecked(first.cast_mut()) };
        Self { first, len }
    }

    /// Makes `len` values at `at` bytes into `block`.
    ///
    /// # Safety
    /// `block + at` is aligned for `T` and followed by room for `len` of them, which nothing else uses while the
    /// result lives.
    pub(crate) unsafe fn filled(
        block: NonNull<u8>,
        at: usize,
        len: usize,
        value: impl Fn() -> T,
    ) -> Self {
        // SAFETY: `at` lies inside the block (promise of the caller).
        let first = unsafe { block.add(at) }.cast::<T>();
        for index in 0..len {
            // SAFETY: `index < len`, and the caller promises room for `len` aligned values.
            unsafe { first.add(index).write(value()) };
        }
        Self { first, len }
    }
}

impl<T> Deref for MetaSlice<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `new` wrote `len` values at `first`, which only this value reaches.
        unsafe { core::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for MetaSlice<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { core::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

impl<T: fmt::Debug> fmt::Debug for MetaSlice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Sums up the layout of a metadata block: arrays one behind the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockLayout(Layout);

impl BlockLayout {
    /// An empty block.
    pub(crate) const fn new() -> Self {
        Self(Layout::new::<()>())
    }

    /// Adds an array; returns its offset in the block, in bytes.
    pub(crate) fn array<T>(&mut self, len: usize) -> Result<usize, LayoutError> {
        let (layout, at) = self.0.extend(Layout::array::<T>(len)?)?;
        self.0 = layout;
        Ok(at)
    }

    /// The layout to ask the backing for.
    pub(crate) fn finish(self) -> Layout {
        self.0.pad_to_align()
    }
}
