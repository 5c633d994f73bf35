//! Random numbers for code that signal handlers interrupt and repeat: plain functions of plain words.

/// What is added from one number of a sequence to the next, before they are mixed.
pub const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Scatters the bits of a number (the finaliser of SplitMix64).
pub fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}
