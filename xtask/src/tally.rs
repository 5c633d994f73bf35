//! How many checks passed and how many failed.

use std::fmt;
use std::ops::AddAssign;

/// What a step found out. It prints itself as the closing line of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: usize,
    pub failed: usize,
}

impl Tally {
    /// One check that passed.
    pub const PASS: Self = Self {
        passed: 1,
        failed: 0,
    };

    /// One check that failed.
    pub const FAIL: Self = Self {
        passed: 0,
        failed: 1,
    };

    /// One check.
    pub const fn of(held: bool) -> Self {
        if held { Self::PASS } else { Self::FAIL }
    }

    /// The tests that one line of `cargo test` tells of, which is none for most lines. A summary reads
    /// `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
    pub fn of_test_line(line: &str) -> Self {
        let Some((_, counts)) = line
            .strip_prefix("test result: ")
            .and_then(|result| result.split_once(". "))
        else {
            return Self::default();
        };
        let count = |what: &str| {
            counts
                .split("; ")
                .find_map(|part| part.strip_suffix(what)?.trim_end().parse().ok())
                .unwrap_or(0)
        };
        Self {
            passed: count("passed"),
            failed: count("failed"),
        }
    }

    /// The tally that a closing line `N passed, N failed` tells of.
    pub fn of_closing_line(line: &str) -> Option<Self> {
        let (passed, failed) = line.split_once(" passed, ")?;
        Some(Self {
            passed: passed.parse().ok()?,
            failed: failed.strip_suffix(" failed")?.parse().ok()?,
        })
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn test_lines_are_counted() {
        let cases = [
            (
                "test result: ok. 31 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 1s",
                (31, 0),
            ),
            (
                "test result: FAILED. 3 passed; 14 failed; 0 ignored; 0 measured; 0 filtered out",
                (3, 14),
            ),
            ("test a_test ... ok", (0, 0)),
            ("test result: ", (0, 0)),
            ("running 3 tests", (0, 0)),
        ];
        for (line, (passed, failed)) in cases {
            assert_eq!(
                Tally::of_test_line(line),
                Tally { passed, failed },
                "{line}"
            );
        }
    }

    #[test]
    fn the_closing_line_is_plain() {
        let mut tally = Tally::PASS;
        tally += Tally::of(false);
        tally += Tally::of(true);
        assert_eq!(tally.to_string(), "2 passed, 1 failed");
        assert_eq!(Tally::of_closing_line(&tally.to_string()), Some(tally));
        for line in ["", "ok 2 passed, 1 failed", "2 passed, 1 failed."] {
            assert_eq!(Tally::of_closing_line(line), None, "{line}");
        }
    }
}
