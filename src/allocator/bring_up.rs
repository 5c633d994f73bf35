//! CPUs that come up: their copies get memory of their own.
//!
//! Pages are populated, zeroed and initialised on the CPUs that have ever been online. When another one comes, the backing
//! makes ready what it takes besides pages, and its copy of the first chunk; then a new set that has it takes the place of
//! the set that pages are populated for, so that from then on every new page has it (a set never changes while a call uses
//! it); once the calls that began before have ended, the pages of old are populated for it. Meanwhile no page loses its
//! memory. At the end the CPU counts as materialised, and is zeroed like the others when an area is handed out.

use lock_api::RawMutex;

use super::PerCpuAllocator;
use super::serve::zero_area;
use crate::backing::{Backing, BackingError, Context, CpuArea, PageSpan};
use crate::chunk::{MAX_MASK_PAGES, PageMask};
use crate::cpus::Cpus;
use crate::places::Place;
use crate::request::CpuError;
use crate::unit::{Contents, CpuId, NodeId};

impl<B: Backing, R: RawMutex> PerCpuAllocator<B, R> {
    /// Materialises `cpu`: gives its copies memory. To be called before the CPU uses any of them, or before another
    /// CPU writes to them. A CPU that is materialised already stays so: going offline takes nothing away.
    ///
    /// It may sleep, but where the backing's memory [comes with the first touch](Backing::comes_with_touch), as in a
    /// process: there it takes no lock.
    ///
    /// # Errors
    /// [`CpuError::NotPossible`], or [`CpuError::NoMemory`]; then the CPU is not materialised and nothing has changed.
    pub fn bring_up(&self, cpu: CpuId) -> Result<(), CpuError> {
        self.per_cpu_address(0, cpu)?;
        if self.backing.comes_with_touch() {
            // The copies of a CPU that never ran are zero wherever an area may be handed out.
            self.units
                .populated_for
                .iter()
                .for_each(|cpus| cpus.insert(cpu));
            self.units.materialised().insert(cpu);
            return Ok(());
        }
        let mut state = self.lock_to_work();
        while state.is_bring_up || state.is_other_phase_busy() {
            drop(state);
            self.backing.relax();
            state = self.lock_to_work();
        }
        if self.units.materialised().contains(cpu) {
            return Ok(());
        }
        state.is_bring_up = true;
        drop(state);
        let unit = self.first_unit(cpu);
        // SAFETY: the CPU is not materialised, and one is brought up at a time.
        if let Err(error) = unsafe { self.backing.begin_cpu(unit) } {
            self.state.lock().is_bring_up = false;
            return Err(CpuError::NoMemory { cpu, error });
        }
        state = self.state.lock();
        // Nobody uses the other set: no work of the other phase is under way.
        let now = state.phase();
        self.units.populated_for[1 - now].copy_with(&self.units.populated_for[now], cpu);
        state.change_phase();
        drop(state);

        self.wait_for_other_phase();
        let populated = self.for_each_populated(cpu, |span| {
            // SAFETY: the pages are populated, on this CPU at most by work that began since; it does not use them yet.
            if unsafe { self.backing.populate(span, Context::MaySleep)? } == Contents::Dirty {
                span.areas().for_each(zero_area);
            }
            Ok(())
        });
        match populated {
            Ok(()) => {
                // SAFETY: begun above, and all populated pages have memory on the CPU.
                unsafe { self.backing.finish_cpu(unit) };
                self.units.materialised().insert(cpu);
            }
            Err(_) => {
                self.undo_bring_up(cpu);
                // SAFETY: begun above; the pages are without memory again, and no set has the CPU.
                unsafe { self.backing.cancel_cpu(unit) };
            }
        }
        self.state.lock().is_bring_up = false;
        populated.map_err(|error| CpuError::NoMemory { cpu, error })
    }

    /// A possible CPU's copy of the first chunk.
    fn first_unit(&self, cpu: CpuId) -> CpuArea {
        CpuArea {
            cpu,
            node: self.units.node(cpu).unwrap_or(NodeId::new(0)),
            address: self
                .neutral_base()
                .wrapping_add(self.units.offset(cpu).unwrap_or(0)),
            bytes: self.geometry.sizes.unit_bytes(),
        }
    }

    fn undo_bring_up(&self, cpu: CpuId) {
        // Back to the set without the CPU, which nobody has changed.
        self.state.lock().change_phase();
        self.wait_for_other_phase();
        let undone = self.for_each_populated(cpu, |span| {
            // SAFETY: the CPU never was materialised, so nothing uses its copies.
            unsafe { self.backing.depopulate(span) };
            Ok(())
        });
        debug_assert_eq!(undone, Ok(()));
    }

    /// Waits until the work that began before the last change of phase has ended.
    fn wait_for_other_phase(&self) {
        while self.state.lock().is_other_phase_busy() {
            self.backing.relax();
        }
    }

    /// Calls `act` for `cpu`'s part of all pages that have memory, but those of the first chunk.
    fn for_each_populated<'a>(
        &'a self,
        cpu: CpuId,
        mut act: impl FnMut(PageSpan<'a>) -> Result<(), BackingError>,
    ) -> Result<(), BackingError> {
        let places = self.state.lock().directory.used_places();
        for place in places {
            let mut from = 0;
            while let Some(pages) = self.pages_to_populate(place, from) {
                from += MAX_MASK_PAGES;
                if !pages.is_empty() {
                    act(self.span(place, pages, Cpus::One(cpu)))?;
                }
            }
        }
        Ok(())
    }

    /// The populated pages of the chunk at `place` from page `from` on, counted in the unit; `None` behind the last.
    fn pages_to_populate(&self, place: u32, from: u32) -> Option<PageMask> {
        let state = self.state.lock();
        let Place::Chunk(chunk) = state.directory.get(place) else {
            return None;
        };
        let body = state.body(chunk);
        Some(body.unit_pages(body.populated_pages(from)?))
    }
}
