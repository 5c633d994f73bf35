//! The figures of the benchmarks in `benches/`: their programs are run, and what criterion leaves in a folder is read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::Effort;
use super::figures::{Method, Samples, Subject};
use super::program::wishing;
use crate::command::{Failure, build, cargo, root};

/// The benchmarks, and whether the method makes a difference to them.
const NAMES: [(&str, Method); 7] = [
    ("alloc", Method::Rseq),
    ("free", Method::Portable),
    ("churn", Method::Rseq),
    ("threads", Method::Portable),
    ("ops", Method::Portable),
    ("layout", Method::Rseq),
    ("replay", Method::Rseq),
];

/// Those of which one iteration may take many milliseconds, or that two threads are at, who must have found their pace.
const LONG: [&str; 3] = ["churn", "replay", "threads"];

/// The benchmarks, built.
#[derive(Debug)]
pub struct Benches {
    programs: Vec<(PathBuf, Method)>,
    /// Where criterion leaves what it found.
    home: PathBuf,
}

impl Benches {
    /// Builds them.
    pub fn build() -> Result<Self, Failure> {
        let built = build(&mut cargo("bench --package pcpu --benches --no-run"))?;
        let mut programs = Vec::new();
        for (name, least) in NAMES {
            let path = built.iter().find_map(|built| built.program(name));
            let path = path.ok_or_else(|| format!("cargo names no benchmark `{name}`"))?;
            programs.push((path, least));
        }
        let home = programs[0].0.with_file_name("criterion-of-xtask-measure");
        Ok(Self { programs, home })
    }

    /// One round.
    pub fn run(
        &self,
        wish: Method,
        method: Method,
        effort: Effort,
        samples: &mut Samples,
    ) -> Result<(), Failure> {
        let seconds = match effort {
            Effort::Full => ["0.1", "0.4"],
            Effort::Quick => ["0.02", "0.05"],
        };
        if self.home.exists() {
            fs::remove_dir_all(&self.home)?;
        }
        for (program, least) in &self.programs {
            // Short samples are hardly ever interrupted. A replay or a fill is long in any case.
            let is_long = LONG.iter().any(|name| program_is(program, name));
            let samples = if is_long { "20" } else { "100" };
            if wish == Method::Portable && *least == Method::Rseq {
                continue;
            }
            let mut command = wishing(Command::new(program), wish);
            command
                .current_dir(root())
                .args(["--bench", "--noplot", "--nresamples=1000"])
                .args(["--sample-size", samples])
                .args([
                    "--warm-up-time",
                    seconds[0],
                    "--measurement-time",
                    seconds[1],
                ])
                .env("CRITERION_HOME", &self.home)
                .stdout(Stdio::null());
            let output = command.output()?;
            if !output.status.success() {
                let message = String::from_utf8_lossy(&output.stderr);
                return Err(format!("{command:?}: {}\n{message}", output.status).into());
            }
        }
        collect(&self.home, &mut |benchmark, estimates| {
            let (subject, case) = subject(benchmark)?;
            let ns = estimates["median"]["point_estimate"].as_f64();
            samples.add(
                subject,
                method,
                &case,
                ns.ok_or("a benchmark tells no time")?,
            );
            Ok(())
        })
    }
}

/// Whether a program is that of the benchmark of this name: cargo puts a hash behind it.
fn program_is(program: &Path, name: &str) -> bool {
    let file = program.file_name().unwrap_or_default().to_string_lossy();
    file.split('-').next() == Some(name)
}

/// Looks for what was found below a folder, in an order that is always the same.
fn collect(
    folder: &Path,
    visit: &mut impl FnMut(&Value, &Value) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let (benchmark, estimates) = (folder.join("benchmark.json"), folder.join("estimates.json"));
    if folder.ends_with("new") && benchmark.exists() {
        let read = |path: &Path| Ok::<_, Failure>(serde_json::from_slice(&fs::read(path)?)?);
        return visit(&read(&benchmark)?, &read(&estimates)?);
    }
    let mut below: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(folder)? {
        below.push(entry?.path());
    }
    below.sort();
    for folder in below.iter().filter(|path| path.is_dir()) {
        collect(folder, visit)?;
    }
    Ok(())
}

/// What a benchmark measured, and its case: the group is the row, the function the case, the words of the parameter are
/// columns.
fn subject(benchmark: &Value) -> Result<(Subject, String), Failure> {
    let text = |name: &str| {
        let text = benchmark[name].as_str();
        text.ok_or_else(|| format!("a benchmark without a {name}: {benchmark}"))
    };
    let mut subject = Subject::of(text("group_id")?);
    for word in text("value_str")?.split_whitespace() {
        match word.split_once('=') {
            Some(("cpus", number)) => subject.cpus = Some(number.parse()?),
            Some(("threads", number)) => subject.threads = number.parse()?,
            Some(("live", number)) => subject.live = Some(number.parse()?),
            Some(("size", number)) => subject.size = Some(number.parse()?),
            None if word == "zeroed" => subject.zeroed = true,
            _ => return Err(format!("'{word}' is no column: {benchmark}").into()),
        }
    }
    Ok((subject, text("function_id")?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn benchmark(value: &str) -> Value {
        serde_json::json!({"group_id": "pair", "function_id": "pcpu", "value_str": value})
    }

    /// What the benchmarks write into a parameter is a column: else all would be measured, and nothing written.
    #[test]
    fn the_benchmarks_name_columns_only() {
        let mut parameters = 0;
        for (name, _) in NAMES {
            let path = root().join(format!("benches/{name}.rs"));
            let source = fs::read_to_string(path).unwrap();
            // Strings that begin as all parameters do.
            for text in source.split("\"cpus=").skip(1) {
                let text = text.split('"').next().unwrap_or_default();
                for word in text.split_whitespace().skip(1) {
                    // The number is not there yet.
                    let word = match word.split_once('=') {
                        Some((column, _)) => format!("{column}=1"),
                        None => word.to_owned(),
                    };
                    assert!(subject(&benchmark(&word)).is_ok(), "{name}: {word}");
                }
                parameters += 1;
            }
        }
        assert!(parameters > NAMES.len(), "{parameters}");
    }

    /// The benchmarks are those that cargo knows.
    #[test]
    fn all_benchmarks_are_measured() {
        let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
        let benches = manifest.split("[[bench]]").skip(1);
        let names = benches.filter_map(|bench| bench.split('"').nth(1));
        let mut names: Vec<&str> = names.collect();
        let mut measured = NAMES.map(|(name, _)| name);
        names.sort_unstable();
        measured.sort_unstable();
        assert_eq!(names, measured);
    }

    #[test]
    fn a_parameter_names_columns() {
        let (found, case) =
            subject(&benchmark("cpus=16 threads=2 live=100 size=8 zeroed")).unwrap();
        let expected = Subject {
            row: "pair".to_owned(),
            cpus: Some(16),
            threads: 2,
            live: Some(100),
            size: Some(8),
            zeroed: true,
        };
        assert_eq!((found, case.as_str()), (expected, "pcpu"));
        for bad in ["nodes=2", "cpus=x", "dirty"] {
            assert!(subject(&benchmark(bad)).is_err(), "{bad}");
        }
        assert!(subject(&Value::Null).is_err());
    }
}
