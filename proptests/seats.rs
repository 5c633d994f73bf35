//! A model of what several CPUs do with one instance: plain, with caches, or hardened. It knows which areas are live, and which
//! bytes nobody may write.
//!
//! What is held: areas are disjoint, aligned, zero where that was asked for, written by nobody but their owner; what is wrong is
//! refused; what is written where nobody may write is found, and nothing else is; counted is what there is.
//!
//! It looks at what an operation is about, and at everything only when asked to: `model.rs` looks at everything each time, and is
//! slow.

use std::cell::RefCell;
use std::collections::BTreeMap;

use pcpu::backing::Backing;
use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::cache::LockedSeat;
use pcpu::hardened::{Finding, FindingHook, FindingKind, Hardening};
use pcpu::stats::MapItem;
use pcpu::unit::{CpuId, GRANULE_BYTES};
use pcpu::{AllocError, AllocFlags, CpuError, FreeError, FreeFlags, FreeManyError, Request};

/// What stands before the allocator itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    Nothing,
    Caches,
    /// Guards so long, so many areas in quarantine.
    Hardened(usize, u32),
}

/// How a batch is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// On a CPU.
    At(u32),
    /// Without saying where.
    Plain,
}

/// CPUs are those of a seat; where a number names a live area, any number does.
#[derive(Debug, Clone)]
pub enum Op {
    /// So many of one kind, on a CPU.
    Allocate(u32, Request, usize),
    /// So many live ones in order of their addresses, on a CPU.
    Free(u32, usize, usize),
    /// Without saying where.
    FreePlain(usize),
    /// What was freed lately, once more.
    FreeAgain(u32, usize),
    /// So many bytes into a live area, or behind it.
    FreeNear(u32, usize, usize),
    Drain(u32),
    Upkeep,
    Trim,
    BringUp(u32),
    Look,
    /// The calls of the backing fail whose bit is set, over and over.
    Faults(u64),
    /// On a CPU, so many bytes before a live area, or behind it if it is positive.
    WriteGuard(u32, usize, isize, u8),
    /// Frees a live area, and writes to a CPU's copy of it.
    FreeAndWrite(u32, usize, usize, u8),
    /// So many of one kind at one go.
    AllocateMany(Way, Request, usize),
    /// So many live ones in order of their addresses, at one go.
    FreeMany(Way, usize, usize),
    /// The same, and behind so many of them what was freed lately, or in this very batch.
    FreeManyAgain(Way, usize, usize, usize),
}

pub struct Run {
    pcpu: SimAllocator,
    front: Front,
    /// The bytes of the live areas, as asked for.
    live: BTreeMap<usize, usize>,
    freed: Vec<usize>,
    allocs: u64,
    may_fault: bool,
}

thread_local! {
    static FOUND: RefCell<Vec<Finding>> = const { RefCell::new(Vec::new()) };
}

/// Keeps what is found on this thread.
struct Keeper;

impl FindingHook for Keeper {
    fn found(&self, finding: &Finding) {
        FOUND.with_borrow_mut(|found| found.push(*finding));
    }
}

fn found() -> Vec<Finding> {
    FOUND.take()
}

fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(GRANULE_BYTES)
}

impl Run {
    pub fn new(machine: &Machine, front: Front) -> Self {
        found();
        let mut pcpu = machine.build().expect("nothing fails yet");
        match front {
            Front::Nothing => {}
            Front::Caches => pcpu.enable_caches().expect("nothing fails yet"),
            Front::Hardened(guard_bytes, quarantine_areas) => pcpu
                .harden(Hardening {
                    guard_bytes,
                    quarantine_areas,
                    hook: &Keeper,
                })
                .expect("nothing fails yet"),
        }
        Self {
            pcpu,
            front,
            live: BTreeMap::new(),
            freed: Vec::new(),
            allocs: 0,
            may_fault: false,
        }
    }

    /// Does it to both.
    pub fn step(&mut self, op: &Op) {
        match *op {
            Op::Allocate(cpu, request, count) => {
                (0..count).for_each(|_| self.allocate(cpu, request));
            }
            Op::Free(cpu, index, count) => {
                for address in self.some_live(index, count) {
                    self.forget(address);
                    self.free_at(cpu, address).expect("it is live");
                }
            }
            Op::FreePlain(index) => {
                if let Some(address) = self.nth_live(index) {
                    self.forget(address);
                    // SAFETY: an area of the run's, which it does not use any more.
                    let freed = unsafe { self.pcpu.free_with(address, FreeFlags::empty()) };
                    freed.expect("it is live");
                }
            }
            Op::FreeAgain(cpu, index) => {
                if let Some(nth) = index.checked_rem(self.freed.len()) {
                    self.refuse(cpu, self.freed[nth]);
                }
            }
            Op::FreeNear(cpu, index, by) => {
                if let Some(address) = self.nth_live(index)
                    && !self.live.contains_key(&(address + by))
                {
                    self.refuse(cpu, address + by);
                }
            }
            Op::Drain(cpu) => self.pcpu.drain(&self.seat(cpu)),
            Op::Upkeep => drop(self.pcpu.upkeep()),
            Op::Trim => drop(self.pcpu.trim(0)),
            Op::BringUp(cpu) => self.bring_up(CpuId::new(cpu)),
            Op::Look => self.look(),
            Op::Faults(bits) => {
                self.may_fault = bits != 0;
                let backing = self.pcpu.backing();
                backing.set_faults(move |call| bits >> (call % 64) & 1 != 0);
            }
            Op::WriteGuard(cpu, index, by, byte) => self.write_guard(cpu, index, by, byte),
            Op::FreeAndWrite(cpu, index, at, byte) => self.free_and_write(cpu, index, at, byte),
            Op::AllocateMany(way, request, count) => self.allocate_many(way, request, count),
            Op::FreeMany(way, index, count) => {
                let batch = self.some_live(index, count);
                for &address in &batch {
                    self.forget(address);
                }
                self.free_many(way, &batch).expect("all are live");
            }
            Op::FreeManyAgain(way, index, count, behind) => {
                let mut batch = self.some_live(index, count);
                let behind = behind % (batch.len() + 1);
                for &address in &batch[..behind] {
                    self.forget(address);
                }
                let Some(nth) = index.checked_rem(self.freed.len()) else {
                    return;
                };
                batch.insert(behind, self.freed[nth]);
                let refused = self.free_many(way, &batch).expect_err("one is not live");
                assert_eq!(refused.freed, behind, "{refused}");
                Self::check_refused(refused.error, self.freed[nth]);
            }
        }
    }

    fn seat(&self, cpu: u32) -> LockedSeat {
        // SAFETY: all seats of the instance are such.
        unsafe { LockedSeat::new(self.pcpu.units(), CpuId::new(cpu)) }
    }

    fn free_at(&self, cpu: u32, address: usize) -> Result<(), FreeError> {
        // SAFETY: an area of the run's, which it does not use any more; anything else is refused.
        unsafe {
            self.pcpu
                .free_at(&self.seat(cpu), address, FreeFlags::empty())
        }
    }

    fn nth_live(&self, index: usize) -> Option<usize> {
        let nth = index.checked_rem(self.live.len())?;
        self.live.keys().nth(nth).copied()
    }

    /// So many live areas, in order of their addresses.
    fn some_live(&self, index: usize, count: usize) -> Vec<usize> {
        let first = self.nth_live(index).unwrap_or(0);
        let areas = self.live.range(first..).take(count);
        areas.map(|(&at, _)| at).collect()
    }

    fn allocate(&mut self, cpu: u32, request: Request) {
        match self.pcpu.allocate_at(&self.seat(cpu), &request) {
            Ok(address) => self.take_over(address, &request),
            Err(error) => self.check_alloc_error(&request, error),
        }
    }

    /// All of them, or none.
    fn allocate_many(&mut self, way: Way, request: Request, count: usize) {
        let mut batch = vec![0; count];
        let result = match way {
            Way::At(cpu) => {
                let seat = self.seat(cpu);
                self.pcpu.allocate_many_at(&seat, &request, &mut batch)
            }
            Way::Plain => self.pcpu.allocate_many(&request, &mut batch),
        };
        match result {
            Ok(()) => {
                for address in batch {
                    self.take_over(address, &request);
                }
            }
            Err(error) => self.check_alloc_error(&request, error),
        }
        // Each area lives, or none of them does.
        self.look();
    }

    fn free_many(&self, way: Way, batch: &[usize]) -> Result<(), FreeManyError> {
        let flags = FreeFlags::empty();
        // SAFETY: areas of the run's, which it does not use any more; anything else is refused.
        unsafe {
            match way {
                Way::At(cpu) => self.pcpu.free_many_at(&self.seat(cpu), batch, flags),
                Way::Plain => self.pcpu.free_many(batch, flags),
            }
        }
    }

    /// Panics unless the model knows why a request was refused.
    fn check_alloc_error(&self, request: &Request, error: AllocError) {
        match error {
            AllocError::Busy => assert!(request.flags().contains(AllocFlags::TRY)),
            // There is room for so many only.
            AllocError::Backing(_) => {}
            AllocError::TooLarge { limit_bytes, .. } => {
                // Guards need room too.
                assert!(matches!(self.front, Front::Hardened(..)), "{error}");
                assert!(request.bytes() > limit_bytes);
            }
            error => panic!("{error}"),
        }
    }

    /// Looks at an area that was handed out, and fills it.
    fn take_over(&mut self, address: usize, request: &Request) {
        let bytes = request.bytes();
        assert!(address.is_multiple_of(request.align().max(GRANULE_BYTES)));
        if let Some((&below, &len)) = self.live.range(..address + rounded(bytes)).next_back() {
            assert!(
                below + rounded(len) <= address,
                "{address:#x} overlaps {below:#x}"
            );
        }
        for cpu in self.pcpu.units().possible().iter() {
            let is_there = self.pcpu.units().materialised().contains(cpu);
            if !is_there || !request.flags().contains(AllocFlags::NO_ZERO) {
                self.assert_filled((address, bytes), cpu, 0);
            }
            if is_there {
                self.fill((address, bytes), cpu);
            }
        }
        self.live.insert(address, bytes);
        self.freed.retain(|&freed| freed != address);
        self.allocs += 1;
    }

    fn copy(&self, address: usize, cpu: CpuId) -> *mut u8 {
        let copy = self.pcpu.per_cpu_address(address, cpu);
        std::ptr::with_exposed_provenance_mut(copy.expect("the CPU is possible"))
    }

    /// What the owner of an area writes to each byte of a CPU's copy.
    fn byte(address: usize, cpu: CpuId) -> u8 {
        let of_area = (address / GRANULE_BYTES % 31) as u8;
        1 + 8 * of_area + (cpu.get() % 7) as u8
    }

    fn fill(&self, (address, bytes): (usize, usize), cpu: CpuId) {
        // SAFETY: a live area of the run's, and the CPU is there.
        unsafe {
            self.copy(address, cpu)
                .write_bytes(Self::byte(address, cpu), bytes)
        };
    }

    fn assert_filled(&self, (address, bytes): (usize, usize), cpu: CpuId, byte: u8) {
        // SAFETY: a live area of the run's, so that nobody writes to it now.
        let copy = unsafe { std::slice::from_raw_parts(self.copy(address, cpu), bytes) };
        // One comparison, however long: all are like the first.
        let is_filled = copy.first() == Some(&byte) && copy[1..] == copy[..bytes - 1];
        assert!(
            is_filled,
            "CPU {cpu}'s copy of {address:#x}, {bytes} bytes, is not all {byte:#x}: {copy:x?}"
        );
    }

    /// Looks at the copies of an area that is about to be freed; they stay dirty.
    fn forget(&mut self, address: usize) -> usize {
        let bytes = self.live.remove(&address).expect("it is live");
        for cpu in self.pcpu.units().materialised().iter() {
            self.assert_filled((address, bytes), cpu, Self::byte(address, cpu));
        }
        self.freed.push(address);
        bytes
    }

    fn refuse(&self, cpu: u32, address: usize) {
        let error = self
            .free_at(cpu, address)
            .expect_err("nothing starts there");
        Self::check_refused(error, address);
    }

    fn check_refused(error: FreeError, address: usize) {
        match error {
            FreeError::NotAllocated { address: at }
            | FreeError::Interior { address: at, .. }
            | FreeError::Misaligned { address: at }
            | FreeError::Foreign { address: at } => assert_eq!(at, address),
            error => panic!("{error}"),
        }
    }

    fn write_guard(&mut self, cpu: u32, index: usize, by: isize, byte: u8) {
        let (Front::Hardened(guard_bytes, _), Some(address)) = (self.front, self.nth_live(index))
        else {
            return;
        };
        let bytes = self.live[&address];
        let cpu = CpuId::new(cpu);
        let by = by % guard_bytes as isize;
        let (kind, at_bytes) = match by {
            ..0 => (FindingKind::WrittenBefore, by),
            _ => (FindingKind::WrittenBehind, bytes as isize + by),
        };
        self.write_wrongly((address, bytes), cpu, at_bytes, byte, kind);
    }

    fn free_and_write(&mut self, cpu: u32, index: usize, at: usize, byte: u8) {
        let (Front::Hardened(..), Some(address)) = (self.front, self.nth_live(index)) else {
            return;
        };
        let bytes = self.forget(address);
        self.free_at(0, address).expect("it is live");
        let at_bytes = (at % bytes) as isize;
        let kind = FindingKind::WrittenAfterFree;
        self.write_wrongly((address, bytes), CpuId::new(cpu), at_bytes, byte, kind);
    }

    /// Writes where nobody may, and has it found.
    fn write_wrongly(
        &self,
        (address, bytes): (usize, usize),
        cpu: CpuId,
        at_bytes: isize,
        byte: u8,
        kind: FindingKind,
    ) {
        if !self.pcpu.units().materialised().contains(cpu) {
            return;
        }
        assert_eq!((self.pcpu.check_areas(), found().len()), (0, 0));
        let at = self.copy(address, cpu).wrapping_offset(at_bytes);
        // SAFETY: it is the instance's memory, which does nothing now.
        let was = unsafe { at.replace(byte) };
        let count = self.pcpu.check_areas();
        let found = found();
        assert_eq!((count, found.len()), (usize::from(was != byte), count));
        for finding in found {
            let expected = (kind, address, bytes, cpu, at_bytes, byte);
            let (kind, at) = (finding.kind, finding.address);
            let told = (
                kind,
                at,
                finding.bytes,
                finding.cpu,
                finding.at_bytes,
                finding.found,
            );
            assert_eq!(told, expected);
        }
    }

    fn look(&self) {
        let live = self.live.iter().map(|(&at, &bytes)| (at, bytes));
        let stats = self.pcpu.stats();
        assert_eq!(stats.allocs, self.allocs);
        if let Front::Hardened(..) = self.front {
            let mut seen = BTreeMap::new();
            self.pcpu.visit_live_areas(|area| {
                seen.insert(area.address, area.bytes);
            });
            assert_eq!(seen, self.live);
            assert_eq!((self.pcpu.check_areas(), found().len()), (0, 0));
            return;
        }
        let pitch_bytes = self.pcpu.backing().window().pitch_bytes;
        let mut seen = BTreeMap::new();
        self.pcpu.visit_map(|place, item| {
            if let MapItem::Area(range) = item {
                let chunk = self.pcpu.neutral_base() + place as usize * pitch_bytes;
                seen.insert(chunk + range.start, range.len());
            }
        });
        assert!(live.clone().map(|(at, _)| at).eq(seen.keys().copied()));
        for (at, bytes) in live {
            // A cache's may be longer: by a third if their size is no multiple of their alignment.
            let rounded = rounded(bytes);
            let found = seen[&at];
            assert!(
                (rounded..=rounded * 4 / 3).contains(&found),
                "{found} for {bytes}"
            );
        }
        let live_bytes: usize = seen.values().sum();
        assert_eq!(
            (stats.live, stats.live_bytes),
            (seen.len() as u64, live_bytes as u64)
        );
        assert_eq!(stats.late_errors, 0);
    }

    fn bring_up(&mut self, cpu: CpuId) {
        let is_new = !self.pcpu.units().materialised().contains(cpu);
        match self.pcpu.bring_up(cpu) {
            Ok(()) => {}
            Err(CpuError::NoMemory { .. }) if self.may_fault => return,
            Err(CpuError::NotPossible { .. }) => {
                assert_eq!(self.pcpu.per_cpu_address(0, cpu).ok(), None);
                return;
            }
            Err(error) => panic!("{error}"),
        }
        if is_new {
            for (&address, &bytes) in &self.live {
                self.assert_filled((address, bytes), cpu, 0);
                self.fill((address, bytes), cpu);
            }
        }
    }

    /// Frees all and gives all back.
    pub fn end(mut self) {
        self.step(&Op::Faults(0));
        self.look();
        while let Some((&address, _)) = self.live.first_key_value() {
            self.forget(address);
            self.free_at(1, address).expect("it is live");
        }
        self.pcpu.drain(&self.seat(0));
        self.pcpu.trim(0);
        self.look();
        let stats = self.pcpu.stats();
        assert_eq!(
            stats.populated_pages,
            self.pcpu.sizes().populated_pages() as u64
        );
        assert_eq!((stats.chunks, found().len()), (1, 0));
    }
}
