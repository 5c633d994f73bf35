//! Groups CPUs and gives each a unit.
//!
//! Cost: one question to the topology per CPU and group, and one pass over the groups per divisor of the
//! allocation. All tables lie in storage that the caller lends.
//!
//! How the storage is divided, in words of 32 bits, for `n` CPU ids:
//!
//! | table | words | holds |
//! |---|---|---|
//! | `unit_of_cpu` | n | the unit, or `NONE` (while groups are formed: the group) |
//! | `node_of_cpu` | n | the node of a possible CPU |
//! | `cpu_of_unit` | n + n / 3 | the CPU, or `NONE` (while groups are formed: the CPUs without a group) |
//! | `group_first_unit` | n | per group, in order of their lowest CPU |
//! | `group_cpus` | n | the number of CPUs per group |

use super::{
    BootLog, CpuId, FirstChunkKind, FirstChunkSpec, LayoutError, MAX_CPUS, NodeId, Topology,
    UnitId, UnitSizes, sizes::fits,
};

/// No unit, no CPU: an entry of a table without a value.
const NONE: u32 = u32::MAX;

/// At most a third as many units may be unused as CPUs are possible; packing that wastes more is not tried.
const WASTE_DIVISOR: u32 = 3;

/// The storage that a plan for a topology with so many CPU ids borrows, in words of 32 bits.
///
/// ```
/// assert_eq!(pcpu::unit::storage_words(16), 85);
/// let words = [0_u32; pcpu::unit::storage_words(256)]; // may be a static
/// # let _ = words;
/// ```
pub const fn storage_words(nr_cpu_ids: u32) -> usize {
    4 * nr_cpu_ids as usize + most_units(nr_cpu_ids) as usize
}

const fn most_units(nr_cpus: u32) -> u32 {
    nr_cpus.saturating_add(nr_cpus / WASTE_DIVISOR)
}

/// Which CPU has which unit, and how large everything is.
///
/// It prints itself as Linux's boot log: see [`UnitPlan::boot_log`].
///
/// ```
/// use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, UnitId, UnitPlan, storage_words};
///
/// let spec = FirstChunkSpec { static_bytes: 212_992, reserved_bytes: 8192, dyn_bytes: 28_672, ..Default::default() };
/// let mut words = [0; storage_words(6)];
/// let plan = UnitPlan::embed(&spec, &EvenNodes::new(6, 2)?, &mut words)?;
/// assert_eq!(plan.unit_of_cpu(CpuId::new(3)), Some(UnitId::new(4)));
/// assert_eq!(plan.cpu_of_unit(UnitId::new(3)), None);
/// assert_eq!(
///     plan.boot_log().to_string(),
///     "percpu: Embedded 61 pages/cpu s212992 r8192 d28672 u524288\n\
///      pcpu-alloc: s212992 r8192 d28672 u524288 alloc=1*2097152\n\
///      pcpu-alloc: [0] 0 1 2 - [1] 3 4 5 -"
/// );
/// # Ok::<(), pcpu::unit::LayoutError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct UnitPlan<'m> {
    shape: Shape,
    unit_of_cpu: &'m [u32],
    node_of_cpu: &'m [u32],
    cpu_of_unit: &'m [u32],
    group_first_unit: &'m [u32],
    group_cpus: &'m [u32],
}

/// One group of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Group {
    /// Its place among the groups.
    pub index: u32,
    /// Its lowest CPU, which has its first unit.
    pub lowest_cpu: CpuId,
    /// The node of its lowest CPU: its memory comes from there.
    pub node: NodeId,
    /// Its first unit.
    pub first_unit: UnitId,
    /// The number of its units, unused ones included.
    pub nr_units: u32,
    /// The number of its CPUs; they have its first units.
    pub nr_cpus: u32,
}

impl<'m> UnitPlan<'m> {
    /// The plan for areas of large pages, a group's units in one area: what [`crate::embed`] builds.
    ///
    /// # Errors
    /// [`LayoutError`]: a size is misaligned, too small or too large, the topology has no CPU or too many, or
    /// `words` is shorter than [`storage_words`].
    pub fn embed<T: Topology + ?Sized>(
        spec: &FirstChunkSpec,
        topology: &T,
        words: &'m mut [u32],
    ) -> Result<Self, LayoutError> {
        let shape = Shape::embed(spec, topology, words)?;
        Ok(Self::view(shape, words))
    }

    /// The plan for single pages, all CPUs in one group: what [`crate::page`] builds. Atoms are pages and the
    /// dynamic region is the early reserve, whatever `spec` says.
    ///
    /// # Errors
    /// As [`UnitPlan::embed`].
    ///
    /// ```
    /// use pcpu::unit::{EvenNodes, FirstChunkSpec, UnitPlan, storage_words};
    /// let spec = FirstChunkSpec { static_bytes: 212_992, reserved_bytes: 8192, ..Default::default() };
    /// let mut words = [0; storage_words(2)];
    /// let plan = UnitPlan::page(&spec, &EvenNodes::new(2, 2)?, &mut words)?;
    /// assert!(plan.boot_log().to_string().starts_with("percpu: 57 4K pages/cpu s212992 r8192 d12288\n"));
    /// assert_eq!(plan.nr_groups(), 1);
    /// # Ok::<(), pcpu::unit::LayoutError>(())
    /// ```
    pub fn page<T: Topology + ?Sized>(
        spec: &FirstChunkSpec,
        topology: &T,
        words: &'m mut [u32],
    ) -> Result<Self, LayoutError> {
        let shape = Shape::page(spec, topology, words)?;
        Ok(Self::view(shape, words))
    }

    /// The plan for [`crate::embed`] with units of exactly `unit_bytes`, one per allocation: for a home that
    /// has address space to spare and wants the same unit at any number of CPUs. No unit is unused. Atom and
    /// minimum unit of `spec` are not looked at beyond their alignment.
    ///
    /// # Errors
    /// As [`UnitPlan::embed`]; [`LayoutError::UnitTooSmall`] if the regions don't fit,
    /// [`LayoutError::UnitMisaligned`].
    ///
    /// ```
    /// use pcpu::unit::{EvenNodes, FirstChunkSpec, LayoutError, UnitPlan, storage_words};
    /// let spec = FirstChunkSpec { static_bytes: 40_000, ..Default::default() };
    /// let topology = EvenNodes::new(2, 1)?;
    /// let mut words = [0; storage_words(2)];
    /// assert_eq!(UnitPlan::exact(&spec, 256 << 10, &topology, &mut words)?.sizes().unit_bytes(), 262_144);
    /// let error = UnitPlan::exact(&spec, 32 << 10, &topology, &mut words).unwrap_err();
    /// assert_eq!(error, LayoutError::UnitTooSmall { unit_bytes: 32_768, limit_bytes: 53_248 });
    /// # Ok::<(), LayoutError>(())
    /// ```
    pub fn exact<T: Topology + ?Sized>(
        spec: &FirstChunkSpec,
        unit_bytes: usize,
        topology: &T,
        words: &'m mut [u32],
    ) -> Result<Self, LayoutError> {
        let sizes = |_limit| UnitSizes::exact(spec, unit_bytes);
        let shape = Shape::new(FirstChunkKind::Embed, sizes, topology, words)?;
        Ok(Self::view(shape, words))
    }

    /// A plan over the storage in which `shape` was laid out.
    pub(crate) fn view(shape: Shape, words: &'m [u32]) -> Self {
        let (unit_of_cpu, rest) = words.split_at(shape.nr_cpu_ids as usize);
        let (node_of_cpu, rest) = rest.split_at(shape.nr_cpu_ids as usize);
        let (cpu_of_unit, rest) = rest.split_at(most_units(shape.nr_cpu_ids) as usize);
        let (group_first_unit, group_cpus) = rest.split_at(shape.nr_cpu_ids as usize);
        Self {
            shape,
            unit_of_cpu,
            node_of_cpu,
            cpu_of_unit: &cpu_of_unit[..shape.nr_units as usize],
            group_first_unit: &group_first_unit[..shape.nr_groups as usize],
            group_cpus: &group_cpus[..shape.nr_groups as usize],
        }
    }

    /// Which builder the plan is for.
    pub fn kind(&self) -> FirstChunkKind {
        self.shape.kind
    }

    /// The sizes after rounding.
    pub fn sizes(&self) -> &UnitSizes {
        &self.shape.sizes
    }

    /// One more than the highest CPU id that the topology has.
    pub fn nr_cpu_ids(&self) -> u32 {
        self.shape.nr_cpu_ids
    }

    /// The number of possible CPUs.
    pub fn nr_cpus(&self) -> u32 {
        self.shape.nr_cpus
    }

    /// The number of units, unused ones included.
    pub fn nr_units(&self) -> u32 {
        self.shape.nr_units
    }

    /// The number of groups.
    pub fn nr_groups(&self) -> u32 {
        self.shape.nr_groups
    }

    /// The unit of a CPU; `None` if the CPU isn't possible.
    pub fn unit_of_cpu(&self, cpu: CpuId) -> Option<UnitId> {
        self.unit_of_cpu
            .get(cpu.index())
            .filter(|&&unit| unit != NONE)
            .map(|&unit| UnitId::new(unit))
    }

    /// The CPU of a unit; `None` if the unit is unused or there is none of that number.
    pub fn cpu_of_unit(&self, unit: UnitId) -> Option<CpuId> {
        self.cpu_of_unit
            .get(unit.index())
            .filter(|&&cpu| cpu != NONE)
            .map(|&cpu| CpuId::new(cpu))
    }

    /// The node of a CPU; `None` if the CPU isn't possible.
    pub fn node_of_cpu(&self, cpu: CpuId) -> Option<NodeId> {
        self.unit_of_cpu(cpu)
            .map(|_| NodeId::new(self.node_of_cpu[cpu.index()]))
    }

    /// The possible CPUs, ascending.
    pub fn possible_cpus(&self) -> impl Iterator<Item = CpuId> + use<'m> {
        (0..)
            .map(CpuId::new)
            .zip(self.unit_of_cpu)
            .filter(|(_, unit)| **unit != NONE)
            .map(|(cpu, _)| cpu)
    }

    /// The groups, in order of their lowest CPU.
    ///
    /// ```
    /// # use pcpu::unit::{EvenNodes, FirstChunkSpec, UnitPlan, storage_words};
    /// # let mut words = [0; storage_words(10)];
    /// let plan = UnitPlan::embed(&FirstChunkSpec::default(), &EvenNodes::new(10, 2)?, &mut words)?;
    /// assert!(plan.groups().all(|group| group.nr_cpus == 5));
    /// # Ok::<(), pcpu::unit::LayoutError>(())
    /// ```
    pub fn groups(&self) -> impl DoubleEndedIterator<Item = Group> + use<'m> {
        let plan = *self;
        (0..plan.shape.nr_groups).map(move |index| plan.group(index))
    }

    /// The plan as Linux 6.1 prints it at boot.
    pub fn boot_log(&self) -> BootLog<'m> {
        BootLog::new(*self)
    }

    fn group(&self, index: u32) -> Group {
        let first_unit = self.group_first_unit[index as usize];
        let end = self
            .group_first_unit
            .get(index as usize + 1)
            .copied()
            .unwrap_or(self.shape.nr_units);
        let lowest_cpu = self.cpu_of_unit[first_unit as usize];
        Group {
            index,
            lowest_cpu: CpuId::new(lowest_cpu),
            node: NodeId::new(self.node_of_cpu[lowest_cpu as usize]),
            first_unit: UnitId::new(first_unit),
            nr_units: end - first_unit,
            nr_cpus: self.group_cpus[index as usize],
        }
    }
}

/// A plan without its tables: lets a builder lay one out in borrowed storage and take the storage back if it
/// fails.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    kind: FirstChunkKind,
    sizes: UnitSizes,
    nr_cpu_ids: u32,
    nr_cpus: u32,
    nr_units: u32,
    nr_groups: u32,
}

impl Shape {
    pub(crate) fn embed<T: Topology + ?Sized>(
        spec: &FirstChunkSpec,
        topology: &T,
        words: &mut [u32],
    ) -> Result<Self, LayoutError> {
        let sizes = |limit| UnitSizes::packed(spec, FirstChunkKind::Embed, limit);
        Self::new(FirstChunkKind::Embed, sizes, topology, words)
    }

    pub(crate) fn page<T: Topology + ?Sized>(
        spec: &FirstChunkSpec,
        topology: &T,
        words: &mut [u32],
    ) -> Result<Self, LayoutError> {
        let sizes = |limit| UnitSizes::packed(spec, FirstChunkKind::Page, limit);
        Self::new(FirstChunkKind::Page, sizes, &OneGroup(topology), words)
    }

    /// `sizes` is told how many units per allocation are of use at most.
    fn new<T: Topology + ?Sized>(
        kind: FirstChunkKind,
        sizes: impl FnOnce(u32) -> Result<UnitSizes, LayoutError>,
        topology: &T,
        words: &mut [u32],
    ) -> Result<Self, LayoutError> {
        let nr_cpu_ids = topology.nr_cpu_ids();
        if nr_cpu_ids > MAX_CPUS {
            return Err(LayoutError::TooManyCpus {
                nr_cpu_ids: nr_cpu_ids as usize,
            });
        }
        let mut tables = Tables::new(words, nr_cpu_ids)?;
        let nr_cpus = tables.list_cpus(topology);
        if nr_cpus == 0 {
            return Err(LayoutError::NoCpu);
        }
        // A single allocation with more units than this leaves more than a third unused.
        let mut sizes = sizes(most_units(nr_cpus))?;
        let nr_groups = tables.form_groups(topology, nr_cpus);
        let packing = Packing::best(&sizes, &tables.group_cpus[..nr_groups as usize], nr_cpus);
        sizes.set_units_per_alloc(packing.units_per_alloc);
        fits(
            "all units together",
            packing.nr_units() as u128 * sizes.unit_bytes() as u128,
        )?;
        tables.give_units(nr_groups, packing);
        Ok(Self {
            kind,
            sizes,
            nr_cpu_ids,
            nr_cpus,
            nr_units: packing.nr_units(),
            nr_groups,
        })
    }
}

/// The storage while a plan is made; see the head of the file.
struct Tables<'a> {
    unit_of_cpu: &'a mut [u32],
    node_of_cpu: &'a mut [u32],
    cpu_of_unit: &'a mut [u32],
    group_first_unit: &'a mut [u32],
    group_cpus: &'a mut [u32],
}

impl<'a> Tables<'a> {
    fn new(words: &'a mut [u32], nr_cpu_ids: u32) -> Result<Self, LayoutError> {
        let (entries, needed) = (words.len(), storage_words(nr_cpu_ids));
        if entries < needed {
            return Err(LayoutError::StorageTooSmall {
                what: "the plan (32-bit words)",
                entries,
                needed,
            });
        }
        let (unit_of_cpu, rest) = words.split_at_mut(nr_cpu_ids as usize);
        let (node_of_cpu, rest) = rest.split_at_mut(nr_cpu_ids as usize);
        let (cpu_of_unit, rest) = rest.split_at_mut(most_units(nr_cpu_ids) as usize);
        let (group_first_unit, group_cpus) = rest.split_at_mut(nr_cpu_ids as usize);
        unit_of_cpu.fill(NONE);
        node_of_cpu.fill(0);
        Ok(Self {
            unit_of_cpu,
            node_of_cpu,
            cpu_of_unit,
            group_first_unit,
            group_cpus,
        })
    }

    /// Lists the possible CPUs, ascending, in `cpu_of_unit` and notes their nodes. Returns their number.
    fn list_cpus<T: Topology + ?Sized>(&mut self, topology: &T) -> u32 {
        let mut nr_cpus = 0;
        for (cpu, node) in (0..).map(CpuId::new).zip(self.node_of_cpu.iter_mut()) {
            if topology.is_possible(cpu) {
                *node = topology.node(cpu).get();
                self.cpu_of_unit[nr_cpus] = cpu.get();
                nr_cpus += 1;
            }
        }
        nr_cpus as u32
    }

    /// Takes the lowest CPU without a group and all that are local to it, until none is left. Every CPU's group
    /// is left in `unit_of_cpu`. Returns the number of groups.
    fn form_groups<T: Topology + ?Sized>(&mut self, topology: &T, nr_cpus: u32) -> u32 {
        let mut left = nr_cpus as usize;
        let mut group = 0;
        while left > 0 {
            let lowest = CpuId::new(self.cpu_of_unit[0]);
            let mut kept = 0;
            for index in 0..left {
                let cpu = CpuId::new(self.cpu_of_unit[index]);
                if cpu == lowest || topology.is_local(lowest, cpu) {
                    self.unit_of_cpu[cpu.index()] = group;
                } else {
                    self.cpu_of_unit[kept] = cpu.get();
                    kept += 1;
                }
            }
            self.group_cpus[group as usize] = (left - kept) as u32;
            left = kept;
            group += 1;
        }
        group
    }

    /// Replaces every CPU's group by its unit: group by group, the CPUs of a group ascending.
    fn give_units(&mut self, nr_groups: u32, packing: Packing) {
        let mut first_unit = 0;
        for group in 0..nr_groups as usize {
            self.group_first_unit[group] = first_unit;
            first_unit += packing.units_for(self.group_cpus[group]);
            // Counted anew below, as the CPUs come.
            self.group_cpus[group] = 0;
        }
        self.cpu_of_unit.fill(NONE);
        for (cpu, entry) in (0..)
            .zip(self.unit_of_cpu.iter_mut())
            .filter(|(_, entry)| **entry != NONE)
        {
            let group = *entry as usize;
            *entry = self.group_first_unit[group] + self.group_cpus[group];
            self.group_cpus[group] += 1;
            self.cpu_of_unit[*entry as usize] = cpu;
        }
    }
}

/// How the units of all groups lie in allocations.
#[derive(Clone, Copy)]
struct Packing {
    units_per_alloc: u32,
    allocs: u32,
}

impl Packing {
    /// The packing with the fewest allocations, and among those with the fewest units per allocation, that
    /// leaves not too many units unused.
    fn best(sizes: &UnitSizes, group_cpus: &[u32], nr_cpus: u32) -> Self {
        let allowed_units = most_units(nr_cpus);
        let mut best: Option<Self> = None;
        for units_per_alloc in (1..=sizes.units_per_alloc())
            .rev()
            .filter(|&units| sizes.splits_into(units))
        {
            let packing = Self::of(group_cpus, units_per_alloc);
            if packing.nr_units() > allowed_units {
                continue;
            }
            if best.is_some_and(|best| packing.allocs > best.allocs) {
                break;
            }
            best = Some(packing);
        }
        // One unit per allocation is always among those tried, and wastes none.
        best.unwrap_or_else(|| Self::of(group_cpus, 1))
    }

    fn of(group_cpus: &[u32], units_per_alloc: u32) -> Self {
        Self {
            units_per_alloc,
            allocs: group_cpus
                .iter()
                .map(|cpus| cpus.div_ceil(units_per_alloc))
                .sum(),
        }
    }

    fn nr_units(self) -> u32 {
        // At most 8192 groups of at most 10922 + 8191 units each: far from overflow.
        self.allocs * self.units_per_alloc
    }

    fn units_for(self, cpus: u32) -> u32 {
        cpus.next_multiple_of(self.units_per_alloc)
    }
}

/// A topology whose CPUs are all taken as local to each other; their nodes stay.
struct OneGroup<'a, T: ?Sized>(&'a T);

impl<T: Topology + ?Sized> Topology for OneGroup<'_, T> {
    fn nr_cpu_ids(&self) -> u32 {
        self.0.nr_cpu_ids()
    }
    fn is_possible(&self, cpu: CpuId) -> bool {
        self.0.is_possible(cpu)
    }
    fn is_local(&self, _: CpuId, _: CpuId) -> bool {
        true
    }
    fn node(&self, cpu: CpuId) -> NodeId {
        self.0.node(cpu)
    }
}
