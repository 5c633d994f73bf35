//! Waiting, by the counter of the PC's timer chip that nothing else uses.

use x86_64::instructions::port::Port;

/// The chip's clock.
const TICKS_PER_SECOND: u64 = 1_193_182;

/// Waits so many microseconds; at most 50,000 at a time, for the counter has 16 bits.
pub fn wait_us(microseconds: u64) {
    assert!(
        microseconds <= 50_000,
        "a delay of {microseconds} us, the limit is 50000"
    );
    let ticks = (TICKS_PER_SECOND * microseconds / 1_000_000).max(1) as u16;
    let (mut gate, mut mode, mut counter) = (
        Port::<u8>::new(0x61),
        Port::<u8>::new(0x43),
        Port::<u8>::new(0x42),
    );
    // SAFETY: counter 2 of the timer chip and its gate; only this function uses them, on the boot processor.
    unsafe {
        // The gate closed, the speaker off.
        let closed = gate.read() & 0xfc;
        gate.write(closed);
        // Counter 2, both bytes, mode 0: the output rises at 0.
        mode.write(0b1011_0000);
        counter.write(ticks as u8);
        counter.write((ticks >> 8) as u8);
        gate.write(closed | 1);
        while gate.read() & 0x20 == 0 {
            core::hint::spin_loop();
        }
    }
}
