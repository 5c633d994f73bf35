//! How a command ends badly: a message of one line and an exit code.
//!
//! Exit code 2 means that what was given makes no sense (an option, a file), here at least: what the system refuses to every
//! program counts too; 1 means that the work itself failed (a request, a check). The message never spans lines, whatever
//! stands in a file name.

use std::fmt;

use pcpu_workloads::WorkloadError;

/// Why a command failed.
#[derive(Debug)]
pub enum CliError {
    /// What was given makes no sense: exit code 2.
    Input(String),
    /// Requests or checks failed: exit code 1.
    Failed(String),
    /// Another process did the work, and has told what is wrong: its exit code.
    Told(u8),
}

impl CliError {
    /// The exit code that goes with it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input(_) => 2,
            Self::Failed(_) => 1,
            Self::Told(code) => *code,
        }
    }
}

/// Most messages are about what was given.
impl From<String> for CliError {
    fn from(message: String) -> Self {
        Self::Input(message)
    }
}

impl From<WorkloadError> for CliError {
    fn from(error: WorkloadError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<clap::Error> for CliError {
    /// What clap says at length (the cause, hints, the usage), cut down to the cause.
    fn from(error: clap::Error) -> Self {
        let text = error.to_string();
        let cause: Vec<_> = text
            .lines()
            .map(str::trim)
            .take_while(|line| !line.is_empty())
            .collect();
        let cause = cause.join(" ");
        Self::Input(cause.strip_prefix("error: ").unwrap_or(&cause).to_owned())
    }
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = match self {
            Self::Input(message) | Self::Failed(message) => message,
            Self::Told(code) => return write!(f, "exit code {code}, told already"),
        };
        for character in message.chars() {
            if character.is_control() {
                write!(f, "{}", character.escape_default())?;
            } else {
                write!(f, "{character}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line() {
        let error = CliError::from("a\nb\x1b[0m: no such file".to_owned());
        assert_eq!(error.to_string(), "a\\nb\\u{1b}[0m: no such file");
    }
}
