//! The caches: their CPU's own steps, frees by other CPUs, runs that are collected and closed.

use loom::thread;
use std::sync::Arc;

use super::Model;
use crate::models::{Machine, ModelSeat, explore};
use crate::this_cpu::RemotePairs;

const WAYS: [RemotePairs; 2] = [RemotePairs::AfterFence, RemotePairs::ByLockedStep];

/// Runs a model on two CPUs, in each way that other CPUs' pairs can be reached. The run's two areas have been allocated on
/// the first.
fn explore_run(
    preemptions: usize,
    act: impl Fn(&Arc<Model>, [ModelSeat; 2], [usize; 2]) + Send + Sync + Clone + 'static,
) {
    for way in WAYS {
        let act = act.clone();
        explore(preemptions, move || {
            let model = Model::of(Machine::with_caches());
            let [owner, other] = [0, 1].map(|cpu| model.seat(cpu, way));
            let areas = [(); 2].map(|()| model.allocate_at(&owner));
            act(&model, [owner, other], areas);
            model.assert_settled();
        });
    }
}

/// The run's CPU and another one free an area at the same moment.
fn free_twice(model: &Arc<Model>, [owner, other]: [ModelSeat; 2], area: usize) {
    model.let_go(area);
    let thread = {
        let (model, other) = (model.clone(), other.clone());
        thread::spawn(move || model.try_free_at(&other, area).is_ok())
    };
    let mine = model.try_free_at(&owner, area).is_ok();
    let theirs = thread.join().unwrap();
    assert!(mine != theirs, "{mine} {theirs}");
}

/// What was freed is handed out once.
fn allocate_again(model: &Model, seats: &[ModelSeat; 2]) {
    model.allocate_some_at(&seats[0], 3);
    model.allocate_some_at(&seats[1], 1);
}

#[test]
fn one_of_two_is_told() {
    explore_run(3, |model, seats, [area, _]| {
        free_twice(model, seats.clone(), area);
        allocate_again(model, &seats);
    });
}

/// As above, and the run was shared before.
#[test]
fn one_of_two_is_told_in_a_shared_run() {
    explore_run(3, |model, seats, [area, first]| {
        model.free_at(&seats[1], first);
        free_twice(model, seats.clone(), area);
        allocate_again(model, &seats);
    });
}

/// As above, in a run that was opened as a shared one.
#[test]
fn one_of_two_is_told_in_a_run_opened_shared() {
    explore_run(3, |model, seats, [_, first]| {
        model.free_at(&seats[1], first);
        let area = model.allocate_at(&seats[0]);
        free_twice(model, seats.clone(), area);
        allocate_again(model, &seats);
    });
}

/// A third frees another area of the run, and makes it a shared one.
#[test]
fn one_of_two_is_told_while_a_third_shares() {
    explore_run(2, |model, seats, [area, first]| {
        let third = {
            let (model, other) = (model.clone(), seats[1].clone());
            thread::spawn(move || model.free_at(&other, first))
        };
        free_twice(model, seats, area);
        third.join().unwrap();
    });
}

/// Where other CPUs' pairs are out of reach nobody may be told: it is said so.
#[test]
#[should_panic(expected = "true true")]
fn both_are_believed_where_pairs_are_out_of_reach() {
    explore(3, || {
        let model = Model::of(Machine::with_caches());
        let seats = [0, 1].map(|cpu| model.seat(cpu, RemotePairs::Never));
        let [area, _] = [(); 2].map(|()| model.allocate_at(&seats[0]));
        free_twice(&model, seats, area);
    });
}

/// Another CPU makes the run a shared one while its own puts an area back.
#[test]
fn shared_while_an_area_is_put() {
    explore_run(3, |model, [owner, other], areas| {
        let thread = {
            let (model, other) = (model.clone(), other.clone());
            thread::spawn(move || model.free_at(&other, areas[1]))
        };
        model.free_at(&owner, areas[0]);
        model.allocate_at(&owner);
        thread.join().unwrap();
        model.allocate_some_at(&owner, 2);
        model.assert_settled();
        model.machine.pcpu.drain(&other);
    });
}

/// The run's CPU takes and puts while another closes all runs.
#[test]
fn closed_while_areas_are_taken_and_put() {
    explore_run(3, |model, [owner, other], areas| {
        let thread = {
            let (model, other) = (model.clone(), other.clone());
            thread::spawn(move || model.machine.pcpu.drain(&other))
        };
        model.free_at(&owner, areas[0]);
        model.allocate_at(&owner);
        thread.join().unwrap();
        model.allocate_some_at(&owner, 2);
    });
}

/// Another CPU frees what the run has handed out, while the run is used up and gets it back, or makes way for another.
#[test]
fn freed_by_another_while_the_run_collects() {
    explore_run(2, |model, [owner, other], areas| {
        model.free_at(&other, areas[0]);
        let thread = {
            let (model, other) = (model.clone(), other.clone());
            thread::spawn(move || model.free_at(&other, areas[1]))
        };
        model.allocate_some_at(&owner, 2);
        thread.join().unwrap();
        model.assert_settled();
        model.allocate_some_at(&other, 2);
    });
}

/// A run that is used up gets its areas back while another CPU closes all runs: they are handed out, or swept.
#[test]
fn collected_while_the_run_is_closed() {
    explore_run(3, |model, [owner, other], areas| {
        areas.iter().for_each(|&area| model.free_at(&other, area));
        let thread = {
            let (model, other) = (model.clone(), other.clone());
            thread::spawn(move || model.machine.pcpu.drain(&other))
        };
        model.allocate_at(&owner);
        thread.join().unwrap();
        model.assert_settled();
        model.allocate_some_at(&other, 2);
        model.machine.pcpu.drain(&other);
    });
}

/// Two on the run's CPU find it used up at the same moment: each of its areas is handed out once.
#[test]
fn collected_by_two_at_once() {
    explore_run(3, |model, [owner, other], areas| {
        areas.iter().for_each(|&area| model.free_at(&other, area));
        let thread = {
            let (model, owner) = (model.clone(), owner.clone());
            thread::spawn(move || model.allocate_at(&owner))
        };
        model.allocate_at(&owner);
        thread.join().unwrap();
        model.assert_settled();
        model.machine.pcpu.drain(&other);
    });
}

/// An area goes from its run to its holder and back, by its mark, while somebody counts: it is idle once.
#[test]
fn counted_while_an_area_goes_round() {
    explore_run(3, |model, [owner, other], areas| {
        areas.iter().for_each(|&area| model.free_at(&other, area));
        // Held to the end; the other area is free in the run.
        model.allocate_at(&owner);
        let thread = {
            let model = model.clone();
            thread::spawn(move || assert!(model.machine.pcpu.stats().live >= 1))
        };
        let area = model.allocate_at(&owner);
        model.free_at(&owner, area);
        thread.join().unwrap();
    });
}

/// Another CPU frees while the run is closed: what it marks is swept.
#[test]
fn freed_by_another_while_the_run_is_closed() {
    explore_run(3, |model, [owner, other], areas| {
        model.free_at(&other, areas[0]);
        let thread = {
            let (model, other) = (model.clone(), other.clone());
            thread::spawn(move || model.free_at(&other, areas[1]))
        };
        model.machine.pcpu.drain(&owner);
        thread.join().unwrap();
        model.assert_settled();
        model.allocate_some_at(&other, 2);
    });
}
