//! The rows of a result, as JSON and as a table.

use comfy_table::{Cell, CellAlignment, Table, presets};
use pcpu::Global;
use pcpu_workloads::areas::{PerCpuAreas, Source, Zeroing};
use serde::{Serialize, Serializer};

use super::rounds::{CaseResult, ROUNDS};
use crate::error::CliError;

/// The name of the case that all others are compared with.
pub const PCPU: &str = PerCpuAreas::<Global>::NAME;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bench {
    /// An area allocated and freed.
    Pair,
    /// Areas that all CPUs' copies of are written to.
    PairDirty,
    /// A random live area replaced.
    Churn,
    /// Pairs on several threads.
    Threads,
    /// Adding to one counter.
    AddHot,
    /// Adding to eight counters in turn.
    Add8,
}

impl Bench {
    /// All of them, in the order of the rows.
    pub const ALL: [Self; 6] = [
        Self::Pair,
        Self::PairDirty,
        Self::Churn,
        Self::Threads,
        Self::AddHot,
        Self::Add8,
    ];

    /// The name that other tools know.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::PairDirty => "pair-dirty",
            Self::Churn => "churn",
            Self::Threads => "threads",
            Self::AddHot => "add-hot",
            Self::Add8 => "add-8",
        }
    }
}

impl Serialize for Bench {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// One case's result. Names and order of the fields are what other tools rely on.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    bench: Bench,
    case: &'static str,
    cpus: u32,
    threads: u32,
    /// Bytes of an area; none if sizes are mixed.
    pub size: Option<u32>,
    /// Live areas besides the one that comes and goes; counters.
    pub live: u32,
    zeroed: bool,
    ns: f64,
    ratio: f64,
}

impl Row {
    /// A row that lacks its result.
    pub fn of(bench: Bench, cpus: u32, zeroing: Zeroing) -> Self {
        Self {
            bench,
            case: PCPU,
            cpus,
            threads: 1,
            size: None,
            live: 0,
            zeroed: zeroing == Zeroing::On,
            ns: 0.0,
            ratio: 1.0,
        }
    }
}

/// The rows for a benchmark's results: `row`, with each case's time and its ratio to ours. Ours is the one on as many
/// threads where there are several.
pub fn rows(row: &Row, results: &[CaseResult]) -> Vec<Row> {
    let ours = |threads| {
        let all = || results.iter().filter(|result| result.name == PCPU);
        all()
            .find(|result| result.threads == threads)
            .or_else(|| all().next())
    };
    let to_row = |result: &CaseResult| Row {
        case: result.name,
        threads: result.threads,
        ns: result.ns,
        ratio: result.ns / ours(result.threads).map_or(f64::NAN, |ours| ours.ns),
        ..row.clone()
    };
    results.iter().map(to_row).collect()
}

/// The rows as a JSON array.
///
/// # Errors
/// None that is known; the serialiser may have its own.
pub fn json(rows: &[Row]) -> Result<String, CliError> {
    serde_json::to_string_pretty(rows)
        .map(|text| text + "\n")
        .map_err(|error| CliError::Failed(format!("cannot make JSON: {error}")))
}

/// The rows as a table, with how they came about.
pub fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "bench", "case", "CPUs", "threads", "bytes", "live", "zeroed", "ns", "ratio",
    ]);
    for row in rows {
        let figures = [
            row.cpus.to_string(),
            row.threads.to_string(),
            row.size.map_or("mixed".to_owned(), |size| size.to_string()),
            row.live.to_string(),
            if row.zeroed { "yes" } else { "no" }.to_owned(),
            format!("{:.2}", row.ns),
            format!("{:.3}", row.ratio),
        ];
        let figures = figures
            .into_iter()
            .map(|text| Cell::new(text).set_alignment(CellAlignment::Right));
        table.add_row(
            [Cell::new(row.bench.name()), Cell::new(row.case)]
                .into_iter()
                .chain(figures),
        );
    }
    format!(
        "{table}\nns: of one thread per operation, the median of {ROUNDS} rounds; ratio: to the row `{PCPU}`\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(name: &'static str, threads: u32, ns: f64) -> CaseResult {
        CaseResult { name, threads, ns }
    }

    #[test]
    fn a_ratio_is_to_ours_on_as_many_threads() {
        let results = [
            result(PCPU, 1, 2.0),
            result("x", 1, 3.0),
            result(PCPU, 2, 4.0),
            result("x", 2, 5.0),
            result("y", 7, 9.0),
        ];
        let rows = rows(&Row::of(Bench::Threads, 2, Zeroing::Off), &results);
        let ratios: Vec<_> = rows.iter().map(|row| row.ratio).collect();
        assert_eq!(ratios, [1.0, 1.5, 1.0, 1.25, 4.5]);
        assert!(rows.iter().all(|row| !row.zeroed && row.cpus == 2));
    }
}
