//! A module with more per-CPU variables than the allocator serves at a time: 72 KiB.

#![no_std]

core::arch::global_asm!(
    ".section .data..percpu, \"aw\", @nobits",
    ".skip 72 << 10",
    ".previous"
);
