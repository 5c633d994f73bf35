//! Recorded traces of real kernels through the library: nothing is refused, no two areas overlap, every copy is zero
//! when it is handed out, all comes back, and the packing is at least Linux's.

#[path = "common/audit.rs"]
mod audit;
#[path = "common/copies.rs"]
mod copies;
#[path = "common/free.rs"]
mod free;
#[path = "common/recorded.rs"]
mod recorded;

use free::FreeArea;
use std::collections::{BTreeMap, HashMap};

use pcpu::allocator::Policy;
use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::unit::CpuId;
use pcpu::{FreeFlags, Request};

use audit::audit;
use copies::{assert_stamped, assert_zero, stamp};
use recorded::{Op, read};

/// What Linux 6.1 needed for a trace: 16 CPUs, units of 256 KiB, its background work run at once.
struct Linux {
    name: &'static str,
    ops: u64,
    /// Populated pages of a unit, at most.
    peak_pages: u64,
    /// Of the populated bytes (the static region left out), the part in use; a mean over all operations.
    use_of_memory: f64,
    /// Requests that the recorded kernel refused.
    refused: u64,
}

const LINUX: [Linux; 6] = [
    linux("bpf", 69_688, 1332, 0.898, 2),
    linux("cg", 58_590, 265, 0.728, 0),
    linux("fork", 53_864, 61, 0.011, 0),
    linux("ns", 29_579, 127, 0.598, 0),
    linux("boot8", 10_810, 124, 0.508, 0),
    linux("numa32", 99_062, 940, 0.817, 870),
];

const fn linux(
    name: &'static str,
    ops: u64,
    peak_pages: u64,
    use_of_memory: f64,
    refused: u64,
) -> Linux {
    Linux {
        name,
        ops,
        peak_pages,
        use_of_memory,
        refused,
    }
}

/// How a trace is run.
#[derive(Debug, Clone, Copy)]
struct Run {
    cpus: u32,
    /// The upkeep runs at most once in so many operations, when it is due.
    upkeep_every: u64,
    /// How many of the CPUs are looked at: all copies are handed out alike.
    looks_at: usize,
}

#[derive(Debug, Default)]
struct Outcome {
    ops: u64,
    refused: u64,
    peak_pages: u64,
    use_of_memory: f64,
}

impl Run {
    /// Panics if anything is refused, overlaps, is misaligned or not zero, was written by somebody else, or stays.
    fn replay(&self, pcpu: &SimAllocator, trace: &[Op]) -> Outcome {
        let static_bytes = pcpu.sizes().static_bytes() as f64;
        let page_bytes = pcpu.sizes().page_bytes() as f64;
        // By the address that the recorded kernel gave: the newest last.
        let mut by_ptr: HashMap<u64, Vec<usize>> = HashMap::new();
        let mut live: BTreeMap<usize, usize> = BTreeMap::new();
        let mut outcome = Outcome::default();
        let mut use_sum = 0.0;
        for op in trace {
            match *op {
                Op::Alloc { ptr, request } => {
                    let address = self.allocate(pcpu, &request, &mut live);
                    by_ptr.entry(ptr).or_default().push(address);
                }
                Op::Refused { request } => {
                    let address = self.allocate(pcpu, &request, &mut live);
                    self.free(pcpu, address, &mut live);
                    outcome.refused += 1;
                    continue;
                }
                Op::Free { ptr } => {
                    // One whose allocation came before the trace.
                    let Some(address) = by_ptr.get_mut(&ptr).and_then(Vec::pop) else {
                        continue;
                    };
                    self.free(pcpu, address, &mut live);
                }
            }
            outcome.ops += 1;
            if outcome.ops.is_multiple_of(self.upkeep_every) {
                pcpu.upkeep_if_due();
            }
            let stats = pcpu.stats();
            let populated_bytes = stats.populated_pages as f64 * page_bytes - static_bytes;
            use_sum += stats.live_bytes as f64 / populated_bytes;
        }
        let stats = pcpu.stats();
        outcome.use_of_memory = use_sum / outcome.ops as f64;
        outcome.peak_pages = stats.populated_peak_pages;
        assert_eq!(stats.failures, 0);
        for address in live.keys().copied().collect::<Vec<_>>() {
            self.free(pcpu, address, &mut live);
        }
        pcpu.trim(1);
        let end = audit(pcpu);
        let first_pages = pcpu.sizes().populated_pages() as u64;
        assert_eq!(
            (end.stats.live, end.stats.populated_pages),
            (0, first_pages)
        );
        assert!(end.stats.chunks <= 2, "one spare chunk may stay");
        outcome
    }

    fn cpus_looked_at(&self) -> impl Iterator<Item = CpuId> {
        let step = (self.cpus as usize / self.looks_at).max(1);
        (0..self.cpus).step_by(step).map(CpuId::new)
    }

    fn allocate(
        &self,
        pcpu: &SimAllocator,
        request: &Request,
        live: &mut BTreeMap<usize, usize>,
    ) -> usize {
        let address = pcpu.allocate(request);
        let address = address.unwrap_or_else(|error| panic!("{request:?}: {error}"));
        assert!(address.is_multiple_of(request.align()));
        let below = live.range(..address + request.bytes()).next_back();
        assert!(below.is_none_or(|(&other, &bytes)| other + bytes <= address));
        live.insert(address, request.bytes());
        let area = (address, request.bytes());
        for cpu in self.cpus_looked_at() {
            assert_zero(pcpu, area, cpu);
        }
        stamp(pcpu, area);
        address
    }

    fn free(&self, pcpu: &SimAllocator, address: usize, live: &mut BTreeMap<usize, usize>) {
        let bytes = live.remove(&address).expect("it is live");
        for cpu in self.cpus_looked_at() {
            assert_stamped(pcpu, (address, bytes), cpu);
        }
        let freed = pcpu.free_area(address, FreeFlags::ATOMIC);
        assert_eq!(freed, Ok(()));
    }
}

#[test]
fn traces_are_packed_at_least_as_well_as_by_linux() {
    let run = Run {
        cpus: 16,
        upkeep_every: 1,
        looks_at: 16,
    };
    for linux in &LINUX {
        let pcpu = Machine::new(16).checked().build().unwrap();
        let outcome = run.replay(&pcpu, &read(linux.name));
        let name = linux.name;
        assert_eq!(
            (outcome.ops, outcome.refused),
            (linux.ops, linux.refused),
            "{name}"
        );
        assert!(
            outcome.peak_pages <= linux.peak_pages,
            "{name}: {} pages, {} by Linux",
            outcome.peak_pages,
            linux.peak_pages
        );
        // Linux's figures are rounded to three places.
        assert!(
            outcome.use_of_memory + 0.0005 >= linux.use_of_memory,
            "{name}: {:.4} of the memory in use, {} by Linux",
            outcome.use_of_memory,
            linux.use_of_memory
        );
    }
}

/// The upkeep may come late, memory may be dirty, and making chunks may need to sleep.
#[test]
fn nothing_is_refused_when_the_upkeep_comes_late() {
    // As many spare chunks as the worst thousand operations of all traces take.
    let many_spares = Policy {
        spare_chunks: 24,
        spare_chunks_max: 24,
        ..Policy::default()
    };
    for linux in &LINUX {
        let trace = read(linux.name);
        let machine = Machine::new(4).checked().dirty_memory();
        let sleeping = machine.clone().sleeping_reserve();
        for (machine, upkeep_every) in [
            (machine, 1000),
            (sleeping.clone(), 1),
            (sleeping.policy(many_spares), 1000),
        ] {
            let run = Run {
                cpus: 4,
                upkeep_every,
                looks_at: 2,
            };
            let pcpu = machine.build().unwrap();
            // A kernel runs the upkeep once before it is asked for anything.
            pcpu.upkeep();
            run.replay(&pcpu, &trace);
        }
    }
}

/// A machine with many more possible CPUs than there are.
#[test]
fn traces_run_on_a_machine_of_which_few_cpus_are_up() {
    // The first CPUs are those that are up.
    let run = Run {
        cpus: 3,
        upkeep_every: 1,
        looks_at: 3,
    };
    for name in ["ns", "boot8"] {
        let machine = Machine::new(256).nodes(4).online(3).checked();
        run.replay(&machine.build().unwrap(), &read(name));
    }
}
