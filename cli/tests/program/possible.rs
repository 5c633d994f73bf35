//! `pcpu bench --possible-cpus`: a process that is told of more CPUs than there are. Not every system grants the namespaces
//! that it takes: where they are refused, that is what is tested.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use pcpu::global;
use serde_json::Value;

use super::{Run, finished, path, run};

/// Where the system lists the CPUs that the machine may have.
const LIST: &str = "/sys/devices/system/cpu/possible";

/// The least that the option takes here.
fn machine_cpus() -> u32 {
    global::stray_unit().get()
}

/// More than that.
fn more_cpus() -> u32 {
    machine_cpus() + 14
}

/// An empty folder for the temporary files of a test.
fn folder(name: &str) -> PathBuf {
    let folder = path(name);
    // It may be there from another run.
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).expect("the test's folder can be written to");
    folder
}

/// `pcpu bench` with more possible CPUs.
fn bench(args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pcpu"));
    command.args(["bench", "--possible-cpus", &more_cpus().to_string()]);
    command.args(args.split_whitespace());
    command
}

/// What ran inside; none where the system refuses namespaces, and the program says so.
#[track_caller]
fn unless_refused(run: Run) -> Option<Run> {
    if run.code == 2 && run.stderr.contains("namespace") {
        is_refusal(&run);
        assert!(!are_granted(), "{run:#?}");
        println!("not tested further: {}", run.stderr);
        return None;
    }
    Some(run)
}

/// Whether another program gets what this one is to get. Where that one is missing, nobody knows.
fn are_granted() -> bool {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount"]);
    command.args(["mount", "--bind", LIST, LIST]);
    command.output().is_ok_and(|output| output.status.success())
}

#[track_caller]
fn is_refusal(run: &Run) {
    let error = run.error(2);
    assert!(
        error.starts_with("--possible-cpus ") && error.contains(LIST) && error.contains("os error"),
        "{error}"
    );
    assert_eq!(run.stdout, "");
}

#[test]
fn the_processes_own_instance_has_so_many_cpus() {
    let before = fs::read_to_string(LIST).ok();
    let temporary = folder("possible-cpus");
    let run = finished(bench("all --iters 1809 --json").env("TMPDIR", &temporary));
    let left = fs::read_dir(&temporary).expect("it is there");
    assert_eq!(left.count(), 0, "the list has been removed");
    assert_eq!(fs::read_to_string(LIST).ok(), before, "nobody else sees it");
    let Some(run) = unless_refused(run) else {
        return;
    };
    let rows: Vec<Value> = serde_json::from_str(&run.ok()).expect("an array");
    for bench in ["pair", "churn", "threads", "add-hot", "add-8"] {
        assert!(rows.iter().any(|row| row["bench"] == bench), "{bench}");
    }
    for row in rows {
        assert_eq!(row["cpus"], more_cpus(), "{row}");
    }
}

#[test]
fn as_many_as_there_are_is_enough_and_fewer_are_refused() {
    let least = machine_cpus();
    let enough = run(&format!("bench pair --possible-cpus {least} --iters 1"));
    if let Some(enough) = unless_refused(enough) {
        enough.ok();
    }
    if least == 1 {
        println!("not tested further: there is one CPU");
        return;
    }
    let run = run(&format!("bench pair --possible-cpus {}", least - 1));
    let error = run.error(2);
    let value = format!("--possible-cpus {}: ", least - 1);
    let limit = format!("this machine may have {least},");
    assert!(
        error.starts_with(&value) && error.contains(&limit),
        "{error}"
    );
    assert_eq!(run.stdout, "");
}

#[test]
fn what_is_wrong_inside_is_told_once() {
    let temporary = folder("possible-cpus-wrong");
    let run = finished(bench("pair --iters 1 --case frob").env("TMPDIR", &temporary));
    let left = fs::read_dir(&temporary).expect("it is there");
    assert_eq!(left.count(), 0, "the list has been removed");
    let Some(run) = unless_refused(run) else {
        return;
    };
    assert!(run.error(2).starts_with("--case frob: "), "{run:#?}");
    assert_eq!(run.stdout, "");
}

/// The process that thinks it is the one inside never starts another.
#[test]
fn a_process_that_was_not_told_says_so() {
    let run = finished(bench("pair --iters 1").env("PCPU_BENCH_INSIDE", "1"));
    let error = run.error(2);
    let told = format!("tells of {} CPUs", machine_cpus());
    assert!(
        error.contains(&told) && error.contains("PCPU_BENCH_INSIDE"),
        "{error}"
    );
    assert_eq!(run.stdout, "");
}

#[test]
fn without_a_folder_for_the_list_nothing_is_measured() {
    let absent = path("possible-cpus-absent");
    let run = finished(bench("pair --iters 1").env("TMPDIR", &absent));
    let error = run.error(2);
    assert!(
        error.contains("temporary file") && error.contains(&absent.display().to_string()),
        "{error}"
    );
    assert_eq!(run.stdout, "");
}

/// A user namespace may forbid those below it, whoever asks.
#[test]
fn a_refusal_is_one_line() {
    let temporary = folder("possible-cpus-refused");
    let none_below = "echo 0 > /proc/sys/user/max_user_namespaces || exit 77; exec \"$@\"";
    let refused = bench("pair --iters 1");
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "sh", "-c", none_below, "sh"])
        .arg(refused.get_program())
        .args(refused.get_args())
        .env("TMPDIR", &temporary);
    let can_forbid = command.output().is_ok_and(|output| {
        let is_unshare = output.stderr.starts_with(b"unshare: ");
        output.status.code() != Some(77) && !is_unshare
    });
    if !can_forbid {
        println!("not tested: there is no namespace that forbids others");
        return;
    }
    is_refusal(&finished(&mut command));
    let left = fs::read_dir(&temporary).expect("it is there");
    assert_eq!(left.count(), 0, "the list has been removed");
}
