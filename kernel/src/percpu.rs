//! The per-CPU variables of this kernel: where `pcpu` comes in.
//!
//! In the order of boot:
//! 1. [`set_up`] plans the units as Linux does, from the section's size and the machine's topology: large pages (2 MiB) shared
//!    out to the CPUs of a node, or, with `percpu_alloc=page` on the command line, as many pages as the first chunk needs;
//! 2. the first chunk is built: the boot processor's unit in frames of its node, a copy of the section, which is the
//!    template; all other CPUs share one that is read only;
//! 3. the allocator takes the chunk over, and [`Kernel`] names it in the types of handles;
//! 4. a CPU is brought up ([`bring_up`]), and so has a unit of its own, before it comes; it loads its unit's offset into
//!    GS base ([`load_gs_base`]) before it touches a per-CPU variable;
//! 5. the template is not needed any more: [`template::give_back`].

use core::sync::atomic::{AtomicUsize, Ordering};

use pcpu::allocator::{PerCpuAllocator, Policy};
use pcpu::backing::paging::{Paging, PagingSetup};
use pcpu::this_cpu::gs::{Gs, GsDomain};
use pcpu::this_cpu::pinned::Preemption;
use pcpu::unit::{CpuId, FirstChunkSpec, NodeId, Template, UnitPlan, storage_words};
use pcpu::{
    CpuCell, CpuError, Domain, Handle, Instance, LocalCell, define_per_cpu_in, per_cpu_ptr,
};
use x86_64::VirtAddr;
use x86_64::registers::model_specific::{GsBase, KernelGsBase};

use self::memory::KernelMemory;
use crate::irq_lock::IrqLock;
use crate::machine::{MAX_CPUS, Machine};
use crate::memory::{PER_CPU_WINDOW, PHYSICAL_MAP, paging};
use crate::{modules, println};

pub mod memory;
pub mod template;

/// The room for modules' variables, and the first room for dynamic ones, as Linux has them on x86-64.
const RESERVED_BYTES: usize = 8 << 10;
const DYNAMIC_BYTES: usize = 28 << 10;

/// The CPU that is there from the start.
pub const BOOT_CPU: CpuId = CpuId::new(0);

/// Where the units' memory comes from.
pub type Memory = Paging<KernelMemory, IrqLock>;

/// The most chunks. On a machine with many possible CPUs units are small, and a window has room for more of them than its
/// places are worth: they have 64 KiB with 240 CPUs, so that 128 MiB a CPU can be had.
const MAX_CHUNKS: u32 = 2048;

static INSTANCE: Instance<Memory, IrqLock> = Instance::new();

/// How many frames the template gave back.
static TEMPLATE_FRAMES: AtomicUsize = AtomicUsize::new(0);

define_per_cpu_in! {
    in Kernel;

    /// The number of the CPU.
    #[percpu(read_mostly)]
    static CPU_NUMBER: CpuCell<u32> = CpuCell::new(0);
}

/// The kernel's instance.
pub enum Kernel {}

// SAFETY: `allocator` is always `INSTANCE`, which no other domain has.
unsafe impl Domain for Kernel {
    type Backing = Memory;
    type Lock = IrqLock;
    type Ops = Gs<Self>;

    fn allocator() -> &'static PerCpuAllocator<Memory, IrqLock> {
        INSTANCE.get().expect("set up at boot")
    }

    fn current_cpu() -> CpuId {
        CpuId::new(CPU_NUMBER.read())
    }
}

// SAFETY: a CPU is brought up and loads its GS base before interrupts come or anything else uses a variable; entries from
// ring 3 swap it back, and NMIs look at the register. The linker script sorts the section as the macro wants it.
unsafe impl GsDomain for Kernel {}

// SAFETY: threads of this kernel never move, and a CPU runs none before it is materialised.
unsafe impl Preemption for Kernel {
    fn disable_preemption() {}

    unsafe fn enable_preemption() {}

    fn is_preemption_disabled() -> bool {
        true
    }
}

/// The CPU that the caller runs on: threads of this kernel never move.
pub fn current_cpu() -> CpuId {
    Kernel::current_cpu()
}

/// Builds the first chunk and sets up the allocator. There is no heap yet, and none is needed.
///
/// # Panics
/// If there is not enough memory.
pub fn set_up(machine: &Machine) {
    let by_page = machine.start_info.option("percpu_alloc") == Some("page");
    let section = template::section();
    let spec = FirstChunkSpec {
        static_bytes: section.len(),
        reserved_bytes: RESERVED_BYTES,
        dyn_bytes: DYNAMIC_BYTES,
        ..FirstChunkSpec::default()
    };
    let template = Template {
        bytes: section,
        base: section.as_ptr().addr(),
    };
    let mut words = [0; storage_words(MAX_CPUS as u32)];
    let mut unit_offsets = [0; MAX_CPUS];
    let topology = machine.topology();
    let plan = if by_page {
        UnitPlan::page(&spec, &topology, &mut words)
    } else {
        UnitPlan::embed(&spec, &topology, &mut words)
    };
    let plan = plan.unwrap_or_else(|error| panic!("no plan for the units: {error}"));
    println!("{}", plan.boot_log());

    let setup = PagingSetup {
        level_4: paging::root(),
        physical_memory_offset: VirtAddr::new(PHYSICAL_MAP as u64),
        window: VirtAddr::new(PER_CPU_WINDOW as u64),
        neutral_base: template.base,
        node: NodeId::new(0),
        max_chunks: MAX_CHUNKS,
    };
    // SAFETY: the tables are in use and the only ones, physical memory is mapped there, and the window is nobody else's.
    let mut paging = unsafe { Memory::new(KernelMemory, setup, &plan) }
        .unwrap_or_else(|error| panic!("no page tables for the units: {error}"));
    let first_chunk = paging
        .build_first_chunk(plan, template, &mut unit_offsets, |cpu| cpu == BOOT_CPU)
        .unwrap_or_else(|error| panic!("no first chunk: {error}"));
    // SAFETY: the first chunk lies in the windows of `paging`, which the instance takes over.
    let allocator = unsafe { PerCpuAllocator::new(paging, &first_chunk, Policy::default()) }
        .unwrap_or_else(|error| panic!("no allocator: {error}"));
    INSTANCE
        .set_up(allocator)
        .unwrap_or_else(|error| panic!("set up twice: {error}"));
}

/// Gives a CPU that is about to come for the first time its copies, with the initial values of the modules' variables, and writes
/// its number into its own.
///
/// # Errors
/// [`CpuError`]: it is not possible, or there is no memory.
pub fn bring_up(cpu: CpuId) -> Result<(), CpuError> {
    Kernel::allocator().bring_up(cpu)?;
    modules::initialise(cpu);
    // SAFETY: the CPU does not run yet, and nobody else uses this variable.
    unsafe { copy(&CPU_NUMBER, cpu).write(CpuCell::new(cpu.get())) };
    Ok(())
}

/// Makes `cpu` find its copies: its unit's offset goes into GS base, and 0, a user's, into the one that `swapgs` swaps
/// with. Called by that CPU, after its descriptor tables are loaded.
pub fn load_gs_base(cpu: CpuId) {
    let offset = Kernel::allocator()
        .units()
        .offset(cpu)
        .unwrap_or_else(|| panic!("CPU {cpu} is not possible"));
    GsBase::write(VirtAddr::new(offset as u64));
    KernelGsBase::write(VirtAddr::zero());
}

/// `cpu`'s copy of a static variable.
pub fn copy<V: Handle<Domain = Kernel>>(variable: &V, cpu: CpuId) -> *mut V::Target {
    per_cpu_ptr(variable, cpu)
        .unwrap_or_else(|error| panic!("no copy: {error}"))
        .as_ptr()
}

/// How many frames the per-CPU memory holds: the units, their page tables, and the allocator's own data.
pub fn frames_held() -> u64 {
    Kernel::allocator().backing().stats().frames
}

/// How many frames the template gave back.
pub fn template_frames() -> usize {
    TEMPLATE_FRAMES.load(Ordering::Relaxed)
}

/// Gives the template's memory back.
pub fn free_template() {
    TEMPLATE_FRAMES.store(template::give_back(), Ordering::Relaxed);
}
