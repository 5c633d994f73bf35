//! Pages and chunks that are claimed while the lock is given up: populated and given back, made and destroyed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use loom::thread;

use super::{Model, PAGE_BYTES};
use crate::models::{Machine, explore};

/// An area gets its pages while what lay beside it goes and its memory with it. The backing looks that no page is populated
/// twice, the model that what is handed out is.
#[test]
fn populated_while_memory_goes_back() {
    let most: [Arc<AtomicU64>; 2] = Default::default();
    let [populated, given_back] = most.clone();
    explore(2, move || {
        let model = Model::of(Machine::new());
        model.fill_first_chunk(PAGE_BYTES);
        let before = model.machine.pcpu.stats();
        let area = model.allocate(PAGE_BYTES).unwrap();
        let thread = {
            let model = model.clone();
            thread::spawn(move || model.allocate(2 * PAGE_BYTES).unwrap())
        };
        model.free(area);
        model.machine.pcpu.upkeep();
        let area = thread.join().unwrap();
        model.assert_populated(area, 2 * PAGE_BYTES);
        model.assert_settled();
        let after = model.machine.pcpu.stats();
        let came = after.pages_populated - before.pages_populated;
        let went = after.pages_depopulated - before.pages_depopulated;
        populated.fetch_max(came, Ordering::Relaxed);
        given_back.fetch_max(went, Ordering::Relaxed);
    });
    let most = most.map(|pages| pages.load(Ordering::Relaxed));
    assert!(!most.contains(&0), "memory comes, and goes: {most:?}");
}

/// Somebody frees, for the second time, what lay in a chunk that goes meanwhile and may come anew.
#[test]
fn freed_again_while_the_chunk_goes() {
    explore(2, || {
        let model = Model::of(Machine::new());
        model.fill_first_chunk(PAGE_BYTES);
        let area = model.allocate(PAGE_BYTES).unwrap();
        assert_eq!(model.page_of(area).0, 1);
        model.free(area);
        let thread = {
            let model = model.clone();
            thread::spawn(move || assert!(model.try_free(area).is_err()))
        };
        model.machine.pcpu.trim(0);
        let (place, _) = model.page_of(area);
        let found = model.machine.pcpu.places.get(place);
        assert!(matches!(found, crate::places::Place::Parked(_)));
        thread.join().unwrap();
        model.allocate(2 * PAGE_BYTES).unwrap();
        model.assert_settled();
    });
}

/// The last area of a chunk is freed while the chunk may go.
#[test]
fn freed_while_the_chunk_goes() {
    explore(2, || {
        let model = Model::of(Machine::new());
        model.fill_first_chunk(PAGE_BYTES);
        let area = model.allocate(PAGE_BYTES).unwrap();
        let thread = {
            let model = model.clone();
            thread::spawn(move || model.free(area))
        };
        model.machine.pcpu.trim(0);
        thread.join().unwrap();
        model.machine.pcpu.trim(0);
        assert_eq!(model.machine.pcpu.stats().chunks, 1);
        model.assert_settled();
    });
}
