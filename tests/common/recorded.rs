//! The recorded traces of real kernels, as operations.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use pcpu::{AllocFlags, Request};

/// An event.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    /// An area was handed out.
    Alloc {
        /// Where, in the recorded kernel.
        ptr: u64,
        /// What was asked for.
        request: Request,
    },
    /// The recorded kernel refused it.
    Refused {
        /// What was asked for.
        request: Request,
    },
    /// An area was freed.
    Free {
        /// Where it lay, in the recorded kernel.
        ptr: u64,
    },
}

/// The percpu events of the trace with that name, in order.
pub fn read(name: &str) -> Vec<Op> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("traces/{name}.trace.gz"));
    let file = File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut text = String::new();
    GzDecoder::new(file).read_to_string(&mut text).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Op> {
    let (head, fields) = line.split_once(": percpu_")?;
    assert!(head.contains('['), "the CPU is named: {line}");
    let (event, fields) = fields.split_once(": ")?;
    let field = |name: &str| {
        let is_named = |field: &&str| field.split_once('=').is_some_and(|(key, _)| key == name);
        let field = fields.split_whitespace().find(is_named);
        field
            .map(|field| &field[name.len() + 1..])
            .unwrap_or_else(|| panic!("{name} in {line}"))
    };
    let number = |name: &str| field(name).parse::<usize>().unwrap();
    let ptr = || u64::from_str_radix(field("ptr"), 16).unwrap();
    let request = || {
        assert_eq!(number("reserved"), 0, "the traces ask for none");
        let flags = match number("is_atomic") {
            0 => AllocFlags::empty(),
            _ => AllocFlags::ATOMIC,
        };
        Request::new(number("size"), number("align")).with_flags(flags)
    };
    match event {
        "alloc_percpu" => Some(Op::Alloc {
            ptr: ptr(),
            request: request(),
        }),
        "alloc_percpu_fail" => Some(Op::Refused { request: request() }),
        "free_percpu" => Some(Op::Free { ptr: ptr() }),
        _ => None,
    }
}
