//! What goes on beside the workers: memory goes back, caches are emptied, signals are sent, children are forked, and the
//! bounds are watched.

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use pcpu::global::allowed_cpus;
use pcpu::{Global, drain_caches, global};

use crate::bounds::{Bounds, peak_kib};
use crate::crew::{Parcel, allocate, free};
use crate::forked::in_forked_child;
use crate::signals;
use crate::workers::Crew;

/// Children of a run.
const CHILDREN: u64 = 50;

/// Operations of a child.
const CHILD_OPERATIONS: usize = 20_000;

/// Areas that are there throughout, in children as well.
const KEPT: usize = 200;

/// What a run has come to.
#[derive(Debug)]
pub struct Report {
    operations: u64,
    took: Duration,
    allocs: u64,
    served_in_handlers: u64,
    children: u64,
    peak_kib: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} operations in {:.1?}, {} areas, {} of them in signal handlers, {} children, {} MiB of memory at most",
            HumanCount(self.operations),
            self.took,
            HumanCount(self.allocs),
            HumanCount(self.served_in_handlers),
            self.children,
            self.peak_kib.div_ceil(1024),
        )
    }
}

/// Runs so many operations; a failure is one line.
pub fn run(operations: u64, bounds: &Bounds) -> Result<Report, String> {
    let cpus = allowed_cpus();
    for cpu in global().units().possible().iter() {
        global().bring_up(cpu).map_err(|error| error.to_string())?;
    }
    signals::install()?;
    let before = global().stats();
    let crew = &Crew::new(cpus, operations);
    let start = Instant::now();
    let bar = progress_bar(operations);
    let (children, kept) = thread::scope(|scope| {
        let workers: Vec<_> = (0..crew.workers())
            .map(|worker| scope.spawn(move || crew.work(worker)))
            .collect();
        scope.spawn(|| interrupt(crew));
        let kept = keep_house(crew, operations, bounds, start, &bar);
        crew.stop();
        let has_panicked = workers
            .into_iter()
            .filter_map(|worker| worker.join().err())
            .count();
        match has_panicked {
            0 => kept,
            panicked => Err(format!("{panicked} workers have panicked")),
        }
    })?;
    bar.finish_and_clear();
    kept.into_iter().for_each(free);
    crew.free_rest();
    signals::free_left();
    if !signals::is_none_left() {
        return Err("the lock is taken, and there is nobody to hold it".to_owned());
    }
    bounds.check(start)?;
    drain_caches::<Global>();
    global().trim(0);
    let after = global().stats();
    let (allocs, frees) = (after.allocs - before.allocs, after.frees - before.frees);
    if (after.live, frees, after.late_errors) != (before.live, allocs, 0) {
        return Err(format!(
            "{allocs} areas allocated, {frees} freed, {} live instead of {}, {} errors that came late",
            after.live, before.live, after.late_errors
        ));
    }
    Ok(Report {
        operations: crew.done().max(operations),
        took: start.elapsed(),
        allocs,
        served_in_handlers: signals::served(),
        children,
        peak_kib: peak_kib()?,
    })
}

fn progress_bar(operations: u64) -> ProgressBar {
    let style = "{bar:40} {human_pos} of {human_len} operations, {per_sec}, {eta} left";
    let bar = ProgressBar::new(operations);
    match ProgressStyle::with_template(style) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Sends signals to the workers.
fn interrupt(crew: &Crew) {
    let mut numbers = fastrand::Rng::with_seed(1 << 32);
    while !crew.is_over() {
        if let Some(thread) = crew.thread(numbers.usize(..crew.workers())) {
            signals::interrupt(thread);
        }
        thread::sleep(Duration::from_micros(numbers.u64(20..200)));
    }
}

/// Does all but work, until the work is done; returns how many children there were, and the areas that were there all the time.
fn keep_house(
    crew: &Crew,
    operations: u64,
    bounds: &Bounds,
    start: Instant,
    bar: &ProgressBar,
) -> Result<(u64, Vec<Parcel>), String> {
    let mut numbers = fastrand::Rng::with_seed(1 << 33);
    let mut kept = Vec::new();
    while kept.len() < KEPT {
        kept.extend(allocate(&mut numbers));
    }
    let mut children = 0;
    while !crew.is_over() {
        bar.set_position(crew.done().min(operations));
        bounds.check(start)?;
        match numbers.u32(..4) {
            0 => drain_caches::<Global>(),
            1 => drop(global().trim(0)),
            _ => drop(global().upkeep()),
        }
        if crew.done() / (operations / CHILDREN).max(1) > children {
            children += 1;
            in_forked_child(|| live_on(&kept, &mut numbers.clone()));
        }
        if global().stats().late_errors > 0 {
            return Err("an area was freed twice, and nobody was told".to_owned());
        }
        thread::sleep(Duration::from_millis(numbers.u64(..4)));
    }
    Ok((children, kept))
}

/// What a child does: works for itself, and finds what its parent has kept.
fn live_on(kept: &[Parcel], numbers: &mut fastrand::Rng) {
    let mut live = Vec::new();
    for _ in 0..CHILD_OPERATIONS / 2 {
        live.extend(allocate(numbers));
        if live.len() > 50 {
            free(live.swap_remove(numbers.usize(..live.len())));
        }
    }
    drain_caches::<Global>();
    global().upkeep();
    kept.iter().copied().chain(live).for_each(free);
}
