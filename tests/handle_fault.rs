//! A handle is no pointer: whoever follows one by mistake, of whatever sort, is ended by the system at once.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::AtomicU64;

use pcpu::{Handle, PerCpuPtr, alloc_percpu, define_per_cpu, per_cpu_ptr};

/// Names, in the environment of a child, the handle that it follows.
const FOLLOW: &str = "PCPU_TEST_FOLLOW";

define_per_cpu! {
    static HITS: AtomicU64 = AtomicU64::new(7);
}

/// An address, and whether there is something to be read at it.
fn address(of: &str) -> usize {
    let dynamic: PerCpuPtr<AtomicU64> = alloc_percpu().unwrap();
    let cpu = pcpu::unit::CpuId::new(0);
    match of {
        "dynamic" => dynamic.neutral(),
        "static" => HITS.handle().neutral(),
        "a copy" => per_cpu_ptr(dynamic, cpu).unwrap().addr().get(),
        "a static copy" => per_cpu_ptr(&HITS, cpu).unwrap().addr().get(),
        other => panic!("{other}"),
    }
}

#[test]
fn following_a_handle_faults() {
    if let Ok(of) = env::var(FOLLOW) {
        let pointer = std::ptr::with_exposed_provenance::<u64>(address(&of));
        // SAFETY: a copy is there to be read, and nobody writes to it. A handle is not: the process is made for that, and
        // ends here.
        let value = unsafe { pointer.read_volatile() };
        println!("{of} holds {value}");
        return;
    }
    for (of, signal) in [
        ("a copy", None),
        ("a static copy", None),
        ("dynamic", Some(libc::SIGSEGV)),
        ("static", Some(libc::SIGSEGV)),
    ] {
        let status = Command::new(env::current_exe().unwrap())
            .args(["following_a_handle_faults", "--exact"])
            .env(FOLLOW, of)
            .status()
            .unwrap();
        assert_eq!(status.signal(), signal, "{of}: {status}");
    }
}
