//! A kernel in a process: its CPUs are threads with a GS base, one thread at a time on each; its per-CPU section is the part
//! of the program's data that its static variables lie in.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use parking_lot::RawMutex;
use pcpu::allocator::Policy;
use pcpu::backing::contig::Contig;
use pcpu::this_cpu::gs::{Gs, GsDomain};
use pcpu::this_cpu::pinned::Preemption;
use pcpu::unit::{CpuId, EvenNodes, FirstChunkSpec, Template, UnitPlan, storage_words};
use pcpu::{Domain, Handle, Instance, PerCpuAllocator, embed};

const CPUS: u32 = 3;
const PAGE_BYTES: usize = 4096;

pub enum Kernel {}

static INSTANCE: Instance<Contig<RawMutex>, RawMutex> = Instance::new();
static BOOT: LazyLock<()> = LazyLock::new(boot);

// SAFETY: `allocator` is always the same instance.
unsafe impl Domain for Kernel {
    type Backing = Contig<RawMutex>;
    type Lock = RawMutex;
    type Ops = Gs<Self>;

    fn allocator() -> &'static PerCpuAllocator<Contig<RawMutex>, RawMutex> {
        LazyLock::force(&BOOT);
        INSTANCE.get().expect("booted")
    }

    fn current_cpu() -> CpuId {
        CPU.get().expect("on a CPU")
    }
}

// SAFETY: operations run inside `Cpu`s only; all CPUs are brought up at boot.
unsafe impl GsDomain for Kernel {}

// SAFETY: a thread stays on its CPU as long as it has the `Cpu`.
unsafe impl Preemption for Kernel {
    fn disable_preemption() {
        DEPTH.set(DEPTH.get() + 1);
    }

    unsafe fn enable_preemption() {
        DEPTH.set(DEPTH.get() - 1);
    }

    fn is_preemption_disabled() -> bool {
        DEPTH.get() > 0
    }
}

thread_local! {
    static CPU: Cell<Option<CpuId>> = const { Cell::new(None) };
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

static CPU_LOCKS: [Mutex<()>; CPUS as usize] = [const { Mutex::new(()) }; CPUS as usize];

/// A thread runs on a CPU as long as it has this.
pub struct Cpu {
    _alone: MutexGuard<'static, ()>,
}

impl Cpu {
    pub fn enter(cpu: CpuId) -> Self {
        let alone = CPU_LOCKS[cpu.index()].lock();
        let offset = Kernel::allocator().units().offset(cpu);
        set_gs_base(offset.expect("a possible CPU"));
        assert!(CPU.replace(Some(cpu)).is_none(), "on one CPU at a time");
        Self {
            _alone: alone.unwrap_or_else(PoisonError::into_inner),
        }
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        set_gs_base(0);
        CPU.set(None);
    }
}

pub fn cpus() -> impl Iterator<Item = CpuId> {
    (0..CPUS).map(CpuId::new)
}

fn set_gs_base(base: usize) {
    const ARCH_SET_GS: i32 = 0x1001;
    // SAFETY: the calling thread's GS base, which nothing else uses in a process.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
    assert_eq!(result, 0, "a GS base of {base:#x}");
}

fn boot() {
    let section = section();
    let topology = EvenNodes::new(CPUS, 1).unwrap();
    let mut words = [0; storage_words(CPUS)];
    let mut offsets = [0; CPUS as usize];
    let spec = FirstChunkSpec {
        static_bytes: section.len(),
        dyn_bytes: 20 << 10,
        atom_bytes: PAGE_BYTES,
        ..FirstChunkSpec::default()
    };
    let plan = UnitPlan::embed(&spec, &topology, &mut words).unwrap();
    // SAFETY: the section is part of the program's data, which nothing writes to there.
    let bytes = unsafe { std::slice::from_raw_parts(section.start as *const u8, section.len()) };
    let template = Template {
        bytes,
        base: section.start,
    };
    let mut contig = Contig::new(memory(8 << 20), memory(1 << 20), &plan, template.base).unwrap();
    let first_chunk = embed::build(plan, template, &mut offsets, &mut contig).unwrap();
    // SAFETY: the first chunk lies in memory that the instance takes over.
    let pcpu = unsafe { PerCpuAllocator::new(contig, &first_chunk, Policy::default()) }.unwrap();
    for cpu in cpus() {
        pcpu.bring_up(cpu).unwrap();
    }
    INSTANCE.set_up(pcpu).unwrap();
}

fn memory(bytes: usize) -> &'static mut [MaybeUninit<u8>] {
    let layout = std::alloc::Layout::from_size_align(bytes, PAGE_BYTES).unwrap();
    // SAFETY: the size is not 0; the block is never freed.
    unsafe { std::slice::from_raw_parts_mut(std::alloc::alloc(layout).cast(), bytes) }
}

/// Where the static variables lie: a kernel's linker script gathers them, here others may lie in between.
fn section() -> Range<usize> {
    let variables = crate::statics::variables();
    let start = variables.iter().map(|range| range.start).min();
    let end = variables.iter().map(|range| range.end).max();
    let start = start.expect("there are some") / PAGE_BYTES * PAGE_BYTES;
    start..end.expect("there are some")
}

/// All CPUs' copies of a variable, as bytes.
pub fn snapshot<H: Handle<Domain = Kernel>>(variable: H) -> Vec<Vec<u8>> {
    let handle = variable.handle();
    let copy = |cpu| {
        let copy = pcpu::per_cpu_ptr(handle, cpu).expect("a possible CPU");
        // SAFETY: live, and nobody changes it while a test looks.
        let bytes = unsafe {
            std::slice::from_raw_parts(copy.as_ptr().cast::<u8>(), size_of::<H::Target>())
        };
        bytes.to_vec()
    };
    cpus().map(copy).collect()
}
