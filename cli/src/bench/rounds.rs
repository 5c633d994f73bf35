//! Rounds: all cases of a benchmark in turn, again and again, so that what disturbs the machine for a while disturbs all
//! of them alike. A case's result is the median of its rounds.

use std::time::Duration;

use crate::error::CliError;

/// Rounds that count. Before them comes one that does not: it warms caches and memory up.
pub const ROUNDS: usize = 201;

/// One thing that is measured.
pub trait Case {
    /// The name that other tools know.
    fn name(&self) -> &'static str;

    /// On how many threads it runs.
    fn threads(&self) -> u32 {
        1
    }

    /// Does `iters` operations on every thread; how long that took a thread, on average.
    ///
    /// # Errors
    /// One line, if an operation failed.
    fn run(&mut self, iters: u64) -> Result<Duration, CliError>;

    /// After the last round: whether all `iters` operations of each thread were done.
    ///
    /// # Errors
    /// One line, if not.
    fn check(&mut self, _iters: u64) -> Result<(), CliError> {
        Ok(())
    }
}

/// What a case came to.
#[derive(Debug, Clone)]
pub struct CaseResult {
    /// The case's name.
    pub name: &'static str,
    /// On how many threads it ran.
    pub threads: u32,
    /// Wall time per operation of one thread.
    pub ns: f64,
}

/// Runs all rounds, with `iters` operations of each case in each; `done` is called after each case of a round.
///
/// # Errors
/// Those of the cases.
pub fn run(
    mut cases: Vec<Box<dyn Case + '_>>,
    iters: u64,
    done: impl Fn(),
) -> Result<Vec<CaseResult>, CliError> {
    let mut times = vec![Vec::with_capacity(ROUNDS); cases.len()];
    for round in 0..=ROUNDS {
        for (case, times) in cases.iter_mut().zip(&mut times) {
            let time = case.run(iters)?;
            if round > 0 {
                times.push(time);
            }
            done();
        }
    }
    let mut results = Vec::with_capacity(cases.len());
    for (mut case, mut times) in cases.into_iter().zip(times) {
        case.check(iters * (1 + ROUNDS as u64))?;
        results.push(CaseResult {
            name: case.name(),
            threads: case.threads(),
            ns: median(&mut times).as_nanos() as f64 / iters as f64,
        });
    }
    Ok(results)
}

/// The one in the middle.
fn median(times: &mut [Duration]) -> Duration {
    let middle = times.len() / 2;
    *times.select_nth_unstable(middle).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    /// Each run takes so many ns longer than the one before.
    struct Slower {
        runs: u64,
        checked: Rc<Cell<u64>>,
    }

    impl Case for Slower {
        fn name(&self) -> &'static str {
            "slower"
        }

        fn run(&mut self, iters: u64) -> Result<Duration, CliError> {
            // The first run, which warms up, is the slowest by far.
            let ns = if self.runs == 0 { 1_000_000 } else { self.runs };
            self.runs += 1;
            Ok(Duration::from_nanos(ns * iters))
        }

        fn check(&mut self, iters: u64) -> Result<(), CliError> {
            self.checked.set(iters);
            Ok(())
        }
    }

    #[test]
    fn the_median_of_the_rounds_that_count() {
        let checked = Rc::new(Cell::new(0));
        let case = Slower {
            runs: 0,
            checked: Rc::clone(&checked),
        };
        let calls = Cell::new(0);
        let results = run(vec![Box::new(case)], 4, || calls.set(calls.get() + 1)).unwrap();
        assert_eq!(results[0].ns, ROUNDS.div_ceil(2) as f64);
        assert_eq!(calls.get(), ROUNDS + 1);
        assert_eq!(checked.get(), 4 * (ROUNDS as u64 + 1));
    }
}
