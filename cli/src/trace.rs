//! Reads recorded traces: the text of Linux's trace buffer with the percpu events on, plain or gzip.
//!
//! A line is `TASK-PID [CPU] flags TIMESTAMP: EVENT: fields`. A task's name may hold anything, also what looks like a
//! part of a line; a line is taken apart at the first place where all of `-PID [CPU] ... TIMESTAMP: EVENT:` stands. Fields
//! are found by name, for kernels differ in which of them they print. Whatever is no percpu event is passed over, a percpu
//! event that cannot be understood is an error: a trace is never replayed in part.
//!
//! A trace may come from anywhere. Reading one takes time in proportion to its text and the memory of one line; how long a
//! line and a text may be stands in [`lines`].

use std::path::Path;

use crate::error::CliError;

pub mod lines;

pub use lines::Lines;

/// A request, as traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TracedRequest {
    /// Size asked for.
    pub bytes: usize,
    /// Alignment asked for, a power of two.
    pub align: usize,
    /// For the reserved region.
    pub is_reserved: bool,
    /// From a context that must not sleep.
    pub is_atomic: bool,
}

/// What a line of a trace says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// An event that is replayed.
    Event {
        /// The CPU that it happened on.
        cpu: u32,
        /// What happened.
        event: Event,
    },
    /// The recorder lost so many events here; `None` if it does not know how many.
    Lost(Option<u64>),
    /// Another event, or no event.
    Other,
    /// A comment or an empty line.
    Comment,
}

/// An event that is replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// An area was handed out.
    Alloc {
        /// What was asked for.
        request: TracedRequest,
        /// Where it lay.
        ptr: u64,
    },
    /// A request was refused.
    Refused {
        /// What was asked for.
        request: TracedRequest,
    },
    /// An area was freed.
    Free {
        /// Where it lay.
        ptr: u64,
    },
}

/// Calls `visit` with the number and the meaning of every line of the trace at `path`, until it fails.
///
/// # Errors
/// One line that names the file and, if a line of it is at fault or `visit` fails, that line.
pub fn read(
    path: &Path,
    visit: impl FnMut(u64, Line) -> Result<(), String>,
) -> Result<(), CliError> {
    let lines = Lines::open(path)?;
    visit_lines(&path.display().to_string(), lines, visit)
}

/// [`read`] for a trace in memory.
///
/// # Errors
/// As for [`read`].
pub fn read_bytes(
    name: &str,
    bytes: impl AsRef<[u8]> + 'static,
    visit: impl FnMut(u64, Line) -> Result<(), String>,
) -> Result<(), CliError> {
    visit_lines(name, Lines::of_bytes(name, bytes)?, visit)
}

fn visit_lines(
    name: &str,
    mut lines: Lines,
    mut visit: impl FnMut(u64, Line) -> Result<(), String>,
) -> Result<(), CliError> {
    let mut number = 0;
    while let Some(text) = lines.next(name)? {
        number += 1;
        parse(&text)
            .and_then(|line| visit(number, line))
            .map_err(|what| CliError::Input(format!("{name}:{number}: {what}")))?;
    }
    Ok(())
}

/// Understands a line.
///
/// # Errors
/// What is wrong with a percpu event.
fn parse(line: &str) -> Result<Line, String> {
    // A task's name stands right-aligned, so that only comments begin with the sign.
    if line.starts_with('#') || line.trim().is_empty() {
        return Ok(Line::Comment);
    }
    match Head::find(line) {
        Some(head) => head.parse(),
        None => parse_headless(line),
    }
}

/// A line that does not have the form of an event.
fn parse_headless(line: &str) -> Result<Line, String> {
    if let Some(lost) = parse_lost(line.trim()) {
        return Ok(Line::Lost(lost));
    }
    match line.split_ascii_whitespace().find(|word| {
        word.strip_suffix(':')
            .is_some_and(|name| Kind::of(name).is_some())
    }) {
        Some(event) => Err(format!(
            "{event} without '-PID [CPU] ... TIMESTAMP:' before it"
        )),
        None => Ok(Line::Other),
    }
}

/// `CPU:3 [LOST 12 EVENTS]`, and the form without a number.
fn parse_lost(line: &str) -> Option<Option<u64>> {
    let (_, lost) = line.split_once("[LOST ")?;
    let number = lost.strip_suffix("EVENTS]")?.trim();
    if number.is_empty() {
        return Some(None);
    }
    number.parse().ok().map(Some)
}

/// The events that matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Alloc,
    Refused,
    Free,
}

impl Kind {
    fn of(name: &str) -> Option<Self> {
        match name {
            "percpu_alloc_percpu" => Some(Self::Alloc),
            "percpu_alloc_percpu_fail" => Some(Self::Refused),
            "percpu_free_percpu" => Some(Self::Free),
            _ => None,
        }
    }
}

/// What stands before an event's fields.
#[derive(Debug, Clone, Copy)]
struct Head<'a> {
    cpu: &'a str,
    event: &'a str,
    fields: &'a str,
}

impl<'a> Head<'a> {
    /// The first place of the line where all of a head stands.
    fn find(line: &'a str) -> Option<Self> {
        line.match_indices('[')
            .find_map(|(at, _)| Self::at(&line[..at], &line[at + 1..]))
    }

    /// The head whose `[` stands between `task` and `rest`.
    fn at(task: &str, rest: &'a str) -> Option<Self> {
        if !task.ends_with([' ', '\t']) || !ends_with_pid(task.trim_end()) {
            return None;
        }
        // No further than the digits: a line of nothing but brackets is looked through once.
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (cpu, rest) = rest.split_at(digits);
        let rest = rest.strip_prefix(']').filter(|_| digits > 0)?;
        // Flags, a column of them or none, stand before the time.
        let mut rest = rest.strip_prefix([' ', '\t'])?;
        for _ in 0..=MAX_FLAG_WORDS {
            let (word, after) = split_word(rest)?;
            rest = after;
            if is_timestamp(word) {
                let (event, fields) = split_word(rest)?;
                let event = event.strip_suffix(':').filter(|event| !event.is_empty())?;
                return Some(Self { cpu, event, fields });
            }
        }
        None
    }

    fn parse(self) -> Result<Line, String> {
        let Some(kind) = Kind::of(self.event) else {
            return Ok(Line::Other);
        };
        let in_event = |what: String| format!("{}: {what}", self.event);
        let cpu = self
            .cpu
            .parse()
            .map_err(|_| in_event(format!("CPU [{}]: the limit is {}", self.cpu, u32::MAX)))?;
        let fields = Fields(self.fields);
        let event = match kind {
            Kind::Alloc => fields.request().and_then(|request| {
                let ptr = fields.ptr()?;
                Ok(Event::Alloc { request, ptr })
            }),
            Kind::Refused => fields.request().map(|request| Event::Refused { request }),
            Kind::Free => fields.ptr().map(|ptr| Event::Free { ptr }),
        };
        Ok(Line::Event {
            cpu,
            event: event.map_err(in_event)?,
        })
    }
}

/// Words between the CPU and the time: the flags, and room for one column that some kernel may add.
const MAX_FLAG_WORDS: usize = 2;

fn split_word(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The widest column of the option record-tgid, in bytes.
const MAX_TGID_BYTES: usize = 16;

/// Whether the text ends with `-PID`, or with `-PID (TGID)` as with the option record-tgid.
fn ends_with_pid(task: &str) -> bool {
    let mut task = task.as_bytes();
    if let Some(open) = task.strip_suffix(b")") {
        let from = open.len().saturating_sub(MAX_TGID_BYTES);
        let Some(at) = open[from..].iter().rposition(|&byte| byte == b'(') else {
            return false;
        };
        let group = open[from + at + 1..].trim_ascii();
        let is_number = !group.is_empty() && group.iter().all(u8::is_ascii_digit);
        if !is_number && !group.contains(&b'-') {
            return false;
        }
        task = open[..from + at].trim_ascii_end();
    }
    let digits = task.iter().rev().take_while(|byte| byte.is_ascii_digit());
    let digits = digits.count();
    digits > 0 && task[..task.len() - digits].ends_with(b"-")
}

/// `12.345678:`, or `12345:` with a clock that counts.
fn is_timestamp(word: &str) -> bool {
    let Some(time) = word.strip_suffix(':') else {
        return false;
    };
    match time.split_once('.') {
        Some((seconds, fraction)) => is_number(seconds) && is_number(fraction),
        None => is_number(time),
    }
}

/// `name=value` words; others are parts of values with blanks in them, such as a module's name.
#[derive(Debug, Clone, Copy)]
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    fn get(self, name: &str) -> Result<&'a str, String> {
        self.0
            .split_ascii_whitespace()
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .ok_or_else(|| format!("{name}= is missing"))
    }

    fn size(self, name: &str) -> Result<usize, String> {
        let value = self.get(name)?;
        is_number(value)
            .then(|| value.parse().ok())
            .flatten()
            .ok_or_else(|| format!("{name}={value}: it is a whole number up to {}", usize::MAX))
    }

    fn flag(self, name: &str) -> Result<bool, String> {
        match self.get(name)? {
            "0" => Ok(false),
            "1" => Ok(true),
            value => Err(format!("{name}={value}: it is 0 or 1")),
        }
    }

    fn request(self) -> Result<TracedRequest, String> {
        let is_reserved = self.flag("reserved")?;
        let is_atomic = self.flag("is_atomic")?;
        let bytes = self.size("size")?;
        if bytes == 0 {
            return Err("size=0: it is at least 1".into());
        }
        let align = self.size("align")?;
        if !align.is_power_of_two() {
            return Err(format!("align={align}: it is a power of two"));
        }
        Ok(TracedRequest {
            bytes,
            align,
            is_reserved,
            is_atomic,
        })
    }

    fn ptr(self) -> Result<u64, String> {
        let value = self.get("ptr")?;
        let digits = value.strip_prefix("0x").unwrap_or(value);
        digits
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit())
            .then(|| u64::from_str_radix(digits, 16).ok())
            .flatten()
            .ok_or_else(|| format!("ptr={value}: it is a hexadecimal number of 64 bits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of nothing but what a head could begin with. None is looked at once for every other.
    #[test]
    fn no_line_takes_long() {
        for piece in [
            "-1 [",
            "-1 [1] ",
            "-1 (2) [",
            ") [",
            "-1 [0] 1.5: [",
            " [11111111111",
            "( -1 [0]\t",
        ] {
            let line = piece.repeat(lines::MAX_LINE_BYTES / piece.len());
            assert_eq!(parse(&line), Ok(Line::Other), "{piece}");
        }
    }

    const ALLOC: &str = "percpu_alloc_percpu: call_site=f+0x1/0x2 reserved=0 is_atomic=1 size=16 align=8 \
                         base_addr=ffff800000000000 off=8 ptr=00000000000368a0 bytes_alloc=40 gfp_flags=";

    fn alloc(cpu: u32) -> Line {
        Line::Event {
            cpu,
            event: Event::Alloc {
                request: TracedRequest {
                    bytes: 16,
                    align: 8,
                    is_reserved: false,
                    is_atomic: true,
                },
                ptr: 0x368a0,
            },
        }
    }

    #[test]
    fn heads_of_every_sort() {
        for head in [
            "            task-0       [007] d..1.     0.934441: ",
            "task-0 [7] 0.934441: ",
            "            task-0       (      -) [007] d..1.     0.934441: ",
            "            task-0       (     12) [007] d..1.     0.934441: ",
            "          <idle>-0       [007] d.h11   704.387379: ",
            "            task-0       [007] .....   123456789: ",
            "    kworker/7:1H-88      [007] ..... 1.5: ",
            "     my prog [1]-5       [007] ..... 1.5: ",
            "           a: b:-5       [007] ..... 1.5: ",
            "percpu_free_percpu: ptr=1-5  [007] ..... 1.5: ",
            " [000] ..... 1.0: percpu_free_percpu: ptr=1-5  [007] ..... 1.5: ",
            "   CPU:1 [LOST 3 EVENTS]-5  [007] ..... 1.5: ",
            "    #-5  [007] ..... 1.5: ",
            "    -1-5  [007] ..... 1.5: ",
            "    ---5  [007] ..... 1.5: ",
            "  \u{fffd}ü-5  [007] ..... 1.5: ",
        ] {
            assert_eq!(parse(&format!("{head}{ALLOC}")), Ok(alloc(7)), "{head}");
        }
    }

    #[test]
    fn fields_by_name() {
        let line = |fields: &str| parse(&format!(" t-1 [000] ..... 1.5: {fields}"));
        // A module's call site has a blank; older kernels print less.
        for fields in [
            ALLOC.to_owned(),
            ALLOC.replace("0x2 ", "0x2 [bpf] "),
            ALLOC.replace("gfp_flags=", "gfp_flags=GFP_KERNEL|__GFP_ZERO"),
            "percpu_alloc_percpu: reserved=0 is_atomic=1 size=16 align=8 base_addr=0 off=8 ptr=0x368a0"
                .to_owned(),
        ] {
            assert_eq!(line(&fields), Ok(alloc(0)), "{fields}");
        }
        assert_eq!(
            line("percpu_free_percpu: base_addr=ff off=2 ptr=ffffffffffffffff"),
            Ok(Line::Event {
                cpu: 0,
                event: Event::Free { ptr: u64::MAX }
            })
        );
        assert_eq!(
            line("percpu_alloc_percpu_fail: reserved=1 is_atomic=0 size=8 align=4"),
            Ok(Line::Event {
                cpu: 0,
                event: Event::Refused {
                    request: TracedRequest {
                        bytes: 8,
                        align: 4,
                        is_reserved: true,
                        is_atomic: false
                    }
                }
            })
        );
    }

    #[test]
    fn what_is_passed_over() {
        for (line, want) in [
            ("# percpu_free_percpu: ptr=x", Line::Comment),
            ("", Line::Comment),
            ("CPU:3 [LOST 12 EVENTS]", Line::Lost(Some(12))),
            ("CPU:3 [LOST EVENTS]", Line::Lost(None)),
            (
                " t-1 [000] ..... 1.5: percpu_create_chunk: base_addr=1",
                Line::Other,
            ),
            (
                " t-1 [000] ..... 1.5: percpu_destroy_chunk: base_addr=1",
                Line::Other,
            ),
            (
                " t-1 [000] ..... 1.5: tracing_mark_write: percpu_free_percpu: ptr=x",
                Line::Other,
            ),
            (
                " t-1 [000] ..... 1.5: sched_switch: prev_comm=x-1 [000] 1.5: percpu_free_percpu: y",
                Line::Other,
            ),
            (" => percpu_alloc_percpu", Line::Other),
        ] {
            assert_eq!(parse(line), Ok(want), "{line}");
        }
    }

    #[test]
    fn malformed_events() {
        let head = " t-1 [000] ..... 1.5:";
        for (from, to, want) in [
            ("size=16", "size=0", "size=0: it is at least 1"),
            ("size=16", "size=-1", "size=-1: it is a whole number up to"),
            (
                "size=16",
                "size=99999999999999999999",
                "it is a whole number up to 18446744073709551615",
            ),
            ("size=16", "size=", "size=: it is a whole number"),
            ("size=16 ", "", "size= is missing"),
            ("align=8", "align=0", "align=0: it is a power of two"),
            ("align=8", "align=12", "align=12: it is a power of two"),
            ("align=8 ", "", "align= is missing"),
            (
                "ptr=00000000000368a0",
                "ptr=(____ptrval____)",
                "it is a hexadecimal number",
            ),
            ("ptr=00000000000368a0", "ptr=", "it is a hexadecimal number"),
            (
                "ptr=00000000000368a0",
                "ptr=+1",
                "it is a hexadecimal number",
            ),
            (
                "ptr=00000000000368a0",
                "ptr=1ffffffffffffffff",
                "a hexadecimal number of 64 bits",
            ),
            ("is_atomic=1", "is_atomic=2", "is_atomic=2: it is 0 or 1"),
            ("reserved=0 ", "", "reserved= is missing"),
        ] {
            let line = format!("{head} {}", ALLOC.replace(from, to));
            let error = parse(&line).expect_err(&line);
            assert!(
                error.starts_with("percpu_alloc_percpu: ") && error.contains(want),
                "{error}"
            );
        }
        for (line, want) in [
            (
                format!("{head} percpu_free_percpu: base_addr=1"),
                "percpu_free_percpu: ptr= is missing",
            ),
            (
                format!("{head} percpu_free_percpu:"),
                "percpu_free_percpu: ptr= is missing",
            ),
            (
                format!("{head} percpu_alloc_percpu_fail: reserved=0 is_atomic=0 size=8"),
                "align= is missing",
            ),
            (
                "t-1 [99999999999] 1.5: percpu_free_percpu: ptr=1".into(),
                "CPU [99999999999]: the limit is 4294967295",
            ),
            (
                "t-1 [x] 1.5: percpu_free_percpu: ptr=1".into(),
                "percpu_free_percpu: without '-PID [CPU] ... TIMESTAMP:'",
            ),
            ("percpu_free_percpu: ptr=1".into(), "without '-PID"),
        ] {
            let error = parse(&line).expect_err(&line);
            assert!(error.contains(want), "{error}");
        }
    }
}
