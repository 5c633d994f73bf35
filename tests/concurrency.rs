//! Several threads on one instance; and, where a backing stands still at a chosen moment, what goes on meanwhile.

#[path = "common/audit.rs"]
mod audit;
#[path = "common/copies.rs"]
mod copies;
#[path = "common/free.rs"]
mod free;
#[path = "common/gate.rs"]
mod gate;
#[path = "common/small.rs"]
mod small;

use free::FreeArea;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use pcpu::backing::sim::SimAllocator;
use pcpu::stats::{Event, EventHook};
use pcpu::unit::CpuId;
use pcpu::{AllocError, AllocFlags, FreeError, FreeFlags, Request};

use audit::audit;
use copies::{assert_stamped, assert_zero, stamp};
use gate::{Gated, Step, Verdict, assert_pages_agree, gated_machine};
use small::{UNIT_BYTES, small_machine};

const PAGE: Request = Request::new(4096, 4096);
const ATOMIC: AllocFlags = AllocFlags::ATOMIC;
const TRY: AllocFlags = AllocFlags::TRY;

/// Numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }
}

/// Checks the order of the events of each address, and counts.
#[derive(Default)]
struct Order {
    live: Mutex<BTreeMap<usize, usize>>,
    allocs: AtomicU64,
    frees: AtomicU64,
    failures: AtomicU64,
    chunks_made: AtomicU64,
    chunks_destroyed: AtomicU64,
}

impl EventHook for Order {
    fn event(&self, event: &Event) {
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        match *event {
            Event::Alloc { address, bytes, .. } => {
                let before = self.live.lock().unwrap().insert(address, bytes);
                assert_eq!(before, None, "{address:#x} was handed out twice");
                count(&self.allocs);
            }
            Event::Free { address, .. } => {
                let before = self.live.lock().unwrap().remove(&address);
                assert!(
                    before.is_some(),
                    "{address:#x} was freed, and not handed out"
                );
                count(&self.frees);
            }
            Event::Failure { .. } => {
                count(&self.failures);
            }
            Event::ChunkCreated { .. } => {
                count(&self.chunks_made);
            }
            Event::ChunkDestroyed { .. } => {
                count(&self.chunks_destroyed);
            }
            _ => {}
        }
    }
}

/// An area on its way from the thread that allocated it to the one that frees it.
struct Parcel {
    area: (usize, usize),
    flags: FreeFlags,
}

fn allocate(pcpu: &SimAllocator, numbers: &mut Numbers) -> Option<Parcel> {
    let bytes = match numbers.next(8) {
        0 => 1 + numbers.next(32 << 10),
        1 | 2 => 1 + numbers.next(6000),
        _ => 1 + numbers.next(300),
    };
    let align = 1 << numbers.next(if bytes > 4096 { 13 } else { 8 });
    let (flags, free_flags) = match numbers.next(8) {
        0 => (TRY, FreeFlags::TRY),
        1 if bytes < 300 => (AllocFlags::RESERVED, FreeFlags::RESERVED),
        2 | 3 => (ATOMIC, FreeFlags::ATOMIC),
        _ => (AllocFlags::empty(), FreeFlags::empty()),
    };
    match pcpu.allocate(&Request::new(bytes, align).with_flags(flags)) {
        Ok(address) => {
            for cpu in pcpu.units().possible().iter() {
                assert_zero(pcpu, (address, bytes), cpu);
            }
            stamp(pcpu, (address, bytes));
            Some(Parcel {
                area: (address, bytes),
                flags: free_flags,
            })
        }
        Err(AllocError::Busy) => {
            assert!(
                flags.contains(TRY),
                "who may wait is not told to come again"
            );
            None
        }
        Err(AllocError::ReservedExhausted { .. }) => {
            assert!(flags.contains(AllocFlags::RESERVED));
            None
        }
        // The window is small, and other threads hold what it has.
        Err(AllocError::Backing(_)) => None,
        Err(error) => panic!("{error}"),
    }
}

fn free(pcpu: &SimAllocator, Parcel { area, flags }: &Parcel) {
    for cpu in pcpu.units().materialised().iter() {
        assert_stamped(pcpu, *area, cpu);
    }
    loop {
        match pcpu.free_area(area.0, *flags) {
            Ok(()) => return,
            Err(FreeError::Busy) => assert!(flags.contains(FreeFlags::TRY)),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn threads_allocate_and_free_each_others_areas() {
    static ORDER: Order = Order {
        live: Mutex::new(BTreeMap::new()),
        allocs: AtomicU64::new(0),
        frees: AtomicU64::new(0),
        failures: AtomicU64::new(0),
        chunks_made: AtomicU64::new(0),
        chunks_destroyed: AtomicU64::new(0),
    };
    let pcpu = small_machine(3).online(2).build().unwrap();
    pcpu.set_event_hook(Some(&ORDER));
    let end = Instant::now() + Duration::from_millis(1000);
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..3).map(|_| mpsc::channel::<Parcel>()).unzip();
    thread::scope(|scope| {
        for (worker, inbox) in receivers.into_iter().enumerate() {
            let outbox = senders[(worker + 1) % 3].clone();
            let pcpu = &pcpu;
            scope.spawn(move || {
                let mut numbers = Numbers(0x9e37_79b9 + worker as u64);
                let mut live = Vec::new();
                while Instant::now() < end {
                    if live.len() < 40 {
                        live.extend(allocate(pcpu, &mut numbers));
                    }
                    if numbers.next(40) < live.len() {
                        let parcel = live.swap_remove(numbers.next(live.len()));
                        match numbers.next(3) {
                            0 => free(pcpu, &parcel),
                            _ => outbox.send(parcel).unwrap(),
                        }
                    }
                    for parcel in inbox.try_iter() {
                        free(pcpu, &parcel);
                    }
                }
                drop(outbox);
                live.iter().for_each(|parcel| free(pcpu, parcel));
                inbox.iter().for_each(|parcel| free(pcpu, &parcel));
            });
        }
        drop(senders);
        scope.spawn(|| {
            let mut numbers = Numbers(77);
            while Instant::now() < end {
                match numbers.next(4) {
                    0 => pcpu.trim(numbers.next(3) as u32),
                    _ => pcpu.upkeep(),
                };
                pcpu.visit_chunks(|_| ());
                thread::yield_now();
            }
        });
    });
    pcpu.trim(0);
    let end = audit(&pcpu);
    assert_eq!((end.stats.live, end.stats.chunks), (0, 1));
    assert!(end.stats.allocs > 1000, "{} allocations", end.stats.allocs);
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert!(ORDER.live.lock().unwrap().is_empty());
    assert_eq!(count(&ORDER.allocs), end.stats.allocs);
    assert_eq!(count(&ORDER.frees), end.stats.frees);
    assert!(count(&ORDER.failures) >= end.stats.failures);
    assert_eq!(count(&ORDER.chunks_made), end.stats.chunks_created);
    assert_eq!(count(&ORDER.chunks_destroyed), end.stats.chunks_destroyed);
}

/// Who must not wait for the lock does not: it is told so, and nothing has changed.
#[test]
fn try_requests_do_not_wait_for_the_lock() {
    let pcpu = small_machine(1).build().unwrap();
    let address = pcpu.allocate(&Request::new(64, 8)).unwrap();
    // The lock is held for as long as the closure runs.
    let mut first = true;
    pcpu.visit_chunks(|_| {
        if !std::mem::replace(&mut first, false) {
            return;
        }
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                (
                    pcpu.allocate(&Request::new(64, 8).with_flags(TRY)),
                    pcpu.allocate(&Request::new(64, 8).with_flags(TRY | AllocFlags::RESERVED)),
                    pcpu.free_area(address, FreeFlags::TRY),
                )
            });
            let busy = Err(AllocError::Busy);
            // Freeing takes no lock.
            assert_eq!(other.join().unwrap(), (busy, busy, Ok(())));
        });
    });
    assert!(!first);
    let stats = audit(&pcpu).stats;
    assert_eq!((stats.allocs, stats.frees), (1, 1));
    assert_eq!(
        pcpu.free_area(address, FreeFlags::TRY),
        Err(FreeError::NotAllocated { address })
    );
    assert!(pcpu.allocate(&Request::new(64, 8).with_flags(TRY)).is_ok());
}

/// Memory that is there serves them; none is populated for them.
#[test]
fn try_requests_populate_nothing() {
    let pcpu = small_machine(1).build().unwrap();
    let whole = Request::new(UNIT_BYTES, 4);
    let before = audit(&pcpu);
    let busy = pcpu.allocate(&whole.with_flags(TRY | ATOMIC));
    assert_eq!(busy, Err(AllocError::Busy));
    let after = audit(&pcpu);
    assert_eq!(before.sections, after.sections);
    let idle = pcpu.allocate(&whole).unwrap();
    pcpu.free_area(idle, FreeFlags::empty()).unwrap();
    pcpu.backing().set_faults(|_| true);
    assert_eq!(pcpu.allocate(&whole.with_flags(TRY)), Ok(idle));
}

/// Allocates, frees and asks, all without waiting. Hangs or fails if somebody holds the lock.
fn use_meanwhile(pcpu: Gated, live: usize) {
    assert_eq!(pcpu.free_area(live, FreeFlags::TRY), Ok(()));
    let again = Request::new(64, 8).with_flags(TRY);
    assert_eq!(pcpu.allocate(&again), Ok(live), "from memory that is there");
    assert_zero(pcpu, (live, 64), CpuId::new(0));
    let other = pcpu.allocate(&PAGE.with_flags(ATOMIC)).unwrap();
    stamp(pcpu, (other, 4096));
    pcpu.free_area(other, FreeFlags::empty()).unwrap();
    assert!(pcpu.stats().live > 0);
}

/// No lock is held while memory is populated, given back, or address space is reserved; and what is being populated or
/// given back is out of everybody's reach.
#[test]
fn the_backing_is_called_without_the_lock() {
    let pcpu = gated_machine(2, 2);
    let live = pcpu.allocate(&Request::new(64, 8)).unwrap();
    stamp(pcpu, (live, 64));
    // Three calls in a row: a chunk is made, then populated; later its pages are given back.
    static SEEN: AtomicU32 = AtomicU32::new(0);
    pcpu.backing().set_guard(move |step| {
        let bit = match step {
            Step::Reserve => 1,
            Step::Populate(_) => 2,
            Step::Depopulate => 4,
            Step::PopulateFor(_) => 8,
        };
        if SEEN.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            use_meanwhile(pcpu, live);
        }
        Verdict::Pass
    });
    let whole = pcpu.allocate(&Request::new(UNIT_BYTES, 4)).unwrap();
    stamp(pcpu, (whole, UNIT_BYTES));
    pcpu.free_area(whole, FreeFlags::empty()).unwrap();
    pcpu.trim(0);
    assert_eq!(SEEN.load(Ordering::Relaxed), 1 | 2 | 4);
    assert_pages_agree(pcpu);
}

/// A page that was out of reach while it was populated is found again afterwards, with the room on both of its sides.
#[test]
fn room_beside_a_page_on_its_way_is_not_lost() {
    let pcpu = gated_machine(1, 1);
    static WAS_HERE: AtomicBool = AtomicBool::new(false);
    pcpu.backing().set_guard(move |step| {
        if step == Step::Populate(0) && !WAS_HERE.swap(true, Ordering::Relaxed) {
            // Does not fit behind the page that is being populated, and gets a chunk of its own.
            pcpu.allocate(&Request::new(UNIT_BYTES - 4000, 4)).unwrap();
        }
        Verdict::Pass
    });
    pcpu.allocate(&Request::new(64, 8)).unwrap();
    assert!(WAS_HERE.load(Ordering::Relaxed));
    assert_eq!(pcpu.stats().chunks, 3);
    let beside = pcpu.allocate(&Request::new(UNIT_BYTES - 64, 4)).unwrap();
    assert_eq!(beside, pcpu.neutral_base() + UNIT_BYTES + 64);
    assert_eq!(
        pcpu.stats().chunks,
        3,
        "there was room without another chunk"
    );
}
