//! The instructions that the operations take in the kernel: `cargo xtask kernel-results` counts them and writes
//! [`FILE`], a step of the tests compares.
//!
//! The counts are the same on every machine, but for another compiler. What an allocation takes follows the allocator, so only the
//! operations on cells are compared, which are to stay what they are: the few-instruction ones exactly, the longer ones (a sum over CPUs)
//! to within a quarter, since a change elsewhere moves what the compiler keeps in registers around them.

use std::fmt::Write;
use std::path::PathBuf;

use super::options::Options;
use super::{boot, qemu};
use crate::command::{Failure, root, rustc, version_of};
use crate::tally::Tally;

/// Where the results are.
const FILE: &str = "benches/results/kernel.csv";

const COLUMNS: &str = "operation,cpus,instructions";

/// Sizes of machines.
const CPUS: &[u32] = &[1, 4, 64];

/// The operations that are compared: those on cells.
const COMPARED: &[&str] = &["static_", "dynamic_"];

/// Counts below this are of one or a few instructions, which nothing elsewhere changes.
const EXACT_BELOW: f64 = 30.0;

/// How far the others may lie from what is kept, in hundredths.
const TOLERANCE_PERCENT: f64 = 25.0;

/// A line of the results.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    operation: String,
    cpus: u32,
    instructions: String,
}

impl Row {
    /// Whether the counts say that the code is still what it was.
    fn is_as_kept(&self, kept: &Self) -> bool {
        if self.instructions == kept.instructions {
            return true;
        }
        let counts = (
            self.instructions.parse::<f64>(),
            kept.instructions.parse::<f64>(),
        );
        let (Ok(now), Ok(before)) = counts else {
            return false;
        };
        before >= EXACT_BELOW && (now - before).abs() <= before * TOLERANCE_PERCENT / 100.0
    }
}

/// Writes the results anew.
pub fn write() -> Result<Tally, Failure> {
    let mut text = String::new();
    writeln!(
        text,
        "# Instructions of an operation, by QEMU's -icount: cargo xtask kernel-results"
    )?;
    writeln!(text, "# {}, {}", qemu::version()?, version_of(rustc())?)?;
    writeln!(
        text,
        "# A byte that `rep stosb` writes counts as an instruction: areas are zeroed by it that are not of 4, 8, 16, 32 or 64 bytes."
    )?;
    writeln!(
        text,
        "# Rows of areas that say neither `cached` nor `drain` nor `afar` are of a kernel without caches (percpu_cache=off)."
    )?;
    writeln!(text, "{COLUMNS}")?;
    for &cpus in CPUS {
        for row in rows_of_machine(cpus)? {
            writeln!(text, "{},{},{}", row.operation, row.cpus, row.instructions)?;
        }
    }
    let path = path();
    std::fs::create_dir_all(path.parent().unwrap_or(root()))?;
    std::fs::write(path, text)?;
    println!("{FILE} is written");
    Ok(Tally::PASS)
}

/// Counts on a machine of the first size: the rows are those of the results, and the operations on cells take what they took.
pub fn check() -> Result<Tally, Failure> {
    let cpus = CPUS[0];
    let mut tally = Tally::default();
    let text = std::fs::read_to_string(path())?;
    let kept = text.lines().filter_map(row_of_result);
    let mut kept = kept.filter(|row| row.cpus == cpus);
    for row in rows_of_machine(cpus)? {
        let kept = kept.next();
        let is_compared = COMPARED.iter().any(|it| row.operation.starts_with(it));
        let held = kept.as_ref().is_some_and(|kept| {
            kept.operation == row.operation && (!is_compared || row.is_as_kept(kept))
        });
        if !held {
            println!("FAILED {row:?}, {FILE} has {kept:?}");
        }
        tally += Tally::of(held);
    }
    if let Some(row) = kept.next() {
        println!("FAILED {row:?} of {FILE} was not counted");
        tally += Tally::FAIL;
    }
    Ok(tally)
}

fn path() -> PathBuf {
    root().join(FILE)
}

/// Boots a machine with caches and without: what a kernel counts depends on that.
fn rows_of_machine(cpus: u32) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for words in ["--bench", "--bench --no-cache"] {
        let cpus_word = cpus.to_string();
        let args: Vec<&str> = words
            .split_whitespace()
            .chain(["--cpus", &cpus_word])
            .collect();
        let run = boot(&Options::parse(&args)?, "")?;
        if !run.passed() {
            return Err(format!("the kernel counted no further: {}", run.status).into());
        }
        let lines = run.lines.iter();
        rows.extend(lines.filter_map(|line| row_of_kernel(line, cpus)));
    }
    Ok(rows)
}

/// `bench NAME: N.N instructions`.
fn row_of_kernel(line: &str, cpus: u32) -> Option<Row> {
    let (operation, count) = line.strip_prefix("bench ")?.split_once(": ")?;
    Some(Row {
        operation: operation.to_owned(),
        cpus,
        instructions: count.strip_suffix(" instructions")?.to_owned(),
    })
}

fn row_of_result(line: &str) -> Option<Row> {
    let fields: Vec<&str> = line.split(',').collect();
    let [operation, cpus, instructions] = fields[..] else {
        return None;
    };
    Some(Row {
        operation: operation.to_owned(),
        cpus: cpus.parse().ok()?,
        instructions: instructions.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::{COLUMNS, row_of_kernel, row_of_result};

    #[test]
    fn short_counts_are_exact_and_long_ones_near() {
        for (now, before, held) in [
            ("1.0", "1.0", true),
            ("1.1", "1.0", false),
            ("2.0", "1.0", false),
            ("95.0", "83.0", true),
            ("83.0", "95.0", true),
            ("120.0", "83.0", false),
            ("", "83.0", false),
        ] {
            let row = |count: &str| row_of_result(&format!("static_inc,1,{count}")).unwrap();
            assert_eq!(row(now).is_as_kept(&row(before)), held, "{now} {before}");
        }
    }

    #[test]
    fn a_row_is_what_the_kernel_said() {
        let row = row_of_kernel("bench static_inc: 1.0 instructions", 4);
        assert!(row.is_some());
        assert_eq!(row, row_of_result("static_inc,4,1.0"));
        assert_eq!(row_of_kernel("ok a test", 4), None);
        for line in [COLUMNS, "# QEMU, rustc", "", "a,b"] {
            assert_eq!(row_of_result(line), None, "{line}");
        }
    }
}
