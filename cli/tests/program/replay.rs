//! `pcpu replay`: what each sort of line means, what is reported, and what is refused.

use std::fs;
use std::io::Write;

use flate2::{Compression, write::GzEncoder};
use serde_json::Value;

use super::placements::{placements, row};
use super::{Run, file, run};

/// A boot of Linux, bundled with the program.
pub const BOOT8: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../traces/boot8.trace.gz");

/// The fields of a report, in order.
const FIELDS: [&str; 20] = [
    "file",
    "ops",
    "allocs",
    "frees",
    "skipped_frees",
    "failed",
    "failed_atomic",
    "linux_failed",
    "chunks_peak",
    "chunks_end",
    "chunks_created",
    "chunks_destroyed",
    "pages_peak",
    "pages_end",
    "live_peak_bytes",
    "util_populated_avg",
    "metadata_bytes",
    "cache_hit_rate",
    "fences",
    "ns_per_op",
];

fn line(cpu: u32, event: &str) -> String {
    format!("            task-7       [{cpu:03}] d..1.     0.934441: {event}")
}

/// The line of an allocation that may sleep.
pub fn alloc(cpu: u32, bytes: u64, align: u64, ptr: u64) -> String {
    let request = format!("reserved=0 is_atomic=0 size={bytes} align={align}");
    line(
        cpu,
        &format!(
            "percpu_alloc_percpu: call_site=f+0x50/0x250 {request} base_addr=ff00 off=8 ptr={ptr:016x} bytes_alloc=40 gfp_flags=GFP_KERNEL"
        ),
    )
}

/// The line of a request that Linux refused.
fn refused(bytes: u64, is_atomic: u8) -> String {
    let request = format!("reserved=0 is_atomic={is_atomic} size={bytes} align=8");
    line(0, &format!("percpu_alloc_percpu_fail: {request}"))
}

/// The line of a free.
pub fn free(cpu: u32, ptr: u64) -> String {
    line(
        cpu,
        &format!("percpu_free_percpu: base_addr=ff00 off=8 ptr={ptr:016x}"),
    )
}

/// Writes a trace and returns its path.
pub fn trace(name: &str, lines: &[impl AsRef<str>]) -> String {
    let mut text = String::from("# tracer: nop\n#\n");
    for line in lines {
        text += line.as_ref();
        text.push('\n');
    }
    file(&format!("{name}.trace"), text)
}

/// The report on one file.
#[track_caller]
pub fn json(file: &str, options: &str) -> Value {
    report(run(&format!("replay {file} --json {options}")).ok())
}

#[track_caller]
fn report(text: String) -> Value {
    let mut reports: Vec<Value> = serde_json::from_str(&text).expect("an array");
    assert_eq!(reports.len(), 1, "{text}");
    reports.remove(0)
}

/// Checks some of a report's figures.
#[track_caller]
fn assert_figures(report: &Value, figures: &[(&str, u64)]) {
    for &(field, want) in figures {
        assert_eq!(report[field], want, "{field}: {report}");
    }
}

#[test]
fn fields_and_their_order() {
    let file = trace("fields", &[alloc(0, 6, 4, 1), free(0, 1)]);
    let text = run(&format!("replay {file} --json")).ok();
    let printed: Vec<_> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix('"')?.split_once("\": "))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(printed, FIELDS);
    let report = report(text);
    assert_eq!(report["file"], file);
    assert_figures(
        &report,
        &[
            ("ops", 2),
            ("allocs", 1),
            ("frees", 1),
            ("chunks_created", 1),
            ("pages_peak", 61),
            ("pages_end", 61),
            ("live_peak_bytes", 8),
        ],
    );
    // 8 bytes after the first operation, none after the second; the first chunk's pages less the static region.
    let util = report["util_populated_avg"].as_f64().unwrap();
    let want = 8.0 / f64::from(61 * 4096 - 212_992) / 2.0;
    assert!((util - want).abs() < 1e-12, "{util}");
    assert!(report["ns_per_op"].as_f64() > Some(0.0));
}

#[test]
fn an_empty_trace_has_figures_too() {
    let report = json(&file("empty.trace", ""), "");
    assert_figures(
        &report,
        &[("ops", 0), ("pages_peak", 61), ("chunks_peak", 1)],
    );
    assert_eq!(report["util_populated_avg"], 0.0);
    assert_eq!(report["ns_per_op"], 0.0);
}

#[test]
fn an_address_that_is_live_already() {
    let file = trace(
        "reuse",
        &[
            alloc(0, 8, 8, 0x10),
            alloc(0, 16, 8, 0x10),
            free(0, 0x10),
            free(0, 0x10),
            alloc(0, 24, 8, 0x10),
            free(0, 0x10),
        ],
    );
    assert_figures(
        &json(&file, ""),
        &[
            ("allocs", 3),
            ("frees", 2),
            ("skipped_frees", 1),
            ("live_peak_bytes", 32),
        ],
    );
    let rows = placements("reuse", &file, "--no-cache");
    let ends: Vec<_> = rows
        .iter()
        .map(|row| row.split(',').nth(6).unwrap())
        .collect();
    assert_eq!(ends, ["", "2", "4"]);
}

#[test]
fn frees_without_an_allocation() {
    let file = trace(
        "skipped",
        &[free(0, 1), alloc(0, 8, 8, 1), free(0, 2), free(0, 1)],
    );
    assert_figures(
        &json(&file, ""),
        &[
            ("ops", 2),
            ("frees", 1),
            ("skipped_frees", 2),
            ("failed", 0),
        ],
    );
    let table = run(&format!("replay {file}")).ok();
    assert!(table.contains("2 frees skipped"), "{table}");
}

#[test]
fn what_linux_refused_is_tried_and_freed() {
    let served = [alloc(0, 8, 8, 1), alloc(0, 8, 8, 2), free(0, 1)];
    let mut lines = Vec::from(served.clone());
    lines.insert(1, refused(64, 0));
    lines.insert(2, refused(64, 1));
    let with = trace("refused", &lines);
    let report = json(&with, "");
    assert_figures(
        &report,
        &[
            ("ops", 3),
            ("linux_failed", 2),
            ("failed", 0),
            ("live_peak_bytes", 16),
        ],
    );
    // No rows of their own. They are freed at once, and swept when there is need.
    let rows = placements("refused", &with, "--no-cache");
    assert_eq!(rows, [row(0, 0, "8,8,0,2"), row(1, 8 + 2 * 64, "8,8,1,")]);
}

#[test]
fn what_is_refused_here_ends_with_1() {
    // More than any request may have.
    let large = 1 << 20;
    let file = trace(
        "large",
        &[
            refused(large, 1),
            refused(large, 0),
            alloc(0, large, 8, 1),
            alloc(0, 8, 8, 2),
            free(0, 1),
        ],
    );
    let run = run(&format!("replay {file} --json"));
    let error = run.error(1);
    assert!(
        error.contains("3 requests failed") && error.contains(&format!("{file}:3: ")),
        "{error}"
    );
    assert!(
        error.contains("1048576") && error.contains("32768"),
        "{error}"
    );
    assert_figures(
        &report(run.stdout),
        &[
            ("ops", 1),
            ("failed", 3),
            ("failed_atomic", 1),
            ("linux_failed", 2),
            ("skipped_frees", 1),
        ],
    );
}

#[test]
fn other_lines_are_counted() {
    let file = trace(
        "others",
        &[
            alloc(0, 8, 8, 1),
            "CPU:3 [LOST 12 EVENTS]".to_owned(),
            "CPU:1 [LOST EVENTS]".to_owned(),
            line(0, "percpu_create_chunk: base_addr=ff00"),
            line(0, "sched_switch: prev_comm=percpu_free_percpu: prev_pid=1"),
            free(0, 1),
        ],
    );
    let table = run(&format!("replay {file}")).ok();
    for note in ["2 other lines skipped", "2 gaps", "12 events lost there"] {
        assert!(table.contains(note), "{table}");
    }
    assert_figures(&json(&file, ""), &[("ops", 2), ("skipped_frees", 0)]);
}

#[test]
fn gfp_flags_may_be_empty() {
    let line = alloc(0, 8, 8, 1).replace("GFP_KERNEL", "");
    assert!(line.ends_with("gfp_flags="));
    assert_figures(&json(&trace("gfp", &[line]), ""), &[("allocs", 1)]);
}

#[test]
fn malformed_events_are_named_by_file_and_line() {
    for (name, line, what) in [
        (
            "bad_size",
            alloc(0, 8, 8, 1).replace("size=8", "size=x"),
            "size=x",
        ),
        ("bad_align", alloc(0, 8, 3, 1), "align=3"),
        ("zero", alloc(0, 0, 8, 1), "size=0"),
        ("bad_ptr", free(0, 1).replace("ptr=0", "ptr=g"), "ptr=g"),
        (
            "no_ptr",
            line(0, "percpu_free_percpu: off=1"),
            "ptr= is missing",
        ),
        (
            "no_head",
            "percpu_free_percpu: ptr=1".to_owned(),
            "percpu_free_percpu",
        ),
    ] {
        // Two lines of comment stand before.
        let file = trace(name, &[alloc(0, 8, 8, 1), line]);
        let run = run(&format!("replay {file} --json"));
        let error = run.error(2);
        assert!(
            error.starts_with(&format!("{file}:4: ")) && error.contains(what),
            "{error}"
        );
        assert_eq!(run.stdout, "");
    }
}

#[test]
fn files_that_cannot_be_read() {
    assert!(
        run("replay /no/such.trace")
            .error(2)
            .contains("/no/such.trace")
    );
    let cut = file("cut.trace.gz", &fs::read(BOOT8).unwrap()[..1000]);
    assert!(
        run(&format!("replay {cut}"))
            .error(2)
            .contains("ends too early")
    );
}

#[test]
fn gzip_or_plain() {
    let lines = [alloc(0, 8, 8, 1), free(0, 1)].join("\n");
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(lines.as_bytes()).unwrap();
    // The content counts, not the name.
    let gzip = file("gzip_by_content.trace", gzip.finish().unwrap());
    let plain = file("plain_by_content.trace.gz", lines);
    for file in [gzip, plain] {
        assert_figures(&json(&file, ""), &[("allocs", 1), ("frees", 1)]);
    }
}

#[test]
fn files_in_order_each_on_a_machine_of_its_own() {
    let one = trace("one", &[alloc(0, 8, 8, 1)]);
    let two = trace("two", &[alloc(0, 8, 8, 1), alloc(0, 16, 8, 2)]);
    let text = run(&format!("replay {two} {one} {two} --json")).ok();
    let reports: Vec<Value> = serde_json::from_str(&text).unwrap();
    let got: Vec<_> = reports
        .iter()
        .map(|report| {
            (
                report["file"].as_str().unwrap(),
                report["live_peak_bytes"].as_u64(),
            )
        })
        .collect();
    assert_eq!(
        got,
        [(two.as_str(), Some(24)), (&one, Some(8)), (&two, Some(24))]
    );
}

#[test]
fn reserved_requests() {
    let reserved = alloc(0, 40, 8, 1).replace("reserved=0", "reserved=1");
    let file = trace("reserved", &[reserved, alloc(0, 8, 8, 2), free(0, 1)]);
    assert_eq!(
        placements("reserved", &file, "--no-cache"),
        ["0,0,212992,40,8,0,2".to_owned(), row(1, 0, "8,8,1,")]
    );
    // The region has 8 KiB.
    let much = alloc(0, 8196, 4, 1).replace("reserved=0", "reserved=1");
    let run = run(&format!("replay {}", trace("reserved_much", &[much])));
    let error = run.error(1);
    assert!(error.contains("8196") && error.contains("8192"), "{error}");
}

#[test]
fn repeats_change_nothing_but_the_time() {
    let without_time = |options: &str| {
        let mut report = json(BOOT8, options);
        assert!(report["ns_per_op"].as_f64() > Some(0.0));
        report.as_object_mut().unwrap().remove("ns_per_op");
        report
    };
    let once = without_time("");
    assert_eq!(once, without_time("--repeat 3"));
    assert_figures(
        &once,
        &[("failed", 0), ("skipped_frees", 0), ("ops", 10_810)],
    );
}

#[test]
fn rare_upkeep_gives_back_later() {
    let due = json(BOOT8, "--no-zero --no-cache");
    let rare = json(BOOT8, "--no-zero --no-cache --upkeep-every 1000");
    assert_figures(&rare, &[("failed", 0), ("ops", 10_810)]);
    let pages = |report: &Value| report["pages_peak"].as_u64().unwrap();
    assert!(pages(&rare) >= pages(&due), "{due} {rare}");
    assert_eq!(rare["live_peak_bytes"], due["live_peak_bytes"]);
}

#[test]
fn cpus_are_taken_modulo_the_machine() {
    let file = trace("modulo", &[alloc(1, 8, 8, 1), free(17, 1)]);
    let is_remote = |options: &str| {
        let table = run(&format!("replay {file} {options}")).ok();
        table.contains("1 frees from another CPU")
    };
    assert!(!is_remote(""));
    assert!(!is_remote("--cpus 1"));
    assert!(is_remote("--cpus 32"));
    assert!(is_remote("--cpus 3 --nodes 3"));
}

#[test]
fn options_have_limits() {
    let file = trace("limits", &[alloc(0, 8, 8, 1)]);
    let refused = |options: &str| -> Run { run(&format!("replay {file} {options}")) };
    for (options, value, limit) in [
        ("--cpus 0", "0", "from 1 to 8192"),
        ("--cpus 9000", "9000", "from 1 to 8192"),
        ("--cpus -1", "-1", "from 1 to 8192"),
        ("--cpus x", "x", "from 1 to 8192"),
        ("--nodes 0", "0", "from 1 to 8192"),
        ("--nodes 17", "17", "the limit is 16"),
        ("--repeat 0", "0", "from 1 to"),
        ("--upkeep-every 0", "0", "from 1 to"),
    ] {
        let run = refused(options);
        let error = run.error(2);
        assert!(
            error.contains(value) && error.contains(limit),
            "{options}: {error}"
        );
        assert_eq!(run.stdout, "", "{options}");
    }
}

/// What hardened mode adds to a report, in order.
const HARDENED_FIELDS: [&str; 4] = [
    "findings",
    "usual_pages_peak",
    "usual_metadata_bytes",
    "usual_ns_per_op",
];

/// A replay touches its own bytes only, also those of areas that end between granules: nothing is found, and the cost is shown.
#[test]
fn hardened_replays_find_nothing() {
    let lines = [
        alloc(0, 10, 2, 0xa000),
        alloc(1, 7, 1, 0xb000),
        free(1, 0xa000),
        alloc(0, 3000, 8, 0xc000),
        free(0, 0xb000),
    ];
    let file = trace("hardened", &lines);
    let usual = report(run(&format!("replay --json {file}")).ok());
    let text = run(&format!("replay --json --hardened --repeat 2 {file}")).ok();
    let at = |field: &str| text.find(&format!("\"{field}\":")).expect("it is there");
    let places: Vec<_> = FIELDS
        .iter()
        .chain(&HARDENED_FIELDS)
        .map(|f| at(f))
        .collect();
    assert!(places.is_sorted(), "{text}");
    let hardened = report(text.clone());
    assert_eq!(usual.as_object().unwrap().len(), FIELDS.len());
    let figures = [("ops", 5), ("allocs", 3), ("failed", 0), ("findings", 0)];
    assert_figures(&hardened, &figures);
    for (in_usual, beside) in [
        ("pages_peak", "usual_pages_peak"),
        ("metadata_bytes", "usual_metadata_bytes"),
    ] {
        assert_eq!(usual[in_usual], hardened[beside]);
    }
    let plain = report(run(&format!("replay --json --no-cache {file}")).ok());
    let metadata_bytes = |of: &Value| of["metadata_bytes"].as_u64().unwrap();
    assert!(metadata_bytes(&hardened) > metadata_bytes(&plain));
    assert_eq!(hardened["cache_hit_rate"], 0.0);

    let told = run(&format!("replay --hardened {file}")).ok();
    assert!(told.contains("hardened: 0 findings; "), "{told}");
    assert!(told.contains(", hardened\n"), "{told}");
}

/// A whole boot, whose areas are of all lengths.
#[test]
fn a_hardened_boot() {
    let hardened = report(run(&format!("replay --json --hardened {BOOT8}")).ok());
    assert_figures(&hardened, &[("failed", 0), ("findings", 0)]);
    let pages = |field: &str| hardened[field].as_u64().unwrap();
    assert!(pages("pages_peak") > pages("usual_pages_peak"));
}
