//! The arguments of `cargo xtask kernel`.

use std::path::PathBuf;

/// How it is used.
const USAGE: &str = "usage: cargo xtask kernel [--cpus N] [--possible N] [--nodes N] \
                     [--page] [--no-cache] [--icount] [--bench] [--trace FILE]";

/// The local APIC's ids have 8 bits, and 255 means all CPUs.
const MAX_CPUS: u32 = 255;
/// What the kernel has room for.
const MAX_NODES: u32 = 8;

/// The machine, and what the kernel is to do on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// CPUs that are there.
    pub cpus: u32,
    /// CPUs that may ever come, dealt out to the nodes in equal blocks; at least those that are there.
    pub possible: u32,
    /// Nodes.
    pub nodes: u32,
    /// How the units are planned.
    pub units: Units,
    /// What is in front of the allocator.
    pub caches: Caches,
    /// How time goes by.
    pub clock: Clock,
    /// What is run.
    pub job: Job,
    /// A recorded trace to be replayed as well.
    pub trace: Option<PathBuf>,
}

/// How the units are planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Units {
    /// As many as there is room for in large pages.
    Embed,
    /// As large as the pages that the first chunk needs.
    Page,
}

/// What is in front of the allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caches {
    /// A cache for every CPU.
    PerCpu,
    /// Nothing: every request takes the lock.
    Off,
}

/// How time goes by in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// As outside; CPUs run side by side.
    Real,
    /// By an instruction a tick, one CPU after the other: every run is the same, and a timer can be set to interrupt at
    /// any one instruction.
    Instructions,
}

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// The tests.
    Test,
    /// The operations with their instructions counted.
    Bench,
}

impl Options {
    /// The options that the arguments ask for.
    ///
    /// # Errors
    /// One line that says what is wrong.
    pub fn parse(args: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            cpus: 4,
            possible: 0,
            nodes: 1,
            units: Units::Embed,
            caches: Caches::PerCpu,
            clock: Clock::Real,
            job: Job::Test,
            trace: None,
        };
        let mut args = args.iter();
        while let Some(&arg) = args.next() {
            match arg {
                "--cpus" => options.cpus = number(arg, args.next(), MAX_CPUS)?,
                "--possible" => options.possible = number(arg, args.next(), MAX_CPUS)?,
                "--nodes" => options.nodes = number(arg, args.next(), MAX_NODES)?,
                "--trace" => options.trace = Some(existing(arg, args.next())?),
                "--page" => options.units = Units::Page,
                "--no-cache" => options.caches = Caches::Off,
                "--icount" => options.clock = Clock::Instructions,
                "--bench" => (options.clock, options.job) = (Clock::Instructions, Job::Bench),
                _ => return Err(format!("'{arg}' is no option; {USAGE}")),
            }
        }
        if options.possible == 0 {
            options.possible = options.cpus;
        }
        let Self {
            cpus,
            possible,
            nodes,
            ..
        } = options;
        if possible < cpus {
            return Err(format!("--possible {possible}: fewer than the {cpus} CPUs"));
        }
        if nodes > possible {
            return Err(format!("--nodes {nodes}: more than the {possible} CPUs"));
        }
        Ok(options)
    }
}

fn existing(option: &str, value: Option<&&str>) -> Result<PathBuf, String> {
    let value = value.ok_or(format!("{option} wants a file; {USAGE}"))?;
    let path = PathBuf::from(value);
    match path.is_file() {
        true => Ok(path),
        false => Err(format!("{option} {value}: no such file")),
    }
}

fn number(option: &str, value: Option<&&str>, limit: u32) -> Result<u32, String> {
    let value = value.ok_or(format!("{option} wants a number; {USAGE}"))?;
    match value.parse() {
        Ok(number) if (1..=limit).contains(&number) => Ok(number),
        _ => Err(format!("{option} {value}: not a number from 1 to {limit}")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Caches, Clock, Job, Options, Units};

    #[test]
    fn options_are_read() {
        let options = Options::parse(&["--cpus", "64", "--nodes", "4", "--page"]);
        assert_eq!(
            options,
            Ok(Options {
                cpus: 64,
                possible: 64,
                nodes: 4,
                units: Units::Page,
                caches: Caches::PerCpu,
                clock: Clock::Real,
                job: Job::Test,
                trace: None,
            })
        );
        let plain = Options::parse(&["--no-cache"]).unwrap();
        assert_eq!(plain.caches, Caches::Off);
        let bench = Options::parse(&["--bench"]).unwrap();
        assert_eq!((bench.clock, bench.job), (Clock::Instructions, Job::Bench));
    }

    #[test]
    fn nonsense_is_told_with_its_value_and_the_limit() {
        let cases = [
            (&["--cpus", "0"][..], "--cpus 0: not a number from 1 to 255"),
            (&["--cpus", "256"], "--cpus 256: not a number from 1 to 255"),
            (&["--nodes", "x"], "--nodes x: not a number from 1 to 8"),
            (
                &["--cpus", "2", "--nodes", "3"],
                "--nodes 3: more than the 2 CPUs",
            ),
            (
                &["--cpus", "9", "--possible", "8"],
                "--possible 8: fewer than the 9 CPUs",
            ),
        ];
        for (args, line) in cases {
            assert_eq!(Options::parse(args), Err(line.to_owned()));
        }
        let missing = Options::parse(&["--trace", "/no/such/file"]).unwrap_err();
        assert_eq!(missing, "--trace /no/such/file: no such file");
        for args in [&["--cpus"][..], &["--fast"], &["7"], &["--trace"]] {
            let line = Options::parse(args).unwrap_err();
            assert!(line.contains("usage") && !line.contains('\n'), "{line}");
        }
    }
}
