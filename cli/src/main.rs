//! The `pcpu` program: the per-CPU allocator, shown at work, and tools that run it on recorded traces.
//!
//! Results go to the standard output, everything else to the standard error stream. An error is one line. Exit codes:
//! 0, 1 if a request or a check failed, 2 if what was given makes no sense.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use pcpu_cli::output::{create, print};
use pcpu_cli::{error, layout, script};

use error::CliError;

mod bench;
mod count;
mod demo;
mod map;
mod record;
mod replay;

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
        Err(CliError::Told(code)) => ExitCode::from(code),
        Err(error) => {
            // Nothing is left to be done if even that can't be written.
            let _ = writeln!(io::stderr(), "pcpu: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
