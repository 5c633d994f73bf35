//! A signed number per CPU of which only the sum means anything: what counters and reference counts are made of.

use core::fmt;
use core::ptr;

use crate::alloc_api::{Domain, PerCpuPtr, alloc_percpu_in, free_percpu};
use crate::request::AllocError;
use crate::this_cpu::CpuCell;

/// Owns one number per CPU, 0 at first.
pub(crate) struct Deltas<D: Domain>(PerCpuPtr<CpuCell<i64>, D>);

impl<D: Domain> Deltas<D> {
    pub(crate) fn new() -> Result<Self, AllocError> {
        alloc_percpu_in().map(Self)
    }

    /// The numbers, live as long as `self`.
    #[inline]
    pub(crate) fn cells(&self) -> PerCpuPtr<CpuCell<i64>, D> {
        self.0
    }

    /// The sum, wrapping. A CPU that was never materialised has added nothing, and is not looked at.
    pub(crate) fn sum(&self) -> i64 {
        let mut sum = 0_i64;
        D::units().for_each_copy(self.0.neutral(), |copy| {
            let copy: *const CpuCell<i64> = ptr::with_exposed_provenance(copy);
            // SAFETY: the variable is owned, so live; a `CpuCell` may be read from any CPU.
            sum = sum.wrapping_add(unsafe { &*copy }.read_remote());
        });
        sum
    }
}

impl<D: Domain> Drop for Deltas<D> {
    fn drop(&mut self) {
        // SAFETY: owned, and its owner is not used any more.
        let freed = unsafe { free_percpu(self.0) };
        debug_assert_eq!(freed, Ok(()));
    }
}

impl<D: Domain> fmt::Debug for Deltas<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Deltas").field(&self.sum()).finish()
    }
}
