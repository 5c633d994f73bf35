//! The libraries as the host sees them: their functions, by name.

use std::ffi::CStr;
use std::path::Path;

use pcpu::module::{LoadError, Module, Placement};
use pcpu::{CpuCell, PerCpuPtr};

use crate::alone::{Build, library};

/// What a CPU's copy of the counting library's own variable starts with.
pub const INITIAL: u64 = 100;

/// Loads a library of this name.
pub fn load(
    name: &str,
    build: Build,
    copy: u32,
    placement: Placement,
) -> Result<Module, LoadError> {
    load_file(library(name, build, copy).path(), placement)
}

pub fn load_file(path: &Path, placement: Placement) -> Result<Module, LoadError> {
    // SAFETY: the tests' own libraries, which run nothing by themselves; a `Module` is dropped when its library is idle.
    unsafe { Module::load(path, placement) }
}

/// A counting library in the reserved region.
pub fn counting(build: Build, copy: u32) -> Counting {
    Counting(load("counting", build, copy, Placement::Reserved).expect("it can be loaded"))
}

/// The counting library.
#[derive(Debug)]
pub struct Counting(pub Module);

/// A function of a library.
///
/// # Safety
/// `F` is the type of the function.
pub unsafe fn function<F: Copy>(module: &Module, name: &CStr) -> F {
    let symbol = module.symbol(name).expect("the library exports it");
    assert_eq!(size_of::<F>(), size_of_val(&symbol));
    // SAFETY: the promise of the caller.
    unsafe { std::mem::transmute_copy(&symbol) }
}

macro_rules! functions {
    ($($(#[$meta:meta])* $name:ident($($argument:ident: $type:ty)?) $(-> $result:ty)?;)+) => {
        impl Counting {$(
            $(#[$meta])*
            pub fn $name(&self $(, $argument: $type)?) $(-> $result)? {
                let name = CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes());
                type Function = extern "C" fn($($type)?) $(-> $result)?;
                // SAFETY: that is what the library defines.
                let function: Function = unsafe { function(&self.0, name.expect("a name")) };
                function($($argument)?)
            }
        )+}
    };
}

functions! {
    /// Adds on the current CPU.
    add(value: u64);
    /// The sum over all CPUs, as the library sees it.
    sum() -> u64;
    /// The neutral address of its own variable.
    handle() -> usize;
    /// The neutral address of its first variable.
    first() -> usize;
    /// How many CPUs' copies hold all initial values.
    fresh_cpus() -> u32;
    /// Does an operation of some kind.
    operation(kind: u32) -> bool;
    /// What a batch counter has counted.
    counted() -> i64;
    /// Whether a reference count works.
    referred() -> bool;
    /// Makes a variable.
    make() -> usize;
    /// Ends it.
    unmake(variable: usize) -> u64;
    /// Whether batches are served, and refused rightly.
    makes_many() -> bool;
    /// Whether they are freed up to a wrong address.
    frees_many() -> bool;
    /// Whether errors come through.
    is_refused_rightly() -> bool;
    /// Panics.
    use_the_allocator() -> u32;
    /// Whether a module is refused as a host.
    is_no_host(table: *const core::ffi::c_void) -> bool;
}

impl Counting {
    /// The library's own variable, as the host has it.
    pub fn variable(&self) -> PerCpuPtr<CpuCell<u64>> {
        PerCpuPtr::from_neutral(self.handle()).expect("a handle is not 0")
    }
}
