//! What a demonstration checks: a line for each check, and how many failed.

use std::fmt::{Debug, Display};

use crate::error::CliError;
use crate::print;

/// The checks so far. Each prints its line at once.
#[derive(Debug, Default)]
pub struct Checks {
    all: u32,
    failed: u32,
}

impl Checks {
    /// Takes note of a check that came to `outcome`: `Err` says why it failed.
    ///
    /// # Errors
    /// If the line cannot be printed.
    pub fn check(
        &mut self,
        what: impl Display,
        outcome: Result<(), impl Display>,
    ) -> Result<(), CliError> {
        self.all += 1;
        match outcome {
            Ok(()) => print(&format!("ok   {what}\n")),
            Err(why) => {
                self.failed += 1;
                print(&format!("FAILED {what}: {why}\n"))
            }
        }
    }

    /// Checks that two values are equal.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn equal<T: PartialEq + Debug>(
        &mut self,
        what: impl Display,
        got: T,
        want: T,
    ) -> Result<(), CliError> {
        let outcome = match got == want {
            true => Ok(()),
            false => Err(format!("{got:?}, expected {want:?}")),
        };
        self.check(what, outcome)
    }

    /// The end: says that every check held.
    ///
    /// # Errors
    /// One line, if some check failed.
    pub fn finish(self) -> Result<(), CliError> {
        match self.failed {
            0 => print(&format!("All {} checks held.\n", self.all)),
            failed => Err(CliError::Failed(format!(
                "{failed} of {} checks failed",
                self.all
            ))),
        }
    }
}
