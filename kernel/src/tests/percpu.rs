//! The per-CPU variables of this kernel: static and dynamic, on all CPUs.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pcpu::unit::CpuId;
use pcpu::{
    AllocFlags, BatchCounter, Counter, CpuCell, Domain, Handle, LocalCell, PerCpu, PerCpuPtr,
    RefCount, RemoteCell, Request, define_per_cpu_in, free_percpu, per_cpu_ptr,
};

use super::{Test, Why, all_right, by_turns, copy_of};
use crate::cpus::bring_up;
use crate::cpus::local_apic::{self, TimerKind};
use crate::cpus::work::{nr_online, on_all_cpus, online};
use crate::machine::machine;
use crate::memory::{PAGE_BYTES, image};
use crate::percpu::{self, Kernel};
use crate::{ensure, interrupts, probe};

pub const TESTS: &[Test] = &[
    Test::new("all CPUs that are there came", all_came),
    Test::new("a CPU's offset leads up, more than 4 GiB", offsets_lead_up),
    Test::new("static variables start with their value", initial_values),
    Test::new("static variables count on every CPU", statics_count),
    Test::new("dynamic variables count on every CPU", dynamics_count),
    Test::new("all CPUs allocate and free at once", allocate_at_once),
    Test::new("counters add up", counters_add_up),
    Test::new(
        "references are counted on every CPU, and the last one out ends it",
        references,
    ),
    Test::new(
        "the template is gone and nobody misses it",
        template_is_gone,
    ),
    Test::new("the timer counts on every CPU", timer_counts),
    Test::new(
        "interrupts allocate in the middle of allocations on every CPU",
        interrupts_allocate,
    ),
];

const ROUNDS: u64 = 1000;

/// Rounds of all CPUs together, where each round concerns all CPUs.
const TOTAL_ROUNDS: u64 = 4096;

define_per_cpu_in! {
    in Kernel;

    static HITS: CpuCell<u64> = CpuCell::new(0);

    #[percpu(cache_aligned)]
    static SEED: CpuCell<u64> = CpuCell::new(SEED_VALUE);

    static TICKS: CpuCell<u64> = CpuCell::new(0);
}

const SEED_VALUE: u64 = 0x0123_4567_89ab_cdef;

fn all_came() -> Result<(), Why> {
    let came = AtomicUsize::new(0);
    on_all_cpus(&|_| {
        came.fetch_add(1, Ordering::Relaxed);
    });
    let late = usize::from(bring_up::latecomer(machine()).is_some());
    let there = machine().cpus().iter().filter(|cpu| cpu.enabled).count();
    let (came, expected) = (came.into_inner(), there - late);
    ensure!(came == expected, "{came} of {expected} CPUs");
    ensure!(online().count() == expected, "{} online", online().count());
    Ok(())
}

fn offsets_lead_up() -> Result<(), Why> {
    let units = Kernel::allocator().units();
    for cpu in units.possible().iter() {
        let offset = units.offset(cpu).unwrap_or(0);
        let unit = HITS.handle().neutral().checked_add(offset);
        ensure!(
            offset > 4 << 30 && unit.is_some(),
            "CPU {cpu}: offset {offset:#x}"
        );
    }
    Ok(())
}

fn initial_values() -> Result<(), Why> {
    all_right(|_| SEED.read() == SEED_VALUE)
}

fn statics_count() -> Result<(), Why> {
    on_all_cpus(&|cpu| {
        for _ in 0..ROUNDS {
            HITS.inc();
            HITS.add(u64::from(cpu.get()));
        }
    });
    for cpu in online() {
        let (hits, expected) = (copy_of(&HITS, cpu), ROUNDS * (u64::from(cpu.get()) + 1));
        ensure!(hits == expected, "CPU {cpu}: {hits}, not {expected}");
    }
    Ok(())
}

fn dynamics_count() -> Result<(), Why> {
    let cell = PerCpu::<CpuCell<u64>, Kernel>::new()?;
    on_all_cpus(&|cpu| {
        for _ in 0..ROUNDS {
            cell.add(u64::from(cpu.get()));
            cell.inc();
        }
    });
    for (cpu, cell) in cell.iter() {
        let (hits, expected) = (cell.read_remote(), ROUNDS * (u64::from(cpu.get()) + 1));
        ensure!(hits == expected, "CPU {cpu}: {hits}, not {expected}");
    }
    let expected: u64 = online()
        .map(|cpu| ROUNDS * (u64::from(cpu.get()) + 1))
        .sum();
    ensure!(cell.sum() == expected, "sum {}, not {expected}", cell.sum());
    Ok(())
}

/// Every CPU keeps a few areas of changing sizes, and finds in its own copy what it wrote.
fn allocate_at_once() -> Result<(), Why> {
    const KEPT: usize = 4;
    let before = Kernel::allocator().stats().live_bytes;
    let rounds = (TOTAL_ROUNDS / u64::from(nr_online())).min(ROUNDS);
    let (served, wrong) = (AtomicU64::new(0), AtomicU64::new(0));
    on_all_cpus(&|cpu| {
        let mut kept: [Option<(PerCpuPtr<u64, Kernel>, usize)>; KEPT] = [None; KEPT];
        for round in 0..rounds as usize {
            let words = 1 + (round * 7 + cpu.index() * 3) % 20;
            let request = Request::new(words * 8, 8);
            if let Some((area, words)) = kept[round % KEPT].take() {
                wrong.fetch_add(check_and_free(area, words, cpu), Ordering::Relaxed);
            }
            let Ok(area) = pcpu::alloc_percpu_bytes::<Kernel>(&request) else {
                continue;
            };
            served.fetch_add(1, Ordering::Relaxed);
            wrong.fetch_add(mark(area.cast(), words, cpu), Ordering::Relaxed);
            kept[round % KEPT] = Some((area.cast(), words));
        }
        for (area, words) in kept.into_iter().flatten() {
            wrong.fetch_add(check_and_free(area, words, cpu), Ordering::Relaxed);
        }
    });
    let (served, wrong) = (served.into_inner(), wrong.into_inner());
    let expected = rounds * u64::from(nr_online());
    ensure!(served == expected, "{served} of {expected} were served");
    ensure!(wrong == 0, "{wrong} areas were wrong");
    let after = Kernel::allocator().stats().live_bytes;
    ensure!(before == after, "{before} bytes before, {after} after");
    Ok(())
}

/// A CPU and its interrupts take areas of the same sizes, and check what they got. Exact places: `cache_sweeps.rs`.
fn interrupts_allocate() -> Result<(), Why> {
    const WORDS: [usize; 3] = [1, 2, 3];
    static WRONG: AtomicU64 = AtomicU64::new(0);
    WRONG.store(0, Ordering::Relaxed);
    /// Takes areas of all sizes at once, and gives them back.
    fn exchange(flags: AllocFlags) {
        let cpu = Kernel::current_cpu();
        let areas = WORDS.map(|words| {
            let request = Request::new(words * 8, 8).with_flags(flags);
            let area = pcpu::alloc_percpu_bytes::<Kernel>(&request).ok()?.cast();
            WRONG.fetch_add(mark(area, words, cpu), Ordering::Relaxed);
            Some(area)
        });
        for (area, words) in areas.into_iter().zip(WORDS) {
            let wrong = area.map_or(1, |area| check_and_free(area, words, cpu));
            WRONG.fetch_add(wrong, Ordering::Relaxed);
        }
    }
    let live = Kernel::allocator().stats().live;
    interrupts::on_timer(Some(|_| {
        TICKS.inc();
        exchange(AllocFlags::ATOMIC);
    }));
    by_turns(|_| {
        let before = TICKS.read();
        local_apic::start_timer(TimerKind::Periodic, 100_000);
        while TICKS.read() < before + 50 {
            exchange(AllocFlags::empty());
        }
        local_apic::stop_timer();
    });
    interrupts::on_timer(None);
    let (wrong, left) = (
        WRONG.load(Ordering::Relaxed),
        Kernel::allocator().stats().live,
    );
    ensure!(wrong == 0, "{wrong} areas were wrong");
    ensure!(left == live, "{live} areas before, {left} after");
    Ok(())
}

/// Writes to all words of the CPU's copy; 1 if one of them was not zero.
fn mark(area: PerCpuPtr<u64, Kernel>, words: usize, cpu: CpuId) -> u64 {
    let Ok(copy) = per_cpu_ptr(area, cpu) else {
        return 1;
    };
    // SAFETY: the caller has just allocated the area, of so many words.
    let words = unsafe { core::slice::from_raw_parts_mut(copy.as_ptr(), words) };
    let was_zero = words.iter().all(|&word| word == 0);
    words.fill(value_of(area, cpu));
    u64::from(!was_zero)
}

/// 1 if the words are not what [`mark`] wrote.
fn check_and_free(area: PerCpuPtr<u64, Kernel>, words: usize, cpu: CpuId) -> u64 {
    let Ok(copy) = per_cpu_ptr(area, cpu) else {
        return 1;
    };
    // SAFETY: the area is the caller's, of so many words.
    let words = unsafe { core::slice::from_raw_parts(copy.as_ptr(), words) };
    let is_right = words.iter().all(|&word| word == value_of(area, cpu));
    // SAFETY: the caller does not use it any more.
    let freed = unsafe { free_percpu(area) };
    u64::from(!is_right || freed.is_err())
}

fn value_of(area: PerCpuPtr<u64, Kernel>, cpu: CpuId) -> u64 {
    (area.neutral() as u64) << 8 | u64::from(cpu.get())
}

fn references() -> Result<(), Why> {
    static ENDED: AtomicU64 = AtomicU64::new(0);
    let count = RefCount::<_, Kernel>::new_in(|| {
        ENDED.fetch_add(1, Ordering::Relaxed);
    })?;
    on_all_cpus(&|_| {
        for _ in 0..ROUNDS {
            drop(count.try_get());
        }
    });
    let last = count.try_get();
    ensure!(last.is_some(), "no reference to a live one");
    count.kill()?;
    ensure!(count.try_get().is_none(), "a reference to a killed one");
    ensure!(ENDED.load(Ordering::Relaxed) == 0, "it ended too early");
    drop(last);
    let ended = ENDED.load(Ordering::Relaxed);
    ensure!(ended == 1, "it ended {ended} times");
    Ok(())
}

fn counters_add_up() -> Result<(), Why> {
    let counter = Counter::<Kernel>::new_in(5)?;
    let batch = core::num::NonZeroU32::new(32).ok_or(Why::new(format_args!("0")))?;
    let batched = BatchCounter::<Kernel>::new_in(5, batch)?;
    on_all_cpus(&|_| {
        for _ in 0..ROUNDS {
            counter.inc();
            batched.add(3);
        }
    });
    let rounds = ROUNDS as i64 * i64::from(nr_online());
    ensure!(counter.sum() == 5 + rounds, "sum {}", counter.sum());
    ensure!(batched.sum() == 5 + 3 * rounds, "sum {}", batched.sum());
    let off = batched.read().abs_diff(5 + 3 * rounds);
    ensure!(off <= batched.error_bound(), "off by {off}");
    Ok(())
}

fn template_is_gone() -> Result<(), Why> {
    let template = image::template();
    let pages = (template.end - template.start) as usize / PAGE_BYTES;
    ensure!(
        percpu::template_frames() == pages && pages > 0,
        "{} of {pages} frames given back",
        percpu::template_frames()
    );
    for address in template.addresses(PAGE_BYTES as u64) {
        ensure!(
            probe::read(address as usize).is_err(),
            "{address:#x} is mapped"
        );
    }
    // The handle of a variable is an address in there, and works.
    let handle = SEED.handle().neutral();
    ensure!(template.contains(handle as u64), "handle {handle:#x}");
    ensure!(SEED.read() != 0, "no value");
    Ok(())
}

fn timer_counts() -> Result<(), Why> {
    interrupts::on_timer(Some(|_| TICKS.inc()));
    by_turns(|_| {
        let before = TICKS.read();
        local_apic::start_timer(TimerKind::Periodic, 1_000_000);
        while TICKS.read() < before + 3 {
            core::hint::spin_loop();
        }
        local_apic::stop_timer();
    });
    interrupts::on_timer(None);
    for cpu in online() {
        let ticks = copy_of(&TICKS, cpu);
        ensure!(ticks >= 3, "CPU {cpu}: {ticks} ticks");
    }
    Ok(())
}
