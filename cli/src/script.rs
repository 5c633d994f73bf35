//! A trace made ready for replay: every free knows the allocation that it ends.
//!
//! All that is known without running the allocator is found out here, before any clock runs. An allocation at an address
//! that is still live hides the older one, which then lives to the end: the recorder has lost its free.

use std::collections::HashMap;
use std::path::Path;

use pcpu::{AllocFlags, Request};

use crate::error::CliError;
use crate::trace::{self, Event, Line, TracedRequest};

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
        let mut builder = Builder::default();
        trace::read(path, |number, line| builder.add(number, line))?;
        Ok(builder.script)
    }

    /// Reads a trace in memory, which errors call `name`.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn read_bytes(name: &str, bytes: &'static [u8]) -> Result<Self, CliError> {
        let mut builder = Builder::default();
        trace::read_bytes(name, bytes, |number, line| builder.add(number, line))?;
        Ok(builder.script)
    }
}

#[derive(Debug, Default)]
struct Builder {
    script: Script,
    /// The newest live allocation at each address.
    live: HashMap<u64, u32>,
}

impl Builder {
    fn add(&mut self, number: u64, line: Line) {
        let script = &mut self.script;
        let (cpu, event) = match line {
            Line::Event { cpu, event } => (cpu, event),
            Line::Lost(events) => {
                script.gaps += 1;
                script.lost_events += events.unwrap_or(0);
                return;
            }
            Line::Other => {
                script.other_lines += 1;
                return;
            }
            Line::Comment => return,
        };
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
    }
}

fn request_of(traced: &TracedRequest) -> Request {
    let mut flags = AllocFlags::empty();
    flags.set(AllocFlags::ATOMIC, traced.is_atomic);
    flags.set(AllocFlags::RESERVED, traced.is_reserved);
    Request::new(traced.bytes, traced.align).with_flags(flags)
}
