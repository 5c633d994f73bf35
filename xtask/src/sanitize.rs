//! `cargo xtask sanitize`: the library's unit and integration tests under the address sanitizer, suite by suite.
//!
//! The sanitizer is a compiler's flag that is not stable: the compiler is told to take it nevertheless. What it builds goes to
//! a folder of its own in cargo's. All suites run but those that look at what the compiler makes of a few lines, or at the
//! memory of the process.
//!
//! There is no thread sanitizer here, for it would say little that is true. It knows neither the instructions of `asm!`
//! (restartable sequences, `cmpxchg16b`, %gs) nor fences that stand alone, which is what the caches and the operations on a
//! CPU's copy are made of; and the standard library that comes with the compiler has not been built with it. The models are
//! for that (`cargo xtask test models`). What was tried, with Rust 1.95 on x86-64: `-Zsanitizer=thread` is refused ("mixing
//! `-Zsanitizer` will cause an ABI mismatch", with `std`); with `-Cunsafe-allow-abi-mismatch=sanitizer` a program builds, and four
//! races are reported in ten correct lines that use a `Mutex`, a channel and `join`.

use std::process::{Command, ExitCode};

use serde_json::Value;

use crate::command::{Failure, cargo, check_tests, rustc, target_directory};
use crate::steps;
use crate::tally::Tally;

/// Suites that the address sanitizer cannot run, and why.
const NOT_UNDER_ADDRESS: &[(&str, &str)] = &[
    (
        "disassembly",
        "it looks at instructions, and there are more",
    ),
    (
        "gs_disassembly",
        "it looks at instructions, and there are more",
    ),
    (
        "memory",
        "it counts the memory of the process, and there is more",
    ),
    (
        "gs",
        "it takes static variables for one piece of memory, and there is something between them",
    ),
    (
        "modules",
        "it has cargo build shared libraries, which takes no sanitizer",
    ),
    (
        "mmap_faults",
        "it refuses the process memory and address space, which the sanitizer needs itself",
    ),
    ("valgrind", "it is another tool of the kind"),
];

/// What the programs' runtime is told: faults are the tests' business, and memory that lives as long as a test is no leak.
const OPTIONS: &str = "handle_segv=0:detect_leaks=0";

/// Runs the command with its arguments.
///
/// # Errors
/// One line, if there are any.
pub fn run(args: &[&str]) -> Result<ExitCode, String> {
    if let [first, ..] = args {
        return Err(format!(
            "'{first}': cargo xtask sanitize takes no arguments"
        ));
    }
    let (mut sum, mut lines) = (Tally::default(), Vec::new());
    match suites() {
        Ok(suites) => {
            for suite in suites {
                let tally = suite.run().unwrap_or_else(|failure| {
                    println!("{failure}");
                    Tally::FAIL
                });
                lines.push(format!("{:<16} {tally}", suite.name));
                sum += tally;
            }
        }
        Err(failure) => {
            lines.push(failure.to_string());
            sum += Tally::FAIL;
        }
    }
    let left_out = NOT_UNDER_ADDRESS.iter();
    lines.extend(left_out.map(|(name, why)| format!("{name:<16} not run: {why}")));
    println!("\n==> summary");
    lines.iter().for_each(|line| println!("{line}"));
    println!("\n{sum}");
    Ok(steps::exit_code(sum))
}

/// One test program.
struct Suite {
    name: String,
    /// How cargo picks it.
    target: String,
}

impl Suite {
    fn unit_tests() -> Self {
        Self {
            name: "unit tests".to_owned(),
            target: "--lib".to_owned(),
        }
    }

    fn integration(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            target: format!("--test {name}"),
        }
    }

    fn run(&self) -> Result<Tally, Failure> {
        println!("\n==> address sanitizer: {}", self.name);
        check_tests(&mut self.command()?)
    }

    fn command(&self) -> Result<Command, Failure> {
        let mut command = cargo(&format!(
            "test --package pcpu --features paging --no-fail-fast {} --target {}",
            self.target,
            host()?
        ));
        let folder = target_directory()?.join("sanitize").join("address");
        command.arg("--target-dir").arg(folder);
        command.env("RUSTC_BOOTSTRAP", "1");
        add_flag(&mut command, "-Zsanitizer=address");
        command.env("ASAN_OPTIONS", OPTIONS);
        Ok(command)
    }
}

/// All suites that cargo knows of, but a few.
fn suites() -> Result<Vec<Suite>, Failure> {
    let output = cargo("metadata --format-version 1 --no-deps --offline").output()?;
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let targets = packages
        .filter(|package| package["name"] == "pcpu")
        .filter_map(|package| package["targets"].as_array())
        .flatten();
    let names: Vec<&str> = targets
        .filter(|target| target["kind"][0] == "test")
        .filter_map(|target| target["name"].as_str())
        .collect();
    if let Some((gone, _)) = NOT_UNDER_ADDRESS
        .iter()
        .find(|(name, _)| !names.contains(name))
    {
        return Err(format!("there is no suite '{gone}' to leave out").into());
    }
    let is_run = |name: &&&str| NOT_UNDER_ADDRESS.iter().all(|(left, _)| left != *name);
    let integration = names.iter().filter(is_run);
    Ok(std::iter::once(Suite::unit_tests())
        .chain(integration.map(|name| Suite::integration(name)))
        .collect())
}

/// The target that the compiler builds for by itself: naming it keeps the flags from build scripts and macros.
fn host() -> Result<String, Failure> {
    let output = Command::new(rustc()).arg("-vV").output()?;
    let text = String::from_utf8(output.stdout)?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.ok_or("rustc -vV names no host")?.to_owned())
}

/// Adds a flag of the compiler to those of the environment, in the form that it has them in.
fn add_flag(command: &mut Command, flag: &str) {
    let of_command = |name: &str| {
        let mut envs = command.get_envs();
        let set = envs.find_map(|(key, value)| (key == name).then_some(value?.to_owned()));
        set.or_else(|| std::env::var_os(name))
    };
    let encoded = "CARGO_ENCODED_RUSTFLAGS";
    let (name, separator) = match of_command(encoded) {
        Some(_) => (encoded, "\u{1f}"),
        None => ("RUSTFLAGS", " "),
    };
    let mut flags = of_command(name).unwrap_or_default();
    if !flags.is_empty() {
        flags.push(separator);
    }
    flags.push(flag);
    command.env(name, flags);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_added_to_those_there_are() {
        let flags = |command: &Command, name: &str| {
            let mut envs = command.get_envs();
            envs.find_map(|(key, value)| (key == name).then_some(value?.to_owned()))
        };
        let mut command = Command::new("true");
        command.env("RUSTFLAGS", "-Cdebuginfo=1");
        command.env_remove("CARGO_ENCODED_RUSTFLAGS");
        add_flag(&mut command, "-Zone");
        add_flag(&mut command, "-Ztwo");
        assert_eq!(
            flags(&command, "RUSTFLAGS").unwrap(),
            "-Cdebuginfo=1 -Zone -Ztwo"
        );
        let mut command = Command::new("true");
        command.env("CARGO_ENCODED_RUSTFLAGS", "-C\u{1f}debuginfo=1");
        add_flag(&mut command, "-Zone");
        let encoded = flags(&command, "CARGO_ENCODED_RUSTFLAGS").unwrap();
        assert_eq!(encoded, "-C\u{1f}debuginfo=1\u{1f}-Zone");
    }
}
