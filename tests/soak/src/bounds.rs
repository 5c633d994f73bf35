//! What a run may take: time, and memory of the process.

use std::fs;
use std::time::{Duration, Instant};

/// The most that a run may take.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub time: Duration,
    /// Resident, at any time.
    pub memory_kib: u64,
}

impl Bounds {
    /// Whether a run that began at `start` is within them; if not, a line that says so.
    pub fn check(&self, start: Instant) -> Result<(), String> {
        let (took, most) = (start.elapsed(), self.time);
        if took > most {
            return Err(format!("not done after {took:.1?}, it may take {most:.0?}"));
        }
        let (peak, most) = (peak_kib()?, self.memory_kib);
        if peak > most {
            return Err(format!("took {peak} KiB of memory, and may take {most}"));
        }
        Ok(())
    }
}

/// The most memory that the process ever had resident.
pub fn peak_kib() -> Result<u64, String> {
    let path = "/proc/self/status";
    let status = fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let peak = status.lines().find_map(|line| {
        let value = line.strip_prefix("VmHWM:")?.strip_suffix("kB")?;
        value.trim().parse().ok()
    });
    peak.ok_or_else(|| format!("{path} tells no VmHWM"))
}
