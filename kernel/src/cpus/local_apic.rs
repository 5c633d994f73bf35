//! The local APIC: interrupts between CPUs, and each CPU's timer.

use core::ptr;

use x86_64::PhysAddr;
use x86_64::instructions::port::PortWriteOnly;
use x86_64::registers::model_specific::ApicBase;
use x86_64::structures::paging::PhysFrame;

use crate::interrupts::{SPURIOUS_VECTOR, TIMER_VECTOR};
use crate::memory::LOCAL_APIC;
use crate::memory::paging::{self, Access};

const TASK_PRIORITY: usize = 0x80;
const END_OF_INTERRUPT: usize = 0xb0;
const SPURIOUS: usize = 0xf0;
const COMMAND_LOW: usize = 0x300;
const COMMAND_HIGH: usize = 0x310;
const TIMER: usize = 0x320;
const LINE_0: usize = 0x350;
const LINE_1: usize = 0x360;
const INITIAL_COUNT: usize = 0x380;
const DIVIDE: usize = 0x3e0;

const MASKED: u32 = 1 << 16;
const ENABLED: u32 = 1 << 8;
const DELIVER_NMI: u32 = 4 << 8;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0b1011;

const ALL_BUT_SELF: u32 = 3 << 18;
const ASSERT: u32 = 1 << 14;
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;
const PENDING: u32 = 1 << 12;

/// How the timer interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerKind {
    /// Once, by an interrupt that can be masked.
    Once,
    /// Once, by an NMI.
    OnceNmi,
    /// Again and again.
    Periodic,
}

/// Maps the registers, which are each CPU's own at the same address, and silences the old interrupt controllers.
pub fn map() {
    // They are masked before their line to the APIC is: a pending interrupt of theirs has no vector afterwards.
    // SAFETY: the mask registers of the two 8259.
    unsafe {
        PortWriteOnly::<u8>::new(0x21).write(0xff);
        PortWriteOnly::<u8>::new(0xa1).write(0xff);
    }
    let frame: PhysFrame = ApicBase::read().0;
    let address = PhysAddr::new(frame.start_address().as_u64());
    // SAFETY: the registers are no memory that anything else uses.
    unsafe {
        paging::map(
            LOCAL_APIC,
            PhysFrame::containing_address(address),
            Access::Device,
        )
    }
    .expect("no frame for a page table");
}

/// Enables this CPU's.
pub fn enable() {
    write(LINE_0, MASKED);
    write(LINE_1, MASKED);
    write(TIMER, MASKED);
    write(TASK_PRIORITY, 0);
    write(SPURIOUS, ENABLED | u32::from(SPURIOUS_VECTOR));
}

/// The handler of an ordinary interrupt is done.
pub fn end_of_interrupt() {
    write(END_OF_INTERRUPT, 0);
}

/// Starts this CPU's timer: it interrupts after `count` ticks of the bus clock.
pub fn start_timer(kind: TimerKind, count: u32) {
    let vector = u32::from(TIMER_VECTOR);
    write(DIVIDE, DIVIDE_BY_1);
    write(
        TIMER,
        match kind {
            TimerKind::Once => vector,
            TimerKind::OnceNmi => vector | DELIVER_NMI,
            TimerKind::Periodic => vector | PERIODIC,
        },
    );
    write(INITIAL_COUNT, count);
}

/// Stops this CPU's timer.
pub fn stop_timer() {
    write(TIMER, MASKED);
    write(INITIAL_COUNT, 0);
}

/// Interrupts all other CPUs.
pub fn interrupt_others(vector: u8) {
    command(0, ALL_BUT_SELF | ASSERT | u32::from(vector));
}

/// Resets a CPU: it waits for [`start`].
pub fn reset(apic_id: u8) {
    command(apic_id, ASSERT | INIT);
}

/// Lets a CPU that waits for it begin at a page below 1 MiB.
pub fn start(apic_id: u8, page: u8) {
    command(apic_id, ASSERT | STARTUP | u32::from(page));
}

fn command(apic_id: u8, low: u32) {
    while read(COMMAND_LOW) & PENDING != 0 {
        core::hint::spin_loop();
    }
    write(COMMAND_HIGH, u32::from(apic_id) << 24);
    write(COMMAND_LOW, low);
}

fn read(register: usize) -> u32 {
    // SAFETY: the registers are mapped at boot, each a word at a multiple of 16.
    unsafe { ptr::with_exposed_provenance::<u32>(LOCAL_APIC + register).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: as above; what is written are the few settings of this file.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(LOCAL_APIC + register).write_volatile(value) }
}
