//! CPUs that come up: their copies get memory of their own.
//!
//! Pages are populated, zeroed and initialised on the CPUs that have ever been online. When another one comes, it is
//! first added to the set that pages are populated for, so that from then on every new page has it; once the calls
//! that began before have ended, the pages of old are populated for it one run after the other. Meanwhile no page
//! loses its memory. At the end the CPU counts as materialised, and is zeroed like the others when an area is
//! handed out.

use core::ops::Range;

use lock_api::RawMutex;

use super::PerCpuAllocator;
use super::serve::zero_area;
use crate::backing::{Backing, BackingError, Context, PageSpan};
use crate::cpus::Cpus;
use crate::directory::Place;
use crate::request::CpuError;
use crate::unit::{Contents, CpuId};

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Materialises `cpu`: gives its copies memory. To be called before the CPU uses any of them, or before another
    /// CPU writes to them. A CPU that is materialised already stays so: going offline takes nothing away.
    ///
    /// It may sleep.
    ///
    /// # Errors
    /// [`CpuError::NotPossible`], or [`CpuError::NoMemory`]; then the CPU is not materialised and nothing has changed.
    pub fn bring_up(&self, cpu: CpuId) -> Result<(), CpuError> {
        self.per_cpu_address(0, cpu)?;
        let mut state = self.state.lock();
        while state.bring_up {
            drop(state);
            self.backing.relax();
            state = self.state.lock();
        }
        if self.units.materialised().contains(cpu) {
            return Ok(());
        }
        state.bring_up = true;
        self.units.populated_for.insert(cpu);
        state.next_phase();
        drop(state);

        self.wait_for_old_phase();
        let populated = self.for_each_populated(cpu, |span| {
            if self.backing.populate(span, Context::MaySleep)? == Contents::Dirty {
                span.areas().for_each(zero_area);
            }
            Ok(())
        });
        match populated {
            Ok(()) => self.units.materialised().insert(cpu),
            Err(_) => self.undo_bring_up(cpu),
        }
        self.state.lock().bring_up = false;
        populated.map_err(|error| CpuError::NoMemory { cpu, error })
    }

    fn undo_bring_up(&self, cpu: CpuId) {
        let mut state = self.state.lock();
        self.units.populated_for.remove(cpu);
        state.next_phase();
        drop(state);
        self.wait_for_old_phase();
        let undone = self.for_each_populated(cpu, |span| {
            // SAFETY: the CPU never was materialised, so nothing uses its copies.
            unsafe { self.backing.depopulate(span) };
            Ok(())
        });
        debug_assert_eq!(undone, Ok(()));
    }

    /// Waits until the populating calls that began before the last change of `populated_for` have ended.
    fn wait_for_old_phase(&self) {
        while self.state.lock().is_old_phase_busy() {
            self.backing.relax();
        }
    }

    /// Calls `act` for `cpu`'s part of all pages that have memory, but those of the first chunk.
    fn for_each_populated<'a>(
        &'a self,
        cpu: CpuId,
        mut act: impl FnMut(PageSpan<'a>) -> Result<(), BackingError>,
    ) -> Result<(), BackingError> {
        for place in 1..self.geometry.window.chunks {
            let mut from = 0;
            while let Some((pages, unit_pages)) = self.next_populated(place, from) {
                from = pages.end;
                act(self.span(place, unit_pages, Cpus::One(cpu)))?;
            }
        }
        Ok(())
    }

    /// The next run of pages with memory of the chunk at `place`: as pages of its map, and of the unit.
    fn next_populated(&self, place: u32, from: u32) -> Option<(Range<u32>, Range<u32>)> {
        let state = self.state.lock();
        let Place::Chunk(chunk) = state.directory.get(place) else {
            return None;
        };
        let body = state.body(chunk);
        let pages = body.next_populated(from)?;
        Some((
            pages.clone(),
            body.unit_page(pages.start)..body.unit_page(pages.end),
        ))
    }
}
