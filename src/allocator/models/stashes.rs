//! Stashes: areas that were freed on a CPU, and are handed out there again, or swept.

use loom::thread;
use std::sync::Arc;

use super::Model;
use crate::models::{Machine, ModelSeat, explore};
use crate::this_cpu::RemotePairs;

/// Runs a model on two CPUs. Two areas have been allocated on the first which belong to no run.
fn explore_stash(
    preemptions: usize,
    act: impl Fn(&Arc<Model>, [ModelSeat; 2], [usize; 2]) + Send + Sync + 'static,
) {
    explore(preemptions, move || {
        let model = Model::of(Machine::with_caches());
        let seats = [0, 1].map(|cpu| model.seat(cpu, RemotePairs::Never));
        let areas = [(); 2].map(|()| model.allocate_at(&seats[0]));
        // Their run makes way for another, of which one area is left.
        model.allocate_at(&seats[0]);
        act(&model, seats, areas);
        model.assert_settled();
    });
}

/// What is stashed is handed out by its CPU, or swept and handed out by another: not both.
#[test]
fn taken_while_somebody_sweeps() {
    explore_stash(3, |model, [here, there], areas| {
        model.free_at(&here, areas[0]);
        let thread = {
            let (model, there) = (model.clone(), there.clone());
            thread::spawn(move || {
                model.machine.pcpu.stats();
                model.allocate_at(&there);
            })
        };
        model.allocate_some_at(&here, 2);
        thread.join().unwrap();
    });
}

/// What is stashed while somebody sweeps is swept by that sweep or the next.
#[test]
fn put_while_somebody_sweeps() {
    explore_stash(3, |model, [here, _], areas| {
        let thread = {
            let model = model.clone();
            thread::spawn(move || model.assert_settled_later())
        };
        areas
            .into_iter()
            .for_each(|area| model.free_at(&here, area));
        thread.join().unwrap();
    });
}

/// Of two CPUs that free an area which belongs to no run one is told, and the area is handed out once.
#[test]
fn one_of_two_is_told() {
    explore_stash(3, |model, [here, there], [area, _]| {
        model.let_go(area);
        let thread = {
            let (model, there) = (model.clone(), there.clone());
            thread::spawn(move || model.try_free_at(&there, area).is_ok())
        };
        let mine = model.try_free_at(&here, area).is_ok();
        let theirs = thread.join().unwrap();
        assert!(mine != theirs, "{mine} {theirs}");
        model.allocate_some_at(&here, 2);
        model.allocate_at(&there);
    });
}
