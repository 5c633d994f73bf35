//! The lock of the kernel: it spins, and masks interrupts while it is held.
//!
//! The allocator's lock must be of this kind, since interrupt handlers allocate and free too: one that interrupted the
//! holder on its own CPU would spin forever.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use lock_api::{GuardNoSend, RawMutex};
use x86_64::instructions::interrupts;

/// A spin lock that masks interrupts.
pub struct IrqLock {
    held: AtomicBool,
    /// Whether the holder had interrupts enabled; only the holder uses it.
    unmask: AtomicBool,
}

impl IrqLock {
    fn take(&self) -> bool {
        let taken =
            self.held
                .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed);
        taken.is_ok()
    }
}

// SAFETY: `held` goes from false to true for one taker at a time, and back only when that one unlocks.
unsafe impl RawMutex for IrqLock {
    const INIT: Self = Self {
        held: AtomicBool::new(false),
        unmask: AtomicBool::new(false),
    };

    type GuardMarker = GuardNoSend;

    fn lock(&self) {
        while !self.try_lock() {
            // Interrupts are as before here: waiting does not mask them.
            while self.is_locked() {
                spin_loop();
            }
        }
    }

    fn try_lock(&self) -> bool {
        let enabled = interrupts::are_enabled();
        interrupts::disable();
        let taken = self.take();
        if taken {
            self.unmask.store(enabled, Ordering::Relaxed);
        } else if enabled {
            interrupts::enable();
        }
        taken
    }

    unsafe fn unlock(&self) {
        let unmask = self.unmask.load(Ordering::Relaxed);
        self.held.store(false, Ordering::Release);
        if unmask {
            interrupts::enable();
        }
    }

    fn is_locked(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }
}
