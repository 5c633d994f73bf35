//! The instructions on a copy, for every form of address: a symbol or a register.
//!
//! [`gs_place!`](crate::gs_place) writes them for one form. An `asm!` block takes a symbol by its name only, so every
//! static variable has its own set; of these, a program contains what it uses.

use super::{Change, Word};

/// Where a copy lies, as an operand of an instruction with the %gs prefix. Each method is the instruction that it is named
/// after; those that return a word return the one before.
///
/// # Safety
/// [`gs_place!`](crate::gs_place) alone writes the methods, and all of them are about one variable.
///
/// Safety of the methods: a word of this width lives there, and is changed by these instructions only.
#[doc(hidden)]
pub unsafe trait Place: Copy {
    unsafe fn load<W: Word>(self) -> W;
    unsafe fn store<W: Word>(self, value: W);
    unsafe fn add<W: Word>(self, value: W);
    unsafe fn and<W: Word>(self, value: W);
    unsafe fn or<W: Word>(self, value: W);
    unsafe fn xor<W: Word>(self, value: W);
    unsafe fn inc<W: Word>(self);
    unsafe fn dec<W: Word>(self);
    unsafe fn exchange_add<W: Word>(self, value: W) -> W;
    unsafe fn compare_exchange<W: Word>(self, old: W, new: W) -> W;

    /// [`LocalOps::change`](crate::this_cpu::LocalOps::change).
    #[inline(always)]
    unsafe fn change<W: Word>(self, change: Change<W>) {
        // SAFETY: the promise of the caller.
        unsafe {
            match change {
                Change::Set(value) => self.store(value),
                Change::Add(value) => self.add(value),
                Change::And(value) => self.and(value),
                Change::Or(value) => self.or(value),
                Change::Xor(value) => self.xor(value),
                Change::Replace(old, new) => {
                    self.compare_exchange(old, new);
                }
            }
        }
    }

    /// [`LocalOps::fetch`](crate::this_cpu::LocalOps::fetch).
    #[inline(always)]
    unsafe fn fetch<W: Word>(self, change: Change<W>) -> W {
        let bits = |before: W, combine: fn(u64, u64) -> u64, value: W| {
            W::narrow(combine(before.widen(), value.widen()))
        };
        // SAFETY: the promise of the caller.
        unsafe {
            match change {
                Change::Set(value) => update(self, |_| value),
                Change::Add(value) => self.exchange_add(value),
                Change::And(value) => update(self, |before| bits(before, |a, b| a & b, value)),
                Change::Or(value) => update(self, |before| bits(before, |a, b| a | b, value)),
                Change::Xor(value) => update(self, |before| bits(before, |a, b| a ^ b, value)),
                Change::Replace(old, new) => self.compare_exchange(old, new),
            }
        }
    }
}

/// Changes the copy to what `new` makes of it; returns what it was.
///
/// # Safety
/// As for the methods of [`Place`].
#[inline(always)]
unsafe fn update<P: Place, W: Word>(place: P, new: impl Fn(W) -> W) -> W {
    // SAFETY: the promise of the caller.
    let mut before = unsafe { place.load::<W>() };
    loop {
        // SAFETY: the promise of the caller.
        let found = unsafe { place.compare_exchange(before, new(before)) };
        if found == before {
            return found;
        }
        before = found;
    }
}

/// The methods of [`Place`] for one form of address: `$address` is the operand in the text of an instruction, where
/// `{place}` stands for the operand of `asm!` that follows, in which `$this` is `self`.
#[doc(hidden)]
#[macro_export]
macro_rules! gs_place {
    ($address:literal, |$this:ident| $($place:tt)+) => {
        #[inline(always)]
        unsafe fn load<W: $crate::this_cpu::Word>(self) -> W {
            let $this = self;
            let _ = $this;
            let (long, quad): (u32, u64);
            // SAFETY: reads a word of this width (promise of the caller).
            unsafe {
                match ::core::mem::size_of::<W>() {
                    1 => {
                        ::core::arch::asm!(concat!("movzx {value:e}, byte ptr ", $address), value = out(reg) long,
                            place = $($place)+, options(nostack, preserves_flags, readonly));
                        W::narrow(long as u64)
                    }
                    2 => {
                        ::core::arch::asm!(concat!("movzx {value:e}, word ptr ", $address), value = out(reg) long,
                            place = $($place)+, options(nostack, preserves_flags, readonly));
                        W::narrow(long as u64)
                    }
                    4 => {
                        ::core::arch::asm!(concat!("mov {value:e}, dword ptr ", $address), value = out(reg) long,
                            place = $($place)+, options(nostack, preserves_flags, readonly));
                        W::narrow(long as u64)
                    }
                    _ => {
                        ::core::arch::asm!(concat!("mov {value}, qword ptr ", $address), value = out(reg) quad,
                            place = $($place)+, options(nostack, preserves_flags, readonly));
                        W::narrow(quad)
                    }
                }
            }
        }

        $crate::gs_place!(@with store, "mov", (nostack, preserves_flags), $address, $this, $($place)+);
        $crate::gs_place!(@with add, "add", (nostack), $address, $this, $($place)+);
        $crate::gs_place!(@with and, "and", (nostack), $address, $this, $($place)+);
        $crate::gs_place!(@with or, "or", (nostack), $address, $this, $($place)+);
        $crate::gs_place!(@with xor, "xor", (nostack), $address, $this, $($place)+);
        $crate::gs_place!(@alone inc, "inc", $address, $this, $($place)+);
        $crate::gs_place!(@alone dec, "dec", $address, $this, $($place)+);

        #[inline(always)]
        unsafe fn exchange_add<W: $crate::this_cpu::Word>(self, value: W) -> W {
            let $this = self;
            let _ = $this;
            let value = value.widen();
            // SAFETY: changes a word of this width (promise of the caller).
            unsafe {
                match ::core::mem::size_of::<W>() {
                    1 => {
                        let mut value = value as u8;
                        ::core::arch::asm!(concat!("xadd byte ptr ", $address, ", {value}"),
                            value = inout(reg_byte) value, place = $($place)+, options(nostack));
                        W::narrow(value as u64)
                    }
                    2 => {
                        let mut value = value as u16;
                        ::core::arch::asm!(concat!("xadd word ptr ", $address, ", {value:x}"),
                            value = inout(reg) value, place = $($place)+, options(nostack));
                        W::narrow(value as u64)
                    }
                    4 => {
                        let mut value = value as u32;
                        ::core::arch::asm!(concat!("xadd dword ptr ", $address, ", {value:e}"),
                            value = inout(reg) value, place = $($place)+, options(nostack));
                        W::narrow(value as u64)
                    }
                    _ => {
                        let mut value = value;
                        ::core::arch::asm!(concat!("xadd qword ptr ", $address, ", {value}"),
                            value = inout(reg) value, place = $($place)+, options(nostack));
                        W::narrow(value)
                    }
                }
            }
        }

        #[inline(always)]
        unsafe fn compare_exchange<W: $crate::this_cpu::Word>(self, old: W, new: W) -> W {
            let $this = self;
            let _ = $this;
            let (old, new) = (old.widen(), new.widen());
            // SAFETY: changes a word of this width (promise of the caller).
            unsafe {
                match ::core::mem::size_of::<W>() {
                    1 => {
                        let mut old = old as u8;
                        ::core::arch::asm!(concat!("cmpxchg byte ptr ", $address, ", {new}"),
                            new = in(reg_byte) new as u8, inout("al") old, place = $($place)+, options(nostack));
                        W::narrow(old as u64)
                    }
                    2 => {
                        let mut old = old as u16;
                        ::core::arch::asm!(concat!("cmpxchg word ptr ", $address, ", {new:x}"),
                            new = in(reg) new as u16, inout("ax") old, place = $($place)+, options(nostack));
                        W::narrow(old as u64)
                    }
                    4 => {
                        let mut old = old as u32;
                        ::core::arch::asm!(concat!("cmpxchg dword ptr ", $address, ", {new:e}"),
                            new = in(reg) new as u32, inout("eax") old, place = $($place)+, options(nostack));
                        W::narrow(old as u64)
                    }
                    _ => {
                        let mut old = old;
                        ::core::arch::asm!(concat!("cmpxchg qword ptr ", $address, ", {new}"),
                            new = in(reg) new, inout("rax") old, place = $($place)+, options(nostack));
                        W::narrow(old)
                    }
                }
            }
        }
    };

    (@with $name:ident, $instruction:literal, ($($option:ident),+), $address:literal, $this:ident, $($place:tt)+) => {
        #[inline(always)]
        unsafe fn $name<W: $crate::this_cpu::Word>(self, value: W) {
            let $this = self;
            let _ = $this;
            let value = value.widen();
            // SAFETY: changes a word of this width (promise of the caller).
            unsafe {
                match ::core::mem::size_of::<W>() {
                    1 => ::core::arch::asm!(concat!($instruction, " byte ptr ", $address, ", {value}"),
                        value = in(reg_byte) value as u8, place = $($place)+, options($($option),+)),
                    2 => ::core::arch::asm!(concat!($instruction, " word ptr ", $address, ", {value:x}"),
                        value = in(reg) value as u16, place = $($place)+, options($($option),+)),
                    4 => ::core::arch::asm!(concat!($instruction, " dword ptr ", $address, ", {value:e}"),
                        value = in(reg) value as u32, place = $($place)+, options($($option),+)),
                    _ => ::core::arch::asm!(concat!($instruction, " qword ptr ", $address, ", {value}"),
                        value = in(reg) value, place = $($place)+, options($($option),+)),
                }
            }
        }
    };

    (@alone $name:ident, $instruction:literal, $address:literal, $this:ident, $($place:tt)+) => {
        #[inline(always)]
        unsafe fn $name<W: $crate::this_cpu::Word>(self) {
            let $this = self;
            let _ = $this;
            // SAFETY: changes a word of this width (promise of the caller).
            unsafe {
                match ::core::mem::size_of::<W>() {
                    1 => ::core::arch::asm!(concat!($instruction, " byte ptr ", $address),
                        place = $($place)+, options(nostack)),
                    2 => ::core::arch::asm!(concat!($instruction, " word ptr ", $address),
                        place = $($place)+, options(nostack)),
                    4 => ::core::arch::asm!(concat!($instruction, " dword ptr ", $address),
                        place = $($place)+, options(nostack)),
                    _ => ::core::arch::asm!(concat!($instruction, " qword ptr ", $address),
                        place = $($place)+, options(nostack)),
                }
            }
        }
    };
}
