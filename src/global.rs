//! The instance of a Linux process: made when it is first used, from the system's CPUs and nodes.
//!
//! Its first chunk holds the static variables of the program ([`define_per_cpu!`](crate::define_per_cpu)), is built by
//! embed, or by page where embed fails, and lives as long as the process. Upkeep is run by whoever allocates or frees
//! and finds it due.

use std::boxed::Box;
use std::error::Error;
use std::io;
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
use crate::unit::{
    CpuId, FirstChunkKind, FirstChunkSpec, NodeId, NodeMap, Template, UnitPlan, storage_words,
};

mod system;

/// The allocator of the process.
pub type GlobalAllocator = PerCpuAllocator<Mmap, parking_lot::RawMutex>;

/// Address space of a unit, in bytes: what one CPU's copies can ever take.
const WINDOW_BYTES: usize = 1 << 30;

/// The least address space that a unit is content with.
const MIN_WINDOW_BYTES: usize = 16 << 20;

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
    boot_log: String,
}

// SAFETY: `allocator` always returns the one instance of the process, which no other domain returns.
unsafe impl Domain for Global {
    type Backing = Mmap;
    type Lock = parking_lot::RawMutex;

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

fn process() -> &'static Process {
    static PROCESS: OnceLock<Process> = OnceLock::new();
    PROCESS.get_or_init(|| match Process::new() {
        Ok(process) => process,
        Err(error) => panic!("the per-CPU allocator of the process cannot be set up: {error}"),
    })
}

impl Process {
    fn new() -> Result<Self, Box<dyn Error>> {
        let nodes = system::nodes_of_cpus()?;
        Self::build(&nodes, FirstChunkKind::Embed)
            .or_else(|_| Self::build(&nodes, FirstChunkKind::Page))
    }

    fn build(nodes: &[Option<NodeId>], kind: FirstChunkKind) -> Result<Self, Box<dyn Error>> {
        let template = static_var::template();
        let page_bytes = rustix::param::page_size();
        let spec = FirstChunkSpec {
            static_bytes: template.len(),
            reserved_bytes: RESERVED_BYTES,
            dyn_bytes: DYNAMIC_BYTES,
            atom_bytes: page_bytes,
            page_bytes,
            min_unit_bytes: MIN_UNIT_BYTES,
        };
        let topology = NodeMap::new(nodes)?;
        let mut words = vec![0; storage_words(nodes.len() as u32)];
        let mut offsets = vec![0; nodes.len()];
        let plan = match kind {
            FirstChunkKind::Embed => UnitPlan::embed(&spec, &topology, &mut words)?,
            FirstChunkKind::Page => UnitPlan::page(&spec, &topology, &mut words)?,
        };
        let has_nodes = nodes.iter().flatten().any(|node| node.get() != 0);
        let mut memory = reserve(
            &plan,
            if has_nodes {
                Placement::NodeLocal
            } else {
                Placement::Any
            },
        )?;
        let template = Template {
            bytes: template,
            base: memory.neutral_base(),
        };
        let first_chunk = match kind {
            FirstChunkKind::Embed => embed::build(plan, template, &mut offsets, &mut memory)?,
            FirstChunkKind::Page => page::build(plan, template, &mut offsets, &mut memory)?,
        };
        let boot_log = first_chunk.plan().boot_log().to_string();
        let policy = Policy {
            empty_pages_high: 256,
            quiet_frees: 4096,
            upkeep: UpkeepBy::Callers,
            ..Policy::default()
        };
        // SAFETY: the first chunk lies in `memory`, which the instance takes over.
        let allocator = unsafe { GlobalAllocator::new(memory, &first_chunk, policy)? };
        for cpu in system::cpus_allowed() {
            // A CPU that is allowed but not possible would be the system's error; it is refused when it is used.
            let _ = allocator.bring_up(cpu);
        }
        Ok(Self {
            allocator,
            boot_log,
        })
    }
}

/// As much address space as the system grants, up to [`WINDOW_BYTES`] for a unit.
fn reserve(plan: &UnitPlan<'_>, placement: Placement) -> io::Result<Mmap> {
    let mut window_bytes = WINDOW_BYTES;
    loop {
        match Mmap::reserve(
            plan,
            (window_bytes / plan.sizes().unit_bytes()).max(1) as u32,
            placement,
        ) {
            Err(_) if window_bytes > MIN_WINDOW_BYTES => window_bytes /= 2,
            result => return result,
        }
    }
}
