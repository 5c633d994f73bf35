//! Areas that are written to, on all CPUs, while they live: what is handed out again has to be zeroed.

use std::time::Duration;

use pcpu::Domain;

use crate::WorkloadError;
use crate::areas::{PerCpuAreas, Source, Zeroing};
use crate::home::Home;
use crate::together::timed;

/// Areas that live at a time.
pub const AT_ONCE: usize = 32;

/// Pairs of areas of one size, [`AT_ONCE`] at a time, whose copies are all written to before they are freed.
#[derive(Debug)]
pub struct DirtyPairs<D: Domain> {
    home: Home<D>,
    source: PerCpuAreas<D>,
    bytes: usize,
    areas: Vec<usize>,
}

impl<D: Domain> DirtyPairs<D> {
    /// Of so many bytes.
    pub fn new(home: Home<D>, bytes: usize, zeroing: Zeroing) -> Self {
        Self {
            home,
            source: PerCpuAreas::new(zeroing),
            bytes,
            areas: Vec::with_capacity(AT_ONCE),
        }
    }

    /// Allocates and frees so many areas; how long that took, without writing to them.
    ///
    /// # Errors
    /// As the source; areas that are live then are lost.
    pub fn run(&mut self, iters: u64) -> Result<Duration, WorkloadError> {
        let (source, kind) = (self.source, self.source.kind(self.bytes));
        let (mut time, mut left) = (Duration::ZERO, iters);
        while left > 0 {
            let now = left.min(AT_ONCE as u64);
            time += timed(|| {
                for _ in 0..now {
                    self.areas.push(source.allocate(&kind)?);
                }
                Ok::<_, WorkloadError>(())
            })?;
            self.write_to_all()?;
            time += timed(|| {
                for area in self.areas.drain(..) {
                    // SAFETY: the area is live, and nobody uses it any more.
                    unsafe { source.free(area)? };
                }
                Ok::<_, WorkloadError>(())
            })?;
            left -= now;
        }
        Ok(time)
    }

    /// Writes to all bytes of all copies.
    fn write_to_all(&self) -> Result<(), WorkloadError> {
        for &area in &self.areas {
            for cpu in 0..self.home.cpus {
                let copy = self.home.copy(area, cpu).map_err(WorkloadError::Cpu)?;
                // SAFETY: the area is live, has so many bytes, and nobody else uses it.
                unsafe { copy.cast::<u8>().write_bytes(!0, self.bytes) };
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pcpu::global;
    use pcpu::unit::CpuId;

    use super::*;

    /// Copies are written to on every CPU of the home, and zero again where that was asked for.
    #[test]
    fn what_comes_again_has_been_written_to() {
        let home = Home::of_process().unwrap();
        for (zeroing, expected) in [(Zeroing::Off, !0), (Zeroing::On, 0)] {
            let mut pairs = DirtyPairs::new(home, 12, zeroing);
            pairs.run(2 * AT_ONCE as u64 + 3).unwrap();
            assert!(pairs.areas.is_empty());
            let area = pairs.source.allocate(&pairs.source.kind(12)).unwrap();
            for cpu in 0..home.cpus {
                let copy = global().per_cpu_address(area, CpuId::new(cpu)).unwrap();
                let copy: *const [u8; 12] = std::ptr::with_exposed_provenance(copy);
                // SAFETY: the area is live and has so many bytes on every CPU.
                let found = unsafe { copy.read() };
                assert_eq!(found, [expected; 12], "{zeroing:?} on CPU {cpu}");
            }
            // SAFETY: it is live, and nobody uses it.
            unsafe { pairs.source.free(area).unwrap() };
        }
    }
}
