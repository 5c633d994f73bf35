//! Modules: loaded, their per-CPU variables used from module, kernel and other modules on every CPU, unloaded.

use core::fmt;

use pcpu::{AllocError, Domain, PerCpuPtr, per_cpu_ptr};

use super::{Test, Why, all_right, copy_of};
use crate::cpus::work::{on_all_cpus, online};
use crate::memory::{FAR_MODULES, PAGE_BYTES, frames, image};
use crate::modules::{Code, LoadError, Module, PlaceError, Placement, SHARED_HITS};
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
    Test::new(
        "a module out of the reach of 32 bits counts like others",
        far_module,
    ),
    Test::new(
        "a module that would need 64 bits there is refused",
        out_of_reach,
    ),
    Test::new(
        "a module in assembly counts like others",
        module_in_assembly,
    ),
    Test::new("what is missing keeps a module out", missing_symbol),
    Test::new(
        "a module that is too long is refused with the limit",
        too_long,
    ),
    Test::new(
        "areas outside of the reserved region are limited",
        areas_are_limited,
    ),
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

/// The module `counter`.
pub static COUNTER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/counter.o"));
static READER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/reader.o"));
static FAR: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/far.o"));
static LARGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/large.o"));

static BY_HAND: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/by_hand.o"));
static LONG_DATA: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/long_data.o"));
static LONG_VARIABLES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/long_variables.o"));

/// The initial value of the variable of the module `counter`.
pub const INITIAL: u64 = 1000;

fn module_counts() -> Result<(), Why> {
    for placement in [Placement::Reserved, Placement::Dynamic] {
        let module = Module::load(COUNTER, placement, &[])?;
        let shared = SharedHits::now();
        let hit = function(&module, "counter_hit")?;
        on_all_cpus(&|cpu| {
            for _ in 0..=cpu.get() {
                hit();
            }
        });
        let hits = handle(&module)?;
        for cpu in online() {
            // SAFETY: a live copy; no CPU writes to it now.
            let found = unsafe { per_cpu_ptr(hits, cpu)?.read_volatile() };
            let calls = u64::from(cpu.get()) + 1;
            ensure!(found == INITIAL + calls, "CPU {cpu}: {found}");
        }
        shared.ensure_counted()?;
    }
    Ok(())
}

/// CPUs that are only possible; those that come for real: `hotplug.rs`.
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
    all_right(|cpu| {
        for _ in 0..=cpu.get() {
            hit();
        }
        read() == INITIAL + u64::from(cpu.get()) + 1
    })?;
    let constant = reader.symbol("READER_HANDLE").ok_or(missing())?;
    // SAFETY: a word in the module's constants.
    let constant = unsafe { core::ptr::with_exposed_provenance::<usize>(constant).read_volatile() };
    let hits = handle(&counter)?.neutral();
    ensure!(constant == hits, "a handle {constant:#x}, not {hits:#x}");
    Ok(())
}

fn far_module() -> Result<(), Why> {
    for placement in [Placement::Reserved, Placement::Dynamic] {
        let module = Module::load_to(Code::Far, FAR, placement, &[])?;
        let hit = function(&module, "far_hit")?;
        let far = (hit as *const () as usize).abs_diff(image::text().start as usize);
        ensure!(far > 1 << 32, "the code is only {far:#x} away");
        ensure_counts(hit, 2000)?;
    }
    Ok(())
}

fn module_in_assembly() -> Result<(), Why> {
    for placement in [Placement::Reserved, Placement::Dynamic] {
        let module = Module::load(BY_HAND, placement, &[])?;
        ensure_counts(function(&module, "by_hand_hit")?, 3000)?;
    }
    Ok(())
}

/// Calls a function that counts from `first` on, once more on each CPU than on the one before.
fn ensure_counts(hit: Function, first: u64) -> Result<(), Why> {
    let shared = SharedHits::now();
    all_right(|cpu| (0..=u64::from(cpu.get())).all(|call| hit() == first + call + 1))?;
    shared.ensure_counted()
}

/// Modules of 72 KiB, in one section each: of data, and of per-CPU variables.
fn too_long() -> Result<(), Why> {
    const BYTES: usize = 72 << 10;
    let before = Held::now();
    let refused = |object, placement| match Module::load(object, placement, &[]).err() {
        Some(LoadError::Section { error, .. }) => Ok(error),
        other => Err(Why::new(format_args!("{other:?}"))),
    };
    let error = refused(LONG_DATA, Placement::Reserved)?;
    ensure!(
        matches!(
            error,
            PlaceError::TooLong {
                bytes: BYTES,
                limit_bytes: 0x1_0000
            }
        ),
        "{error:?}"
    );
    // The allocator's limit is lower than that for the initial values.
    let error = refused(LONG_VARIABLES, Placement::Dynamic)?;
    ensure!(
        matches!(
            error,
            PlaceError::PerCpu(AllocError::TooLarge {
                bytes: BYTES,
                limit_bytes: 0x8000
            })
        ),
        "{error:?}"
    );
    before.ensure_same()
}

/// A module that is made for 32 bits, loaded far away.
fn out_of_reach() -> Result<(), Why> {
    let load = |placement| Module::load_to(Code::Far, COUNTER, placement, &[]).err();
    // The tables for the addresses are there from the first time on.
    load(Placement::Reserved);
    load(Placement::Dynamic);
    let before = Held::now();
    for placement in [Placement::Reserved, Placement::Dynamic] {
        let error = load(placement);
        let Some(LoadError::OutOfReach {
            symbol,
            at,
            place,
            value,
            limit,
        }) = error
        else {
            return Err(Why::new(format_args!("{error:?}")));
        };
        ensure!(
            ["MODULE_HITS", "SHARED_HITS"].contains(&symbol),
            "symbol {symbol}"
        );
        ensure!(
            place >= FAR_MODULES
                && place as u64 % PAGE_BYTES as u64 == at.offset % PAGE_BYTES as u64,
            "place {place:#x}, {at}"
        );
        ensure!(
            limit == 0x7fff_ffff && value.unsigned_abs() > 1 << 32,
            "value {value:#x}, limit {limit:#x}"
        );
    }
    before.ensure_same()
}

fn missing_symbol() -> Result<(), Why> {
    let before = Held::now();
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
    before.ensure_same()
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
        all_right(|_| read() == 7)?;
    }
    drop(first);
    Module::load(LARGE, Placement::Reserved, &[])?;
    Ok(())
}

/// Each area's initial values are kept, for CPUs that come later.
fn areas_are_limited() -> Result<(), Why> {
    const LIMIT: usize = 8;
    let mut modules = [const { None }; LIMIT];
    for module in &mut modules {
        *module = Some(Module::load(COUNTER, Placement::Dynamic, &[])?);
    }
    let live = Kernel::allocator().stats().live;
    let error = Module::load(COUNTER, Placement::Dynamic, &[]).err();
    ensure!(
        matches!(
            error,
            Some(LoadError::Section {
                error: PlaceError::Areas { limit: LIMIT },
                ..
            })
        ),
        "{error:?}"
    );
    let live_now = Kernel::allocator().stats().live;
    ensure!(live_now == live, "{live} areas before, {live_now} after");
    modules[0] = None;
    Module::load(COUNTER, Placement::Dynamic, &[])?;
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
    all_right(|_| probe::read(hit as *const () as usize).is_err())
}

fn nothing_left() -> Result<(), Why> {
    let before = Held::now();
    for _ in 0..5 {
        module_counts()?;
        module_uses_module()?;
    }
    let after = Held::now();
    // Page tables stay.
    ensure!(
        after.areas == before.areas && before.free_frames - after.free_frames <= 1,
        "{before}, then {after}"
    );
    Ok(())
}

/// What the kernel's own variable holds on all CPUs together, before a module's function is called.
struct SharedHits(u64);

impl SharedHits {
    fn now() -> Self {
        Self(online().map(|cpu| copy_of(&SHARED_HITS, cpu)).sum())
    }

    /// The function adds 2, and each CPU has called it once more than the one before.
    fn ensure_counted(self) -> Result<(), Why> {
        let calls: u64 = online().map(|cpu| u64::from(cpu.get()) + 1).sum();
        let hits = Self::now().0 - self.0;
        ensure!(
            hits == 2 * calls,
            "{hits} in the kernel's, not twice {calls}"
        );
        Ok(())
    }
}

/// What modules may keep: areas, and frames that are free no more.
#[derive(PartialEq)]
struct Held {
    areas: u64,
    free_frames: usize,
}

impl Held {
    fn now() -> Self {
        Self {
            areas: Kernel::allocator().stats().live,
            free_frames: frames::free_count(),
        }
    }

    fn ensure_same(self) -> Result<(), Why> {
        let now = Self::now();
        ensure!(now == self, "{self}, then {now}");
        Ok(())
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} areas and {} free frames",
            self.areas, self.free_frames
        )
    }
}

/// The handle of the variable of the module `counter`.
pub fn handle(module: &Module) -> Result<PerCpuPtr<u64, Kernel>, Why> {
    let address = module.symbol("MODULE_HITS").ok_or(missing())?;
    PerCpuPtr::from_neutral(address).ok_or(missing())
}

/// A function of a module: all of them have no argument and return a number.
type Function = extern "C" fn() -> u64;

/// The function of this name.
pub fn function(module: &Module, name: &str) -> Result<Function, Why> {
    let address = module.symbol(name).ok_or(missing())?;
    let pointer = core::ptr::with_exposed_provenance::<()>(address);
    // SAFETY: a function of that kind by its name; the caller keeps the module while it calls it.
    Ok(unsafe { core::mem::transmute::<*const (), Function>(pointer) })
}

fn missing() -> Why {
    Why::new(format_args!("a symbol is missing"))
}
