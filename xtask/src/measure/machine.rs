//! What is known of the machine: a name and a value a line.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::Effort;
use crate::command::Failure;

/// Writes the file, of this machine.
pub fn write(path: &Path, effort: Effort) -> Result<(), Failure> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let rows = [
        ("cpu", model(&cpu)),
        ("cores", cores.to_string()),
        ("kernel", version(&kernel).to_owned()),
        ("glibc", first_line(&["getconf", "GNU_LIBC_VERSION"])),
        ("rustc", first_line(&["rustc", "--version"])),
        ("valgrind", first_line(&["valgrind", "--version"])),
        ("date", first_line(&["date", "-u", "+%Y-%m-%d"])),
        ("effort", effort.name().to_owned()),
        ("rounds", effort.rounds().to_string()),
    ];
    let mut out = csv::Writer::from_path(path)?;
    out.write_record(["what", "is"])?;
    for (what, is) in rows {
        out.write_record([what, &is])?;
    }
    Ok(out.flush()?)
}

/// The model that `/proc/cpuinfo` names first.
fn model(cpuinfo: &str) -> String {
    let lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    lines
        .filter(|(name, _)| name.trim() == "model name")
        .map(|(_, model)| model.trim().to_owned())
        .next()
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// The number of a kernel's release, without what its builder adds.
fn version(release: &str) -> &str {
    let end = release.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
    &release[..end.unwrap_or(release.len())]
}

/// What a command prints first; nothing if there is no such command.
fn first_line(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_that_of_the_first_cpu() {
        let cpuinfo =
            "processor\t: 0\nmodel\t\t: 17\nmodel name\t: A CPU: fast\n\nmodel name\t: B\n";
        assert_eq!(model(cpuinfo), "A CPU: fast");
        assert_eq!(model(""), std::env::consts::ARCH);
    }

    #[test]
    fn a_kernel_is_known_by_its_number() {
        assert_eq!(version("6.18.4-builder\n"), "6.18.4");
        assert_eq!(version("6.1"), "6.1");
    }

    #[test]
    fn a_command_that_is_not_there_says_nothing() {
        assert_eq!(first_line(&["pcpu-no-such-command"]), "");
        assert_eq!(first_line(&["printf", "a\nb\n"]), "a");
    }
}
