//! Libraries come, work for the host's instance, and go.

use std::thread;

use pcpu::allocator::Region;
use pcpu::global::{method, stray_unit};
use pcpu::module::Placement;
use pcpu::this_cpu::process::Method;
use pcpu::unit::CpuId;
use pcpu::{CpuCell, LocalCell, PerCpuPtr, RemoteCell, define_per_cpu, global, per_cpu_ptr};

use crate::alone::{Build, alone, alone_with};
use crate::counting::{Counting, INITIAL, counting, load};

define_per_cpu! {
    static OF_THE_HOST: CpuCell<u64> = CpuCell::new(1);
}

pub fn possible() -> u64 {
    u64::from(global().units().possible().count())
}

/// The sum of a live variable of a library.
pub fn sum_of(variable: PerCpuPtr<CpuCell<u64>>) -> u64 {
    let read = |cpu| {
        let copy = per_cpu_ptr(variable, cpu).expect("a possible CPU");
        // SAFETY: callers pass variables of libraries that are attached.
        unsafe { copy.as_ref() }.read_remote()
    };
    global().units().possible().iter().map(read).sum()
}

/// The bytes of every CPU's copy of an area.
pub fn copies(neutral: usize, bytes: usize) -> Vec<Vec<u8>> {
    let copy = |cpu: CpuId| {
        let address = global().per_cpu_address(neutral, cpu).expect("possible");
        let first = std::ptr::with_exposed_provenance::<u8>(address);
        // SAFETY: the area lies in the first chunk, which is readable on every possible CPU.
        unsafe { std::slice::from_raw_parts(first, bytes) }.to_vec()
    };
    global().units().possible().iter().map(copy).collect()
}

/// Whether a library is mapped.
pub fn is_mapped(name: &str) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("the system tells");
    maps.lines().any(|line| line.ends_with(name))
}

/// Threads add to the variables of libraries and of the host.
fn work(libraries: &[&Counting], threads: u64, rounds: u64) {
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                for _ in 0..rounds {
                    libraries.iter().for_each(|library| library.add(3));
                    OF_THE_HOST.inc();
                }
            });
        }
    });
}

/// One life of the library: what it finds, what it does, what it leaves. Where it lay.
fn live() -> usize {
    let library = counting(Build::Unloadable, 0);
    let area = library.0.area().expect("it has variables");
    assert_eq!(area.region, Region::Reserved);
    assert_eq!(library.first(), area.neutral);
    assert!((area.neutral..area.neutral + area.bytes).contains(&library.handle()));
    assert_eq!(u64::from(library.fresh_cpus()), possible());
    assert_eq!(library.sum(), INITIAL * possible());
    assert_eq!(sum_of(library.variable()), INITIAL * possible());
    let info = global().address_info(library.handle()).expect("an address");
    assert_eq!(info.region, Region::Reserved);
    assert_eq!(global().area_bytes(area.neutral), Some(area.bytes));

    let before = OF_THE_HOST.sum();
    work(&[&library], 8, 1000);
    let sum = INITIAL * possible() + 8 * 1000 * 3;
    assert_eq!(library.sum(), sum);
    assert_eq!(sum_of(library.variable()), sum);
    assert_eq!(OF_THE_HOST.sum(), before + 8000);

    drop(library);
    assert_eq!(global().area_bytes(area.neutral), None, "the area is free");
    let zero = vec![0; area.bytes];
    assert!(
        copies(area.neutral, area.bytes)
            .iter()
            .all(|copy| *copy == zero)
    );
    assert!(!is_mapped("libcounting.so"));
    area.neutral
}

#[test]
fn a_library_lives_again_and_again() {
    alone("lives::a_library_lives_again_and_again", || {
        let first = live();
        for _ in 0..4 {
            assert_eq!(live(), first, "its place is used again");
        }
    });
}

/// Without restartable sequences host and library do LOCKed steps, both.
#[test]
fn a_library_lives_without_restartable_sequences() {
    let without = |command: &mut std::process::Command| {
        command.env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    };
    alone_with(
        "lives::a_library_lives_without_restartable_sequences",
        without,
        || {
            assert_eq!(method(), Method::Locked);
            live();
            live();
        },
    );
}

/// A CPU that is used by the library first is known to the host, and the other way round.
#[test]
fn cpus_come_up_for_both() {
    alone("lives::cpus_come_up_for_both", || {
        let library = counting(Build::Unloadable, 0);
        assert_eq!(global().units().materialised().count(), 0);
        library.add(1);
        assert_ne!(global().units().materialised().count(), 0);
        assert!(!global().units().materialised().contains(stray_unit()));
        OF_THE_HOST.inc();
        library.add(1);
        assert_eq!(library.sum(), INITIAL * possible() + 2);
    });
}

#[test]
fn two_libraries_at_once() {
    alone("lives::two_libraries_at_once", || {
        let one = counting(Build::Unloadable, 1);
        let other = counting(Build::Unloadable, 2);
        assert_ne!(one.handle(), other.handle());
        work(&[&one], 4, 1000);
        work(&[&one, &other], 4, 1000);
        assert_eq!(one.sum(), INITIAL * possible() + 24_000);
        assert_eq!(other.sum(), INITIAL * possible() + 12_000);
        drop(one);
        work(&[&other], 4, 1000);
        assert_eq!(other.sum(), INITIAL * possible() + 24_000);
    });
}

#[test]
fn a_library_that_is_loaded_twice_is_one() {
    alone("lives::a_library_that_is_loaded_twice_is_one", || {
        let one = counting(Build::Unloadable, 0);
        one.add(5);
        // What the second asks for does not matter: the variables have their place.
        let same = load("counting", Build::Unloadable, 0, Placement::DynamicIfFull);
        let same = Counting(same.expect("it is there"));
        assert_eq!(one.0.area(), same.0.area());
        assert_eq!(same.sum(), INITIAL * possible() + 5, "nothing starts anew");
        drop(one);
        same.add(5);
        assert_eq!(same.sum(), INITIAL * possible() + 10);
        drop(same);
        assert!(!is_mapped("libcounting.so"));
        assert_eq!(counting(Build::Unloadable, 0).sum(), INITIAL * possible());
    });
}

#[test]
fn a_library_allocates_from_the_host() {
    alone("lives::a_library_allocates_from_the_host", || {
        let library = counting(Build::Unloadable, 0);
        let live_before = global().stats().live;
        let variable = library.make();
        assert_eq!(global().stats().live, live_before + 1);
        let cell = PerCpuPtr::<CpuCell<u64>>::from_neutral(variable).expect("room");
        let cpus = possible();
        assert_eq!(sum_of(cell), cpus * (cpus - 1) / 2, "each has its number");
        // The host works on what the library has made.
        // SAFETY: it lives until the library ends it.
        unsafe { pcpu::this_cpu::add(cell, 1000) };
        assert_eq!(library.unmake(variable), cpus * (cpus - 1) / 2 + 1000);
        assert_eq!(library.counted(), 1_000_001);
        assert!(library.referred());
        assert!(library.is_refused_rightly());
        assert_eq!(global().stats().live, live_before);
    });
}

/// A host serves a library's batches one by one: all of them or none all the same.
#[test]
fn it_makes_several_at_one_go() {
    alone("lives::it_makes_several_at_one_go", || {
        let library = counting(Build::Unloadable, 0);
        let before = global().stats();
        assert!(library.makes_many());
        let after = global().stats();
        assert_eq!(after.live, before.live, "something is left of a batch");
        assert_eq!(after.live_sizes, before.live_sizes);
        assert!(library.frees_many());
        assert_eq!(global().stats().live, before.live);
        assert_eq!(global().stats().late_errors, 0);
    });
}
