//! The figures that the `pcpu` program gives.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::Effort;
use super::figures::{Method, PCPU, Samples, Subject};
use crate::command::{Failure, Program};

/// The recorded traces.
pub const TRACES: [&str; 6] = ["bpf", "cg", "fork", "ns", "boot8", "numa32"];

/// What `pcpu bench` measures by both methods: it works on the process's own instance.
const BY_BOTH: &[&str] = &[
    "pair --no-zero",
    "pair",
    "pair --no-zero --possible-cpus 16",
    "pair --no-zero --possible-cpus 64",
    "pair --no-zero --possible-cpus 256",
    "pair --possible-cpus 16",
    "pair --possible-cpus 64",
    "pair --possible-cpus 256",
    "dirty",
    "dirty --possible-cpus 16",
    "dirty --possible-cpus 64",
    "dirty --possible-cpus 256",
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
    "pair --possible-cpus 64 --size 64",
    "pair --possible-cpus 256 --size 64",
    "churn --live 10000",
    "churn --live 10000 --cpus 64",
    "churn --live 10000 --cpus 256",
];

/// The option that not every system grants, nor a machine with more CPUs.
const REFUSABLE: &str = "--possible-cpus";

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
        let command = wishing(command, wish);
        let rows = match args.contains(REFUSABLE) {
            true => json_unless_refused(command)?,
            false => Some(json(command)?),
        };
        let Some(rows) = rows else {
            println!("left out: pcpu bench {args}");
            continue;
        };
        for row in rows {
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
    array(&command, &output)
}

/// The same for one that the system may refuse: none, if it did. The command has told why.
fn json_unless_refused(mut command: Command) -> Result<Option<Vec<Value>>, Failure> {
    /// The program's exit code for what makes no sense here.
    const REFUSED: i32 = 2;
    let output = command.output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    eprint!("{told}");
    // Another line is about an option that there is not.
    let is_refused = told.starts_with(&format!("pcpu: {REFUSABLE} "));
    match output.status.code() {
        Some(REFUSED) if is_refused => Ok(None),
        _ => array(&command, &output).map(Some),
    }
}

fn array(command: &Command, output: &Output) -> Result<Vec<Value>, Failure> {
    if !output.status.success() {
        return Err(format!("{command:?}: {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::command::root;

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

    #[test]
    fn what_the_system_refuses_is_left_out_and_nothing_else() {
        let shell = |line: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", line]);
            command
        };
        let refused = shell("echo 'pcpu: --possible-cpus 16: no' >&2; exit 2");
        assert_eq!(json_unless_refused(refused).unwrap(), None);
        let rows = json_unless_refused(shell("echo '[1]'")).unwrap();
        assert_eq!(rows, Some(vec![Value::from(1)]));
        let misspelt = "echo \"pcpu: unexpected argument '--possible-cpuz'\" >&2; exit 2";
        for failed in [misspelt, "exit 2", "exit 1", "kill -9 $$", "echo no JSON"] {
            assert!(json_unless_refused(shell(failed)).is_err(), "{failed}");
        }
        assert!(json(shell("exit 2")).is_err());
    }

    /// A row of the benchmarks that is called as one of the program's would be a sample of the same figure.
    #[test]
    fn pairs_of_another_instance_have_a_row_of_their_own() {
        let source = fs::read_to_string(root().join("benches/alloc.rs")).unwrap();
        let groups = source.split("benchmark_group(").skip(1);
        let groups: Vec<_> = groups.filter_map(|rest| rest.split('"').nth(1)).collect();
        for row in ["pair", "pair-dirty"] {
            assert!(
                groups.contains(&format!("{row}-locked").as_str()),
                "{groups:?}"
            );
            assert!(!groups.contains(&row), "{groups:?}");
        }
        let is_pair = |args: &str| args.starts_with("pair") || args.starts_with("dirty");
        let on_another = |args: &&&str| is_pair(args) && args.contains("--cpus");
        assert_eq!(BY_BOTH.iter().chain(BY_ONE).find(on_another), None);
    }
}
