//! `cargo xtask kernel`: builds the kernel, boots it in QEMU, shows what it prints, and counts its tests.
//!
//! A run passes only if the kernel says so twice: by its tally, and by QEMU's exit code 33, which nothing but the exit
//! device gives. A triple fault ends QEMU with 0.

use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{ChildStdout, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::command::{Failure, build, cargo, root};
use crate::tally::Tally;

mod boot_log;
mod code;
mod options;
mod qemu;
pub mod results;
mod trace;

use options::Job;
pub use options::Options;

/// The exit code of a kernel whose tests all passed: twice what it writes to the exit device, plus 1.
const PASSED: i32 = 33;
/// The exit code of a kernel that says that it failed.
const FAILED: i32 = 35;

/// Builds and runs the kernel; the closing line is the tally.
pub fn run(options: &Options) -> ExitCode {
    close(check(options))
}

/// Counts the instructions of the operations and keeps them as results.
pub fn run_results() -> ExitCode {
    close(results::write())
}

fn close(result: Result<Tally, Failure>) -> ExitCode {
    let tally = result.unwrap_or_else(|failure| {
        println!("{failure}");
        Tally::FAIL
    });
    println!("{tally}");
    if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// A step of `cargo xtask test`, with the same arguments.
pub fn check_args(args: &str) -> Result<Tally, Failure> {
    let args: Vec<&str> = args.split_whitespace().collect();
    check(&Options::parse(&args)?)
}

/// A step that also compares the boot log with what Linux would print.
pub fn check_with_log(args: &str) -> Result<Tally, Failure> {
    let args: Vec<&str> = args.split_whitespace().collect();
    let options = Options::parse(&args)?;
    let run = boot(&options, "")?;
    let mut tally = boot_log::check(&options, &run.lines)?;
    tally += tally_of(&run)?;
    Ok(tally)
}

/// A step that also replays a trace, which is named from the root of the workspace.
pub fn check_trace(args: &str, trace: &str) -> Result<Tally, Failure> {
    let args: Vec<&str> = args.split_whitespace().collect();
    let mut options = Options::parse(&args)?;
    options.trace = Some(root().join(trace));
    check(&options)
}

/// Boots a machine whose other CPUs never come, and one that has no room for any: the tests of both, and one more for the
/// memory that the others cost.
pub fn check_possible() -> Result<Tally, Failure> {
    const FEW: &str = "--cpus 2";
    const MANY: &str = "--cpus 2 --possible 240";
    let frames = |args: &str| {
        let args: Vec<&str> = args.split_whitespace().collect();
        let options = Options::parse(&args)?;
        let run = boot(&options, "")?;
        let frames = run.lines.iter().find_map(|line| {
            let number = line.strip_suffix(" frames for per-CPU memory")?;
            number.parse::<u64>().ok()
        });
        let frames = frames.ok_or("the kernel did not tell its frames")?;
        let mut tally = boot_log::check(&options, &run.lines)?;
        tally += tally_of(&run)?;
        Ok::<_, Failure>((frames, tally))
    };
    let ((few, tally_of_few), (many, tally_of_many)) = (frames(FEW)?, frames(MANY)?);
    let held = few > 0 && 2 * many <= 3 * few;
    let mark = if held { "ok" } else { "FAILED" };
    println!("{mark} {few} frames with {FEW}, {many} with {MANY}; the limit is 1.5 times as many");
    let mut tally = Tally::of(held);
    tally += tally_of_few;
    tally += tally_of_many;
    Ok(tally)
}

/// Builds and runs the kernel; the tests that it told of, or whether it counted to the end.
pub fn check(options: &Options) -> Result<Tally, Failure> {
    let run = boot(options, "")?;
    match options.job {
        Job::Test => tally_of(&run),
        Job::Bench => Ok(Tally::of(run.passed())),
    }
}

/// The tests that a kernel told of.
fn tally_of(run: &Run) -> Result<Tally, Failure> {
    let tally = run
        .lines
        .iter()
        .rev()
        .find_map(|line| Tally::of_closing_line(line));
    let mut tally = tally
        .filter(|&tally| tally != Tally::default())
        .ok_or("the kernel ended without a tally")?;
    if !run.passed() && tally.failed == 0 {
        let status = run.status;
        println!("QEMU: {status}, not the exit code {PASSED} of a kernel that passed");
        tally += Tally::FAIL;
    }
    Ok(tally)
}

/// Ways to die, and what the kernel must say of them: a fault never passes for a success, and never goes by in silence.
const DEATHS: &[(&str, &str)] = &[
    ("panic", "PANIC: panicked at kernel/src/tests/death.rs"),
    ("overflow", "EXCEPTION 14 "),
    ("no-stack", "rsp 0x8), cr2 0x0"),
    ("execute-data", "EXCEPTION 14 error 0x11 "),
    ("breakpoint", "EXCEPTION 3 "),
];

/// Boots the kernel once for each way to die.
pub fn check_deaths() -> Result<Tally, Failure> {
    let options = Options::parse(&["--cpus", "2"])?;
    let mut tally = Tally::default();
    for (name, last_words) in DEATHS {
        let run = boot(&options, &format!("die={name}"))?;
        let said = run.lines.iter().any(|line| line.contains(last_words));
        let held = said && run.status.code() == Some(FAILED);
        if !held {
            let status = run.status;
            println!("FAILED {name}: {status}; wanted: exit code {FAILED} and '{last_words}'");
        }
        tally += Tally::of(held);
    }
    Ok(tally)
}

/// Looks at the machine code of the kernel, with its checks and without.
pub fn check_code() -> Result<Tally, Failure> {
    let mut tally = code::check(&build_kernel(Job::Test)?)?;
    tally += code::check(&build_kernel(Job::Bench)?)?;
    Ok(tally)
}

/// What a kernel did.
struct Run {
    lines: Vec<String>,
    status: ExitStatus,
}

impl Run {
    fn passed(&self) -> bool {
        self.status.code() == Some(PASSED)
    }
}

/// Builds the kernel and boots it with some more words on its command line; shows what it prints.
fn boot(options: &Options, words: &str) -> Result<Run, Failure> {
    qemu::ensure_installed()?;
    let kernel = build_kernel(options.job)?;
    let mut command = qemu::command(options, &kernel, words);
    if let Some(trace) = &options.trace {
        let module = kernel.with_extension("trace");
        trace::write_module(trace, &module)?;
        command.arg("-initrd").arg(module);
    }
    println!("{}", Shown(&command));
    let mut qemu = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = lines_of(qemu.stdout.take().expect("it is piped"));
    let lines = show(&lines, qemu::time_limit(options));
    if lines.is_err() {
        qemu.kill()?;
    }
    let status = qemu.wait()?;
    Ok(Run {
        lines: lines?,
        status,
    })
}

/// Builds the kernel; without its checks where instructions are to be counted.
fn build_kernel(job: Job) -> Result<PathBuf, Failure> {
    if !cfg!(target_arch = "x86_64") {
        return Err("the kernel is for x86-64, and so must be the machine that builds it".into());
    }
    let profile = match job {
        Job::Test => "kernel",
        Job::Bench => "release",
    };
    let mut command = cargo("build --package pcpu-kernel --features boot");
    command.args(["--profile", profile]);
    let path = build(&mut command)?
        .iter()
        .find_map(|built| built.program("pcpu-kernel"));
    Ok(path.ok_or("cargo names no program `pcpu-kernel`")?)
}

/// Shows all lines until the kernel ends.
fn show(lines: &Receiver<String>, time_limit: Duration) -> Result<Vec<String>, Failure> {
    let deadline = Instant::now() + time_limit;
    let mut shown = Vec::new();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                println!("{line}");
                shown.push(line);
            }
            // The end of its output: QEMU is ending.
            Err(RecvTimeoutError::Disconnected) => return Ok(shown),
            Err(RecvTimeoutError::Timeout) => {
                let seconds = time_limit.as_secs();
                return Err(format!("the kernel did not end within {seconds} s").into());
            }
        }
    }
}

/// Reads lines in a thread of its own, so that waiting for one can have a limit.
fn lines_of(output: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line);
            if sender.send(line.trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    receiver
}

/// A command as it could be typed.
struct Shown<'a>(&'a std::process::Command);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.get_program().to_string_lossy())?;
        for arg in self.0.get_args() {
            let arg = arg.to_string_lossy();
            if arg.contains(' ') || arg.is_empty() {
                write!(f, " '{arg}'")?;
            } else {
                write!(f, " {arg}")?;
            }
        }
        Ok(())
    }
}
