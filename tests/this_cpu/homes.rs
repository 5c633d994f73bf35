//! Threads and processes that have less than usual: no restartable sequences, a CPU for the first time, a parent that
//! forked.

use std::os::unix::process::CommandExt;

use pcpu::global::{method, stray_unit};
use pcpu::this_cpu::process::Method;
use pcpu::unit::CpuId;
use pcpu::{CpuCell, LocalCell, StaticVar, alloc_percpu, define_per_cpu, global, this_cpu};

use crate::storm::{Crew, storm};
use crate::system::{allowed_cpus, keep_on, on_cpu, run_in_child, try_keep_on, unregister};

fn on(variable: &impl StaticVar<Target = CpuCell<u64>>, cpu: CpuId) -> u64 {
    variable.get(cpu).expect("a possible CPU").read_remote()
}

define_per_cpu! {
    static BY_STRAYS: CpuCell<u64> = CpuCell::new(100);
}

/// What a thread without restartable sequences does goes to the stray unit, whichever CPU it is on.
#[test]
fn a_thread_without_registration() {
    let stray = stray_unit();
    let cpus = allowed_cpus();
    std::thread::spawn(move || {
        BY_STRAYS.inc();
        let is_unregistered = unregister();
        let counts = |cpu| on(&BY_STRAYS, cpu);
        let before: u64 = cpus.iter().copied().map(counts).sum();
        for &cpu in &cpus {
            keep_on(0, &[cpu]);
            BY_STRAYS.add(10);
        }
        let added = 10 * cpus.len() as u64;
        if is_unregistered && method() == Method::RestartableSequences {
            assert_eq!(on(&BY_STRAYS, stray), 100 + added);
            assert_eq!(BY_STRAYS.read(), 100 + added);
            assert_eq!(BY_STRAYS.xchg(5), 100 + added);
            assert_eq!(BY_STRAYS.cmpxchg(4, 6), Err(5));
            assert_eq!(BY_STRAYS.cmpxchg(5, 6), Ok(5));
            assert_eq!(BY_STRAYS.add_return(1), 7);
            let after: u64 = cpus.into_iter().map(counts).sum();
            assert_eq!(after, before, "no CPU's copy has changed");
        } else {
            println!("every thread here is like every other");
            assert_eq!(on(&BY_STRAYS, stray), 100);
        }
    })
    .join()
    .expect("the thread passes");
}

#[test]
fn a_storm_with_threads_without_registration() {
    let crew = Crew {
        threads: 4,
        unregistered: 4,
    };
    storm(crew, 20);
}

/// A process whose glibc registers nothing.
#[test]
fn a_process_without_restartable_sequences() {
    let name = "homes::a_process_without_restartable_sequences";
    if run_in_child(name, |command| {
        command.env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    }) {
        return;
    }
    assert_eq!(method(), Method::Locked);
    let crew = Crew {
        threads: 8,
        unregistered: 0,
    };
    storm(crew, 20);
    let stray = stray_unit();
    assert!(
        !global().units().materialised().contains(stray),
        "nobody is a stray"
    );
}

define_per_cpu! {
    static BY_NEWCOMERS: CpuCell<u64> = CpuCell::new(7);
}

/// Processes that are kept on their first CPU and then let to the others, each with another operation to begin with.
#[test]
fn a_cpu_that_was_never_used() {
    const KIND: &str = "PCPU_TEST_FIRST_OPERATION";
    let name = "homes::a_cpu_that_was_never_used";
    let first = allowed_cpus()[0];
    let is_done = ["read", "write", "add", "xchg", "add_return", "cmpxchg"]
        .into_iter()
        .all(|kind| {
            run_in_child(name, |command| {
                command.env(KIND, kind);
                // SAFETY: one system call.
                unsafe {
                    command.pre_exec(move || {
                        keep_on(0, &[first]);
                        Ok(())
                    });
                }
            })
        });
    if is_done {
        return;
    }
    let kind = std::env::var(KIND).expect("the parent says it");
    assert_eq!(allowed_cpus(), [first]);
    BY_NEWCOMERS.inc();
    let dynamic = alloc_percpu::<CpuCell<u64>>().expect("there is memory");
    // SAFETY: never freed.
    unsafe { this_cpu::add(dynamic, 1) };
    let is_used = |cpu| global().units().materialised().contains(cpu);
    assert!(is_used(first));
    let is_other = |cpu: &CpuId| *cpu != first && *cpu != stray_unit();
    let mut come = 0;
    for cpu in global().units().possible().iter().filter(is_other) {
        // A CPU below one that is used may have memory already.
        assert!(cpu < first || !is_used(cpu), "{cpu:?} before it is used");
        assert_eq!(on(&BY_NEWCOMERS, cpu), 7);
        if !try_keep_on(0, &[cpu]) {
            // Offline, or not ours.
            continue;
        }
        match &*kind {
            "read" => assert_eq!(BY_NEWCOMERS.read(), 7),
            "write" => BY_NEWCOMERS.write(7),
            "add" => BY_NEWCOMERS.add(0),
            "xchg" => assert_eq!(BY_NEWCOMERS.xchg(7), 7),
            "add_return" => assert_eq!(BY_NEWCOMERS.add_return(0), 7),
            _ => assert_eq!(BY_NEWCOMERS.cmpxchg(0, 1), Err(7)),
        }
        assert!(is_used(cpu), "{cpu:?} is used");
        BY_NEWCOMERS.add(5);
        assert_eq!(on(&BY_NEWCOMERS, cpu), 12);
        // SAFETY: never freed.
        assert_eq!(unsafe { this_cpu::add_return(dynamic, 3) }, 3);
        come += 1;
    }
    println!("{come} CPUs came");
    assert_eq!(on(&BY_NEWCOMERS, first), 8);
    assert_eq!(on(&BY_NEWCOMERS, stray_unit()), 7);
}

define_per_cpu! {
    static BY_GENERATIONS: CpuCell<u64> = CpuCell::new(0);
}

/// A forked child starts with copies of the copies, and works on them like its parent on its own.
#[test]
fn a_forked_child() {
    let cpus = allowed_cpus();
    let dynamic = alloc_percpu::<CpuCell<u64>>().expect("there is memory");
    for &cpu in &cpus {
        on_cpu(cpu, || {
            BY_GENERATIONS.write(41);
            // SAFETY: never freed.
            unsafe { this_cpu::write(dynamic, 43) };
        });
    }
    let child_is_right = || {
        cpus.iter().all(|&cpu| {
            keep_on(0, &[cpu]);
            // SAFETY: never freed.
            let sum = unsafe { this_cpu::add_return(dynamic, 1) };
            let is_right = sum == 44 && BY_GENERATIONS.read() == 41;
            (0..1000).for_each(|_| BY_GENERATIONS.inc());
            is_right && BY_GENERATIONS.read() == 1041 && on(&BY_GENERATIONS, cpu) == 1041
        })
    };
    // SAFETY: the child calls what may be called in one, the operations among it, and no destructor.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        let code = if child_is_right() { 0 } else { 1 };
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: the child was not waited for before.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!((waited, status), (child, 0), "the child was right");
    for cpu in cpus {
        assert_eq!(on(&BY_GENERATIONS, cpu), 41, "{cpu:?} of the parent");
        on_cpu(cpu, || {
            assert_eq!(BY_GENERATIONS.add_return(1), 42);
            // SAFETY: never freed.
            assert_eq!(unsafe { this_cpu::read(dynamic) }, 43);
        });
    }
}

define_per_cpu! {
    static TAG: CpuCell<u32> = CpuCell::new(0);
}

/// An operation works on the CPU that its thread has been put on, from the first one on: threads put themselves from CPU
/// to CPU, and each copy holds its CPU's number only.
#[test]
fn the_cpu_that_a_thread_was_put_on() {
    let cpus = allowed_cpus();
    let wander = |start: usize| {
        for step in start..start + 2000 {
            let cpu = cpus[step * 7 / 3 % cpus.len()];
            keep_on(0, &[cpu]);
            for _ in 0..20 {
                TAG.write(cpu.get() + 1);
                assert_eq!(TAG.read(), cpu.get() + 1);
                assert_eq!(TAG.xchg(cpu.get() + 1), cpu.get() + 1);
            }
        }
    };
    std::thread::scope(|scope| {
        for start in 0..4 {
            let wander = &wander;
            scope.spawn(move || wander(start));
        }
    });
}
