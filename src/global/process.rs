//! What a process sets up: its instance, of the system's CPUs and nodes, with the static variables in its first chunk.

use std::boxed::Box;
use std::error::Error;
use std::string::{String, ToString};
use std::vec;

use super::{GlobalAllocator, WINDOW_BYTES, geometry, hardened, system};
use crate::allocator::{Policy, UpkeepBy};
use crate::backing::mmap::{Geometry, Mmap, Placement};
use crate::cache::ROWS_BYTES;
use crate::embed;
use crate::page;
use crate::static_var;
use crate::this_cpu::process::{self, Method};
use crate::unit::{
    CpuId, FirstChunkKind, FirstChunkSpec, NodeId, Template, Topology, UnitPlan, storage_words,
};

/// The least window that an instance is content with where the system does not grant [`WINDOW_BYTES`].
const MIN_WINDOW_BYTES: usize = 16 << 20;

/// Unit size asked for. Larger units mean fewer chunks; address space is all that they cost.
const MIN_UNIT_BYTES: usize = 256 << 10;

/// Room for the static variables of libraries that are loaded at run time; as much as Linux reserves for modules.
const RESERVED_BYTES: usize = 8 << 10;

/// Room for dynamic variables in the first chunk, before rounding; as much as Linux asks for, and room for names of what is stashed:
/// memory of the first chunk is there when it is touched.
const DYNAMIC_BYTES: usize = (20 << 10) + ROWS_BYTES;

/// The instance of the process, and what is known about it.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) allocator: GlobalAllocator,
    pub(super) method: Method,
    pub(super) boot_log: String,
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

impl Process {
    pub(super) fn new() -> Result<Self, Box<dyn Error>> {
        let nodes = system::nodes_of_cpus()?;
        let build = |kind, geometry: Geometry| {
            Self::build(&nodes, kind, geometry, || {
                process::detect(geometry.stride_bytes())
            })
        };
        let is_too_much = |_| {
            // A smaller window, then, and none of the operations that rely on its size.
            let mut window_bytes = WINDOW_BYTES / 2;
            loop {
                let geometry = geometry::of_this_program(window_bytes);
                match Self::build(&nodes, FirstChunkKind::Embed, geometry, || Method::Locked) {
                    Err(_) if window_bytes > MIN_WINDOW_BYTES => window_bytes /= 2,
                    result => return result,
                }
            }
        };
        build(
            FirstChunkKind::Embed,
            geometry::of_this_program(WINDOW_BYTES),
        )
        // Single pages are whole ones.
        .or_else(|_| build(FirstChunkKind::Page, Geometry::pages(WINDOW_BYTES)))
        .or_else(is_too_much)
    }

    fn build(
        nodes: &[NodeId],
        kind: FirstChunkKind,
        geometry: Geometry,
        detect: impl FnOnce() -> Method,
    ) -> Result<Self, Box<dyn Error>> {
        let layout = static_var::Template::of_this_object();
        let mut template = vec![0; layout.bytes];
        // SAFETY: the block is as long as the template, and the template is that of the object that runs.
        unsafe { layout.write_to(template.as_mut_ptr()) };
        let page_bytes = rustix::param::page_size();
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
        let mut memory = Mmap::reserve(&plan, geometry, placement)?;
        let template = Template {
            bytes: &template,
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
            names_in_rows: true,
            ..Policy::default()
        };
        // SAFETY: the first chunk lies in `memory`, which the instance takes over.
        let mut allocator = unsafe { GlobalAllocator::new(memory, &first_chunk, policy)? };
        match hardened::wanted() {
            Some(hardening) => allocator.harden(hardening)?,
            None => allocator.enable_caches()?,
        }
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
        for (kind, geometry) in [
            (FirstChunkKind::Embed, Geometry::lines(MIN_WINDOW_BYTES)),
            (FirstChunkKind::Embed, Geometry::pages(MIN_WINDOW_BYTES)),
            (FirstChunkKind::Page, Geometry::pages(MIN_WINDOW_BYTES)),
        ] {
            let process = Process::build(&nodes, kind, geometry, || Method::Locked).unwrap();
            let units = process.allocator.units();
            for (id, node) in [1, 0, 1, 0].into_iter().enumerate() {
                let cpu = CpuId::new(id as u32);
                let offset = MIN_WINDOW_BYTES + id * geometry.stride_bytes();
                assert_eq!(units.offset(cpu), Some(offset));
                assert_eq!(units.node(cpu), Some(NodeId::new(node)));
            }
            assert_eq!(
                process.allocator.max_align_bytes(),
                geometry.max_align_bytes()
            );
        }
    }

    /// Nothing here wants pages, so the unit tests run with units between pages.
    #[test]
    fn a_program_without_page_aligned_variables() {
        let geometry = geometry::of_this_program(WINDOW_BYTES);
        assert_eq!(geometry, Geometry::lines(WINDOW_BYTES));
    }
}
