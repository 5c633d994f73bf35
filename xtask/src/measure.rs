//! `cargo xtask measure`: every figure of this machine, in one go, as the CSV files in `benches/results/`, and the plot of
//! them.
//!
//! Figures come from `pcpu bench`, whose cases run in turn, from `pcpu replay`, and from the benchmarks in `benches/`. All
//! of them run in rounds, one after the other and again (A B A B), and a figure is the median over the rounds. Instruction
//! counts come from callgrind, where valgrind is installed. Nothing in those files is written by hand but `yardsticks.csv`,
//! which was measured on another machine and is only read here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use serde::de::DeserializeOwned;

use crate::command::{Failure, Program, root};
use crate::plot;

mod benches;
mod figures;
mod instructions;
mod machine;
mod program;
mod yardsticks;

use benches::Benches;
pub use figures::Figure;
use figures::{Method, Samples};
pub use yardsticks::Yardstick;

/// Where the results are.
const FOLDER: &str = "benches/results";

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// Enough for figures to be told: within 12 minutes.
    Full,
    /// Enough to see that all of it works: within 3 minutes.
    Quick,
}

impl Effort {
    /// The effort that the arguments ask for.
    ///
    /// # Errors
    /// One line, if they ask for something else.
    pub fn parse(args: &[&str]) -> Result<Self, String> {
        match args {
            [] => Ok(Self::Full),
            ["--quick"] => Ok(Self::Quick),
            [.., other] => Err(format!("'{other}': cargo xtask measure takes --quick only")),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Quick => "quick",
        }
    }

    /// Odd, so that a median is a figure that was measured.
    fn rounds(self) -> usize {
        match self {
            Self::Full => 3,
            Self::Quick => 1,
        }
    }
}

/// A file of results.
pub fn results(name: &str) -> PathBuf {
    root().join(FOLDER).join(name)
}

/// The figures as committed.
pub fn read_figures() -> Result<Vec<Figure>, Failure> {
    read(&results("figures.csv"))
}

/// The figures of others, measured on another machine.
pub fn read_yardsticks() -> Result<Vec<Yardstick>, Failure> {
    read(&results("yardsticks.csv"))
}

/// What is known of the machine that the figures are of.
pub fn read_machine() -> Result<Vec<(String, String)>, Failure> {
    read(&results("machine.csv"))
}

/// The lines of a file.
fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, Failure> {
    let in_file = |error: csv::Error| format!("{}: {error}", path.display());
    let rows = csv::Reader::from_path(path).map_err(in_file)?;
    let rows: Result<_, _> = rows.into_deserialize().collect();
    Ok(rows.map_err(in_file)?)
}

/// Measures, writes the files, draws the plot.
pub fn run(effort: Effort) -> ExitCode {
    let start = Instant::now();
    match measure(effort) {
        Ok(()) => {
            println!("{:.0} s", start.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn measure(effort: Effort) -> Result<(), Failure> {
    let yardsticks = read_yardsticks()?;
    let program = Program::build()?;
    let benches = Benches::build()?;
    let mut samples = Samples::default();
    for round in 1..=effort.rounds() {
        for wish in [Method::Rseq, Method::Portable] {
            println!("==> round {round} of {}, {}", effort.rounds(), wish.name());
            // Where there are no restartable sequences at all, both rounds are of the other method.
            let method = program::method(&program, wish)?;
            program::run(&program, wish, method, effort, &mut samples)?;
            benches.run(wish, method, effort, &mut samples)?;
        }
    }
    let figures = figures::figures(&samples, &yardsticks);
    fs::create_dir_all(results(""))?;
    machine::write(&results("machine.csv"), effort)?;
    figures::write(&results("figures.csv"), &figures)?;
    println!("==> instructions");
    let counts = instructions::count(&program, effort, &yardsticks)?;
    instructions::write(&results("instructions.csv"), &counts)?;
    plot::draw()?;
    println!(
        "{} figures, {} instruction counts in {FOLDER}",
        figures.len(),
        counts.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_quick_is_an_option() {
        assert_eq!(Effort::parse(&[]), Ok(Effort::Full));
        assert_eq!(Effort::parse(&["--quick"]), Ok(Effort::Quick));
        for bad in [&["--fast"][..], &["--quick", "x"], &["x"]] {
            let line = Effort::parse(bad).unwrap_err();
            assert!(
                line.contains(bad[bad.len() - 1]) && !line.contains('\n'),
                "{line}"
            );
        }
    }
}
