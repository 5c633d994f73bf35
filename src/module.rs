//! Shared libraries that come and go at run time, with static per-CPU variables of their own.
//!
//! A library (a *module*: a Rust `cdylib`) is linked with a copy of this crate of its own, maybe built by another compiler.
//! There is one instance per process all the same: the *host*'s, which is that of the program. When a module is
//! attached, the initial values of its variables are copied to an area of the host's reserved region, for every possible
//! CPU, and all that its copy of the crate does goes to the host's instance: operations on the current CPU's copy by the
//! same few instructions as the host's, everything else through a table of C functions. When it is detached the area is
//! free again, and when it comes back its variables start anew.
//!
//! # The module
//! A `cdylib` says that it is one, once; the rest is as in any program:
//!
//! ```no_run,standalone_crate
//! use pcpu::{CpuCell, LocalCell, RemoteCell, define_per_cpu};
//!
//! pcpu::module!();
//!
//! define_per_cpu! {
//!     static REQUESTS: CpuCell<u64> = CpuCell::new(0);
//! }
//!
//! #[unsafe(no_mangle)]
//! extern "C" fn serve() -> u64 {
//!     REQUESTS.inc();
//!     REQUESTS.sum()
//! }
//! # fn main() {}
//! ```
//! ```toml
//! [lib]
//! crate-type = ["cdylib"]
//!
//! [dependencies]
//! pcpu = { version = "0.1", features = ["unloadable"] }
//! ```
//!
//! # The host
//! ```no_run
//! use pcpu::module::{Module, Placement};
//!
//! // SAFETY: the library comes from us; nothing of it is in use when `plugin` is dropped.
//! let plugin = unsafe { Module::load("plugins/libserver.so", Placement::Reserved)? };
//! let serve = plugin.symbol(c"serve").ok_or("no function serve")?;
//! // SAFETY: that is what the library defines.
//! let serve: extern "C" fn() -> u64 = unsafe { std::mem::transmute(serve) };
//! println!("{} requests", serve());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! Who loads libraries by other means looks up the symbol [`SYMBOL`], a [`ModuleTable`], and passes its address to
//! [`attach`]; what comes back is to be dropped before the library is closed.
//!
//! Variables that are `#[percpu(page_aligned)]` need a host whose units lie whole pages apart: one that has such
//! variables itself, or says [`page_geometry!`](crate::page_geometry!). Others refuse the module with
//! [`AttachError::Alloc`].
//!
//! # What a module can use
//! Static variables and [`StaticVar`](crate::StaticVar), [`this_cpu`](crate::this_cpu), handles,
//! [`alloc_percpu`](crate::alloc_percpu) and [`free_percpu`](crate::free_percpu), [`PerCpu`](crate::PerCpu),
//! [`counter`](crate::counter) and [`refcount`](crate::refcount). What it allocates lives in the host's instance, and stays
//! there if the module goes without freeing it. A variable travels between module and host as a handle
//! ([`PerCpuPtr::neutral`](crate::PerCpuPtr::neutral), a number), never as a symbol.
//!
//! The allocator itself is the host's only, for its layout in memory is private to one build of the crate:
//! [`global`](crate::global()), [`boot_log`](crate::global::boot_log) and [`attach`] are refused in a module, the first
//! two by a panic that says so. CPUs and units are told by [`Domain::units`](crate::Domain::units).
//!
//! A module that is not attached (yet, or any more) has no variables: their use panics.
//!
//! # Unloading
//! The kernel looks at the restartable sequence that a thread announced last, whenever the thread has been preempted, even
//! if the sequence is long over; and ends the process if it finds no memory there. With the cargo feature `unloadable` a
//! module's operations take the announcement back (0.3 ns each), and closing the module really unmaps it. Without the
//! feature, a module makes itself stay mapped when it is attached: closing it detaches it only.
//!
//! A `cdylib` without `module!` has an instance of its own, as a program has, and must not be closed.
//!
//! Features are those of a whole build: if program and library are built by one `cargo` command, both have it. The host
//! works with it as well as without.

mod error;
mod guest;
mod host;
mod library;
mod reply;
mod table;

pub use error::{AttachError, LoadError};
pub(crate) use guest::{host, is_module};
pub use host::{Area, Attached, attach};
pub use library::Module;
pub use table::{ABI_VERSION, ModuleTable};

/// The name of the symbol that a module exports: its [`ModuleTable`].
pub const SYMBOL: &core::ffi::CStr = c"pcpu_module";

/// Where a module's variables may lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Placement {
    /// In the reserved region of the first chunk, 8 KiB for all modules together.
    #[default]
    Reserved,
    /// In the reserved region; in the dynamic region if there is no room left, up to the
    /// [largest request](crate::allocator::Policy::max_alloc_bytes) of 32 KiB. Then every possible CPU is given memory of
    /// its own, as [`PerCpu::new_with`](crate::PerCpu::new_with) does.
    DynamicIfFull,
}

/// Makes a module of the `cdylib` that it is called in, once: exports its table, and has the library's copy of this
/// crate wait for a host instead of making an instance. See [`mod@crate::module`].
///
/// Everything that is linked with the crate becomes a module by that: it must be built as a `cdylib` only. Its own unit tests
/// run without a host.
#[macro_export]
macro_rules! module {
    () => {
        #[cfg(not(test))]
        const _: () = {
            #[used]
            #[unsafe(export_name = "pcpu_module")]
            static TABLE: $crate::module::ModuleTable =
                $crate::module::ModuleTable::of_this_module();

            // What tells this crate's copy of the library from that of a program: one byte in a section that is empty
            // otherwise.
            #[used]
            #[unsafe(link_section = "pcpu_module_mark")]
            static MARK: u8 = 1;
        };
    };
}
