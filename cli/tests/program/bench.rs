//! `pcpu bench`: the rows that other tools read, and options that make no sense. How long anything takes is no test's
//! business.

use pcpu::this_cpu::process::Method;
use serde_json::Value;

use super::run;

/// The fields of a row, in order.
const FIELDS: [&str; 9] = [
    "bench", "case", "cpus", "threads", "size", "live", "zeroed", "ns", "ratio",
];

/// What adding is compared with, besides the bare loop.
const ADD_CASES: [&str; 9] = [
    "pcpu",
    "thread-local",
    "atomic",
    "atomic-contended",
    "sharded",
    "fast-counter",
    "thread_local",
    "mutex",
    "parking_lot",
];

/// The rows, each of the right shape and with ratios that follow from the times.
#[track_caller]
fn rows(args: &str) -> Vec<Value> {
    let text = run(&format!("bench {args} --json")).ok();
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let rows = json.as_array().expect("an array").clone();
    for row in &rows {
        let fields = row.as_object().expect("an object").len();
        assert_eq!(fields, FIELDS.len(), "{row}");
        assert!(FIELDS.iter().all(|field| row.get(field).is_some()), "{row}");
        let is_ours = |other: &&Value| other["bench"] == row["bench"] && other["case"] == "pcpu";
        let ours: Vec<_> = rows.iter().filter(is_ours).collect();
        let ours = ours
            .iter()
            .find(|other| other["threads"] == row["threads"])
            .unwrap_or(&ours[0]);
        let number = |row: &Value, field: &str| row[field].as_f64().expect("a number");
        assert!(number(row, "ns") > 0.0, "{row}");
        let ratio = number(row, "ns") / number(ours, "ns");
        assert!((number(row, "ratio") / ratio - 1.0).abs() < 1e-9, "{row}");
    }
    rows
}

/// Each row's case.
fn cases<'r>(rows: &'r [Value], bench: &str) -> Vec<&'r str> {
    let of_bench = rows.iter().filter(|row| row["bench"] == bench);
    of_bench.filter_map(|row| row["case"].as_str()).collect()
}

#[test]
fn all_has_every_row() {
    // 9 operations in each round: more than there are counters.
    let rows = rows("--iters 1809");
    let mut benches: Vec<_> = rows.iter().map(|row| row["bench"].as_str()).collect();
    benches.dedup();
    let all = ["pair", "pair-dirty", "churn", "threads", "add-hot", "add-8"];
    assert_eq!(benches, all.map(Some));
    assert_eq!(cases(&rows, "pair"), ["pcpu", "malloc+free", "bare-loop"]);
    assert_eq!(cases(&rows, "pair-dirty"), ["pcpu", "bare-loop"]);
    assert_eq!(cases(&rows, "churn"), ["pcpu", "malloc+free"]);
    let threads = ["pcpu", "malloc+free", "pcpu", "malloc+free"];
    assert_eq!(cases(&rows, "threads"), threads);
    let mut add_cases = ADD_CASES.to_vec();
    if pcpu::global::method() == Method::RestartableSequences {
        add_cases.insert(2, "bare-loop");
    }
    assert_eq!(cases(&rows, "add-hot"), add_cases);
    assert_eq!(cases(&rows, "add-8"), add_cases);
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
    for row in rows.iter().filter(|row| row["case"] == "atomic-contended") {
        assert_eq!(row["threads"], cpus.min(2), "{row}");
    }
}

#[test]
fn each_can_be_had_alone() {
    for (what, benches) in [
        ("pair", &["pair"][..]),
        ("dirty --cpus 3", &["pair-dirty"]),
        ("churn --live 10", &["churn"]),
        ("threads", &["threads"]),
        ("add", &["add-hot", "add-8"]),
    ] {
        let rows = rows(&format!("{what} --iters 1"));
        let mut found: Vec<_> = rows
            .iter()
            .filter_map(|row| row["bench"].as_str())
            .collect();
        found.dedup();
        assert_eq!(found, benches, "{what}");
    }
}

#[test]
fn rows_say_what_was_asked_for() {
    let is = |row: &Value, fields: [Value; 4]| {
        ["cpus", "size", "live", "zeroed"]
            .iter()
            .zip(fields)
            .all(|(field, value)| row[field] == value)
    };
    let pairs = rows("pair --cpus 5 --size 100 --no-zero --iters 10");
    assert_eq!(cases(&pairs, "pair"), ["pcpu", "malloc+free"]);
    assert!(
        pairs
            .iter()
            .all(|row| is(row, [5.into(), 100.into(), 100.into(), false.into()]))
    );
    let dirty = rows("dirty --size 24 --no-zero --iters 10");
    assert_eq!(cases(&dirty, "pair-dirty"), ["pcpu"]);
    assert!(dirty.iter().all(|row| row["size"] == 24));
    let churn = rows("churn --cpus 3 --live 7 --iters 10000");
    assert!(
        churn
            .iter()
            .all(|row| is(row, [3.into(), Value::Null, 7.into(), true.into()]))
    );
    let many = rows("pair --cpus 300 --iters 1");
    assert!(many.iter().all(|row| row["cpus"] == 300));
    let threads = rows("threads --size 32768 --iters 10");
    let numbers: Vec<_> = threads.iter().map(|row| &row["threads"]).collect();
    assert_eq!(numbers, [1, 1, 2, 2]);
    assert!(threads.iter().all(|row| row["size"] == 32768));
}

#[test]
fn one_case_can_be_had_alone() {
    let text = run("bench threads --iters 1 --case pcpu --json").ok();
    let rows: Vec<Value> = serde_json::from_str(&text).expect("an array");
    assert_eq!(cases(&rows, "threads"), ["pcpu", "pcpu"]);
    // Without ours there is nothing that it could be compared with.
    let text = run("bench pair --iters 1 --case malloc+free --json").ok();
    let rows: Vec<Value> = serde_json::from_str(&text).expect("an array");
    assert_eq!(cases(&rows, "pair"), ["malloc+free"]);
    assert_eq!(rows[0]["ratio"], Value::Null);
}

#[test]
fn a_table_for_people() {
    let text = run("bench pair --iters 1").ok();
    for word in ["pair", "pcpu", "malloc+free", "bare-loop", "ns", "ratio"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn nonsense_is_named_with_its_limit() {
    for (options, value, limit) in [
        ("frob", "frob", "threads"),
        ("--cpus 0", "0", "8192"),
        ("--cpus 8193", "8193", "8192"),
        ("--cpus -1", "-1", "8192"),
        ("--possible-cpus 0", "0", "8191"),
        ("--possible-cpus 8192", "8192", "8191"),
        ("--possible-cpus 16 --cpus 16", "--possible-cpus", "--cpus"),
        ("--size 0", "0", "32768"),
        ("--size 32769", "32769", "32768"),
        ("--live 0", "0", "1000000"),
        ("--live 1000001", "1000001", "1000000"),
        ("--iters 0", "0", "1000000000"),
        ("--iters 1e6", "1e6", "1000000000"),
        (
            "churn --cpus 256 --live 1000000",
            "9543680000",
            "4294967296",
        ),
        ("pair churn", "churn", "unexpected"),
        (
            "pair --iters 1 --case frob",
            "frob",
            "pcpu, malloc+free, bare-loop",
        ),
    ] {
        let run = run(&format!("bench {options}"));
        let error = run.error(2);
        assert!(
            error.contains(value) && error.contains(limit),
            "{options}: {error}"
        );
        assert_eq!(run.stdout, "", "{options}");
    }
}
