//! The seat of any CPU, whoever is on it: for simulated machines, and for whoever plays the CPUs of an instance.
//!
//! All it does is LOCKed steps on that CPU's copies, so that it may be used from several threads at a time.

use super::Seat;
use crate::cpus::Units;
use crate::sync::{self, AtomicU32, AtomicU64, Ordering};
use crate::this_cpu::{FenceError, Pair, Put, RemotePairs};
use crate::this_cpu::{locked, slots};
use crate::unit::CpuId;

/// The seat of a CPU, whoever is there: works by LOCKed steps, as [`Portable`](crate::this_cpu::portable::Portable) does.
///
/// ```
/// use pcpu::backing::sim::Machine;
/// use pcpu::cache::LockedSeat;
/// use pcpu::unit::CpuId;
/// use pcpu::{FreeFlags, Request};
///
/// let mut pcpu = Machine::new(2).build()?;
/// pcpu.enable_caches()?;
/// // SAFETY: all seats of this instance are such.
/// let [one, other] = [0, 1].map(|cpu| unsafe { LockedSeat::new(pcpu.units(), CpuId::new(cpu)) });
/// let address = pcpu.allocate_at(&one, &Request::new(8, 8))?;
/// // SAFETY: nobody uses the area any more.
/// unsafe { pcpu.free_at(&other, address, FreeFlags::empty())? };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct LockedSeat {
    cpu: CpuId,
    offset: Option<usize>,
}

impl LockedSeat {
    /// `cpu`'s seat; if the CPU has no memory of its own, its cache stays empty.
    ///
    /// # Safety
    /// It is used with the instance that `units` are of, and no other; all seats that are used with that one work by LOCKed
    /// steps.
    #[inline]
    pub unsafe fn new(units: &Units, cpu: CpuId) -> Self {
        Self {
            cpu,
            offset: units.materialised_offset(cpu),
        }
    }

    /// Whether the CPU has memory, and so a cache.
    #[inline(always)]
    pub(crate) fn has_memory(self) -> bool {
        self.offset.is_some()
    }

    #[inline(always)]
    fn copy(self, at: usize) -> Option<*mut Pair> {
        let copy = at.wrapping_add(self.offset?);
        Some(core::ptr::with_exposed_provenance_mut(copy))
    }

    /// What `act` makes of a word.
    ///
    /// # Safety
    /// A word lives at `at` on every CPU that has memory.
    #[inline(always)]
    unsafe fn with_word<R>(self, at: usize, act: impl FnOnce(&AtomicU64) -> R) -> Option<R> {
        // SAFETY: the promise of the caller.
        self.copy(at).map(|copy| act(unsafe { &*copy.cast() }))
    }

    /// What `act` makes of half a word.
    ///
    /// # Safety
    /// As [`with_word`](Self::with_word).
    #[inline(always)]
    unsafe fn with_link<R>(self, at: usize, act: impl FnOnce(&AtomicU32) -> R) -> Option<R> {
        // SAFETY: the promise of the caller.
        self.copy(at).map(|copy| act(unsafe { &*copy.cast() }))
    }
}

/// Both words, each read whole.
///
/// # Safety
/// `copy` points to a live pair.
#[inline(always)]
unsafe fn look(copy: *mut Pair) -> Pair {
    // SAFETY: live (promise of the caller), and aligned as words are.
    let words: &[AtomicU64; 2] = unsafe { sync::words_at(copy.addr()) };
    words.each_ref().map(|word| word.load(Ordering::Acquire))
}

// SAFETY: all are LOCKed steps, as those of the other seats of the instance (promise of `new`).
unsafe impl Seat for LockedSeat {
    fn cpu(&self) -> CpuId {
        self.cpu
    }

    #[inline(always)]
    unsafe fn take_slot(
        &self,
        at: usize,
        class: u64,
        class_mask: u64,
        _gate: &AtomicU32,
    ) -> Option<Pair> {
        let copy = self.copy(at)?;
        // SAFETY: the pair lives on every CPU that has memory (promise of the caller).
        let peek = || Some(unsafe { look(copy) });
        // SAFETY: as above; all changes are LOCKed steps.
        let replace = |old, new| unsafe { locked::replace_pair(copy, old, new) };
        slots::take_by_replacing(peek, replace, class, class_mask)
    }

    #[inline(always)]
    unsafe fn put_slot(&self, at: usize, run: u64, slot: u64, _gate: &AtomicU32) -> Put {
        let Some(copy) = self.copy(at) else {
            return Put::Elsewhere;
        };
        // SAFETY: as in `take_slot`.
        let peek = || Some(unsafe { look(copy) });
        // SAFETY: as in `take_slot`.
        let replace = |old, new| unsafe { locked::replace_pair(copy, old, new) };
        slots::put_by_replacing(peek, replace, run, slot)
    }

    unsafe fn replace_pair_gated(
        &self,
        at: usize,
        old: Pair,
        new: Pair,
        _gate: &AtomicU32,
    ) -> bool {
        let Some(copy) = self.copy(at) else {
            return false;
        };
        // SAFETY: as in `take_slot`.
        slots::replace_by(|| unsafe { locked::replace_pair(copy, old, new) }, old)
    }

    unsafe fn peek_pair(&self, at: usize) -> Option<Pair> {
        // SAFETY: as in `take_slot`.
        self.copy(at).map(|copy| unsafe { look(copy) })
    }

    #[inline(always)]
    unsafe fn peek_word(&self, at: usize) -> Option<u64> {
        // SAFETY: the promise of the caller.
        unsafe { self.with_word(at, |word| word.load(Ordering::Acquire)) }
    }

    #[inline(always)]
    unsafe fn replace_word(&self, at: usize, old: u64, new: u64) -> bool {
        let replace = |word: &AtomicU64| {
            word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        // SAFETY: the promise of the caller.
        unsafe { self.with_word(at, replace) }.unwrap_or(false)
    }

    #[inline(always)]
    unsafe fn read_link(&self, at: usize) -> u32 {
        // SAFETY: the promise of the caller.
        unsafe { self.with_link(at, |link| link.load(Ordering::Relaxed)) }.unwrap_or(0)
    }

    #[inline(always)]
    unsafe fn write_link(&self, at: usize, link: u32) {
        // SAFETY: the promise of the caller.
        unsafe { self.with_link(at, |copy| copy.store(link, Ordering::Relaxed)) };
    }

    fn remote_pairs(&self) -> RemotePairs {
        RemotePairs::ByLockedStep
    }

    unsafe fn replace_remote_pair(&self, copy: *mut Pair, old: Pair, new: Pair) -> bool {
        // SAFETY: the promise of the caller.
        slots::replace_by(|| unsafe { locked::replace_pair(copy, old, new) }, old)
    }

    fn wait_for_gated(&self) -> Result<(), FenceError> {
        Err(FenceError::Unsupported)
    }
}
