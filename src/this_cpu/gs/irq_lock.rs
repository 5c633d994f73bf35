//! A lock for a kernel whose interrupt handlers allocate: it spins, and masks interrupts on its CPU while it is held.
//!
//! What always holds: interrupts are masked from before the lock is taken until after it is given up, so that no handler
//! waits for what it interrupted. `held` goes from false to true for one taker at a time; only that one uses `were_enabled`.

use core::arch::asm;
use core::fmt;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use lock_api::{GuardNoSend, RawMutex};

/// The bit of the flags register that lets interrupts through.
const INTERRUPT_FLAG: u64 = 1 << 9;

/// A spin lock that masks interrupts, ready for an allocator in a kernel: `Instance<Memory, IrqLock>`. It is right for any data
/// that interrupt handlers use too, but not NMI handlers: they may only try.
///
/// For ring 0: elsewhere, locking is a fault. Locks that are held together are given up in the opposite order of their taking,
/// or interrupts come while one is held.
///
/// ```no_run
/// use lock_api::Mutex;
/// use pcpu::this_cpu::gs::IrqLock;
///
/// static FREE_FRAMES: Mutex<IrqLock, u64> = Mutex::new(0);
///
/// *FREE_FRAMES.lock() += 1;
/// ```
pub struct IrqLock {
    held: AtomicBool,
    were_enabled: AtomicBool,
}

impl fmt::Debug for IrqLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.held.load(Ordering::Relaxed);
        f.debug_tuple("IrqLock").field(&held).finish()
    }
}

// SAFETY: one taker at a time finds `held` to be false, and makes it true; it is false again when that one unlocks.
unsafe impl RawMutex for IrqLock {
    const INIT: Self = Self {
        held: AtomicBool::new(false),
        were_enabled: AtomicBool::new(false),
    };

    type GuardMarker = GuardNoSend;

    #[inline]
    fn lock(&self) {
        while !self.try_lock() {
            // Interrupts are as before here: waiting does not mask them.
            while self.is_locked() {
                spin_loop();
            }
        }
    }

    #[inline]
    fn try_lock(&self) -> bool {
        let were_enabled = mask();
        let is_taken = !self.held.swap(true, Ordering::Acquire);
        if is_taken {
            self.were_enabled.store(were_enabled, Ordering::Relaxed);
        } else if were_enabled {
            unmask();
        }
        is_taken
    }

    #[inline]
    unsafe fn unlock(&self) {
        // The next holder writes to it as soon as the lock is free.
        let were_enabled = self.were_enabled.load(Ordering::Relaxed);
        self.held.store(false, Ordering::Release);
        if were_enabled {
            unmask();
        }
    }

    #[inline]
    fn is_locked(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }
}

/// Masks interrupts; whether they came before.
#[inline]
fn mask() -> bool {
    let flags: u64;
    // SAFETY: at worst a fault, where the caller is not in ring 0. It counts as touching all memory, so that nothing moves out
    // from behind it.
    unsafe { asm!("pushfq", "pop {flags}", "cli", flags = out(reg) flags) };
    flags & INTERRUPT_FLAG != 0
}

/// Lets interrupts come.
#[inline]
fn unmask() {
    // SAFETY: as in `mask`; they came before.
    unsafe { asm!("sti", options(nostack)) };
}
