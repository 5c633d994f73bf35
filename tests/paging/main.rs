//! The backing for a kernel with page tables, on a machine in a process: see [`host`].
//!
//! The first chunk and CPUs that never came ([`cpus`]), random requests ([`requests`]), every allocation of a frame failing
//! in turn ([`faults`], and by operations and fronts: [`undone`]), blocks of metadata ([`metadata`]), the operations of CPUs ([`ops`]), what is refused at set-up ([`setup`]).

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "../common/copies.rs"]
mod copies;
#[path = "../common/free.rs"]
mod free;
#[path = "../common/newcomers.rs"]
mod newcomers;

mod audit;
mod cpus;
mod faults;
mod host;
mod machine;
mod metadata;
mod mmu;
mod ops;
mod requests;
mod setup;
mod undone;
