//! An instance at rest: locked, with nothing under way without the lock. A copy of its memory that is taken then, as
//! `fork` takes one, is an instance by itself: no page is claimed in it and no place kept for somebody who is not there.
//!
//! What begins work without the lock asks first whether rest is wanted, so that a busy instance comes to rest as soon as
//! what is under way has ended.

use lock_api::{MutexGuard, RawMutex};

use super::PerCpuAllocator;
use super::state::State;
use crate::backing::Backing;

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// The lock, when work without it may begin.
    pub(super) fn lock_to_work(&self) -> MutexGuard<'_, R, State> {
        self.until_work_may_begin(self.state.lock())
    }

    /// Gives the lock up and takes it again until nobody wants the instance to rest.
    pub(super) fn until_work_may_begin<'a>(
        &'a self,
        mut state: MutexGuard<'a, R, State>,
    ) -> MutexGuard<'a, R, State> {
        while state.rest_wanted > 0 {
            drop(state);
            self.backing.relax();
            state = self.state.lock();
        }
        state
    }
}

#[cfg(all(feature = "std", target_os = "linux"))]
impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Waits until the instance is at rest, and keeps it so, with its lock, until [`end_rest`](Self::end_rest).
    pub(crate) fn rest(&self) {
        if let Some(hardened) = &self.hardened {
            hardened.rest();
        }
        let mut state = self.state.lock();
        state.rest_wanted += 1;
        while !state.is_at_rest() {
            drop(state);
            self.backing.relax();
            state = self.state.lock();
        }
        state.rest_wanted -= 1;
        core::mem::forget(state);
    }

    /// Ends a rest.
    ///
    /// # Safety
    /// The caller's thread called [`rest`](Self::rest), and has not ended it.
    pub(crate) unsafe fn end_rest(&self) {
        // SAFETY: `rest` took the locks on this thread and kept them (promise of the caller).
        unsafe {
            self.state.force_unlock();
            self.hardened
                .iter()
                .for_each(|hardened| hardened.end_rest());
        }
    }

    /// Ends a rest in a copy of the instance that this thread alone is left to.
    ///
    /// # Safety
    /// As [`end_rest`](Self::end_rest), of the original; and no other thread uses this copy yet.
    pub(crate) unsafe fn end_rest_alone(&self) {
        // SAFETY: the lock is held (promise of the caller), by the only thread that there is.
        let state = unsafe { &mut *self.state.data_ptr() };
        // Threads of the original that waited for a rest of their own are not here.
        state.rest_wanted = 0;
        // Nor are those that had freed an area, and were about to say so.
        (0..state.directory.used_places().end).for_each(|place| self.places.note_all(place));
        if let Some(caches) = &self.caches {
            caches.cells.share_all();
        }
        // SAFETY: as in `end_rest`.
        unsafe { self.end_rest() };
    }
}
