//! The machine that QEMU is to be, and QEMU itself.

use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::options::{Caches, Clock, Job, Options, Units};
use crate::command::{Failure, version_of};

const QEMU: &str = "qemu-system-x86_64";
const UPDATE: &str = "apt-get update";
const INSTALL: &str = "apt-get install --yes --no-install-recommends qemu-system-x86";

/// Less is the local distance.
const REMOTE_DISTANCE: u32 = 21;

/// Makes sure that there is a QEMU: installs it where that is possible without asking anybody.
pub fn ensure_installed() -> Result<(), Failure> {
    if is_installed() {
        return Ok(());
    }
    if !is_root() {
        return Err(format!("{QEMU} is missing; to install it: sudo {INSTALL}").into());
    }
    for command in [UPDATE, INSTALL] {
        println!("{QEMU} is missing: {command}");
        let mut words = command.split_whitespace();
        let status = Command::new(words.next().unwrap_or_default())
            .args(words)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .status()
            .map_err(|error| format!("{command}: {error}; install {QEMU} by other means"))?;
        // An update may fail for a source that is not needed.
        if !status.success() && command == INSTALL {
            return Err(format!("{command}: {status}").into());
        }
    }
    Ok(())
}

fn is_installed() -> bool {
    let version = Command::new(QEMU)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    version.is_ok_and(|status| status.success())
}

/// The first line that it says of its version.
pub fn version() -> Result<String, Failure> {
    ensure_installed()?;
    version_of(QEMU)
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// How long the kernel may take: many times what it does on an idle machine.
pub fn time_limit(options: &Options) -> Duration {
    Duration::from_secs(120 + 3 * u64::from(options.cpus))
}

/// The command that boots the kernel, with some more words on its command line.
pub fn command(options: &Options, kernel: &Path, words: &str) -> Command {
    let node_mib = node_mib(options);
    let mut command = Command::new(QEMU);
    command
        .args(["-machine", "q35", "-cpu", "max"])
        .args(["-accel", accelerator(options.clock)])
        .args([
            "-smp",
            &format!("{},maxcpus={}", options.cpus, options.possible),
        ])
        .args(["-m", &format!("{}M", node_mib * options.nodes)])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]);
    if options.clock == Clock::Instructions {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    if options.nodes > 1 {
        add_nodes(&mut command, options, node_mib);
    }
    command
        .arg("-kernel")
        .arg(kernel)
        .args(["-append", &kernel_options(options, words)]);
    command
}

fn accelerator(clock: Clock) -> &'static str {
    match clock {
        Clock::Real => "tcg,thread=multi",
        Clock::Instructions => "tcg,thread=single",
    }
}

/// The memory of a node: units, stacks and page tables take less than 2 MiB a CPU.
fn node_mib(options: &Options) -> u32 {
    let cpus_per_node = options.possible.div_ceil(options.nodes);
    (64 + 2 * cpus_per_node)
        .max(256 / options.nodes)
        .next_multiple_of(2)
}

/// The possible CPUs of a node.
pub fn cpus_of_node(options: &Options, node: u32) -> Range<u32> {
    let first_of = |node: u32| node * options.possible / options.nodes;
    first_of(node)..first_of(node + 1)
}

/// Memory, CPUs and distances of each node.
fn add_nodes(command: &mut Command, options: &Options, node_mib: u32) {
    for node in 0..options.nodes {
        let cpus = cpus_of_node(options, node);
        let (first, last) = (cpus.start, cpus.end - 1);
        command
            .arg("-object")
            .arg(format!("memory-backend-ram,id=m{node},size={node_mib}M"))
            .arg("-numa")
            .arg(format!(
                "node,nodeid={node},cpus={first}-{last},memdev=m{node}"
            ));
    }
    for node in 0..options.nodes {
        for other in node + 1..options.nodes {
            command
                .arg("-numa")
                .arg(format!("dist,src={node},dst={other},val={REMOTE_DISTANCE}"));
        }
    }
}

/// The kernel's command line.
fn kernel_options(options: &Options, words: &str) -> String {
    let mut words: Vec<&str> = words.split_whitespace().collect();
    if options.units == Units::Page {
        words.push("percpu_alloc=page");
    }
    if options.caches == Caches::Off {
        words.push("percpu_cache=off");
    }
    if options.clock == Clock::Instructions {
        words.push("icount");
    }
    if options.job == Job::Bench {
        words.push("bench");
    }
    words.join(" ")
}
