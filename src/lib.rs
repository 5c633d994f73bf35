//! Dynamic per-CPU memory.
#![no_std]

#[cfg(any(feature = "std", test))]
extern crate std;

mod alloc_api;
pub mod allocator;
pub mod backing;
mod chunk;
pub mod cpus;
mod directory;
pub mod embed;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod global;
mod metadata;
pub mod page;
mod request;
#[cfg(all(feature = "std", target_os = "linux"))]
mod static_var;
pub mod stats;
pub mod unit;

pub use alloc_api::{
    Domain, Global, Handle, Instance, PerCpuPtr, alloc_percpu_bytes, alloc_percpu_in,
    alloc_percpu_with, free_percpu, free_percpu_with, per_cpu_ptr, this_cpu_ptr,
};
pub use allocator::PerCpuAllocator;
#[cfg(all(feature = "std", target_os = "linux"))]
pub use global::{alloc_percpu, global};
pub use request::{AllocError, AllocFlags, CpuError, FreeError, FreeFlags, Request, SetupError};
#[cfg(all(feature = "std", target_os = "linux"))]
pub use static_var::{Initial, StaticVar, handle_of};
