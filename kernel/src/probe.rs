//! Reading and writing an address that may not be mapped: how tests show that something faults.

use core::arch::naked_asm;

use crate::interrupts::Frame;

/// A page fault that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// Reads a byte.
///
/// # Errors
/// [`Fault`].
pub fn read(address: usize) -> Result<u8, Fault> {
    // SAFETY: a fault is recovered from; reading has no other effect.
    let result = unsafe { probe_read(address) };
    u8::try_from(result).map_err(|_| Fault)
}

/// Writes a byte that is there already.
///
/// # Errors
/// [`Fault`].
///
/// # Safety
/// Nobody else writes there meanwhile.
pub unsafe fn rewrite(address: usize) -> Result<(), Fault> {
    let byte = read(address)?;
    // SAFETY: a fault is recovered from; the byte stays what it is (promise of the caller).
    match unsafe { probe_write(address, byte) } {
        0 => Ok(()),
        _ => Err(Fault),
    }
}

/// Lets a fault of the two instructions below return with a number that no byte is. False for all others.
pub fn recover(frame: &mut Frame) -> bool {
    let is_probe = [
        (&raw const probe_read_instruction).addr(),
        (&raw const probe_write_instruction).addr(),
    ]
    .contains(&(frame.rip as usize));
    if is_probe {
        frame.rip = (&raw const probe_failed).addr() as u64;
    }
    is_probe
}

unsafe extern "C" {
    static probe_read_instruction: u8;
    static probe_write_instruction: u8;
    static probe_failed: u8;
}

#[unsafe(naked)]
unsafe extern "C" fn probe_read(address: usize) -> u32 {
    naked_asm!(
        ".globl probe_read_instruction, probe_failed",
        "probe_read_instruction: movzx eax, byte ptr [rdi]",
        "ret",
        "probe_failed: mov eax, 0x100",
        "ret",
    )
}

#[unsafe(naked)]
unsafe extern "C" fn probe_write(address: usize, byte: u8) -> u32 {
    naked_asm!(
        ".globl probe_write_instruction",
        "xor eax, eax",
        "probe_write_instruction: mov byte ptr [rdi], sil",
        "ret",
    )
}
