//! Frees by marks, and the sweeps that find them.

use loom::thread;

use super::{Model, PAGE_BYTES};
use crate::models::{Machine, explore};

/// What is freed while somebody sweeps is found by that sweep or by the next: no note is lost.
#[test]
fn what_is_freed_is_swept() {
    explore(2, || {
        let model = Model::of(Machine::new());
        // Each of a word of marks: who frees one learns nothing from who sweeps the other.
        let areas = [(); 3].map(|()| model.allocate(128).unwrap());
        let threads = [areas[1], areas[2]].map(|area| {
            let model = model.clone();
            thread::spawn(move || model.free(area))
        });
        model.assert_settled_later();
        for thread in threads {
            thread.join().unwrap();
        }
        model.assert_settled();
    });
}

/// Of two who free the same area without a cache one is told, also while somebody sweeps.
#[test]
fn one_of_two_is_told() {
    explore(3, || {
        let model = Model::of(Machine::new());
        let area = model.allocate(64).unwrap();
        model.let_go(area);
        let thread = {
            let model = model.clone();
            thread::spawn(move || model.try_free(area).is_ok())
        };
        let mine = model.try_free(area).is_ok();
        let theirs = thread.join().unwrap();
        assert!(mine != theirs, "{mine} {theirs}");
        model.assert_settled();
    });
}

/// A page that is worth sweeping is swept, or it is known to be due.
#[test]
fn a_sweep_that_is_due_is_not_forgotten() {
    explore(3, || {
        let model = Model::of(Machine::new());
        // Each the only area of its page.
        let areas = [(); 2].map(|()| model.allocate(PAGE_BYTES).unwrap());
        let threads = areas.map(|area| {
            let model = model.clone();
            thread::spawn(move || model.free(area))
        });
        model.machine.pcpu.upkeep_if_due();
        for thread in threads {
            thread.join().unwrap();
        }
        let live = model.machine.pcpu.state.lock().stats.live;
        assert!(live == 0 || model.machine.pcpu.is_upkeep_due());
    });
}
