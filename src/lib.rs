//! Dynamic per-CPU memory, as a big kernel's scalability stands on it, for every Rust kernel and every Linux process.
//!
//! A per-CPU variable has a copy for every CPU. Each CPU works on its own copy, without a lock and without a cache line
//! that another CPU wants; whoever needs the whole adds the copies up.
//!
//! ```text
//!              unit 0 (CPU 0)        unit 1 (CPU 1)       ...        one unit per possible CPU, grouped by NUMA node
//!  chunk 0   | static|rsvd|dyn |   | static|rsvd|dyn |               first chunk: embed or page, never goes away
//!  chunk 1   |     dynamic     |   |     dynamic     |               later chunks: address space reserved per unit,
//!    ...                                                             pages populated on demand
//!
//!  handle = a neutral address          copy on a CPU = handle + unit offset of the CPU
//! ```
//!
//! One addition serves a static variable, a module's variable and a dynamic allocation alike: no table per variable, and
//! no limit on how far the memory lies from the code.
//!
//! # In a Linux process
//!
//! ```
//! use pcpu::{CpuCell, LocalCell, PerCpu, RemoteCell, define_per_cpu};
//!
//! define_per_cpu! {
//!     /// Requests served, a static variable.
//!     static REQUESTS: CpuCell<u64> = CpuCell::new(0);
//! }
//! // The same, made at run time.
//! let errors = PerCpu::<CpuCell<u64>>::new()?;
//!
//! std::thread::scope(|scope| {
//!     for _ in 0..4 {
//!         scope.spawn(|| {
//!             REQUESTS.add(3);
//!             errors.inc();
//!         });
//!     }
//! });
//! assert_eq!((REQUESTS.sum(), errors.sum()), (12, 4));
//! # Ok::<(), pcpu::AllocError>(())
//! ```
//!
//! A [`CpuCell`] is an integer that each CPU changes its own copy of, by the operations of [`this_cpu`]. [`PerCpu`] owns a
//! variable of any type, [`alloc_percpu`] gives a raw handle to one. [`counter`] and [`refcount`] are what people build on
//! it.
//!
//! # In a kernel
//!
//! Without the `std` feature the crate needs neither `std` nor `alloc`. A kernel describes its CPUs
//! ([`unit::Topology`]), builds the first chunk from early memory ([`embed`] or [`page`]), implements [`backing::Backing`]
//! or takes [`backing::contig`], and makes a [`PerCpuAllocator`] of both. [`Instance`] puts it into a `static`,
//! [`Domain`] names it in the types of its handles.
//!
//! On x86_64 two things more are ready: `backing::paging` (feature `paging`) has page tables and makes the first chunk
//! itself, given frames and a way to make CPUs forget translations; and `this_cpu::gs` has the operations, one instruction
//! with the %gs prefix each, with `define_per_cpu_in!` for static variables, and a lock that masks interrupts.
//! [`this_cpu::pinned`] is for code that must stay on its CPU. [`PerCpuAllocator::enable_caches`] puts a cache in front for every
//! CPU.
//!
//! [`adding_to_a_kernel`] has the steps in their order, and a program.
//!
//! # To study allocation
//!
//! [`backing::sim`] is a machine of any shape; what runs on it is the same allocator.
//!
//! # How are per-CPU pointers implemented?
//!
//! A handle holds an address in the address space of the *template*, the one copy of the static variables that the
//! compiler and linker know of. A table has, for each CPU, the distance from the template to the CPU's unit; a CPU's
//! copy is the handle plus that distance. Memory that is allocated later is laid out so that the same distances hold
//! for it: every chunk takes the same place relative to each unit. That is why a pointer and a symbol go through the
//! one function [`per_cpu_ptr`], and why no variable needs a table of its own.
//!
//! # Features
//!
//! - `std` (default): the Linux process as a home: [`global`](mod@global), [`backing::mmap`], [`backing::sim`].
//! - `unloadable`: for shared libraries that are unmapped while the process goes on; see [`module`](mod@module#unloading).
//! - `paging`: the backing for an x86_64 kernel with page tables, `backing::paging`.

#![no_std]

#[cfg(any(feature = "std", test))]
extern crate std;

mod alloc_api;
pub mod allocator;
pub mod backing;
pub mod cache;
mod chunk;
pub mod counter;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod cpu_lock;
pub mod cpus;
mod directory;
pub mod embed;
mod field;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod global;
pub mod hardened;
mod max_tree;
mod metadata;
#[cfg(all(loom, test))]
mod models;
#[cfg(all(feature = "std", target_os = "linux"))]
pub mod module;
mod owner;
pub mod page;
mod places;
pub mod refcount;
mod request;
#[cfg(all(feature = "std", target_os = "linux"))]
mod static_var;
pub mod stats;
mod sync;
pub mod this_cpu;
pub mod unit;

pub use alloc_api::{
    Domain, Global, Handle, Instance, PerCpuPtr, alloc_percpu_bytes, alloc_percpu_in,
    alloc_percpu_many_in, alloc_percpu_many_with, alloc_percpu_with, drain_caches, free_percpu,
    free_percpu_many, free_percpu_with, per_cpu_ptr, this_cpu_ptr,
};
pub use allocator::PerCpuAllocator;
pub use counter::{BatchCounter, Counter};
#[cfg(all(feature = "std", target_os = "linux"))]
pub use cpu_lock::{CpuLock, LocalLock};
pub use field::{Field, Part, Parts};
#[cfg(all(feature = "std", target_os = "linux"))]
pub use global::{alloc_percpu, alloc_percpu_many, global};
pub use owner::{InitError, PerCpu, RemoteCell, Shape};
pub use refcount::{Ref, RefCount};
pub use request::{
    AllocError, AllocFlags, CpuError, FreeError, FreeFlags, FreeManyError, Request, SetupError,
};
#[cfg(all(feature = "std", target_os = "linux"))]
pub use static_var::{CACHE_LINE_BYTES, Initial, Section, StaticVar};
#[cfg(all(feature = "std", target_os = "linux"))]
#[doc(hidden)]
pub use static_var::{OnOwnLines, OnOwnPages, handle_of};
pub use this_cpu::{
    Chain, CpuBuffer, CpuCell, CpuPair, CpuStack, Full, Link, LocalBuffer, LocalCell, LocalPair,
    LocalStack, Node, NodePointer,
};
/// For types of one's own that zero bytes are a value of: `#[derive(FromZeros)] #[zerocopy(crate = "pcpu::zerocopy")]`.
pub use zerocopy::{self, FromZeros};

// A page of the documentation. Its program is compiled with the doc tests where its kernel could run.
#[cfg(any(
    all(doc, not(doctest)),
    all(doctest, feature = "paging", target_arch = "x86_64")
))]
#[doc = include_str!("../docs/adding-to-a-kernel.md")]
pub mod adding_to_a_kernel {}
