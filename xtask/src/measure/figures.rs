//! Samples, the figures that are made of them, and the file that these are kept in.
//!
//! A figure is ours beside one that it is compared with, of the same run or a yardstick. Without anything to be compared
//! with it stands alone.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::yardsticks::Yardstick;
use crate::command::Failure;

/// The name of our case.
pub const PCPU: &str = "pcpu";

/// How the process works on the current CPU's copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// By restartable sequences.
    Rseq,
    /// By LOCKed steps.
    Portable,
}

impl Method {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rseq => "rseq",
            Self::Portable => "portable",
        }
    }
}

/// What was measured. A number that a row has nothing to do with is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The workload.
    pub row: String,
    /// CPUs that areas have copies on.
    pub cpus: Option<u32>,
    /// Threads at once.
    pub threads: u32,
    /// Live areas beside the one that comes and goes.
    pub live: Option<u64>,
    /// Bytes of an area; none if sizes are mixed.
    pub size: Option<u32>,
    /// Whether areas are asked for zeroed.
    pub zeroed: bool,
}

impl Subject {
    /// A workload on one thread, of which nothing else is known.
    pub fn of(row: &str) -> Self {
        Self {
            row: row.to_owned(),
            cpus: None,
            threads: 1,
            live: None,
            size: None,
            zeroed: false,
        }
    }
}

/// The times of one case, in ns: one a round.
#[derive(Debug)]
struct Case {
    name: String,
    ns: Vec<f64>,
}

/// All that was measured, in the order of the first round.
#[derive(Debug, Default)]
pub struct Samples(Vec<((Subject, Method), Vec<Case>)>);

impl Samples {
    /// Takes a sample.
    pub fn add(&mut self, subject: Subject, method: Method, case: &str, ns: f64) {
        let key = (subject, method);
        let found = self.0.iter().position(|(other, _)| *other == key);
        let at = found.unwrap_or_else(|| {
            self.0.push((key, Vec::new()));
            self.0.len() - 1
        });
        let cases = &mut self.0[at].1;
        match cases.iter_mut().find(|other| other.name == case) {
            Some(case) => case.ns.push(ns),
            None => cases.push(Case {
                name: case.to_owned(),
                ns: vec![ns],
            }),
        }
    }
}

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// As in [`Subject`].
    pub row: String,
    /// As there.
    pub cpus: Option<u32>,
    /// As there.
    pub threads: u32,
    /// As there.
    pub live: Option<u64>,
    /// As there.
    pub size: Option<u32>,
    /// As there.
    pub zeroed: bool,
    /// How the process works on copies.
    pub method: Method,
    /// Our figure.
    pub pcpu: f64,
    /// What it is compared with.
    pub compared_with: Option<String>,
    /// The figure of that.
    pub value: Option<f64>,
    /// Ours by that one.
    pub ratio: Option<f64>,
    /// `ns`, of one thread for an operation, or `x`, the operations of all threads by those of one alone.
    pub unit: String,
}

/// The figures of the samples, in an order that does not hang on what was measured first. Cases without one of ours are left
/// out: there is nothing to say about them.
pub fn figures(samples: &Samples, yardsticks: &[Yardstick]) -> Vec<Figure> {
    let mut figures = Vec::new();
    let mut add = |subject: &Subject, method, cases: &[(String, f64)], unit: &str| {
        figures.extend(compare(subject, method, cases, unit, yardsticks));
    };
    for ((subject, method), cases) in &samples.0 {
        let medians = medians(cases);
        add(subject, *method, &medians, "ns");
        if subject.threads == 2 && subject.row == "threads" {
            let alone = Subject {
                threads: 1,
                ..subject.clone()
            };
            let alone = samples
                .0
                .iter()
                .find(|(key, _)| *key == (alone.clone(), *method));
            if let Some((_, alone)) = alone {
                let scaling = Subject {
                    row: "two-threads-by-one".to_owned(),
                    ..subject.clone()
                };
                add(
                    &scaling,
                    *method,
                    &totals_by(&self::medians(alone), &medians),
                    "x",
                );
            }
        }
    }
    let place = |figure: &Figure| {
        let Figure {
            method,
            row,
            zeroed,
            size,
            threads,
            cpus,
            live,
            ..
        } = figure;
        (*method, row.clone(), *zeroed, *size, *threads, *cpus, *live)
    };
    figures.sort_by_key(place);
    figures
}

/// What two threads do together by what one does alone: each of `two` took its time while the other worked as well.
fn totals_by(one: &[(String, f64)], two: &[(String, f64)]) -> Vec<(String, f64)> {
    let total = |(name, ns): &(String, f64)| {
        let alone = one.iter().find(|(other, _)| other == name)?;
        Some((name.clone(), 2.0 * alone.1 / ns))
    };
    two.iter().filter_map(total).collect()
}

fn compare(
    subject: &Subject,
    method: Method,
    cases: &[(String, f64)],
    unit: &str,
    yardsticks: &[Yardstick],
) -> Vec<Figure> {
    let Some((_, pcpu)) = cases.iter().find(|(name, _)| name == PCPU) else {
        return Vec::new();
    };
    let alone = Figure {
        row: subject.row.clone(),
        cpus: subject.cpus,
        threads: subject.threads,
        live: subject.live,
        size: subject.size,
        zeroed: subject.zeroed,
        method,
        pcpu: rounded(*pcpu),
        compared_with: None,
        value: None,
        ratio: None,
        unit: unit.to_owned(),
    };
    let of_run = cases.iter().filter(|(name, _)| name != PCPU).cloned();
    let of_others = yardsticks
        .iter()
        .filter(|yardstick| yardstick.is_for(subject, unit))
        .map(|yardstick| (yardstick.name(), yardstick.value));
    let compared: Vec<Figure> = of_run
        .chain(of_others)
        .map(|(name, value)| Figure {
            compared_with: Some(name),
            value: Some(rounded(value)),
            ratio: Some(rounded(pcpu / value)),
            ..alone.clone()
        })
        .collect();
    match compared.is_empty() {
        true => vec![alone],
        false => compared,
    }
}

fn medians(cases: &[Case]) -> Vec<(String, f64)> {
    let median = |case: &Case| (case.name.clone(), median(&case.ns));
    cases.iter().map(median).collect()
}

/// The one in the middle; of an even number, the lower one.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) / 2]
}

/// Four digits: no figure is better than that.
pub fn rounded(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

/// Writes the file.
pub fn write(path: &Path, figures: &[Figure]) -> Result<(), Failure> {
    let mut out = csv::Writer::from_path(path)?;
    for figure in figures {
        out.serialize(figure)?;
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threads(threads: u32) -> Subject {
        Subject {
            threads,
            size: Some(8),
            ..Subject::of("threads")
        }
    }

    #[test]
    fn a_figure_is_the_median_of_its_rounds() {
        let mut samples = Samples::default();
        for ns in [30.0, 10.0, 20.0] {
            samples.add(Subject::of("pair"), Method::Rseq, PCPU, ns);
            samples.add(Subject::of("pair"), Method::Rseq, "malloc", ns / 4.0);
        }
        samples.add(Subject::of("pair"), Method::Portable, PCPU, 7.0);
        let figures = figures(&samples, &[]);
        let found: Vec<_> = figures
            .iter()
            .map(|figure| (figure.method, figure.pcpu, figure.value, figure.ratio))
            .collect();
        assert_eq!(
            found,
            [
                (Method::Rseq, 20.0, Some(5.0), Some(4.0)),
                (Method::Portable, 7.0, None, None)
            ]
        );
    }

    #[test]
    fn two_threads_are_told_by_one() {
        let mut samples = Samples::default();
        for (number, ours, malloc) in [(1, 10.0, 5.0), (2, 40.0, 5.0)] {
            samples.add(threads(number), Method::Rseq, PCPU, ours);
            samples.add(threads(number), Method::Rseq, "malloc", malloc);
        }
        let figures = figures(&samples, &[]);
        let scaling = figures.iter().find(|figure| figure.unit == "x").unwrap();
        assert_eq!((scaling.pcpu, scaling.value), (0.5, Some(2.0)));
        assert_eq!(scaling.ratio, Some(0.25));
    }

    #[test]
    fn yardsticks_are_for_their_subject_only() {
        let yardstick = |who: &str, threads, unit: &str| Yardstick {
            who: who.to_owned(),
            row: "threads".to_owned(),
            cpus: None,
            threads,
            live: None,
            size: Some(8),
            zeroed: false,
            value: 50.0,
            worst: 60.0,
            unit: unit.to_owned(),
        };
        let yardsticks = [
            yardstick("Linux", 1, "ns"),
            yardstick("Linux", 2, "ns"),
            yardstick("Linux", 1, "instructions"),
        ];
        let mut samples = Samples::default();
        samples.add(threads(1), Method::Rseq, PCPU, 10.0);
        let figures = figures(&samples, &yardsticks);
        assert_eq!(figures.len(), 1);
        assert_eq!(
            figures[0].compared_with.as_deref(),
            Some("Linux (another machine)")
        );
        assert_eq!(figures[0].ratio, Some(0.2));
    }

    #[test]
    fn the_file_gives_what_was_written() {
        let mut samples = Samples::default();
        let subject = Subject {
            cpus: Some(2),
            live: Some(1_000_000),
            ..Subject::of("churn, mixed")
        };
        samples.add(subject, Method::Portable, PCPU, 1234.567);
        samples.add(Subject::of("x"), Method::Rseq, PCPU, 0.123_456);
        let figures = figures(&samples, &[]);
        assert_eq!((figures[0].pcpu, figures[1].pcpu), (0.1235, 1235.0));
        let path = std::env::temp_dir().join(format!("pcpu-figures-{}.csv", std::process::id()));
        write(&path, &figures).unwrap();
        let again: Vec<Figure> = super::super::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(again, figures);
    }
}
