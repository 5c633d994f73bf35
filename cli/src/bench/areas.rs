//! Where areas come from: an instance of ours, or libc's heap. Both behind one shape, so that both run in the same loops.

use std::hint::black_box;
use std::ptr::NonNull;

use pcpu::global::GlobalAllocator;
use pcpu::{AllocFlags, Request};

use super::Zeroing;
use super::instance::Instance;
use super::row::PCPU;
use crate::error::CliError;

/// The alignment of all areas.
pub const ALIGN_BYTES: usize = 8;

/// A source of areas.
pub trait Source: Copy + Sync {
    /// The name of its cases.
    const NAME: &'static str;

    /// An area.
    type Area: Copy;

    /// Allocates.
    ///
    /// # Errors
    /// One line, if there is no memory.
    fn allocate(self, bytes: usize) -> Result<Self::Area, CliError>;

    /// Frees.
    ///
    /// # Errors
    /// One line, if the source knows of no such area.
    ///
    /// # Safety
    /// The area is live, and nobody uses it.
    unsafe fn free(self, area: Self::Area) -> Result<(), CliError>;
}

/// An instance of ours.
#[derive(Debug, Clone, Copy)]
pub struct PerCpuAreas {
    pcpu: &'static GlobalAllocator,
    flags: AllocFlags,
}

impl PerCpuAreas {
    /// Areas of `instance`.
    pub fn new(instance: &Instance, zeroing: Zeroing) -> Self {
        Self {
            pcpu: instance.pcpu,
            flags: match zeroing {
                Zeroing::On => AllocFlags::empty(),
                Zeroing::Off => AllocFlags::NO_ZERO,
            },
        }
    }
}

impl Source for PerCpuAreas {
    const NAME: &'static str = PCPU;
    /// A neutral address.
    type Area = usize;

    #[inline(always)]
    fn allocate(self, bytes: usize) -> Result<usize, CliError> {
        self.pcpu
            .allocate(&Request::new(bytes, ALIGN_BYTES).with_flags(self.flags))
            .map_err(|error| CliError::Failed(format!("{bytes} bytes: {error}")))
    }

    #[inline(always)]
    unsafe fn free(self, area: usize) -> Result<(), CliError> {
        // SAFETY: the promise of the caller.
        unsafe { self.pcpu.free(area) }
            .map_err(|error| CliError::Failed(format!("a live area was not taken back: {error}")))
    }
}

/// What a program has at hand: `malloc` and `free`, for memory of one copy that need not be zero.
#[derive(Debug, Clone, Copy)]
pub struct Heap;

impl Source for Heap {
    const NAME: &'static str = "malloc+free";
    type Area = NonNull<libc::c_void>;

    #[inline(always)]
    fn allocate(self, bytes: usize) -> Result<Self::Area, CliError> {
        // SAFETY: any size can be asked for.
        let area = unsafe { libc::malloc(bytes) };
        // Opaque: the compiler may not leave out a pair whose memory nobody uses.
        NonNull::new(black_box(area))
            .ok_or_else(|| CliError::Failed(format!("{bytes} bytes: malloc has no memory")))
    }

    #[inline(always)]
    unsafe fn free(self, area: Self::Area) -> Result<(), CliError> {
        // SAFETY: `malloc` returned it, and nobody uses it (promise of the caller).
        unsafe { libc::free(area.as_ptr()) };
        Ok(())
    }
}

/// Areas that stay live as long as it.
pub struct Live<S: Source> {
    source: S,
    areas: Vec<S::Area>,
}

impl<S: Source> Live<S> {
    /// Allocates an area of each of the sizes.
    ///
    /// # Errors
    /// One line, if there is no memory.
    pub fn new(source: S, sizes: impl Iterator<Item = usize>) -> Result<Self, CliError> {
        let areas = Vec::with_capacity(sizes.size_hint().0);
        let mut live = Self { source, areas };
        for bytes in sizes {
            live.areas.push(source.allocate(bytes)?);
        }
        Ok(live)
    }

    /// The areas.
    pub fn areas(&self) -> &[S::Area] {
        &self.areas
    }

    /// Frees the area at `index` and puts a new one in its place.
    ///
    /// # Errors
    /// One line, if either failed; the area has left then.
    #[inline(always)]
    pub fn replace(&mut self, index: usize, bytes: usize) -> Result<(), CliError> {
        // SAFETY: the area is live, and nobody uses it.
        let replaced = unsafe { self.source.free(self.areas[index]) }
            .and_then(|()| self.source.allocate(bytes));
        match replaced {
            Ok(area) => {
                self.areas[index] = area;
                Ok(())
            }
            Err(error) => {
                self.areas.swap_remove(index);
                Err(error)
            }
        }
    }
}

impl<S: Source> Drop for Live<S> {
    fn drop(&mut self) {
        for area in self.areas.drain(..) {
            // SAFETY: the area is live, and nobody uses it.
            let freed = unsafe { self.source.free(area) };
            debug_assert!(freed.is_ok());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcpu::unit::CpuId;

    /// What an area holds on the last of two CPUs when it is handed out again after it was written to.
    fn handed_out_again(zeroing: Zeroing) -> u64 {
        let instance = Instance::with_cpus(2).unwrap();
        let source = PerCpuAreas::new(&instance, zeroing);
        let copy = |area| {
            let address = instance.pcpu.per_cpu_address(area, CpuId::new(1)).unwrap();
            std::ptr::with_exposed_provenance_mut::<u64>(address)
        };
        let area = source.allocate(8).unwrap();
        // SAFETY: the area is live and aligned, and nobody else uses it.
        unsafe {
            copy(area).write(7);
            source.free(area).unwrap();
        }
        let again = source.allocate(8).unwrap();
        assert_eq!(again, area);
        // SAFETY: as above; its memory was written to before.
        unsafe { copy(again).read() }
    }

    #[test]
    fn areas_are_zeroed_if_asked_for() {
        assert_eq!(handed_out_again(Zeroing::On), 0);
        assert_eq!(handed_out_again(Zeroing::Off), 7);
    }

    #[test]
    fn live_areas_are_replaced_and_freed() {
        let instance = Instance::with_cpus(1).unwrap();
        let source = PerCpuAreas::new(&instance, Zeroing::On);
        let mut live = Live::new(source, (0..10).map(|_| 8)).unwrap();
        live.replace(3, 512).unwrap();
        assert_eq!(instance.pcpu.area_bytes(live.areas()[3]), Some(512));
        assert_eq!(instance.pcpu.stats().live, 10);
        drop(live);
        assert_eq!(instance.pcpu.stats().live, 0);
    }
}
