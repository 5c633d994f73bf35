//! A simple model of the allocator: it knows which areas are live and who asked for them, nothing else. After every
//! operation the instance is recounted (`audit`) and compared with it.
//!
//! What is held: areas are disjoint, aligned, inside the right region, zero on every CPU when they are handed out and
//! written by nobody but their owner; the backing has exactly the pages that the maps report; counters equal recounts; what
//! fails changes nothing, and fails for a reason that the model can name.

use std::collections::BTreeMap;

use pcpu::allocator::{Policy, UpkeepBy};
use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::backing::{Backing, BackingError};
use pcpu::unit::{CpuId, FirstChunkKind, FirstChunkSpec, GRANULE_BYTES};
use pcpu::{AllocError, AllocFlags, CpuError, FreeError, FreeFlags, FreeManyError, Request};

use crate::audit::{Picture, Section, audit};
use crate::copies::{assert_stamped, assert_zero, stamp};
use crate::free::FreeArea;
use crate::same::assert_same;
use crate::undone::assert_undone;

/// A machine to run on.
#[derive(Debug, Clone)]
pub struct Shape {
    pub cpus: u32,
    pub online: u32,
    pub nodes: u32,
    pub page_bytes: usize,
    pub unit_pages: usize,
    pub chunks: u32,
    pub static_bytes: usize,
    pub reserved_bytes: usize,
    pub kind: FirstChunkKind,
    pub contents: Fresh,
    pub making: Making,
    pub policy: Policy,
}

#[derive(Debug, Clone, Copy)]
pub enum Fresh {
    Zeroed,
    Dirty,
}

/// Whether making a chunk can be done in atomic context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Making {
    Anytime,
    Sleeping,
}

impl Shape {
    fn machine(&self) -> Machine {
        let spec = FirstChunkSpec {
            static_bytes: self.static_bytes,
            reserved_bytes: self.reserved_bytes,
            page_bytes: self.page_bytes,
            atom_bytes: self.page_bytes,
            ..FirstChunkSpec::default()
        };
        let mut machine = Machine::new(self.cpus)
            .nodes(self.nodes)
            .online(self.online)
            .spec(spec)
            .unit_bytes(self.page_bytes * self.unit_pages)
            .first_chunk(self.kind)
            .chunks(self.chunks)
            .policy(self.policy)
            .checked();
        if let Fresh::Dirty = self.contents {
            machine = machine.dirty_memory();
        }
        if self.making == Making::Sleeping {
            machine = machine.sleeping_reserve();
        }
        machine
    }
}

/// Which calls of the backing fail.
#[derive(Debug, Clone, Copy)]
pub enum Faults {
    None,
    All,
    /// Only this one, counted from now.
    Call(u64),
    /// The calls whose bit is set, over and over.
    Pattern(u64),
}

#[derive(Debug, Clone)]
pub enum Op {
    Alloc(Request),
    Free(usize),
    /// Frees an address that is a live area's, so many bytes further.
    FreeNear(usize, isize, FreeFlags),
    /// Frees any address from this many bytes before the window on.
    FreeAnywhere(usize, FreeFlags),
    /// Frees what was freed last once more.
    FreeAgain,
    Upkeep,
    Trim(u32),
    BringUp(u32),
    Faults(Faults),
    /// So many at one go.
    AllocMany(Request, usize),
    /// So many live areas of one region in order of their addresses, at one go, and behind so many of them what was freed last, if
    /// there is such a place.
    FreeMany {
        index: usize,
        count: usize,
        again_behind: usize,
    },
}

/// A live area as its owner knows it.
#[derive(Debug, Clone, Copy)]
struct Area {
    bytes: usize,
    region: AllocFlags,
}

pub struct Run {
    shape: Shape,
    pcpu: SimAllocator,
    live: BTreeMap<usize, Area>,
    last_freed: Option<(usize, FreeFlags)>,
    allocs: u64,
    failures: u64,
    atomic_failures: u64,
    faults: Faults,
    before: Picture,
}

fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(GRANULE_BYTES)
}

impl Run {
    /// An instance, and a model of it.
    pub fn new(shape: Shape) -> Self {
        let pcpu = shape.machine().build().expect("nothing fails yet");
        Self {
            before: audit(&pcpu),
            shape,
            pcpu,
            live: BTreeMap::new(),
            last_freed: None,
            allocs: 0,
            failures: 0,
            atomic_failures: 0,
            faults: Faults::None,
        }
    }

    /// Does it to both, and compares.
    pub fn step(&mut self, op: &Op) {
        match *op {
            Op::Alloc(request) => self.allocate(request),
            Op::AllocMany(request, count) => self.allocate_many(request, count),
            Op::FreeMany {
                index,
                count,
                again_behind,
            } => self.free_many(index, count, again_behind),
            Op::Free(index) => {
                if let Some((address, area)) = self.pick(index) {
                    let flags = free_flags(area.region);
                    self.check_stamps(address, area.bytes);
                    self.free(address, flags);
                }
            }
            Op::FreeNear(index, by, flags) => {
                if let Some((address, _)) = self.pick(index) {
                    self.free(address.wrapping_add_signed(by), flags);
                }
            }
            Op::FreeAnywhere(at, flags) => {
                let address = self.pcpu.neutral_base().wrapping_sub(64).wrapping_add(at);
                self.free(address, flags);
            }
            Op::FreeAgain => {
                if let Some((address, flags)) = self.last_freed {
                    self.free(address, flags);
                }
            }
            Op::Upkeep => self.upkeep(),
            Op::Trim(spares) => {
                let report = self.pcpu.trim(spares);
                let after = self.recount();
                assert_eq!(after.stats.empty_pages, 0);
                let kept = spares.max(self.before.stats.spare_chunks.min(spares));
                assert!(after.stats.spare_chunks <= kept);
                self.check_report(&report, &after);
                self.before = after;
            }
            Op::BringUp(cpu) => self.bring_up(CpuId::new(cpu)),
            Op::Faults(faults) => self.set_faults(faults),
        }
    }

    /// One of the live areas: any number names one.
    fn pick(&self, index: usize) -> Option<(usize, Area)> {
        let nth = index.checked_rem(self.live.len())?;
        let found = self.live.iter().nth(nth);
        found.map(|(&at, &area)| (at, area))
    }

    fn set_faults(&mut self, faults: Faults) {
        self.faults = faults;
        self.pcpu.backing().set_faults(move |call| match faults {
            Faults::None => false,
            Faults::All => true,
            Faults::Call(one) => call == one,
            Faults::Pattern(bits) => bits >> (call % 64) & 1 != 0,
        });
    }

    /// Recounts the instance and compares it with the model.
    fn recount(&self) -> Picture {
        let picture = audit(&self.pcpu);
        let model = self.live.iter();
        let model: BTreeMap<_, _> = model
            .map(|(&address, area)| (address, rounded(area.bytes)))
            .collect();
        assert_eq!(picture.areas, model);
        let stats = &picture.stats;
        let live = self.live.len() as u64;
        assert_eq!((stats.allocs, stats.live), (self.allocs, live));
        assert_eq!(
            (stats.failures, stats.atomic_failures),
            (self.failures, self.atomic_failures)
        );
        let asked: usize = model.values().sum();
        assert_eq!(stats.live_bytes, asked as u64);
        picture
    }

    fn allocate(&mut self, request: Request) {
        match self.pcpu.allocate(&request) {
            Ok(address) => {
                self.allocs += 1;
                self.check_served(address, &request);
                let region = request.flags() & AllocFlags::RESERVED;
                let bytes = request.bytes();
                self.live.insert(address, Area { bytes, region });
                self.before = self.recount();
                stamp(&self.pcpu, (address, bytes));
            }
            Err(error) => {
                self.failures += 1;
                let is_atomic = request.flags().contains(AllocFlags::ATOMIC);
                self.atomic_failures += u64::from(is_atomic);
                let after = self.recount();
                self.check_refused(&request, error, &after);
                self.before = after;
            }
        }
    }

    /// All of them, or none.
    fn allocate_many(&mut self, request: Request, count: usize) {
        let mut batch = vec![0; count];
        match self.pcpu.allocate_many(&request, &mut batch) {
            Ok(()) => {
                let region = request.flags() & AllocFlags::RESERVED;
                let bytes = request.bytes();
                for &address in &batch {
                    self.allocs += 1;
                    self.check_served(address, &request);
                    self.live.insert(address, Area { bytes, region });
                }
                self.before = self.recount();
                batch
                    .iter()
                    .for_each(|&address| stamp(&self.pcpu, (address, bytes)));
            }
            Err(error) => {
                assert!(count > 0, "{error}");
                self.failures += 1;
                let is_atomic = request.flags().contains(AllocFlags::ATOMIC);
                self.atomic_failures += u64::from(is_atomic);
                let after = self.recount();
                if !self.check_wrong(&request, error, &after) {
                    self.check_refused_many(&request, error, &after);
                }
                self.before = after;
            }
        }
    }

    /// A batch that was refused has left no area; what memory it got may stay.
    fn check_refused_many(&self, request: &Request, error: AllocError, after: &Picture) {
        assert_eq!(self.before.areas, after.areas);
        let flags = request.flags();
        match error {
            AllocError::ReservedExhausted { bytes, free_bytes } => {
                assert!(flags.contains(AllocFlags::RESERVED) && bytes == request.bytes());
                assert!(free_bytes <= self.pcpu.sizes().regions().reserved.len());
            }
            AllocError::Busy => assert!(flags.contains(AllocFlags::TRY)),
            AllocError::Backing(_) => assert!(!flags.contains(AllocFlags::RESERVED)),
            other => panic!("{request:?} was refused: {other}"),
        }
        // However long its free runs are, a chunk that was there has the same ones; a new one is free.
        for new in &after.sections {
            let is_same =
                |old: &&Section| (old.place, old.region.start) == (new.place, new.region.start);
            match self.before.sections.iter().find(is_same) {
                Some(old) => assert_eq!(old.free, new.free),
                None => assert!(new.areas.is_empty()),
            }
        }
    }

    fn free_many(&mut self, index: usize, count: usize, again_behind: usize) {
        let Some((first, Area { region, .. })) = self.pick(index) else {
            return;
        };
        let flags = free_flags(region);
        let areas = self.live.range(first..);
        let areas = areas.filter(|(_, area)| area.region == region).take(count);
        let mut batch: Vec<_> = areas.map(|(&at, _)| at).collect();
        let mut freed = batch.len();
        let mut expected = Ok(());
        if let Some((address, _)) = self.last_freed
            && again_behind < batch.len()
        {
            batch.insert(again_behind, address);
            // It may be live again, and then it is freed: by this place of the batch, or by its own.
            let mut seen = Vec::new();
            for (nth, &address) in batch.iter().enumerate() {
                let error = match seen.contains(&address) {
                    true => Some(FreeError::NotAllocated { address }),
                    false => self.free_error(address, flags),
                };
                // The area around it may have been freed before it.
                let error = error.map(|error| match error {
                    FreeError::Interior { start, .. } if seen.contains(&start) => {
                        FreeError::NotAllocated { address }
                    }
                    other => other,
                });
                if let Some(error) = error {
                    expected = Err(FreeManyError { freed: nth, error });
                    break;
                }
                seen.push(address);
            }
            freed = seen.len();
        }
        for &address in &batch[..freed] {
            self.check_stamps(address, self.live[&address].bytes);
        }
        // SAFETY: what is live is the run's, which does not use it any more; anything else is refused.
        let result = unsafe { self.pcpu.free_many(&batch, flags) };
        assert_eq!(result, expected);
        for address in &batch[..freed] {
            self.live.remove(address);
            self.last_freed = Some((*address, flags));
        }
        self.before = self.recount();
    }

    fn check_served(&self, address: usize, request: &Request) {
        let (bytes, align, flags) = (request.bytes(), request.align(), request.flags());
        assert!(bytes != 0 && bytes <= self.shape.policy.max_alloc_bytes);
        assert!(align.is_power_of_two() && align <= self.shape.page_bytes);
        let info = self.pcpu.address_info(address).expect("it is ours");
        assert_eq!((info.cpu, info.neutral), (None, address));
        let regions = self.pcpu.sizes().regions();
        let region = match (flags.contains(AllocFlags::RESERVED), info.place) {
            (true, place) => {
                assert_eq!(place, 0);
                regions.reserved
            }
            (false, 0) => regions.dynamic,
            (false, _) => 0..self.pcpu.sizes().unit_bytes(),
        };
        let (start, end) = (info.offset_bytes, info.offset_bytes + bytes);
        assert!(start >= region.start && end <= region.end, "{info:?}");
        let neighbours = self.live.range(..address + bytes).next_back();
        if let Some((&other, area)) = neighbours {
            assert!(other + area.bytes <= address, "areas overlap");
        }
        for cpu in self.pcpu.units().possible().iter() {
            let copy = self.pcpu.per_cpu_address(address, cpu);
            assert!(copy.is_ok_and(|copy| copy.is_multiple_of(align)));
            // A CPU that never came reads zero too.
            let is_materialised = self.pcpu.units().materialised().contains(cpu);
            if !is_materialised || !flags.contains(AllocFlags::NO_ZERO) {
                assert_zero(&self.pcpu, (address, bytes), cpu);
            }
        }
    }

    /// Whether a request is one that nobody serves; panics unless it was refused for that.
    fn check_wrong(&self, request: &Request, error: AllocError, after: &Picture) -> bool {
        let (bytes, align) = (request.bytes(), request.align());
        let limit_bytes = self.shape.policy.max_alloc_bytes;
        let wrong = if bytes == 0 {
            Some(AllocError::ZeroSize)
        } else if bytes > limit_bytes {
            Some(AllocError::TooLarge { bytes, limit_bytes })
        } else if !align.is_power_of_two() {
            Some(AllocError::AlignNotPowerOfTwo { align })
        } else if align > self.shape.page_bytes {
            let limit = self.shape.page_bytes;
            Some(AllocError::AlignTooLarge { align, limit })
        } else {
            None
        };
        if let Some(wrong) = wrong {
            assert_eq!(error, wrong);
            self.check_nothing_changed(after);
        }
        wrong.is_some()
    }

    fn check_refused(&self, request: &Request, error: AllocError, after: &Picture) {
        if self.check_wrong(request, error, after) {
            return;
        }
        let (bytes, align, flags) = (request.bytes(), request.align(), request.flags());
        let is_by_callers = self.shape.policy.upkeep == UpkeepBy::Callers;
        // Any hole at least this long serves the request wherever the hole begins.
        let enough = rounded(bytes) + align.max(GRANULE_BYTES) - GRANULE_BYTES;
        let is_reserved = |section: &Section| {
            section.place == 0 && section.region == self.pcpu.sizes().regions().reserved
        };
        if flags.contains(AllocFlags::RESERVED) {
            let AllocError::ReservedExhausted {
                bytes: asked,
                free_bytes,
            } = error
            else {
                panic!("a reserved request was refused: {error}");
            };
            let free = after.sections.iter().filter(|section| is_reserved(section));
            let free = free.flat_map(|section| &section.free);
            let free: usize = free.map(|run| run.end - run.start).sum();
            assert_eq!((asked, free_bytes), (bytes, free));
            assert!(longest_free_bytes(after, is_reserved) < enough);
            return self.check_nothing_changed(after);
        }
        if flags.contains(AllocFlags::TRY) {
            assert_eq!(error, AllocError::Busy);
            return self.check_nothing_changed(after);
        }
        if is_by_callers {
            assert!(matches!(error, AllocError::Backing(_)), "{error}");
        } else {
            assert_undone(&self.before, after, self.shape.page_bytes);
        }
        let had_room = longest_free_bytes(&self.before, |section| !is_reserved(section)) >= enough;
        let is_atomic = flags.contains(AllocFlags::ATOMIC);
        let is_full = self.before.stats.chunks == self.shape.chunks;
        let may_fault = !matches!(self.faults, Faults::None);
        match error {
            AllocError::Backing(BackingError::OutOfFrames) => assert!(may_fault),
            AllocError::Backing(BackingError::OutOfMetadata) => {
                assert!(may_fault && !had_room, "there was room");
            }
            AllocError::Backing(BackingError::OutOfAddressSpace) => {
                assert!(may_fault || is_full);
                assert!(!had_room || is_by_callers, "there was room");
            }
            AllocError::Backing(BackingError::WouldSleep) => {
                assert!(is_atomic && self.shape.making == Making::Sleeping);
                assert!(!had_room, "there was room");
                assert!(after.stats.spare_shortfalls > self.before.stats.spare_shortfalls);
            }
            other => panic!("{request:?} was refused: {other}"),
        }
    }

    /// Panics if a refusal that is not the backing's left a trace; callers that run the upkeep may leave its.
    fn check_nothing_changed(&self, after: &Picture) {
        if self.shape.policy.upkeep == UpkeepBy::Owner {
            assert_same(&self.before, after);
        }
    }

    fn free(&mut self, address: usize, flags: FreeFlags) {
        let expected = self.free_error(address, flags);
        let result = self.pcpu.free_area(address, flags);
        assert_eq!(result.err(), expected, "free of {address:#x}, {flags:?}");
        if expected.is_none() {
            self.live.remove(&address);
            self.last_freed = Some((address, flags));
            self.before = self.recount();
        } else {
            let after = self.recount();
            assert_same(&self.before, &after);
            self.before = after;
        }
    }

    /// What must come of freeing `address`, by the model.
    fn free_error(&self, address: usize, flags: FreeFlags) -> Option<FreeError> {
        let sizes = self.pcpu.sizes();
        let regions = sizes.regions();
        let window = self.pcpu.backing().window();
        let from_base = address.checked_sub(window.base);
        let inside = from_base.filter(|at| at / window.pitch_bytes < window.chunks as usize);
        let Some(from_base) = inside else {
            return Some(FreeError::Foreign { address });
        };
        let is_first = from_base < window.pitch_bytes;
        let offset = from_base % window.pitch_bytes;
        if offset >= sizes.unit_bytes() {
            return Some(FreeError::Foreign { address });
        }
        if is_first && offset < regions.reserved.start {
            return Some(FreeError::Static { address });
        }
        let is_reserved = is_first && regions.reserved.contains(&offset);
        match (is_reserved, flags.contains(FreeFlags::RESERVED)) {
            (true, false) => return Some(FreeError::Reserved { address }),
            (false, true) => return Some(FreeError::NotReserved { address }),
            _ => {}
        }
        if is_first && offset >= regions.dynamic.end {
            return Some(FreeError::Foreign { address });
        }
        if !address.is_multiple_of(GRANULE_BYTES) {
            return Some(FreeError::Misaligned { address });
        }
        match self.live.range(..=address).next_back() {
            Some((&start, _)) if start == address => None,
            Some((&start, area)) if start + rounded(area.bytes) > address => {
                Some(FreeError::Interior { address, start })
            }
            _ => Some(FreeError::NotAllocated { address }),
        }
    }

    fn upkeep(&mut self) {
        let report = self.pcpu.upkeep();
        let after = self.recount();
        self.check_report(&report, &after);
        let policy = &self.shape.policy;
        let stats = &after.stats;
        assert!(stats.empty_pages <= policy.empty_pages_low.into());
        assert!(stats.spare_chunks <= stats.spare_target);
        assert!(stats.spare_target <= policy.spare_chunks_max.max(policy.spare_chunks));
        assert!(!self.pcpu.is_upkeep_due(), "an upkeep is due at once again");
        self.before = after;
        // What the upkeep is for: the largest request can be served at once.
        let is_full = self.before.stats.chunks == self.shape.chunks;
        if matches!(self.faults, Faults::None) && !is_full && policy.spare_chunks > 0 {
            let bytes = policy.max_alloc_bytes;
            let flags = AllocFlags::ATOMIC | AllocFlags::NO_ZERO;
            let request = Request::new(bytes, GRANULE_BYTES).with_flags(flags);
            let address = self.pcpu.allocate(&request);
            let address = address.expect("the upkeep has prepared for it");
            self.allocs += 1;
            self.pcpu
                .free_area(address, FreeFlags::empty())
                .expect("it is live");
            self.before = self.recount();
        }
    }

    fn check_report(&self, report: &pcpu::allocator::UpkeepReport, after: &Picture) {
        let (old, new) = (&self.before.stats, &after.stats);
        let given_back = new.pages_depopulated - old.pages_depopulated;
        assert_eq!(report.pages_given_back, given_back);
        let destroyed = new.chunks_destroyed - old.chunks_destroyed;
        assert_eq!(u64::from(report.chunks_destroyed), destroyed);
        let created = new.chunks_created - old.chunks_created;
        assert_eq!(u64::from(report.chunks_prepared), created);
    }

    fn bring_up(&mut self, cpu: CpuId) {
        let was_there = self.pcpu.units().materialised().contains(cpu);
        let calls = self.pcpu.backing().fallible_calls();
        let result = self.pcpu.bring_up(cpu);
        let after = self.recount();
        assert_same(&self.before, &after);
        let is_there = self.pcpu.units().materialised().contains(cpu);
        match result {
            Ok(()) => assert!(is_there),
            Err(CpuError::NotPossible {
                cpu: asked,
                nr_cpu_ids,
            }) => {
                assert_eq!((asked, nr_cpu_ids), (cpu, self.shape.cpus));
                assert!(cpu.get() >= self.shape.cpus);
            }
            Err(CpuError::NoMemory { cpu: asked, error }) => {
                assert_eq!((asked, error), (cpu, BackingError::OutOfFrames));
                assert!(!matches!(self.faults, Faults::None) && !is_there);
            }
            Err(other) => panic!("CPU {cpu} did not come up: {other}"),
        }
        if was_there {
            assert!(is_there);
            assert_eq!(self.pcpu.backing().fallible_calls(), calls);
        } else if cpu.get() < self.shape.cpus {
            for (&address, area) in &self.live {
                assert_zero(&self.pcpu, (address, area.bytes), cpu);
                if is_there {
                    stamp(&self.pcpu, (address, area.bytes));
                }
            }
        }
    }

    fn check_stamps(&self, address: usize, bytes: usize) {
        for cpu in self.pcpu.units().possible().iter() {
            if self.pcpu.units().materialised().contains(cpu) {
                assert_stamped(&self.pcpu, (address, bytes), cpu);
            } else {
                assert_zero(&self.pcpu, (address, bytes), cpu);
            }
        }
    }

    /// Frees all and gives all back.
    pub fn end(mut self) {
        self.set_faults(Faults::None);
        for (address, area) in std::mem::take(&mut self.live) {
            self.check_stamps(address, area.bytes);
            let freed = self.pcpu.free_area(address, free_flags(area.region));
            assert_eq!(freed, Ok(()));
        }
        self.pcpu.trim(0);
        let end = self.recount();
        assert_eq!((end.stats.live, end.stats.live_bytes), (0, 0));
        assert_eq!(end.stats.chunks, 1, "later chunks are gone");
        let first_pages = self.pcpu.sizes().populated_pages() as u64;
        assert_eq!(end.stats.populated_pages, first_pages);
    }
}

/// The longest free run of some sections.
fn longest_free_bytes(picture: &Picture, is_wanted: impl Fn(&Section) -> bool) -> usize {
    let sections = picture.sections.iter().filter(|section| is_wanted(section));
    let runs = sections.flat_map(|section| &section.free);
    runs.map(|run| run.end - run.start).max().unwrap_or(0)
}

fn free_flags(region: AllocFlags) -> FreeFlags {
    if region.contains(AllocFlags::RESERVED) {
        FreeFlags::RESERVED
    } else {
        FreeFlags::empty()
    }
}
