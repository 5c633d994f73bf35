//! A recorded trace in a form that the kernel replays: `pcpu replay` reads it and tells when each area comes and goes.

use std::io::{BufWriter, Write};
use std::path::Path;

use crate::command::{Failure, Program};

/// Writes a trace as a boot module: a record of three 32-bit words for each operation, in order. They are the number of
/// the area, its size (0: it is freed) and its alignment.
pub fn write_module(trace: &Path, module: &Path) -> Result<(), Failure> {
    let placements = module.with_extension("csv");
    let trace = trace.canonicalize()?;
    let output = Program::build()?
        .run("replay --json --placements")
        .arg(&placements)
        .arg(trace)
        .output()?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("pcpu replay: {}: {}", output.status, message.trim_end()).into());
    }
    let mut records = Vec::new();
    for line in std::fs::read_to_string(&placements)?.lines().skip(1) {
        records.extend(records_of(line).ok_or(format!("no placement: {line}"))?);
    }
    records.sort_unstable_by_key(|&(op, _)| op);
    let mut file = BufWriter::new(std::fs::File::create(module)?);
    for word in records.iter().flat_map(|(_, record)| record) {
        file.write_all(&word.to_le_bytes())?;
    }
    Ok(file.flush()?)
}

/// The one or two operations of a line `id,chunk,offset,size,align,alloc_op,free_op`, each with its number.
fn records_of(line: &str) -> Option<Vec<(u32, [u32; 3])>> {
    let fields: Vec<&str> = line.split(',').collect();
    let [id, _, _, size, align, alloc_op, free_op] = fields[..] else {
        return None;
    };
    let (id, size, align) = (id.parse().ok()?, size.parse().ok()?, align.parse().ok()?);
    let mut records = vec![(alloc_op.parse().ok()?, [id, size, align])];
    if !free_op.is_empty() {
        records.push((free_op.parse().ok()?, [id, 0, 0]));
    }
    Some(records)
}

#[cfg(test)]
mod tests {
    use super::records_of;

    #[test]
    fn a_line_is_one_operation_or_two() {
        assert_eq!(
            records_of("3,0,212992,40,8,5,9"),
            Some(vec![(5, [3, 40, 8]), (9, [3, 0, 0])])
        );
        assert_eq!(
            records_of("3,0,212992,40,8,5,"),
            Some(vec![(5, [3, 40, 8])])
        );
        assert_eq!(records_of("3,0,212992"), None);
    }
}
