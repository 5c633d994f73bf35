//! The results of a replay, as JSON and as a table.

use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use super::pass::Checked;
use super::player::{Findings, Mode, Setup, UpkeepPace, Zeroing};
use crate::error::CliError;
use crate::script::Script;

/// The results for one file. Names and order of the serialised fields are what other tools rely on.
#[derive(Debug, Serialize)]
pub struct Report {
    file: String,
    ops: u64,
    allocs: u64,
    frees: u64,
    skipped_frees: u64,
    /// Requests refused.
    pub failed: u64,
    failed_atomic: u64,
    linux_failed: u64,
    chunks_peak: u32,
    chunks_end: u32,
    chunks_created: u64,
    chunks_destroyed: u64,
    pages_peak: u64,
    pages_end: u64,
    live_peak_bytes: u64,
    util_populated_avg: f64,
    metadata_bytes: usize,
    cache_hit_rate: f64,
    fences: u64,
    ns_per_op: f64,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    hardened: Option<Hardened>,
    /// The first of these: file, line, and why.
    #[serde(skip)]
    pub first_failure: Option<String>,
    #[serde(skip)]
    remote_frees: u64,
    #[serde(skip)]
    other_lines: u64,
    #[serde(skip)]
    gaps: u64,
    #[serde(skip)]
    lost_events: u64,
}

/// What a report of hardened mode has besides: what was found, and the figures of a usual replay.
#[derive(Debug, Serialize)]
pub struct Hardened {
    findings: u64,
    usual_pages_peak: u64,
    usual_metadata_bytes: usize,
    usual_ns_per_op: f64,
    #[serde(skip)]
    first_finding: Option<String>,
}

impl Hardened {
    /// What was found, beside the report of a usual replay.
    pub fn new(findings: &Findings, usual: &Report) -> Self {
        Self {
            findings: findings.count(),
            usual_pages_peak: usual.pages_peak,
            usual_metadata_bytes: usual.metadata_bytes,
            usual_ns_per_op: usual.ns_per_op,
            first_finding: findings.first(),
        }
    }
}

impl Report {
    /// The report of a replay in hardened mode.
    pub fn in_hardened_mode(self, hardened: Hardened) -> Self {
        Self {
            hardened: Some(hardened),
            ..self
        }
    }

    /// What hardened mode has found, in a line.
    pub fn first_finding(&self) -> Option<String> {
        let hardened = self.hardened.as_ref()?;
        let first = hardened.first_finding.as_ref()?;
        Some(format!(
            "{}: {} findings, the first: {first}",
            self.file, hardened.findings
        ))
    }

    /// What hardened mode found and costs, in a line.
    fn cost(&self) -> Option<String> {
        let hardened = self.hardened.as_ref()?;
        Some(format!(
            "{}: hardened: {} findings; {} pages at the peak, {} without; {} bytes of metadata, {} without; {:.0} ns/op, {:.0} without",
            self.file,
            hardened.findings,
            self.pages_peak,
            hardened.usual_pages_peak,
            self.metadata_bytes,
            hardened.usual_metadata_bytes,
            self.ns_per_op,
            hardened.usual_ns_per_op,
        ))
    }

    /// Puts together what is known of a file; `time` is that of `repeat` runs.
    pub fn new(
        file: String,
        script: &Script,
        checked: Checked,
        time: Duration,
        repeat: u32,
    ) -> Self {
        let (ops, stats) = (checked.ops(), &checked.stats);
        Self {
            file,
            ops,
            allocs: checked.allocs,
            frees: checked.frees,
            skipped_frees: script.skipped_frees + checked.skipped_frees,
            failed: checked.failed,
            failed_atomic: checked.failed_atomic,
            linux_failed: script.linux_failed,
            chunks_peak: stats.chunks_peak,
            chunks_end: stats.chunks,
            chunks_created: stats.chunks_created,
            chunks_destroyed: stats.chunks_destroyed,
            pages_peak: stats.populated_peak_pages,
            pages_end: stats.populated_pages,
            live_peak_bytes: checked.live_peak_bytes,
            util_populated_avg: checked.util_populated_avg,
            metadata_bytes: stats.metadata_peak_bytes,
            cache_hit_rate: match stats.allocs {
                0 => 0.0,
                _ if !checked.has_caches => 0.0,
                allocs => 1.0 - stats.cache_misses as f64 / allocs as f64,
            },
            fences: stats.cache_drains,
            ns_per_op: match ops {
                0 => 0.0,
                _ => time.as_nanos() as f64 / (ops as f64 * f64::from(repeat)),
            },
            hardened: None,
            first_failure: checked.first_failure,
            remote_frees: checked.remote_frees,
            other_lines: script.other_lines,
            gaps: script.gaps,
            lost_events: script.lost_events,
        }
    }

    /// What is worth knowing besides the figures of the table.
    fn notes(&self) -> String {
        let mut notes = Vec::new();
        let mut note = |number: u64, what: &str| {
            if number > 0 {
                notes.push(format!("{number} {what}"));
            }
        };
        note(self.remote_frees, "frees from another CPU");
        note(self.skipped_frees, "frees skipped");
        note(self.linux_failed, "requests that Linux refused");
        note(self.failed, "requests failed");
        note(self.other_lines, "other lines skipped");
        note(self.gaps, "gaps");
        note(self.lost_events, "events lost there");
        format!("{}: {}", self.file, notes.join(", "))
    }
}

/// The reports as a JSON array.
///
/// # Errors
/// None that is known; the serialiser may have its own.
pub fn json(reports: &[Report]) -> Result<String, CliError> {
    serde_json::to_string_pretty(reports)
        .map(|text| text + "\n")
        .map_err(|error| CliError::Failed(format!("cannot make JSON: {error}")))
}

/// The reports as a table, with what it is about and with notes.
pub fn table(reports: &[Report], setup: &Setup) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "trace",
        "ops",
        "failed",
        "chunks\npeak/end",
        "pages\npeak/end",
        "live bytes\npeak",
        "used of\npopulated",
        "metadata\nbytes",
        "ns/op",
    ]);
    for report in reports {
        let row = [
            report.ops.to_string(),
            report.failed.to_string(),
            format!("{}/{}", report.chunks_peak, report.chunks_end),
            format!("{}/{}", report.pages_peak, report.pages_end),
            report.live_peak_bytes.to_string(),
            format!("{:.1} %", report.util_populated_avg * 100.0),
            report.metadata_bytes.to_string(),
            format!("{:.0}", report.ns_per_op),
        ];
        let name = report.file.chars().filter(|char| !char.is_control());
        let row = row
            .into_iter()
            .map(|text| Cell::new(text).set_alignment(CellAlignment::Right));
        table.add_row([Cell::new(name.collect::<String>())].into_iter().chain(row));
    }
    let zeroing = match setup.zeroing {
        Zeroing::On => "zeroed",
        Zeroing::Off => "not zeroed",
    };
    let upkeep = match setup.upkeep {
        UpkeepPace::WhenDue => "upkeep when due".to_owned(),
        UpkeepPace::Every(ops) => format!("upkeep at most every {ops} operations"),
    };
    let mode = match setup.mode {
        Mode::Usual => "",
        Mode::Hardened => ", hardened",
    };
    let mut text = format!(
        "{} CPUs on {} nodes, {zeroing}, {upkeep}{mode}\n{table}\n",
        setup.cpus, setup.nodes
    );
    for report in reports {
        text += &report.notes();
        text.push('\n');
        if let Some(cost) = report.cost() {
            text += &cost;
            text.push('\n');
        }
    }
    text
}
