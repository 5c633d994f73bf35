//! Tests that need a process of their own.

use std::process::Command;

/// Is set in the environment of such a process.
pub const IS_CHILD: &str = "PCPU_TEST_CHILD";

/// Runs the test of this name in a process of its own, as `prepare` wants it. False if this is that process: then
/// the test itself is to be run.
pub fn run_in_child(test: &str, prepare: impl FnOnce(&mut Command)) -> bool {
    if std::env::var_os(IS_CHILD).is_some() {
        return false;
    }
    let program = std::env::current_exe().expect("a test has a file");
    let mut command = Command::new(program);
    prepare(&mut command);
    command
        .args([test, "--exact", "--nocapture"])
        .env(IS_CHILD, "1");
    let output = command.output().expect("a test can be run");
    let printed = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    print!("{printed}{complained}");
    assert!(output.status.success(), "{}", output.status);
    assert!(printed.contains("1 passed"), "there is no test {test}");
    true
}
