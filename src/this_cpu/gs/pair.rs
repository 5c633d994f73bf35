//! Compare-exchange of a pair of words: what a list head with a counter against reuse, or a value with its state, is
//! changed by.

use core::arch::asm;

/// Sets the current CPU's copy of a pair to `new` if it is `old`: `cmpxchg16b` without LOCK, one step as far as its CPU is
/// concerned.
///
/// # Errors
/// The pair, if it is another.
///
/// # Safety
/// Two words live at the neutral address `at`, aligned to 16 bytes together, in the instance whose unit offset is in the GS
/// base (see [`GsDomain`](super::GsDomain)); they are changed by operations of this CPU only.
#[inline]
pub unsafe fn replace_pair(at: usize, old: [u64; 2], new: [u64; 2]) -> Result<(), [u64; 2]> {
    let (mut low, mut high) = (old[0], old[1]);
    let is_replaced: u8;
    // SAFETY: changes the pair at most (promise of the caller). rbx, which holds the low half of the new pair, is not to be
    // had as an operand: it is exchanged for the time being.
    unsafe {
        asm!(
            "xchg rsi, rbx",
            "cmpxchg16b xmmword ptr gs:[rdi]",
            "sete r8b",
            "mov rbx, rsi",
            in("rdi") at,
            inout("rsi") new[0] => _,
            in("rcx") new[1],
            inout("rax") low,
            inout("rdx") high,
            out("r8b") is_replaced,
            options(nostack)
        );
    }
    match is_replaced {
        0 => Err([low, high]),
        _ => Ok(()),
    }
}
