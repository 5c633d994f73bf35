//! Dynamic per-CPU memory.
#![no_std]
#[cfg(feature = "std")]
extern crate std;

pub mod embed;
pub mod page;
pub mod unit;
