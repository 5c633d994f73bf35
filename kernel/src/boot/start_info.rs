//! What QEMU tells at the entry: memory, the command line, a boot module, where ACPI's tables begin.
//!
//! The structures lie in memory that is not ours to keep, so all of it is copied out, once.

use core::ptr;

use crate::memory::{PHYSICAL_MAP, PhysicalRange};

/// "xEn3" with the highest bit of the `E` set.
const MAGIC: u32 = 0x336e_c578;

/// The type of an entry of the memory map that is plain memory.
const RAM: u32 = 1;

/// The longest command line that is kept, in bytes.
const COMMAND_LINE_BYTES: usize = 256;

/// The most pieces of memory.
pub const MAX_RAM_RANGES: usize = 16;

/// The start info of the PVH protocol, version 1.
#[repr(C)]
struct Raw {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct MemoryMapEntry {
    start: u64,
    bytes: u64,
    kind: u32,
    reserved: u32,
}

#[repr(C)]
struct ModuleEntry {
    start: u64,
    bytes: u64,
    command_line: u64,
    reserved: u64,
}

/// A copy of what was handed over.
pub struct StartInfo {
    /// The first boot module, which begins at a page.
    pub module: Option<PhysicalRange>,
    /// Physical address of ACPI's root pointer.
    pub rsdp: usize,
    ram: [PhysicalRange; MAX_RAM_RANGES],
    nr_ram: usize,
    command_line: [u8; COMMAND_LINE_BYTES],
}

impl StartInfo {
    /// Copies the start info.
    ///
    /// # Safety
    /// `address` is what the boot loader passed, and the physical map covers what it refers to.
    ///
    /// # Panics
    /// If there is no start info.
    pub unsafe fn read(address: usize) -> Self {
        // SAFETY: the loader put a start info there (promise of the caller).
        let raw = unsafe { physical::<Raw>(address).read() };
        assert!(
            raw.magic == MAGIC && raw.version >= 1,
            "no PVH start info at {address:#x}: magic {:#x}, version {}",
            raw.magic,
            raw.version
        );
        let module = (raw.nr_modules > 0).then(|| {
            // SAFETY: at least one entry lies there (the protocol's word).
            let entry = unsafe { physical::<ModuleEntry>(raw.modules as usize).read() };
            PhysicalRange::new(entry.start, entry.start + entry.bytes)
        });
        let mut info = Self {
            module,
            rsdp: raw.rsdp as usize,
            ram: [PhysicalRange::EMPTY; MAX_RAM_RANGES],
            nr_ram: 0,
            command_line: [0; COMMAND_LINE_BYTES],
        };
        let entries = physical::<MemoryMapEntry>(raw.memory_map as usize);
        for index in 0..raw.memory_map_entries as usize {
            // SAFETY: so many entries lie there (the protocol's word).
            let entry = unsafe { entries.add(index).read() };
            if entry.kind == RAM && info.nr_ram < MAX_RAM_RANGES {
                info.ram[info.nr_ram] = PhysicalRange::new(entry.start, entry.start + entry.bytes);
                info.nr_ram += 1;
            }
        }
        let text = physical::<u8>(raw.command_line as usize);
        for (index, byte) in info.command_line.iter_mut().enumerate() {
            // SAFETY: the text ends with a zero, and nothing is read beyond it.
            *byte = unsafe { text.add(index).read() };
            if *byte == 0 {
                break;
            }
        }
        info
    }

    /// The pieces of memory.
    pub fn ram(&self) -> &[PhysicalRange] {
        &self.ram[..self.nr_ram]
    }

    /// The value of an option `name=value`, or the empty text for a plain `name`.
    pub fn option(&self, name: &str) -> Option<&str> {
        let end = self.command_line.iter().position(|&byte| byte == 0);
        let text = &self.command_line[..end.unwrap_or(COMMAND_LINE_BYTES)];
        let words = core::str::from_utf8(text).unwrap_or("").split(' ');
        words
            .map(|word| word.split_once('=').unwrap_or((word, "")))
            .find_map(|(key, value)| (key == name).then_some(value))
    }
}

fn physical<T>(address: usize) -> *const T {
    ptr::with_exposed_provenance(PHYSICAL_MAP + address)
}
