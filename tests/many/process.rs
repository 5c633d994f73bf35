//! Batches in a process: of types, and of several threads.

use std::mem::MaybeUninit;
use std::thread;

use pcpu::{
    AllocError, AllocFlags, CpuCell, Global, LocalCell, PerCpu, RemoteCell, alloc_percpu_many,
    alloc_percpu_many_with, free_percpu_many, global,
};

#[test]
fn typed_batches_in_a_process() {
    let [left, right] = PerCpu::<CpuCell<u32>>::new_many().unwrap();
    left.add(3);
    right.add(4);
    assert_eq!((left.sum(), right.sum()), (3, 4));
    assert!(alloc_percpu_many::<[u64; 0], 0>().unwrap().is_empty());
    let refused = alloc_percpu_many::<[u64; 0], 2>();
    assert_eq!(refused, Err(AllocError::ZeroSize));

    let mut out = [const { MaybeUninit::uninit() }; 40];
    let variables =
        alloc_percpu_many_with::<CpuCell<u64>, Global>(AllocFlags::NO_ZERO, &mut out).unwrap();
    let owners: Vec<_> = variables
        .iter()
        // SAFETY: allocated above, and given up to the owner.
        .map(|&variable| unsafe { PerCpu::from_ptr(variable) })
        .collect();
    for (nth, owner) in owners.iter().enumerate() {
        assert_eq!(owner.sum(), 0);
        owner.add(nth as u64);
    }
    for (nth, owner) in owners.into_iter().enumerate() {
        assert_eq!(owner.sum(), nth as u64);
    }
}

/// Batches of several threads, freed by their own threads and by others.
#[test]
fn threads_do_not_share_areas() {
    thread::scope(|scope| {
        for id in 1..=4_u64 {
            scope.spawn(move || {
                for _ in 0..500 {
                    let variables = alloc_percpu_many::<CpuCell<u64>, 24>().unwrap();
                    let owners = variables.map(|variable| {
                        // SAFETY: allocated above, and given up to the owner.
                        unsafe { PerCpu::from_ptr(variable) }
                    });
                    owners.iter().for_each(|owner| owner.add(id));
                    assert!(owners.iter().all(|owner| owner.sum() == id));
                    let variables = owners.map(PerCpu::into_ptr);
                    let free = move || {
                        // SAFETY: given up above.
                        unsafe { free_percpu_many(&variables) }.unwrap();
                    };
                    match id % 2 {
                        0 => free(),
                        _ => thread::spawn(free).join().unwrap(),
                    }
                }
            });
        }
    });
    assert_eq!(global().stats().late_errors, 0);
}
