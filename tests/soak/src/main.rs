//! Allocates and frees for long, on all CPUs of a process: areas of any size, their own and other CPUs', through the caches
//! and past them, while memory goes back, caches are emptied, signal handlers allocate, and children are forked. Every copy of
//! every area is zero when it comes, is stamped, and is found as it was stamped when it goes.
//!
//! Exit 0: all was as it should be. 1: it was not, or it took too long or too much memory. 2: wrong arguments.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

#[path = "../../common/copies.rs"]
mod copies;
#[path = "../../common/crew.rs"]
mod crew;
#[path = "../../common/forked.rs"]
mod forked;

mod bounds;
mod house;
mod signals;
mod workers;

/// How much, and within what.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask soak",
    about = "Allocates and frees for long, on all CPUs"
)]
struct Options {
    /// Allocations and frees together.
    #[arg(long, value_name = "N", default_value_t = 1_000_000_000,
          value_parser = clap::value_parser!(u64).range(1..=1_000_000_000_000))]
    operations: u64,
    /// It has failed if it takes longer.
    #[arg(long, value_name = "MINUTES", default_value_t = 120,
          value_parser = clap::value_parser!(u64).range(1..=100_000))]
    minutes: u64,
    /// It has failed if the process takes more memory, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024,
          value_parser = clap::value_parser!(u64).range(64..=1_048_576))]
    memory: u64,
}

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) if error.use_stderr() => {
            let told = error.to_string();
            eprintln!("{}", told.lines().next().unwrap_or_default());
            return ExitCode::from(2);
        }
        Err(help) => {
            print!("{help}");
            return ExitCode::SUCCESS;
        }
    };
    let bounds = bounds::Bounds {
        time: Duration::from_secs(60 * options.minutes),
        memory_kib: options.memory << 10,
    };
    match house::run(options.operations, &bounds) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}
