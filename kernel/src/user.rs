//! Ring 3: a small user program on every CPU, and its way into the kernel and back.
//!
//! What it shows is the border of the per-CPU variables: a user has a GS base of its own, so every entry swaps it for the
//! kernel's before anything else, and every exit swaps back last. Between `syscall` and the first `swapgs`, and between the
//! last `swapgs` and `sysret`, ring 0 runs with the user's GS base and stack; interrupts are masked there, and an NMI
//! looks at the register itself (`interrupts/entry.s`).
//!
//! What always holds: a user's GS base lies in the lower half, which is how the two are told apart; and no user code lies
//! on the last page of it, so `sysret` never returns to an address that would fault in ring 0.

use core::arch::global_asm;

use pcpu::unit::CpuId;
use pcpu::{CpuCell, Handle, LocalCell, define_per_cpu_in};
use x86_64::VirtAddr;
use x86_64::registers::model_specific::{KernelGsBase, LStar, SFMask, Star};
use x86_64::registers::rflags::RFlags;
use x86_64::structures::paging::PhysFrame;

use crate::interrupts::tables::{KERNEL_CODE, KERNEL_DATA, USER_CODE, USER_DATA};
use crate::machine::Machine;
use crate::memory::paging::{self, Access};
use crate::memory::{PAGE_BYTES, USER, image};
use crate::percpu::Kernel;

/// From one CPU's data page to the next one's, and from the code to the first.
const SPACING: usize = 16 * PAGE_BYTES;

/// System calls: numbers in rax, an argument in rdi, the result in rax. rcx, rdx, rsi, rdi and r8 to r11 are lost.
const COUNT: u64 = 1;
const SET_GS_BASE: u64 = 2;

define_per_cpu_in! {
    in Kernel;

    /// Stack pointers that `entry.s` knows by their place. The first: where the user returns to when it exits, and where its
    /// system calls begin. The second: the user's own, until it is on the kernel's stack.
    #[percpu(first)]
    static STACK_POINTERS: [CpuCell<u64>; 2] = [CpuCell::new(0), CpuCell::new(0)];

    /// System calls that were counted.
    pub static CALLS: CpuCell<u64> = CpuCell::new(0);

    /// How many calls a user makes at least.
    static CALLS_WANTED: CpuCell<u64> = CpuCell::new(0);

    /// The timer's interrupts that found a user.
    pub static TICKS_IN_USER: CpuCell<u64> = CpuCell::new(0);

    /// How many of these a user waits for.
    static TICKS_WANTED: CpuCell<u64> = CpuCell::new(0);
}

global_asm!(
    include_str!("user/entry.s"),
    stack_pointers = sym __per_cpu_start,
    system_call = sym system_call,
);
global_asm!(
    include_str!("user/program.s"),
    count = const COUNT,
    set_gs_base = const SET_GS_BASE,
);

unsafe extern "C" {
    fn enter_user(entry: usize, stack: usize, data: usize) -> u64;
    static syscall_entry: u8;
    static sysret_window: u8;
    static user_program: u8;
    static __per_cpu_start: u8;
}

/// The addresses at which ring 0 runs with the user's GS base: an NMI there has to find that out.
pub fn is_in_window(rip: u64) -> bool {
    let at_entry = (&raw const syscall_entry).addr() as u64;
    let at_exit = (&raw const sysret_window).addr() as u64;
    // Before the first `swapgs`, and before the `sysret` behind the last.
    rip == at_entry || rip == at_exit
}

/// Maps the program, and a page of data and stack for every CPU.
///
/// # Panics
/// If memory does not suffice, or the linker has placed the stack pointers elsewhere than the assembly takes them to be.
pub fn map(machine: &Machine) {
    assert_eq!(
        STACK_POINTERS.handle().neutral(),
        (&raw const __per_cpu_start).addr(),
        "the assembly takes them for the first of all variables"
    );
    let code = image::user();
    for address in code.addresses(PAGE_BYTES as u64) {
        let frame = PhysFrame::containing_address(x86_64::PhysAddr::new(address));
        let to = USER + (address - code.start) as usize;
        // SAFETY: constants of the image, to be read and executed.
        unsafe { paging::map(to, frame, Access::UserExecute) }.expect("no frame for a page table");
    }
    for cpu in (0..machine.cpus().len() as u32).map(CpuId::new) {
        let node = machine.node_of_cpu(cpu);
        paging::map_new(data_page(cpu), node, Access::UserReadWrite)
            .expect("no memory for a user's data");
    }
}

/// Makes `syscall` work on this CPU.
pub fn init_this_cpu() {
    Star::write(USER_CODE, USER_DATA, KERNEL_CODE, KERNEL_DATA)
        .expect("the segments are in the order that sysret wants");
    LStar::write(VirtAddr::from_ptr(&raw const syscall_entry));
    SFMask::write(RFlags::INTERRUPT_FLAG | RFlags::DIRECTION_FLAG | RFlags::TRAP_FLAG);
}

/// How a user ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// 0 if its own GS base was its own all the time.
    pub status: u64,
    /// How many counted system calls it made, by its own account.
    pub calls: u64,
}

/// Runs the program on this CPU until it has made at least `calls` counted system calls and the timer has found it at
/// least `ticks` times.
pub fn run(cpu: CpuId, calls: u64, ticks: u64) -> Ended {
    CALLS_WANTED.write(CALLS.read() + calls);
    TICKS_WANTED.write(TICKS_IN_USER.read() + ticks);
    let offset = (&raw const user_program).addr() - image::user().start as usize;
    let data = data_page(cpu);
    // SAFETY: program, data and stack are mapped for this CPU; system calls come back to the stack that is in use here.
    let status = unsafe { enter_user(USER + offset, data + PAGE_BYTES, data) };
    // SAFETY: the second word of the page, which only the user wrote to.
    let calls = unsafe {
        core::ptr::with_exposed_provenance::<u64>(data)
            .add(1)
            .read_volatile()
    };
    Ended { status, calls }
}

fn data_page(cpu: CpuId) -> usize {
    USER + (cpu.index() + 1) * SPACING
}

/// A system call but for the exit. Unknown ones return the largest number.
extern "C" fn system_call(number: u64, argument: u64) -> u64 {
    match number {
        COUNT => {
            CALLS.inc();
            let enough =
                CALLS.read() >= CALLS_WANTED.read() && TICKS_IN_USER.read() >= TICKS_WANTED.read();
            u64::from(enough)
        }
        SET_GS_BASE if argument < 1 << 47 => {
            KernelGsBase::write(VirtAddr::new(argument));
            0
        }
        _ => u64::MAX,
    }
}
