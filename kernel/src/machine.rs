//! The machine, as ACPI's tables describe it: CPUs (MADT), nodes of CPUs and memory (SRAT), distances (SLIT).
//!
//! CPUs are numbered in the order of the MADT. A CPU is *possible* if it is enabled or may be brought online later; only
//! those that are enabled are started. A machine without SRAT is one node.

use core::ptr::{self, NonNull};

use acpi::madt::{Madt, MadtEntry};
use acpi::sdt::{SdtHeader, Signature};
use acpi::{AcpiHandler, AcpiTable, AcpiTables, PhysicalMapping};
use pcpu::unit::{CpuId, DistanceMap, LOCAL_DISTANCE, NodeId};
use spin::Once;

use crate::boot::start_info::StartInfo;
use crate::memory::{PHYSICAL_MAP, PhysicalRange};

/// The most possible CPUs: the local APIC's ids have 8 bits, and 255 means all.
pub const MAX_CPUS: usize = 255;
/// The most nodes.
pub const MAX_NODES: usize = 8;
/// The most pieces of memory that SRAT tells of.
pub const MAX_NODE_RANGES: usize = 32;

/// The distance of two nodes where nothing says how far they are.
const REMOTE_DISTANCE: u8 = 20;

static MACHINE: Once<Machine> = Once::new();

/// A possible CPU.
#[derive(Clone, Copy)]
pub struct Cpu {
    /// The id of its local APIC.
    pub apic_id: u8,
    /// Whether it is there now.
    pub enabled: bool,
}

/// Memory and the node that it belongs to.
#[derive(Clone, Copy)]
pub struct NodeRange {
    /// Where it is.
    pub range: PhysicalRange,
    /// Its node.
    pub node: NodeId,
}

/// What there is.
pub struct Machine {
    /// What the boot loader told.
    pub start_info: StartInfo,
    cpus: [Cpu; MAX_CPUS],
    /// The node of each possible CPU.
    cpu_nodes: [Option<NodeId>; MAX_CPUS],
    nr_cpus: usize,
    node_ranges: [NodeRange; MAX_NODE_RANGES],
    nr_node_ranges: usize,
    distances: [u8; MAX_NODES * MAX_NODES],
    nr_nodes: usize,
}

/// The machine.
///
/// # Panics
/// Before [`discover`].
pub fn machine() -> &'static Machine {
    MACHINE.get().expect("discovered first of all")
}

/// Reads the tables.
///
/// # Panics
/// If they are missing, or tell of more than this kernel has room for.
pub fn discover(start_info: StartInfo) -> &'static Machine {
    // SAFETY: the boot loader says that the root pointer is there.
    let tables = unsafe { AcpiTables::from_rsdp(PhysicalMap, start_info.rsdp) }
        .unwrap_or_else(|error| panic!("no ACPI tables: {error:?}"));
    let mut machine = Machine {
        start_info,
        cpus: [Cpu {
            apic_id: 0,
            enabled: false,
        }; MAX_CPUS],
        cpu_nodes: [None; MAX_CPUS],
        nr_cpus: 0,
        node_ranges: [NodeRange {
            range: PhysicalRange::EMPTY,
            node: NodeId::new(0),
        }; MAX_NODE_RANGES],
        nr_node_ranges: 0,
        distances: [REMOTE_DISTANCE; MAX_NODES * MAX_NODES],
        nr_nodes: 1,
    };
    machine.read_madt(&tables);
    match tables.find_table::<Srat>() {
        Ok(srat) => machine.read_srat(bytes_of(&srat)),
        Err(_) => machine.add_node_range(0, PhysicalRange::new(0, u64::MAX)),
    }
    let slit = tables.find_table::<Slit>();
    machine.set_distances(slit.as_ref().ok().map(bytes_of));
    MACHINE.call_once(|| machine)
}

impl Machine {
    /// The possible CPUs, indexed by CPU id.
    pub fn cpus(&self) -> &[Cpu] {
        &self.cpus[..self.nr_cpus]
    }

    /// The CPU with a local APIC of that id.
    pub fn cpu_of_apic(&self, apic_id: u8) -> Option<CpuId> {
        let index = self.cpus().iter().position(|cpu| cpu.apic_id == apic_id)?;
        Some(CpuId::new(index as u32))
    }

    /// A possible CPU's node.
    pub fn node_of_cpu(&self, cpu: CpuId) -> NodeId {
        self.cpu_nodes[cpu.index()].unwrap_or(NodeId::new(0))
    }

    /// Which memory belongs to which node.
    pub fn node_ranges(&self) -> &[NodeRange] {
        &self.node_ranges[..self.nr_node_ranges]
    }

    /// The number of nodes.
    pub fn nr_nodes(&self) -> usize {
        self.nr_nodes
    }

    /// The other nodes, the nearest first: the `nth`, from 0 on.
    pub fn nearest_node(&self, node: NodeId, nth: u32) -> Option<NodeId> {
        let from = node.index() * self.nr_nodes;
        let key = |other: usize| (self.distances[from + other], other);
        let others = || (0..self.nr_nodes).filter(|&other| other != node.index());
        let rank = |one: usize| others().filter(|&other| key(other) < key(one)).count();
        let found = others().find(|&other| rank(other) == nth as usize)?;
        Some(NodeId::new(found as u32))
    }

    /// What the per-CPU allocator wants to know: which CPUs are near each other.
    pub fn topology(&self) -> DistanceMap<'_> {
        let nodes = &self.cpu_nodes[..self.nr_cpus];
        let distances = &self.distances[..self.nr_nodes * self.nr_nodes];
        DistanceMap::new(nodes, distances, self.nr_nodes)
            .unwrap_or_else(|error| panic!("ACPI describes an impossible machine: {error}"))
    }

    fn read_madt(&mut self, tables: &AcpiTables<PhysicalMap>) {
        let madt = tables
            .find_table::<Madt>()
            .unwrap_or_else(|error| panic!("no MADT: {error:?}"));
        // Older tables cannot say which of the CPUs that are not enabled may come; all of them may then.
        let any_may_come = madt.get().header().revision < 5;
        for entry in madt.get().entries() {
            if let MadtEntry::LocalApic(entry) = entry {
                let (enabled, may_come) = (entry.flags & 1 != 0, entry.flags & 2 != 0);
                if enabled || may_come || any_may_come {
                    assert!(
                        self.nr_cpus < MAX_CPUS,
                        "more possible CPUs than {MAX_CPUS}"
                    );
                    self.cpus[self.nr_cpus] = Cpu {
                        apic_id: entry.apic_id,
                        enabled,
                    };
                    self.cpu_nodes[self.nr_cpus] = Some(NodeId::new(0));
                    self.nr_cpus += 1;
                }
            }
        }
    }

    /// SRAT: after 48 bytes, entries of a type (0: a CPU, 1: memory) and a length. Bit 0 of their flags says that they
    /// count.
    fn read_srat(&mut self, srat: &[u8]) {
        let mut rest = srat.get(48..).unwrap_or(&[]);
        while let [kind, length, ..] = *rest
            && length >= 2
            && let Some((entry, behind)) = rest.split_at_checked(length as usize)
        {
            match kind {
                0 if u32_at(entry, 4) & 1 != 0 => {
                    let node = u32::from(entry[2])
                        | u32::from(entry[9]) << 8
                        | u32::from(entry[10]) << 16
                        | u32::from(entry[11]) << 24;
                    if let Some(cpu) = self.cpu_of_apic(entry[3]) {
                        self.cpu_nodes[cpu.index()] = Some(self.node(node));
                    }
                }
                1 if u32_at(entry, 28) & 1 != 0 => {
                    let (start, bytes) = (u64_at(entry, 8), u64_at(entry, 16));
                    self.add_node_range(u32_at(entry, 2), PhysicalRange::new(start, start + bytes));
                }
                _ => {}
            }
            rest = behind;
        }
    }

    fn add_node_range(&mut self, node: u32, range: PhysicalRange) {
        assert!(
            self.nr_node_ranges < MAX_NODE_RANGES,
            "more pieces of memory than {MAX_NODE_RANGES}"
        );
        self.node_ranges[self.nr_node_ranges] = NodeRange {
            range,
            node: self.node(node),
        };
        self.nr_node_ranges += 1;
    }

    fn node(&mut self, node: u32) -> NodeId {
        assert!(
            (node as usize) < MAX_NODES,
            "node {node}: there is room for {MAX_NODES}"
        );
        self.nr_nodes = self.nr_nodes.max(node as usize + 1);
        NodeId::new(node)
    }

    /// SLIT: after 36 bytes the number of nodes, then a matrix of bytes.
    fn set_distances(&mut self, slit: Option<&[u8]>) {
        let nr_nodes = self.nr_nodes;
        let known = slit.filter(|slit| slit.len() >= 44 && u64_at(slit, 36) >= nr_nodes as u64);
        for (from, to) in (0..nr_nodes).flat_map(|from| (0..nr_nodes).map(move |to| (from, to))) {
            self.distances[from * nr_nodes + to] = match known {
                Some(slit) => slit[44 + from * u64_at(slit, 36) as usize + to],
                None if from == to => LOCAL_DISTANCE,
                None => REMOTE_DISTANCE,
            };
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// All of a table.
fn bytes_of<T: AcpiTable>(table: &PhysicalMapping<PhysicalMap, T>) -> &[u8] {
    let length = table.get().header().length as usize;
    // SAFETY: the table has this length by its header, which was checked with the sum of its bytes; it is mapped for good.
    unsafe { core::slice::from_raw_parts(table.virtual_start().as_ptr().cast(), length) }
}

/// The tables are read through the boot tables' map of physical memory.
#[derive(Clone, Copy)]
struct PhysicalMap;

impl AcpiHandler for PhysicalMap {
    unsafe fn map_physical_region<T>(
        &self,
        address: usize,
        bytes: usize,
    ) -> PhysicalMapping<Self, T> {
        let start = ptr::with_exposed_provenance_mut(PHYSICAL_MAP + address);
        let start = NonNull::new(start).expect("the physical map does not begin at 0");
        // SAFETY: the first 4 GiB are mapped, where the tables lie.
        unsafe { PhysicalMapping::new(address, start, bytes, bytes, *self) }
    }

    fn unmap_physical_region<T>(_: &PhysicalMapping<Self, T>) {}
}

/// The node of each CPU and of each piece of memory.
#[repr(transparent)]
struct Srat(SdtHeader);

// SAFETY: nothing but the header is read by its type.
unsafe impl AcpiTable for Srat {
    const SIGNATURE: Signature = Signature::SRAT;

    fn header(&self) -> &SdtHeader {
        &self.0
    }
}

/// The distances between nodes.
#[repr(transparent)]
struct Slit(SdtHeader);

// SAFETY: as above.
unsafe impl AcpiTable for Slit {
    const SIGNATURE: Signature = Signature::SLIT;

    fn header(&self) -> &SdtHeader {
        &self.0
    }
}
