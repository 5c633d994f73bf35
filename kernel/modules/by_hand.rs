//! A module that is written in assembly: a per-CPU variable, and a function that counts in it and in the kernel's.

#![no_std]

core::arch::global_asm!(include_str!("by_hand.s"), options(att_syntax));
