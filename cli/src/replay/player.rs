//! The machine of a replay, and one step of a script on it.

use std::cell::Cell;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::cache::LockedSeat;
use pcpu::hardened::{Finding, FindingHook, Hardening};
use pcpu::unit::{CpuId, GRANULE_BYTES};
use pcpu::{AllocError, AllocFlags, FreeError, FreeFlags, Request};

use super::check;
use crate::error::CliError;
use crate::script::{Action, Purpose, Script, Step};

/// Whether requests ask for zeroed memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zeroing {
    /// They do.
    On,
    /// Every request carries [`AllocFlags::NO_ZERO`].
    Off,
}

/// Whether every CPU has a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caches {
    /// It has.
    On,
    /// All requests go to the allocator itself.
    Off,
}

/// Whether the instance is hardened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is as others are.
    Usual,
    /// It has guards, quarantine and poison, and no caches.
    Hardened,
}

/// What a hardened instance has found.
#[derive(Debug, Default)]
pub struct Findings {
    count: AtomicU64,
    first: OnceLock<Finding>,
}

impl Findings {
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// The first of them, in words.
    pub fn first(&self) -> Option<String> {
        self.first.get().map(Finding::to_string)
    }
}

impl FindingHook for Findings {
    fn found(&self, finding: &Finding) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.first.get_or_init(|| *finding);
    }
}

/// How often the upkeep runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpkeepPace {
    /// After each step, if it is due.
    WhenDue,
    /// If it is due, but at most once per so many operations.
    Every(u32),
}

/// How long ago the last upkeep was.
#[derive(Debug, Default)]
struct Pace {
    /// Operations since then, as far as they have been counted.
    ops: Cell<u32>,
    /// The step that counting goes on with.
    counted_to: Cell<usize>,
}

/// The machine and the rules of a replay.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// CPUs of the machine.
    pub cpus: u32,
    /// Nodes that they are spread over; at most as many.
    pub nodes: u32,
    /// Whether memory is asked for zeroed.
    pub zeroing: Zeroing,
    /// Whether every CPU has a cache.
    pub caches: Caches,
    /// Whether the instance is hardened.
    pub mode: Mode,
    /// How often the upkeep runs.
    pub upkeep: UpkeepPace,
}

impl Setup {
    /// The script's steps as this machine carries them out, whose CPUs have these seats.
    fn moves(
        &self,
        script: &Script,
        seats: &[LockedSeat],
        addresses: &'static [AtomicUsize],
    ) -> Vec<Move> {
        let zeroing = match self.zeroing {
            Zeroing::On => AllocFlags::empty(),
            Zeroing::Off => AllocFlags::NO_ZERO,
        };
        // Allocations count up, and come before their frees.
        let mut requests: Vec<Request> = Vec::with_capacity(script.areas as usize);
        let adapted = |(number, step): (u32, &Step)| {
            let (kind, area) = match step.action {
                Action::Alloc { area, request } => {
                    requests.push(request.with_flags(request.flags() | zeroing));
                    (Kind::Alloc, area)
                }
                Action::Free { area } => (Kind::Free, area),
            };
            let request = requests[area as usize];
            Move {
                kind,
                number,
                area: &addresses[area as usize],
                seat: seats[(step.cpu % self.cpus) as usize],
                request,
                flags: Area::new(NOWHERE, &request).flags,
            }
        };
        (0..).zip(&script.steps).map(adapted).collect()
    }
}

fn numbers_of_allocs(moves: &[Move]) -> Vec<usize> {
    let numbered = moves.iter().enumerate();
    let allocs = numbered.filter(|(_, step)| step.kind == Kind::Alloc);
    allocs.map(|(number, _)| number).collect()
}

impl Default for Setup {
    /// The machine that traces are replayed on if nothing else is asked for.
    fn default() -> Self {
        Self {
            cpus: 16,
            nodes: 1,
            zeroing: Zeroing::On,
            caches: Caches::On,
            mode: Mode::Usual,
            upkeep: UpkeepPace::WhenDue,
        }
    }
}

/// A live area.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    /// Its neutral address.
    pub address: usize,
    /// Its size, rounded up to the grain.
    pub bytes: usize,
    /// How much of it was asked for. What it was rounded up by belongs to a guard in hardened mode.
    pub asked_bytes: usize,
    flags: FreeFlags,
}

impl Area {
    fn new(address: usize, request: &Request) -> Self {
        Self {
            address,
            asked_bytes: request.bytes(),
            bytes: request.bytes().next_multiple_of(GRANULE_BYTES),
            flags: match request.flags().contains(AllocFlags::RESERVED) {
                true => FreeFlags::RESERVED,
                false => FreeFlags::empty(),
            },
        }
    }
}

/// A step made ready for the clock: nothing is left to be worked out but where the area lies.
#[derive(Debug, Clone, Copy)]
struct Move {
    kind: Kind,
    /// Its number among the steps.
    number: u32,
    /// Where the area lies; [`NOWHERE`] while it is not live.
    area: &'static AtomicUsize,
    /// Whose cache is used.
    seat: LockedSeat,
    /// What the area is, or was, asked for by.
    request: Request,
    /// How it is freed.
    flags: FreeFlags,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Alloc,
    Free,
}

/// Of an area that is not live: no neutral address.
const NOWHERE: usize = 0;

/// The message that a live area is not one to the allocator.
#[cold]
fn not_taken_back(error: FreeError) -> String {
    format!("a live area was not taken back: {error}")
}

/// What a step came to.
#[derive(Debug)]
pub enum Outcome {
    /// An area was handed out.
    Allocated(Area),
    /// The request was refused.
    Refused(AllocError),
    /// The area was freed.
    Freed(Area),
    /// There was nothing to free: the allocation had been refused.
    Skipped,
}

/// Plays a script on a machine of its own.
pub struct Player<'s> {
    /// The name of the trace, for messages.
    pub name: &'s str,
    /// What is played.
    pub script: &'s Script,
    /// The allocator.
    pub pcpu: SimAllocator,
    /// A CPU, as the allocator's caches know it.
    seat: LockedSeat,
    setup: Setup,
    findings: &'static Findings,
    /// The script's steps, as this machine carries them out.
    moves: Vec<Move>,
    /// Where the areas lie, by their numbers.
    addresses: &'static [AtomicUsize],
    /// The numbers of the steps that allocate them.
    asked: Vec<usize>,
    pace: Pace,
    /// What the first chunk alone takes.
    pages_at_start: u64,
}

impl<'s> Player<'s> {
    /// Builds the machine.
    ///
    /// # Errors
    /// One line, if the machine cannot be built.
    pub fn new(name: &'s str, script: &'s Script, setup: &Setup) -> Result<Self, CliError> {
        let failed = |error| CliError::Failed(format!("a machine of {} CPUs: {error}", setup.cpus));
        let mut pcpu = Machine::new(setup.cpus)
            .nodes(setup.nodes)
            .build()
            .map_err(|error| failed(error.to_string()))?;
        // One for each file, for as long as the program runs.
        let findings: &Findings = Box::leak(Box::default());
        if setup.mode == Mode::Hardened {
            pcpu.harden(Hardening::new(findings))
                .map_err(|error| failed(error.to_string()))?;
        }
        if setup.caches == Caches::On {
            pcpu.enable_caches()
                .map_err(|error| failed(error.to_string()))?;
        }
        // SAFETY: all seats of this instance are such.
        let seat = |cpu| unsafe { LockedSeat::new(pcpu.units(), CpuId::new(cpu)) };
        let seats: Vec<LockedSeat> = (0..setup.cpus).map(seat).collect();
        // As long as the program runs, too: so a step leads to its area's address at once, as the areas of a program do.
        let nowhere = (0..script.areas).map(|_| AtomicUsize::new(NOWHERE));
        let addresses: &[AtomicUsize] = Box::leak(nowhere.collect());
        let moves = setup.moves(script, &seats, addresses);
        Ok(Self {
            name,
            script,
            pages_at_start: pcpu.stats().populated_pages,
            pcpu,
            seat: seats[0],
            setup: *setup,
            findings,
            asked: numbers_of_allocs(&moves),
            moves,
            addresses,
            pace: Pace::default(),
        })
    }

    /// What the instance has found, if it is hardened.
    pub fn findings(&self) -> &'static Findings {
        self.findings
    }

    /// Whether memory is asked for zeroed.
    pub fn zeroing(&self) -> Zeroing {
        self.setup.zeroing
    }

    /// The CPU that a step runs on.
    pub fn cpu(&self, step: &Step) -> u32 {
        step.cpu % self.setup.cpus
    }

    /// The live area of the step of that number.
    pub fn area(&self, number: usize) -> Option<Area> {
        let Move { area, request, .. } = &self.moves[number];
        let address = area.load(Ordering::Relaxed);
        (address != NOWHERE).then(|| Area::new(address, request))
    }

    /// Carries out the step of that number, and the upkeep after it.
    ///
    /// # Errors
    /// One line that names the trace's line, if the allocator does not take a live area back.
    pub fn step(&mut self, number: usize) -> Result<Outcome, CliError> {
        let before = self.area(number);
        let refused = self.run(number..number + 1)?;
        Ok(match (before, self.area(number)) {
            (None, Some(area)) => Outcome::Allocated(area),
            (Some(area), _) => Outcome::Freed(area),
            (None, None) => refused.map_or(Outcome::Skipped, Outcome::Refused),
        })
    }

    /// Carries out the steps of these numbers, each with the upkeep after it; the last refusal is the result.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn run(&mut self, numbers: Range<usize>) -> Result<Option<AllocError>, CliError> {
        let mut refused = None;
        for step in &self.moves[numbers] {
            match step.kind {
                Kind::Alloc => match self.pcpu.allocate_at(&step.seat, &step.request) {
                    Ok(found) => step.area.store(found, Ordering::Relaxed),
                    Err(error) => refused = Some(error),
                },
                Kind::Free => {
                    let address = step.area.load(Ordering::Relaxed);
                    if address != NOWHERE {
                        step.area.store(NOWHERE, Ordering::Relaxed);
                        // SAFETY: the area is live, and the replayer has no reference to its copies.
                        let freed = unsafe { self.pcpu.free_at(&step.seat, address, step.flags) };
                        if let Err(error) = freed {
                            let number = step.number as usize;
                            return Err(self.failure(number, &not_taken_back(error)));
                        }
                    }
                }
            }
            if self.pcpu.is_upkeep_due() {
                self.keep_up(step.number as usize);
            }
        }
        Ok(refused)
    }

    /// Runs the upkeep, which is due after the step of that number, if that is not too soon.
    #[cold]
    fn keep_up(&self, number: usize) {
        let UpkeepPace::Every(ops) = self.setup.upkeep else {
            return self.pcpu.upkeep_if_due();
        };
        let pace = &self.pace;
        let steps = self.script.steps.get(pace.counted_to.get()..=number);
        let is_op = |step: &&Step| step.purpose == Purpose::Op;
        let more = steps.unwrap_or_default().iter().filter(is_op).count() as u32;
        pace.counted_to.set(number + 1);
        pace.ops.set(pace.ops.get() + more);
        if pace.ops.get() >= ops {
            pace.ops.set(0);
            self.pcpu.upkeep();
        }
    }

    /// The message that something is wrong at a step.
    #[cold]
    pub fn failure(&self, number: usize, what: &str) -> CliError {
        let line = self.script.steps[number].line;
        CliError::Failed(format!("{}:{line}: {what}", self.name))
    }

    /// Writes to every copy of an area, so that whoever gets the memory next would see it.
    pub fn dirty(&self, area: Area) {
        if self.setup.zeroing == Zeroing::On {
            check::dirty(&self.pcpu, area);
        }
    }

    /// Frees what is left and gives all memory back.
    ///
    /// # Errors
    /// One line, if the allocator keeps something.
    pub fn empty(&mut self) -> Result<(), CliError> {
        let failed = |what: String| CliError::Failed(format!("{}: {what}", self.name));
        for (address, number) in self.addresses.iter().zip(&self.asked) {
            let (slot, address) = (address, address.load(Ordering::Relaxed));
            if address == NOWHERE {
                continue;
            }
            slot.store(NOWHERE, Ordering::Relaxed);
            let step = &self.moves[*number];
            let area = Area::new(address, &step.request);
            if self.setup.zeroing == Zeroing::On {
                check::dirty(&self.pcpu, area);
            }
            // SAFETY: the area is live, and the replayer has no reference to its copies.
            unsafe { self.pcpu.free_with(area.address, area.flags) }
                .map_err(|error| failed(not_taken_back(error)))?;
        }
        self.pcpu.drain(&self.seat);
        self.pcpu.trim(0);
        self.pace = Pace::default();
        let stats = self.pcpu.stats();
        if stats.live != 0 || stats.live_bytes != 0 {
            return Err(failed(format!(
                "all is freed, but {} areas of {} bytes count as live",
                stats.live, stats.live_bytes
            )));
        }
        if stats.populated_pages != self.pages_at_start || stats.chunks > 2 {
            return Err(failed(format!(
                "all is freed, but {} pages and {} chunks are left, {} pages and 1 chunk at the start",
                stats.populated_pages, stats.chunks, self.pages_at_start
            )));
        }
        Ok(())
    }
}
