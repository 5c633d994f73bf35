//! Figures of others that cannot be had in the same run: Linux's allocator, run in user space, and librseq's, on a virtual
//! machine with 2 CPUs of an Intel Xeon (Sapphire Rapids, about 3 GHz). Librseq's zeroed areas are hot ones.

use serde::Deserialize;

use super::figures::Subject;

/// A line of the file: whose figure, of what, in which unit.
#[derive(Debug, Clone, Deserialize)]
pub struct Yardstick {
    /// Whose it is.
    pub who: String,
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
    /// The figure; where several runs differed, the best of them.
    pub value: f64,
    /// The worst of them.
    pub worst: f64,
    /// As in `figures.csv`, or `instructions`.
    pub unit: String,
}

impl Yardstick {
    /// Its name beside figures of this machine. Instructions are the same on every machine.
    pub fn name(&self) -> String {
        match self.unit.as_str() {
            "instructions" => self.who.clone(),
            _ => format!("{} (another machine)", self.who),
        }
    }

    /// Whether it is about the same. What the yardstick leaves open may be anything.
    pub fn is_for(&self, subject: &Subject, unit: &str) -> bool {
        self.unit == unit
            && self.row == subject.row
            && self.threads == subject.threads
            && (self.cpus.is_none() || self.cpus == subject.cpus)
            && (self.live.is_none() || self.live == subject.live)
            && (self.size.is_none() || self.size == subject.size)
            && self.zeroed == subject.zeroed
    }
}
