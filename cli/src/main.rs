//! The `pcpu` program: the per-CPU allocator, shown at work, and tools that run it on recorded traces.
//!
//! Results go to the standard output, everything else to the standard error stream. An error is one line. Exit codes:
//! 0, 1 if a request or a check failed, 2 if what was given makes no sense.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use error::CliError;

mod bench;
mod count;
mod demo;
mod error;
mod layout;
mod map;
mod record;
mod replay;
mod script;
mod trace;

/// The dynamic per-CPU allocator: a demonstration, tools for layouts and allocation traces, benchmarks
#[derive(Parser, Debug)]
#[command(name = "pcpu", version)]
struct Program {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand, Debug)]
enum Command {
    Demo(demo::DemoArgs),
    Layout(layout::LayoutArgs),
    Replay(replay::ReplayArgs),
    Map(map::MapArgs),
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    let program = match Program::try_parse() {
        Ok(program) => program,
        Err(help)
            if matches!(
                help.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            ) =>
        {
            return exit_code(print(&help.to_string()));
        }
        Err(error) => return exit_code(Err(error.into())),
    };
    exit_code(match program.command {
        None => demo::run(&demo::DemoArgs::default()),
        Some(Command::Demo(args)) => demo::run(&args),
        Some(Command::Layout(args)) => layout::run(&args),
        Some(Command::Replay(args)) => replay::run(&args),
        Some(Command::Map(args)) => map::run(&args),
        Some(Command::Bench(args)) => bench::run(&args),
    })
}

fn exit_code(result: Result<(), CliError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to be done if even that can't be written.
            let _ = writeln!(io::stderr(), "pcpu: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Writes to the standard output.
fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CliError::Failed(format!(
            "cannot write to the standard output: {error}"
        ))),
        _ => Ok(()),
    }
}

/// Creates a file that the command line asks for.
fn create(path: &Path) -> Result<BufWriter<File>, CliError> {
    File::create(path)
        .map(BufWriter::new)
        .map_err(|error| CliError::Input(format!("cannot write {}: {error}", path.display())))
}
