//! The layout of units against real boot logs, against a plain model of the rules, and its cost.
//!
//! `data/first_chunk.jsonl` has a first chunk a line: what the kernel was given (`static`, `reserved`, `input`,
//! the CPUs of each group) and what it printed (`raw`).

use std::cell::Cell;

use pcpu::unit::{
    CpuId, DistanceMap, EvenNodes, FirstChunkSpec, GRANULE_BYTES, MAX_CPUS, NodeId, NodeMap,
    Topology, UnitId, UnitPlan, storage_words,
};
use serde_json::Value;

/// Real first chunks: the inputs, and the lines that were printed.
fn golden() -> Vec<Value> {
    include_str!("data/first_chunk.jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn number(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn spec_of(case: &Value) -> FirstChunkSpec {
    FirstChunkSpec {
        static_bytes: number(&case["static"]),
        reserved_bytes: number(&case["reserved"]),
        dyn_bytes: number(&case["input"]["dyn_request"]),
        atom_bytes: number(&case["input"]["atom_size"]),
        page_bytes: number(&case["input"]["page_size"]),
        min_unit_bytes: number(&case["input"]["min_unit_size"]),
    }
}

/// The CPUs of each group, without the unused units, which are for the plan to find.
fn groups_of(case: &Value) -> Vec<Vec<CpuId>> {
    let cpus = |group: &Value| {
        group
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_u64)
            .collect::<Vec<_>>()
    };
    let groups = case["groups"].as_array().unwrap().iter().map(cpus);
    groups
        .map(|group| {
            group
                .into_iter()
                .map(|cpu| CpuId::new(cpu as u32))
                .collect()
        })
        .collect()
}

fn plan_of<'m>(case: &Value, topology: &impl Topology, words: &'m mut [u32]) -> UnitPlan<'m> {
    let plan = match case["first_chunk"].as_str().unwrap() {
        "embed" => UnitPlan::embed(&spec_of(case), topology, words),
        "page" => UnitPlan::page(&spec_of(case), topology, words),
        other => panic!("first chunk by {other}"),
    };
    plan.unwrap_or_else(|error| panic!("{}: {error}", case["id"]))
}

/// The lines of a boot log with that prefix.
fn raw_lines(case: &Value, prefix: &str) -> Vec<String> {
    let lines = case["raw"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| line.as_str().unwrap().to_owned());
    lines.filter(|line| line.starts_with(prefix)).collect()
}

#[test]
fn every_boot_log_comes_out_the_same() {
    let (mut cases, mut first_lines) = (0, 0);
    for case in golden() {
        let mut groups = groups_of(&case);
        // Neither the order of the groups nor of their CPUs is an input of the kernel's.
        groups.reverse();
        groups.iter_mut().for_each(|group| group.reverse());
        let mut nodes = vec![None; MAX_CPUS as usize];
        let topology = NodeMap::from_groups(&groups, &mut nodes).unwrap();
        let mut words = vec![0; storage_words(topology.nr_cpu_ids())];
        let plan = plan_of(&case, &topology, &mut words);
        let log = plan.boot_log().alloc_lines().to_string();
        assert_eq!(
            log.lines().collect::<Vec<_>>(),
            raw_lines(&case, "pcpu-alloc:"),
            "{}",
            case["id"]
        );
        cases += 1;
        // Older kernels print an address as well, or another prefix.
        for line in raw_lines(&case, "percpu:")
            .iter()
            .filter(|line| !line.contains('@'))
        {
            assert_eq!(
                plan.boot_log().first_line().to_string(),
                *line,
                "{}",
                case["id"]
            );
            first_lines += 1;
        }
        check_invariants(&plan, &topology);
    }
    assert_eq!((cases, first_lines), (96, 49));
}

#[test]
fn nodes_and_distances_make_the_groups_that_explicit_lists_make() {
    for case in golden()
        .iter()
        .filter(|case| case["first_chunk"] == "embed")
    {
        let groups = groups_of(case);
        let mut nodes = vec![None; MAX_CPUS as usize];
        for (node, group) in (0..).map(NodeId::new).zip(&groups) {
            group.iter().for_each(|cpu| nodes[cpu.index()] = Some(node));
        }
        let n = groups.len();
        let distances: Vec<u8> = (0..n * n)
            .map(|i| if i / n == i % n { 10 } else { 21 })
            .collect();
        let (mut words, mut other_words) = (
            vec![0; storage_words(MAX_CPUS)],
            vec![0; storage_words(MAX_CPUS)],
        );
        let by_node = plan_of(case, &NodeMap::new(&nodes).unwrap(), &mut words);
        let by_distance = plan_of(
            case,
            &DistanceMap::new(&nodes, &distances, n).unwrap(),
            &mut other_words,
        );
        let (by_node, by_distance) = (
            by_node.boot_log().alloc_lines(),
            by_distance.boot_log().alloc_lines(),
        );
        let want = raw_lines(case, "pcpu-alloc:").join("\n");
        assert_eq!(
            (by_node.to_string(), by_distance.to_string()),
            (want.clone(), want),
            "{}",
            case["id"]
        );
    }
}

#[test]
fn a_distance_that_is_local_one_way_only_separates() {
    let nodes = [0, 1, 2, 0].map(|node| Some(NodeId::new(node)));
    let group_sizes = |distances: [u8; 9]| {
        let topology = DistanceMap::new(&nodes, &distances, 3).unwrap();
        let mut words = [0; storage_words(4)];
        let plan = UnitPlan::embed(&FirstChunkSpec::default(), &topology, &mut words).unwrap();
        plan.groups()
            .map(|group| (group.node.get(), group.nr_cpus))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        group_sizes([10, 10, 20, 10, 10, 20, 20, 20, 10]),
        [(0, 3), (2, 1)]
    );
    assert_eq!(
        group_sizes([10, 10, 20, 11, 10, 20, 20, 20, 10]),
        [(0, 2), (1, 1), (2, 1)]
    );
    assert_eq!(
        group_sizes([10, 11, 20, 10, 10, 20, 20, 20, 10]),
        [(0, 2), (1, 1), (2, 1)]
    );
    // Local isn't transitive here: a group is what is local to its lowest CPU.
    assert_eq!(group_sizes([10, 10, 10, 10, 10, 20, 10, 20, 10]), [(0, 4)]);
}

/// What the head of `unit.rs` promises.
fn check_invariants(plan: &UnitPlan<'_>, topology: &impl Topology) {
    let sizes = plan.sizes();
    let mut next_unit = 0;
    let mut lowest_before = None;
    for group in plan.groups() {
        assert_eq!(group.first_unit.get(), next_unit);
        assert!(group.nr_units.is_multiple_of(sizes.units_per_alloc()) && group.nr_cpus >= 1);
        let units = (next_unit..next_unit + group.nr_units).map(UnitId::new);
        let cpus: Vec<_> = units.map(|unit| plan.cpu_of_unit(unit)).collect();
        let (used, unused) = cpus.split_at(group.nr_cpus as usize);
        assert!(used.iter().all(Option::is_some) && unused.iter().all(Option::is_none));
        assert!(used.is_sorted() && lowest_before < used[0]);
        assert_eq!(used[0], Some(group.lowest_cpu));
        for (unit, cpu) in (next_unit..).map(UnitId::new).zip(used.iter().flatten()) {
            assert_eq!(plan.unit_of_cpu(*cpu), Some(unit));
            assert_eq!(plan.node_of_cpu(*cpu), Some(topology.node(*cpu)));
        }
        lowest_before = used[0];
        next_unit += group.nr_units;
    }
    assert_eq!(plan.nr_units(), next_unit);
    assert_eq!(plan.nr_cpus() as usize, plan.possible_cpus().count());
    assert!(
        plan.possible_cpus().eq((0..topology.nr_cpu_ids())
            .map(CpuId::new)
            .filter(|cpu| topology.is_possible(*cpu)))
    );
    assert_eq!(plan.unit_of_cpu(CpuId::new(topology.nr_cpu_ids())), None);
    assert_eq!(plan.cpu_of_unit(UnitId::new(next_unit)), None);

    let regions = sizes.regions();
    assert_eq!(regions.static_vars, 0..sizes.static_bytes());
    assert_eq!(
        regions.reserved.start,
        sizes.static_bytes().next_multiple_of(GRANULE_BYTES)
    );
    assert_eq!(regions.reserved.len(), sizes.reserved_bytes());
    assert_eq!(regions.dynamic, regions.reserved.end..sizes.sum_bytes());
    assert_eq!(regions.tail, sizes.sum_bytes()..sizes.unit_bytes());
    for bytes in [sizes.sum_bytes(), sizes.unit_bytes()] {
        assert!(bytes.is_multiple_of(sizes.page_bytes()));
    }
    assert!(sizes.alloc_bytes().is_multiple_of(sizes.atom_bytes()));
}

/// The rules for sizes and packing, in the plainest form, every number of units per allocation tried.
fn model(spec: &FirstChunkSpec, group_cpus: &[usize]) -> (usize, usize) {
    let regions = spec.static_bytes + spec.reserved_bytes + spec.dyn_bytes.max(12 << 10);
    let min_unit = regions
        .next_multiple_of(spec.page_bytes)
        .max(spec.min_unit_bytes);
    let alloc = min_unit.next_multiple_of(spec.atom_bytes);
    let cpus: usize = group_cpus.iter().sum();
    let (mut best, mut fewest) = (0, usize::MAX);
    for upa in (1..=alloc / min_unit).rev() {
        if !alloc.is_multiple_of(upa) || !(alloc / upa).is_multiple_of(spec.page_bytes) {
            continue;
        }
        let allocs: usize = group_cpus.iter().map(|cpus| cpus.div_ceil(upa)).sum();
        if allocs * upa - cpus > cpus / 3 {
            continue;
        }
        if allocs > fewest {
            break;
        }
        (best, fewest) = (upa, allocs);
    }
    (alloc / best, best)
}

#[test]
fn random_machines_follow_the_rules() {
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..3000 {
        let page_bytes = 4096 << random.usize(..5);
        let spec = FirstChunkSpec {
            static_bytes: random.usize(..300_000),
            reserved_bytes: random.usize(..5000) * 4,
            dyn_bytes: random.usize(..60_000),
            atom_bytes: page_bytes * [1, 2, 3, 7, 16, 60, 256, 512, 1024, 5040][random.usize(..10)],
            page_bytes,
            min_unit_bytes: [32 << 10, 64 << 10, 50_000][random.usize(..3)],
        };
        let (nr_ids, nr_nodes) = (1 + random.usize(..300), 1 + random.usize(..9));
        let mut nodes: Vec<_> = (0..nr_ids)
            .map(|_| {
                Some(NodeId::new(random.usize(..nr_nodes) as u32)).filter(|_| random.usize(..5) > 0)
            })
            .collect();
        nodes[random.usize(..nr_ids)] = Some(NodeId::new(0));
        let topology = NodeMap::new(&nodes).unwrap();

        // Stale storage, as much as is needed and no more.
        let mut words = vec![0xdead_beef; storage_words(nr_ids as u32)];
        let plan = UnitPlan::embed(&spec, &topology, &mut words).unwrap();
        check_invariants(&plan, &topology);
        let mut group_cpus = vec![0; nr_nodes];
        nodes
            .iter()
            .flatten()
            .for_each(|node| group_cpus[node.index()] += 1);
        group_cpus.retain(|cpus| *cpus > 0);
        let (unit_bytes, units_per_alloc) = model(&spec, &group_cpus);
        assert_eq!(plan.nr_groups() as usize, group_cpus.len());
        assert_eq!(
            (
                plan.sizes().unit_bytes(),
                plan.sizes().units_per_alloc() as usize
            ),
            (unit_bytes, units_per_alloc)
        );

        let mut words = vec![0xdead_beef; storage_words(nr_ids as u32)];
        let plan = UnitPlan::page(&spec, &topology, &mut words).unwrap();
        check_invariants(&plan, &topology);
        assert_eq!((plan.nr_groups(), plan.nr_units()), (1, plan.nr_cpus()));
        assert!(plan.sizes().dyn_bytes() < (12 << 10) + page_bytes);
        assert_eq!(plan.sizes().atom_bytes(), page_bytes);
    }
}

#[test]
fn the_page_builder_counts_the_pages_of_the_tail() {
    let mut words = [0; storage_words(1)];
    let one = EvenNodes::new(1, 1).unwrap();
    let plan = UnitPlan::page(&FirstChunkSpec::default(), &one, &mut words).unwrap();
    assert_eq!(plan.sizes().populated_pages(), 3);
    let line = plan.boot_log().first_line().to_string();
    assert_eq!(line, "percpu: 8 4K pages/cpu s0 r0 d12288");

    let spec = FirstChunkSpec {
        page_bytes: 64 << 10,
        ..Default::default()
    };
    let plan = UnitPlan::page(&spec, &one, &mut words).unwrap();
    let line = plan.boot_log().first_line().to_string();
    assert_eq!(line, "percpu: 1 64K pages/cpu s0 r0 d65536");
}

#[test]
fn wide_numbers_are_padded() {
    let nodes: Vec<_> = (0..24).map(|cpu| Some(NodeId::new(cpu / 2))).collect();
    let mut words = [0; storage_words(24)];
    let spec = FirstChunkSpec {
        atom_bytes: 4096,
        ..Default::default()
    };
    let plan = UnitPlan::embed(&spec, &NodeMap::new(&nodes).unwrap(), &mut words).unwrap();
    // 12 groups: marks of two digits. 60 columns hold 7 allocations of 8, hence 4 to a line.
    assert_eq!(
        plan.boot_log().alloc_lines().to_string(),
        "pcpu-alloc: s0 r0 d12288 u32768 alloc=8*4096\n\
         pcpu-alloc: [00] 00 [00] 01 [01] 02 [01] 03\n\
         pcpu-alloc: [02] 04 [02] 05 [03] 06 [03] 07\n\
         pcpu-alloc: [04] 08 [04] 09 [05] 10 [05] 11\n\
         pcpu-alloc: [06] 12 [06] 13 [07] 14 [07] 15\n\
         pcpu-alloc: [08] 16 [08] 17 [09] 18 [09] 19\n\
         pcpu-alloc: [10] 20 [10] 21 [11] 22 [11] 23"
    );
}

#[test]
fn ids_with_holes_are_padded_by_the_number_of_cpus() {
    let mut nodes = vec![None; 201];
    [0, 8, 200]
        .iter()
        .for_each(|&cpu: &usize| nodes[cpu] = Some(NodeId::new(0)));
    let mut words = [0; storage_words(201)];
    let plan = UnitPlan::embed(
        &FirstChunkSpec::default(),
        &NodeMap::new(&nodes).unwrap(),
        &mut words,
    )
    .unwrap();
    assert!(
        plan.boot_log()
            .to_string()
            .ends_with("\npcpu-alloc: [0] 0 8 200 -")
    );
}

/// Counts how often it is asked whether two CPUs are local.
struct Counted {
    topology: EvenNodes,
    questions: Cell<u64>,
}

impl Topology for Counted {
    fn nr_cpu_ids(&self) -> u32 {
        self.topology.nr_cpu_ids()
    }
    fn is_possible(&self, cpu: CpuId) -> bool {
        self.topology.is_possible(cpu)
    }
    fn is_local(&self, a: CpuId, b: CpuId) -> bool {
        self.questions.set(self.questions.get() + 1);
        self.topology.is_local(a, b)
    }
    fn node(&self, cpu: CpuId) -> NodeId {
        self.topology.node(cpu)
    }
}

#[test]
fn the_largest_machine_costs_a_question_per_cpu_and_group() {
    let topology = Counted {
        topology: EvenNodes::new(MAX_CPUS, 64).unwrap(),
        questions: Cell::new(0),
    };
    let mut words = vec![0; storage_words(MAX_CPUS)];
    let spec = FirstChunkSpec {
        static_bytes: 212_992,
        reserved_bytes: 8192,
        dyn_bytes: 28_672,
        ..Default::default()
    };
    let start = std::time::Instant::now();
    let plan = UnitPlan::embed(&spec, &topology, &mut words).unwrap();
    println!("8192 CPUs on 64 nodes: {:?}", start.elapsed());
    assert_eq!((plan.nr_groups(), plan.nr_units()), (64, 8192));
    assert!(
        topology.questions.get() <= 64 * u64::from(MAX_CPUS),
        "{} questions",
        topology.questions.get()
    );
    check_invariants(&plan, &topology);

    // An atom with ever so many divisors is no slower: packing beyond a third of waste isn't tried.
    let spec = FirstChunkSpec {
        atom_bytes: 1 << 50,
        ..spec
    };
    let start = std::time::Instant::now();
    let plan = UnitPlan::embed(&spec, &topology, &mut words).unwrap();
    println!("the same with atoms of 1 PiB: {:?}", start.elapsed());
    check_invariants(&plan, &topology);
}

#[test]
fn every_number_of_cpus_and_every_cpu_its_own_node() {
    let mut words = vec![0; storage_words(MAX_CPUS)];
    let spec = FirstChunkSpec {
        static_bytes: 30_000,
        ..Default::default()
    };
    for nr_cpus in (1_u32..200).chain([1000, 4095, 8191, 8192]) {
        for nr_nodes in [1, nr_cpus.div_ceil(3), nr_cpus.min(600)] {
            let topology = EvenNodes::new(nr_cpus, nr_nodes).unwrap();
            let plan = UnitPlan::embed(&spec, &topology, &mut words).unwrap();
            assert_eq!(plan.nr_groups(), nr_nodes);
            check_invariants(&plan, &topology);
        }
    }
}
