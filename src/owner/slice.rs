//! Owners of slices: a length that is known at run time, the same on every CPU. Histograms are what they are for.

use core::mem::{ManuallyDrop, size_of};

use zerocopy::FromZeros;

use super::{InitError, PerCpu, copies};
use crate::alloc_api::{Domain, PerCpuPtr};
use crate::field::{Part, out_of_bounds};
use crate::request::AllocError;
use crate::unit::CpuId;

/// Slices.
impl<T, D: Domain> PerCpu<[T], D> {
    /// A slice of `len` elements of zero bytes on every CPU.
    ///
    /// ```
    /// use pcpu::{CpuCell, LocalCell, PerCpu, RemoteCell};
    ///
    /// let by_size = PerCpu::<[CpuCell<u64>]>::new_slice(32)?;
    /// for bytes in [3_u32, 4, 5, 700] {
    ///     by_size.at(bytes.ilog2() as usize).inc();
    /// }
    /// assert_eq!(by_size.at(2).sum(), 2);
    /// assert_eq!(by_size.at(9).sum(), 1);
    /// # Ok::<(), pcpu::AllocError>(())
    /// ```
    ///
    /// # Errors
    /// [`AllocError`]; [`AllocError::ZeroSize`] for a `len` of 0 or a type without size, [`AllocError::TooLarge`] if a
    /// copy has more bytes than the [policy](crate::allocator::Policy) serves, with `usize::MAX` if more than can be
    /// counted.
    pub fn new_slice(len: usize) -> Result<Self, AllocError>
    where
        T: FromZeros,
    {
        Ok(Self::owning(copies::zeroed(len)?, len))
    }

    /// A slice of `len` elements on every possible CPU, each made by `init`, given the CPU and the index.
    ///
    /// This materialises all possible CPUs: see [the type](Self#cpus-that-never-ran).
    ///
    /// # Errors
    /// As [`new_slice`](Self::new_slice).
    ///
    /// # Panics
    /// If `init` does; the elements made so far are dropped.
    pub fn new_slice_with(
        len: usize,
        init: impl FnMut(CpuId, usize) -> T,
    ) -> Result<Self, AllocError> {
        Ok(Self::owning(copies::made_by(len, init)?, len))
    }

    /// [`new_slice_with`](Self::new_slice_with), where making an element may fail.
    ///
    /// # Errors
    /// [`InitError`]; the elements made so far are dropped.
    ///
    /// # Panics
    /// As [`new_slice_with`](Self::new_slice_with).
    pub fn try_new_slice_with<E>(
        len: usize,
        init: impl FnMut(CpuId, usize) -> Result<T, E>,
    ) -> Result<Self, InitError<E>> {
        Ok(Self::owning(copies::try_made_by(len, init)?, len))
    }

    /// How many elements each CPU's copy has; never 0.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// False: there are no owners of nothing.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The element at `index`, as a per-CPU variable of its own: if it is a [`CpuCell`](crate::CpuCell),
    /// `owner.at(index).add(1)` works on the current CPU's copy.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len).
    #[inline]
    #[track_caller]
    pub fn at(&self, index: usize) -> Part<'_, T, D> {
        match self.try_at(index) {
            Some(element) => element,
            None => out_of_bounds(index, self.len),
        }
    }

    /// The element at `index`; `None` if there is no such element.
    #[inline]
    pub fn try_at(&self, index: usize) -> Option<Part<'_, T, D>> {
        // SAFETY: the owner is live while it is borrowed, and has an element there.
        (index < self.len).then(|| unsafe { Part::of(self.first, index * size_of::<T>()) })
    }

    /// All elements, in order, as per-CPU variables.
    ///
    /// ```
    /// use pcpu::{CpuCell, LocalCell, PerCpu, RemoteCell};
    ///
    /// let histogram = PerCpu::<[CpuCell<u32>]>::new_slice(4)?;
    /// histogram.at(1).add(10);
    /// let sums: Vec<u32> = histogram.elements().map(|element| element.sum()).collect();
    /// assert_eq!(sums, [0, 10, 0, 0]);
    /// # Ok::<(), pcpu::AllocError>(())
    /// ```
    pub fn elements(&self) -> impl ExactSizeIterator<Item = Part<'_, T, D>> {
        (0..self.len).map(|index| self.at(index))
    }

    /// Gives up ownership: neither drops nor frees anything. The result is the handle of the first element, and the
    /// length; [`from_ptr_and_len`](Self::from_ptr_and_len) takes it up again.
    pub fn into_ptr_and_len(self) -> (PerCpuPtr<T, D>, usize) {
        let this = ManuallyDrop::new(self);
        (this.first, this.len)
    }

    /// Takes ownership of a slice.
    ///
    /// # Safety
    /// As for [`from_ptr`](PerCpu::from_ptr), for `len` elements beginning with `first`, and `len` is not 0.
    pub unsafe fn from_ptr_and_len(first: PerCpuPtr<T, D>, len: usize) -> Self {
        Self::owning(first, len)
    }
}
