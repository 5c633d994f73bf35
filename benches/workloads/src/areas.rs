//! Where areas come from: an instance of ours, or libc's heap. Both behind one shape, so that both run in the same loops.

use std::fmt;
use std::hint::black_box;
use std::marker::PhantomData;
use std::ptr::NonNull;

use pcpu::{AllocFlags, Domain, FreeFlags, Request};

use crate::WorkloadError;

/// The alignment of all areas.
pub const ALIGN_BYTES: usize = 8;

/// Whether areas are asked for zeroed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// They are.
    On,
    /// Every request carries [`AllocFlags::NO_ZERO`].
    Off,
}

/// A source of areas.
pub trait Source: Copy + Sync {
    /// The name of its cases.
    const NAME: &'static str;

    /// An area.
    type Area: Copy + Send + fmt::Debug;

    /// What areas of a size are asked for by, which a program has for each of its types.
    type Kind: fmt::Debug;

    /// The kind of areas of so many bytes.
    fn kind(self, bytes: usize) -> Self::Kind;

    /// Allocates.
    ///
    /// # Errors
    /// If there is no memory.
    fn allocate(self, kind: &Self::Kind) -> Result<Self::Area, WorkloadError>;

    /// Frees.
    ///
    /// # Errors
    /// If the source knows of no such area.
    ///
    /// # Safety
    /// The area is live, and nobody uses it.
    unsafe fn free(self, area: Self::Area) -> Result<(), WorkloadError>;
}

/// The instance of a domain.
#[derive(Debug)]
pub struct PerCpuAreas<D> {
    flags: AllocFlags,
    domain: PhantomData<fn() -> D>,
}

impl<D> Clone for PerCpuAreas<D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D> Copy for PerCpuAreas<D> {}

impl<D: Domain> PerCpuAreas<D> {
    /// Areas of the domain's instance.
    pub fn new(zeroing: Zeroing) -> Self {
        Self {
            flags: match zeroing {
                Zeroing::On => AllocFlags::empty(),
                Zeroing::Off => AllocFlags::NO_ZERO,
            },
            domain: PhantomData,
        }
    }
}

impl<D: Domain> Source for PerCpuAreas<D> {
    const NAME: &'static str = "pcpu";
    /// A neutral address.
    type Area = usize;
    type Kind = Request;

    fn kind(self, bytes: usize) -> Request {
        Request::new(bytes, ALIGN_BYTES).with_flags(self.flags)
    }

    #[inline(always)]
    fn allocate(self, request: &Request) -> Result<usize, WorkloadError> {
        D::allocate(request).map_err(|error| WorkloadError::Alloc {
            bytes: request.bytes(),
            error,
        })
    }

    #[inline(always)]
    unsafe fn free(self, area: usize) -> Result<(), WorkloadError> {
        // SAFETY: the promise of the caller.
        unsafe { D::free(area, FreeFlags::empty()) }.map_err(WorkloadError::Free)
    }
}

/// What a program has at hand: `malloc` and `free`, for memory of one copy that need not be zero.
#[derive(Debug, Clone, Copy)]
pub struct Heap;

/// An area of libc's heap.
#[derive(Debug, Clone, Copy)]
pub struct HeapArea(NonNull<libc::c_void>);

// SAFETY: whoever has the area may write to it and free it, on any thread.
unsafe impl Send for HeapArea {}

impl HeapArea {
    /// Its address.
    pub fn address(self) -> *mut u64 {
        self.0.as_ptr().cast()
    }
}

impl Source for Heap {
    const NAME: &'static str = "malloc+free";
    type Area = HeapArea;
    type Kind = usize;

    fn kind(self, bytes: usize) -> usize {
        bytes
    }

    #[inline(always)]
    fn allocate(self, &bytes: &usize) -> Result<HeapArea, WorkloadError> {
        // SAFETY: any size can be asked for.
        let area = unsafe { libc::malloc(bytes) };
        // Opaque: the compiler may not leave out a pair whose memory nobody uses.
        NonNull::new(black_box(area))
            .map(HeapArea)
            .ok_or(WorkloadError::Malloc { bytes })
    }

    #[inline(always)]
    unsafe fn free(self, area: HeapArea) -> Result<(), WorkloadError> {
        // SAFETY: `malloc` returned it, and nobody uses it (promise of the caller).
        unsafe { libc::free(area.0.as_ptr()) };
        Ok(())
    }
}

/// Allocates an area and frees it, so many times.
///
/// # Errors
/// As the source.
#[inline(never)]
pub fn pairs<S: Source>(source: S, bytes: usize, iters: u64) -> Result<(), WorkloadError> {
    let kind = source.kind(bytes);
    for _ in 0..iters {
        let area = source.allocate(&kind)?;
        // SAFETY: the area has just been allocated, and nobody uses it.
        unsafe { source.free(area)? };
    }
    Ok(())
}

/// Areas that stay live as long as it.
#[derive(Debug)]
pub struct Live<S: Source> {
    source: S,
    areas: Vec<S::Area>,
}

impl<S: Source> Live<S> {
    /// Allocates an area of each of the sizes.
    ///
    /// # Errors
    /// As the source.
    pub fn new(source: S, sizes: impl Iterator<Item = usize>) -> Result<Self, WorkloadError> {
        let areas = Vec::with_capacity(sizes.size_hint().0);
        let mut live = Self { source, areas };
        for bytes in sizes {
            live.areas.push(source.allocate(&source.kind(bytes))?);
        }
        Ok(live)
    }

    /// The areas.
    pub fn areas(&self) -> &[S::Area] {
        &self.areas
    }

    /// The areas, to be put into another order.
    pub fn areas_mut(&mut self) -> &mut [S::Area] {
        &mut self.areas
    }

    /// Frees the last `count` areas, or all if there are not so many.
    ///
    /// # Errors
    /// As the source; the area has left then.
    pub fn free_last(&mut self, count: usize) -> Result<(), WorkloadError> {
        let first = self.areas.len().saturating_sub(count);
        for area in self.areas.drain(first..) {
            // SAFETY: the area is live, and nobody uses it.
            unsafe { self.source.free(area)? };
        }
        Ok(())
    }

    /// Frees the area at `index` and puts a new one in its place.
    ///
    /// # Errors
    /// If either failed; the area has left then.
    #[inline(always)]
    pub fn replace(&mut self, index: usize, kind: &S::Kind) -> Result<(), WorkloadError> {
        // SAFETY: the area is live, and nobody uses it.
        let replaced = unsafe { self.source.free(self.areas[index]) }
            .and_then(|()| self.source.allocate(kind));
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
    use crate::home::{Home, Machine};

    /// What an area holds on the last of two CPUs when it is handed out again after it was written to.
    fn handed_out_again(zeroing: Zeroing) -> u64 {
        let home = Home::<Machine<2>>::with_cpus(2).unwrap();
        let source = PerCpuAreas::<Machine<2>>::new(zeroing);
        let area = source.allocate(&source.kind(8)).unwrap();
        // SAFETY: the area is live and aligned, and nobody else uses it.
        unsafe {
            home.copy(area, 1).unwrap().write(7);
            source.free(area).unwrap();
        }
        // The thread may be on another CPU by now, whose cache has not got the area.
        pcpu::drain_caches::<Machine<2>>();
        let again = source.allocate(&source.kind(8)).unwrap();
        assert_eq!(again, area);
        // SAFETY: as above; its memory was written to before.
        let held = unsafe { home.copy(again, 1).unwrap().read() };
        // SAFETY: the area is live, and nobody uses it any more.
        unsafe { source.free(again).unwrap() };
        held
    }

    #[test]
    fn areas_are_zeroed_if_asked_for() {
        assert_eq!(handed_out_again(Zeroing::On), 0);
        assert_eq!(handed_out_again(Zeroing::Off), 7);
    }

    #[test]
    fn live_areas_are_replaced_and_freed() {
        Home::<Machine<3>>::with_cpus(1).unwrap();
        let pcpu = Machine::<3>::allocator();
        let source = PerCpuAreas::<Machine<3>>::new(Zeroing::On);
        let mut live = Live::new(source, (0..10).map(|_| 8)).unwrap();
        live.replace(3, &source.kind(512)).unwrap();
        assert_eq!(pcpu.area_bytes(live.areas()[3]), Some(512));
        assert_eq!(pcpu.stats().live, 10);
        drop(live);
        assert_eq!(pcpu.stats().live, 0);
    }
}
