//! Which CPUs there are, on which node, and which are local to each other.
//!
//! A topology is asked once for every CPU and, while groups are formed, once for every CPU and group; it is not
//! kept. The ready ones borrow what the caller has and allocate nothing.

use super::{CpuId, LayoutError, MAX_CPUS, NodeId};

/// The distance of a node to itself in the tables of ACPI and of device trees.
pub const LOCAL_DISTANCE: u8 = 10;

/// The CPUs of a machine and their places.
///
/// Whatever an implementation answers, no plan made of it breaks memory safety or panics; wrong answers make
/// useless groups.
///
/// ```
/// use pcpu::unit::{CpuId, NodeId, Topology};
///
/// /// Eight CPUs, even ones on node 0, odd ones on node 1.
/// struct Interleaved;
///
/// impl Topology for Interleaved {
///     fn nr_cpu_ids(&self) -> u32 {
///         8
///     }
///     fn is_possible(&self, cpu: CpuId) -> bool {
///         cpu.get() < 8
///     }
///     fn is_local(&self, a: CpuId, b: CpuId) -> bool {
///         self.node(a) == self.node(b)
///     }
///     fn node(&self, cpu: CpuId) -> NodeId {
///         NodeId::new(cpu.get() % 2)
///     }
/// }
///
/// assert!(Interleaved.is_local(CpuId::new(1), CpuId::new(7)));
/// ```
pub trait Topology {
    /// One more than the highest possible CPU id.
    fn nr_cpu_ids(&self) -> u32;

    /// Whether the CPU is there or may ever come; false for every id from `nr_cpu_ids` on.
    fn is_possible(&self, cpu: CpuId) -> bool;

    /// Whether two possible CPUs are at [`LOCAL_DISTANCE`] of each other, in both directions.
    fn is_local(&self, a: CpuId, b: CpuId) -> bool;

    /// The node of a possible CPU; what it says of others is not used.
    fn node(&self, cpu: CpuId) -> NodeId;
}

impl<T: Topology + ?Sized> Topology for &T {
    fn nr_cpu_ids(&self) -> u32 {
        (**self).nr_cpu_ids()
    }
    fn is_possible(&self, cpu: CpuId) -> bool {
        (**self).is_possible(cpu)
    }
    fn is_local(&self, a: CpuId, b: CpuId) -> bool {
        (**self).is_local(a, b)
    }
    fn node(&self, cpu: CpuId) -> NodeId {
        (**self).node(cpu)
    }
}

/// A node per CPU; the CPUs of a node are local to each other, all others are remote.
///
/// ```
/// use pcpu::unit::{CpuId, NodeId, NodeMap, Topology};
/// let node = |id| Some(NodeId::new(id));
/// let nodes = [node(0), node(1), None, node(0)];
/// let topology = NodeMap::new(&nodes)?;
/// assert!(topology.is_local(CpuId::new(0), CpuId::new(3)));
/// assert!(!topology.is_possible(CpuId::new(2)));
/// # Ok::<(), pcpu::unit::LayoutError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct NodeMap<'a> {
    nodes: &'a [Option<NodeId>],
}

impl<'a> NodeMap<'a> {
    /// The topology of `nodes`, indexed by CPU id; `None` is a CPU that isn't possible.
    ///
    /// # Errors
    /// [`LayoutError::NoCpu`], [`LayoutError::TooManyCpus`].
    pub fn new(nodes: &'a [Option<NodeId>]) -> Result<Self, LayoutError> {
        check_cpus(nodes)?;
        Ok(Self { nodes })
    }

    /// The topology of explicit groups, each a list of CPUs that are local to each other, in any order. The
    /// node of a CPU is the index of its group. `storage` needs an entry for every CPU id up to the highest.
    ///
    /// # Errors
    /// [`LayoutError::NoCpu`], [`LayoutError::EmptyGroup`], [`LayoutError::CpuTwice`],
    /// [`LayoutError::CpuTooHigh`], [`LayoutError::StorageTooSmall`].
    ///
    /// ```
    /// use pcpu::unit::{CpuId, LayoutError, NodeMap};
    /// let mut storage = [None; 4];
    /// let [c0, c1, c2, c3] = [0, 1, 2, 3].map(CpuId::new);
    /// assert!(NodeMap::from_groups(&[[c0, c1], [c2, c3]], &mut storage).is_ok());
    /// let twice = NodeMap::from_groups(&[[c0, c1], [c1, c3]], &mut storage);
    /// assert_eq!(twice.unwrap_err(), LayoutError::CpuTwice { cpu: c1 });
    /// ```
    pub fn from_groups<G: AsRef<[CpuId]>>(
        groups: &[G],
        storage: &'a mut [Option<NodeId>],
    ) -> Result<Self, LayoutError> {
        let members = || groups.iter().flat_map(|group| group.as_ref());
        if let Some(group) = groups.iter().position(|group| group.as_ref().is_empty()) {
            return Err(LayoutError::EmptyGroup { group });
        }
        let highest = *members().max().ok_or(LayoutError::NoCpu)?;
        if highest.get() >= MAX_CPUS {
            return Err(LayoutError::CpuTooHigh { cpu: highest });
        }
        let (entries, needed) = (storage.len(), highest.index() + 1);
        let nodes = storage
            .get_mut(..needed)
            .ok_or(LayoutError::StorageTooSmall {
                what: "the node of each CPU",
                entries,
                needed,
            })?;
        nodes.fill(None);
        for (node, group) in (0..).map(NodeId::new).zip(groups) {
            for &cpu in group.as_ref() {
                if nodes[cpu.index()].replace(node).is_some() {
                    return Err(LayoutError::CpuTwice { cpu });
                }
            }
        }
        Ok(Self { nodes })
    }
}

impl Topology for NodeMap<'_> {
    fn nr_cpu_ids(&self) -> u32 {
        self.nodes.len() as u32
    }

    fn is_possible(&self, cpu: CpuId) -> bool {
        node_of(self.nodes, cpu).is_some()
    }

    fn is_local(&self, a: CpuId, b: CpuId) -> bool {
        let (a, b) = (node_of(self.nodes, a), node_of(self.nodes, b));
        a.is_some() && a == b
    }

    fn node(&self, cpu: CpuId) -> NodeId {
        node_of(self.nodes, cpu).unwrap_or(NodeId::new(0))
    }
}

/// A node per CPU and a matrix of distances between nodes, which needs not be symmetric.
///
/// ```
/// use pcpu::unit::{CpuId, DistanceMap, NodeId, Topology};
/// let nodes = [0, 1, 2].map(|id| Some(NodeId::new(id)));
/// #[rustfmt::skip]
/// let distances = [
///     10, 10, 21,
///     10, 10, 10,
///     21, 15, 10,
/// ];
/// let topology = DistanceMap::new(&nodes, &distances, 3)?;
/// assert!(topology.is_local(CpuId::new(0), CpuId::new(1)));
/// assert!(!topology.is_local(CpuId::new(1), CpuId::new(2))); // local there, but 15 back
/// # Ok::<(), pcpu::unit::LayoutError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct DistanceMap<'a> {
    nodes: &'a [Option<NodeId>],
    distances: &'a [u8],
    nr_nodes: usize,
}

impl<'a> DistanceMap<'a> {
    /// The topology of `nodes`, indexed by CPU id (`None`: not possible), and `distances`, where the entry
    /// `from * nr_nodes + to` is the distance from one node to another.
    ///
    /// # Errors
    /// [`LayoutError::NoCpu`], [`LayoutError::TooManyCpus`], [`LayoutError::NodeTooHigh`],
    /// [`LayoutError::DistanceCount`], and [`LayoutError::Distance`] for a distance below [`LOCAL_DISTANCE`] or
    /// a node that isn't at local distance of itself.
    pub fn new(
        nodes: &'a [Option<NodeId>],
        distances: &'a [u8],
        nr_nodes: usize,
    ) -> Result<Self, LayoutError> {
        check_cpus(nodes)?;
        if nr_nodes.checked_mul(nr_nodes) != Some(distances.len()) {
            return Err(LayoutError::DistanceCount {
                entries: distances.len(),
                nr_nodes,
            });
        }
        for (cpu, node) in (0..).map(CpuId::new).zip(nodes) {
            if let &Some(node) = node
                && node.index() >= nr_nodes
            {
                return Err(LayoutError::NodeTooHigh {
                    cpu,
                    node,
                    nr_nodes,
                });
            }
        }
        for (index, &distance) in distances.iter().enumerate() {
            let (from, to) = (index / nr_nodes, index % nr_nodes);
            if distance < LOCAL_DISTANCE || (from == to && distance != LOCAL_DISTANCE) {
                let [from, to] = [from, to].map(|node| NodeId::new(node as u32));
                return Err(LayoutError::Distance { from, to, distance });
            }
        }
        Ok(Self {
            nodes,
            distances,
            nr_nodes,
        })
    }

    fn is_near(&self, from: NodeId, to: NodeId) -> bool {
        self.distances[from.index() * self.nr_nodes + to.index()] == LOCAL_DISTANCE
    }
}

impl Topology for DistanceMap<'_> {
    fn nr_cpu_ids(&self) -> u32 {
        self.nodes.len() as u32
    }

    fn is_possible(&self, cpu: CpuId) -> bool {
        node_of(self.nodes, cpu).is_some()
    }

    fn is_local(&self, a: CpuId, b: CpuId) -> bool {
        match (node_of(self.nodes, a), node_of(self.nodes, b)) {
            (Some(a), Some(b)) => self.is_near(a, b) && self.is_near(b, a),
            _ => false,
        }
    }

    fn node(&self, cpu: CpuId) -> NodeId {
        node_of(self.nodes, cpu).unwrap_or(NodeId::new(0))
    }
}

/// CPUs without holes, dealt out to the nodes in equal blocks: the machine of a simulation.
///
/// ```
/// use pcpu::unit::{CpuId, EvenNodes, NodeId, Topology};
/// let topology = EvenNodes::new(16, 2)?;
/// assert_eq!(topology.node(CpuId::new(7)), NodeId::new(0));
/// assert_eq!(topology.node(CpuId::new(8)), NodeId::new(1));
/// # Ok::<(), pcpu::unit::LayoutError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct EvenNodes {
    nr_cpus: u32,
    nr_nodes: u32,
}

impl EvenNodes {
    /// `nr_cpus` CPUs on `nr_nodes` nodes; the blocks differ by at most one CPU.
    ///
    /// # Errors
    /// [`LayoutError::NoCpu`], [`LayoutError::TooManyCpus`], and [`LayoutError::NodeCount`] for no node or more
    /// nodes than CPUs.
    pub fn new(nr_cpus: u32, nr_nodes: u32) -> Result<Self, LayoutError> {
        if nr_cpus == 0 {
            return Err(LayoutError::NoCpu);
        }
        if nr_cpus > MAX_CPUS {
            return Err(LayoutError::TooManyCpus {
                nr_cpu_ids: nr_cpus as usize,
            });
        }
        if nr_nodes == 0 || nr_nodes > nr_cpus {
            return Err(LayoutError::NodeCount {
                nr_nodes,
                limit: nr_cpus,
            });
        }
        Ok(Self { nr_cpus, nr_nodes })
    }
}

impl Topology for EvenNodes {
    fn nr_cpu_ids(&self) -> u32 {
        self.nr_cpus
    }

    fn is_possible(&self, cpu: CpuId) -> bool {
        cpu.get() < self.nr_cpus
    }

    fn is_local(&self, a: CpuId, b: CpuId) -> bool {
        self.node(a) == self.node(b)
    }

    fn node(&self, cpu: CpuId) -> NodeId {
        // Widened, so that any id is safe to ask for.
        NodeId::new(
            (u64::from(cpu.get()) * u64::from(self.nr_nodes) / u64::from(self.nr_cpus)) as u32,
        )
    }
}

fn node_of(nodes: &[Option<NodeId>], cpu: CpuId) -> Option<NodeId> {
    nodes.get(cpu.index()).copied().flatten()
}

fn check_cpus(nodes: &[Option<NodeId>]) -> Result<(), LayoutError> {
    if nodes.len() > MAX_CPUS as usize {
        return Err(LayoutError::TooManyCpus {
            nr_cpu_ids: nodes.len(),
        });
    }
    if nodes.iter().all(Option::is_none) {
        return Err(LayoutError::NoCpu);
    }
    Ok(())
}
