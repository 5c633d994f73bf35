//! The instance of a Linux process: made before `main`, from the system's CPUs and nodes.
//!
//! Its first chunk holds the static variables of the program ([`define_per_cpu!`](crate::define_per_cpu)), is built by
//! embed, or by page where embed fails, and lives as long as the process. Upkeep is run by whoever allocates or frees
//! and finds it due.
//!
//! # Signal handlers
//! The [operations](crate::this_cpu) on current copies may be used in a signal handler, and so may sums: they take no
//! lock, but for a [`CpuLock`](crate::CpuLock), and a [`CpuBuffer`](crate::CpuBuffer) where there are no restartable sequences. A handler may allocate and free with [`AllocFlags::TRY`](crate::AllocFlags::TRY) and
//! [`FreeFlags::TRY`](crate::FreeFlags::TRY) only. Such a call does not wait: where the thread that was interrupted, or another
//! one, holds the instance's lock it returns `Busy`. Any other call would wait for the thread that was interrupted, for
//! ever. An event hook is called from the handler then.
//!
//! # `fork`
//! The child has copies of its own of all variables, and all that the parent could do with them it can: operations,
//! sums, allocation, the upkeep, [`RefCount::kill`](crate::RefCount::kill). `fork` waits for what other threads have under
//! way in the instance, as it does for `malloc`. What they had allocated stays allocated in the child, and what they
//! would have freed is not. What another thread was in the middle of is as it was then, for ever: a
//! [`CpuLock`](crate::CpuLock) that it held, an append where operations are LOCKed steps, what it carried from a copy to
//! the shared number of a [`BatchCounter`](crate::BatchCounter), a kill of a reference count. A fork from an [event hook](crate::stats::EventHook), or from a signal handler that
//! interrupted a call of the instance, may wait for ever.
//!
//! `vfork`, `_Fork` and a raw `clone` call no handlers. A child of `_Fork` has the copies, but must not allocate
//! or free. Between `vfork` and `exec` a child shares the memory of its parent and what the parent's thread tells of
//! its CPU, which need not be the child's: no operation is right there. `posix_spawn` and
//! [`std::process::Command`] do nothing of the kind.
//!
//! # Hardened mode
//! A process that is started with the environment variable `PCPU_HARDENED=report` looks for mistakes of the program: its instance
//! is in [hardened mode](mod@crate::hardened), and findings are told on standard error, a line each. With `PCPU_HARDENED=abort` the
//! first one aborts the process. Any other value but `off` ends the process at its start, with status 2. Nothing is read where the
//! program has more rights than whoever starts it. What was never freed is not told at the end, for static owners live as long as the
//! process; [`visit_live_areas`](PerCpuAllocator::visit_live_areas) tells at any time.
//!
//! # Restartable sequences
//! They are used where glibc (2.35 or later) has registered its threads for them; nothing is registered here. Where glibc
//! leaves that to another library (`GLIBC_TUNABLES=glibc.pthread.rseq=0`), or is older, or under valgrind, every operation
//! is a LOCKed step: [`method`] tells. A library that registers an area of its own beside glibc's is refused by the kernel,
//! and changes nothing.
//!
//! A thread with memory of its own for libc (`CLONE_SETTLS`) that is not registered works on the [stray unit](stray_unit). One
//! that shares it with another thread reads that one's CPU: such a thread, made by a raw `clone` with `CLONE_VM`, must not
//! use per-CPU variables, as it must not use libc.
//!
//! # Staying on a CPU
//! A process cannot. A thread may be taken to another CPU between any two instructions: an affinity of one CPU is
//! changed from outside and given up when that CPU goes offline, and does not keep other threads away. That is why there is
//! no guard here that holds a CPU for longer than one operation, and why [`PerCpu::current`](crate::PerCpu::current) lends
//! a copy that others may use as well. What takes several steps on one copy needs a lock in the copy
//! ([`cpu_lock`](crate::cpu_lock)), or a closure that ends with one store ([`update`](crate::LocalCell::update)).

use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, Ordering};
use std::string::{String, ToString};
use std::sync::OnceLock;
use std::vec::Vec;

use zerocopy::FromZeros;

use crate::alloc_api::{
    Domain, Global, PerCpuPtr, alloc_percpu_in, alloc_percpu_many_in, free_past_own,
};
use crate::allocator::{PerCpuAllocator, Region};
use crate::backing::mmap::Mmap;
use crate::cache::{Here, LockedSeat};
use crate::cpus::Units;
use crate::module;
use crate::request::{AllocError, CpuError, FreeError, FreeFlags, Request};
use crate::static_var;
use crate::this_cpu::process::{Method, ProcessOps};
use crate::unit::CpuId;

mod fork;
mod geometry;
mod hardened;
mod process;
mod system;

use process::Process;

/// The allocator of the process.
pub type GlobalAllocator = PerCpuAllocator<Mmap, ProcessLock>;

/// The lock of the process's instance: one word, without a queue of waiting threads outside it. A signal handler may try
/// it, and a forked child may go on with it.
pub type ProcessLock = rustix_futex_sync::RawMutex;

/// What one CPU's copies can ever take, in bytes, and what lies between the neutral address of a variable and its copy in
/// unit 0. A constant, for the operations have it in their instructions; a displacement of 32 bits holds it.
pub(crate) const WINDOW_BYTES: usize = 1 << 30;

// SAFETY: `allocator` always returns the one instance of the process, which no other domain returns.
unsafe impl Domain for Global {
    type Backing = Mmap;
    type Lock = ProcessLock;
    type Ops = ProcessOps;

    fn allocator() -> &'static GlobalAllocator {
        &process().allocator
    }

    fn current_cpu() -> CpuId {
        CpuId::new(rustix::thread::sched_getcpu() as u32)
    }

    #[inline]
    fn units() -> &'static Units {
        match NonNull::new(UNITS.load(Ordering::Acquire)) {
            // SAFETY: `use_units` was given a reference that lives as long as the process, or until a module is detached,
            // after which nobody uses it.
            Some(units) => unsafe { units.as_ref() },
            None => find_units(),
        }
    }

    #[inline(always)]
    fn allocate(request: &Request) -> Result<usize, AllocError> {
        match ready() {
            Some(allocator) => allocate_ready(allocator, request),
            None => allocate_otherwise(request),
        }
    }

    fn allocate_many(request: &Request, out: &mut [usize]) -> Result<(), AllocError> {
        match (ready(), module::host()) {
            (Some(allocator), _) => allocator.allocate_many_at(&here(), request, out),
            (None, Some(host)) => host.allocate_many(request, out),
            (None, None) => {
                let process = process();
                match locked_seat(process) {
                    Some(seat) => process.allocator.allocate_many_at(&seat, request, out),
                    None => process.allocator.allocate_many(request, out),
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn free(address: usize, flags: FreeFlags) -> Result<(), FreeError> {
        // SAFETY: the promise of the caller.
        unsafe {
            match ready() {
                Some(allocator) => match allocator.put_own_at(&here(), address, flags) {
                    Ok(()) => Ok(()),
                    Err(why) => free_past_own::<Self>(allocator, address, flags, why),
                },
                None => free_otherwise(address, flags),
            }
        }
    }

    fn bring_up(cpu: CpuId) -> Result<(), CpuError> {
        match module::host() {
            Some(host) => host.bring_up(cpu),
            None => process().allocator.bring_up(cpu),
        }
    }

    fn region(neutral: usize) -> Option<Region> {
        match module::host() {
            Some(host) => host.region(neutral),
            None => process().allocator.region(neutral),
        }
    }
}

/// The units of the instance; null until they are first asked for, and in a module that is not attached.
static UNITS: AtomicPtr<Units> = AtomicPtr::new(ptr::null_mut());

/// Notes the units of the instance.
pub(crate) fn use_units(units: Option<&'static Units>) {
    let units = units.map_or(ptr::null_mut(), |units| ptr::from_ref(units).cast_mut());
    UNITS.store(units, Ordering::Release);
}

#[cold]
fn find_units() -> &'static Units {
    match module::host() {
        Some(host) => host.units(),
        None => {
            let units = process().allocator.units();
            use_units(Some(units));
            units
        }
    }
}

/// Allocates a variable in the process: a `T` of zero bytes on every CPU.
///
/// ```
/// use pcpu::{alloc_percpu, free_percpu, per_cpu_ptr};
/// use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
///
/// let hits = alloc_percpu::<AtomicU64>()?;
/// let mut sum = 0;
/// for cpu in pcpu::global().units().possible().iter() {
///     // SAFETY: the variable is allocated and lives until it is freed below.
///     let copy = unsafe { per_cpu_ptr(hits, cpu)?.as_ref() };
///     sum += copy.load(Relaxed);
/// }
/// assert_eq!(sum, 0);
/// // SAFETY: nobody uses the variable any more.
/// unsafe { free_percpu(hits)? };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`AllocError`]; [`AllocError::AlignTooLarge`] for a type that is aligned to more than 128 bytes, unless the program has
/// said [`page_geometry!`](crate::page_geometry!) or has page-aligned static variables: then a page is the limit.
pub fn alloc_percpu<T: FromZeros>() -> Result<PerCpuPtr<T>, AllocError> {
    alloc_percpu_in()
}

/// Allocates `N` variables in the process, all of them or none: a `T` of zero bytes on every CPU each.
///
/// ```
/// use pcpu::{CpuCell, alloc_percpu_many, free_percpu_many, this_cpu};
///
/// let [reads, writes] = alloc_percpu_many::<CpuCell<u64>, 2>()?;
/// // SAFETY: the variables are live until they are freed below.
/// unsafe { this_cpu::add(writes, 1) };
/// // SAFETY: nobody uses the variables any more.
/// unsafe { free_percpu_many(&[reads, writes])? };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// As [`alloc_percpu`]; then none is allocated.
pub fn alloc_percpu_many<T: FromZeros, const N: usize>() -> Result<[PerCpuPtr<T>; N], AllocError> {
    alloc_percpu_many_in()
}

/// The allocator of the process.
///
/// # Panics
/// If the system grants no address space for it, or does not say which CPUs it has; and in a
/// [module](mod@crate::module), whose host has it.
pub fn global() -> &'static GlobalAllocator {
    Global::allocator()
}

/// The first chunk of the process as Linux's boot log would tell of it.
///
/// # Panics
/// As [`global`].
pub fn boot_log() -> &'static str {
    &process().boot_log
}

/// How the process's operations on the current CPU's copies are done.
pub fn method() -> Method {
    match module::host() {
        Some(host) => host.method(),
        None => process().method,
    }
}

/// How many forks lie between the first process with this memory and this one.
pub(crate) fn forks() -> u64 {
    fork::count()
}

/// The CPU id of the stray unit: the copies of threads that are not registered with the kernel.
pub fn stray_unit() -> CpuId {
    CpuId::new(Global::units().nr_cpu_ids() - 1)
}

/// The CPUs that are online now, in order: those that a thread may be running on. A moment later there may be others.
///
/// Where the system does not tell (a sandbox without `/sys`), these are all CPUs that it may ever have: what is done for
/// every CPU is done for those that are online then.
///
/// ```
/// use pcpu::{PerCpu, global};
/// use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
///
/// let is_stale = PerCpu::<AtomicBool>::new()?;
/// for copy in is_stale.iter_on(global::online_cpus()) {
///     let (_cpu, is_stale) = copy?;
///     is_stale.store(true, Relaxed);
/// }
/// assert!(is_stale.current()?.load(Relaxed));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn online_cpus() -> Vec<CpuId> {
    among_possible(system::online_cpus())
}

/// The CPUs that the calling thread may run on, in order: its affinity, which a container or a cpuset may have made
/// smaller than the machine. It can be changed from outside at any time.
///
/// Where the system does not tell, these are all CPUs that it may ever have.
///
/// ```
/// use pcpu::global;
///
/// let allowed = global::allowed_cpus();
/// assert!(!allowed.is_empty() && allowed.len() <= global::online_cpus().len());
/// ```
pub fn allowed_cpus() -> Vec<CpuId> {
    among_possible(system::allowed_cpus())
}

/// The CPUs of a list that have a unit, which the stray unit's number is not; or all of them.
fn among_possible(cpus: Option<Vec<CpuId>>) -> Vec<CpuId> {
    let is_cpu = |cpu: &CpuId| *cpu < stray_unit();
    match cpus {
        Some(cpus) => cpus.into_iter().filter(is_cpu).collect(),
        None => Global::units().possible().iter().filter(is_cpu).collect(),
    }
}

/// Gives CPUs up to `cpu` copies of their own, without a lock: in a process memory comes with its first touch, and the
/// copies of a CPU that never ran are zero wherever an area may be handed out. False if there is no such CPU.
pub(crate) fn materialise_up_to(cpu: CpuId) -> bool {
    let is_cpu = cpu < stray_unit();
    if is_cpu {
        (0..=cpu.get()).for_each(|id| materialise(CpuId::new(id)));
    }
    is_cpu
}

/// The copy of the CPU that the caller was on a moment ago. It takes no lock, and so may be called from a signal handler
/// that interrupted anything.
pub(crate) fn current_copy(neutral: usize) -> usize {
    let cpu = Global::current_cpu();
    let units = Global::units();
    match units.offset(cpu) {
        Some(offset) => {
            if !units.materialised().contains(cpu) {
                materialise(cpu);
            }
            neutral.wrapping_add(offset)
        }
        None => stray_copy(neutral),
    }
}

/// Gives a CPU copies of its own, which needs neither a lock nor memory here, and so cannot fail for a CPU that is there.
fn materialise(cpu: CpuId) {
    let brought_up = Global::bring_up(cpu);
    debug_assert_eq!(brought_up, Ok(()));
}

/// The stray unit's copy of the variable at a neutral address.
pub(crate) fn stray_copy(neutral: usize) -> usize {
    let stray = stray_unit();
    materialise(stray);
    neutral.wrapping_add(Global::units().offset(stray).unwrap_or(0))
}

/// The instance when it is there and its operations are restartable sequences; 0 before, and in a module.
static READY: AtomicPtr<GlobalAllocator> = AtomicPtr::new(ptr::null_mut());

#[inline]
fn ready() -> Option<&'static GlobalAllocator> {
    let ready = NonNull::new(READY.load(Ordering::Acquire));
    // SAFETY: an instance that was made lives as long as the process.
    ready.map(|ready| unsafe { ready.as_ref() })
}

/// The caller, on whatever CPU.
#[inline(always)]
fn here() -> Here<Global> {
    // SAFETY: it is used with the instance of the process only.
    unsafe { Here::new() }
}

/// Allocates where the instance is ready: all of it behind one call. With a run's part in line, what comes out of a stash takes longer.
#[inline(never)]
fn allocate_ready(allocator: &GlobalAllocator, request: &Request) -> Result<usize, AllocError> {
    allocator.allocate_at(&here(), request)
}

/// The seat of the CPU that the caller was on a moment ago, where all steps are LOCKed: a request finds the CPU once, not for each
/// step.
fn locked_seat(process: &'static Process) -> Option<LockedSeat> {
    (process.method == Method::Locked).then(|| {
        let (cpu, units) = (Global::current_cpu(), process.allocator.units());
        if units.offset(cpu).is_some() && !units.materialised().contains(cpu) {
            materialise(cpu);
        }
        // SAFETY: it is for the instance of the process, all of whose steps are LOCKed.
        unsafe { LockedSeat::new(units, cpu) }
    })
}

/// Allocates where the instance is not ready.
#[cold]
#[inline(never)]
fn allocate_otherwise(request: &Request) -> Result<usize, AllocError> {
    if let Some(host) = module::host() {
        return host.allocate(request);
    }
    let process = process();
    match locked_seat(process) {
        Some(seat) => process.allocator.allocate_at(&seat, request),
        None => process.allocator.allocate(request),
    }
}

/// Frees where the instance is not ready.
///
/// # Safety
/// As [`Domain::free`].
#[cold]
#[inline(never)]
unsafe fn free_otherwise(address: usize, flags: FreeFlags) -> Result<(), FreeError> {
    // SAFETY: the promise of the caller.
    unsafe {
        if let Some(host) = module::host() {
            return host.free(address, flags);
        }
        let process = process();
        match locked_seat(process) {
            Some(seat) => process.allocator.free_at(&seat, address, flags),
            None => process.allocator.free_with(address, flags),
        }
    }
}

fn process() -> &'static Process {
    assert!(
        !module::is_module(),
        "the per-CPU allocator is the host's; a module reaches it by handles only (pcpu::module)"
    );
    match set_up() {
        Ok(process) => process,
        Err(error) => panic!("the per-CPU allocator of the process cannot be set up: {error}"),
    }
}

/// The instance, which is made by the first call.
fn set_up() -> &'static Result<Process, String> {
    static PROCESS: OnceLock<Result<Process, String>> = OnceLock::new();
    let process = PROCESS.get_or_init(|| {
        let process = Process::new().map_err(|error| error.to_string())?;
        static_var::Template::of_this_object().place_at(process.allocator.neutral_base());
        fork::register().map_err(|error| error.to_string())?;
        Ok(process)
    });
    if let Ok(process) = process
        && process.method == Method::RestartableSequences
    {
        READY.store(
            ptr::from_ref(&process.allocator).cast_mut(),
            Ordering::Release,
        );
    }
    process
}

/// Runs before `main`, so that the handles of static variables are known from then on.
extern "C" fn before_main() {
    if !module::is_module() {
        // What fails is told to whoever uses the instance.
        let _ = set_up();
    }
}

#[used]
#[unsafe(link_section = ".init_array.00101")]
static BEFORE_MAIN: extern "C" fn() = before_main;

#[cfg(test)]
mod tests {
    use super::*;

    /// A list of CPUs has units' CPUs only, and no list means all of them.
    #[test]
    fn lists_of_cpus_stay_among_the_possible() {
        let all: Vec<_> = (0..stray_unit().get()).map(CpuId::new).collect();
        let beyond = [0, stray_unit().get(), 8191].map(CpuId::new);
        assert_eq!(among_possible(Some(beyond.into())), [CpuId::new(0)]);
        assert_eq!(among_possible(None), all);
    }
}
