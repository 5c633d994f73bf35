//! The per-CPU variables of this kernel: where `pcpu` comes in.
//!
//! In the order of boot:
//! 1. [`set_up`] plans the units as Linux does, from the section's size and the machine's topology: large pages (2 MiB) shared
//!    out to the CPUs of a node, or, with `percpu_alloc=page` on the command line, as many pages as the first chunk needs;
//! 2. the first chunk is built: the boot processor's unit in frames of its node, a copy of the section, which is the
//!    template; all other CPUs share one that is read only;
//! 3. the allocator takes the chunk over, every CPU gets a cache in front of it (not with `percpu_cache=off` on the command
//!    line), and [`Kernel`] names it in the types of handles;
//! 4. a CPU is brought up ([`bring_up`]), and so has a unit of its own, before it comes; it loads its unit's offset into
//!    GS base ([`load_gs_base`]) before it touches a per-CPU variable;
//! 5. the template is not needed any more: [`template::give_back`];
//! 6. a CPU that goes offline empties its cache, which nobody else can: [`go_offline`].

use core::sync::atomic::{AtomicUsize, Ordering};

use pcpu::allocator::PerCpuAllocator;
use pcpu::backing::paging::{Paging, PagingSetup};
use pcpu::this_cpu::gs::{Gs, GsDomain, IrqLock};
use pcpu::this_cpu::pinned::Preemption;
use pcpu::unit::{CpuId, FirstChunkSpec, Template, UnitPlan, storage_words};
use pcpu::{
    CpuCell, CpuError, Domain, Handle, Instance, LocalCell, define_per_cpu_in, drain_caches,
    per_cpu_ptr,
};
use x86_64::VirtAddr;
use x86_64::registers::model_specific::{GsBase, KernelGsBase};

use self::memory::KernelMemory;
use crate::machine::{MAX_CPUS, Machine};
use crate::memory::{PER_CPU_WINDOW, PHYSICAL_MAP, paging};
use crate::{modules, println};

pub mod memory;
pub mod template;

/// The CPU that is there from the start.
pub const BOOT_CPU: CpuId = CpuId::new(0);

/// Where the units' memory comes from.
pub type Memory = Paging<KernelMemory, IrqLock>;

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
    let spec = FirstChunkSpec::like_linux(section.len());
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

    let setup = PagingSetup::new(
        paging::root(),
        VirtAddr::new(PHYSICAL_MAP as u64),
        VirtAddr::new(PER_CPU_WINDOW as u64),
        template.base,
    );
    // SAFETY: the tables are in use and the only ones, physical memory is mapped there, and the window is nobody else's.
    let allocator = unsafe {
        Memory::set_up(
            KernelMemory,
            setup,
            plan,
            template,
            &mut unit_offsets,
            BOOT_CPU,
        )
    };
    let mut allocator = allocator.unwrap_or_else(|error| panic!("no per-CPU variables: {error}"));
    if machine.start_info.option("percpu_cache") != Some("off") {
        let enabled = allocator.enable_caches();
        enabled.unwrap_or_else(|error| panic!("no caches: {error}"));
    }
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

/// What a CPU does with its cache when it goes: no other CPU gets at what is free in there. To be called by that CPU, when nothing
/// allocates on it any more.
pub fn go_offline() {
    drain_caches::<Kernel>();
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
