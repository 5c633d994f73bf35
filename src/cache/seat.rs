//! Who works on the runs and stashes of a CPU.

use core::marker::PhantomData;

use crate::alloc_api::Domain;
use crate::sync::AtomicU32;
use crate::this_cpu::{Change, FenceError, LocalOps, Pair, Put, RemotePairs};
use crate::unit::CpuId;

/// Who works on the runs of the CPU that it is on.
///
/// A [`Domain`] has such operations ([`LocalOps`]), and [`Domain::allocate`] and [`Domain::free`] use them. For an instance
/// that is no domain's, who plays its CPUs implements them.
///
/// # Safety
/// Each is what the operation of that name of [`LocalOps`] is, on the pairs of one instance, and nothing changes these
/// pairs in another way.
pub unsafe trait Seat {
    /// The CPU, or the one that the caller was on a moment ago.
    fn cpu(&self) -> CpuId;

    /// [`LocalOps::take_slot`].
    ///
    /// # Safety
    /// As there.
    unsafe fn take_slot(
        &self,
        at: usize,
        class: u64,
        class_mask: u64,
        gate: &AtomicU32,
    ) -> Option<Pair>;

    /// [`LocalOps::put_slot`].
    ///
    /// # Safety
    /// As there.
    unsafe fn put_slot(&self, at: usize, run: u64, slot: u64, gate: &AtomicU32) -> Put;

    /// [`LocalOps::replace_pair_gated`].
    ///
    /// # Safety
    /// As there.
    unsafe fn replace_pair_gated(&self, at: usize, old: Pair, new: Pair, gate: &AtomicU32) -> bool;

    /// [`LocalOps::peek_pair`].
    ///
    /// # Safety
    /// As there.
    unsafe fn peek_pair(&self, at: usize) -> Option<Pair>;

    /// [`LocalOps::peek_word`].
    ///
    /// # Safety
    /// As there.
    unsafe fn peek_word(&self, at: usize) -> Option<u64>;

    /// [`LocalOps::replace_word`].
    ///
    /// # Safety
    /// As there.
    unsafe fn replace_word(&self, at: usize, old: u64, new: u64) -> bool;

    /// [`LocalOps::read`] of a word of 32 bits; whatever is there may be the result.
    ///
    /// # Safety
    /// As there.
    unsafe fn read_link(&self, at: usize) -> u32;

    /// Sets a word of 32 bits, as [`LocalOps::change`] does.
    ///
    /// # Safety
    /// As there.
    unsafe fn write_link(&self, at: usize, link: u32);

    /// [`LocalOps::remote_pairs`].
    fn remote_pairs(&self) -> RemotePairs;

    /// [`LocalOps::replace_remote_pair`].
    ///
    /// # Safety
    /// As there.
    unsafe fn replace_remote_pair(&self, copy: *mut Pair, old: Pair, new: Pair) -> bool;

    /// [`LocalOps::wait_for_gated`].
    ///
    /// # Errors
    /// As there.
    fn wait_for_gated(&self) -> Result<(), FenceError>;
}

/// The CPU that the caller is on, in a domain.
#[derive(Debug, Clone, Copy)]
pub struct Here<D>(PhantomData<D>);

impl<D> Here<D> {
    /// Here.
    ///
    /// # Safety
    /// It is used with the instance of the domain, and no other.
    #[inline]
    pub const unsafe fn new() -> Self {
        Self(PhantomData)
    }
}

// SAFETY: these are the domain's operations, and nothing works on the copies of a domain in another way.
unsafe impl<D: Domain> Seat for Here<D> {
    fn cpu(&self) -> CpuId {
        D::current_cpu()
    }

    #[inline(always)]
    unsafe fn take_slot(
        &self,
        at: usize,
        class: u64,
        class_mask: u64,
        gate: &AtomicU32,
    ) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::take_slot(at, class, class_mask, gate) }
    }

    #[inline(always)]
    unsafe fn put_slot(&self, at: usize, run: u64, slot: u64, gate: &AtomicU32) -> Put {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::put_slot(at, run, slot, gate) }
    }

    unsafe fn replace_pair_gated(&self, at: usize, old: Pair, new: Pair, gate: &AtomicU32) -> bool {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::replace_pair_gated(at, old, new, gate) }
    }

    unsafe fn peek_pair(&self, at: usize) -> Option<Pair> {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::peek_pair(at) }
    }

    #[inline(always)]
    unsafe fn peek_word(&self, at: usize) -> Option<u64> {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::peek_word(at) }
    }

    #[inline(always)]
    unsafe fn replace_word(&self, at: usize, old: u64, new: u64) -> bool {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::replace_word(at, old, new) }
    }

    #[inline(always)]
    unsafe fn read_link(&self, at: usize) -> u32 {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::read(at) }
    }

    #[inline(always)]
    unsafe fn write_link(&self, at: usize, link: u32) {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::change(at, Change::Set(link)) }
    }

    fn remote_pairs(&self) -> RemotePairs {
        D::Ops::remote_pairs()
    }

    unsafe fn replace_remote_pair(&self, copy: *mut Pair, old: Pair, new: Pair) -> bool {
        // SAFETY: the promise of the caller.
        unsafe { D::Ops::replace_remote_pair(copy, old, new) }
    }

    fn wait_for_gated(&self) -> Result<(), FenceError> {
        D::Ops::wait_for_gated()
    }
}
