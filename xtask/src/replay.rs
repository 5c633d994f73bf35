//! The recorded traces of real kernels run through `pcpu replay`: on machines of several sizes, with the upkeep run
//! rarely, and against the packing that Linux's own allocator reaches.

use serde_json::Value;

use crate::command::{Failure, Program};
use crate::tally::Tally;

/// What Linux 6.1's allocator does on a trace with 16 CPUs, its background work run at once.
struct Linux {
    trace: &'static str,
    /// Allocations and the frees that match them.
    ops: u64,
    /// Populated pages per unit at the peak, those of the first chunk included.
    pages_peak: u64,
    /// Live bytes by populated bytes, averaged over the trace.
    utilisation: f64,
}

/// `fork` fits into the first chunk, whose memory never goes away: its utilisation, 0.010973, is that of the trace.
const LINUX: [Linux; 6] = [
    Linux::new("bpf", 69_688, 1332, 0.898),
    Linux::new("cg", 58_590, 265, 0.728),
    Linux::new("fork", 53_864, 61, 0.010_97),
    Linux::new("ns", 29_579, 127, 0.598),
    Linux::new("boot8", 10_810, 124, 0.508),
    Linux::new("numa32", 99_062, 940, 0.817),
];

/// On which nothing may be refused.
const MACHINES: [&str; 5] = [
    "--cpus 2",
    "--cpus 16",
    "--cpus 64",
    "--cpus 256",
    "--cpus 16 --upkeep-every 1000",
];

/// Packing is compared without the caches, which hold areas back for speed.
const PACKING: &str = "--cpus 16 --no-cache";

pub fn check() -> Result<Tally, Failure> {
    let program = Program::build()?;
    let mut tally = Tally::default();
    for machine in MACHINES {
        for (linux, result) in LINUX.iter().zip(replay(&program, machine)?) {
            tally += nothing_refused(linux, machine, &result);
        }
    }
    for (linux, result) in LINUX.iter().zip(replay(&program, PACKING)?) {
        tally += packs_as_well(linux, &result);
    }
    Ok(tally)
}

/// Replays all traces; a result for each.
fn replay(program: &Program, machine: &str) -> Result<Vec<Value>, Failure> {
    let mut command = program.run(&format!("replay --json {machine}"));
    command.args(LINUX.map(|linux| format!("traces/{}.trace.gz", linux.trace)));
    let output = command.output()?;
    // Exit 1 says that a request failed; which one, the results tell.
    match serde_json::from_slice(&output.stdout) {
        Ok(Value::Array(results)) if results.len() == LINUX.len() => Ok(results),
        _ => {
            let message = String::from_utf8_lossy(&output.stderr);
            Err(format!("{command:?}: no results, {}\n{message}", output.status).into())
        }
    }
}

fn nothing_refused(linux: &Linux, machine: &str, result: &Value) -> Tally {
    let (ops, failed) = (&result["ops"], &result["failed"]);
    println!(
        "{:<6} {machine}: {ops} ops, {failed} failed, {} chunks, {} pages at most",
        linux.trace, result["chunks_peak"], result["pages_peak"]
    );
    judge(*failed == 0 && *ops == linux.ops)
}

fn packs_as_well(linux: &Linux, result: &Value) -> Tally {
    let pages = result["pages_peak"].as_u64().unwrap_or(u64::MAX);
    let utilisation = result["util_populated_avg"].as_f64().unwrap_or(0.0);
    println!(
        "{:<6} {PACKING}: {pages} pages at most (Linux {}), utilisation {utilisation:.4} (Linux {})",
        linux.trace, linux.pages_peak, linux.utilisation
    );
    let as_good = pages <= linux.pages_peak && utilisation >= linux.utilisation;
    judge(as_good && result["failed"] == 0)
}

fn judge(held: bool) -> Tally {
    if !held {
        println!("       ^ FAILED");
    }
    Tally::of(held)
}

impl Linux {
    const fn new(trace: &'static str, ops: u64, pages_peak: u64, utilisation: f64) -> Self {
        Self {
            trace,
            ops,
            pages_peak,
            utilisation,
        }
    }
}
