//! One run through a script: with every check on, or with a clock.

use std::ops::Range;
use std::time::{Duration, Instant};

use pcpu::stats::Stats;
use pcpu::{AllocFlags, Request};

use super::check::Checker;
use super::player::{Outcome, Player, Zeroing};
use crate::error::CliError;
use crate::script::{Action, Purpose};

/// Steps between two reports of progress.
const PROGRESS_STEPS: usize = 1024;

/// What a checked pass found.
#[derive(Debug)]
pub struct Checked {
    /// Areas handed out in operations.
    pub allocs: u64,
    /// Areas freed in operations.
    pub frees: u64,
    /// Of these, frees on another CPU than the allocation's.
    pub remote_frees: u64,
    /// Frees without a live area, because the allocation had been refused.
    pub skipped_frees: u64,
    /// Requests refused, also those that Linux refused.
    pub failed: u64,
    /// Of these, atomic ones.
    pub failed_atomic: u64,
    /// The first of these: the line of the trace, and why.
    pub first_failure: Option<String>,
    /// The most live bytes after any operation.
    pub live_peak_bytes: u64,
    /// Mean over the operations of live bytes over populated bytes, static variables left out.
    pub util_populated_avg: f64,
    /// The allocator's counters after the last step, before leftovers were freed.
    pub stats: Stats,
    /// Whether the CPUs had caches.
    pub has_caches: bool,
    /// Where every allocation lay.
    pub placements: Vec<Placement>,
}

/// Where an allocation lay.
#[derive(Debug, Clone, Copy)]
pub struct Placement {
    /// Place of the chunk and offset in its unit.
    pub at: (u32, usize),
    /// What was asked for.
    pub request: Request,
    /// The operation that allocated it, counted from 0.
    pub alloc_op: u64,
    /// The operation that freed it.
    pub free_op: Option<u64>,
    /// The CPU that allocated it, as the trace has it.
    pub alloc_cpu: u32,
    /// The CPU that freed it, as the trace has it.
    pub free_cpu: Option<u32>,
    cpu: u32,
}

impl Checked {
    /// Operations: what was allocated and what was freed.
    pub fn ops(&self) -> u64 {
        self.allocs + self.frees
    }
}

/// Plays the whole script with every check on. `progress` is told of steps done.
///
/// # Errors
/// One line that names the trace's line, if a check fails.
pub fn checked(player: &mut Player, mut progress: impl FnMut(u64)) -> Result<Checked, CliError> {
    let mut pass = CheckedPass::new(player);
    let steps = player.script.steps.len();
    for first in (0..steps).step_by(PROGRESS_STEPS) {
        let some = first..steps.min(first + PROGRESS_STEPS);
        progress(some.len() as u64);
        for number in some {
            pass.step(player, number)?;
        }
    }
    Ok(pass.finish(player))
}

struct CheckedPass {
    found: Checked,
    checker: Checker,
    live_bytes: u64,
    util_sum: f64,
    /// The row of each area among the placements.
    rows: Vec<usize>,
}

impl CheckedPass {
    fn new(player: &Player) -> Self {
        Self {
            found: Checked {
                allocs: 0,
                frees: 0,
                remote_frees: 0,
                skipped_frees: 0,
                failed: 0,
                failed_atomic: 0,
                first_failure: None,
                live_peak_bytes: 0,
                util_populated_avg: 0.0,
                stats: player.pcpu.stats(),
                has_caches: player.pcpu.has_caches(),
                placements: Vec::new(),
            },
            checker: Checker::default(),
            live_bytes: 0,
            util_sum: 0.0,
            rows: vec![0; player.script.areas as usize],
        }
    }

    fn step(&mut self, player: &mut Player, number: usize) -> Result<(), CliError> {
        let step = &player.script.steps[number];
        if let Action::Free { .. } = step.action
            && let Some(live) = player.area(number)
        {
            player.dirty(live);
            self.checker.freed(live);
        }
        let cpu = player.cpu(step);
        match (player.step(number)?, step.action) {
            (Outcome::Allocated(live), Action::Alloc { area, request }) => {
                let at = self
                    .checker
                    .handed_out(&player.pcpu, &request, live, player.zeroing())
                    .map_err(|what| player.failure(number, &what))?;
                if step.purpose == Purpose::Op {
                    self.rows[area as usize] = self.found.placements.len();
                    self.found.placements.push(Placement {
                        at,
                        request,
                        alloc_op: self.found.ops(),
                        free_op: None,
                        alloc_cpu: step.cpu,
                        free_cpu: None,
                        cpu,
                    });
                    self.found.allocs += 1;
                    self.live_bytes += live.bytes as u64;
                    self.sample(player);
                }
            }
            (Outcome::Freed(live), Action::Free { area }) if step.purpose == Purpose::Op => {
                let op = self.found.ops();
                let row = &mut self.found.placements[self.rows[area as usize]];
                row.free_op = Some(op);
                row.free_cpu = Some(step.cpu);
                self.found.remote_frees += u64::from(row.cpu != cpu);
                self.found.frees += 1;
                self.live_bytes -= live.bytes as u64;
                self.sample(player);
            }
            (Outcome::Refused(error), Action::Alloc { request, .. }) => {
                self.found.failed += 1;
                self.found
                    .first_failure
                    .get_or_insert_with(|| format!("{}:{}: {error}", player.name, step.line));
                self.found.failed_atomic += u64::from(request.flags().contains(AllocFlags::ATOMIC));
            }
            (Outcome::Skipped, _) if step.purpose == Purpose::Op => self.found.skipped_frees += 1,
            _ => {}
        }
        Ok(())
    }

    /// Takes note of the state after an operation.
    fn sample(&mut self, player: &Player) {
        self.found.live_peak_bytes = self.found.live_peak_bytes.max(self.live_bytes);
        let sizes = player.pcpu.sizes();
        let populated_bytes =
            player.pcpu.populated_pages() * sizes.page_bytes() as u64 - sizes.static_bytes() as u64;
        self.util_sum += self.live_bytes as f64 / populated_bytes as f64;
    }

    fn finish(mut self, player: &Player) -> Checked {
        let ops = self.found.ops();
        if ops > 0 {
            self.found.util_populated_avg = self.util_sum / ops as f64;
        }
        self.found.stats = player.pcpu.stats();
        self.found
    }
}

/// At most so many steps are prepared for at a time.
const LOOK_AHEAD_STEPS: usize = 64;

/// Plays the whole script `repeat` times by the clock, emptying the allocator after each. `progress` is told of every
/// run. Returns the time of all steps and of the upkeep in between, of nothing else.
///
/// With zeroing on, copies must be written to before they are freed, outside the clock. Stopping the clock for every
/// free would cost as much as the free. So the clock runs over stretches of steps: before each, all areas are written
/// to that it frees; it ends before the free of an area that it has allocated itself, or after [`LOOK_AHEAD_STEPS`]. What
/// reading the clock costs is measured beforehand and taken off each stretch.
///
/// # Errors
/// One line that names the trace's line, if the allocator does not take a live area back.
pub fn timed(
    player: &mut Player,
    repeat: u32,
    mut progress: impl FnMut(),
) -> Result<Duration, CliError> {
    let reading = clock_reading();
    let mut total = Duration::ZERO;
    for _ in 0..repeat {
        let (mut next, mut known_areas) = (0, 0);
        while next < player.script.steps.len() {
            let stretch = prepare(player, next, &mut known_areas);
            let start = Instant::now();
            player.run(stretch.clone())?;
            total += start.elapsed().saturating_sub(reading);
            next = stretch.end;
        }
        player.empty()?;
        progress();
    }
    Ok(total)
}

/// The numbers of the stretch of steps from `next` on, all areas written to that it frees. `known_areas` counts those of all
/// stretches so far.
fn prepare(player: &Player<'_>, next: usize, known_areas: &mut u32) -> Range<usize> {
    let steps = &player.script.steps;
    if player.zeroing() == Zeroing::Off {
        return next..steps.len();
    }
    let old_areas = *known_areas;
    let ahead = next..steps.len().min(next + LOOK_AHEAD_STEPS);
    for number in ahead.clone() {
        match steps[number].action {
            Action::Alloc { .. } => *known_areas += 1,
            Action::Free { area } if area >= old_areas => return next..number,
            Action::Free { .. } => {
                if let Some(live) = player.area(number) {
                    player.dirty(live);
                }
            }
        }
    }
    ahead
}

/// What a stretch of nothing takes by the clock: the shortest of many.
fn clock_reading() -> Duration {
    (0..1000)
        .map(|_| Instant::now().elapsed())
        .min()
        .unwrap_or_default()
}
