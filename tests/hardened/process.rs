//! The process's instance, hardened by the environment: each test starts itself again with it.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pcpu::unit::CpuId;
use pcpu::{
    CpuCell, LocalCell, PerCpu, RemoteCell, alloc_percpu, free_percpu, global, per_cpu_ptr,
};

/// Starts the test `name` again, with `PCPU_HARDENED` as said. What the child does is in the branch of `is_child`.
fn child(name: &str, hardened: &str) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture"]);
    command
        .env("PCPU_TEST_CHILD", "1")
        .env("PCPU_HARDENED", hardened);
    command.output().unwrap()
}

fn is_child() -> bool {
    env::var_os("PCPU_TEST_CHILD").is_some()
}

/// What was told on standard error of a child.
fn told(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines = text.lines().filter(|line| line.starts_with("pcpu: "));
    lines.map(ToOwned::to_owned).collect()
}

/// Writes behind a variable, and to it after it was freed.
fn mistakes() {
    let variable = alloc_percpu::<u64>().unwrap();
    let copy = per_cpu_ptr(variable, CpuId::new(0)).unwrap();
    pcpu::this_cpu_ptr(variable).unwrap();
    global().bring_up(CpuId::new(0)).unwrap();
    let before = alloc_percpu::<u64>().unwrap();
    // SAFETY: the guards behind are the instance's memory, and are not looked at now. That is the mistake.
    unsafe { copy.as_ptr().add(1).write_volatile(1) };
    // SAFETY: nobody uses the variables.
    unsafe { free_percpu(variable) }.unwrap();
    // SAFETY: as above.
    unsafe { free_percpu(before) }.unwrap();
    // SAFETY: what is in quarantine is the instance's memory. That is the mistake.
    unsafe { copy.as_ptr().write_volatile(1) };
    global().check_areas();
}

#[test]
fn mistakes_are_told() {
    if is_child() {
        return mistakes();
    }
    let output = child("process::mistakes_are_told", "report");
    assert!(output.status.success(), "{output:?}");
    let told = told(&output);
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].starts_with("pcpu: CPU 0's copy of the area of 8 bytes at 0x"));
    assert!(told[0].ends_with("written behind its end, 0x01 at byte 8"));
    assert!(told[1].ends_with("written after it was freed, 0x01 at byte 0"));
}

#[test]
fn the_first_mistake_aborts() {
    if is_child() {
        return mistakes();
    }
    let output = child("process::the_first_mistake_aborts", "abort");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    assert_eq!(told(&output).len(), 1);
}

#[test]
fn a_value_without_meaning_ends_the_process() {
    if is_child() {
        panic!("it did not end");
    }
    let output = child("process::a_value_without_meaning_ends_the_process", "yes");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_eq!(
        told(&output),
        ["pcpu: PCPU_HARDENED is \"yes\"; it can be off, report or abort"]
    );
}

#[test]
fn off_is_off() {
    if is_child() {
        assert!(global().has_caches() && !global().is_hardened());
        return;
    }
    assert!(child("process::off_is_off", "off").status.success());
}

/// A fork waits for whoever is at the ledger, and keeps others away from it until it is over: the child finds it free, though
/// some thread of the parent is there all the time, and another waits.
#[test]
fn a_fork_finds_the_ledger_free() {
    if !is_child() {
        let output = child("process::a_fork_finds_the_ledger_free", "report");
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let _variable = PerCpu::<CpuCell<u64>>::new().unwrap();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    global().visit_live_areas(|_| thread::sleep(Duration::from_millis(2)));
                }
            });
        }
        let mut ends = (0..20).map(|_| end_of_child_that_allocates());
        let wrong = ends.find(|&end| end != 0);
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(wrong, None, "of the child, as `waitpid` says it");
    });
}

/// What `waitpid` says of a child that allocates, and is ended by a signal if it waits for ever.
fn end_of_child_that_allocates() -> i32 {
    // SAFETY: the child only uses the instance, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: it has no preconditions.
        unsafe { libc::alarm(20) };
        let is_right = PerCpu::<CpuCell<u64>>::new().is_ok();
        // SAFETY: it runs nothing of the parent's.
        unsafe { libc::_exit(i32::from(!is_right)) };
    }
    let mut status = 0;
    // SAFETY: the status is a variable of this thread.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    status
}

/// Threads that count, allocate and free, and children that do: nothing is found.
#[test]
fn right_programs_run_as_ever() {
    if !is_child() {
        let output = child("process::right_programs_run_as_ever", "abort");
        assert!(output.status.success(), "{output:?}");
        assert_eq!(told(&output), [""; 0]);
        return;
    }
    assert!(global().is_hardened() && !global().has_caches());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..300 {
                    let counter = PerCpu::<CpuCell<u64>>::new().unwrap();
                    (0..10).for_each(|_| counter.add(2));
                    assert_eq!(counter.sum(), 20);
                    let table = PerCpu::<[CpuCell<u32>]>::new_slice(1 + round).unwrap();
                    drop(table);
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..20 {
                // SAFETY: the child only uses the instance, and ends.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    let counter = PerCpu::<CpuCell<u64>>::new();
                    let is_right = counter.is_ok_and(|counter| {
                        counter.add(1);
                        counter.sum() == 1
                    });
                    // SAFETY: it runs nothing of the parent's.
                    unsafe { libc::_exit(i32::from(!is_right)) };
                }
                let mut status = 0;
                // SAFETY: the status is a variable of this thread.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert_eq!(status, 0);
            }
        });
    });
    assert_eq!(global().check_areas(), 0);
    let mut live = 0;
    global().visit_live_areas(|_| live += 1);
    assert_eq!(live, 0);
}
