//! A trace made ready for replay: every free knows the allocation that it ends.
//!
//! All that is known without running the allocator is found out here, before any clock runs. An allocation at an address
//! that is still live hides the older one, which then lives to the end: the recorder has lost its free.
//!
//! A script has at most [`MAX_STEPS`] steps, which bounds its memory: a trace may come from anywhere.

use std::collections::HashMap;
use std::path::Path;

use pcpu::{AllocFlags, Request};

use crate::error::CliError;
use crate::trace::{self, Event, Line, TracedRequest};

/// The most steps of a script; the recorded traces make up to 100,000. A step takes some 100 bytes.
pub const MAX_STEPS: usize = 1 << 24;

/// A trace made ready for replay.
#[derive(Debug, Default)]
pub struct Script {
    /// What is done, in order.
    pub steps: Vec<Step>,
    /// How many areas the steps name.
    pub areas: u32,
    /// Requests that Linux refused.
    pub linux_failed: u64,
    /// Frees of areas that were not allocated in the trace.
    pub skipped_frees: u64,
    /// Events of other sorts, and lines that are no event.
    pub other_lines: u64,
    /// Places where the recorder lost events.
    pub gaps: u64,
    /// Events that the recorder lost there, as far as it knows.
    pub lost_events: u64,
}

/// One step of a replay.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// What is done.
    pub action: Action,
    /// Why.
    pub purpose: Purpose,
    /// The CPU that the trace names.
    pub cpu: u32,
    /// The line of the trace.
    pub line: u64,
}

/// What a step does.
#[derive(Debug, Clone, Copy)]
pub enum Action {
    /// Allocates an area, and keeps it.
    Alloc {
        /// The area's number; allocations count up from 0.
        area: u32,
        /// What is asked for; nothing about zeroing.
        request: Request,
    },
    /// Frees an area.
    Free {
        /// Its number.
        area: u32,
    },
}

/// Why a step is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Linux did it too: an operation of the trace.
    Op,
    /// Linux refused the request. It is tried, and what it gets is freed in the next step.
    Try,
}

impl Script {
    /// Reads the trace at `path`.
    ///
    /// # Errors
    /// One line that names the file, and the line at fault.
    pub fn read(path: &Path) -> Result<Self, CliError> {
        let mut builder = Builder::new(MAX_STEPS);
        trace::read(path, |number, line| builder.add(number, line))?;
        Ok(builder.script)
    }

    /// Reads a trace in memory, which errors call `name`.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn read_bytes(name: &str, bytes: impl AsRef<[u8]> + 'static) -> Result<Self, CliError> {
        let mut builder = Builder::new(MAX_STEPS);
        trace::read_bytes(name, bytes, |number, line| builder.add(number, line))?;
        Ok(builder.script)
    }
}

#[derive(Debug)]
struct Builder {
    script: Script,
    /// The newest live allocation at each address.
    live: HashMap<u64, u32>,
    max_steps: usize,
}

impl Builder {
    fn new(max_steps: usize) -> Self {
        Self {
            script: Script::default(),
            live: HashMap::new(),
            max_steps,
        }
    }

    fn add(&mut self, number: u64, line: Line) -> Result<(), String> {
        let script = &mut self.script;
        let (cpu, event) = match line {
            Line::Event { cpu, event } => (cpu, event),
            Line::Lost(events) => {
                script.gaps += 1;
                script.lost_events = script.lost_events.saturating_add(events.unwrap_or(0));
                return Ok(());
            }
            Line::Other => {
                script.other_lines += 1;
                return Ok(());
            }
            Line::Comment => return Ok(()),
        };
        if script.steps.len() >= self.max_steps {
            return Err(format!("more than {} requests and frees", self.max_steps));
        }
        let mut push = |purpose, action| {
            script.steps.push(Step {
                action,
                purpose,
                cpu,
                line: number,
            })
        };
        match event {
            Event::Alloc { request, ptr } => {
                let (area, request) = (script.areas, request_of(&request));
                script.areas += 1;
                push(Purpose::Op, Action::Alloc { area, request });
                self.live.insert(ptr, area);
            }
            Event::Refused { request } => {
                let (area, request) = (script.areas, request_of(&request));
                script.areas += 1;
                script.linux_failed += 1;
                push(Purpose::Try, Action::Alloc { area, request });
                push(Purpose::Try, Action::Free { area });
            }
            Event::Free { ptr } => match self.live.remove(&ptr) {
                Some(area) => push(Purpose::Op, Action::Free { area }),
                None => script.skipped_frees += 1,
            },
        }
        Ok(())
    }
}

fn request_of(traced: &TracedRequest) -> Request {
    let mut flags = AllocFlags::empty();
    flags.set(AllocFlags::ATOMIC, traced.is_atomic);
    flags.set(AllocFlags::RESERVED, traced.is_reserved);
    Request::new(traced.bytes, traced.align).with_flags(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a trace from anywhere may say, and does not end the program.
    #[test]
    fn numbers_without_sense_are_bounded() {
        let lost = "CPU:0 [LOST 18446744073709551615 EVENTS]\n".repeat(2);
        let script = Script::read_bytes("t", lost).unwrap();
        assert_eq!((script.gaps, script.lost_events), (2, u64::MAX));

        let mut builder = Builder::new(3);
        let free = |ptr| Line::Event {
            cpu: 0,
            event: Event::Free { ptr },
        };
        let request = TracedRequest {
            bytes: 8,
            align: 8,
            is_reserved: false,
            is_atomic: false,
        };
        let alloc = |ptr| Line::Event {
            cpu: 0,
            event: Event::Alloc { request, ptr },
        };
        for (number, line) in [alloc(1), alloc(2), free(1)].into_iter().enumerate() {
            assert_eq!(builder.add(number as u64, line), Ok(()));
        }
        let told = Err("more than 3 requests and frees".to_owned());
        assert_eq!(builder.add(4, alloc(3)), told);
    }
}
