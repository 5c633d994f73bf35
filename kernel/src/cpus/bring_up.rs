//! Starting the other CPUs, and letting them go.
//!
//! They begin in 16-bit code, at a page below 1 MiB that a trampoline is copied to. It leads them to 64-bit code and the
//! kernel's page tables; each finds its stack by the id of its local APIC. They come all at once. One that goes offline empties its
//! cache of per-CPU areas and waits for the reset that begins its next life; its unit, its stack and its tables stay.
//!
//! What always holds: a CPU loads its descriptor tables and then its GS base before it touches a per-CPU variable, and the
//! allocator has materialised it before that, once and for all: its copies keep their values while it is away.

use core::arch::global_asm;
use core::sync::atomic::{AtomicUsize, Ordering};

use pcpu::unit::CpuId;
use x86_64::PhysAddr;
use x86_64::instructions::interrupts as masking;
use x86_64::structures::paging::PhysFrame;

use super::{delay, local_apic, shootdown, work};
use crate::interrupts::tables;
use crate::machine::{Machine, machine};
use crate::memory::paging::{self, Access};
use crate::memory::{PHYSICAL_MAP, stacks};
use crate::percpu;
use crate::user;

/// The page that the trampoline is copied to. The trampoline is assembled for it.
const TRAMPOLINE_PAGE: u8 = 8;
const TRAMPOLINE: usize = (TRAMPOLINE_PAGE as usize) << 12;

const STACK_PAGES: usize = 8;

/// How long to wait for all CPUs, in pieces of 10 ms.
const PATIENCE: u32 = 6000;

/// The upper ends of the stacks, by APIC id; 0 for those that have not been started.
static AP_STACKS: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];

global_asm!(
    include_str!("trampoline.s"),
    ap_stacks = sym AP_STACKS,
    ap_main = sym ap_main,
);

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
    /// Within the trampoline: the frame of the highest page table.
    static trampoline_root: u8;
}

/// Makes the CPU that runs this a full member: the boot processor, on the way up.
///
/// # Panics
/// If it has no memory.
pub fn init_boot_cpu(machine: &Machine) {
    prepare(CpuId::new(0), machine);
    enter(CpuId::new(0));
}

/// The CPU that is left for later, so that a test can show what happens when one comes late; none on small machines.
pub fn latecomer(machine: &Machine) -> Option<CpuId> {
    let last = there(machine).last()?;
    (last.index() >= 2).then_some(last)
}

/// The CPUs that come at boot, besides the boot processor.
pub fn at_boot(machine: &Machine) -> impl Iterator<Item = CpuId> + Clone {
    let latecomer = latecomer(machine);
    there(machine).filter(move |&cpu| Some(cpu) != latecomer)
}

/// The CPUs that are there, besides the boot processor.
fn there(machine: &Machine) -> impl Iterator<Item = CpuId> + Clone {
    let cpus = (0..).map(CpuId::new).zip(machine.cpus());
    let there = cpus.filter(|(_, it)| it.enabled).map(|(cpu, _)| cpu);
    there.skip(1)
}

/// Starts some CPUs and waits until all of them are online.
///
/// # Panics
/// If there is no memory for them, or if one does not come.
pub fn start(machine: &Machine, cpus: impl Iterator<Item = CpuId> + Clone) {
    let apic_id = |cpu: CpuId| machine.cpus()[cpu.index()].apic_id;
    place_trampoline();
    let mut expected = work::nr_online();
    for cpu in cpus.clone() {
        let stack = &AP_STACKS[usize::from(apic_id(cpu))];
        if stack.load(Ordering::Relaxed) == 0 {
            prepare(cpu, machine);
            let end = stacks::allocate(machine.node_of_cpu(cpu), STACK_PAGES);
            stack.store(end, Ordering::Release);
        } else {
            tables::renew(cpu);
        }
        expected += 1;
    }
    cpus.clone().for_each(|cpu| local_apic::reset(apic_id(cpu)));
    delay::wait_us(10_000);
    for _ in 0..2 {
        cpus.clone()
            .for_each(|cpu| local_apic::start(apic_id(cpu), TRAMPOLINE_PAGE));
        delay::wait_us(200);
    }
    for _ in 0..PATIENCE {
        if work::nr_online() == expected {
            // SAFETY: all CPUs have left the trampoline. They may keep its translation, of a page that stays what it is.
            unsafe { paging::unmap(TRAMPOLINE) };
            return;
        }
        delay::wait_us(10_000);
    }
    panic!("of {expected} CPUs only {} came", work::nr_online());
}

/// Takes a CPU offline, until it is [started](start) again. To be called by the boot processor, from no interrupt and from no work.
///
/// # Panics
/// If the CPU is not online, or if it is the boot processor.
pub fn stop(cpu: CpuId) {
    work::dismiss(cpu);
}

/// What must be there before a CPU runs for the first time.
fn prepare(cpu: CpuId, machine: &Machine) {
    percpu::bring_up(cpu).unwrap_or_else(|error| panic!("no copies for CPU {cpu}: {error}"));
    tables::prepare(cpu, machine.node_of_cpu(cpu));
}

/// What a CPU does first of all.
fn enter(cpu: CpuId) {
    tables::load(cpu);
    percpu::load_gs_base(cpu);
    user::init_this_cpu();
    local_apic::enable();
    shootdown::join(cpu);
    masking::enable();
}

/// The other CPUs arrive here, on their own stacks.
extern "C" fn ap_main(apic_id: u32) -> ! {
    let cpu = machine().cpu_of_apic(apic_id as u8);
    let cpu = cpu.expect("it was started by its APIC id");
    enter(cpu);
    work::help();
    percpu::go_offline();
    shootdown::leave(cpu);
    masking::disable();
    work::left(cpu);
    loop {
        x86_64::instructions::hlt();
    }
}

/// Copies the trampoline to its page, through the physical map, and maps the page to itself, to be executed.
fn place_trampoline() {
    let start = &raw const trampoline_start;
    let bytes = (&raw const trampoline_end).addr() - start.addr();
    let root_at = (&raw const trampoline_root).addr() - start.addr();
    let to = core::ptr::with_exposed_provenance_mut::<u8>(PHYSICAL_MAP + TRAMPOLINE);
    let root = u32::try_from(paging::root().start_address().as_u64());
    // SAFETY: nothing else uses this page below 1 MiB, and the trampoline, root included, is shorter than it.
    unsafe {
        to.copy_from_nonoverlapping(start, bytes);
        to.add(root_at)
            .cast::<u32>()
            .write(root.expect("the tables lie below 4 GiB"));
    }
    let frame = PhysFrame::containing_address(PhysAddr::new(TRAMPOLINE as u64));
    // SAFETY: the mapping cannot be written, and what can be executed is the trampoline.
    unsafe { paging::map(TRAMPOLINE, frame, Access::Execute) }.expect("no frame for a page table");
}
