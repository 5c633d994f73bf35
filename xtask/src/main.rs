//! The project's own tasks, run as `cargo xtask TASK`.
//!
//! | task | what it does |
//! |---|---|
//! | `test` | every check and test of the project |
//! | `test FILTER` | those steps whose name contains FILTER |
//! | `api` | writes `docs/public-api.txt` anew |
//! | `api --since REV` | tells whether the public API has changed since a revision, and whether that breaks something |
//! | `api --base` | records the public API as that of the version in `Cargo.toml`: when it is released |
//! | `kernel [OPTIONS]` | boots the kernel in QEMU and runs its tests; the options: `src/kernel/options.rs` |
//! | `kernel-results` | counts the instructions of the kernel's operations and writes `benches/results/kernel.csv` |
//! | `measure [--quick]` | all figures of this machine, into `benches/results/`, and their plot |
//! | `sanitize` | the library's tests under the address sanitizer; `src/sanitize.rs` says which are left out, and why there is no other sanitizer |
//! | `soak [--operations N] [--minutes N] [--memory MIB]` | allocates and frees on all CPUs, 10^9 times, within bounds |
//! | `plot` | draws `docs/figures.svg` from `benches/results/` |
//!
//! A run of tests ends with the line `N passed, N failed`, which counts tests and other checks alike. Exit 0: all passed;
//! 1: some failed; 2: no such task or option.

use std::process::ExitCode;

mod api;
mod command;
mod docs;
mod freestanding;
mod kernel;
mod layout;
mod measure;
mod plot;
mod replay;
mod sanitize;
mod soak;
mod steps;
mod tally;

use command::Failure;

const USAGE: &str = "usage: cargo xtask test [FILTER] | cargo xtask api [--since REV | --base] | cargo xtask kernel [OPTIONS] | \
                     cargo xtask sanitize | cargo xtask soak [OPTIONS] | \
                     cargo xtask kernel-results | cargo xtask measure [--quick] | cargo xtask plot";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["test"] => steps::run(""),
        ["test", filter] if !filter.starts_with('-') && steps::any(filter) => steps::run(filter),
        ["test", filter] if !filter.starts_with('-') => wrong_use(&format!(
            "no step is named like '{filter}'; there are: {}",
            steps::names()
        )),
        ["api"] => done(api::write()),
        ["api", "--base"] => done(api::write_base()),
        ["api", "--since", revision] if !revision.starts_with('-') => match api::since(revision) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(failure) => wrong_use(&format!("--since {revision}: {failure}")),
        },
        ["kernel", ref options @ ..] => match kernel::Options::parse(options) {
            Ok(options) => kernel::run(&options),
            Err(line) => wrong_use(&line),
        },
        ["kernel-results"] => kernel::run_results(),
        ["measure", ref options @ ..] => match measure::Effort::parse(options) {
            Ok(effort) => measure::run(effort),
            Err(line) => wrong_use(&line),
        },
        ["sanitize", ref options @ ..] => match sanitize::run(options) {
            Ok(code) => code,
            Err(line) => wrong_use(&line),
        },
        ["soak", ref options @ ..] => soak::run(options),
        ["plot"] => plot::run(),
        _ => wrong_use(USAGE),
    }
}

fn done(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn wrong_use(line: &str) -> ExitCode {
    eprintln!("{line}");
    ExitCode::from(2)
}
