//! The first chunk: memory for the CPUs that are there, initial values to read for all others.
//!
//! It is written through the map of physical memory: nobody needs to see the windows while it is built. The initial values of
//! the static and the reserved region are kept, in frames that CPUs that never came share: what a CPU that comes later starts
//! from. The template itself is not needed any more.

use lock_api::RawMutex;

use super::Paging;
use super::cpu::Leaves;
use super::error::{FirstChunkError, InitialError};
use super::frames::Frames;
use super::shootdown::{Shootdown, Stale};
use super::tables::{DIRECTORY_BYTES, ENTRIES, Entry, PAGE_BYTES, Table, page_index, table_index};
use super::windows::{Slot, pages_of, tables_of};
use crate::backing::BackingError;
use crate::unit::{BuildError, CpuId, FirstChunk, NodeId, Template, UnitPlan, check_build};

impl<K: Frames + Shootdown, R: RawMutex> Paging<K, R> {
    /// Builds the first chunk of the plan that this was [set up](Self::new) for. The CPUs for which `is_up` is true have memory
    /// of their own from now on and may use it, with their offsets as GS base; the others have it when they are
    /// [brought up](crate::PerCpuAllocator::bring_up). The boot CPU is brought up too, as soon as the instance is there.
    ///
    /// `unit_offsets` needs an entry per CPU id. The template may go afterwards.
    ///
    /// # Errors
    /// [`FirstChunkError`]; nothing has changed then.
    pub fn build_first_chunk<'m>(
        &mut self,
        plan: UnitPlan<'m>,
        template: Template<'_>,
        unit_offsets: &'m mut [usize],
        is_up: impl Fn(CpuId) -> bool,
    ) -> Result<FirstChunk<'m>, FirstChunkError> {
        self.check_plan(&plan, &template)?;
        check_build(&plan, plan.kind(), &template, unit_offsets)?;
        if let Err(error) = self.build(&plan, &template, is_up) {
            self.windows
                .units()
                .for_each(|slot| self.dismantle_unit(slot));
            self.free_initial_values();
            return Err(error.into());
        }
        for cpu in plan.possible_cpus() {
            let unit = self
                .slot_of_cpu(&plan, cpu)
                .map(|slot| self.windows.address(slot));
            unit_offsets[cpu.index()] = unit.unwrap_or(template.base).wrapping_sub(template.base);
        }
        Ok(FirstChunk::new(plan, template.base, unit_offsets))
    }

    /// Sets what copies in the static and the reserved region hold on CPUs that never came, and start from on those that come:
    /// the initial values of a module's variables. The copies of CPUs that are up are the caller's matter. Zeroes take it back:
    /// before an area of the reserved region is freed.
    ///
    /// # Errors
    /// [`InitialError`]; nothing has changed then.
    ///
    /// # Safety
    /// Meanwhile no CPU is brought up, and nobody reads those copies of CPUs that never came.
    pub unsafe fn set_initial(&self, neutral: usize, values: &[u8]) -> Result<(), InitialError> {
        let (base, limit_bytes) = (self.geometry.neutral_base, self.geometry.initial_bytes);
        let start = neutral.wrapping_sub(base);
        if start > limit_bytes || values.len() > limit_bytes - start {
            return Err(InitialError::Outside {
                neutral,
                bytes: values.len(),
                base,
                limit_bytes,
            });
        }
        if !self.is_built() {
            return Err(InitialError::NoFirstChunk);
        }
        self.write_initial(start, values);
        Ok(())
    }

    fn check_plan(
        &self,
        plan: &UnitPlan<'_>,
        template: &Template<'_>,
    ) -> Result<(), FirstChunkError> {
        let sizes = plan.sizes();
        let compared = [
            (
                "units",
                plan.nr_units() as usize,
                self.windows.units().len(),
            ),
            (
                "bytes of a unit",
                sizes.unit_bytes(),
                self.geometry.unit_bytes,
            ),
            (
                "bytes of the regions",
                sizes.sum_bytes(),
                self.geometry.first_bytes,
            ),
            (
                "bytes with initial values",
                sizes.regions().reserved.end,
                self.geometry.initial_bytes,
            ),
            (
                "the neutral base",
                template.base,
                self.geometry.neutral_base,
            ),
        ];
        for (what, given, set_up_for) in compared {
            if given != set_up_for {
                return Err(FirstChunkError::OtherPlan {
                    what,
                    given,
                    set_up_for,
                });
            }
        }
        match self.is_built() {
            true => Err(FirstChunkError::Again),
            false => Ok(()),
        }
    }

    fn is_built(&self) -> bool {
        let is_own = |slot| !self.windows.is_absent(slot);
        self.initial_tables().len() > 0 || self.windows.units().any(is_own)
    }

    fn slot_of_cpu(&self, plan: &UnitPlan<'_>, cpu: CpuId) -> Option<Slot> {
        // The metadata's window comes first.
        plan.unit_of_cpu(cpu).map(|unit| unit.index() + 1)
    }

    fn build(
        &self,
        plan: &UnitPlan<'_>,
        template: &Template<'_>,
        is_up: impl Fn(CpuId) -> bool,
    ) -> Result<(), BuildError<BackingError>> {
        let units = self.windows.units();
        self.make_initial_values()
            .map_err(|error| BuildError::Window {
                window_bytes: units.len() * DIRECTORY_BYTES,
                error,
            })?;
        self.write_initial(0, template.bytes);
        for cpu in plan.possible_cpus().filter(|&cpu| is_up(cpu)) {
            let node = plan.node_of_cpu(cpu).unwrap_or(self.geometry.node);
            if let Some(slot) = self.slot_of_cpu(plan, cpu) {
                self.build_unit(slot, node)
                    .map_err(|(page, error)| BuildError::Page { cpu, page, error })?;
            }
        }
        self.flush_units();
        Ok(())
    }

    fn flush_units(&self) {
        let units = self.windows.units();
        self.flush(Stale::range(
            self.windows.address(units.start),
            units.len() * DIRECTORY_BYTES,
        ));
    }

    /// Gives the absent directory tables and frames for initial values.
    fn make_initial_values(&self) -> Result<(), BackingError> {
        let (physical, node) = (self.pool.physical, self.geometry.node);
        let absent = self.windows.absent_directory();
        for index in tables_of(0..self.geometry.initial_bytes) {
            let table = self.pool.table(node)?;
            physical.copy_entries(self.windows.zero_table(), table);
            physical.set(absent, index, Entry::shared_table(table));
        }
        for page in pages_of(0, self.geometry.initial_bytes) {
            let frame = self.pool.zeroed(node)?;
            if let Some(table) = self.windows.table(absent, page) {
                physical.set(table, page_index(page), Entry::shared_page(frame));
            }
        }
        Ok(())
    }

    /// The tables of the absent directory that are there for initial values.
    fn initial_tables(&self) -> impl ExactSizeIterator<Item = (usize, Table)> {
        let entry = |index| {
            let absent = self.windows.absent_directory();
            let table = self.pool.physical.get(absent, index).below();
            table.filter(|&table| table != self.windows.zero_table())
        };
        // They are the first ones.
        let count = (0..ENTRIES)
            .take_while(|&index| entry(index).is_some())
            .count();
        let zeroes = self.windows.zero_table();
        (0..count).map(move |index| (index, entry(index).unwrap_or(zeroes)))
    }

    pub(super) fn free_initial_values(&self) {
        let physical = self.pool.physical;
        let mut out = self.pool.chain();
        for (index, table) in self.initial_tables() {
            let zeroes = Entry::shared_table(self.windows.zero_table());
            physical.set(self.windows.absent_directory(), index, zeroes);
            for page in 0..ENTRIES {
                let frame = physical.get(table, page).frame();
                if let Some(frame) = frame.filter(|&frame| frame != self.windows.zero_frame()) {
                    // SAFETY: a frame of initial values, which nobody needs any more; flushed below.
                    unsafe { out.push(frame) };
                }
            }
            physical.set(table, 0, Entry::EMPTY);
            // SAFETY: it came from the pool; flushed below.
            unsafe { out.push(table.frame()) };
        }
        if !out.is_empty() {
            self.flush_units();
        }
    }

    /// Writes initial values, `start` bytes into the unit.
    fn write_initial(&self, start: usize, values: &[u8]) {
        let mut at = start;
        let mut left = values;
        while !left.is_empty() {
            let in_page = at % PAGE_BYTES;
            let (now, later) = left.split_at(left.len().min(PAGE_BYTES - in_page));
            let page = self.pool.physical.bytes(self.windows.absent_frame(at));
            // SAFETY: a frame of initial values, mapped writable there; callers see to it that nobody reads it now.
            unsafe {
                page.add(in_page)
                    .copy_from_nonoverlapping(now.as_ptr(), now.len())
            };
            at += now.len();
            left = later;
        }
    }

    /// Gives a unit the first chunk's pages, filled; elsewhere in its window all is as on a CPU that never came. What page
    /// could not be had, if any.
    fn build_unit(&self, slot: Slot, node: NodeId) -> Result<(), (usize, BackingError)> {
        let physical = self.pool.physical;
        let absent = self.windows.absent_directory();
        let directory = self.pool.table(node).map_err(|error| (0, error))?;
        physical.copy_entries(absent, directory);
        let first_bytes = self.geometry.first_bytes;
        let fill = || {
            for (number, page) in pages_of(0, first_bytes).enumerate() {
                let lacks = |error| (number, error);
                let table = match self.windows.table(directory, page) {
                    Some(table) if self.windows.table(absent, page) != Some(table) => table,
                    shared => {
                        let table = self.pool.table(node).map_err(lacks)?;
                        physical.copy_entries(shared.unwrap_or(self.windows.zero_table()), table);
                        physical.set(directory, table_index(page), Entry::table(table));
                        table
                    }
                };
                let frame = self.pool.zeroed(node).map_err(lacks)?;
                let initial = self.windows.absent_frame(page);
                if initial != self.windows.zero_frame() {
                    physical.copy(initial, frame);
                }
                physical.set(table, page_index(page), Entry::page(frame));
            }
            Ok(())
        };
        let filled = fill();
        match filled {
            Ok(()) => self.windows.show_directory(slot, directory),
            Err(_) => self.free_built(directory, Leaves::Free),
        }
        filled
    }
}
