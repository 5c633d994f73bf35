//! `pcpu layout` prints the first chunks of real machines as their kernels did, and refuses nonsense.
//!
//! `tests/data/first_chunk.jsonl` has a first chunk a line: what the kernel was given and what it printed.

use serde_json::Value;

use crate::command::{Failure, Program, root};
use crate::tally::Tally;

const CASES: &str = "tests/data/first_chunk.jsonl";

/// No CPU at all, a CPU twice, a size that overflows.
const NONSENSE: &[&str] = &[
    "layout --static 4096 --reserved 0 --dyn 20K --atom 2M",
    "layout --static 4096 --reserved 0 --dyn 20K --atom 2M --node 0-3 --node 3",
    "layout --static 99999999999999999999 --reserved 0 --dyn 20K --atom 2M --node 0",
];

pub fn check() -> Result<Tally, Failure> {
    let program = Program::build()?;
    let mut tally = Tally::default();
    for line in std::fs::read_to_string(root().join(CASES))?.lines() {
        tally += check_case(&program, &serde_json::from_str(line)?)?;
    }
    for args in NONSENSE {
        let output = program.run(args).output()?;
        let message = String::from_utf8(output.stderr)?;
        let held = output.status.code() == Some(2) && message.trim_end().lines().count() == 1;
        if !held {
            println!(
                "pcpu {args}: not one line and exit 2, but {}\n{message}",
                output.status
            );
        }
        tally += Tally::of(held);
    }
    Ok(tally)
}

fn check_case(program: &Program, case: &Value) -> Result<Tally, Failure> {
    let mut command = program.run(&arguments(case));
    let output = command.output()?;
    let printed = String::from_utf8(output.stdout)?;
    let printed: Vec<&str> = printed.lines().filter(|line| is_layout(line)).collect();
    let expected: Vec<&str> = elements(&case["raw"])
        .filter_map(Value::as_str)
        .filter(|line| is_layout(line))
        .collect();
    let held = output.status.success() && printed == expected;
    if !held {
        let id = &case["id"];
        println!("{id}: {command:?}\nexpected {expected:#?}\nprinted {printed:#?}");
    }
    Ok(Tally::of(held))
}

/// Older kernels print the line before these in another form.
fn is_layout(line: &str) -> bool {
    line.starts_with("pcpu-alloc:")
}

fn arguments(case: &Value) -> String {
    let input = &case["input"];
    let mut args = format!(
        "layout --static {} --reserved {} --dyn {} --atom {} --page-size {} --min-unit {} --first-chunk {}",
        case["static"],
        case["reserved"],
        input["dyn_request"],
        input["atom_size"],
        input["page_size"],
        input["min_unit_size"],
        case["first_chunk"].as_str().unwrap_or_default(),
    );
    for group in elements(&case["groups"]) {
        // An unused unit is null.
        let cpus = elements(group).filter(|cpu| !cpu.is_null());
        let cpus: Vec<String> = cpus.map(Value::to_string).collect();
        args += &format!(" --node {}", cpus.join(","));
    }
    args
}

fn elements(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}
