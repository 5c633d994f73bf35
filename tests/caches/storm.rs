//! CPUs come up one after the other while those that are there allocate, free their own and each other's areas, and memory
//! goes back. A thread is a CPU. Every copy of every area is stamped and looked at.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;

use pcpu::backing::sim::SimAllocator;
use pcpu::cache::LockedSeat;
use pcpu::unit::CpuId;
use pcpu::{AllocError, AllocFlags, FreeError, FreeFlags, Request};

use crate::copies::{assert_stamped, assert_zero, stamp_one};
use crate::machine::{seat, with_caches};
use crate::roomy::roomy_machine;
use crate::small::{UNIT_BYTES, small_machine};

const CPUS: u32 = 8;

/// Operations of each CPU, and how many all have done when the next CPU comes.
const STEPS: usize = 4000;
const STEPS_BETWEEN: usize = 2000;

/// A live area.
struct Parcel {
    area: (usize, usize),
    flags: FreeFlags,
    /// The CPUs whose copies are stamped: those that were there when it was allocated.
    stamped: u32,
}

fn materialised(pcpu: &SimAllocator) -> u32 {
    let cpus = pcpu.units().materialised().iter();
    cpus.fold(0, |mask, cpu| mask | 1 << cpu.get())
}

fn cpus_of(mask: u32) -> impl Iterator<Item = CpuId> {
    (0..CPUS)
        .filter(move |cpu| mask >> cpu & 1 != 0)
        .map(CpuId::new)
}

fn allocate(pcpu: &SimAllocator, seat: &LockedSeat, numbers: &mut fastrand::Rng) -> Option<Parcel> {
    let bytes = match numbers.u32(..12) {
        0 => numbers.usize(1..=UNIT_BYTES / 2),
        1..4 => numbers.usize(1..3000),
        _ => 8 << numbers.u32(..5),
    };
    let (flags, free_flags) = match numbers.u32(..6) {
        0 => (AllocFlags::TRY, FreeFlags::TRY),
        1 => (AllocFlags::ATOMIC, FreeFlags::ATOMIC),
        _ => (AllocFlags::empty(), FreeFlags::empty()),
    };
    let request = Request::new(bytes, 8).with_flags(flags);
    match pcpu.allocate_at(seat, &request) {
        Ok(address) => {
            let area = (address, bytes);
            let stamped = materialised(pcpu);
            for cpu in cpus_of(stamped) {
                assert_zero(pcpu, area, cpu);
                stamp_one(pcpu, area, cpu);
            }
            Some(Parcel {
                area,
                flags: free_flags,
                stamped,
            })
        }
        // The window is small.
        Err(AllocError::Backing(_)) => None,
        Err(AllocError::Busy) => {
            assert!(flags.contains(AllocFlags::TRY));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn free(pcpu: &SimAllocator, seat: &LockedSeat, parcel: &Parcel) {
    let area = parcel.area;
    cpus_of(parcel.stamped).for_each(|cpu| assert_stamped(pcpu, area, cpu));
    // Whoever has come since has a copy of its own.
    cpus_of(materialised(pcpu) & !parcel.stamped).for_each(|cpu| assert_zero(pcpu, area, cpu));
    // SAFETY: the parcel is the only one that knows of the area.
    while let Err(error) = unsafe { pcpu.free_at(seat, area.0, parcel.flags) } {
        assert_eq!(error, FreeError::Busy);
        assert!(parcel.flags.contains(FreeFlags::TRY));
    }
}

/// Works as a CPU: comes up, and then its operations.
fn work(
    pcpu: &SimAllocator,
    cpu: u32,
    done: &AtomicUsize,
    inbox: &mpsc::Receiver<Parcel>,
    outboxes: Vec<mpsc::Sender<Parcel>>,
) {
    while done.load(Relaxed) < cpu as usize * STEPS_BETWEEN {
        thread::yield_now();
    }
    pcpu.bring_up(CpuId::new(cpu)).unwrap();
    let seat = seat(pcpu, cpu);
    let mut numbers = fastrand::Rng::with_seed(cpu.into());
    let mut live = Vec::new();
    for _ in 0..STEPS {
        if live.len() < 40 {
            live.extend(allocate(pcpu, &seat, &mut numbers));
        }
        if numbers.usize(..40) < live.len() {
            let parcel = live.swap_remove(numbers.usize(..live.len()));
            match numbers.bool() {
                true => free(pcpu, &seat, &parcel),
                false => outboxes[numbers.usize(..outboxes.len())]
                    .send(parcel)
                    .expect("the others wait for all that is sent"),
            }
        }
        inbox
            .try_iter()
            .for_each(|parcel| free(pcpu, &seat, &parcel));
        done.fetch_add(1, Relaxed);
    }
    drop(outboxes);
    live.iter().for_each(|parcel| free(pcpu, &seat, parcel));
    inbox.iter().for_each(|parcel| free(pcpu, &seat, &parcel));
}

/// A thread that works; none any more when it has ended, be it by a panic.
struct AtWork<'a>(&'a AtomicU32);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

#[test]
fn cpus_come_while_others_work() {
    let [machine, roomy] = [small_machine(CPUS), roomy_machine(CPUS)].map(|all| all.online(1));
    for machine in [
        machine.clone(),
        machine.dirty_memory(),
        roomy.dirty_memory(),
    ] {
        let pcpu = &with_caches(&machine);
        let done = &AtomicUsize::new(0);
        let at_work = &AtomicU32::new(CPUS);
        let (senders, inboxes): (Vec<_>, Vec<_>) = (0..CPUS).map(|_| mpsc::channel()).unzip();
        thread::scope(|scope| {
            for (cpu, inbox) in (0..CPUS).zip(inboxes) {
                let outboxes = senders.clone();
                scope.spawn(move || {
                    let _at_work = AtWork(at_work);
                    work(pcpu, cpu, done, &inbox, outboxes);
                });
            }
            drop(senders);
            let first = seat(pcpu, 0);
            for turn in 0_usize.. {
                if at_work.load(Relaxed) == 0 {
                    break;
                }
                match turn % 3 {
                    0 => pcpu.drain(&first),
                    1 => drop(pcpu.upkeep()),
                    _ => drop(pcpu.trim(0)),
                }
                thread::yield_now();
            }
        });
        pcpu.drain(&seat(pcpu, 0));
        pcpu.trim(0);
        let stats = pcpu.stats();
        assert_eq!((stats.live, stats.late_errors, stats.chunks), (0, 0, 1));
        assert_eq!(pcpu.units().materialised().count(), CPUS);
        assert!(stats.allocs > STEPS as u64, "{} areas", stats.allocs);
    }
}
