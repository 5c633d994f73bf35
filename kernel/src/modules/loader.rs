//! The loader: sections to pages or to a per-CPU area, relocations, symbols.
//!
//! What always holds: what was made for a module that cannot be loaded goes when the half-made [`Module`] is dropped, as
//! what was made for a loaded one does.

use core::fmt;

use elf::endian::LittleEndian;
use elf::relocation::RelaIterator;
use elf::section::SectionHeader;
use elf::string_table::StringTable;
use elf::symbol::{Symbol, SymbolTable};
use elf::{ElfBytes, ParseError, abi};
use pcpu::{AllocError, CpuError};

use super::pages::Pages;
use super::{PerCpuArea, Placement, exported};
use crate::memory::paging::{Access, OutOfFrames};

/// The most sections of an object.
const MAX_SECTIONS: usize = 32;

/// The prefix of the names of per-CPU sections.
const PER_CPU: &str = ".data..percpu";

type Object = ElfBytes<'static, LittleEndian>;

/// A module that is loaded. Dropping it unloads it: no CPU may run its code any more.
pub struct Module {
    symbols: Symbols,
    places: [Place; MAX_SECTIONS],
}

/// The symbols of an object, and their names.
struct Symbols {
    table: SymbolTable<'static, LittleEndian>,
    names: StringTable<'static>,
}

/// Where a section is.
enum Place {
    /// Nowhere: it is not needed at run time.
    Nowhere,
    Pages(Pages),
    PerCpu(PerCpuArea),
}

impl Place {
    fn address(&self) -> Option<usize> {
        match self {
            Self::Nowhere => None,
            Self::Pages(pages) => Some(pages.start()),
            Self::PerCpu(area) => Some(area.start.neutral()),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Nowhere => 0,
            Self::Pages(pages) => pages.bytes(),
            Self::PerCpu(area) => area.bytes,
        }
    }

    /// Writes to the section; for a per-CPU section to the copy of every possible CPU.
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), LoadError> {
        let fits = offset
            .checked_add(bytes.len())
            .is_some_and(|end| end <= self.bytes());
        if !fits && !matches!(self, Self::Nowhere) {
            return Err(LoadError::OutOfSection {
                offset,
                bytes: self.bytes(),
            });
        }
        match self {
            Self::Nowhere => {}
            Self::Pages(pages) => pages.write(offset, bytes),
            Self::PerCpu(area) => area.write(offset, bytes)?,
        }
        Ok(())
    }
}

/// Why a module cannot be loaded. Nothing is left of it.
#[derive(Debug)]
pub enum LoadError {
    /// It is no relocatable object of this machine, or a damaged one.
    Elf(ParseError),
    /// It has no sections or no symbols.
    Empty,
    /// It has too many sections.
    Sections {
        /// So many.
        sections: usize,
        /// And so many are possible.
        limit: usize,
    },
    /// No room for its per-CPU variables.
    PerCpu(AllocError),
    /// A CPU has no memory for its copies.
    Cpu(CpuError),
    /// No memory for its code or data.
    OutOfFrames,
    /// It uses something that nobody exports.
    UnknownSymbol {
        /// The name.
        name: &'static str,
    },
    /// A relocation of a type that the loader does not know.
    Relocation {
        /// The type.
        kind: u32,
    },
    /// A relocation lies outside of its section.
    OutOfSection {
        /// Where.
        offset: usize,
        /// The length of the section.
        bytes: usize,
    },
    /// An address is too far away for the instruction that uses it.
    OutOfReach {
        /// What should have been written to 32 bits.
        value: i64,
    },
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elf(error) => write!(f, "no object: {error}"),
            Self::Empty => f.write_str("an object without sections or symbols"),
            Self::Sections { sections, limit } => {
                write!(f, "{sections} sections, the limit is {limit}")
            }
            Self::PerCpu(error) => error.fmt(f),
            Self::Cpu(error) => error.fmt(f),
            Self::OutOfFrames => f.write_str("no memory for code or data"),
            Self::UnknownSymbol { name } => write!(f, "nobody exports {name}"),
            Self::Relocation { kind } => write!(f, "an unknown type of relocation, {kind}"),
            Self::OutOfSection { offset, bytes } => {
                write!(f, "a relocation at {offset} in a section of {bytes} bytes")
            }
            Self::OutOfReach { value } => write!(f, "{value:#x} does not fit into 32 bits"),
        }
    }
}

impl core::error::Error for LoadError {}

impl From<ParseError> for LoadError {
    fn from(error: ParseError) -> Self {
        Self::Elf(error)
    }
}

impl From<AllocError> for LoadError {
    fn from(error: AllocError) -> Self {
        Self::PerCpu(error)
    }
}

impl From<CpuError> for LoadError {
    fn from(error: CpuError) -> Self {
        Self::Cpu(error)
    }
}

impl From<OutOfFrames> for LoadError {
    fn from(_: OutOfFrames) -> Self {
        Self::OutOfFrames
    }
}

impl Module {
    /// Loads an object, with its per-CPU variables at `placement`. What it uses is looked up in the kernel's exports and
    /// in `others`, which must stay loaded as long as it.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn load(
        object: &'static [u8],
        placement: Placement,
        others: &[&Module],
    ) -> Result<Self, LoadError> {
        let object = Object::minimal_parse(object)?;
        let (sections, section_names) = object.section_headers_with_strtab()?;
        let (sections, section_names) = sections.zip(section_names).ok_or(LoadError::Empty)?;
        let (table, names) = object.symbol_table()?.ok_or(LoadError::Empty)?;
        if sections.len() > MAX_SECTIONS {
            return Err(LoadError::Sections {
                sections: sections.len(),
                limit: MAX_SECTIONS,
            });
        }
        let mut module = Self {
            symbols: Symbols { table, names },
            places: [const { Place::Nowhere }; MAX_SECTIONS],
        };
        for (section, slot) in sections.iter().zip(&mut module.places) {
            *slot = place(
                &section,
                section_names.get(section.sh_name as usize)?,
                placement,
            )?;
            if section.sh_type != abi::SHT_NOBITS {
                slot.write(0, object.section_data(&section)?.0)?;
            }
        }
        for section in sections.iter().filter(|it| it.sh_type == abi::SHT_RELA) {
            let relocations = object.section_data_as_relas(&section)?;
            module.relocate(section.sh_info as usize, relocations, others)?;
        }
        Ok(module)
    }

    /// The address of something that the module defines: of a per-CPU variable the handle.
    pub fn symbol(&self, name: &str) -> Option<usize> {
        let named = |symbol: &Symbol| self.symbols.name(symbol).is_ok_and(|it| it == name);
        let mut defined = self.symbols.table.iter().filter(|it| !it.is_undefined());
        self.address_of(&defined.find(named)?)
    }

    /// The address of a symbol that is defined in a section of this module.
    fn address_of(&self, symbol: &Symbol) -> Option<usize> {
        let section = self.places.get(usize::from(symbol.st_shndx))?;
        Some(section.address()?.wrapping_add(symbol.st_value as usize))
    }

    fn relocate(
        &self,
        target: usize,
        relocations: RelaIterator<'static, LittleEndian>,
        others: &[&Module],
    ) -> Result<(), LoadError> {
        let target = self.places.get(target);
        let Some((place, start)) = target.and_then(|place| Some((place, place.address()?))) else {
            return Ok(());
        };
        for relocation in relocations {
            let offset = relocation.r_offset as usize;
            let symbol = self.symbols.table.get(relocation.r_sym as usize)?;
            let value = (self.resolve(&symbol, others)? as i64).wrapping_add(relocation.r_addend);
            let relative = value.wrapping_sub((start + offset) as i64);
            match relocation.r_type {
                abi::R_X86_64_64 => place.write(offset, &value.to_le_bytes())?,
                abi::R_X86_64_PC32 | abi::R_X86_64_PLT32 => {
                    place.write(offset, &signed(relative)?.to_le_bytes())?;
                }
                abi::R_X86_64_32S => place.write(offset, &signed(value)?.to_le_bytes())?,
                kind => return Err(LoadError::Relocation { kind }),
            }
        }
        Ok(())
    }

    fn resolve(&self, symbol: &Symbol, others: &[&Module]) -> Result<usize, LoadError> {
        if let Some(address) = self.address_of(symbol) {
            return Ok(address);
        }
        let name = self.symbols.name(symbol)?;
        exported(name)
            .or_else(|| others.iter().find_map(|other| other.symbol(name)))
            .ok_or(LoadError::UnknownSymbol { name })
    }
}

impl Symbols {
    fn name(&self, symbol: &Symbol) -> Result<&'static str, ParseError> {
        self.names.get(symbol.st_name as usize)
    }
}

/// Makes the place of a section.
fn place(section: &SectionHeader, name: &str, placement: Placement) -> Result<Place, LoadError> {
    let (bytes, flags) = (section.sh_size as usize, section.sh_flags as u32);
    let is_needed = flags & abi::SHF_ALLOC != 0 && bytes > 0 && !name.starts_with(".eh_frame");
    Ok(if !is_needed {
        Place::Nowhere
    } else if name.starts_with(PER_CPU) {
        let align = section.sh_addralign.max(1) as usize;
        Place::PerCpu(PerCpuArea::allocate(bytes, align, placement)?)
    } else {
        let access = if flags & abi::SHF_EXECINSTR != 0 {
            Access::Execute
        } else if flags & abi::SHF_WRITE != 0 {
            Access::ReadWrite
        } else {
            Access::Read
        };
        Place::Pages(Pages::map(bytes, access)?)
    })
}

fn signed(value: i64) -> Result<i32, LoadError> {
    i32::try_from(value).map_err(|_| LoadError::OutOfReach { value })
}
