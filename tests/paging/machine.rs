//! An instance on a [`Host`], booted as a kernel boots it, and taken down again.

use std::error::Error;

use parking_lot::RawMutex;
use pcpu::PerCpuAllocator;
use pcpu::allocator::Policy;
use pcpu::backing::paging::{Paging, PagingSetup};
use pcpu::hardened::{Finding, FindingHook, Hardening};
use pcpu::unit::{
    CpuId, EvenNodes, FirstChunkSpec, LayoutError, NodeId, Template, Topology, UnitPlan,
    storage_words,
};

use x86_64::VirtAddr;

use crate::host::Host;

pub type Backing<'h> = Paging<&'h Host, RawMutex>;
pub type Allocator<'p, 'h> = PerCpuAllocator<&'p Backing<'h>, RawMutex>;

/// Where the template is taken to be.
pub const BASE: usize = 0x40_0000;

/// What stands before the allocator itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    Nothing,
    Caches,
    Hardened,
}

/// Nothing is to be found.
struct Deaf;

impl FindingHook for Deaf {
    fn found(&self, finding: &Finding) {
        panic!("{finding}");
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub cpus: u32,
    pub nodes: u32,
    /// CPUs that are up at once; the others are possible only.
    pub online: u32,
    pub unit_bytes: usize,
    pub static_bytes: usize,
    pub reserved_bytes: usize,
    pub frames_of_a_node: u64,
    pub max_chunks: u32,
    pub front: Front,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            cpus: 4,
            nodes: 2,
            online: 2,
            unit_bytes: 32 << 10,
            static_bytes: 5001,
            reserved_bytes: 2048,
            frames_of_a_node: 4000,
            max_chunks: u32::MAX,
            front: Front::Nothing,
        }
    }
}

pub fn setup(host: &Host) -> PagingSetup {
    PagingSetup {
        level_4: host.level_4(),
        physical_memory_offset: host.physical_memory_offset(),
        window: VirtAddr::new(host.mmu.window.start as u64),
        neutral_base: BASE,
        node: NodeId::new(0),
        max_chunks: u32::MAX,
    }
}

/// A running machine.
pub struct Machine<'p, 'h> {
    pub shape: Shape,
    pub host: &'h Host,
    pub paging: &'p Backing<'h>,
    pub pcpu: &'p Allocator<'p, 'h>,
}

impl Shape {
    pub fn host(&self) -> Host {
        // A third of the units may be without a CPU.
        Host::new(self.nodes, self.frames_of_a_node, self.cpus * 4 / 3)
    }

    pub fn node_of(&self, cpu: CpuId) -> NodeId {
        let topology = EvenNodes::new(self.cpus, self.nodes).expect("a machine");
        topology.node(cpu)
    }

    /// The initial values of the static variables.
    pub fn template(&self) -> Vec<u8> {
        (0..self.static_bytes)
            .map(|at| (at % 251) as u8 | 1)
            .collect()
    }

    /// Boots, runs `act`, takes all down, and sees that nothing is left.
    pub fn run(&self, act: impl FnOnce(Machine<'_, '_>)) {
        let host = self.host();
        self.run_on(&host, act).expect("it boots");
    }

    /// Boots for as long as the process lives.
    pub fn boot_for_good(&self, host: &'static Host) -> Allocator<'static, 'static> {
        let topology = EvenNodes::new(self.cpus, self.nodes).expect("a machine");
        let (mut words, mut offsets) = (
            vec![0; storage_words(self.cpus)],
            vec![0; self.cpus as usize],
        );
        let plan = self.plan(&topology, &mut words).expect("a plan");
        // SAFETY: the machine is as the set-up says; its window is nobody else's.
        let paging = unsafe { Backing::new(host, self.setup(host), &plan) }.expect("frames");
        let paging = Box::leak(Box::new(paging));
        let values = self.template();
        let template = Template {
            bytes: &values,
            base: BASE,
        };
        let boot_cpu = |cpu| cpu == CpuId::new(0);
        let first_chunk = paging.build_first_chunk(plan, template, &mut offsets, boot_cpu);
        // SAFETY: the first chunk lies in the windows of the backing, which the instance uses alone.
        let pcpu = unsafe {
            PerCpuAllocator::new(&*paging, &first_chunk.expect("frames"), Policy::default())
        };
        let pcpu = pcpu.expect("metadata");
        for cpu in (0..self.online).map(CpuId::new) {
            pcpu.bring_up(cpu).expect("frames");
        }
        pcpu
    }

    fn setup(&self, host: &Host) -> PagingSetup {
        PagingSetup {
            max_chunks: self.max_chunks,
            ..setup(host)
        }
    }

    fn plan<'w>(
        &self,
        topology: &EvenNodes,
        words: &'w mut [u32],
    ) -> Result<UnitPlan<'w>, LayoutError> {
        let spec = FirstChunkSpec {
            static_bytes: self.static_bytes,
            reserved_bytes: self.reserved_bytes,
            atom_bytes: 4096,
            ..FirstChunkSpec::default()
        };
        UnitPlan::exact(&spec, self.unit_bytes, topology, words)
    }

    /// [`run`](Self::run) on a machine that may lack what it takes to boot.
    pub fn run_on(
        &self,
        host: &Host,
        act: impl FnOnce(Machine<'_, '_>),
    ) -> Result<(), Box<dyn Error>> {
        let topology = EvenNodes::new(self.cpus, self.nodes)?;
        let (mut words, mut offsets) = (
            vec![0; storage_words(self.cpus)],
            vec![0; self.cpus as usize],
        );
        let plan = self.plan(&topology, &mut words)?;
        assert!(host.out().is_empty());
        let taken_down = || {
            assert_eq!(host.out().len(), 0, "frames left");
            assert!(host.level_4_words().iter().all(|&word| word == 0));
            assert_eq!(
                host.mmu
                    .stale_faults
                    .load(std::sync::atomic::Ordering::Relaxed),
                0
            );
        };
        // SAFETY: the machine is as the set-up says; its window is nobody else's.
        let paging = unsafe { Backing::new(host, self.setup(host), &plan) };
        let mut paging = paging.inspect_err(|_| taken_down())?;
        let values = self.template();
        let template = Template {
            bytes: &values,
            base: BASE,
        };
        let before = host.out();
        let boot_cpu = |cpu| cpu == CpuId::new(0);
        let result = match paging.build_first_chunk(plan, template, &mut offsets, boot_cpu) {
            Ok(first_chunk) => {
                drop(values);
                // SAFETY: the first chunk lies in the windows of the backing, which the instance uses alone.
                let pcpu =
                    unsafe { PerCpuAllocator::new(&paging, &first_chunk, Policy::default()) };
                pcpu.map_err(<Box<dyn Error>>::from).and_then(|mut pcpu| {
                    match self.front {
                        Front::Nothing => {}
                        Front::Caches => pcpu.enable_caches()?,
                        Front::Hardened => pcpu.harden(Hardening::new(&Deaf))?,
                    }
                    for cpu in (0..self.online).map(CpuId::new) {
                        pcpu.bring_up(cpu)?;
                    }
                    act(Machine {
                        shape: *self,
                        host,
                        paging: &paging,
                        pcpu: &pcpu,
                    });
                    Ok(())
                })
            }
            Err(error) => {
                assert_eq!(host.out(), before, "{error}");
                Err(error.into())
            }
        };
        assert_eq!(paging.stats().frames, host.out().len() as u64);
        // SAFETY: the instance is gone, and the table is the only one.
        unsafe { paging.tear_down() };
        taken_down();
        result
    }
}
