//! Any work on the caches of a few CPUs, against a model that knows which areas are live: areas are disjoint, zero where that
//! was asked for, written by nobody but their owner; what is wrong is refused, and counted is what there is.

#[path = "../tests/common/copies.rs"]
mod copies;
#[path = "../tests/common/small.rs"]
mod small;

use std::collections::BTreeMap;

use pcpu::backing::Backing;
use pcpu::backing::sim::SimAllocator;
use pcpu::cache::LockedSeat;
use pcpu::stats::MapItem;
use pcpu::unit::{CpuId, GRANULE_BYTES};
use pcpu::{AllocError, AllocFlags, FreeError, FreeFlags, Request};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::FileFailurePersistence;

use copies::{assert_stamped, assert_zero, stamp};
use small::small_machine;

/// CPUs that there may be, and those that there are at first.
const CPUS: u32 = 4;
const ONLINE: u32 = 2;

#[derive(Debug, Clone)]
enum Op {
    /// So many of one kind, on a CPU.
    Allocate(u32, Request, usize),
    /// So many live ones in order of their addresses, on a CPU.
    Free(u32, Index, usize),
    /// Without saying where.
    FreePlain(Index),
    /// What was freed lately, once more.
    FreeAgain(u32, Index),
    /// So many bytes into a live area, or behind it.
    FreeNear(u32, Index, usize),
    Drain(u32),
    Upkeep,
    Trim,
    BringUp(u32),
    Look,
}

fn requests() -> impl Strategy<Value = Request> {
    let sizes = prop_oneof![
        4 => (0_u32..7).prop_map(|shift| 4_usize << shift),
        2 => 1_usize..200,
        1 => 1_usize..5000,
    ];
    let aligns = prop_oneof![6 => 0_u32..4, 1 => 0_u32..13].prop_map(|shift| 1_usize << shift);
    let flags = prop_oneof![
        Just(AllocFlags::empty()),
        Just(AllocFlags::ATOMIC),
        Just(AllocFlags::TRY),
        Just(AllocFlags::NO_ZERO),
    ];
    (sizes, aligns, flags)
        .prop_map(|(bytes, align, flags)| Request::new(bytes, align).with_flags(flags))
}

fn ops() -> impl Strategy<Value = Op> {
    let seat = || 0..3_u32;
    let any = any::<Index>;
    prop_oneof![
        10 => (seat(), requests(), 1_usize..14).prop_map(|(a, b, c)| Op::Allocate(a, b, c)),
        8 => (seat(), any(), 1_usize..14).prop_map(|(a, b, c)| Op::Free(a, b, c)),
        1 => any().prop_map(Op::FreePlain),
        3 => (0..4_u32, any()).prop_map(|(a, b)| Op::FreeAgain(a, b)),
        2 => (0..4_u32, any(), 0_usize..300).prop_map(|(a, b, c)| Op::FreeNear(a, b, c)),
        1 => (0..4_u32).prop_map(Op::Drain),
        1 => Just(Op::Upkeep),
        1 => Just(Op::Trim),
        1 => (0..CPUS).prop_map(Op::BringUp),
        1 => Just(Op::Look),
    ]
}

struct Run {
    pcpu: SimAllocator,
    /// The bytes of the live areas, rounded up to the grain.
    live: BTreeMap<usize, usize>,
    freed: Vec<usize>,
    allocs: u64,
}

impl Run {
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

    fn nth_live(&self, index: Index) -> Option<usize> {
        (!self.live.is_empty())
            .then(|| *self.live.keys().nth(index.index(self.live.len())).unwrap())
    }

    fn allocate(&mut self, cpu: u32, request: Request) {
        let address = match self.pcpu.allocate_at(&self.seat(cpu), &request) {
            Ok(address) => address,
            Err(AllocError::Busy) => {
                assert!(request.flags.contains(AllocFlags::TRY));
                return;
            }
            // There is room for so many only.
            Err(AllocError::Backing(_)) => return,
            Err(error) => panic!("{error}"),
        };
        let bytes = request.bytes.next_multiple_of(GRANULE_BYTES);
        assert!(address.is_multiple_of(request.align.max(GRANULE_BYTES)));
        if let Some((&below, &len)) = self.live.range(..address + bytes).next_back() {
            assert!(below + len <= address, "{address:#x} overlaps {below:#x}");
        }
        for cpu in self.pcpu.units().possible().iter() {
            let is_there = self.pcpu.units().materialised().contains(cpu);
            if !is_there || !request.flags.contains(AllocFlags::NO_ZERO) {
                assert_zero(&self.pcpu, (address, bytes), cpu);
            }
        }
        stamp(&self.pcpu, (address, bytes));
        self.live.insert(address, bytes);
        self.freed.retain(|&freed| freed != address);
        self.allocs += 1;
    }

    /// Looks at the copies of an area that is about to be freed; they stay dirty.
    fn forget(&mut self, address: usize) {
        let bytes = self.live.remove(&address).unwrap();
        for cpu in self.pcpu.units().materialised().iter() {
            assert_stamped(&self.pcpu, (address, bytes), cpu);
        }
        self.freed.push(address);
    }

    fn refuse(&self, cpu: u32, address: usize) {
        let error = self
            .free_at(cpu, address)
            .expect_err("nothing starts there");
        match error {
            FreeError::NotAllocated { address: at }
            | FreeError::Interior { address: at, .. }
            | FreeError::Misaligned { address: at }
            | FreeError::Foreign { address: at } => assert_eq!(at, address),
            error => panic!("{error}"),
        }
    }

    fn look(&self) {
        let pitch_bytes = self.pcpu.backing().window().pitch_bytes;
        let mut seen = BTreeMap::new();
        self.pcpu.visit_map(|place, item| {
            if let MapItem::Area(range) = item {
                let chunk = self.pcpu.neutral_base() + place as usize * pitch_bytes;
                seen.insert(chunk + range.start, range.len());
            }
        });
        assert_eq!(seen, self.live);
        let stats = self.pcpu.stats();
        let live_bytes: usize = self.live.values().sum();
        assert_eq!(
            (stats.allocs, stats.live, stats.live_bytes),
            (self.allocs, self.live.len() as u64, live_bytes as u64)
        );
        assert_eq!(stats.late_errors, 0);
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Allocate(cpu, request, count) => {
                (0..count).for_each(|_| self.allocate(cpu, request));
            }
            Op::Free(cpu, index, count) => {
                let Some(first) = self.nth_live(index) else {
                    return;
                };
                let areas: Vec<_> = self
                    .live
                    .range(first..)
                    .take(count)
                    .map(|(&at, _)| at)
                    .collect();
                for address in areas {
                    self.forget(address);
                    self.free_at(cpu, address).unwrap();
                }
            }
            Op::FreePlain(index) => {
                if let Some(address) = self.nth_live(index) {
                    self.forget(address);
                    // SAFETY: an area of the run's, which it does not use any more.
                    unsafe { self.pcpu.free_with(address, FreeFlags::empty()) }.unwrap();
                }
            }
            Op::FreeAgain(cpu, index) => {
                if !self.freed.is_empty() {
                    self.refuse(cpu, self.freed[index.index(self.freed.len())]);
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
            Op::Upkeep => {
                self.pcpu.upkeep();
            }
            Op::Trim => {
                self.pcpu.trim(0);
            }
            Op::BringUp(cpu) => self.bring_up(CpuId::new(cpu)),
            Op::Look => self.look(),
        }
    }

    fn bring_up(&mut self, cpu: CpuId) {
        let is_new = !self.pcpu.units().materialised().contains(cpu);
        self.pcpu.bring_up(cpu).unwrap();
        if is_new {
            for (&address, &bytes) in &self.live {
                assert_zero(&self.pcpu, (address, bytes), cpu);
                stamp(&self.pcpu, (address, bytes));
            }
        }
    }

    fn end(mut self) {
        self.look();
        while let Some((&address, _)) = self.live.first_key_value() {
            self.forget(address);
            self.free_at(1, address).unwrap();
        }
        self.pcpu.drain(&self.seat(0));
        self.pcpu.trim(0);
        self.look();
        let stats = self.pcpu.stats();
        assert_eq!(
            stats.populated_pages,
            self.pcpu.sizes().populated_pages() as u64
        );
        assert_eq!(stats.chunks, 1);
    }
}

/// What fails is kept in a file beside this one and tried first from then on.
fn config() -> ProptestConfig {
    let found = FileFailurePersistence::Direct("proptests/caches.regressions");
    ProptestConfig {
        cases: 400,
        failure_persistence: Some(Box::new(found)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn caches_do_what_the_model_says(ops in prop::collection::vec(ops(), 1..120)) {
        let mut pcpu = small_machine(CPUS).online(ONLINE).dirty_memory().build().unwrap();
        pcpu.enable_caches().unwrap();
        let mut run = Run { pcpu, live: BTreeMap::new(), freed: Vec::new(), allocs: 0 };
        for op in ops {
            run.step(op);
        }
        run.end();
    }
}
