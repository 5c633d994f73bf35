//! All of it at one go: windows, first chunk, allocator.

use lock_api::RawMutex;

use super::error::InstanceError;
use super::frames::Frames;
use super::shootdown::Shootdown;
use super::{Paging, PagingSetup};
use crate::allocator::{PerCpuAllocator, Policy};
use crate::unit::{CpuId, Template, UnitPlan};

impl<K: Frames + Shootdown, R: RawMutex> Paging<K, R> {
    /// An allocator on a new [`Paging`], by the default [policy](Policy). The boot CPU may use its unit as soon as it has loaded
    /// its [offset](crate::cpus::Units::offset); it is to be brought up as all others are.
    ///
    /// `unit_offsets` needs an entry per CPU id; they are of no use afterwards. The template may go then, too.
    /// [Adding pcpu to a kernel](crate::adding_to_a_kernel) has it in its place.
    ///
    /// # Errors
    /// [`InstanceError`].
    ///
    /// # Safety
    /// As [`new`](Self::new).
    ///
    /// ```no_run
    /// # use parking_lot::RawMutex;
    /// # use pcpu::PerCpuAllocator;
    /// use pcpu::backing::paging::{Frames, InstanceError, Paging, PagingSetup, Shootdown};
    /// use pcpu::unit::{CpuId, Template, UnitPlan};
    ///
    /// /// # Safety
    /// /// As `Paging::new`.
    /// unsafe fn set_up<K: Frames + Shootdown>(
    ///     memory: K,
    ///     setup: PagingSetup,
    ///     plan: UnitPlan<'_>,
    ///     template: Template<'_>,
    /// ) -> Result<PerCpuAllocator<Paging<K, RawMutex>, RawMutex>, InstanceError> {
    ///     let mut offsets = [0; 64];
    ///     // SAFETY: the promise of the caller.
    ///     unsafe { Paging::set_up(memory, setup, plan, template, &mut offsets, CpuId::new(0)) }
    /// }
    /// ```
    pub unsafe fn set_up(
        kernel: K,
        setup: PagingSetup,
        plan: UnitPlan<'_>,
        template: Template<'_>,
        unit_offsets: &mut [usize],
        boot_cpu: CpuId,
    ) -> Result<PerCpuAllocator<Self, R>, InstanceError> {
        // SAFETY: the promise of the caller.
        let paging = unsafe { Self::new(kernel, setup, &plan) };
        let mut paging = paging.map_err(InstanceError::Windows)?;
        let is_up = |cpu| cpu == boot_cpu;
        let first_chunk = match paging.build_first_chunk(plan, template, unit_offsets, is_up) {
            Ok(first_chunk) => first_chunk,
            Err(error) => {
                // SAFETY: nobody has heard of the windows.
                unsafe { paging.tear_down() };
                return Err(InstanceError::FirstChunk(error));
            }
        };
        // SAFETY: the first chunk lies in the windows of `paging`, which the allocator takes over.
        let allocator = unsafe { PerCpuAllocator::new(paging, &first_chunk, Policy::default()) };
        allocator.map_err(InstanceError::Allocator)
    }
}
