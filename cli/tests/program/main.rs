//! The `pcpu` program as others use it: arguments in, lines and an exit code out.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

mod bench;
mod demo;
mod layout;
mod map;
mod placements;
mod possible;
mod replay;

/// What a run of the program came to.
#[derive(Debug)]
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Run {
    /// The standard output of a run that ended well, without a word on the standard error stream.
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (0, ""), "{self:#?}");
        self.stdout
    }

    /// The message of a run that ended with `code`: one line.
    #[track_caller]
    fn error(&self, code: i32) -> &str {
        assert_eq!(self.code, code, "{self:#?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:#?}");
        assert!(self.stderr.ends_with('\n'), "{self:#?}");
        self.stderr
            .trim_end()
            .strip_prefix("pcpu: ")
            .expect("the message begins with the program's name")
    }
}

/// Runs the program.
fn pcpu<I: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = I>) -> Run {
    finished(Command::new(env!("CARGO_BIN_EXE_pcpu")).args(args))
}

/// Runs a command to its end.
fn finished(command: &mut Command) -> Run {
    let output = command.output().expect("the program starts");
    Run {
        code: output.status.code().expect("the program is not killed"),
        stdout: String::from_utf8(output.stdout).expect("it writes text"),
        stderr: String::from_utf8(output.stderr).expect("it writes text"),
    }
}

/// Runs the program with arguments that have no blanks in them.
fn run(args: &str) -> Run {
    pcpu(args.split_whitespace())
}

/// A file of this run of the tests. Names are told apart by the tests.
fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Writes a file and returns its path.
fn file(name: &str, bytes: impl AsRef<[u8]>) -> String {
    let path = path(name);
    fs::write(&path, bytes).expect("the test's folder can be written to");
    path.display().to_string()
}

#[test]
fn help_and_version_are_no_errors() {
    assert!(run("--version").ok().starts_with("pcpu "));
    let help = run("--help").ok();
    for command in ["demo", "layout", "replay", "map", "bench"] {
        assert!(help.contains(command), "{help}");
    }
}

#[test]
fn what_does_not_exist_is_named() {
    assert!(run("frobnicate").error(2).contains("frobnicate"));
    assert!(run("map --frob").error(2).contains("--frob"));
    assert!(run("replay").error(2).contains("FILE"));
}
