//! Interrupts and NMIs at every instruction of the ways through the per-CPU caches: an area is given out once until it comes back,
//! and none is lost.
//!
//! The handler takes areas of the same kinds, and keeps some from one interrupt to the next. Whoever has an area has written to it
//! whose it is: one that two of them have shows the wrong name. Past the caches: `placing.rs`; their steps: `slot_sweeps.rs`.

use core::cell::Cell;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pcpu::{
    AllocError, AllocFlags, Domain, FreeError, FreeFlags, PerCpuPtr, alloc_percpu_with,
    drain_caches, free_percpu_with, per_cpu_ptr,
};

use super::sweep::{Sweep, at_every_instruction_between, interrupted};
use super::trace::frames_at_rest;
use super::{Test, Why, idle_areas};
use crate::cpus::local_apic::TimerKind;
use crate::cpus::work::{nr_online, on_all_cpus};
use crate::interrupts::{Frame, Hook};
use crate::percpu::{BOOT_CPU, Kernel};
use crate::{ensure, println};

/// The tests, if this kernel has caches.
pub fn tests() -> &'static [Test] {
    match Kernel::allocator().has_caches() {
        true => TESTS,
        false => &[],
    }
}

const TESTS: &[Test] = &[
    Test::new("an allocation from the cache, interrupted anywhere", hit),
    Test::new("a free into the cache, interrupted anywhere", put_back),
    Test::new("a run is opened, interrupted anywhere", open),
    Test::new(
        "a run gets areas back from another CPU, interrupted anywhere",
        collect,
    ),
    Test::new(
        "an area of another CPU is freed, interrupted anywhere",
        free_from_afar,
    ),
    Test::new("a free into the stash, interrupted anywhere", stash),
    Test::new(
        "an allocation from the stash, interrupted anywhere",
        take_stashed,
    ),
    Test::new("a cache is emptied, interrupted anywhere", drain),
];

/// An area, small enough for a run of 32.
type Area = PerCpuPtr<[u64; SHORT], Kernel>;

/// Words of an area; the handler takes longer ones, too.
const SHORT: usize = 2;
const LONG: usize = 3;

/// Areas of a run.
const RUN: usize = 32;

/// Whose an area is.
#[derive(Clone, Copy)]
enum Owner {
    Operation = 1,
    Handler,
    OtherCpu,
}

/// Areas that were not what they should be.
static WRONG: AtomicU64 = AtomicU64::new(0);
/// Times that the handler was refused.
static BUSY: AtomicU64 = AtomicU64::new(0);
/// Interrupts so far.
static TURN: AtomicUsize = AtomicUsize::new(0);
/// What the handler keeps, of each length.
static KEPT: [[AtomicUsize; 4]; 2] = [const { [const { AtomicUsize::new(0) }; 4] }; 2];
/// What another CPU has allocated for this one to free.
static FROM_AFAR: [AtomicUsize; 16] = [const { AtomicUsize::new(0) }; 16];

/// Allocates an area, which must be zero, and marks it.
fn take<const WORDS: usize>(
    owner: Owner,
    flags: AllocFlags,
) -> Result<PerCpuPtr<[u64; WORDS], Kernel>, AllocError> {
    let area = alloc_percpu_with::<[u64; WORDS], Kernel>(flags)?;
    let words = words(area);
    // SAFETY: an area that was just allocated, on a CPU that is there.
    let was = unsafe { words.replace([mark(area, owner); WORDS]) };
    note(was == [0; WORDS]);
    Ok(area)
}

/// Frees an area, which must be as it was marked.
fn give<const WORDS: usize>(
    area: PerCpuPtr<[u64; WORDS], Kernel>,
    owner: Owner,
    flags: FreeFlags,
) -> Result<(), FreeError> {
    // SAFETY: an area that the caller has, on a CPU that is there.
    let found = unsafe { words(area).read() };
    note(found == [mark(area, owner); WORDS]);
    // SAFETY: the caller does not use it any more.
    unsafe { free_percpu_with(area, flags) }
}

fn note(is_right: bool) {
    WRONG.fetch_add(u64::from(!is_right), Ordering::Relaxed);
}

/// Where an area is marked.
fn words<const WORDS: usize>(area: PerCpuPtr<[u64; WORDS], Kernel>) -> *mut [u64; WORDS] {
    let copy = per_cpu_ptr(area, BOOT_CPU);
    copy.unwrap_or_else(|error| panic!("{error}")).as_ptr()
}

fn mark<const WORDS: usize>(area: PerCpuPtr<[u64; WORDS], Kernel>, owner: Owner) -> u64 {
    (area.neutral() as u64) << 8 | owner as u64
}

/// An area of the operation's.
fn take_own() -> Area {
    let area = take(Owner::Operation, AllocFlags::empty());
    area.unwrap_or_else(|error| panic!("{error}"))
}

fn give_own(area: Area) {
    let freed = give(area, Owner::Operation, FreeFlags::empty());
    freed.unwrap_or_else(|error| panic!("{error}"));
}

fn by_interrupt(_: &Frame) {
    handle(AllocFlags::ATOMIC, FreeFlags::ATOMIC);
}

fn by_nmi(_: &Frame) {
    handle(AllocFlags::TRY, FreeFlags::TRY);
}

/// What both kinds of interrupts do: take an area of each length, give back what was kept longest, and free another CPU's. An NMI
/// may be refused an area; none of these frees needs the lock.
fn handle(alloc_flags: AllocFlags, free_flags: FreeFlags) {
    interrupted();
    let turn = TURN.fetch_add(1, Ordering::Relaxed);
    exchange::<SHORT>(&KEPT[0][turn % KEPT[0].len()], alloc_flags, free_flags);
    exchange::<LONG>(&KEPT[1][turn % KEPT[1].len()], alloc_flags, free_flags);
    let from_afar = FROM_AFAR.iter().rfind(|it| it.load(Ordering::Relaxed) != 0);
    if let Some(place) = from_afar {
        give_from_afar(place, free_flags);
    }
}

/// Puts a new area into a place, if it gets one, and frees the one that was there.
fn exchange<const WORDS: usize>(
    place: &AtomicUsize,
    alloc_flags: AllocFlags,
    free_flags: FreeFlags,
) {
    let old = PerCpuPtr::from_neutral(place.load(Ordering::Relaxed));
    let new = match take::<WORDS>(Owner::Handler, alloc_flags) {
        Ok(area) => area.neutral(),
        Err(AllocError::Busy) => count_busy(),
        Err(error) => panic!("{error}"),
    };
    place.store(new, Ordering::Relaxed);
    let freed = old.map(|old| give::<WORDS>(old, Owner::Handler, free_flags));
    assert!(matches!(freed, None | Some(Ok(()))), "{freed:?}");
}

/// Frees an area of another CPU's.
fn give_from_afar(place: &AtomicUsize, flags: FreeFlags) {
    let area = Area::from_neutral(place.load(Ordering::Relaxed));
    match area.map(|area| give(area, Owner::OtherCpu, flags)) {
        Some(Ok(())) => place.store(0, Ordering::Relaxed),
        error => panic!("{error:?}"),
    }
}

/// Notes a refusal; no handle.
fn count_busy() -> usize {
    BUSY.fetch_add(1, Ordering::Relaxed);
    0
}

/// What a sweep saw, in all.
struct Seen {
    sweep: Sweep,
    misses: u64,
    /// How often the handler was refused.
    busy: u64,
}

/// Sweeps over `operation` with both kinds of interrupts, `before` and `after` each without any, and looks at what is left.
fn swept<T, U>(
    before: impl Fn() -> T,
    operation: impl Fn(T) -> U,
    after: impl Fn(U),
    check: impl Fn(&Seen) -> Result<(), Why>,
) -> Result<(), Why> {
    const KINDS: [(TimerKind, Hook); 2] = [
        (TimerKind::Once, by_interrupt),
        (TimerKind::OnceNmi, by_nmi),
    ];
    let frames_before = frames_at_rest();
    let at_start = Kernel::allocator().stats();
    for (kind, handler) in KINDS {
        // The first interrupt finds a run of each length.
        warm_up();
        WRONG.store(0, Ordering::Relaxed);
        BUSY.store(0, Ordering::Relaxed);
        let misses = Kernel::allocator().stats().cache_misses;
        let sweep = at_every_instruction_between(kind, handler, &before, &operation, &after);
        let misses = Kernel::allocator().stats().cache_misses - misses;
        give_all_kept();
        give_all_from_afar();
        let seen = Seen {
            sweep,
            misses,
            busy: BUSY.load(Ordering::Relaxed),
        };
        let wrong = WRONG.load(Ordering::Relaxed);
        println!(
            "   {kind:?}: {} interrupts, {} of their requests refused; {} misses",
            seen.sweep.interrupts, seen.busy, seen.misses
        );
        ensure!(wrong == 0, "{kind:?}: {wrong} areas were wrong");
        check(&seen)?;
    }
    let frames_after = frames_at_rest();
    let at_end = Kernel::allocator().stats();
    ensure!(
        (at_end.live, at_end.late_errors) == (at_start.live, at_start.late_errors),
        "{} live and {} late errors, then {} and {}",
        at_start.live,
        at_start.late_errors,
        at_end.live,
        at_end.late_errors
    );
    ensure!(
        frames_after == frames_before,
        "{frames_before:?} frames held and free before, {frames_after:?} after"
    );
    Ok(())
}

fn warm_up() {
    give_own(take_own());
    let long = take::<LONG>(Owner::Operation, AllocFlags::empty());
    let freed = long.map(|it| give(it, Owner::Operation, FreeFlags::empty()));
    assert!(matches!(freed, Ok(Ok(()))), "{freed:?}");
}

fn give_all_kept() {
    give_kept::<SHORT>(&KEPT[0]);
    give_kept::<LONG>(&KEPT[1]);
}

fn give_kept<const WORDS: usize>(kept: &[AtomicUsize]) {
    for place in kept {
        let area =
            PerCpuPtr::<[u64; WORDS], Kernel>::from_neutral(place.swap(0, Ordering::Relaxed));
        let freed = area.map(|area| give(area, Owner::Handler, FreeFlags::empty()));
        assert!(matches!(freed, None | Some(Ok(()))), "{freed:?}");
    }
}

fn give_all_from_afar() {
    let there = FROM_AFAR.iter();
    there
        .filter(|it| it.load(Ordering::Relaxed) != 0)
        .for_each(|it| give_from_afar(it, FreeFlags::empty()));
}

fn hit() -> Result<(), Why> {
    swept(|| {}, |()| take_own(), give_own, mostly_hits)
}

fn put_back() -> Result<(), Why> {
    swept(take_own, give_own, |()| {}, mostly_hits)
}

/// Hardly anything needed the lock: a run may be too short for what the handler keeps.
fn mostly_hits(seen: &Seen) -> Result<(), Why> {
    ensure!(
        8 * seen.misses < seen.sweep.runs,
        "{} misses in {} runs",
        seen.misses,
        seen.sweep.runs
    );
    Ok(())
}

fn open() -> Result<(), Why> {
    swept(
        drain_caches::<Kernel>,
        |()| take_own(),
        give_own,
        |seen| {
            ensure!(
                seen.misses >= seen.sweep.runs,
                "{} misses in {} runs",
                seen.misses,
                seen.sweep.runs
            );
            Ok(())
        },
    )
}

/// A run is used up; another CPU frees some of its areas, and the interrupt one more, perhaps in the middle; the next request takes
/// one of them.
fn collect() -> Result<(), Why> {
    const FREED: usize = 8;
    if nr_online() < 2 {
        return Ok(());
    }
    let came_back = Cell::new(0);
    swept(
        || {
            give_all_kept();
            let mut taken = use_up_run();
            let mut freed = [None; FREED];
            freed.swap_with_slice(&mut taken[..FREED]);
            on_all_cpus(&|cpu| {
                if cpu.get() == 1 {
                    freed.into_iter().flatten().for_each(give_own);
                }
            });
            let last = taken.iter_mut().rfind(|area| area.is_some());
            let last = last.and_then(Option::take);
            if let Some(area) = last {
                // SAFETY: an area of the operation's, on a CPU that is there.
                unsafe { words(area).write([mark(area, Owner::Handler); SHORT]) };
                let place = &KEPT[0][TURN.load(Ordering::Relaxed) % KEPT[0].len()];
                place.store(area.neutral(), Ordering::Relaxed);
            }
            (taken, freed, last)
        },
        |areas| (areas, take_own()),
        |((taken, freed, last), area)| {
            let is_back = freed.contains(&Some(area)) || last == Some(area);
            came_back.set(came_back.get() + u64::from(is_back));
            give_own(area);
            taken.into_iter().flatten().for_each(give_own);
        },
        |seen| {
            let came_back = came_back.take();
            ensure!(
                8 * came_back > 7 * seen.sweep.runs,
                "{came_back} of {} came back",
                seen.sweep.runs
            );
            Ok(())
        },
    )
}

/// Empties the cache, and takes all areas of the run that is opened next.
fn use_up_run() -> [Option<Area>; RUN] {
    drain_caches::<Kernel>();
    use_up_next_run()
}

/// Takes all areas of a run that is opened in place of one that is used up.
fn use_up_next_run() -> [Option<Area>; RUN] {
    let mut taken = [None; RUN];
    let before = idle_areas();
    taken[0] = Some(take_own());
    let left = (idle_areas() - before) as usize;
    taken[1..=left].fill_with(|| Some(take_own()));
    taken
}

/// Areas of a run that made way for another, which is used up as well: they belong to none.
fn outlive_run() -> [[Option<Area>; RUN]; 2] {
    give_all_kept();
    [use_up_run(), use_up_next_run()]
}

/// An area that is interrupted on its way is freed, and perhaps not named: the handler takes an area itself, and opens a run for
/// that. The last free is not interrupted.
fn stash() -> Result<(), Why> {
    let came_back = Cell::new(0);
    swept(
        outlive_run,
        |[mut old, new]| {
            let area = old[0].take();
            area.into_iter().for_each(give_own);
            ([old, new], area)
        },
        |(areas, area)| {
            let next = take_own();
            came_back.set(came_back.get() + u64::from(area == Some(next)));
            give_own(next);
            areas.into_iter().flatten().flatten().for_each(give_own);
        },
        |_| {
            ensure!(came_back.take() > 0, "nothing was stashed");
            Ok(())
        },
    )
}

/// The handler takes what is stashed, too.
fn take_stashed() -> Result<(), Why> {
    const STASHED: usize = 3;
    let came_back = Cell::new(0);
    swept(
        || {
            let [mut old, new] = outlive_run();
            let mut stashed = [None; STASHED];
            stashed.swap_with_slice(&mut old[..STASHED]);
            stashed.into_iter().flatten().for_each(give_own);
            ([old, new], stashed)
        },
        |areas| (areas, take_own()),
        |((areas, stashed), area)| {
            came_back.set(came_back.get() + u64::from(stashed.contains(&Some(area))));
            give_own(area);
            areas.into_iter().flatten().flatten().for_each(give_own);
        },
        |seen| mostly_came_back(came_back.take(), seen),
    )
}

/// What was stashed was handed out again, but for what the handler got.
fn mostly_came_back(came_back: u64, seen: &Seen) -> Result<(), Why> {
    ensure!(
        2 * came_back > seen.sweep.runs,
        "{came_back} of {} came back",
        seen.sweep.runs
    );
    Ok(())
}

/// The interrupts free areas of the same run.
fn free_from_afar() -> Result<(), Why> {
    if nr_online() < 2 {
        return Ok(());
    }
    let is_there = |it: &&AtomicUsize| it.load(Ordering::Relaxed) != 0;
    swept(
        || {
            if FROM_AFAR.iter().filter(is_there).count() < 2 {
                on_all_cpus(&|cpu| {
                    if cpu.get() == 1 {
                        FROM_AFAR.iter().for_each(fill_from_afar);
                    }
                });
            }
            let next = FROM_AFAR.iter().find(is_there);
            next.expect("there are two")
        },
        // The handler takes the last, and there are two.
        |place| give_from_afar(place, FreeFlags::empty()),
        |()| {},
        |_| Ok(()),
    )
}

fn fill_from_afar(place: &AtomicUsize) {
    if place.load(Ordering::Relaxed) == 0 {
        let area = take::<SHORT>(Owner::OtherCpu, AllocFlags::empty());
        let area = area.unwrap_or_else(|error| panic!("{error}"));
        place.store(area.neutral(), Ordering::Relaxed);
    }
}

fn drain() -> Result<(), Why> {
    let before = Kernel::allocator().stats().cache_drains;
    swept(
        warm_up,
        |()| drain_caches::<Kernel>(),
        |()| {},
        |seen| {
            // Two runs are opened anew.
            ensure!(
                seen.misses >= 2 * (seen.sweep.runs - 1),
                "{} misses of {}",
                seen.misses,
                seen.sweep.runs
            );
            Ok(())
        },
    )?;
    ensure!(
        Kernel::allocator().stats().cache_drains > before,
        "no cache was emptied"
    );
    Ok(())
}
