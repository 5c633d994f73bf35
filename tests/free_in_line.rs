//! Frees in a process, whose first part is in line with the caller: it goes past nothing that the whole way looks at.

#![cfg(target_os = "linux")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pcpu::stats::{Event, EventHook};
use pcpu::{AllocFlags, Domain, FreeError, FreeFlags, Global, Request};

/// There is one instance.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn areas(bytes: usize, count: usize) -> Vec<usize> {
    let request = Request::new(bytes, 8).with_flags(AllocFlags::NO_ZERO);
    let areas = (0..count).map(|_| Global::allocate(&request));
    areas.collect::<Result<_, _>>().expect("there is room")
}

fn free_with(area: usize, flags: FreeFlags) -> Result<(), FreeError> {
    // SAFETY: nobody looks at the copies.
    unsafe { Global::free(area, flags) }
}

fn free(area: usize) -> Result<(), FreeError> {
    free_with(area, FreeFlags::empty())
}

/// Some out of a run, some out of a stash, some of no cache.
fn of_all_ways() -> Vec<usize> {
    // More than a run has: the rest is stashed, and handed out from there.
    let many = areas(24, 100);
    many.iter().for_each(|&area| free(area).unwrap());
    [areas(8, 5), areas(24, 70), areas(6000, 2)].concat()
}

#[test]
fn wrong_flags_are_refused() {
    let _alone = alone();
    let unknown = FreeFlags::from_bits_retain(1 << 20);
    for area in of_all_ways() {
        assert_eq!(
            free_with(area, FreeFlags::RESERVED),
            Err(FreeError::NotReserved { address: area })
        );
        assert_eq!(
            free_with(area, unknown),
            Err(FreeError::UnknownFlags { bits: 1 << 20 })
        );
        assert_eq!(
            free(area + 1),
            Err(FreeError::Misaligned { address: area + 1 })
        );
        assert_eq!(free_with(area, FreeFlags::ATOMIC | FreeFlags::TRY), Ok(()));
    }
}

#[test]
fn a_second_free_is_refused() {
    let _alone = alone();
    for area in of_all_ways() {
        assert_eq!(free(area), Ok(()));
        assert_eq!(free(area), Err(FreeError::NotAllocated { address: area }));
    }
}

#[test]
fn a_hook_is_told_of_all_frees() {
    struct Frees(AtomicU32);
    impl EventHook for Frees {
        fn event(&self, event: &Event) {
            if let Event::Free { .. } = event {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    static FREES: Frees = Frees(AtomicU32::new(0));
    let _alone = alone();
    let areas = of_all_ways();
    let (told, untold) = areas.split_at(areas.len() / 2);
    pcpu::global().set_event_hook(Some(&FREES));
    told.iter().for_each(|&area| assert_eq!(free(area), Ok(())));
    pcpu::global().set_event_hook(None);
    assert_eq!(FREES.0.load(Ordering::Relaxed), told.len() as u32);
    untold
        .iter()
        .for_each(|&area| assert_eq!(free(area), Ok(())));
    assert_eq!(FREES.0.load(Ordering::Relaxed), told.len() as u32);
}

/// What those must leave who may not wait is done by the next free that may.
#[test]
fn upkeep_that_is_due_is_run() {
    let _alone = alone();
    let large = areas(4096, 4000);
    for area in large {
        assert_eq!(free_with(area, FreeFlags::ATOMIC), Ok(()));
    }
    let before = pcpu::global().stats().populated_pages;
    let hurried = Request::new(8, 8).with_flags(AllocFlags::ATOMIC);
    let small = [0; 2].map(|_| Global::allocate(&hurried).expect("there is room"));
    assert!(pcpu::global().is_upkeep_due());
    for area in small {
        assert_eq!(free(area), Ok(()));
    }
    assert!(!pcpu::global().is_upkeep_due());
    assert!(pcpu::global().stats().populated_pages < before);
}
