//! Emptying the caches: what lies idle in runs goes back to the chunks. Before memory grows beyond what it ever was, before a
//! request is refused, and when the owner asks.
//!
//! A run of another CPU is closed when its CPU cannot be at it: by LOCKed steps where all of them are, or behind a gate and a
//! fence.

use lock_api::{MutexGuard, RawMutex};

use super::PerCpuAllocator;
use super::runs::Caches;
use super::state::State;
use crate::backing::Backing;
use crate::cache::{RUNS, Run, STAMPS_AT, Seat};
use crate::request::{AllocFlags, Request};
use crate::sync::Ordering;
use crate::this_cpu::slots::MAP;
use crate::this_cpu::{Pair, RemotePairs};
use crate::unit::GRANULE_BYTES;

/// Idle areas that memory grows in spite of: a quarter of a page, or this share of all memory, as a shift.
const IDLE_SHARE: u32 = 13;

/// Runs that are looked at when memory has grown.
const LOOKS: usize = 16;

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Closes all runs that `seat` can reach: those of all CPUs, or those of its own where other CPUs' pairs are out of reach.
    /// May sleep.
    pub fn drain(&self, seat: &impl Seat) {
        let Some(caches) = &self.caches else {
            return;
        };
        let mut state = self.state.lock();
        self.drain_with(caches, seat, &mut state);
        self.clear_stashes(caches, seat);
        state.sweep_all();
        self.note_due(&state);
    }

    fn drain_with(&self, caches: &Caches, seat: &impl Seat, state: &mut State) {
        state.stats.cache_drains += 1;
        let tables = (0..RUNS).map(|index| caches.table + index * size_of::<Pair>());
        match seat.remote_pairs() {
            RemotePairs::Never => {
                for at in tables {
                    self.close_here(caches, seat, state, at);
                }
            }
            RemotePairs::AfterFence => {
                caches.gate.store(1, Ordering::SeqCst);
                if seat.wait_for_gated().is_ok() {
                    self.for_each_pair(caches, |at, cpu| {
                        let (Some(pair), Some(closed)) = (self.peek(at, cpu), Run::closed(cpu))
                        else {
                            return;
                        };
                        if Run::from_bits(pair[1]).is_open()
                            && let Some(copy) = self.pair_of(at, cpu)
                        {
                            copy[0].store(0, Ordering::Relaxed);
                            copy[1].store(closed.bits(), Ordering::Relaxed);
                            self.retire_run(caches, state, pair);
                        }
                    });
                }
                caches.gate.store(0, Ordering::Release);
            }
            RemotePairs::ByLockedStep => self.for_each_pair(caches, |at, cpu| {
                while let (Some(pair), Some(closed)) = (self.peek(at, cpu), Run::closed(cpu))
                    && Run::from_bits(pair[1]).is_open()
                    && let Ok(copy) = self.units.copy_of(at, cpu)
                {
                    let copy = core::ptr::with_exposed_provenance_mut(copy);
                    // SAFETY: the tables live on this CPU, and are changed by a seat's operations only, by LOCKed steps.
                    if unsafe { seat.replace_remote_pair(copy, pair, [0, closed.bits()]) } {
                        self.retire_run(caches, state, pair);
                    }
                }
            }),
        }
    }

    /// Closes all runs before memory grows beyond what it ever was, if they hold enough to matter: what lies idle in caches is
    /// used rather than more memory.
    pub(super) fn make_caches_lean<'a>(
        &'a self,
        caches: &Caches,
        seat: &impl Seat,
        mut state: MutexGuard<'a, R, State>,
        request: &Request,
        (granules, align): (u32, u32),
    ) -> MutexGuard<'a, R, State> {
        if !may_drain(request)
            || !state.is_at_peak()
            || state.may_grow_unswept()
            || state.has_ready(granules, align)
        {
            return state;
        }
        while state.sweep_lowest() {
            if state.has_ready(granules, align) {
                return state;
            }
        }
        let mut idle = 0;
        self.for_each_run(|run, slots| {
            idle += u64::from(self.idle_in(run, slots) * run.class().len());
        });
        let page = (self.geometry.sizes.page_bytes() / GRANULE_BYTES) as u64;
        if idle > (page / 4).max((state.stats.populated_pages * page) >> IDLE_SHARE) {
            self.drain_with(caches, seat, &mut state);
        }
        state
    }

    /// Closes those of the current CPU's runs that it has not used since they were looked at last: of a few at a time, when memory
    /// has grown.
    pub(super) fn close_unused(&self, caches: &Caches, seat: &impl Seat, state: &mut State) {
        let grown = state.stats.pages_populated;
        if core::mem::replace(&mut state.grown_when_looked, grown) == grown {
            return;
        }
        // Anywhere: however many CPUs grow by turns, each comes to all of its own.
        let first = (grown.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % RUNS;
        for index in (first..first + LOOKS.min(RUNS)).map(|index| index % RUNS) {
            let at = caches.table + index * size_of::<Pair>();
            // SAFETY: as in `refill`.
            let Some([slots, run]) = (unsafe { seat.peek_pair(at) }) else {
                return;
            };
            if !Run::from_bits(run).is_open() || slots & MAP == 0 {
                continue;
            }
            let stamp_at = caches.table + STAMPS_AT + index * size_of::<u32>();
            let stamp = (slots >> 32 ^ slots) as u32;
            // SAFETY: the table lives on every CPU that has memory, as this one has, for it has a run; a hint.
            match unsafe { seat.read_link(stamp_at) } == stamp {
                true => self.close_here(caches, seat, state, at),
                // SAFETY: as above.
                false => unsafe { seat.write_link(stamp_at, stamp) },
            }
        }
    }

    /// Closes the current CPU's run of one kind.
    fn close_here(&self, caches: &Caches, seat: &impl Seat, state: &mut State, at: usize) {
        // SAFETY: as in `refill`.
        while let Some(pair) = unsafe { seat.peek_pair(at) }
            && let run = Run::from_bits(pair[1])
            && run.is_open()
            && let Some(closed) = Run::closed(run.cpu())
        {
            // SAFETY: as in `refill`.
            if unsafe { seat.replace_pair_gated(at, pair, [0, closed.bits()], &caches.gate) } {
                self.retire_run(caches, state, pair);
            }
        }
    }
}

/// Whether a request may wait for the caches to be emptied.
pub(super) fn may_drain(request: &Request) -> bool {
    !request
        .flags
        .intersects(AllocFlags::ATOMIC | AllocFlags::TRY | AllocFlags::RESERVED)
}
