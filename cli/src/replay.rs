//! `pcpu replay`: runs recorded traces through the allocator on a simulated machine.
//!
//! A file is parsed, replayed once with every check on ([`pass::checked`]), which gives all figures but the time, and then
//! `--repeat` times with nothing on but a clock ([`pass::timed`]). All memory is freed and given back after each pass. With
//! `--hardened` the same is done by a hardened instance first, and its cost is shown beside that of the other.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::count;
use crate::error::CliError;
use crate::script::Script;
use crate::{create, print};

pub mod check;
pub mod pass;
pub mod player;
pub mod report;

use pass::Checked;
use player::{Caches, Mode, Player, Setup, UpkeepPace, Zeroing};
use report::{Hardened, Report};

/// The most CPUs of a simulated machine.
const MAX_CPUS: u32 = pcpu::unit::MAX_CPUS;

/// Replay recorded percpu traces on a simulated machine and report packing, failures and time
///
/// A trace is the text of /sys/kernel/tracing/trace with the percpu events on, plain or gzip.
#[derive(Args, Debug)]
pub struct ReplayArgs {
    /// The traces
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// CPUs of the machine
    #[arg(long, value_name = "N", default_value = "16", allow_hyphen_values = true,
          value_parser = count::within(1..=MAX_CPUS))]
    cpus: u32,
    /// Nodes that the CPUs are spread over
    #[arg(long, value_name = "N", default_value = "1", allow_hyphen_values = true,
          value_parser = count::within(1..=MAX_CPUS))]
    nodes: u32,
    /// Ask for memory that need not be zero
    #[arg(long)]
    no_zero: bool,
    /// Leave the per-CPU caches out
    #[arg(long)]
    no_cache: bool,
    /// Replay in hardened mode, tell what it finds, and what it costs besides a usual replay
    #[arg(long)]
    hardened: bool,
    /// Time the trace so many times
    #[arg(long, value_name = "K", default_value = "1", allow_hyphen_values = true,
          value_parser = count::within(1..=1_000_000))]
    repeat: u32,
    /// Run the upkeep at most once per so many operations, not whenever it is due
    #[arg(long, value_name = "OPS", allow_hyphen_values = true,
          value_parser = count::within(1..=u32::MAX))]
    upkeep_every: Option<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Write where every allocation lay to this file, as CSV
    ///
    /// The columns are id,chunk,offset,size,align,alloc_op,free_op: chunk 0 is the first one, an offset counts from the
    /// start of the unit, operations are counted from 0, and free_op is empty for what is never freed.
    #[arg(long, value_name = "OUT.csv")]
    placements: Option<PathBuf>,
    /// Write the CPUs of the trace to that file too
    ///
    /// Two columns more, alloc_cpu,free_cpu: who allocated and who freed, as the trace has it, even if --cpus is less.
    /// free_cpu is empty for what is never freed.
    #[arg(long)]
    placement_cpus: bool,
}

/// Replays the traces and prints the results.
///
/// # Errors
/// One line: an option or a file makes no sense, a check or a request failed.
pub fn run(args: &ReplayArgs) -> Result<(), CliError> {
    let setup = setup(args)?;
    let mut reports = Vec::new();
    for file in &args.files {
        reports.push(replay(file, args, &setup)?);
    }
    print(&match args.json {
        true => report::json(&reports)?,
        false => report::table(&reports, &setup),
    })?;
    let failed: u64 = reports.iter().map(|report| report.failed).sum();
    if let Some(first) = reports
        .iter()
        .find_map(|report| report.first_failure.as_ref())
    {
        return Err(CliError::Failed(format!(
            "{failed} requests failed, the first at {first}"
        )));
    }
    match reports.iter().find_map(Report::first_finding) {
        Some(first) => Err(CliError::Failed(first)),
        None => Ok(()),
    }
}

fn setup(args: &ReplayArgs) -> Result<Setup, CliError> {
    if args.nodes > args.cpus {
        return Err(CliError::Input(format!(
            "--nodes {}: the limit is {}, the number of CPUs",
            args.nodes, args.cpus
        )));
    }
    if args.placements.is_some() && args.files.len() != 1 {
        return Err(CliError::Input(format!(
            "--placements: {} files are given, the limit is 1",
            args.files.len()
        )));
    }
    if args.placement_cpus && args.placements.is_none() {
        return Err(CliError::Input(
            "--placement-cpus: there is no --placements OUT.csv to write them to".into(),
        ));
    }
    Ok(Setup {
        cpus: args.cpus,
        nodes: args.nodes,
        zeroing: match args.no_zero {
            true => Zeroing::Off,
            false => Zeroing::On,
        },
        caches: match args.no_cache {
            true => Caches::Off,
            false => Caches::On,
        },
        mode: match args.hardened {
            true => Mode::Hardened,
            false => Mode::Usual,
        },
        upkeep: match args.upkeep_every {
            Some(ops) => UpkeepPace::Every(ops),
            None => UpkeepPace::WhenDue,
        },
    })
}

fn replay(file: &Path, args: &ReplayArgs, setup: &Setup) -> Result<Report, CliError> {
    let name = file.display().to_string();
    let script = Script::read(file)?;
    let mut out = args.placements.as_deref().map(create).transpose()?;
    let progress = progress(&name, &script, args);
    let play = |setup: &Setup| {
        let mut player = Player::new(&name, &script, setup)?;
        let checked = pass::checked(&mut player, |steps| progress.inc(steps))?;
        player.empty()?;
        let time = pass::timed(&mut player, args.repeat, || {
            progress.inc(script.steps.len() as u64)
        })?;
        Ok::<_, CliError>((checked, time, player.findings()))
    };
    let (checked, time, findings) = play(setup)?;
    let usual = match setup.mode {
        Mode::Usual => None,
        Mode::Hardened => Some(play(&Setup {
            mode: Mode::Usual,
            ..*setup
        })?),
    };
    progress.finish_and_clear();

    if let (Some(out), Some(path)) = (&mut out, &args.placements) {
        let columns = match args.placement_cpus {
            true => Columns::WithCpus,
            false => Columns::Plain,
        };
        write_placements(out, &checked, columns).map_err(|error| {
            CliError::Failed(format!("cannot write {}: {error}", path.display()))
        })?;
    }
    let report = |checked, time| Report::new(name.clone(), &script, checked, time, args.repeat);
    Ok(match usual {
        None => report(checked, time),
        Some((usual, usual_time, _)) => {
            let hardened = Hardened::new(findings, &report(usual, usual_time));
            report(checked, time).in_hardened_mode(hardened)
        }
    })
}

/// What a row of the placements has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Columns {
    /// What other tools read: nothing is added here.
    Plain,
    WithCpus,
}

fn write_placements(out: &mut impl Write, checked: &Checked, columns: Columns) -> io::Result<()> {
    write!(out, "id,chunk,offset,size,align,alloc_op,free_op")?;
    if columns == Columns::WithCpus {
        write!(out, ",alloc_cpu,free_cpu")?;
    }
    writeln!(out)?;
    for (id, row) in checked.placements.iter().enumerate() {
        let (at, request) = (row.at, row.request);
        write!(
            out,
            "{id},{},{},{},{},{},",
            at.0,
            at.1,
            request.bytes(),
            request.align(),
            row.alloc_op
        )?;
        if let Some(op) = row.free_op {
            write!(out, "{op}")?;
        }
        if columns == Columns::WithCpus {
            write!(out, ",{},", row.alloc_cpu)?;
            if let Some(cpu) = row.free_cpu {
                write!(out, "{cpu}")?;
            }
        }
        writeln!(out)?;
    }
    out.flush()
}

/// A bar on a terminal, nothing elsewhere.
fn progress(name: &str, script: &Script, args: &ReplayArgs) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {bar:40} {percent:>3} % {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let machines = 1 + u64::from(args.hardened);
    ProgressBar::new(script.steps.len() as u64 * (1 + u64::from(args.repeat)) * machines)
        .with_style(style)
        .with_message(name.to_owned())
}
