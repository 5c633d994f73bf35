//! Records what the allocator of this process does, as a trace that `pcpu replay` reads.
//!
//! The lines are those of Linux's trace buffer. The hook only keeps a copy of each event, for it may be called with the
//! allocator's lock held; lines are made of them when all is over.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pcpu::stats::{Event, EventHook};
use pcpu::unit::{CpuId, GRANULE_BYTES};
use pcpu::{AllocError, AllocFlags, Domain, Global, global};

/// The events of the process, in the order in which the hook was told of them.
#[derive(Debug, Default)]
pub struct Recorder {
    events: Mutex<Vec<Recorded>>,
}

/// An event, and what else a line says.
#[derive(Debug, Clone, Copy)]
struct Recorded {
    event: Event,
    time: Instant,
    cpu: CpuId,
    thread: i32,
}

static RECORDER: Recorder = Recorder {
    events: Mutex::new(Vec::new()),
};

/// Room made beforehand, so that a usual recording never grows with the allocator's lock held.
const USUAL_EVENTS: usize = 64 << 10;

/// Records from now on.
pub fn start() -> &'static Recorder {
    RECORDER.with(|events| {
        events.clear();
        events.reserve(USUAL_EVENTS);
    });
    global().set_event_hook(Some(&RECORDER));
    &RECORDER
}

impl Recorder {
    /// Stops recording.
    pub fn stop(&self) {
        global().set_event_hook(None);
    }

    /// Writes the trace. Returns how many events it has.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, out: &mut impl Write) -> io::Result<usize> {
        let events = self.with(|events| events.clone());
        let possible = global().units().possible().count() as usize;
        let start = events.first().map(|first| first.time);
        writeln!(
            out,
            "# tracer: nop\n\
             #\n\
             # entries-in-buffer/entries-written: {0}/{0}   #P:{possible}\n\
             #\n\
             #           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n\
             #              | |         |   |||||     |         |",
            events.len()
        )?;
        for recorded in &events {
            let since = start.map_or(Duration::ZERO, |start| {
                recorded.time.saturating_duration_since(start)
            });
            write!(
                out,
                "{:>16}-{:<7} [{:03}] ..... {:5}.{:06}: ",
                "pcpu",
                recorded.thread,
                recorded.cpu.get(),
                since.as_secs(),
                since.subsec_micros()
            )?;
            write_event(out, &recorded.event, possible)?;
        }
        out.flush()?;
        Ok(events.len())
    }

    fn with<T>(&self, work: impl FnOnce(&mut Vec<Recorded>) -> T) -> T {
        work(&mut self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl EventHook for Recorder {
    fn event(&self, event: &Event) {
        if !is_traced(event) {
            return;
        }
        let (cpu, thread) = (Global::current_cpu(), rustix::thread::gettid().as_raw_pid());
        self.with(|events| {
            // Read with the list locked, so that times never run backwards.
            events.push(Recorded {
                event: *event,
                time: Instant::now(),
                cpu,
                thread,
            });
        });
    }
}

/// Whether a line is made of the event. Linux refuses requests that make no sense without tracing them, and a replay
/// could not read them.
fn is_traced(event: &Event) -> bool {
    match event {
        Event::Failure { flags, error, .. } => {
            !flags.contains(AllocFlags::NO_WARN)
                && matches!(
                    error,
                    AllocError::ReservedExhausted { .. }
                        | AllocError::Backing(_)
                        | AllocError::Busy
                )
        }
        _ => true,
    }
}

/// Writes what stands behind the time. Sizes are as asked for, addresses neutral.
fn write_event(out: &mut impl Write, event: &Event, possible: usize) -> io::Result<()> {
    let bit = |flags: &AllocFlags, flag| u8::from(flags.intersects(flag));
    let not_sleeping = AllocFlags::ATOMIC | AllocFlags::TRY;
    match event {
        Event::Alloc {
            address,
            bytes,
            align,
            flags,
            owner,
            at: (_, offset),
        } => writeln!(
            out,
            "percpu_alloc_percpu: call_site={owner:#x} reserved={} is_atomic={} size={bytes} align={align} \
             base_addr={:016x} off={offset} ptr={address:016x} bytes_alloc={} gfp_flags={}",
            bit(flags, AllocFlags::RESERVED),
            bit(flags, not_sleeping),
            address - offset,
            bytes.next_multiple_of(GRANULE_BYTES) * possible,
            match flags.intersects(not_sleeping) {
                true => "GFP_ATOMIC",
                false => "GFP_KERNEL",
            }
        ),
        Event::Failure {
            bytes,
            align,
            flags,
            ..
        } => writeln!(
            out,
            "percpu_alloc_percpu_fail: reserved={} is_atomic={} size={bytes} align={align}",
            bit(flags, AllocFlags::RESERVED),
            bit(flags, not_sleeping)
        ),
        Event::Free {
            address,
            at: (_, offset),
            ..
        } => writeln!(
            out,
            "percpu_free_percpu: base_addr={:016x} off={offset} ptr={address:016x}",
            address - offset
        ),
        Event::ChunkCreated { address, .. } => {
            writeln!(out, "percpu_create_chunk: base_addr={address:016x}")
        }
        Event::ChunkDestroyed { address, .. } => {
            writeln!(out, "percpu_destroy_chunk: base_addr={address:016x}")
        }
        // Events that are added later have no line in Linux's trace.
        _ => writeln!(out, "percpu_other: {event:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(event: Event) -> String {
        let mut line = Vec::new();
        write_event(&mut line, &event, 8).unwrap();
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn lines_are_those_of_linux() {
        assert_eq!(
            line(Event::Alloc {
                address: 0x7f00_0003_68a0,
                bytes: 6,
                align: 8,
                flags: AllocFlags::ATOMIC,
                owner: 0x1234,
                at: (0, 0x368a0),
            }),
            "percpu_alloc_percpu: call_site=0x1234 reserved=0 is_atomic=1 size=6 align=8 base_addr=00007f0000000000 \
             off=223392 ptr=00007f00000368a0 bytes_alloc=64 gfp_flags=GFP_ATOMIC\n"
        );
        assert_eq!(
            line(Event::Free {
                bytes: 8,
                address: 0x7f00_0000_0010,
                at: (0, 16),
            }),
            "percpu_free_percpu: base_addr=00007f0000000000 off=16 ptr=00007f0000000010\n"
        );
        let failure = Event::Failure {
            bytes: 8,
            align: 4,
            flags: AllocFlags::RESERVED,
            owner: 0,
            error: AllocError::Busy,
        };
        assert_eq!(
            line(failure),
            "percpu_alloc_percpu_fail: reserved=1 is_atomic=0 size=8 align=4\n"
        );
        assert_eq!(
            line(Event::ChunkCreated {
                place: 1,
                address: 0x40000
            }),
            "percpu_create_chunk: base_addr=0000000000040000\n"
        );
    }

    #[test]
    fn senseless_requests_leave_no_line() {
        let failure = |error, flags| {
            is_traced(&Event::Failure {
                bytes: 0,
                align: 3,
                flags,
                owner: 0,
                error,
            })
        };
        assert!(!failure(AllocError::ZeroSize, AllocFlags::empty()));
        assert!(!failure(
            AllocError::AlignNotPowerOfTwo { align: 3 },
            AllocFlags::empty()
        ));
        assert!(failure(AllocError::Busy, AllocFlags::empty()));
        assert!(!failure(AllocError::Busy, AllocFlags::NO_WARN));
    }
}
