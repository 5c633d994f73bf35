//! `pcpu replay --placements`: where each area lay, as other tools read it.

use std::collections::BTreeMap;
use std::fs;

use super::replay::{BOOT8, alloc, free, json, trace};
use super::{path, pcpu, run};

/// Where dynamic areas of the first chunk begin on the default machine: behind static variables and the reserved region.
const DYNAMIC_START: u64 = 212_992 + 8192;

/// What is written of the placements of a file.
#[track_caller]
fn written(name: &str, file: &str, options: &str) -> String {
    let out = path(&format!("{name}.csv"));
    run(&format!(
        "replay {file} --placements {} {options}",
        out.display()
    ))
    .ok();
    fs::read_to_string(out).unwrap()
}

/// The rows of the placements of a file, without the header.
#[track_caller]
pub fn placements(name: &str, file: &str, options: &str) -> Vec<String> {
    let text = written(name, file, options);
    let mut lines = text.lines().map(str::to_owned);
    assert_eq!(
        lines.next().as_deref(),
        Some("id,chunk,offset,size,align,alloc_op,free_op")
    );
    lines.collect()
}

/// The row of an area in the first chunk, `at` bytes behind the start of its dynamic region.
pub fn row(id: u64, at: u64, rest: &str) -> String {
    format!("{id},0,{},{rest}", DYNAMIC_START + at)
}

#[test]
fn placements_say_what_was_asked_for() {
    let file = trace(
        "as_asked",
        &[
            alloc(0, 5, 1, 1),
            alloc(0, 100, 64, 2),
            free(0, 2),
            alloc(0, 4096, 4096, 3),
        ],
    );
    let rows = placements("as_asked", &file, "--no-cache");
    let fields = |row: &str| row.split(',').map(str::to_owned).collect::<Vec<_>>();
    let got: Vec<_> = rows.iter().map(|row| fields(row)[3..].join(",")).collect();
    assert_eq!(got, ["5,1,0,", "100,64,1,2", "4096,4096,3,"]);
    for row in &rows {
        let (offset, align): (u64, u64) = (
            fields(row)[2].parse().unwrap(),
            fields(row)[4].parse().unwrap(),
        );
        assert!(
            offset >= DYNAMIC_START && offset.is_multiple_of(align),
            "{row}"
        );
    }
}

/// Other tools read this file: no byte of it may be another.
#[test]
fn placements_to_the_letter() {
    let file = trace(
        "letter",
        &[alloc(3, 5, 1, 1), alloc(0, 8, 8, 2), free(1, 1)],
    );
    assert_eq!(
        written("letter", &file, "--no-cache"),
        "id,chunk,offset,size,align,alloc_op,free_op\n0,0,221184,5,1,0,2\n1,0,221192,8,8,1,\n"
    );
}

#[test]
fn placements_with_the_cpus_of_the_trace() {
    // The trace's CPUs, though the machine has fewer.
    let file = trace(
        "with_cpus",
        &[alloc(3, 5, 1, 1), alloc(20, 8, 8, 2), free(17, 1)],
    );
    assert_eq!(
        written("with_cpus", &file, "--placement-cpus --cpus 2 --no-cache"),
        "id,chunk,offset,size,align,alloc_op,free_op,alloc_cpu,free_cpu\n\
         0,0,221184,5,1,0,2,3,17\n\
         1,0,221192,8,8,1,,20,\n"
    );
    // The same file but for the two columns, on a trace with all sorts of events.
    let with_cpus = written("boot8_with_cpus", BOOT8, "--placement-cpus");
    let mut without_cpus = String::new();
    for line in with_cpus.lines() {
        let fields: Vec<_> = line.split(',').collect();
        let [plain @ .., alloc_cpu, free_cpu] = &fields[..] else {
            panic!("{line}")
        };
        without_cpus += &(plain.join(",") + "\n");
        if *alloc_cpu == "alloc_cpu" {
            continue;
        }
        let is_cpu = |field: &str| field.parse::<u32>().is_ok_and(|cpu| cpu < 8);
        assert!(is_cpu(alloc_cpu), "{line}");
        assert_eq!(is_cpu(free_cpu), plain.last() != Some(&""), "{line}");
    }
    assert!(without_cpus.lines().count() > 1000);
    assert_eq!(without_cpus, written("boot8_without_cpus", BOOT8, ""));
}

#[test]
fn cpus_without_placements_go_nowhere() {
    let file = trace("nowhere", &[alloc(0, 8, 8, 1)]);
    let run = run(&format!("replay {file} --placement-cpus"));
    let error = run.error(2);
    assert!(
        error.contains("--placement-cpus") && error.contains("--placements OUT.csv"),
        "{error}"
    );
    assert_eq!(run.stdout, "");
}

#[test]
fn help_tells_the_columns() {
    let help = run("replay --help").ok();
    for text in [
        "--placements <OUT.csv>",
        "id,chunk,offset,size,align,alloc_op,free_op:",
        "--placement-cpus\n",
        "alloc_cpu,free_cpu:",
    ] {
        assert!(help.contains(text), "{text}: {help}");
    }
}

#[test]
fn placements_of_a_boot_do_not_overlap() {
    let rows = placements("boot8", BOOT8, "");
    let report = json(BOOT8, "");
    assert_eq!(report["allocs"], rows.len());
    // What happens at each operation: an area comes, or goes.
    let mut ops = BTreeMap::new();
    for (index, row) in rows.iter().enumerate() {
        let fields: Vec<Option<u64>> = row.split(',').map(|field| field.parse().ok()).collect();
        let [
            Some(id),
            Some(chunk),
            Some(offset),
            Some(size),
            Some(_),
            Some(alloc_op),
            free_op,
        ] = fields[..]
        else {
            panic!("{row}")
        };
        assert_eq!(id, index as u64);
        assert!(
            chunk > 0 || (DYNAMIC_START..249_856).contains(&offset),
            "{row}"
        );
        assert!(offset + size <= 256 << 10, "{row}");
        assert!(
            ops.insert(alloc_op, ((chunk, offset), Some(size)))
                .is_none(),
            "{row}"
        );
        if let Some(free_op) = free_op {
            assert!(free_op > alloc_op, "{row}");
            assert!(
                ops.insert(free_op, ((chunk, offset), None)).is_none(),
                "{row}"
            );
        }
    }
    assert_eq!(report["ops"], ops.len());
    assert_eq!(
        ops.last_key_value().map(|(&op, _)| op),
        Some(ops.len() as u64 - 1)
    );

    let mut live: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for (op, (at, came)) in ops {
        let Some(size) = came else {
            assert!(live.remove(&at).is_some(), "operation {op}");
            continue;
        };
        let (chunk, start) = at;
        if let Some((&(other, offset), bytes)) = live.range(..(chunk, start + size)).next_back() {
            assert!(other < chunk || offset + bytes <= start, "operation {op}");
        }
        live.insert(at, size);
    }
}

#[test]
fn placements_are_for_one_file() {
    let file = trace("two_files", &[alloc(0, 8, 8, 1)]);
    let out = path("two_files.csv");
    let run = run(&format!(
        "replay {file} {file} --placements {}",
        out.display()
    ));
    let error = run.error(2);
    assert!(
        error.contains("2 files") && error.contains("limit is 1"),
        "{error}"
    );
    assert!(!out.exists());
    let nowhere = pcpu(["replay", &file, "--placements", "/no/such/out.csv"]);
    assert!(nowhere.error(2).contains("/no/such/out.csv"));
}
