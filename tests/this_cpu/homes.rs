//! Threads and processes that have less than usual: no restartable sequences, a CPU for the first time, a parent that
//! forked.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use pcpu::global::{method, online_cpus, stray_unit};
use pcpu::this_cpu::process::Method;
use pcpu::unit::CpuId;
use pcpu::{CpuCell, LocalCell, PerCpu, StaticVar, alloc_percpu, define_per_cpu, global, this_cpu};

use crate::child::run_in_child;
use crate::crew::{Crew, without_restartable_sequences};
use crate::storm::storm;
use crate::system::{allowed_cpus, keep_on, on_cpu, try_keep_on, unregister};

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
    storm(Crew::HALF_STRAYS, 20);
}

/// A process whose glibc registers nothing.
#[test]
fn a_process_without_restartable_sequences() {
    let name = "homes::a_process_without_restartable_sequences";
    without_restartable_sequences(name, || {
        assert_eq!(method(), Method::Locked);
        storm(Crew::REGISTERED, 20);
        let is_used = global().units().materialised().contains(stray_unit());
        assert!(!is_used, "nobody is a stray");
    });
}

/// The library of `registrar.c`, or why it is not there.
fn registrar() -> &'static Result<PathBuf, String> {
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/this_cpu/registrar.c");
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libregistrar.so");
        let own = library.with_extension(std::process::id().to_string());
        let output = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([own.as_os_str(), source.as_ref()])
            .output()
            .map_err(|error| format!("no C compiler: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        // In one step, for another run of the tests may be about to load it.
        std::fs::rename(own, &library).map_err(|error| error.to_string())?;
        Ok(library)
    })
}

/// Whether the registrar's call succeeded; `None` without the registrar.
fn has_registered() -> Option<bool> {
    // SAFETY: looks a name up.
    let result = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"registrar_result".as_ptr()) };
    // SAFETY: the library defines it as an integer, which it writes before `main` only.
    (!result.is_null()).then(|| unsafe { *result.cast::<libc::c_int>() } == 0)
}

/// Another library registers an area of its own, which glibc leaves to it: the area is not touched, all steps are LOCKed.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_process_with_another_registrar() {
    let name = "homes::a_process_with_another_registrar";
    if has_registered().is_none() {
        match registrar() {
            Ok(library) => assert!(run_in_child(name, |command| {
                command
                    .env("LD_PRELOAD", library)
                    .env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
            })),
            Err(reason) => println!("not tested: {reason}"),
        }
        return;
    }
    assert_eq!(
        has_registered(),
        Some(true),
        "the kernel has the other's area"
    );
    assert_eq!(method(), Method::Locked);
    storm(Crew::REGISTERED, 20);
}

/// Where glibc has registered an area, another library's is refused, and nothing changes.
#[test]
#[cfg(target_arch = "x86_64")]
fn another_registrar_beside_glibc() {
    let name = "homes::another_registrar_beside_glibc";
    if has_registered().is_none() {
        match registrar() {
            Ok(library) if method() == Method::RestartableSequences => {
                assert!(run_in_child(name, |command| {
                    command.env("LD_PRELOAD", library);
                }));
            }
            Ok(_) => println!("not tested: glibc registers nothing here"),
            Err(reason) => println!("not tested: {reason}"),
        }
        return;
    }
    assert_eq!(has_registered(), Some(false), "the kernel has glibc's area");
    assert_eq!(method(), Method::RestartableSequences);
}

/// A thread that is kept on one CPU is told so, and so is one whose process is: what a container does.
#[test]
fn the_cpus_that_a_thread_may_run_on() {
    let online = online_cpus();
    let all = allowed_cpus();
    assert_eq!(global::allowed_cpus(), all);
    assert!(all.iter().all(|cpu| online.contains(cpu)));
    let is_possible = |cpu: &CpuId| global().units().possible().contains(*cpu);
    assert!(online.iter().all(is_possible) && !online.contains(&stray_unit()));
    for cpu in all {
        let flags = PerCpu::<AtomicU32>::new().expect("there is memory");
        on_cpu(cpu, || {
            assert_eq!(global::allowed_cpus(), [cpu]);
            assert_eq!(online_cpus(), online);
            for copy in flags.iter_on(global::allowed_cpus()) {
                let (_, flag) = copy.expect("a possible CPU");
                flag.store(7, Relaxed);
            }
            let current = flags.current().expect("a possible CPU");
            assert_eq!(current.load(Relaxed), 7);
        });
        let raised = flags.iter().filter(|(_, flag)| flag.load(Relaxed) == 7);
        assert_eq!(raised.count(), 1);
    }
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
