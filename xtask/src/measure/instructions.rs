//! Instructions per operation, counted by callgrind: the difference between two runs of the same work, one longer than the
//! other, so that neither set-up nor checks count. Of `pcpu bench` only the loop that is measured counts: to free a million
//! areas takes more or less, depending on how often they were replaced, and by more than the loop takes. Valgrind has no
//! restartable sequences: the method is the portable one.
//!
//! A replay that zeroes writes to each area before it frees it. Of it only the steps count.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde::Serialize;
use serde_json::Value;

use super::Effort;
use super::figures::{Method, Subject, rounded};
use super::program::TRACES;
use super::yardsticks::Yardstick;
use crate::command::{Failure, Program};

/// Rounds of a case of `pcpu bench`, the one that warms up included.
const ROUNDS: u64 = 202;

/// Operations of a case in each round of the shorter run, and in each of the longer.
const PER_ROUND: [u64; 2] = [10, 110];

/// `pcpu_workloads::churn::Churn::replace` and `pcpu_workloads::areas::pairs`, mangled or not. Callgrind stops counting where
/// one that matches calls another.
const CHURN: &str = "*Churn*replace*";
const PAIRS: &str = "*pcpu_workloads*areas*pairs*";

/// `Player::run` of the program, which carries out steps.
const STEPS: &str = "*replay*player*Player*run*";

/// A line of the file.
#[derive(Debug, Clone, Serialize)]
pub struct Count {
    row: String,
    cpus: Option<u32>,
    live: Option<u64>,
    size: Option<u32>,
    zeroed: bool,
    method: Method,
    instructions: f64,
    compared_with: Option<String>,
    value: Option<f64>,
    ratio: Option<f64>,
}

/// One thing that is counted.
struct Job {
    subject: Subject,
    /// The arguments of the shorter run and of the longer.
    args: [String; 2],
    /// The function that counts, with all that it calls, as callgrind's pattern; or everything.
    only: Option<&'static str>,
    /// By how many operations the longer is longer.
    ops: Ops,
}

enum Ops {
    Known(u64),
    /// So many times what the replay says that it has.
    OfReplay(u64),
}

/// Counts everything; nothing where there is no valgrind.
pub fn count(
    program: &Program,
    effort: Effort,
    yardsticks: &[Yardstick],
) -> Result<Vec<Count>, Failure> {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("valgrind is not installed: no instructions are counted");
        return Ok(Vec::new());
    }
    let jobs = jobs(effort);
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    // Whatever else runs, the counts are the same.
    let work = || {
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let count = job.count(program).map_err(|error| error.to_string());
            let mut results = results.lock().expect("no thread panics with it");
            results.push((job, count));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        (0..threads).for_each(|_| {
            scope.spawn(work);
        });
    });
    let results = results.into_inner().expect("no thread panics with it");
    let mut counts = Vec::new();
    // In the order of the jobs, whichever ended first.
    for job in &jobs {
        let result = results.iter().find(|(other, _)| std::ptr::eq(*other, job));
        let (_, count) = result.ok_or("a count is missing")?;
        counts.extend(job.compared(count.clone()?, yardsticks));
    }
    Ok(counts)
}

fn jobs(effort: Effort) -> Vec<Job> {
    let (traces, repeats) = match effort {
        Effort::Full => (&TRACES[..], 10),
        Effort::Quick => (&["fork"][..], 1),
    };
    let mut jobs = Vec::new();
    for (zeroed, option) in [(false, "--no-zero"), (true, "")] {
        for trace in traces {
            let subject = Subject {
                cpus: Some(16),
                zeroed,
                ..Subject::of(&format!("replay-{trace}"))
            };
            let args = [1, 1 + repeats].map(|repeat| {
                format!("replay {option} --json --repeat {repeat} traces/{trace}.trace.gz")
            });
            jobs.push(Job {
                subject,
                args,
                only: zeroed.then_some(STEPS),
                ops: Ops::OfReplay(repeats),
            });
        }
    }
    // The longest first.
    for live in match effort {
        Effort::Full => &[1_000_000, 10_000, 100][..],
        Effort::Quick => &[100],
    } {
        let subject = Subject {
            live: Some(*live),
            ..Subject::of("churn")
        };
        jobs.insert(
            0,
            Job::of_bench(subject, &format!("churn --no-zero --live {live}"), CHURN),
        );
    }
    for (zeroed, option) in [(false, "--no-zero"), (true, "")] {
        let subject = Subject {
            live: Some(100),
            size: Some(8),
            zeroed,
            ..Subject::of("pair")
        };
        jobs.push(Job::of_bench(subject, &format!("pair {option}"), PAIRS));
    }
    jobs
}

impl Job {
    fn of_bench(subject: Subject, args: &str, only: &'static str) -> Self {
        Self {
            subject: Subject {
                cpus: Some(2),
                ..subject
            },
            args: PER_ROUND.map(|ops| {
                // The CPUs of the yardsticks, whatever the machine has.
                let iters = ops * (ROUNDS - 1);
                format!("bench {args} --cpus 2 --case pcpu --json --iters {iters}")
            }),
            only: Some(only),
            ops: Ops::Known(ROUNDS * (PER_ROUND[1] - PER_ROUND[0])),
        }
    }

    /// Instructions per operation.
    fn count(&self, program: &Program) -> Result<f64, Failure> {
        let [(fewer, out), (more, _)] = [
            callgrind(program, &self.args[0], self.only)?,
            callgrind(program, &self.args[1], self.only)?,
        ];
        let ops = match self.ops {
            Ops::Known(ops) => ops,
            Ops::OfReplay(times) => {
                let ops = out[0]["ops"]
                    .as_u64()
                    .ok_or("a replay tells no operations")?;
                times * ops
            }
        };
        if more <= fewer {
            let runs = &self.args;
            return Err(format!("{runs:?}: {fewer} instructions, then {more}").into());
        }
        let per_op = (more - fewer) as f64 / ops as f64;
        println!("{}: {per_op:.0} instructions", self.args[1]);
        Ok(per_op)
    }

    fn compared(&self, per_op: f64, yardsticks: &[Yardstick]) -> Vec<Count> {
        let subject = &self.subject;
        let alone = Count {
            row: subject.row.clone(),
            cpus: subject.cpus,
            live: subject.live,
            size: subject.size,
            zeroed: subject.zeroed,
            method: Method::Portable,
            instructions: rounded(per_op),
            compared_with: None,
            value: None,
            ratio: None,
        };
        let others = yardsticks
            .iter()
            .filter(|yardstick| yardstick.is_for(subject, "instructions"));
        let compared: Vec<Count> = others
            .map(|yardstick| Count {
                compared_with: Some(yardstick.name()),
                value: Some(yardstick.value),
                ratio: Some(rounded(per_op / yardstick.value)),
                ..alone.clone()
            })
            .collect();
        match compared.is_empty() {
            true => vec![alone],
            false => compared,
        }
    }
}

/// The instructions of a run of the program, and the JSON that it prints.
fn callgrind(program: &Program, args: &str, only: Option<&str>) -> Result<(i64, Value), Failure> {
    let mut command = Command::new("valgrind");
    let run = program.run(args);
    command
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .args(only.map(|function| format!("--toggle-collect={function}")))
        .arg(run.get_program())
        .args(run.get_args())
        .current_dir(crate::command::root())
        .stdin(Stdio::null());
    let output = command.output()?;
    let log = String::from_utf8_lossy(&output.stderr);
    match collected(&log) {
        Some(count) if output.status.success() => {
            Ok((count, serde_json::from_slice(&output.stdout)?))
        }
        _ => Err(format!("{command:?}: {}\n{log}", output.status).into()),
    }
}

/// The line `==PID== Collected : N`.
fn collected(log: &str) -> Option<i64> {
    let mut lines = log
        .lines()
        .filter_map(|line| line.split_once("Collected :"));
    lines.next_back()?.1.trim().parse().ok()
}

/// Writes the file; without a count it is empty.
pub fn write(path: &Path, counts: &[Count]) -> Result<(), Failure> {
    let mut out = csv::Writer::from_path(path)?;
    for count in counts {
        out.serialize(count)?;
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_the_last_word_of_callgrind() {
        let log = "==12== Events    : Ir\n==12== Collected : 1234\n==12==\n==12== I refs: 99\n";
        assert_eq!(collected(log), Some(1234));
        assert_eq!(collected("==12== I refs: 99"), None);
    }

    #[test]
    fn runs_differ_by_the_operations_that_are_divided_by() {
        for job in jobs(Effort::Full) {
            let number = |args: &str, option: &str| -> Option<u64> {
                let after = args.split(option).nth(1)?;
                after.split_whitespace().next()?.parse().ok()
            };
            let [shorter, longer] = &job.args;
            match job.ops {
                Ops::Known(ops) => {
                    let of = |args| number(args, "--iters ").unwrap() / (ROUNDS - 1) * ROUNDS;
                    assert_eq!(of(longer) - of(shorter), ops);
                }
                Ops::OfReplay(times) => {
                    let of = |args| number(args, "--repeat ").unwrap();
                    assert_eq!(of(longer) - of(shorter), times);
                }
            }
        }
    }
}
