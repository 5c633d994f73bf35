//! Interrupts and exceptions: one entry for all 256 vectors, and who handles what.
//!
//! What always holds:
//! - every vector has a stack of its own kind ([`tables`]): compiled code may keep values below its stack pointer, where an
//!   interrupt on the same stack would write;
//! - handlers run with interrupts masked, with all registers saved (those of SSE too), and with the kernel's GS base
//!   whatever was interrupted;
//! - an exception that nobody expects is printed and ends the machine as failed.

use core::arch::global_asm;
use core::sync::atomic::{AtomicPtr, Ordering};

use x86_64::registers::control::Cr2;

use crate::cpus::{local_apic, shootdown};
use crate::exit::{Outcome, exit};
use crate::{println, probe};

pub mod tables;

/// The timer of the local APIC.
pub const TIMER_VECTOR: u8 = 0xf0;
/// There is work for this CPU.
pub const WORK_VECTOR: u8 = 0xf1;
/// There are translations for this CPU to forget.
pub const FLUSH_VECTOR: u8 = 0xf2;
/// What the local APIC sends when an interrupt went away meanwhile.
pub const SPURIOUS_VECTOR: u8 = 0xff;

const NMI: u64 = 2;
const PAGE_FAULT: u64 = 14;

global_asm!(
    include_str!("interrupts/entry.s"),
    dispatch = sym dispatch,
    options(att_syntax)
);

/// What was interrupted: its registers, as the entry code saved them.
#[repr(C)]
#[derive(Debug)]
pub struct Frame {
    /// r15 to rax, in the order of the entry code.
    pub registers: [u64; 15],
    /// Which interrupt.
    pub vector: u64,
    /// What the CPU says of an exception.
    pub error_code: u64,
    /// The next instruction, or for a fault the one that failed.
    pub rip: u64,
    /// The code segment; its low two bits are the ring.
    pub cs: u64,
    /// The flags.
    pub rflags: u64,
    /// The stack pointer.
    pub rsp: u64,
    /// The stack segment.
    pub ss: u64,
}

/// What a test lets a timer interrupt or an NMI do.
pub type Hook = fn(&Frame);

static TIMER_HOOK: HookCell = HookCell::new();
static NMI_HOOK: HookCell = HookCell::new();

/// Sets what the timer's interrupt does on every CPU, or nothing.
pub fn on_timer(hook: Option<Hook>) {
    TIMER_HOOK.set(hook);
}

/// Sets what an NMI does on every CPU, or nothing: then an NMI is unexpected.
pub fn on_nmi(hook: Option<Hook>) {
    NMI_HOOK.set(hook);
}

/// All interrupts arrive here.
extern "C" fn dispatch(frame: &mut Frame) {
    let vector = frame.vector;
    match vector {
        _ if vector == u64::from(TIMER_VECTOR) => {
            TIMER_HOOK.call(frame);
            local_apic::end_of_interrupt();
        }
        // The interrupt only wakes the CPU.
        _ if vector == u64::from(WORK_VECTOR) => local_apic::end_of_interrupt(),
        _ if vector == u64::from(FLUSH_VECTOR) => {
            shootdown::answer();
            local_apic::end_of_interrupt();
        }
        _ if vector == u64::from(SPURIOUS_VECTOR) => {}
        NMI if NMI_HOOK.call(frame) => {}
        PAGE_FAULT if probe::recover(frame) => {}
        _ => die(frame),
    }
}

fn die(frame: &Frame) -> ! {
    crate::serial::break_lock();
    println!(
        "EXCEPTION {} error {:#x} at {:#x} (cs {:#x}, rflags {:#x}, rsp {:#x}), cr2 {:#x}",
        frame.vector,
        frame.error_code,
        frame.rip,
        frame.cs,
        frame.rflags,
        frame.rsp,
        Cr2::read_raw(),
    );
    exit(Outcome::Failed)
}

/// A hook that can be changed while interrupts arrive.
struct HookCell(AtomicPtr<()>);

impl HookCell {
    const fn new() -> Self {
        Self(AtomicPtr::new(core::ptr::null_mut()))
    }

    fn set(&self, hook: Option<Hook>) {
        let pointer = hook.map_or(core::ptr::null_mut(), |hook| hook as *mut ());
        self.0.store(pointer, Ordering::Release);
    }

    /// Whether there is one.
    fn call(&self, frame: &Frame) -> bool {
        let pointer = self.0.load(Ordering::Acquire);
        if pointer.is_null() {
            return false;
        }
        // SAFETY: only `set` stores a pointer that is not null, made of a `Hook`.
        let hook = unsafe { core::mem::transmute::<*mut (), Hook>(pointer) };
        hook(frame);
        true
    }
}
