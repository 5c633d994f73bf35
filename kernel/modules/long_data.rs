//! A module with more data than a section may have: 72 KiB.

#![no_std]

core::arch::global_asm!(
    ".section .bss.long_data, \"aw\", @nobits",
    ".skip 72 << 10",
    ".previous"
);
