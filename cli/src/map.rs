//! `pcpu map`: what lies where in each chunk, after a trace has been replayed up to the peak of its live bytes.

use std::fs;
use std::path::PathBuf;

use clap::Args;

use crate::error::CliError;
use crate::print;
use crate::replay::player::{Player, Setup, Zeroing};
use crate::script::{Action, Purpose, Script};

mod snapshot;
mod svg_map;
mod text_map;

pub use snapshot::Snapshot;
pub use text_map::text;

/// The trace that the program has built in: a boot of Linux, then cgroups and network namespaces.
pub const BOOT8: (&str, &[u8]) = ("boot8", include_bytes!("../../traces/boot8.trace.gz"));

/// Show what lies where in each chunk at the peak of a trace
#[derive(Args, Debug, Default)]
pub struct MapArgs {
    /// Write the map to this file as SVG, not as text to the standard output
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// The trace; a boot of Linux is built in
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

/// Replays the trace up to its peak and draws the map.
///
/// # Errors
/// One line: a file makes no sense, or a check failed.
pub fn run(args: &MapArgs) -> Result<(), CliError> {
    let (name, script) = match &args.trace {
        Some(path) => (path.display().to_string(), Script::read(path)?),
        None => (BOOT8.0.to_owned(), Script::read_bytes(BOOT8.0, BOOT8.1)?),
    };
    let snapshot = at_peak(&name, &script)?;
    match &args.svg {
        None => print(&text(&snapshot)),
        Some(path) => {
            fs::write(path, svg_map::svg(&snapshot)).map_err(|error| {
                CliError::Input(format!("cannot write {}: {error}", path.display()))
            })?;
            let (what, figures) = snapshot.figures();
            print(&format!(
                "{what}\n{figures}\nwritten to {}\n",
                path.display()
            ))
        }
    }
}

/// The map of the machine on which a trace has been replayed up to the peak of its live bytes.
///
/// # Errors
/// One line, if the machine or the allocator fails.
pub fn at_peak(name: &str, script: &Script) -> Result<Snapshot, CliError> {
    let setup = Setup {
        // What the copies hold is not looked at.
        zeroing: Zeroing::Off,
        ..Setup::default()
    };
    let mut player = Player::new(name, script, &setup)?;
    let peak = peak(script);
    for number in 0..peak.steps {
        player.step(number)?;
    }
    let title = match peak.op {
        Some(op) => format!("{name} at its peak, after operation {op}"),
        None => format!("{name}, which has no allocation"),
    };
    Ok(Snapshot::take(
        title,
        setup.cpus,
        player.pcpu.sizes(),
        |visit| player.pcpu.visit_map(visit),
    ))
}

/// Where a script has the most live bytes.
#[derive(Debug, Default)]
struct Peak {
    /// Steps up to it, its own included.
    steps: usize,
    /// The operation that leads to it, counted from 0.
    op: Option<u64>,
}

fn peak(script: &Script) -> Peak {
    let mut sizes = vec![0; script.areas as usize];
    let (mut live_bytes, mut most, mut ops) = (0, 0, 0);
    let mut peak = Peak::default();
    for (index, step) in script.steps.iter().enumerate() {
        if step.purpose == Purpose::Try {
            continue;
        }
        match step.action {
            Action::Alloc { area, request } => {
                sizes[area as usize] = request.bytes();
                live_bytes += request.bytes();
            }
            Action::Free { area } => live_bytes -= sizes[area as usize],
        }
        if live_bytes > most {
            most = live_bytes;
            peak = Peak {
                steps: index + 1,
                op: Some(ops),
            };
        }
        ops += 1;
    }
    peak
}
