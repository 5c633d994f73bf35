//! The lines of the boot log that tell of the first chunk: the kernel, which learns of its CPUs and nodes from ACPI, prints what
//! `pcpu layout` prints for the machine that QEMU was asked to be, and so what Linux would print.

use super::options::{Options, Units};
use super::qemu;
use crate::command::{Failure, Program};
use crate::tally::Tally;

/// What `kernel/src/percpu.rs` asks for, as Linux does on x86-64.
const RESERVED_BYTES: usize = 8 << 10;
const DYNAMIC_BYTES: usize = 28 << 10;

/// Compares the lines that a kernel printed.
pub fn check(options: &Options, lines: &[String]) -> Result<Tally, Failure> {
    let static_bytes = lines.iter().find_map(|line| static_bytes(line));
    let static_bytes = static_bytes.ok_or("the kernel did not tell of its first chunk")?;
    let output = Program::build()?
        .run(&arguments(options, static_bytes))
        .output()?;
    let expected = String::from_utf8(output.stdout)?;
    let expected: Vec<&str> = expected.lines().filter(|line| is_layout(line)).collect();
    let lines = lines.iter().map(String::as_str);
    let printed: Vec<&str> = lines.filter(|line| is_layout(line)).collect();
    let held = output.status.success() && printed == expected && printed.len() >= 3;
    if !held {
        println!("FAILED the boot log: expected {expected:#?}");
    }
    Ok(Tally::of(held))
}

fn is_layout(line: &str) -> bool {
    line.starts_with("percpu: ") || line.starts_with("pcpu-alloc: ")
}

/// The number behind the `s` of the first line: how large a template is, the linker knows.
fn static_bytes(line: &str) -> Option<usize> {
    let words = line.strip_prefix("percpu: ")?.split(' ');
    words
        .filter_map(|word| word.strip_prefix('s')?.parse().ok())
        .next()
}

fn arguments(options: &Options, static_bytes: usize) -> String {
    let builder = match options.units {
        Units::Embed => "embed",
        Units::Page => "page",
    };
    let mut args = format!(
        "layout --static {static_bytes} --reserved {RESERVED_BYTES} --dyn {DYNAMIC_BYTES} --atom 2M --first-chunk {builder}"
    );
    for node in 0..options.nodes {
        let cpus = qemu::cpus_of_node(options, node);
        args += &format!(" --node {}-{}", cpus.start, cpus.end - 1);
    }
    args
}

#[cfg(test)]
mod tests {
    use super::{Options, arguments, static_bytes};

    #[test]
    fn the_size_of_the_template_is_read() {
        let line = "percpu: Embedded 12 pages/cpu s8704 r8192 d32256 u524288";
        assert_eq!(static_bytes(line), Some(8704));
        assert_eq!(static_bytes("percpu: 8 4K pages/cpu s870 r0 d1"), Some(870));
        assert_eq!(static_bytes("pcpu-alloc: s8704 r8192"), None);
    }

    #[test]
    fn nodes_have_the_cpus_that_qemu_gives_them() {
        let options = Options::parse(&["--cpus", "2", "--possible", "7", "--nodes", "3"]).unwrap();
        assert_eq!(
            arguments(&options, 100),
            "layout --static 100 --reserved 8192 --dyn 28672 --atom 2M --first-chunk embed --node 0-1 --node 2-3 --node 4-6"
        );
    }
}
