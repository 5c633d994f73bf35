//! The process's instance under valgrind, which knows no restartable sequences and lends no vDSO: everything works, by LOCKed
//! steps, and no access is wrong.
//!
//! Without valgrind on the machine nothing is tested, and the test says so.

#![cfg(target_os = "linux")]

#[path = "common/child.rs"]
mod child;

use std::num::NonZeroU32;
use std::process::{Command, Stdio};
use std::thread;

use pcpu::global::method;
use pcpu::refcount::Kill;
use pcpu::this_cpu::process::Method;
use pcpu::{
    BatchCounter, CpuCell, Global, LocalCell, PerCpu, RefCount, RemoteCell, Request,
    alloc_percpu_bytes, define_per_cpu, free_percpu, global,
};

use child::run_in_child;

define_per_cpu! {
    static COUNTED: CpuCell<u64> = CpuCell::new(0);
}

fn is_installed() -> bool {
    let mut command = Command::new("valgrind");
    let command = command.arg("--version").stdout(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[test]
fn nothing_is_wrong_under_valgrind() {
    if std::env::var_os(child::IS_CHILD).is_none() && !is_installed() {
        println!("not tested: no valgrind here");
        return;
    }
    if run_in_child("nothing_is_wrong_under_valgrind", |command| {
        let test = command.get_program().to_owned();
        *command = Command::new("valgrind");
        command.args(["--quiet", "--error-exitcode=9"]).arg(test);
    }) {
        return;
    }
    assert_eq!(method(), Method::Locked);
    let owned = PerCpu::<[CpuCell<u32>]>::new_slice(100).expect("there is memory");
    let batched =
        BatchCounter::new(0, NonZeroU32::MIN.saturating_add(31)).expect("there is memory");
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for number in 0..1000 {
                    COUNTED.inc();
                    owned.at(number % 100).inc();
                    batched.add(2);
                }
                for bytes in (1..200).map(|number| number * 160) {
                    let request = Request::new(bytes, 8);
                    let area = alloc_percpu_bytes::<Global>(&request).expect("there is memory");
                    // SAFETY: just allocated.
                    unsafe { free_percpu(area) }.expect("it is allocated");
                }
            });
        }
    });
    assert_eq!(COUNTED.sum(), 3000);
    assert!(owned.elements().all(|element| element.sum() == 30));
    assert_eq!(batched.sum(), 6000);
    let users = RefCount::new(|| ()).expect("there is memory");
    let user = users.try_get().expect("in service");
    assert_eq!(users.kill(), Ok(Kill::Held));
    drop(user);
    assert!(users.is_zero());
    drop((owned, batched, users));
    global().trim(0);
    assert_eq!(global().stats().live, 0);
}
