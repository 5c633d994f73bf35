//! `pcpu demo`: the allocator at work on this machine, every claim checked.
//!
//! The process's own instance serves static and dynamic variables on the CPUs that the system has; then a recorded boot
//! of Linux is replayed on a simulated machine. A line that begins with `ok` or `FAILED` is a check.

use std::path::PathBuf;

use clap::Args;
use pcpu::this_cpu::process::Method;
use pcpu::unit::CpuId;
use pcpu::{global, per_cpu_ptr};

use crate::error::CliError;
use crate::map;
use crate::record;
use crate::replay::pass;
use crate::replay::player::{Player, Setup};
use crate::script::Script;
use crate::{create, print};

mod at_work;
mod checks;
mod counting;
mod seats;
mod wrong_use;

use checks::Checks;
use counting::Counter;

/// Show the allocator at work on this machine, every claim checked
#[derive(Args, Debug, Default)]
pub struct DemoArgs {
    /// Write what the allocator of this process does to this file, as a trace for replay
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

/// Runs the demonstration.
///
/// # Errors
/// One line: a check failed, or the trace cannot be written.
pub fn run(args: &DemoArgs) -> Result<(), CliError> {
    let mut out = args.record.as_deref().map(create).transpose()?;
    let recorder = out.is_some().then(record::start);
    let mut checks = Checks::default();

    this_machine(&mut checks)?;
    if let (Some(recorder), Some(out), Some(path)) = (recorder, &mut out, &args.record) {
        recorder.stop();
        let name = path.display();
        let events = recorder
            .write(out)
            .map_err(|error| CliError::Failed(format!("cannot write {name}: {error}")))?;
        print(&format!(
            "\n{events} events recorded in {name}; to replay them: pcpu replay {name}\n"
        ))?;
    }
    simulated_machine(&mut checks)?;
    print("\n")?;
    checks.finish()
}

/// Variables of this process on the CPUs of this machine.
fn this_machine(checks: &mut Checks) -> Result<(), CliError> {
    let failed = |error: &dyn ToString| CliError::Failed(error.to_string());
    let units = global().units();
    print(&format!(
        "This machine: {} possible CPUs. The first chunk of this process, whose last unit is for threads\n\
         that the kernel does not know by their CPU:\n{}\nOperations on the current CPU: {}\n\n",
        units.possible().count() - 1,
        pcpu::global::boot_log().trim_end(),
        match pcpu::global::method() {
            Method::RestartableSequences => "restartable sequences, no LOCKed instruction",
            Method::Locked => "LOCKed steps, for lack of restartable sequences",
        },
    ))?;

    let mut counters = Vec::from(Counter::statics());
    let statics = counters.len();
    for name in ["dynamic hits", "dynamic misses"] {
        counters.push(Counter::dynamic(name).map_err(|error| failed(&error))?);
    }
    one_offset(&counters, checks)?;
    counting::count(&counters, checks)?;
    at_work::all(checks)?;
    wrong_use::zero_again(checks)?;
    wrong_use::wrong_frees(&counters[0], checks)?;
    for counter in counters.drain(statics..) {
        counter.free().map_err(|error| failed(&error))?;
    }
    let stats = global().stats();
    checks.equal(
        format_args!("all {} areas of this process are freed", stats.allocs),
        (stats.live, stats.live_bytes, stats.frees),
        (0, 0, stats.allocs),
    )?;
    print(&format!(
        "\nStatistics of this process's allocator:\n{}\n",
        two_columns(&stats.to_string())
    ))
}

/// Checks that every counter, static or dynamic, is the same distance from its copy on a CPU.
fn one_offset(counters: &[Counter], checks: &mut Checks) -> Result<(), CliError> {
    let shifted = |cpu: CpuId| {
        counters.iter().all(|counter| {
            let offset = global().units().offset(cpu);
            per_cpu_ptr(counter.handle(), cpu)
                .ok()
                .map(|copy| copy.addr().get())
                == offset.map(|offset| counter.neutral().wrapping_add(offset))
        })
    };
    let other = global()
        .units()
        .possible()
        .iter()
        .find(|&cpu| !shifted(cpu));
    checks.check(
        "static and dynamic variables are shifted by the same unit offset on every CPU",
        other.map_or(Ok(()), |cpu| Err(format!("CPU {} differs", cpu.get()))),
    )
}

/// The trace that the program has built in, on a simulated machine.
fn simulated_machine(checks: &mut Checks) -> Result<(), CliError> {
    let (name, bytes) = map::BOOT8;
    let script = Script::read_bytes(name, bytes)?;
    let setup = Setup::default();
    print(&format!(
        "\nA recorded boot of Linux ({name}) on a simulated machine of {} CPUs:\n",
        setup.cpus
    ))?;
    let mut player = Player::new(name, &script, &setup)?;
    match pass::checked(&mut player, |_| {}) {
        Err(error) => checks.check("every area lies where it may and is zero", Err(error))?,
        Ok(checked) => {
            checks.check(
                format_args!(
                    "{} areas: each where it may lie, nobody else's, zero on every CPU",
                    checked.allocs
                ),
                Ok::<(), CliError>(()),
            )?;
            checks.equal(
                format_args!("{} operations, none refused", checked.ops()),
                (checked.failed, checked.skipped_frees),
                (0, 0),
            )?;
            checks.check("all is given back when everything is freed", player.empty())?;
        }
    }
    print(&format!("\n{}", map::text(&map::at_peak(name, &script)?)))
}

/// Lines side by side, the second half beside the first.
fn two_columns(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    let half = lines.len().div_ceil(2);
    let width = lines
        .iter()
        .map(|line| line.chars().count())
        .max()
        .unwrap_or(0);
    (0..half)
        .map(|row| {
            let right = lines.get(half + row).copied().unwrap_or_default();
            format!("{:width$}   {right}", lines[row])
        })
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns() {
        assert_eq!(two_columns("a\nbb\nc"), "a    c\nbb   ");
    }
}
