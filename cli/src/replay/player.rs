//! The machine of a replay, and one step of a script on it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

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
    #[inline]
    fn new(address: usize, request: &Request) -> Self {
        Self {
            address,
            asked_bytes: request.bytes,
            bytes: request.bytes.next_multiple_of(GRANULE_BYTES),
            flags: match request.flags.contains(AllocFlags::RESERVED) {
                true => FreeFlags::RESERVED,
                false => FreeFlags::empty(),
            },
        }
    }
}

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
    /// The CPUs, as the allocator's caches know them.
    seats: Vec<LockedSeat>,
    setup: Setup,
    findings: &'static Findings,
    /// Live areas by their numbers.
    areas: Vec<Option<Area>>,
    ops_since_upkeep: u32,
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
        let seats = (0..setup.cpus).map(seat).collect();
        Ok(Self {
            name,
            script,
            pages_at_start: pcpu.stats().populated_pages,
            pcpu,
            seats,
            setup: *setup,
            findings,
            areas: vec![None; script.areas as usize],
            ops_since_upkeep: 0,
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

    /// The live area with that number.
    pub fn area(&self, number: u32) -> Option<Area> {
        self.areas[number as usize]
    }

    /// Carries out a step, and the upkeep after it.
    ///
    /// # Errors
    /// One line that names the trace's line, if the allocator does not take a live area back.
    #[inline]
    pub fn step(&mut self, step: &Step) -> Result<Outcome, CliError> {
        let outcome = match step.action {
            Action::Alloc { area, request } => self.allocate(step, area, request),
            Action::Free { area } => match self.areas[area as usize].take() {
                Some(live) => self
                    .free(step, live)
                    .map(|()| Outcome::Freed(live))
                    .map_err(|what| self.failure(step, &what))?,
                None => Outcome::Skipped,
            },
        };
        self.keep_up(step.purpose);
        Ok(outcome)
    }

    fn allocate(&mut self, step: &Step, number: u32, request: Request) -> Outcome {
        let request = self.adapted(&request);
        match self.pcpu.allocate_at(self.seat(step), &request) {
            Ok(address) => {
                let area = Area::new(address, &request);
                self.areas[number as usize] = Some(area);
                Outcome::Allocated(area)
            }
            Err(error) => Outcome::Refused(error),
        }
    }

    /// [`step`](Self::step) by the clock: nobody is told what it came to.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    #[inline]
    pub fn run(&mut self, step: &Step) -> Result<(), CliError> {
        match &step.action {
            Action::Alloc { area, request } => {
                let request = self.adapted(request);
                if let Ok(address) = self.pcpu.allocate_at(self.seat(step), &request) {
                    self.areas[*area as usize] = Some(Area::new(address, &request));
                }
            }
            Action::Free { area } => {
                if let Some(live) = self.areas[*area as usize].take() {
                    // SAFETY: the area is live, and the replayer has no reference to its copies.
                    let freed =
                        unsafe { self.pcpu.free_at(self.seat(step), live.address, live.flags) };
                    if let Err(error) = freed {
                        return Err(self.failure(step, &not_taken_back(error)));
                    }
                }
            }
        }
        self.keep_up(step.purpose);
        Ok(())
    }

    /// The request as this replay makes it.
    #[inline]
    fn adapted(&self, request: &Request) -> Request {
        match self.setup.zeroing {
            Zeroing::On => *request,
            Zeroing::Off => request.with_flags(request.flags | AllocFlags::NO_ZERO),
        }
    }

    fn free(&self, step: &Step, area: Area) -> Result<(), String> {
        // SAFETY: the area is live, and the replayer has no reference to its copies.
        unsafe { self.pcpu.free_at(self.seat(step), area.address, area.flags) }
            .map_err(not_taken_back)
    }

    /// The seat of a step's CPU.
    #[inline]
    fn seat(&self, step: &Step) -> &LockedSeat {
        &self.seats[self.cpu(step) as usize]
    }

    #[inline]
    fn keep_up(&mut self, purpose: Purpose) {
        match self.setup.upkeep {
            UpkeepPace::WhenDue => self.pcpu.upkeep_if_due(),
            UpkeepPace::Every(ops) => {
                self.ops_since_upkeep += u32::from(purpose == Purpose::Op);
                if self.ops_since_upkeep >= ops && self.pcpu.is_upkeep_due() {
                    self.ops_since_upkeep = 0;
                    self.pcpu.upkeep();
                }
            }
        }
    }

    /// The message that something is wrong at a step.
    pub fn failure(&self, step: &Step, what: &str) -> CliError {
        CliError::Failed(format!("{}:{}: {what}", self.name, step.line))
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
        for area in self.areas.iter_mut().filter_map(Option::take) {
            if self.setup.zeroing == Zeroing::On {
                check::dirty(&self.pcpu, area);
            }
            // SAFETY: the area is live, and the replayer has no reference to its copies.
            unsafe { self.pcpu.free_with(area.address, area.flags) }
                .map_err(|error| failed(not_taken_back(error)))?;
        }
        self.pcpu.drain(&self.seats[0]);
        self.pcpu.trim(0);
        self.ops_since_upkeep = 0;
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
