//! A guard that masks interrupts, for the few operations that no single instruction does.

use core::arch::asm;
use core::marker::PhantomData;

/// The bit of the flags register that lets interrupts through.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// While it lives, no maskable interrupt comes on this CPU, and so no migration; NMIs do come. Guards nest: interrupts
/// come again when the outermost is dropped, if they came before it.
///
/// It stays on the CPU that made it:
///
/// ```compile_fail,E0277
/// # use pcpu::this_cpu::gs::Masked;
/// fn is_send<T: Send>() {}
/// is_send::<Masked>();
/// ```
/// ```compile_fail,E0277
/// # use pcpu::this_cpu::gs::Masked;
/// fn is_sync<T: Sync>() {}
/// is_sync::<Masked>();
/// ```
#[derive(Debug)]
pub struct Masked {
    flags: u64,
    not_send: PhantomData<*mut ()>,
}

impl Masked {
    /// Masks interrupts.
    ///
    /// # Safety
    /// The caller runs in ring 0 (elsewhere the instruction is a fault), and guards are dropped in the opposite order
    /// of their making.
    #[inline]
    #[must_use = "interrupts come again when the guard is dropped"]
    pub unsafe fn new() -> Self {
        let flags;
        // SAFETY: masks interrupts, which ring 0 may (promise of the caller). It counts as touching all memory, so that
        // nothing moves out from behind it.
        unsafe { asm!("pushfq", "pop {flags}", "cli", flags = out(reg) flags) };
        Self {
            flags,
            not_send: PhantomData,
        }
    }
}

impl Drop for Masked {
    #[inline]
    fn drop(&mut self) {
        if self.flags & INTERRUPT_FLAG != 0 {
            // SAFETY: the guard was made in ring 0, and interrupts came then.
            unsafe { asm!("sti", options(nostack)) };
        }
    }
}
