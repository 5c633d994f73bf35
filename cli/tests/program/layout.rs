//! `pcpu layout`: real boot logs, and nonsense.

use serde_json::Value;

use super::{pcpu, run};

/// Real first chunks, shared with the tests of the library.
const GOLDEN: &str = include_str!("../../../tests/data/first_chunk.jsonl");

/// Every so many of them is taken here; the library's tests take all.
const EVERY: usize = 4;

fn arguments(case: &Value) -> Vec<String> {
    let mut arguments = vec!["layout".to_owned()];
    for (option, value) in [
        ("--static", &case["static"]),
        ("--reserved", &case["reserved"]),
        ("--dyn", &case["input"]["dyn_request"]),
        ("--atom", &case["input"]["atom_size"]),
        ("--page-size", &case["input"]["page_size"]),
        ("--min-unit", &case["input"]["min_unit_size"]),
    ] {
        arguments.extend([option.to_owned(), value.to_string()]);
    }
    let kind = case["first_chunk"].as_str().unwrap();
    arguments.extend(["--first-chunk".to_owned(), kind.to_owned()]);
    for group in case["groups"].as_array().unwrap() {
        let cpus = group.as_array().unwrap().iter().filter_map(Value::as_u64);
        let list: Vec<_> = cpus.map(|cpu| cpu.to_string()).collect();
        arguments.extend(["--node".to_owned(), list.join(",")]);
    }
    arguments
}

#[test]
fn real_boot_logs() {
    let mut cases = 0;
    for line in GOLDEN.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let raw = case["raw"].as_array().unwrap().iter();
        let raw: Vec<_> = raw.map(|line| line.as_str().unwrap()).collect();
        // Older kernels print the first line otherwise, with an address.
        let is_as_in_6_1 = raw[0].starts_with("percpu: ") && !raw[0].contains(['@', '(']);
        if !is_as_in_6_1 {
            continue;
        }
        cases += 1;
        if cases % EVERY == 0 {
            let printed = pcpu(arguments(&case)).ok();
            assert_eq!(printed, raw.join("\n") + "\n", "{}", case["id"]);
        }
    }
    assert!(cases >= 5 * EVERY, "{cases} cases are left");
}

#[test]
fn suffixes_and_ranges() {
    let layout =
        run("layout --static 208K --reserved 8K --dyn 28K --atom 2M --node 3-7 --node 0-2").ok();
    assert_eq!(
        layout,
        "percpu: Embedded 61 pages/cpu s212992 r8192 d28672 u1048576\n\
         pcpu-alloc: s212992 r8192 d28672 u1048576 alloc=1*2097152\n\
         pcpu-alloc: [0] 0 1 [0] 2 - [1] 3 4 [1] 5 6\n\
         pcpu-alloc: [1] 7 -\n"
    );
}

/// As the help says: `page` has a rule of its own for both, and both are required and looked at.
#[test]
fn page_rounds_by_its_own_rule() {
    let of = |options: &str| {
        run(&format!(
            "layout --static 208K --reserved 8K --first-chunk page --node 0-1 {options}"
        ))
    };
    let page = of("--dyn 0 --atom 4K").ok();
    assert!(page.starts_with("percpu: 57 4K pages/cpu s212992 r8192 d12288\n"));
    assert_eq!(of("--dyn 1M --atom 2M").ok(), page);
    assert!(of("--dyn 0").error(2).contains("--atom N is missing"));
    assert!(of("--atom 4K").error(2).contains("--dyn N is missing"));
    assert!(of("--dyn 0 --atom 5000").error(2).contains("5000"));
    let help = run("layout --help").ok();
    assert!(!help.contains("takes no --"), "{help}");
}

#[test]
fn nonsense_is_named_with_its_limit() {
    for (options, value, limit) in [
        ("--atom 5000 --node 0", "5000", "multiple"),
        ("--atom 2M --node 0-9000", "9000", "8191"),
        ("--atom 2M --node 3-1", "3-1", "at least 3"),
        ("--atom 2M --node 0 --node 0", "CPU 0", "once"),
        ("--atom 2M --page-size 3000 --node 0", "3000", "4096"),
        ("--atom 2M --min-unit 1 --node 0", "1", "32768"),
        (
            "--atom 2M --first-chunk big --node 0",
            "big",
            "embed or page",
        ),
        ("--atom -1 --node 0", "-1", "a number of bytes"),
        (
            "--atom 99999999999999999999M --node 0",
            "99999999999999999999M",
            "18446744073709551615",
        ),
        ("--atom 2M", "0 CPUs", "at least one"),
        ("--node 0", "--atom", "missing"),
    ] {
        let run = run(&format!(
            "layout --static 208K --reserved 8K --dyn 28K {options}"
        ));
        let error = run.error(2);
        assert!(
            error.contains(value) && error.contains(limit),
            "{options}: {error}"
        );
        assert_eq!(run.stdout, "", "{options}");
    }
}
