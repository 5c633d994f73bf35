//! Modules: loaded, their per-CPU variables used from module, kernel and other modules on every CPU, unloaded.

use core::sync::atomic::{AtomicU64, Ordering};

use pcpu::{AllocError, Domain, PerCpuPtr, per_cpu_ptr};

use super::{Test, Why, copy_of};
use crate::cpus::work::{on_all_cpus, online};
use crate::memory::frames;
use crate::modules::{LoadError, Module, PlaceError, Placement, SHARED_HITS};
use crate::percpu::Kernel;
use crate::{ensure, probe};

pub const TESTS: &[Test] = &[
    Test::new(
        "a CPU that comes after a module starts from the module's values",
        later_than_module,
    ),
    Test::new(
        "a module counts in its own variable and in the kernel's",
        module_counts,
    ),
    Test::new(
        "a module uses another module's variable",
        module_uses_module,
    ),
    Test::new("what is missing keeps a module out", missing_symbol),
    Test::new(
        "an exhausted reserve is an error, and dynamic room is not",
        reserve_exhausted,
    ),
    Test::new(
        "an unloaded module is out of every CPU's reach",
        code_is_gone,
    ),
    Test::new("modules come and go and leave nothing", nothing_left),
];

static COUNTER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/counter.o"));
static READER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/reader.o"));
static LARGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/large.o"));

/// The initial value of the variable of the module `counter`.
const INITIAL: u64 = 1000;

fn module_counts() -> Result<(), Why> {
    for placement in [Placement::Reserved, Placement::Dynamic] {
        let module = Module::load(COUNTER, placement, &[])?;
        let before = online().map(|cpu| copy_of(&SHARED_HITS, cpu)).sum::<u64>();
        let hit = function(&module, "counter_hit")?;
        on_all_cpus(&|cpu| {
            for _ in 0..=cpu.get() {
                hit();
            }
        });
        let hits = handle(&module)?;
        let mut total = 0;
        for cpu in online() {
            // SAFETY: a live copy; no CPU writes to it now.
            let found = unsafe { per_cpu_ptr(hits, cpu)?.read_volatile() };
            let calls = u64::from(cpu.get()) + 1;
            ensure!(found == INITIAL + calls, "CPU {cpu}: {found}");
            total += calls;
        }
        let shared = online().map(|cpu| copy_of(&SHARED_HITS, cpu)).sum::<u64>() - before;
        ensure!(
            shared == 2 * total,
            "{shared} in the kernel's, not twice {total}"
        );
    }
    Ok(())
}

/// The first of all, while there are CPUs that never came: dynamic room for a module's variables brings them up.
fn later_than_module() -> Result<(), Why> {
    let allocator = Kernel::allocator();
    let module = Module::load(COUNTER, Placement::Reserved, &[])?;
    let hits = handle(&module)?;
    // SAFETY: a live copy, or one that is read only; no CPU counts now.
    let value = |cpu| per_cpu_ptr(hits, cpu).map(|copy| unsafe { copy.read_volatile() });
    let absent = || {
        let possible = allocator.units().possible().iter();
        possible.filter(|&cpu| !allocator.units().materialised().contains(cpu))
    };
    if let Some(late) = absent().next() {
        let before = value(late)?;
        allocator.bring_up(late)?;
        let after = value(late)?;
        ensure!(
            before == INITIAL && after == INITIAL,
            "CPU {late}: {before}, then {after}"
        );
    }
    drop(module);
    for cpu in absent() {
        let left = value(cpu)?;
        ensure!(left == 0, "CPU {cpu}: {left} without the module");
    }
    Ok(())
}

fn module_uses_module() -> Result<(), Why> {
    let counter = Module::load(COUNTER, Placement::Reserved, &[])?;
    let reader = Module::load(READER, Placement::Reserved, &[&counter])?;
    let (hit, read) = (
        function(&counter, "counter_hit")?,
        function(&reader, "reader_read")?,
    );
    let wrong = AtomicU64::new(0);
    on_all_cpus(&|cpu| {
        for _ in 0..=cpu.get() {
            hit();
        }
        let is_right = read() == INITIAL + u64::from(cpu.get()) + 1;
        wrong.fetch_add(u64::from(!is_right), Ordering::Relaxed);
    });
    let wrong = wrong.into_inner();
    ensure!(wrong == 0, "wrong on {wrong} CPUs");
    let constant = reader.symbol("READER_HANDLE").ok_or(missing())?;
    // SAFETY: a word in the module's constants.
    let constant = unsafe { core::ptr::with_exposed_provenance::<usize>(constant).read_volatile() };
    let hits = handle(&counter)?.neutral();
    ensure!(constant == hits, "a handle {constant:#x}, not {hits:#x}");
    Ok(())
}

fn missing_symbol() -> Result<(), Why> {
    let frames = frames::free_count();
    let error = Module::load(READER, Placement::Reserved, &[]).err();
    ensure!(
        matches!(
            error,
            Some(LoadError::UnknownSymbol {
                name: "MODULE_HITS",
                ..
            })
        ),
        "{error:?}"
    );
    let left = frames::free_count();
    ensure!(left == frames, "{frames} frames before, {left} after");
    Ok(())
}

fn reserve_exhausted() -> Result<(), Why> {
    let first = Module::load(LARGE, Placement::Reserved, &[])?;
    let error = Module::load(LARGE, Placement::Reserved, &[]).err();
    ensure!(
        matches!(
            error,
            Some(LoadError::Section {
                error: PlaceError::PerCpu(AllocError::ReservedExhausted { bytes: 5120, .. }),
                ..
            })
        ),
        "{error:?}"
    );
    let second = Module::load(LARGE, Placement::Dynamic, &[])?;
    for module in [&first, &second] {
        let read = function(module, "large_read")?;
        let wrong = AtomicU64::new(0);
        on_all_cpus(&|_| {
            wrong.fetch_add(u64::from(read() != 7), Ordering::Relaxed);
        });
        ensure!(wrong.into_inner() == 0, "not what the module brings");
    }
    drop(first);
    Module::load(LARGE, Placement::Reserved, &[])?;
    Ok(())
}

fn code_is_gone() -> Result<(), Why> {
    let module = Module::load(COUNTER, Placement::Reserved, &[])?;
    let hit = function(&module, "counter_hit")?;
    // Every CPU has seen the page.
    on_all_cpus(&|_| {
        hit();
    });
    drop(module);
    let still = AtomicU64::new(0);
    on_all_cpus(&|_| {
        let is_there = probe::read(hit as *const () as usize).is_ok();
        still.fetch_add(u64::from(is_there), Ordering::Relaxed);
    });
    let still = still.into_inner();
    ensure!(still == 0, "{still} CPUs still reach it");
    Ok(())
}

fn nothing_left() -> Result<(), Why> {
    let (live, frames) = (Kernel::allocator().stats().live, frames::free_count());
    for _ in 0..5 {
        module_counts()?;
        module_uses_module()?;
    }
    let (live_now, frames_now) = (Kernel::allocator().stats().live, frames::free_count());
    ensure!(live_now == live, "{live} areas before, {live_now} after");
    // Page tables stay.
    ensure!(
        frames - frames_now <= 1,
        "{frames} frames before, {frames_now} after"
    );
    Ok(())
}

/// The handle of the variable of the module `counter`.
fn handle(module: &Module) -> Result<PerCpuPtr<u64, Kernel>, Why> {
    let address = module.symbol("MODULE_HITS").ok_or(missing())?;
    PerCpuPtr::from_neutral(address).ok_or(missing())
}

/// A function of a module: all of them have no argument and return a number.
fn function(module: &Module, name: &str) -> Result<extern "C" fn() -> u64, Why> {
    let address = module.symbol(name).ok_or(missing())?;
    let pointer = core::ptr::with_exposed_provenance::<()>(address);
    // SAFETY: a function of that kind by its name; the caller keeps the module while it calls it.
    Ok(unsafe { core::mem::transmute::<*const (), extern "C" fn() -> u64>(pointer) })
}

fn missing() -> Why {
    Why::new(format_args!("a symbol is missing"))
}
