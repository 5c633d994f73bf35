//! `cargo xtask soak`: the program in `tests/soak`, with its options.

use std::process::{Command, ExitCode};

use crate::command::{Failure, build, cargo, check, root};
use crate::tally::Tally;

/// Operations of the short form, which `cargo xtask test` runs: a few seconds.
const SHORT: &str = "--operations 1000000";

/// Runs it with these options, which it looks at itself.
pub fn run(options: &[&str]) -> ExitCode {
    let status = program().and_then(|mut program| Ok(program.args(options).status()?));
    match status {
        Ok(status) => {
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            code.map_or(ExitCode::FAILURE, ExitCode::from)
        }
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

/// One check: the short form.
pub fn check_short() -> Result<Tally, Failure> {
    check(program()?.args(SHORT.split_whitespace()))
}

fn program() -> Result<Command, Failure> {
    let artifacts = build(&mut cargo("build --release --package pcpu-soak"))?;
    let path = artifacts
        .iter()
        .find_map(|built| built.program("pcpu-soak"));
    let mut command = Command::new(path.ok_or("cargo names no program `pcpu-soak`")?);
    command.current_dir(root());
    Ok(command)
}
