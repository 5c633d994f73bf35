//! What no zeroing can do without: a store to every line of every CPU's copy of an area.

use pcpu::Domain;

use crate::WorkloadError;
use crate::areas::{Live, PerCpuAreas, Zeroing};
use crate::home::Home;

/// What a store touches.
pub const LINE_BYTES: usize = 64;

/// Areas that are stored to in turn, a line or more each.
#[derive(Debug)]
pub struct Stores<D: Domain> {
    /// CPU 0's copies.
    first: Vec<*mut u64>,
    stride_bytes: usize,
    cpus: usize,
    lines: usize,
    _areas: Live<PerCpuAreas<D>>,
}

impl<D: Domain> Stores<D> {
    /// So many areas of at least so many bytes.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn new(home: &Home<D>, areas: usize, bytes: usize) -> Result<Self, WorkloadError> {
        let lines = bytes.div_ceil(LINE_BYTES);
        let source = PerCpuAreas::new(Zeroing::On);
        let areas = Live::new(source, (0..areas).map(|_| lines * LINE_BYTES))?;
        let first = areas.areas().iter().map(|&area| home.copy(area, 0));
        Ok(Self {
            first: first.collect::<Result<_, _>>()?,
            stride_bytes: home.stride_bytes(),
            cpus: home.cpus as usize,
            lines,
            _areas: areas,
        })
    }

    /// Stores to every line of one area after the other, `iters` areas in all.
    #[inline(never)]
    pub fn store(&mut self, iters: u64) {
        for first in self.first.iter().cycle().take(iters as usize) {
            for cpu in 0..self.cpus {
                for line in 0..self.lines {
                    let offset_bytes = cpu * self.stride_bytes + line * LINE_BYTES;
                    // SAFETY: the area is live and has so many lines on each of the CPUs, a stride apart, all brought up;
                    // nobody else uses it.
                    unsafe { first.byte_add(offset_bytes).write_volatile(0) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::Machine;

    #[test]
    fn every_line_of_every_copy_is_stored_to() {
        let home = Home::<Machine<4>>::with_cpus(2).unwrap();
        let mut stores = Stores::new(&home, 3, 2 * LINE_BYTES).unwrap();
        let copies = |stores: &Stores<_>| {
            let areas = stores._areas.areas().to_vec();
            areas
                .into_iter()
                .flat_map(move |area| [0, 1].map(|cpu| home.copy(area, cpu).unwrap()))
        };
        for copy in copies(&stores) {
            // SAFETY: the copy is live, and nobody else uses it.
            unsafe { (copy.write(1), copy.byte_add(LINE_BYTES).write(1)) };
        }
        stores.store(3);
        for copy in copies(&stores) {
            // SAFETY: as above.
            let lines = unsafe { (copy.read(), copy.byte_add(LINE_BYTES).read()) };
            assert_eq!(lines, (0, 0));
        }
    }
}
