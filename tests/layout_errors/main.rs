//! What goes wrong: nonsense is a typed error with the value and the limit, and a build that fails leaves nothing
//! behind.

mod arena;
mod builders;
mod sizes;

use pcpu::unit::{
    CpuId, DistanceMap, EvenNodes, FirstChunkSpec, LayoutError, MAX_CPUS, NodeId, NodeMap,
    Topology, UnitPlan, storage_words,
};

fn cpus(ids: &[u32]) -> Vec<CpuId> {
    ids.iter().copied().map(CpuId::new).collect()
}

fn group_error(groups: &[&[u32]]) -> LayoutError {
    let groups: Vec<_> = groups.iter().map(|group| cpus(group)).collect();
    let mut storage = [None; 16];
    NodeMap::from_groups(&groups, &mut storage).unwrap_err()
}

#[test]
fn groups_that_are_no_topology() {
    assert_eq!(group_error(&[]), LayoutError::NoCpu);
    assert_eq!(
        group_error(&[&[0], &[]]),
        LayoutError::EmptyGroup { group: 1 }
    );
    assert_eq!(
        group_error(&[&[0, 1, 2, 3], &[2]]),
        LayoutError::CpuTwice { cpu: CpuId::new(2) }
    );
    assert_eq!(
        group_error(&[&[5, 5]]),
        LayoutError::CpuTwice { cpu: CpuId::new(5) }
    );
    assert_eq!(
        group_error(&[&[0, 9000]]),
        LayoutError::CpuTooHigh {
            cpu: CpuId::new(9000)
        }
    );
    assert_eq!(
        group_error(&[&[MAX_CPUS]]),
        LayoutError::CpuTooHigh {
            cpu: CpuId::new(8192)
        }
    );
    assert_eq!(
        group_error(&[&[u32::MAX]]),
        LayoutError::CpuTooHigh {
            cpu: CpuId::new(u32::MAX)
        }
    );
    let what = "the node of each CPU";
    assert_eq!(
        group_error(&[&[16]]),
        LayoutError::StorageTooSmall {
            what,
            entries: 16,
            needed: 17
        }
    );
}

#[test]
fn tables_that_are_no_topology() {
    let node = |id| Some(NodeId::new(id));
    assert_eq!(NodeMap::new(&[]).unwrap_err(), LayoutError::NoCpu);
    assert_eq!(NodeMap::new(&[None, None]).unwrap_err(), LayoutError::NoCpu);
    let many = vec![node(0); MAX_CPUS as usize + 1];
    assert_eq!(
        NodeMap::new(&many).unwrap_err(),
        LayoutError::TooManyCpus { nr_cpu_ids: 8193 }
    );
    assert!(NodeMap::new(&many[1..]).is_ok());

    let nodes = [node(0), node(1)];
    let distances =
        |distances, nr_nodes| DistanceMap::new(&nodes, distances, nr_nodes).unwrap_err();
    assert_eq!(
        distances(&[10; 3], 2),
        LayoutError::DistanceCount {
            entries: 3,
            nr_nodes: 2
        }
    );
    assert_eq!(
        distances(&[], usize::MAX),
        LayoutError::DistanceCount {
            entries: 0,
            nr_nodes: usize::MAX
        }
    );
    let (cpu, one) = (CpuId::new(1), NodeId::new(1));
    assert_eq!(
        distances(&[10], 1),
        LayoutError::NodeTooHigh {
            cpu,
            node: one,
            nr_nodes: 1
        }
    );
    let zero = CpuId::new(0);
    assert_eq!(
        distances(&[], 0),
        LayoutError::NodeTooHigh {
            cpu: zero,
            node: NodeId::new(0),
            nr_nodes: 0
        }
    );
    let (from, to) = (NodeId::new(0), NodeId::new(1));
    assert_eq!(
        distances(&[10, 9, 20, 10], 2),
        LayoutError::Distance {
            from,
            to,
            distance: 9
        }
    );
    assert_eq!(
        distances(&[10, 20, 20, 11], 2),
        LayoutError::Distance {
            from: to,
            to,
            distance: 11
        }
    );

    assert_eq!(EvenNodes::new(0, 1).unwrap_err(), LayoutError::NoCpu);
    assert_eq!(
        EvenNodes::new(8193, 1).unwrap_err(),
        LayoutError::TooManyCpus { nr_cpu_ids: 8193 }
    );
    assert_eq!(
        EvenNodes::new(4, 5).unwrap_err(),
        LayoutError::NodeCount {
            nr_nodes: 5,
            limit: 4
        }
    );
    assert_eq!(
        EvenNodes::new(4, 0).unwrap_err(),
        LayoutError::NodeCount {
            nr_nodes: 0,
            limit: 4
        }
    );
}

/// Says of everything what suits a caller least.
struct Liar {
    nr_cpu_ids: u32,
    possible: u32,
}

impl Topology for Liar {
    fn nr_cpu_ids(&self) -> u32 {
        self.nr_cpu_ids
    }
    fn is_possible(&self, cpu: CpuId) -> bool {
        cpu.get() < self.possible
    }
    fn is_local(&self, _: CpuId, _: CpuId) -> bool {
        false
    }
    fn node(&self, _: CpuId) -> NodeId {
        NodeId::new(u32::MAX)
    }
}

#[test]
fn a_topology_of_the_callers_is_not_trusted() {
    let mut words = vec![0; storage_words(MAX_CPUS)];
    let spec = FirstChunkSpec::default();
    let mut plan = |nr_cpu_ids, possible| {
        UnitPlan::embed(
            &spec,
            &Liar {
                nr_cpu_ids,
                possible,
            },
            &mut words,
        )
        .map(|plan| plan.nr_groups())
    };
    assert_eq!(plan(0, 0), Err(LayoutError::NoCpu));
    assert_eq!(plan(7, 0), Err(LayoutError::NoCpu));
    assert_eq!(
        plan(8193, 1),
        Err(LayoutError::TooManyCpus { nr_cpu_ids: 8193 })
    );
    assert_eq!(
        plan(u32::MAX, 1),
        Err(LayoutError::TooManyCpus {
            nr_cpu_ids: u32::MAX as usize
        })
    );
    // Not even local to itself: every CPU is a group all the same.
    assert_eq!(plan(5, u32::MAX), Ok(5));
}
