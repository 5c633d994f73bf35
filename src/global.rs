//! The instance of a Linux process: made when it is first used, from the system's CPUs and nodes.
//!
//! Its first chunk holds the static variables of the program ([`define_per_cpu!`](crate::define_per_cpu)), is built by
//! embed, or by page where embed fails, and lives as long as the process. Upkeep is run by whoever allocates or frees
//! and finds it due.

use std::boxed::Box;
use std::error::Error;
use std::string::{String, ToString};
use std::sync::OnceLock;
use std::vec;

use zerocopy::FromZeros;

use crate::alloc_api::{Domain, Global, PerCpuPtr, alloc_percpu_in};
use crate::allocator::{PerCpuAllocator, Policy, UpkeepBy};
use crate::backing::mmap::{Mmap, Placement};
use crate::embed;
use crate::page;
use crate::request::AllocError;
use crate::static_var;
use crate::this_cpu::{
    self,
    process::{Method, ProcessOps},
};
use crate::unit::{
    CpuId, FirstChunkKind, FirstChunkSpec, NodeId, Template, Topology, UnitPlan, storage_words,
};

mod system;

/// The allocator of the process.
pub type GlobalAllocator = PerCpuAllocator<Mmap, parking_lot::RawMutex>;

/// From one unit to the next, in bytes; what one CPU's copies can ever take. A constant, for the operations have it in
/// their instructions; a displacement of 32 bits holds it.
pub(crate) const STRIDE_BYTES: usize = 1 << 30;

/// The least stride that an instance is content with where the system does not grant [`STRIDE_BYTES`].
const MIN_STRIDE_BYTES: usize = 16 << 20;

/// Unit size asked for. Larger units mean fewer chunks; address space is all that they cost.
const MIN_UNIT_BYTES: usize = 256 << 10;

/// Room for the static variables of libraries that are loaded at run time; as much as Linux reserves for modules.
const RESERVED_BYTES: usize = 8 << 10;

/// Room for dynamic variables in the first chunk, before rounding; as much as Linux asks for.
const DYNAMIC_BYTES: usize = 20 << 10;

/// What is known about the process's instance besides the instance.
#[derive(Debug)]
struct Process {
    allocator: GlobalAllocator,
    method: Method,
    boot_log: String,
}

/// The units of a process are in the order of the CPU ids, so that a CPU's offset follows from its id: all in one group,
/// ids that are not possible included, and one more for the stray unit. Nodes are seen to page by page instead.
#[derive(Debug)]
struct ById<'a> {
    nodes: &'a [NodeId],
}

impl Topology for ById<'_> {
    fn nr_cpu_ids(&self) -> u32 {
        self.nodes.len() as u32 + 1
    }

    fn is_possible(&self, cpu: CpuId) -> bool {
        cpu.get() < self.nr_cpu_ids()
    }

    fn is_local(&self, _a: CpuId, _b: CpuId) -> bool {
        true
    }

    fn node(&self, cpu: CpuId) -> NodeId {
        self.nodes
            .get(cpu.index())
            .copied()
            .unwrap_or(NodeId::new(0))
    }
}

// SAFETY: `allocator` always returns the one instance of the process, which no other domain returns.
unsafe impl Domain for Global {
    type Backing = Mmap;
    type Lock = parking_lot::RawMutex;
    type Ops = ProcessOps;

    fn allocator() -> &'static GlobalAllocator {
        &process().allocator
    }

    fn current_cpu() -> CpuId {
        CpuId::new(rustix::thread::sched_getcpu() as u32)
    }
}

/// Allocates a variable in the process: a `T` of zero bytes on every CPU.
///
/// ```
/// use pcpu::{alloc_percpu, free_percpu, per_cpu_ptr};
/// use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
///
/// let hits = alloc_percpu::<AtomicU64>()?;
/// let mut sum = 0;
/// for cpu in pcpu::global().units().possible().iter() {
///     // SAFETY: the variable is allocated and lives until it is freed below.
///     let copy = unsafe { per_cpu_ptr(hits, cpu)?.as_ref() };
///     sum += copy.load(Relaxed);
/// }
/// assert_eq!(sum, 0);
/// // SAFETY: nobody uses the variable any more.
/// unsafe { free_percpu(hits)? };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`AllocError`].
pub fn alloc_percpu<T: FromZeros>() -> Result<PerCpuPtr<T>, AllocError> {
    alloc_percpu_in()
}

/// The allocator of the process.
///
/// # Panics
/// If the system grants no address space for it, or does not say which CPUs it has.
pub fn global() -> &'static GlobalAllocator {
    Global::allocator()
}

/// The first chunk of the process as Linux's boot log would tell of it.
pub fn boot_log() -> &'static str {
    &process().boot_log
}

/// How the process's operations on the current CPU's copies are done.
pub fn method() -> Method {
    process().method
}

/// The CPU id of the stray unit: the copies of threads that are not registered with the kernel.
pub fn stray_unit() -> CpuId {
    CpuId::new(global().units().nr_cpu_ids() - 1)
}

/// Gives CPUs up to `cpu` copies of their own, without a lock: in a process memory comes with its first touch, and the
/// copies of a CPU that never ran are zero wherever an area may be handed out. False if there is no such CPU.
pub(crate) fn materialise_up_to(cpu: CpuId) -> bool {
    let is_cpu = cpu < stray_unit();
    if is_cpu {
        (0..=cpu.get()).for_each(|id| materialise(CpuId::new(id)));
    }
    is_cpu
}

/// The copy of the CPU that the caller was on a moment ago. It takes no lock, and so may be called from a signal handler
/// that interrupted anything.
pub(crate) fn current_copy(neutral: usize) -> usize {
    let cpu = Global::current_cpu();
    let units = global().units();
    match units.offset(cpu) {
        Some(offset) => {
            if !units.materialised().contains(cpu) {
                materialise(cpu);
            }
            neutral.wrapping_add(offset)
        }
        None => stray_copy(neutral),
    }
}

/// Gives a CPU copies of its own, which needs neither a lock nor memory here, and so cannot fail for a CPU that is there.
fn materialise(cpu: CpuId) {
    let brought_up = global().bring_up(cpu);
    debug_assert_eq!(brought_up, Ok(()));
}

/// The stray unit's copy of the variable at a neutral address.
pub(crate) fn stray_copy(neutral: usize) -> usize {
    let stray = stray_unit();
    materialise(stray);
    neutral.wrapping_add(global().units().offset(stray).unwrap_or(0))
}

fn process() -> &'static Process {
    match set_up() {
        Ok(process) => process,
        Err(error) => panic!("the per-CPU allocator of the process cannot be set up: {error}"),
    }
}

/// The instance, which is made by the first call.
fn set_up() -> &'static Result<Process, String> {
    static PROCESS: OnceLock<Result<Process, String>> = OnceLock::new();
    PROCESS.get_or_init(|| {
        let process = Process::new().map_err(|error| error.to_string())?;
        static_var::set_neutral_base(process.allocator.neutral_base());
        Ok(process)
    })
}

/// Runs before `main`, so that the handles of static variables are known from then on.
extern "C" fn before_main() {
    // What fails is told to whoever uses the instance.
    let _ = set_up();
}

#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

impl Process {
    fn new() -> Result<Self, Box<dyn Error>> {
        let nodes = system::nodes_of_cpus()?;
        let build = |kind| Self::build(&nodes, kind, STRIDE_BYTES, this_cpu::process::detect);
        let is_too_much = |_| {
            // A smaller window, then, and none of the operations that rely on its size.
            let mut stride_bytes = STRIDE_BYTES / 2;
            loop {
                match Self::build(&nodes, FirstChunkKind::Embed, stride_bytes, || {
                    Method::Locked
                }) {
                    Err(_) if stride_bytes > MIN_STRIDE_BYTES => stride_bytes /= 2,
                    result => return result,
                }
            }
        };
        build(FirstChunkKind::Embed)
            .or_else(|_| build(FirstChunkKind::Page))
            .or_else(is_too_much)
    }

    fn build(
        nodes: &[NodeId],
        kind: FirstChunkKind,
        stride_bytes: usize,
        detect: impl FnOnce() -> Method,
    ) -> Result<Self, Box<dyn Error>> {
        let template = static_var::template();
        let page_bytes = crate::backing::page_bytes();
        let spec = FirstChunkSpec {
            static_bytes: template.len(),
            reserved_bytes: RESERVED_BYTES,
            dyn_bytes: DYNAMIC_BYTES,
            atom_bytes: page_bytes,
            page_bytes,
            min_unit_bytes: MIN_UNIT_BYTES,
        };
        let topology = ById { nodes };
        let mut words = vec![0; storage_words(topology.nr_cpu_ids())];
        let mut offsets = vec![0; topology.nr_cpu_ids() as usize];
        let plan = match kind {
            FirstChunkKind::Embed => UnitPlan::embed(&spec, &topology, &mut words)?,
            FirstChunkKind::Page => UnitPlan::page(&spec, &topology, &mut words)?,
        };
        let has_nodes = nodes.iter().any(|node| node.get() != 0);
        let placement = if has_nodes {
            Placement::NodeLocal
        } else {
            Placement::Any
        };
        let mut memory = Mmap::reserve(&plan, stride_bytes, placement)?;
        let template = Template {
            bytes: template,
            base: memory.neutral_base(),
        };
        let first_chunk = match kind {
            FirstChunkKind::Embed => embed::build(plan, template, &mut offsets, &mut memory)?,
            FirstChunkKind::Page => page::build(plan, template, &mut offsets, &mut memory)?,
        };
        memory.place_first_chunk(&first_chunk);
        let boot_log = first_chunk.plan().boot_log().to_string();
        let policy = Policy {
            empty_pages_high: 256,
            quiet_frees: 4096,
            upkeep: UpkeepBy::Callers,
            ..Policy::default()
        };
        // SAFETY: the first chunk lies in `memory`, which the instance takes over.
        let allocator = unsafe { GlobalAllocator::new(memory, &first_chunk, policy)? };
        Ok(Self {
            allocator,
            method: detect(),
            boot_log,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_follow_the_cpus_and_know_their_nodes() {
        let nodes = [1, 0, 1].map(NodeId::new);
        let process = Process::build(&nodes, FirstChunkKind::Embed, MIN_STRIDE_BYTES, || {
            Method::Locked
        })
        .unwrap();
        let units = process.allocator.units();
        let first = units.offset(CpuId::new(0)).unwrap();
        for (id, node) in [1, 0, 1, 0].into_iter().enumerate() {
            let cpu = CpuId::new(id as u32);
            assert_eq!(units.offset(cpu), Some(first + id * MIN_STRIDE_BYTES));
            assert_eq!(units.node(cpu), Some(NodeId::new(node)));
        }
    }
}
