//! The per-CPU variables of this kernel: where `pcpu` comes in.
//!
//! In the order of boot:
//! 1. [`set_up`] plans the units, from the section's size and the machine's topology;
//! 2. the first chunk is built in frames of each CPU's node, by the *embed* builder, or by the *page* builder with
//!    `percpu_alloc=page` on the command line: each unit starts as a copy of the section, which is the template;
//! 3. the allocator takes the chunk over, and [`Kernel`] names it in the types of handles;
//! 4. a CPU is brought up ([`bring_up`]) before it comes, and loads its unit's offset into GS base ([`load_gs_base`])
//!    before it touches a per-CPU variable;
//! 5. the template is not needed any more: [`template::give_back`].

use core::sync::atomic::{AtomicUsize, Ordering};

use pcpu::allocator::{PerCpuAllocator, Policy};
use pcpu::backing::contig::Contig;
use pcpu::this_cpu::portable::Portable;
use pcpu::unit::{CpuId, FirstChunkSpec, Template, UnitPlan, storage_words};
use pcpu::{CpuError, Domain, Instance, embed, page, per_cpu_ptr};
use x86_64::VirtAddr;
use x86_64::registers::model_specific::{GsBase, KernelGsBase};

use self::gs::PerCpuVar;
use self::window::ChunkWindow;
use crate::irq_lock::IrqLock;
use crate::machine::{MAX_CPUS, Machine};
use crate::println;

pub mod gs;
pub mod template;
pub mod window;

/// The room for modules' variables, and the first room for dynamic ones, as Linux has them on x86-64.
const RESERVED_BYTES: usize = 8 << 10;
const DYNAMIC_BYTES: usize = 28 << 10;

static INSTANCE: Instance<Contig<IrqLock>, IrqLock> = Instance::new();

/// How many frames the template gave back.
static TEMPLATE_FRAMES: AtomicUsize = AtomicUsize::new(0);

/// The number of the CPU, where the CPU finds it by one instruction.
#[unsafe(link_section = ".data..percpu..first")]
static CPU_NUMBER: PerCpuVar<u64> = PerCpuVar::new(0);

/// The kernel's instance.
pub enum Kernel {}

// SAFETY: `allocator` is always `INSTANCE`, which no other domain has.
unsafe impl Domain for Kernel {
    type Backing = Contig<IrqLock>;
    type Lock = IrqLock;
    type Ops = Portable<Self>;

    fn allocator() -> &'static PerCpuAllocator<Contig<IrqLock>, IrqLock> {
        INSTANCE.get().expect("set up at boot")
    }

    fn current_cpu() -> CpuId {
        CpuId::new(crate::this_cpu_read!(CPU_NUMBER) as u32)
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

    let mut window = ChunkWindow::new(&plan);
    let (contig, first_chunk) = if by_page {
        let chunk = page::build(plan, template, &mut unit_offsets, &mut window)
            .unwrap_or_else(|error| panic!("no first chunk by single pages: {error:?}"));
        (window.into_contig(&plan, template.base), chunk)
    } else {
        let mut contig = window.into_contig(&plan, template.base);
        let chunk = embed::build(plan, template, &mut unit_offsets, &mut contig)
            .unwrap_or_else(|error| panic!("no first chunk by areas: {error:?}"));
        (contig, chunk)
    };
    // SAFETY: the first chunk lies in the window of `contig`, which the instance takes over.
    let allocator = unsafe { PerCpuAllocator::new(contig, &first_chunk, Policy::default()) }
        .unwrap_or_else(|error| panic!("no allocator: {error}"));
    INSTANCE
        .set_up(allocator)
        .unwrap_or_else(|error| panic!("set up twice: {error}"));
}

/// Gives a CPU that is about to come its copies, and writes its number into its own.
///
/// # Errors
/// [`CpuError`]: it is not possible, or there is no memory.
pub fn bring_up(cpu: CpuId) -> Result<(), CpuError> {
    Kernel::allocator().bring_up(cpu)?;
    // SAFETY: the CPU does not run yet, and nobody else uses this variable.
    unsafe { copy(&CPU_NUMBER, cpu).write(u64::from(cpu.get())) };
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
pub fn copy<T>(variable: &PerCpuVar<T>, cpu: CpuId) -> *mut T {
    per_cpu_ptr(variable, cpu)
        .unwrap_or_else(|error| panic!("no copy: {error}"))
        .as_ptr()
}

/// How many frames the template gave back.
pub fn template_frames() -> usize {
    TEMPLATE_FRAMES.load(Ordering::Relaxed)
}

/// Gives the template's memory back.
pub fn free_template() {
    TEMPLATE_FRAMES.store(template::give_back(), Ordering::Relaxed);
}
