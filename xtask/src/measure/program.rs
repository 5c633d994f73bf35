//! The figures that the `pcpu` program gives.

use std::process::{Command, Stdio};

use serde_json::Value;

use super::Effort;
use super::figures::{Method, PCPU, Samples, Subject};
use crate::command::{Failure, Program};

/// The recorded traces.
pub const TRACES: [&str; 6] = ["bpf", "cg", "fork", "ns", "boot8", "numa32"];

/// What `pcpu bench` measures where restartable sequences make no difference to it or much: by both methods.
const BY_BOTH: &[&str] = &[
    "pair --no-zero",
    "pair",
    "churn --no-zero --live 100",
    "churn --no-zero --live 1000",
    "churn --no-zero --live 10000",
    "churn --no-zero --live 100000",
    "churn --no-zero --live 1000000",
    "threads --no-zero",
    "add",
];

/// What it measures besides, by the method of this machine.
const BY_ONE: &[&str] = &[
    "pair --size 64 --no-zero",
    "pair --size 64",
    "pair --cpus 16",
    "pair --cpus 64",
    "pair --cpus 256",
    "pair --cpus 64 --size 64",
    "pair --cpus 256 --size 64",
    "churn --live 10000",
    "churn --live 10000 --cpus 64",
    "churn --live 10000 --cpus 256",
];

/// Makes a command that takes the method, if it can be had.
pub fn wishing(mut command: Command, method: Method) -> Command {
    match method {
        Method::Rseq => command.env_remove("GLIBC_TUNABLES"),
        Method::Portable => command.env("GLIBC_TUNABLES", "glibc.pthread.rseq=0"),
    };
    command
}

/// The method that is taken. The bare loop of adding is one of restartable sequences, and there only where they are.
pub fn method(program: &Program, wish: Method) -> Result<Method, Failure> {
    let rows = json(wishing(program.run("bench add --iters 1 --json"), wish))?;
    match rows.iter().any(|row| row["case"] == "bare-loop") {
        true => Ok(Method::Rseq),
        false => Ok(Method::Portable),
    }
}

/// One round.
pub fn run(
    program: &Program,
    wish: Method,
    method: Method,
    effort: Effort,
    samples: &mut Samples,
) -> Result<(), Failure> {
    let by_one = match wish {
        Method::Rseq => BY_ONE,
        Method::Portable => &[],
    };
    let iters = match effort {
        Effort::Full => "",
        Effort::Quick => " --iters 100000",
    };
    for args in BY_BOTH.iter().chain(by_one) {
        // One addition takes no time; fewer of them, and reading the clock does.
        let iters = if *args == "add" { "" } else { iters };
        let command = program.run(&format!("bench {args}{iters} --json"));
        for row in json(wishing(command, wish))? {
            let (subject, case, ns) = of_bench(&row)?;
            samples.add(subject, method, &case, ns);
        }
    }
    if wish == Method::Portable {
        return Ok(());
    }
    let repeat = match effort {
        Effort::Full => 11,
        Effort::Quick => 3,
    };
    for (option, zeroed) in [("--no-zero", false), ("", true)] {
        let mut command = program.run(&format!("replay {option} --repeat {repeat} --json"));
        command.args(TRACES.map(|trace| format!("traces/{trace}.trace.gz")));
        for (trace, row) in TRACES.iter().zip(json(wishing(command, wish))?) {
            let subject = Subject {
                cpus: Some(16),
                zeroed,
                ..Subject::of(&format!("replay-{trace}"))
            };
            let ns = row["ns_per_op"].as_f64().ok_or("a replay tells no time")?;
            samples.add(subject, method, PCPU, ns);
        }
    }
    Ok(())
}

/// What a row of `pcpu bench` says.
fn of_bench(row: &Value) -> Result<(Subject, String, f64), Failure> {
    let read = || {
        let subject = Subject {
            row: row["bench"].as_str()?.to_owned(),
            cpus: Some(row["cpus"].as_u64()?.try_into().ok()?),
            threads: row["threads"].as_u64()?.try_into().ok()?,
            live: Some(row["live"].as_u64()?),
            size: row["size"].as_u64().and_then(|size| size.try_into().ok()),
            zeroed: row["zeroed"].as_bool()?,
        };
        Some((
            subject,
            row["case"].as_str()?.to_owned(),
            row["ns"].as_f64()?,
        ))
    };
    let mut found = read().ok_or_else(|| format!("no row of pcpu bench: {row}"))?;
    // Contended or not, a counter is compared with ours on one thread.
    if found.0.row.starts_with("add-") {
        found.0.threads = 1;
    }
    Ok(found)
}

/// Runs a command that prints a JSON array.
fn json(mut command: Command) -> Result<Vec<Value>, Failure> {
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("{command:?}: {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_the_program_is_read() {
        let row = r#"{"bench": "churn", "case": "pcpu", "cpus": 2, "threads": 1, "size": null, "live": 100,
            "zeroed": false, "ns": 1.5, "ratio": 1.0}"#;
        let row: Value = serde_json::from_str(row).unwrap();
        let (subject, case, ns) = of_bench(&row).unwrap();
        let expected = Subject {
            cpus: Some(2),
            live: Some(100),
            ..Subject::of("churn")
        };
        assert_eq!((subject, case.as_str(), ns), (expected, PCPU, 1.5));
        assert!(of_bench(&Value::Null).is_err());
    }
}
