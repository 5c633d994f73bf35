//! A plan, printed as Linux 6.1 prints its own at boot, so that the two can be compared line by line.
//!
//! There is no time stamp, no blank at the end of a line and no newline after the last. Shape of the lines:
//! - the CPU ids of a line are padded with zeroes to the width of the *number* of possible CPUs, a unit without a
//!   CPU is as many dashes, group numbers are padded to the width of the number of groups;
//! - a group mark stands before each allocation, and a line holds a power of two of allocations, as many as keep
//!   it near [`LINE_COLUMNS`]. Both rules reproduce every boot log in `tests/data`.

use core::fmt;

use super::{FirstChunkKind, UnitId, UnitPlan, UnitSizes};

/// The width that a line's allocations are fitted into (the line's prefix is not counted).
const LINE_COLUMNS: u32 = 60;

/// A plan as the boot log shows it: the first line and the `pcpu-alloc:` lines. Made by [`UnitPlan::boot_log`].
///
/// ```
/// use pcpu::unit::{EvenNodes, FirstChunkSpec, UnitPlan, storage_words};
/// let mut words = [0; storage_words(3)];
/// let plan = UnitPlan::embed(&FirstChunkSpec::default(), &EvenNodes::new(3, 1)?, &mut words)?;
/// let log = plan.boot_log();
/// assert_eq!(log.first_line().to_string(), "percpu: Embedded 3 pages/cpu s0 r0 d12288 u524288");
/// assert_eq!(
///     log.alloc_lines().to_string(),
///     "pcpu-alloc: s0 r0 d12288 u524288 alloc=1*2097152\npcpu-alloc: [0] 0 1 2 -"
/// );
/// assert_eq!(log.to_string(), format!("{}\n{}", log.first_line(), log.alloc_lines()));
/// # Ok::<(), pcpu::unit::LayoutError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct BootLog<'m> {
    plan: UnitPlan<'m>,
}

/// The line that names the builder and the pages per CPU.
#[derive(Clone, Copy, Debug)]
pub struct FirstLine {
    kind: FirstChunkKind,
    sizes: UnitSizes,
}

/// The lines that start with `pcpu-alloc:`.
#[derive(Clone, Copy, Debug)]
pub struct AllocLines<'m> {
    plan: UnitPlan<'m>,
}

impl<'m> BootLog<'m> {
    pub(super) fn new(plan: UnitPlan<'m>) -> Self {
        Self { plan }
    }

    /// The line that names the builder.
    pub fn first_line(&self) -> FirstLine {
        FirstLine {
            kind: self.plan.kind(),
            sizes: *self.plan.sizes(),
        }
    }

    /// The lines with the sizes, the groups and their units.
    pub fn alloc_lines(&self) -> AllocLines<'m> {
        AllocLines { plan: self.plan }
    }
}

impl fmt::Display for BootLog<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.first_line())?;
        write!(f, "{}", self.alloc_lines())
    }
}

impl fmt::Display for FirstLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = &self.sizes;
        let (s, r, d) = (
            sizes.static_bytes(),
            sizes.reserved_bytes(),
            sizes.dyn_bytes(),
        );
        match self.kind {
            FirstChunkKind::Embed => {
                let (pages, u) = (sizes.populated_pages(), sizes.unit_bytes());
                write!(f, "percpu: Embedded {pages} pages/cpu s{s} r{r} d{d} u{u}")
            }
            // All pages of a unit are counted here, also those of a tail.
            FirstChunkKind::Page => {
                let (pages, page_kib) = (sizes.unit_pages(), sizes.page_bytes() >> 10);
                write!(f, "percpu: {pages} {page_kib}K pages/cpu s{s} r{r} d{d}")
            }
        }
    }
}

impl fmt::Display for AllocLines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = self.plan.sizes();
        write!(
            f,
            "pcpu-alloc: s{} r{} d{} u{} alloc={}*{}",
            sizes.static_bytes(),
            sizes.reserved_bytes(),
            sizes.dyn_bytes(),
            sizes.unit_bytes(),
            sizes.alloc_bytes() / sizes.atom_bytes(),
            sizes.atom_bytes(),
        )?;
        let columns = Columns::of(&self.plan);
        let mut alloc = 0;
        for group in self.plan.groups() {
            for first_unit in (0..group.nr_units).step_by(sizes.units_per_alloc() as usize) {
                f.write_str(if alloc % columns.allocs_per_line == 0 {
                    "\npcpu-alloc: "
                } else {
                    " "
                })?;
                write!(f, "[{:0width$}]", group.index, width = columns.group_digits)?;
                for unit in first_unit..first_unit + sizes.units_per_alloc() {
                    self.unit(
                        f,
                        UnitId::new(group.first_unit.get() + unit),
                        columns.cpu_digits,
                    )?;
                }
                alloc += 1;
            }
        }
        Ok(())
    }
}

impl AllocLines<'_> {
    fn unit(&self, f: &mut fmt::Formatter<'_>, unit: UnitId, digits: usize) -> fmt::Result {
        match self.plan.cpu_of_unit(unit) {
            Some(cpu) => write!(f, " {:0digits$}", cpu.get()),
            None => write!(f, " {:-<digits$}", ""),
        }
    }
}

/// The widths of a plan's lines.
struct Columns {
    cpu_digits: usize,
    group_digits: usize,
    allocs_per_line: u32,
}

impl Columns {
    fn of(plan: &UnitPlan<'_>) -> Self {
        let (cpu_digits, group_digits) = (digits(plan.nr_cpus()), digits(plan.nr_groups()));
        // "[g] " and, per unit, a CPU and a blank.
        let alloc_columns = group_digits + 3 + plan.sizes().units_per_alloc() * (cpu_digits + 1);
        let fitting = (LINE_COLUMNS / alloc_columns).max(1);
        Self {
            cpu_digits: cpu_digits as usize,
            group_digits: group_digits as usize,
            allocs_per_line: 1 << fitting.ilog2(),
        }
    }
}

fn digits(number: u32) -> u32 {
    number.checked_ilog10().unwrap_or(0) + 1
}
