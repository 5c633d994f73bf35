//! Sets of CPUs, and the run-time table of units: which CPUs are possible, where each CPU's unit lies, and on which
//! node.
//!
//! `address in a CPU's unit = neutral address + unit offset of the CPU` holds for every chunk, the first one included.
//! The table is written once, at set-up, and never changes.

use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use crate::metadata::{BlockLayout, MetaSlice};
use crate::request::CpuError;
use crate::unit::{CpuId, FirstChunk, NodeId};

/// The offset that marks a CPU that is not possible: odd, while units are at least granule aligned.
const NOT_POSSIBLE: usize = 1;

/// A set of CPUs that any CPU may read while another adds to it.
pub struct CpuSet {
    words: MetaSlice<AtomicU64Word>,
}

/// An atomic word that can be laid out many times.
#[derive(Debug, Default)]
#[repr(transparent)]
struct AtomicU64Word(AtomicU64);

impl Clone for AtomicU64Word {
    fn clone(&self) -> Self {
        Self(AtomicU64::new(self.0.load(Ordering::Relaxed)))
    }
}

impl CpuSet {
    /// A set that no CPU can be in.
    #[cfg(all(feature = "std", target_os = "linux"))]
    const fn empty() -> Self {
        Self {
            words: MetaSlice::empty(),
        }
    }

    fn words_for(nr_cpu_ids: u32) -> usize {
        nr_cpu_ids.div_ceil(u64::BITS) as usize
    }

    /// Whether `cpu` is in the set.
    #[inline]
    pub fn contains(&self, cpu: CpuId) -> bool {
        self.words
            .get(cpu.index() / 64)
            .is_some_and(|word| word.0.load(Ordering::Acquire) >> (cpu.get() % 64) & 1 != 0)
    }

    /// The CPUs of the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = CpuId> + '_ {
        self.words.iter().enumerate().flat_map(|(index, word)| {
            let mut bits = word.0.load(Ordering::Acquire);
            core::iter::from_fn(move || {
                let bit = (bits != 0).then(|| bits.trailing_zeros())?;
                bits &= bits - 1;
                Some(CpuId::new(index as u32 * u64::BITS + bit))
            })
        })
    }

    /// How many CPUs the set has.
    pub fn count(&self) -> u32 {
        self.words
            .iter()
            .map(|word| word.0.load(Ordering::Acquire).count_ones())
            .sum()
    }

    pub(crate) fn insert(&self, cpu: CpuId) {
        self.words[cpu.index() / 64]
            .0
            .fetch_or(1 << (cpu.get() % 64), Ordering::AcqRel);
        // Who sees what the CPU writes from now on sees it in the set.
        fence(Ordering::Release);
    }

    /// Makes the set equal to `other` and `cpu`.
    pub(crate) fn copy_with(&self, other: &Self, cpu: CpuId) {
        for (word, from) in self.words.iter().zip(other.words.iter()) {
            word.0
                .store(from.0.load(Ordering::Acquire), Ordering::Release);
        }
        self.insert(cpu);
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// The CPUs that a backing call is about.
#[derive(Debug, Clone, Copy)]
pub enum Cpus<'a> {
    /// All CPUs of a set.
    Set(&'a CpuSet),
    /// One CPU.
    One(CpuId),
}

impl<'a> Cpus<'a> {
    /// The CPUs, in order.
    pub fn iter(self) -> impl Iterator<Item = CpuId> + 'a {
        let (set, one) = match self {
            Self::Set(set) => (Some(set), None),
            Self::One(cpu) => (None, Some(cpu)),
        };
        set.into_iter().flat_map(CpuSet::iter).chain(one)
    }
}

/// Layout of a [`Units`] table in a metadata block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UnitsLayout {
    nr_cpu_ids: u32,
    offsets_at: usize,
    nodes_at: usize,
    possible_at: usize,
    online_at: usize,
    populated_at: [usize; 2],
    with_runs_at: usize,
}

impl UnitsLayout {
    pub(crate) fn add(
        block: &mut BlockLayout,
        nr_cpu_ids: u32,
    ) -> Result<Self, core::alloc::LayoutError> {
        let words = CpuSet::words_for(nr_cpu_ids);
        Ok(Self {
            nr_cpu_ids,
            offsets_at: block.array::<usize>(nr_cpu_ids as usize)?,
            nodes_at: block.array::<u32>(nr_cpu_ids as usize)?,
            possible_at: block.array::<AtomicU64Word>(words)?,
            online_at: block.array::<AtomicU64Word>(words)?,
            populated_at: [
                block.array::<AtomicU64Word>(words)?,
                block.array::<AtomicU64Word>(words)?,
            ],
            with_runs_at: block.array::<AtomicU64Word>(words)?,
        })
    }
}

/// Where the arrays of a [`Units`] lie, for another build of this crate to read: nothing in it depends on how Rust lays out
/// its types.
#[cfg(all(feature = "std", target_os = "linux"))]
#[derive(Debug)]
#[repr(C)]
pub(crate) struct UnitTables {
    /// The length of the next two; the sets have a bit for each, in words of 64.
    nr_cpu_ids: usize,
    offsets: *const usize,
    nodes: *const u32,
    possible: *const AtomicU64Word,
    materialised: *const AtomicU64Word,
}

/// Where every CPU's unit lies.
#[derive(Debug)]
pub struct Units {
    offsets: MetaSlice<usize>,
    nodes: MetaSlice<u32>,
    possible: CpuSet,
    materialised: CpuSet,
    /// The CPUs that pages are populated for: the materialised ones, and one that is on its way to become one. Of the two
    /// sets one is in use and does not change meanwhile; bringing up a CPU fills the other and changes over.
    pub(crate) populated_for: [CpuSet; 2],
    /// The CPUs whose caches have ever had a run: nobody needs to look into those of others.
    pub(crate) with_runs: CpuSet,
    /// Whether the copies of a CPU that is not materialised take memory when they are looked at.
    pub(crate) comes_with_touch: bool,
}

impl Units {
    /// Copies the table out of what a builder made.
    ///
    /// # Safety
    /// `block` was allocated with the layout that `layout` was added to, and nothing else uses this part of it while
    /// the table lives.
    pub(crate) unsafe fn new(
        block: NonNull<u8>,
        layout: &UnitsLayout,
        first_chunk: &FirstChunk<'_>,
        comes_with_touch: bool,
    ) -> Self {
        let len = layout.nr_cpu_ids as usize;
        let words = CpuSet::words_for(layout.nr_cpu_ids);
        // SAFETY: the offsets come from laying these arrays out in this block (promise of the caller).
        let mut units = unsafe {
            Self {
                offsets: MetaSlice::new(block, layout.offsets_at, len, NOT_POSSIBLE),
                nodes: MetaSlice::new(block, layout.nodes_at, len, 0),
                possible: CpuSet {
                    words: MetaSlice::new(
                        block,
                        layout.possible_at,
                        words,
                        AtomicU64Word::default(),
                    ),
                },
                materialised: CpuSet {
                    words: MetaSlice::new(block, layout.online_at, words, AtomicU64Word::default()),
                },
                populated_for: layout.populated_at.map(|at| CpuSet {
                    words: MetaSlice::new(block, at, words, AtomicU64Word::default()),
                }),
                with_runs: CpuSet {
                    words: MetaSlice::new(
                        block,
                        layout.with_runs_at,
                        words,
                        AtomicU64Word::default(),
                    ),
                },
                comes_with_touch,
            }
        };
        let plan = first_chunk.plan();
        for cpu in plan.possible_cpus() {
            units.offsets[cpu.index()] = first_chunk.unit_offset(cpu).unwrap_or(NOT_POSSIBLE);
            units.nodes[cpu.index()] = plan.node_of_cpu(cpu).map_or(0, NodeId::get);
            units.possible.insert(cpu);
        }
        units
    }

    /// Where the arrays lie.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(crate) fn tables(&self) -> UnitTables {
        UnitTables {
            nr_cpu_ids: self.offsets.len(),
            offsets: self.offsets.as_ptr(),
            nodes: self.nodes.as_ptr(),
            possible: self.possible.words.as_ptr(),
            materialised: self.materialised.words.as_ptr(),
        }
    }

    /// A view of the units of another build of this crate: to read, and to see CPUs come up.
    ///
    /// # Safety
    /// The tables are those of [`tables`](Self::tables), of units that stay for good.
    #[cfg(all(feature = "std", target_os = "linux"))]
    pub(crate) unsafe fn of_tables(tables: &UnitTables) -> Self {
        let len = tables.nr_cpu_ids;
        let words = CpuSet::words_for(len as u32);
        // SAFETY: the arrays have these lengths and stay for good (promise of the caller); all that is done with them here is
        // to read them, the words of the sets one by one.
        unsafe {
            Self {
                offsets: MetaSlice::view(tables.offsets, len),
                nodes: MetaSlice::view(tables.nodes, len),
                possible: CpuSet {
                    words: MetaSlice::view(tables.possible, words),
                },
                materialised: CpuSet {
                    words: MetaSlice::view(tables.materialised, words),
                },
                populated_for: [const { CpuSet::empty() }; 2],
                with_runs: CpuSet::empty(),
                // Modules are a process's.
                comes_with_touch: true,
            }
        }
    }

    /// What shifts a neutral address to `cpu`'s copy: `copy = neutral + offset`, wrapping. `None` if `cpu` is not
    /// possible.
    #[inline]
    pub fn offset(&self, cpu: CpuId) -> Option<usize> {
        self.offsets
            .get(cpu.index())
            .copied()
            .filter(|&offset| offset != NOT_POSSIBLE)
    }

    /// [`offset`](Self::offset) of a CPU whose copies have memory of their own.
    #[inline]
    pub(crate) fn materialised_offset(&self, cpu: CpuId) -> Option<usize> {
        self.materialised
            .contains(cpu)
            .then(|| self.offset(cpu))
            .flatten()
    }

    /// `cpu`'s copy of what is at a neutral address: one addition.
    ///
    /// # Errors
    /// [`CpuError`] if `cpu` is not possible.
    #[inline]
    pub(crate) fn copy_of(&self, neutral: usize, cpu: CpuId) -> Result<usize, CpuError> {
        match self.offset(cpu) {
            Some(offset) => Ok(neutral.wrapping_add(offset)),
            None => Err(CpuError::NotPossible {
                cpu,
                nr_cpu_ids: self.nr_cpu_ids(),
            }),
        }
    }

    /// Calls `act` with the address of each materialised CPU's copy of what lies at `neutral`, in order of the CPUs.
    #[inline]
    pub(crate) fn for_each_copy(&self, neutral: usize, act: impl FnMut(usize)) {
        self.for_each_copy_on(&self.materialised, neutral, act);
    }

    /// [`for_each_copy`](Self::for_each_copy) of a set of possible CPUs.
    #[inline]
    pub(crate) fn for_each_copy_on(
        &self,
        cpus: &CpuSet,
        neutral: usize,
        mut act: impl FnMut(usize),
    ) {
        for (index, word) in cpus.words.iter().enumerate() {
            let mut bits = word.0.load(Ordering::Acquire);
            // CPUs side by side, as most are, are gone through without a look at the bit of each.
            while bits != 0 {
                let first = bits.trailing_zeros();
                let cpu = index * u64::BITS as usize + first as usize;
                let count = (bits >> first).trailing_ones() as usize;
                for &offset in &self.offsets[cpu..cpu + count] {
                    debug_assert_ne!(offset, NOT_POSSIBLE);
                    act(neutral.wrapping_add(offset));
                }
                // The carry clears the run.
                bits &= bits.wrapping_add(1 << first);
            }
        }
    }

    /// The node of `cpu`'s memory, as the topology gave it. `None` if `cpu` is not possible.
    pub fn node(&self, cpu: CpuId) -> Option<NodeId> {
        self.offset(cpu)?;
        Some(NodeId::new(self.nodes[cpu.index()]))
    }

    /// One more than the highest possible CPU.
    pub fn nr_cpu_ids(&self) -> u32 {
        self.offsets.len() as u32
    }

    /// CPUs that may ever come up; each has a unit.
    pub fn possible(&self) -> &CpuSet {
        &self.possible
    }

    /// CPUs whose copies have memory of their own: those that have ever been online.
    pub fn materialised(&self) -> &CpuSet {
        &self.materialised
    }
}
