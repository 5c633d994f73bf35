//! A signed number per CPU of which only the sum means anything: what counters and reference counts are made of.

use core::fmt;

use crate::alloc_api::{Domain, PerCpuPtr, alloc_percpu_in, free_percpu, per_cpu_ptr};
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
        let cpus = D::units().materialised();
        cpus.iter()
            .filter_map(|cpu| per_cpu_ptr(self.0, cpu).ok())
            // SAFETY: the variable is owned, so live; a `CpuCell` may be read from any CPU.
            .map(|copy| unsafe { copy.as_ref() }.read_remote())
            .fold(0, i64::wrapping_add)
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
