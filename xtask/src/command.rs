//! Running cargo and the programs that it builds, from the root of the workspace.
//!
//! Nothing here assumes where cargo puts what it builds: paths come from its JSON messages.

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::tally::Tally;

/// A check that could not be made, told in one line.
pub type Failure = Box<dyn Error>;

/// The root of the workspace.
pub fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// The cargo that runs this program, with arguments that are separated by spaces.
pub fn cargo(args: &str) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(args.split_whitespace()).current_dir(root());
    command
}

/// What git says.
pub fn git(args: &[&str]) -> Result<String, Failure> {
    let output = Command::new("git")
        .args(args)
        .current_dir(root())
        .output()?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        return Err(told.lines().next().unwrap_or("git fails").to_owned().into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The first line that a program says of its version.
pub fn version_of(program: impl AsRef<OsStr>) -> Result<String, Failure> {
    let output = Command::new(program).arg("--version").output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// The compiler.
pub fn rustc() -> OsString {
    std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())
}

/// Where cargo puts what it builds.
pub fn target_directory() -> Result<PathBuf, Failure> {
    let output = cargo("metadata --format-version 1 --no-deps --offline").output()?;
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let target = metadata["target_directory"].as_str();
    Ok(target
        .ok_or("cargo metadata names no target directory")?
        .into())
}

/// One check: `command` exits with 0. Its output goes to the terminal.
pub fn check(command: &mut Command) -> Result<Tally, Failure> {
    let status = command.status()?;
    if !status.success() {
        println!("{status}");
    }
    Ok(Tally::of(status.success()))
}

/// Runs `cargo test` and counts the tests. A run that fails although no test did (it does not compile, a test
/// ends the process) counts as one failure.
pub fn check_tests(command: &mut Command) -> Result<Tally, Failure> {
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut tally = Tally::default();
    for line in BufReader::new(child.stdout.take().expect("it is piped")).lines() {
        let line = line?;
        println!("{line}");
        tally += Tally::of_test_line(&line);
    }
    let status = child.wait()?;
    if !status.success() && tally.failed == 0 {
        println!("{status}");
        tally += Tally::FAIL;
    }
    Ok(tally)
}

/// Something that cargo built, as its JSON message tells.
pub struct Artifact(Value);

impl Artifact {
    /// The program, if it is one and has this name.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        let executable = self.0["executable"].as_str()?;
        (self.0["target"]["name"] == name).then(|| executable.into())
    }

    /// The files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let files = self.0["filenames"].as_array().into_iter().flatten();
        files.filter_map(Value::as_str).map(Path::new)
    }
}

/// Runs a `cargo build` command; what it built and what that depends on, in order.
pub fn build(command: &mut Command) -> Result<Vec<Artifact>, Failure> {
    command.arg("--message-format=json-render-diagnostics");
    let Output { status, stdout, .. } = command.stderr(Stdio::inherit()).output()?;
    if !status.success() {
        return Err(format!("the build failed: {status}").into());
    }
    let messages: Result<Vec<Value>, _> = serde_json::Deserializer::from_slice(&stdout)
        .into_iter()
        .collect();
    Ok(messages?
        .into_iter()
        .filter(|message| message["reason"] == "compiler-artifact")
        .map(Artifact)
        .collect())
}

/// The `pcpu` program, built in release mode.
pub struct Program(PathBuf);

impl Program {
    /// Builds it.
    pub fn build() -> Result<Self, Failure> {
        let artifacts = build(&mut cargo("build --release --package pcpu-cli"))?;
        let path = artifacts.iter().find_map(|built| built.program("pcpu"));
        Ok(Self(path.ok_or("cargo names no program `pcpu`")?))
    }

    /// A run of it with arguments that are separated by spaces.
    pub fn run(&self, args: &str) -> Command {
        let mut command = Command::new(&self.0);
        command.args(args.split_whitespace()).current_dir(root());
        command
    }
}
