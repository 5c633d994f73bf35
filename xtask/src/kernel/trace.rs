//! A recorded trace in a form that the kernel replays: `pcpu replay` reads it and tells when each area comes and goes.

use std::io::{BufWriter, Write};
use std::path::Path;

use crate::command::{Failure, Program};

/// Writes a trace as a boot module: a record of four 32-bit words for each operation, in order. They are the number of
/// the area, its size (0: it is freed), its alignment, and the CPU.
pub fn write_module(trace: &Path, module: &Path) -> Result<(), Failure> {
    let placements = module.with_extension("csv");
    let trace = trace.canonicalize()?;
    let output = Program::build()?
        .run("replay --json --placement-cpus --placements")
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

/// The one or two operations of a line, each with its number. A line has what `--placement-cpus` makes of it:
/// `id,chunk,offset,size,align,alloc_op,free_op,alloc_cpu,free_cpu`.
fn records_of(line: &str) -> Option<Vec<(u32, [u32; 4])>> {
    let fields: Vec<&str> = line.split(',').collect();
    let [
        id,
        _,
        _,
        size,
        align,
        alloc_op,
        free_op,
        alloc_cpu,
        free_cpu,
    ] = fields[..]
    else {
        return None;
    };
    let (id, size, align) = (id.parse().ok()?, size.parse().ok()?, align.parse().ok()?);
    let mut records = vec![(
        alloc_op.parse().ok()?,
        [id, size, align, alloc_cpu.parse().ok()?],
    )];
    if !free_op.is_empty() {
        records.push((free_op.parse().ok()?, [id, 0, 0, free_cpu.parse().ok()?]));
    }
    Some(records)
}

#[cfg(test)]
mod tests {
    use super::records_of;

    #[test]
    fn a_line_is_one_operation_or_two() {
        assert_eq!(
            records_of("3,0,212992,40,8,5,9,1,2"),
            Some(vec![(5, [3, 40, 8, 1]), (9, [3, 0, 0, 2])])
        );
        assert_eq!(
            records_of("3,0,212992,40,8,5,,7,"),
            Some(vec![(5, [3, 40, 8, 7])])
        );
        assert_eq!(records_of("3,0,212992,40,8,5,9"), None);
        assert_eq!(records_of("3,0,212992"), None);
    }
}
