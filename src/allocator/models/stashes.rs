//! Stashes: areas that were freed on a CPU, and are handed out there again, or swept.

use loom::thread;
use std::sync::Arc;

use super::{CACHED_BYTES, Model};
use crate::models::{Machine, ModelSeat, explore};
use crate::this_cpu::RemotePairs;
use crate::{AllocFlags, Request};

/// Runs a model on two CPUs, with names in areas and in rows. Two areas have been allocated on the first which belong to no run.
fn explore_stash(
    preemptions: usize,
    act: impl Fn(&Arc<Model>, [ModelSeat; 2], [usize; 2]) + Copy + Send + Sync + 'static,
) {
    for has_rows in [false, true] {
        explore_named(preemptions, has_rows, act);
    }
}

fn explore_named(
    preemptions: usize,
    has_rows: bool,
    act: impl Fn(&Arc<Model>, [ModelSeat; 2], [usize; 2]) + Send + Sync + 'static,
) {
    explore(preemptions, move || {
        let model = Model::of(Machine::with_caches_and_rows(has_rows));
        let seats = [0, 1].map(|cpu| model.seat(cpu, RemotePairs::Never));
        let areas = [(); 2].map(|()| model.allocate_at(&seats[0]));
        // Their run makes way for another, of which one area is left.
        model.allocate_at(&seats[0]);
        act(&model, seats, areas);
        model.assert_settled();
    });
}

/// What is stashed is handed out by its CPU, or swept and handed out to somebody else: not both.
#[test]
fn taken_while_somebody_sweeps() {
    explore_stash(3, |model, [here, _], areas| {
        model.free_at(&here, areas[0]);
        let thread = {
            let model = model.clone();
            thread::spawn(move || {
                model.machine.pcpu.stats();
                // The lowest room is what has been swept.
                model.allocate(CACHED_BYTES).unwrap();
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

/// Threads of one CPU come between each other's steps, so that a name may be written over: whatever becomes of the names, no area is
/// handed out twice, and none is lost.
#[test]
fn two_threads_of_one_cpu() {
    explore_stash(3, |model, [here, _], areas| {
        let put_and_take = |model: &Model, here: &ModelSeat, area| {
            model.free_at(here, area);
            model.allocate_at(here)
        };
        let thread = {
            let (model, here) = (model.clone(), here.clone());
            thread::spawn(move || put_and_take(&model, &here, areas[0]))
        };
        let mine = put_and_take(model, &here, areas[1]);
        let theirs = thread.join().unwrap();
        model.assert_settled();
        model.free_at(&here, mine);
        model.free_at(&here, theirs);
        model.allocate_some_at(&here, 3);
    });
}

/// Bytes whose granules are one word of marks.
const WORD_BYTES: usize = 128;

/// A freed area of so many bytes, aligned to as much, is swept, and a longer one is taken in its place and freed: the stash does
/// not take that for what it named.
fn longer_one_in_its_place(bytes: usize) {
    let request = move |bytes| Request::new(bytes, WORD_BYTES).with_flags(AllocFlags::NO_ZERO);
    explore(2, move || {
        let model = Model::of(Machine::with_caches());
        let pcpu = &model.machine.pcpu;
        let here = model.seat(0, RemotePairs::Never);
        let take_here = || {
            let request = Request::new(bytes, 8).with_flags(AllocFlags::NO_ZERO);
            model.hold(pcpu.allocate_at(&here, &request).unwrap())
        };
        // A run is used up.
        (0..2 * CACHED_BYTES / bytes).for_each(|_| _ = take_here());
        let area = model.hold(pcpu.allocate(&request(bytes)).unwrap());
        model.free_at(&here, area);
        let thread = {
            let model = model.clone();
            thread::spawn(move || {
                let pcpu = &model.machine.pcpu;
                pcpu.stats();
                let longer = model.hold(pcpu.allocate(&request(2 * bytes)).unwrap());
                model.free(longer);
            })
        };
        let taken = take_here();
        assert_eq!(pcpu.area_bytes(taken), Some(bytes));
        thread.join().unwrap();
        model.assert_settled();
    });
}

#[test]
fn a_longer_one_of_the_same_word_in_its_place() {
    longer_one_in_its_place(WORD_BYTES / 4);
}

/// The area ends where the word does: what lies behind decides how long it is.
#[test]
fn a_longer_one_of_two_words_in_its_place() {
    longer_one_in_its_place(WORD_BYTES);
}

/// Somebody frees an area of a chunk, and says so when the chunk has gone. What is stashed in the one that comes in its place
/// is swept all the same.
#[test]
fn a_note_that_outlives_its_chunk() {
    explore(2, || {
        let model = Model::of(Machine::with_caches());
        let here = model.seat(0, RemotePairs::Never);
        model.allocate_at(&here);
        model.fill_first_chunk(CACHED_BYTES);
        let [late, other] = [(); 2].map(|()| model.allocate(CACHED_BYTES).unwrap());
        assert_eq!((model.page_of(late).0, model.page_of(other).0), (1, 1));
        let thread = {
            let model = model.clone();
            thread::spawn(move || model.free(late))
        };
        model.free(other);
        model.machine.pcpu.stats();
        model.machine.pcpu.trim(0);
        thread.join().unwrap();
        model.machine.pcpu.stats();
        let area = model.allocate(CACHED_BYTES).unwrap();
        assert_eq!(model.page_of(area).0, 1);
        model.free_at(&here, area);
        model.assert_settled();
    });
}

/// What a CPU's stash names is another area by now, longer by one word, and freed: a model, and that area.
fn with_a_stale_name() -> (Arc<Model>, usize) {
    let model = Model::of(Machine::with_caches());
    let pcpu = &model.machine.pcpu;
    let request = |bytes| Request::new(bytes, WORD_BYTES).with_flags(AllocFlags::NO_ZERO);
    (0..2 * CACHED_BYTES / WORD_BYTES).for_each(|_| take_by_name(&model));
    let area = model.hold(pcpu.allocate(&request(WORD_BYTES)).unwrap());
    model.free_at(&model.seat(0, RemotePairs::Never), area);
    // Sweeps.
    pcpu.stats();
    let longer = model.hold(pcpu.allocate(&request(2 * WORD_BYTES)).unwrap());
    assert_eq!(longer, area);
    model.free(longer);
    (model, longer)
}

/// Allocates where the stash has that name.
fn take_by_name(model: &Model) {
    let request = Request::new(WORD_BYTES, 8).with_flags(AllocFlags::NO_ZERO);
    let here = model.seat(0, RemotePairs::Never);
    model.hold(model.machine.pcpu.allocate_at(&here, &request).unwrap());
}

/// Who finds an area of another length under a name leaves it as it is: freed.
#[test]
fn a_second_free_of_what_is_named_wrongly() {
    explore(2, || {
        let (model, longer) = with_a_stale_name();
        let thread = {
            let model = model.clone();
            thread::spawn(move || assert!(model.try_free(longer).is_err()))
        };
        take_by_name(&model);
        thread.join().unwrap();
        model.assert_settled();
    });
}

/// Nor does it free the area that has come in its place.
#[test]
fn an_area_in_the_place_of_what_is_named_wrongly() {
    explore(2, || {
        let (model, longer) = with_a_stale_name();
        let again = |model: &Model| {
            let pcpu = &model.machine.pcpu;
            pcpu.stats();
            let request = Request::new(2 * WORD_BYTES, WORD_BYTES);
            let request = request.with_flags(AllocFlags::NO_ZERO);
            model.hold(pcpu.allocate(&request).unwrap());
        };
        let thread = {
            let model = model.clone();
            thread::spawn(move || {
                _ = model.try_free(longer);
                again(&model);
            })
        };
        take_by_name(&model);
        thread.join().unwrap();
        again(&model);
        model.assert_settled();
    });
}
