//! One image of the template for all units: a file in memory, mapped privately into each of them. A CPU that never comes
//! takes neither a page nor page tables for its static variables; what a CPU writes to comes into pages of its own.
//!
//! Where units do not begin at pages, the image is there once for every distance from a page's start that there is. What
//! of the template is zero at its start and its end is not part of the image: units are zero anyway.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::vec::Vec;

use rustix::fs::{MemfdFlags, memfd_create};

use super::whole_pages;
use crate::backing::address_range::AddressRange;

/// Maps the template into the units at these addresses. If it fails some of them hold it already.
///
/// # Safety
/// The units lie in the range, are no shorter than the template, hold zeroes, and nobody uses them.
pub(super) unsafe fn map(
    range: &AddressRange,
    units: &(impl Iterator<Item = usize> + Clone),
    template: &[u8],
) -> io::Result<()> {
    let is_value = |byte: &u8| *byte != 0;
    let Some(first) = template.iter().position(is_value) else {
        return Ok(());
    };
    let end = template
        .iter()
        .rposition(is_value)
        .map_or(0, |last| last + 1);
    let page_bytes = rustix::param::page_size();
    let shift_of = |unit: usize| (unit + first) % page_bytes;
    let mut shifts: Vec<usize> = units.clone().map(shift_of).collect();
    shifts.sort_unstable();
    shifts.dedup();
    let image_bytes = (end - first).next_multiple_of(page_bytes) + page_bytes;

    let file = File::from(memfd_create(c"pcpu template", MemfdFlags::CLOEXEC)?);
    file.set_len((shifts.len() * image_bytes) as u64)?;
    for (index, shift) in shifts.iter().enumerate() {
        let at = index * image_bytes + shift;
        file.write_all_at(&template[first..end], at as u64)?;
    }
    for unit in units.clone() {
        let index = shifts.partition_point(|shift| *shift < shift_of(unit));
        let Range { start, end } = whole_pages::around(unit + first..unit + end);
        // SAFETY: the pages hold a part of the unit that nobody uses; what else is in them comes before the unit, where
        // nothing is, or behind the template, where the image is zero as the unit is. The file is closed when this ends.
        unsafe { range.map_file(start, end - start, &file, index * image_bytes)? };
    }
    Ok(())
}
