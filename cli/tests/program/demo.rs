//! `pcpu demo`: every check holds, and what it records can be replayed.

use std::fs;

use super::replay::json;
use super::{path, run};

/// The lines that say `ok`; none says that a check failed.
#[track_caller]
fn checks(text: &str) -> Vec<&str> {
    assert!(!text.contains("FAILED"), "{text}");
    let checks: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("ok "))
        .collect();
    assert!(
        text.contains(&format!("All {} checks held.", checks.len())),
        "{text}"
    );
    checks
}

#[test]
fn every_check_holds() {
    for command in ["", "demo"] {
        let text = run(command).ok();
        let checks = checks(&text);
        for what in [
            "same unit offset",
            "static REQUESTS: ",
            "dynamic hits: ",
            "free inside an area refused",
            "free of a static variable refused",
            "free of a CPU's pointer refused",
            "second free refused",
            "zero again",
            "none refused",
        ] {
            assert!(
                checks.iter().any(|check| check.contains(what)),
                "{what}: {text}"
            );
        }
        for what in [
            "percpu: ",
            "pcpu-alloc: ",
            "nr_alloc",
            "boot8 at its peak",
            "│",
        ] {
            assert!(text.contains(what), "{what}: {text}");
        }
    }
}

#[test]
fn a_recording_is_replayed() {
    let file = path("recorded.trace");
    let file = file.display();
    let text = run(&format!("demo --record {file}")).ok();
    checks(&text);
    assert!(text.contains(&format!("pcpu replay {file}\n")), "{text}");

    let trace = fs::read_to_string(path("recorded.trace")).unwrap();
    let lines = |event: &str| trace.lines().filter(|line| line.contains(event)).count() as u64;
    let report = json(&file.to_string(), "");
    assert_eq!(report["failed"], 0);
    assert_eq!(report["skipped_frees"], 0);
    assert_eq!(report["linux_failed"], 0);
    assert_eq!(report["allocs"], lines(": percpu_alloc_percpu: "));
    assert_eq!(report["frees"], lines(": percpu_free_percpu: "));
    assert_eq!(report["allocs"], report["frees"]);
    assert!(report["allocs"].as_u64() > Some(100), "{report}");
}

#[test]
fn a_recording_needs_a_file() {
    let run = run("demo --record /no/such/file");
    assert!(run.error(2).contains("/no/such/file"));
    assert_eq!(run.stdout, "");
}
