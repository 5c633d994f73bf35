//! Churn: many live areas of mixed sizes, of which a random one is freed and a new one allocated.

use std::time::Duration;

use pcpu::Domain;
use pcpu_workloads::areas::{Heap, PerCpuAreas, Source, Zeroing};
use pcpu_workloads::churn::Churn;
use pcpu_workloads::together;

use super::rounds::Case;
use crate::error::CliError;

/// The cases.
///
/// # Errors
/// One line, if there is no memory.
pub fn cases<D: Domain>(live: u32, zeroing: Zeroing) -> Result<Vec<Box<dyn Case>>, CliError> {
    let ours = PerCpuAreas::<D>::new(zeroing);
    Ok(vec![
        Box::new(Replacing(Churn::new(ours, live)?)),
        Box::new(Replacing(Churn::new(Heap, live)?)),
    ])
}

struct Replacing<S: Source>(Churn<S>);

impl<S: Source> Case for Replacing<S> {
    fn name(&self) -> &'static str {
        S::NAME
    }

    fn run(&mut self, iters: u64) -> Result<Duration, CliError> {
        Ok(together::timed(|| self.0.replace(iters))?)
    }
}
