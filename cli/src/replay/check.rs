//! What is checked of every area that is handed out: it lies where it may, nobody else has it, and its copies are zero.

use std::collections::BTreeMap;
use std::ptr;

use pcpu::backing::sim::SimAllocator;
use pcpu::{AllocFlags, Request};

use pcpu::allocator::Region;

use super::player::{Area, Zeroing};

/// Zeroes to compare with; longer areas are compared in pieces.
static ZEROES: [u8; 4096] = [0; 4096];

/// What a copy is filled with before it is freed.
const DIRT: u8 = 0xd1;

/// Knows the live areas, by their own account rather than the allocator's.
#[derive(Debug, Default)]
pub struct Checker {
    /// First address to first address after it.
    live: BTreeMap<usize, usize>,
}

impl Checker {
    /// Checks an area that has just been handed out, and remembers it. Returns the place of its chunk and the offset in
    /// its unit.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn handed_out(
        &mut self,
        pcpu: &SimAllocator,
        request: &Request,
        area: Area,
        zeroing: Zeroing,
    ) -> Result<(u32, usize), String> {
        let Area { address, bytes, .. } = area;
        let end = address + bytes;
        let info = pcpu
            .address_info(address)
            .ok_or_else(|| format!("{address:#x} was handed out, which is no per-CPU address"))?;
        let region = match request.flags().contains(AllocFlags::RESERVED) {
            true => Region::Reserved,
            false => Region::Dynamic,
        };
        let last = pcpu.address_info(end - 1);
        if last.map(|last| (last.place, last.region)) != Some((info.place, region)) {
            return Err(format!(
                "{address:#x}..{end:#x} was handed out, which is not within the region asked for"
            ));
        }
        if let Some((start, other)) = self.live.range(..end).next_back()
            && *other > address
        {
            return Err(format!(
                "{address:#x}..{end:#x} was handed out while {start:#x}..{other:#x} is live"
            ));
        }
        self.live.insert(address, end);
        for cpu in pcpu.units().possible().iter() {
            let copy = pcpu
                .per_cpu_address(address, cpu)
                .map_err(|error| error.to_string())?;
            if !copy.is_multiple_of(request.align()) {
                return Err(format!(
                    "the copy at {copy:#x} is not aligned to {}",
                    request.align()
                ));
            }
            if zeroing == Zeroing::On && !is_zero(copy, request.bytes()) {
                return Err(format!(
                    "the copy of CPU {} of {address:#x} is not zero",
                    cpu.get()
                ));
            }
        }
        Ok((info.place, info.offset_bytes))
    }

    /// Forgets an area that is about to be freed.
    pub fn freed(&mut self, area: Area) {
        self.live.remove(&area.address);
    }
}

/// Whether a copy of a live area is zero.
fn is_zero(copy: usize, bytes: usize) -> bool {
    // SAFETY: the area was handed out to the caller, and its copies have memory; this program alone uses them, on one
    // thread, and writes to none while the slice lives.
    let copy =
        unsafe { std::slice::from_raw_parts(ptr::with_exposed_provenance::<u8>(copy), bytes) };
    copy.chunks(ZEROES.len())
        .all(|piece| piece == &ZEROES[..piece.len()])
}

/// Writes to every copy of a live area.
pub fn dirty(pcpu: &SimAllocator, area: Area) {
    for cpu in pcpu.units().possible().iter() {
        if let Ok(copy) = pcpu.per_cpu_address(area.address, cpu) {
            let copy = ptr::with_exposed_provenance_mut::<u8>(copy);
            // SAFETY: as in `is_zero`; no reference to the copy exists.
            unsafe { copy.write_bytes(DIRT, area.asked_bytes) };
        }
    }
}
