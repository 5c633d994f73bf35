//! `pcpu bench --possible-cpus`: the program once more, in a process that is told that the machine may have so many CPUs.
//!
//! A process takes its possible CPUs from a file of the system's. In a user namespace and a mount namespace of its own it may
//! put another file there, which nobody outside sees. The program that starts there has the same arguments, and an instance
//! with a unit for each CPU of the list. On those that the machine does not have nothing runs, but they have memory, which is
//! zeroed and added up.
//!
//! The process outside starts the one inside, once, and passes on how it ended. The one inside knows itself by a variable of
//! the environment and starts none.

use std::env;
use std::ffi::{CStr, CString, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};

use pcpu::Global;
use pcpu::global;
use pcpu::unit::MAX_CPUS;
use pcpu_workloads::home::Home;
use rustix::mount::mount_bind;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tempfile::NamedTempFile;

use crate::error::CliError;

/// The most CPUs that a process's instance can have: one unit more is that of stray threads.
pub const MAX_POSSIBLE_CPUS: u32 = MAX_CPUS - 1;

/// Where the system lists the CPUs that the machine may have.
const LIST: &CStr = c"/sys/devices/system/cpu/possible";

/// Set in the environment of the process inside.
const INSIDE: &str = "PCPU_BENCH_INSIDE";

/// Whether this process is the one inside.
pub fn is_inside() -> bool {
    env::var_os(INSIDE).is_some()
}

/// The process's own instance, inside, with all CPUs brought up.
///
/// # Errors
/// One line, if it has another number of CPUs, or one can't be brought up.
pub fn home(cpus: u32) -> Result<Home<Global>, CliError> {
    let told = possible_cpus();
    if told != cpus {
        return Err(CliError::Input(format!(
            "--possible-cpus {cpus}: the system tells of {told} CPUs, although {INSIDE} is set"
        )));
    }
    Ok(Home::of_process_with_all_cpus()?)
}

/// Runs the program inside, with the arguments of this one.
///
/// # Errors
/// One line, if the machine may have more CPUs, or the system does not let it run there. How it ended, if not well.
pub fn run_inside(cpus: u32) -> Result<(), CliError> {
    let least = possible_cpus();
    if cpus < least {
        return Err(CliError::Input(format!(
            "--possible-cpus {cpus}: this machine may have {least}, which is the least that a process can be told of"
        )));
    }
    let refused = |error: io::Error| {
        CliError::Input(format!(
            "--possible-cpus {cpus}: the system does not let a process have its own {}, by a user and a mount namespace: \
             {error}",
            LIST.to_string_lossy()
        ))
    };
    let list = list(cpus).map_err(|error| {
        CliError::Input(format!(
            "--possible-cpus {cpus}: cannot write a temporary file: {error}"
        ))
    })?;
    let path = CString::new(list.path().as_os_str().as_bytes())
        .map_err(|error| CliError::Input(format!("{}: {error}", list.path().display())))?;
    let mut child = again(path).spawn().map_err(refused)?;
    // It runs, and so sees the list in its place, with or without a name elsewhere: none is left behind whatever ends this
    // process from now on.
    drop(list);
    let status = child.wait().map_err(|error| {
        CliError::Failed(format!("--possible-cpus {cpus}: cannot wait: {error}"))
    })?;
    passed_on(cpus, status)
}

/// The CPUs that the process is told of, those in between that are not possible included.
fn possible_cpus() -> u32 {
    global::stray_unit().get()
}

/// A file as the system would have it.
fn list(cpus: u32) -> io::Result<NamedTempFile> {
    let mut file = NamedTempFile::with_prefix("pcpu-possible-")?;
    writeln!(file, "0-{}", cpus - 1)?;
    Ok(file)
}

/// This program with its arguments, to be started where `list` is the list of CPUs.
fn again(list: CString) -> Command {
    let mut args = env::args_os();
    let name = args.next().unwrap_or_else(|| OsString::from("pcpu"));
    // The file that this process runs, even if there is another by its name now.
    let mut command = Command::new("/proc/self/exe");
    command.arg0(name).args(args).env(INSIDE, "1");
    // SAFETY: `enter` makes two system calls and nothing else, neither of which touches memory of the parent's or a lock.
    unsafe { command.pre_exec(move || enter(&list)) };
    command
}

/// Leaves the namespaces of the parent and puts `list` in its place. Between fork and exec: it must not allocate.
fn enter(list: &CStr) -> io::Result<()> {
    // The mounts of a namespace that belongs to another user namespace pass nothing on to those that they were copied from.
    // No id is mapped: the right to mount is wanted up to the exec only, and files are still opened as the user that it was.
    //
    // SAFETY: the table of files is not among what is unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS)? };
    Ok(mount_bind(list, LIST)?)
}

/// What becomes of how the process inside ended. It has told why itself, unless it was killed.
fn passed_on(cpus: u32, status: ExitStatus) -> Result<(), CliError> {
    match status.code().map(u8::try_from) {
        Some(Ok(0)) => Ok(()),
        Some(Ok(code)) => Err(CliError::Told(code)),
        _ => Err(CliError::Failed(format!(
            "--possible-cpus {cpus}: the process that measures ended with {status}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn the_list_is_one_as_the_system_writes_it() {
        let list = list(16).unwrap();
        assert_eq!(fs::read_to_string(list.path()).unwrap(), "0-15\n");
        let path = list.path().to_owned();
        drop(list);
        assert!(!path.exists());
    }

    #[test]
    fn an_exit_code_is_passed_on_and_a_signal_told() {
        let ended = |raw| passed_on(16, ExitStatus::from_raw(raw));
        assert!(ended(0).is_ok());
        for code in [1, 2, 101, 255] {
            let error = ended(i32::from(code) << 8).unwrap_err();
            assert!(matches!(error, CliError::Told(told) if told == code));
            assert_eq!(error.exit_code(), code);
        }
        let error = ended(9).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("signal: 9"), "{error}");
    }
}
