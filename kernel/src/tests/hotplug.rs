//! CPUs that come late, go, and come again: what they find in their copies, and what the others see of them meanwhile.

use core::sync::atomic::{AtomicU64, Ordering};

use pcpu::unit::CpuId;
use pcpu::{
    CpuCell, Domain, Handle, LocalCell, PerCpu, PerCpuPtr, RemoteCell, alloc_percpu_in,
    define_per_cpu_in, free_percpu,
};

use super::modules::{COUNTER, INITIAL, function};
use super::paging::{Areas, area_of};
use super::{Test, Why, copy_of, drain_all, idle_areas};
use crate::cpus::bring_up;
use crate::cpus::work::{nr_online, on_all_cpus, online};
use crate::machine::machine;
use crate::modules::{Module, Placement};
use crate::percpu::{Kernel, current_cpu, frames_held};
use crate::{ensure, probe};

pub const TESTS: &[Test] = &[
    Test::new("a CPU comes late and finds its copies", late_cpu),
    Test::new("a CPU goes, loses nothing, and comes again", gone_and_back),
    Test::new(
        "a CPU that goes leaves nothing in its cache",
        cache_is_left_empty,
    ),
];

define_per_cpu_in! {
    in Kernel;

    static SEED: CpuCell<u64> = CpuCell::new(SEED_VALUE);
    static COUNT: CpuCell<u64> = CpuCell::new(0);
}

const SEED_VALUE: u64 = 0x0bad_cafe_dead_beef;

/// Runs `work` on one CPU that is online; what it returns there.
fn on_cpu(wanted: CpuId, work: impl Fn() -> u64 + Sync) -> Result<u64, Why> {
    let (calls, result) = (AtomicU64::new(0), AtomicU64::new(0));
    on_all_cpus(&|cpu| {
        if cpu == wanted {
            result.store(work(), Ordering::Relaxed);
            calls.fetch_add(1, Ordering::Relaxed);
        }
    });
    let calls = calls.into_inner();
    ensure!(calls == 1, "CPU {wanted} worked {calls} times");
    Ok(result.into_inner())
}

/// Whether a CPU's copies of all areas are zero.
fn are_zero(areas: &Areas, cpu: CpuId) -> bool {
    areas.iter().all(|area| {
        // SAFETY: a live copy, which nobody writes to now.
        let words = unsafe { &*area_of(area, cpu) };
        words.iter().all(|&word| word == 0)
    })
}

/// The last CPU starts long after the others: the template has been given back, and chunks and modules have come meanwhile.
/// From then on it counts with the others.
fn late_cpu() -> Result<(), Why> {
    let Some(late) = bring_up::latecomer(machine()) else {
        return Ok(());
    };
    let is_materialised = || Kernel::allocator().units().materialised().contains(late);
    ensure!(!is_materialised(), "CPU {late} came before its time");
    ensure!(
        probe::read(SEED.handle().neutral()).is_err(),
        "the template is still there"
    );
    let reserved = Module::load(COUNTER, Placement::Reserved, &[])?;
    let dynamic = Module::load(COUNTER, Placement::Dynamic, &[])?;
    let mut areas = Areas::NONE;
    areas.fill_chunks(2)?;
    let cell = PerCpu::<CpuCell<u64>, Kernel>::new()?;
    on_all_cpus(&|_| cell.inc());
    let before = cell.sum();
    ensure!(before == u64::from(nr_online()), "{before} before");
    ensure!(!is_materialised(), "a module brought CPU {late} up");

    bring_up::start(machine(), core::iter::once(late));
    ensure!(is_materialised(), "CPU {late} has no memory");
    ensure!(cell.sum() == before, "its copy is not zero");
    ensure!(copy_of(&SEED, late) == SEED_VALUE, "no initial value");
    ensure!(are_zero(&areas, late), "areas are not zero");
    // The same, as it sees it.
    let number = on_cpu(late, || u64::from(current_cpu().get()))?;
    ensure!(
        number == u64::from(late.get()),
        "it takes itself for {number}"
    );
    let seed = on_cpu(late, || SEED.read())?;
    ensure!(seed == SEED_VALUE, "it sees {seed:#x}");
    for (what, module) in [("reserved", &reserved), ("dynamic", &dynamic)] {
        let hit = function(module, "counter_hit")?;
        let hits = on_cpu(late, || hit())?;
        ensure!(hits == INITIAL + 1, "{what}: {hits} hits");
    }
    on_all_cpus(&|_| cell.inc());
    let after = cell.sum();
    ensure!(after == 2 * before + 1, "{after} after {before}");
    Ok(())
}

fn gone_and_back() -> Result<(), Why> {
    const ROUNDS: u64 = 3;
    let Some(cpu) = online().last().filter(|cpu| cpu.get() > 0) else {
        return Ok(());
    };
    let allocator = Kernel::allocator();
    let (cell, nr_before) = (PerCpu::<CpuCell<u64>, Kernel>::new()?, nr_online());
    let module = Module::load(COUNTER, Placement::Dynamic, &[])?;
    let hit = function(&module, "counter_hit")?;
    let mut areas = Areas::NONE;
    areas.fill_chunks(1)?;
    for round in 1..=ROUNDS {
        let hits = on_cpu(cpu, || hit())?;
        ensure!(
            hits == INITIAL + round,
            "module: {hits} hits, round {round}"
        );
        on_all_cpus(&|_| {
            cell.inc();
            COUNT.write(round);
        });
        let (sum, frames) = (cell.sum(), frames_held());
        bring_up::stop(cpu);
        ensure!(
            nr_online() == nr_before - 1 && online().all(|it| it != cpu),
            "{} online",
            nr_online()
        );
        // Its unit and what is in it stay.
        ensure!(
            allocator.units().materialised().contains(cpu),
            "no memory any more"
        );
        let frames_now = frames_held();
        ensure!(frames_now == frames, "{frames} frames, then {frames_now}");
        ensure!(cell.sum() == sum, "{} of {sum}", cell.sum());
        let filled = areas.iter().all(|area| {
            // SAFETY: a live copy, which nobody writes to now.
            unsafe { (*area_of(area, cpu))[1] == u64::MAX }
        });
        ensure!(filled, "areas have changed");
        // The others go on; chunks come, which it has to have part in, and go, which it need not be asked about.
        on_all_cpus(&|_| cell.inc());
        let flushes = allocator.backing().stats().flushes;
        let mut passing = Areas::NONE;
        passing.fill_chunks(1)?;
        drop(passing);
        let flushes = allocator.backing().stats().flushes - flushes;
        ensure!(flushes > 0, "no chunk went");
        let mut meanwhile = Areas::NONE;
        meanwhile.fill_chunks(1)?;

        bring_up::start(machine(), core::iter::once(cpu));
        ensure!(nr_online() == nr_before, "{} online", nr_online());
        let number = on_cpu(cpu, || u64::from(current_cpu().get()))?;
        ensure!(
            number == u64::from(cpu.get()),
            "it takes itself for {number}"
        );
        let count = on_cpu(cpu, || COUNT.read())?;
        ensure!(count == round, "static: {count}, not {round}");
        let seen = on_cpu(cpu, || cell.read())?;
        ensure!(seen == round, "dynamic: {seen}, not {round}");
        ensure!(are_zero(&meanwhile, cpu), "what came meanwhile is not zero");
        let expected = sum + u64::from(nr_before) - 1;
        ensure!(cell.sum() == expected, "{}, not {expected}", cell.sum());
        // It answers again: what goes is gone from its sight, too.
        let last = meanwhile
            .iter()
            .next()
            .ok_or(Why::new(format_args!("no area")))?;
        let copy = area_of(last, cpu).addr();
        let is_there = on_cpu(cpu, || u64::from(probe::read(copy).is_ok()))?;
        drop(meanwhile);
        let is_still = on_cpu(cpu, || u64::from(probe::read(copy).is_ok()))?;
        ensure!(
            (is_there, is_still) == (1, 0),
            "seen: {is_there}, then {is_still}"
        );
    }
    Ok(())
}

/// What its cache holds is nobody else's to take; what it has allocated others free while it is away.
fn cache_is_left_empty() -> Result<(), Why> {
    type Area = PerCpuPtr<[u64; 2], Kernel>;
    let Some(cpu) = online().last().filter(|cpu| cpu.get() > 0) else {
        return Ok(());
    };
    let allocate = || {
        let area: Result<Area, _> = alloc_percpu_in();
        area.map_or(0, |area| area.neutral() as u64)
    };
    let free = |area: u64| {
        let area = Area::from_neutral(area as usize);
        // SAFETY: nobody else knows of it.
        let freed = area.map(|area| unsafe { free_percpu(area) });
        u64::from(freed == Some(Ok(())))
    };
    drain_all();
    let before = idle_areas();
    let kept = on_cpu(cpu, allocate)?;
    let came_back = on_cpu(cpu, || free(allocate()))?;
    ensure!(kept != 0 && came_back == 1, "no areas on CPU {cpu}");
    let idle = idle_areas();
    if Kernel::allocator().has_caches() {
        ensure!(idle > before, "{idle} areas are idle, {before} were before");
    }
    bring_up::stop(cpu);
    let idle = idle_areas();
    let freed = free(kept);
    bring_up::start(machine(), core::iter::once(cpu));
    ensure!(
        idle == before,
        "{idle} areas are idle, {before} were before"
    );
    ensure!(freed == 1, "another CPU cannot free its area");
    let came_back = on_cpu(cpu, || free(allocate()))?;
    ensure!(came_back == 1, "no area after CPU {cpu} came again");
    Ok(())
}
