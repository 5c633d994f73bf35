//! The description of a simulated machine, and how an allocator comes to be on it.

use std::error::Error;
use std::fmt;
use std::io;
use std::vec;

use super::{Checks, Sim, SimAllocator, SimConfig};
use crate::allocator::Policy;
use crate::backing::Context;
use crate::embed;
use crate::page;
use crate::request::{CpuError, SetupError};
use crate::unit::{
    BuildError, Contents, CpuId, EvenNodes, FirstChunkKind, FirstChunkSpec, LayoutError, Template,
    UnitPlan, storage_words,
};

/// Description of a simulated machine.
///
/// The default is the machine of the recorded traces: 256 KiB units with 212,992 bytes of static variables, 8 KiB
/// reserved and 28 KiB dynamic in the first chunk.
///
/// ```
/// use pcpu::backing::sim::Machine;
/// let pcpu = Machine::new(64).nodes(4).build()?;
/// assert_eq!(pcpu.units().possible().count(), 64);
/// assert_eq!(pcpu.sizes().unit_bytes(), 256 << 10);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Machine {
    cpus: u32,
    nodes: u32,
    spec: FirstChunkSpec,
    kind: FirstChunkKind,
    unit_bytes: usize,
    chunks: u32,
    online: u32,
    policy: Policy,
    sim: SimConfig,
}

impl Machine {
    /// A machine of `cpus` CPUs on one node, all of them online.
    pub fn new(cpus: u32) -> Self {
        let spec = FirstChunkSpec {
            static_bytes: 212_992,
            reserved_bytes: 8192,
            dyn_bytes: 28_672,
            ..FirstChunkSpec::default()
        };
        Self {
            cpus,
            nodes: 1,
            spec,
            kind: FirstChunkKind::Embed,
            unit_bytes: 256 << 10,
            chunks: 4096,
            online: cpus,
            policy: Policy::default(),
            sim: SimConfig {
                contents: Contents::Zeroed,
                checks: Checks::Off,
                reserve: Context::Atomic,
                metadata_bytes: usize::MAX,
                nodes: 1,
                node_frames: None,
            },
        }
    }

    /// Spreads the CPUs over so many nodes.
    #[must_use]
    pub fn nodes(self, nodes: u32) -> Self {
        Self { nodes, ..self }
    }

    /// Sizes of the first chunk.
    #[must_use]
    pub fn spec(self, spec: FirstChunkSpec) -> Self {
        Self { spec, ..self }
    }

    /// The builder of the first chunk. The page builder makes units as small as the sizes allow.
    #[must_use]
    pub fn first_chunk(self, kind: FirstChunkKind) -> Self {
        Self { kind, ..self }
    }

    /// The size of a unit, in bytes.
    #[must_use]
    pub fn unit_bytes(self, unit_bytes: usize) -> Self {
        Self { unit_bytes, ..self }
    }

    /// How many chunks the window holds, the first included.
    #[must_use]
    pub fn chunks(self, chunks: u32) -> Self {
        Self { chunks, ..self }
    }

    /// How many CPUs are brought up at once; the others are possible only.
    #[must_use]
    pub fn online(self, online: u32) -> Self {
        Self { online, ..self }
    }

    /// The allocator's policy.
    #[must_use]
    pub fn policy(self, policy: Policy) -> Self {
        Self { policy, ..self }
    }

    /// Fresh memory is dirty: the allocator has to zero all it hands out.
    #[must_use]
    pub fn dirty_memory(mut self) -> Self {
        self.sim.contents = Contents::Dirty;
        self
    }

    /// Making a chunk may sleep, so that atomic requests depend on spare ones. By default it never does.
    #[must_use]
    pub fn sleeping_reserve(mut self) -> Self {
        self.sim.reserve = Context::MaySleep;
        self
    }

    /// Every node has so many frames for the pages of later chunks, each a page long. A node that has none left takes them
    /// from the next one that has; where no node has, pages cannot be populated. By default they do not run out.
    #[must_use]
    pub fn node_frames(mut self, frames: u64) -> Self {
        self.sim.node_frames = Some(frames);
        self
    }

    /// At most so many bytes of metadata may be out at once. By default there is no such limit.
    #[must_use]
    pub fn metadata_bytes(mut self, bytes: usize) -> Self {
        self.sim.metadata_bytes = bytes;
        self
    }

    /// The backing checks that the allocator keeps its side of the contract, at some cost: pages are populated once and
    /// given back once, chunks likewise, and memory given back is overwritten.
    #[must_use]
    pub fn checked(mut self) -> Self {
        self.sim.checks = Checks::On;
        self
    }

    /// Builds the first chunk and the allocator.
    ///
    /// # Errors
    /// [`MachineError`] says which step failed.
    pub fn build(&self) -> Result<SimAllocator, MachineError> {
        self.build_with_faults(|_| false)
    }

    /// [`build`](Self::build) on a machine whose backing fails the calls for which `fails` (given the number of the
    /// call, from 0) is true; see [`Sim::set_faults`].
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn build_with_faults(
        &self,
        fails: impl Fn(u64) -> bool + Send + 'static,
    ) -> Result<SimAllocator, MachineError> {
        let topology = EvenNodes::new(self.cpus, self.nodes)?;
        let mut words = vec![0; storage_words(self.cpus)];
        let mut offsets = vec![0; self.cpus as usize];
        let plan = match self.kind {
            FirstChunkKind::Embed => {
                UnitPlan::exact(&self.spec, self.unit_bytes, &topology, &mut words)?
            }
            FirstChunkKind::Page => UnitPlan::page(&self.spec, &topology, &mut words)?,
        };
        let config = SimConfig {
            nodes: self.nodes,
            ..self.sim
        };
        let mut sim = Sim::new(&plan, self.chunks, config).map_err(MachineError::AddressSpace)?;
        sim.set_faults(fails);
        let template = vec![0; plan.sizes().static_bytes()];
        let template = Template {
            bytes: &template,
            base: sim.memory.neutral_base(),
        };
        let first_chunk = match self.kind {
            FirstChunkKind::Embed => embed::build(plan, template, &mut offsets, &mut sim)?,
            FirstChunkKind::Page => page::build(plan, template, &mut offsets, &mut sim)?,
        };
        // SAFETY: the first chunk lies in the memory of `sim`, which the allocator takes over.
        let pcpu = unsafe { SimAllocator::new(sim, &first_chunk, self.policy)? };
        for cpu in (0..self.online).map(CpuId::new) {
            pcpu.bring_up(cpu)?;
        }
        Ok(pcpu)
    }
}

/// Why a simulated machine could not be built.
#[derive(Debug)]
#[non_exhaustive]
pub enum MachineError {
    /// Its description makes no layout.
    Layout(LayoutError),
    /// The system grants no address space.
    AddressSpace(io::Error),
    /// The first chunk could not be built.
    Build(BuildError<io::Error>),
    /// The allocator could not be set up.
    Setup(SetupError),
    /// A CPU could not be brought up.
    BringUp(CpuError),
}

impl From<LayoutError> for MachineError {
    fn from(error: LayoutError) -> Self {
        Self::Layout(error)
    }
}

impl From<BuildError<io::Error>> for MachineError {
    fn from(error: BuildError<io::Error>) -> Self {
        Self::Build(error)
    }
}

impl From<SetupError> for MachineError {
    fn from(error: SetupError) -> Self {
        Self::Setup(error)
    }
}

impl From<CpuError> for MachineError {
    fn from(error: CpuError) -> Self {
        Self::BringUp(error)
    }
}

impl fmt::Display for MachineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout(error) => error.fmt(f),
            Self::AddressSpace(error) => write!(f, "no address space for the machine: {error}"),
            Self::Build(error) => error.fmt(f),
            Self::Setup(error) => error.fmt(f),
            Self::BringUp(error) => error.fmt(f),
        }
    }
}

impl Error for MachineError {}
