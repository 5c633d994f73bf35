//! `pcpu bench`: what per-CPU memory gains here, each row against what one would use otherwise, in one run.
//!
//! A benchmark is a set of cases ([`rounds::Case`]) that run in turn, round after round; a row of the result is the
//! median of a case's rounds. Every counting case checks its sum at the end: a case that does not do its work fails the
//! command instead of winning.

use std::io::{self, IsTerminal};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use pcpu::unit::MAX_CPUS;
use pcpu::{Domain, Global};
use pcpu_workloads::areas::Zeroing;
use pcpu_workloads::churn::copies_bytes;
use pcpu_workloads::home::{Home, Machine};

use crate::count;
use crate::error::CliError;
use crate::print;

mod add;
mod churn;
mod pair;
mod possible;
mod rounds;
mod row;

use rounds::{Case, ROUNDS};
use row::{Bench, Row};

/// The largest area that can be asked for: what an instance serves by its default policy.
const MAX_SIZE_BYTES: u32 = 32 << 10;

/// The most areas of a churn.
const MAX_LIVE: u32 = 1_000_000;

/// The most memory that the copies of a churn may take, over all CPUs.
const MAX_COPIES_BYTES: u64 = 4 << 30;

/// Operations of a case over all rounds. A round of it takes less than 1 ms then, so that hardly any is interrupted where
/// the machine has other work to do, and far longer than to read the clock.
const ADD_ITERS: u32 = 20_000_000;
const ALLOC_ITERS: u32 = 400_000;

/// Measure counting and allocating against what one would use otherwise
///
/// All cases of a benchmark run in turn, round after round; a row tells the median of the rounds, in ns of wall time per
/// operation of one thread. An allocation and its free are one operation. Counting, and without --cpus all else too, runs
/// on the process's own instance, which has this machine's CPUs, or as many as --possible-cpus says.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// What to measure
    #[arg(value_enum, default_value_t)]
    what: What,
    /// Allocate on another instance, with so many CPUs, all brought up. Its units are real memory, so that zeroing goes
    /// over all of them; add does without
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = count::within(1..=MAX_CPUS))]
    cpus: Option<u32>,
    /// Measure in a process that is told that the machine may have so many CPUs, as many as it may have at least: its own
    /// instance has that many, all brought up. It takes a user and a mount namespace, which not every system grants
    #[arg(long, value_name = "N", allow_hyphen_values = true, conflicts_with = "cpus",
          value_parser = count::within(1..=possible::MAX_POSSIBLE_CPUS))]
    possible_cpus: Option<u32>,
    /// Bytes of an area, for pair, dirty and threads
    #[arg(long, value_name = "N", default_value = "8", allow_hyphen_values = true,
          value_parser = count::within(1..=MAX_SIZE_BYTES))]
    size: u32,
    /// Live areas of the churn
    #[arg(long, value_name = "N", default_value = "10000", allow_hyphen_values = true,
          value_parser = count::within(1..=MAX_LIVE))]
    live: u32,
    /// Ask for areas that need not be zero; counters are always zero at first
    #[arg(long)]
    no_zero: bool,
    /// Operations of a case, over all rounds but the first, which warms up; at least one in each [default: 20000000 to
    /// count, 400000 to allocate]
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = count::within(1..=1_000_000_000))]
    iters: Option<u32>,
    /// Run the cases of this name only, and so without a ratio to ours if it is another: for tools that count instructions
    #[arg(long, value_name = "NAME")]
    case: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What is asked for on the command line.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Default)]
enum What {
    /// Allocate an area and free it, with 100 others live
    Pair,
    /// The same 32 at a time, whose copies are all written to before they are freed
    Dirty,
    /// Replace random ones of many live areas of mixed sizes
    Churn,
    /// Pairs on one thread and on two at once
    Threads,
    /// Add to one counter, and to eight in turn
    Add,
    /// All of these
    #[default]
    All,
}

impl What {
    /// Whether `bench` is part of it.
    fn includes(self, bench: Bench) -> bool {
        match self {
            Self::All => true,
            Self::Pair => bench == Bench::Pair,
            Self::Dirty => bench == Bench::PairDirty,
            Self::Churn => bench == Bench::Churn,
            Self::Threads => bench == Bench::Threads,
            Self::Add => matches!(bench, Bench::AddHot | Bench::Add8),
        }
    }
}

/// Measures and prints.
///
/// # Errors
/// One line: an option makes no sense, a request failed, or a case miscounted.
pub fn run(args: &BenchArgs) -> Result<(), CliError> {
    let process = match args.possible_cpus {
        Some(cpus) if !possible::is_inside() => return possible::run_inside(cpus),
        Some(cpus) => possible::home(cpus)?,
        None => Home::of_process()?,
    };
    check_memory(args, args.cpus.unwrap_or(process.cpus))?;
    let rows = match args.cpus {
        Some(cpus) => measure_all(args, &process, &Home::<Machine<0>>::with_cpus(cpus)?)?,
        None => measure_all(args, &process, &process)?,
    };
    print(&match args.json {
        true => row::json(&rows)?,
        false => row::table(&rows),
    })
}

fn check_memory(args: &BenchArgs, cpus: u32) -> Result<(), CliError> {
    let bytes = copies_bytes(args.live, cpus);
    if args.what.includes(Bench::Churn) && bytes > MAX_COPIES_BYTES {
        return Err(CliError::Input(format!(
            "--live {} takes {bytes} bytes on {cpus} CPUs, the limit is {MAX_COPIES_BYTES}",
            args.live
        )));
    }
    Ok(())
}

/// The rows of all benchmarks that are asked for.
fn measure_all<D: Domain>(
    args: &BenchArgs,
    process: &Home<Global>,
    home: &Home<D>,
) -> Result<Vec<Row>, CliError> {
    let mut rows = Vec::new();
    for bench in Bench::ALL {
        if args.what.includes(bench) {
            rows.extend(measure(bench, args, process, home)?);
        }
    }
    Ok(rows)
}

/// The rows of one benchmark.
fn measure<D: Domain>(
    bench: Bench,
    args: &BenchArgs,
    process: &Home<Global>,
    home: &Home<D>,
) -> Result<Vec<Row>, CliError> {
    let zeroing = match args.no_zero {
        true => Zeroing::Off,
        false => Zeroing::On,
    };
    let bytes = args.size as usize;
    let mut row = Row::of(bench, home.cpus, zeroing);
    match bench {
        Bench::Pair | Bench::PairDirty | Bench::Threads => {
            row.size = Some(args.size);
            row.live = pair::LIVE;
        }
        Bench::Churn => row.live = args.live,
        Bench::AddHot | Bench::Add8 => {
            row = Row::of(bench, process.cpus, Zeroing::On);
            row.size = Some(size_of::<u64>() as u32);
            row.live = add::COUNTERS as u32;
        }
    }
    let iters = args.iters.unwrap_or(match bench {
        Bench::AddHot | Bench::Add8 => ADD_ITERS,
        Bench::Pair | Bench::PairDirty | Bench::Churn | Bench::Threads => ALLOC_ITERS,
    });
    let iters_per_round = u64::from(iters).div_ceil(ROUNDS as u64);
    let mut cases: Vec<Box<dyn Case>> = match bench {
        Bench::Pair => pair::cases(home, bytes, zeroing)?,
        Bench::PairDirty => pair::dirty_cases(home, bytes, zeroing)?,
        Bench::Churn => churn::cases::<D>(args.live, zeroing)?,
        Bench::Threads => pair::threaded_cases::<D>(bytes, zeroing)?,
        Bench::AddHot => add::cases(add::Order::Hot)?,
        Bench::Add8 => add::cases(add::Order::InTurn)?,
    };
    if let Some(name) = &args.case {
        keep(&mut cases, bench, name)?;
    }
    let progress = progress(bench, cases.len());
    let results = rounds::run(cases, iters_per_round, || progress.inc(1))?;
    progress.finish_and_clear();
    Ok(row::rows(&row, &results))
}

/// Leaves the cases of one name.
fn keep(cases: &mut Vec<Box<dyn Case>>, bench: Bench, name: &str) -> Result<(), CliError> {
    let mut names: Vec<_> = cases.iter().map(|case| case.name()).collect();
    names.dedup();
    cases.retain(|case| case.name() == name);
    match cases.is_empty() {
        false => Ok(()),
        true => Err(CliError::Input(format!(
            "--case {name}: {} has {}",
            bench.name(),
            names.join(", ")
        ))),
    }
}

/// A bar on a terminal, nothing elsewhere.
fn progress(bench: Bench, cases: usize) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:40} {percent:>3} % {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(cases as u64 * (1 + ROUNDS as u64))
        .with_style(style)
        .with_message(bench.name())
}
