//! A CPU that is brought up when others have used their caches for long: it has one too, and what it is handed is zero.

use std::cell::Cell;
use std::sync::atomic::AtomicU32;

use pcpu::Request;
use pcpu::backing::sim::{Machine, SimAllocator};
use pcpu::cache::Seat;
use pcpu::this_cpu::{FenceError, Pair, Put, RemotePairs};
use pcpu::unit::CpuId;

use crate::copies::{assert_stamped, assert_zero, stamp};
use crate::machine::{REQUEST, SLOTS, Watched, free_at, live_areas, seat, with_caches};
use crate::small::small_machine;

/// Allocates so many areas of 64 bytes, which must be zero on every CPU, and stamps them.
fn allocate(pcpu: &SimAllocator, seat: &impl Seat, count: usize) -> Vec<usize> {
    let allocate = |_| {
        let address = pcpu.allocate_at(seat, &REQUEST).unwrap();
        for cpu in pcpu.units().possible().iter() {
            assert_zero(pcpu, (address, 64), cpu);
        }
        stamp(pcpu, (address, 64));
        address
    };
    (0..count).map(allocate).collect()
}

/// The seat of a CPU that looks at its copies before it has memory. It takes and puts nothing.
struct Early {
    cpu: CpuId,
    offset: usize,
    writes: Cell<u32>,
}

impl Early {
    fn new(pcpu: &SimAllocator, cpu: u32) -> Self {
        let cpu = CpuId::new(cpu);
        assert!(!pcpu.units().materialised().contains(cpu));
        Self {
            cpu,
            offset: pcpu.units().offset(cpu).expect("possible"),
            writes: Cell::new(0),
        }
    }

    fn word<T>(&self, at: usize) -> *mut T {
        std::ptr::with_exposed_provenance_mut(at.wrapping_add(self.offset))
    }
}

// SAFETY: nobody else works on the copies of that CPU, and what is read there is words.
unsafe impl Seat for Early {
    fn cpu(&self) -> CpuId {
        self.cpu
    }

    unsafe fn take_slot(&self, _: usize, _: u64, _: u64, _: &AtomicU32) -> Option<Pair> {
        None
    }

    unsafe fn put_slot(&self, _: usize, _: u64, _: u64, _: &AtomicU32) -> Put {
        Put::Elsewhere
    }

    unsafe fn replace_pair_gated(&self, _: usize, _: Pair, _: Pair, _: &AtomicU32) -> bool {
        self.writes.set(self.writes.get() + 1);
        false
    }

    unsafe fn peek_pair(&self, at: usize) -> Option<Pair> {
        // SAFETY: the copies of the first chunk can be read on every CPU.
        Some(unsafe { self.word::<Pair>(at).read() })
    }

    unsafe fn peek_word(&self, at: usize) -> Option<u64> {
        // SAFETY: as above.
        Some(unsafe { self.word::<u64>(at).read() })
    }

    unsafe fn replace_word(&self, _: usize, _: u64, _: u64) -> bool {
        self.writes.set(self.writes.get() + 1);
        true
    }

    unsafe fn read_link(&self, _: usize) -> u32 {
        0
    }

    unsafe fn write_link(&self, _: usize, _: u32) {
        self.writes.set(self.writes.get() + 1);
    }

    fn remote_pairs(&self) -> RemotePairs {
        RemotePairs::Never
    }

    unsafe fn replace_remote_pair(&self, _: *mut Pair, _: Pair, _: Pair) -> bool {
        false
    }

    fn wait_for_gated(&self) -> Result<(), FenceError> {
        Err(FenceError::Unsupported)
    }
}

/// A CPU without memory that allocates and frees: its copies are left alone, and others' caches need not share with it.
#[test]
fn a_cpu_without_memory_has_no_cache() {
    let misses_after = |asked_there: usize| {
        let pcpu = with_caches(&Machine::new(4).online(2));
        let (first, early) = (seat(&pcpu, 0), Early::new(&pcpu, 3));
        let fill = Request::new(4096, 8);
        let fill: Vec<_> = (0..500)
            .map(|_| pcpu.allocate_at(&first, &fill).unwrap())
            .collect();
        for _ in 0..asked_there {
            let address = pcpu.allocate_at(&early, &Request::new(48, 8)).unwrap();
            free_at(&pcpu, &early, address).unwrap();
        }
        assert_eq!(early.writes.get(), 0, "nobody writes to its copies");
        let misses = pcpu.stats().cache_misses;
        let areas: Vec<_> = (0..64)
            .map(|_| pcpu.allocate_at(&first, &Request::new(128, 8)).unwrap())
            .collect();
        let misses = pcpu.stats().cache_misses - misses;
        for address in fill.into_iter().chain(areas) {
            free_at(&pcpu, &first, address).unwrap();
        }
        misses
    };
    assert_eq!(misses_after(1000), misses_after(0));
}

#[test]
fn a_cpu_that_comes_late_has_a_cache() {
    let machine = small_machine(4).online(2);
    for machine in [machine.clone(), machine.dirty_memory()] {
        let pcpu = with_caches(&machine);
        let first = seat(&pcpu, 0);
        let late = CpuId::new(3);
        // Half of a fresh run is handed out later; a run of another class is used over and over.
        let mut live = allocate(&pcpu, &first, SLOTS / 2);
        let other = Request::new(32, 32);
        for _ in 0..3 {
            let areas: Vec<_> = (0..16)
                .map(|_| pcpu.allocate_at(&first, &other).unwrap())
                .collect();
            for address in areas {
                stamp(&pcpu, (address, 32));
                free_at(&pcpu, &first, address).unwrap();
            }
        }

        let absent = Watched::new(seat(&pcpu, 3), |_| ());
        live.extend(allocate(&pcpu, &absent, 3));
        assert_eq!(absent.taken(), 0, "a CPU without memory has no runs");
        pcpu.bring_up(late).unwrap();
        for &address in &live {
            assert_zero(&pcpu, (address, 64), late);
            stamp(&pcpu, (address, 64));
        }
        live.extend(allocate(&pcpu, &first, SLOTS / 2));
        let again = pcpu.allocate_at(&first, &other).unwrap();
        assert_zero(&pcpu, (again, 32), late);

        let here = Watched::new(seat(&pcpu, 3), |_| ());
        let mine = allocate(&pcpu, &here, 2 * SLOTS);
        assert!(here.taken() >= SLOTS as u64, "it has runs of its own");
        // Reused: put by their own CPU, and collected from others.
        for &address in &mine[SLOTS..] {
            free_at(&pcpu, &here, address).unwrap();
        }
        let reused = allocate(&pcpu, &here, SLOTS);
        assert_eq!(sorted(&reused), sorted(&mine[SLOTS..]));
        for &address in &reused {
            free_at(&pcpu, &first, address).unwrap();
        }
        let collected = allocate(&pcpu, &here, SLOTS);
        assert_eq!(sorted(&collected), sorted(&reused));

        live.extend(&mine[..SLOTS]);
        live.extend(collected);
        for cpu in [0, 1, 3].map(CpuId::new) {
            live.iter()
                .for_each(|&address| assert_stamped(&pcpu, (address, 64), cpu));
        }
        live.push(again);
        assert!(live_areas(&pcpu).into_keys().eq(sorted(&live)));
        for address in live {
            free_at(&pcpu, &here, address).unwrap();
        }
        pcpu.drain(&here);
        assert_eq!((pcpu.stats().live, pcpu.stats().late_errors), (0, 0));
    }
}

fn sorted(addresses: &[usize]) -> Vec<usize> {
    let mut addresses = addresses.to_vec();
    addresses.sort_unstable();
    addresses
}
