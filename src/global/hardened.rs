//! The hardened mode of the process's instance, by an environment variable.

use core::fmt::{self, Write};
use std::ffi::{OsStr, OsString};
use std::format;
use std::string::String;

use crate::hardened::{Finding, FindingHook, Hardening};

const VARIABLE: &str = "PCPU_HARDENED";

/// What the variable says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Off,
    Report,
    Abort,
}

impl Wanted {
    fn parse(value: Option<&OsStr>) -> Result<Self, String> {
        let Some(value) = value else {
            return Ok(Self::Off);
        };
        match value.to_str() {
            Some("off") => Ok(Self::Off),
            Some("report") => Ok(Self::Report),
            Some("abort") => Ok(Self::Abort),
            _ => Err(format!(
                "{VARIABLE} is {value:?}; it can be off, report or abort"
            )),
        }
    }
}

/// How the environment wants the instance to be hardened. A value that means nothing ends the process with a line and status 2.
///
/// A program that has more rights than whoever starts it does not look.
pub(super) fn wanted() -> Option<Hardening> {
    // SAFETY: it has no preconditions.
    let has_more_rights = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
    let value: Option<OsString> = match has_more_rights {
        true => None,
        false => std::env::var_os(VARIABLE),
    };
    match Wanted::parse(value.as_deref()) {
        Ok(Wanted::Off) => None,
        Ok(Wanted::Report) => Some(Hardening::new(&Teller::Report)),
        Ok(Wanted::Abort) => Some(Hardening::new(&Teller::Abort)),
        Err(line) => {
            Line::tell(format_args!("{line}"));
            std::process::exit(2)
        }
    }
}

/// Tells of findings on standard error.
#[derive(Debug)]
enum Teller {
    Report,
    Abort,
}

impl FindingHook for Teller {
    fn found(&self, finding: &Finding) {
        Line::tell(format_args!("{finding}"));
        if let Self::Abort = self {
            std::process::abort();
        }
    }
}

/// A line that is written by one system call, without memory from the heap: a signal handler may be what found something.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Line {
    fn tell(what: fmt::Arguments<'_>) {
        let mut line = Self {
            bytes: [0; 512],
            len: 0,
        };
        // What is too long for the line is cut off; so is what standard error does not take.
        let _ = writeln!(line, "pcpu: {what}");
        let _ = rustix::io::write(std::io::stderr(), &line.bytes[..line.len]);
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.len..];
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text.as_bytes()[..len]);
        self.len += len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_the_variable() {
        let parse = |value: &str| Wanted::parse(Some(OsStr::new(value)));
        assert_eq!(Wanted::parse(None), Ok(Wanted::Off));
        assert_eq!(parse("off"), Ok(Wanted::Off));
        assert_eq!(parse("report"), Ok(Wanted::Report));
        assert_eq!(parse("abort"), Ok(Wanted::Abort));
        for wrong in ["", "1", "Report", "report "] {
            let line = parse(wrong).unwrap_err();
            assert_eq!(
                line,
                format!("PCPU_HARDENED is {wrong:?}; it can be off, report or abort")
            );
        }
    }
}
