//! The descriptor tables: a GDT and a TSS per CPU, one IDT for all.
//!
//! Until the per-CPU areas exist the boot processor uses a set of its own; afterwards each CPU's tables are a per-CPU
//! variable, a page of its own as in Linux.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;

use pcpu::define_per_cpu_in;
use pcpu::unit::{CpuId, NodeId};
use spin::Once;
use x86_64::instructions::segmentation::{CS, DS, ES, FS, GS, SS, Segment};
use x86_64::instructions::tables::{lidt, load_tss};
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::idt::{Entry, HandlerFunc};
use x86_64::structures::tss::TaskStateSegment;
use x86_64::{PrivilegeLevel, VirtAddr};

use crate::memory::{PAGE_BYTES, stacks};
use crate::percpu::{self, Kernel};

/// The kernel's code segment.
pub const KERNEL_CODE: SegmentSelector = SegmentSelector::new(1, PrivilegeLevel::Ring0);
/// The kernel's data segment.
pub const KERNEL_DATA: SegmentSelector = SegmentSelector::new(2, PrivilegeLevel::Ring0);
/// The users' data segment.
pub const USER_DATA: SegmentSelector = SegmentSelector::new(3, PrivilegeLevel::Ring3);
/// The users' code segment: `sysret` wants it behind their data segment.
pub const USER_CODE: SegmentSelector = SegmentSelector::new(4, PrivilegeLevel::Ring3);
const TSS: SegmentSelector = SegmentSelector::new(5, PrivilegeLevel::Ring0);

/// Kinds of vectors by the stack that they use. One that can interrupt another has another.
const STACK_OF_INTERRUPTS: u16 = 0;
const STACK_OF_NMI: u16 = 1;
const STACK_OF_DOUBLE_FAULT: u16 = 2;
const STACK_OF_EXCEPTIONS: u16 = 3;
const STACKS_PER_CPU: usize = 4;

const STACK_PAGES: usize = 4;

unsafe extern "C" {
    /// 256 entries of 16 bytes: see `entry.s`.
    static interrupt_stubs: [[u8; 16]; 256];
}

/// A CPU's GDT and TSS.
#[repr(C, align(4096))]
pub struct CpuTables {
    tss: TaskStateSegment,
    gdt: GlobalDescriptorTable,
}

define_per_cpu_in! {
    in Kernel;

    #[percpu(page_aligned)]
    static TABLES: CpuTables = CpuTables::new();
}

static BOOT_TABLES: Boot<CpuTables> = Boot(UnsafeCell::new(CpuTables::new()));

static BOOT_STACKS: Boot<[MaybeUninit<BootStack>; STACKS_PER_CPU]> = Boot(UnsafeCell::new(
    [const { MaybeUninit::zeroed() }; STACKS_PER_CPU],
));

static IDT: Once<[Entry<HandlerFunc>; 256]> = Once::new();

/// What a stack of the boot processor looks like to the compiler: the CPU alone writes there.
type BootStack = [u128; STACK_PAGES * PAGE_BYTES / 16];

/// What only the boot processor uses.
struct Boot<T>(UnsafeCell<T>);

// SAFETY: only the boot processor uses it.
unsafe impl<T> Sync for Boot<T> {}

impl CpuTables {
    const fn new() -> Self {
        Self {
            tss: TaskStateSegment::new(),
            gdt: GlobalDescriptorTable::empty(),
        }
    }

    /// Fills in a CPU's tables. `stack_ends` are the upper ends of the interrupt stacks.
    ///
    /// # Safety
    /// The pointer is valid for good, and no CPU uses the tables yet.
    unsafe fn fill(tables: *mut Self, stack_ends: [usize; STACKS_PER_CPU]) {
        let mut tss = TaskStateSegment::new();
        let end_of = |index| stack_ends.get(index).map_or(0, |&end| end as u64);
        tss.interrupt_stack_table = core::array::from_fn(|index| VirtAddr::new(end_of(index)));
        let mut gdt = GlobalDescriptorTable::new();
        for segment in [
            Descriptor::kernel_code_segment(),
            Descriptor::kernel_data_segment(),
            Descriptor::user_data_segment(),
            Descriptor::user_code_segment(),
            // SAFETY: the TSS stays where it is (promise of the caller).
            unsafe { Descriptor::tss_segment_unchecked(&raw const (*tables).tss) },
        ] {
            gdt.append(segment);
        }
        // SAFETY: the promise of the caller.
        unsafe { tables.write(Self { tss, gdt }) };
    }

    /// Loads the tables into this CPU. This sets GS base to 0.
    ///
    /// # Safety
    /// They are filled in, for this CPU, and stay.
    unsafe fn load(tables: *const Self) {
        // SAFETY: the promise of the caller; the segments are those that `fill` made.
        unsafe {
            (*tables).gdt.load_unsafe();
            CS::set_reg(KERNEL_CODE);
            SS::set_reg(KERNEL_DATA);
            DS::set_reg(SegmentSelector::NULL);
            ES::set_reg(SegmentSelector::NULL);
            FS::set_reg(SegmentSelector::NULL);
            GS::set_reg(SegmentSelector::NULL);
            load_tss(TSS);
        }
        load_idt();
    }
}

/// Makes the boot processor able to take exceptions, with tables of its own.
pub fn init_boot() {
    let mut stack = BOOT_STACKS.0.get().addr();
    let ends = core::array::from_fn(|_| {
        stack += size_of::<BootStack>();
        stack
    });
    let tables = BOOT_TABLES.0.get();
    // SAFETY: static, and nobody else uses them.
    unsafe {
        CpuTables::fill(tables, ends);
        CpuTables::load(tables);
    }
}

/// Fills in `cpu`'s copy, with stacks from its node. The CPU has not been started.
pub fn prepare(cpu: CpuId, node: NodeId) {
    let ends = core::array::from_fn(|_| stacks::allocate(node, STACK_PAGES));
    // SAFETY: a per-CPU variable stays; the CPU does not run with these tables yet.
    unsafe { CpuTables::fill(percpu::copy(&TABLES, cpu), ends) };
}

/// Fills in `cpu`'s copy anew, with the stacks that it had: a CPU that comes again cannot load a task state that is marked as in
/// use. The CPU does not run.
pub fn renew(cpu: CpuId) {
    let tables = percpu::copy(&TABLES, cpu);
    // SAFETY: `prepare` filled it in, and the CPU does not run.
    unsafe {
        let ends = (*tables).tss.interrupt_stack_table;
        let ends = core::array::from_fn(|index| ends[index].as_u64() as usize);
        CpuTables::fill(tables, ends);
    }
}

/// Loads `cpu`'s copy; called by that CPU, before it sets its GS base.
pub fn load(cpu: CpuId) {
    // SAFETY: `prepare` came before.
    unsafe { CpuTables::load(percpu::copy(&TABLES, cpu)) };
}

fn load_idt() {
    let idt = IDT.call_once(|| {
        core::array::from_fn(|vector| {
            let mut entry = Entry::missing();
            // SAFETY: the stub of a vector handles it and returns by `iretq`; all stacks are in the TSS.
            unsafe {
                entry
                    .set_handler_addr(VirtAddr::new(
                        (&raw const interrupt_stubs[vector]).addr() as u64
                    ))
                    .set_stack_index(stack_of(vector));
            }
            entry
        })
    });
    let pointer = DescriptorTablePointer {
        limit: (size_of_val(idt) - 1) as u16,
        base: VirtAddr::from_ptr(idt),
    };
    // SAFETY: the table is static and complete.
    unsafe { lidt(&pointer) };
}

const fn stack_of(vector: usize) -> u16 {
    match vector {
        2 => STACK_OF_NMI,
        8 => STACK_OF_DOUBLE_FAULT,
        0..32 => STACK_OF_EXCEPTIONS,
        _ => STACK_OF_INTERRUPTS,
    }
}
