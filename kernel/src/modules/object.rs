//! Relocatable objects of x86-64: taken apart, put into memory, relocated. Nothing here knows the kernel: where sections
//! lie, and what is exported, is a [`Home`]'s.
//!
//! An object is not trusted. Whatever its bytes are, loading it ends in an error that says where, or in a module whose
//! writes all went to the sections that were made for it; nothing panics or overflows. What it can cost is bounded: by
//! [`MAX_OBJECT_BYTES`], [`MAX_SECTIONS`], [`MAX_SYMBOLS`], [`MAX_RELOCATIONS`] and [`MAX_NAME_BYTES`], and by what its home
//! grants a section. What its code does once it runs is another matter.

use core::fmt;

use elf::endian::LittleEndian;
use elf::file::Class;
use elf::section::SectionHeader;
use elf::symbol::{Symbol, SymbolTable};
use elf::{ElfBytes, ParseError, abi};

/// The longest object.
pub const MAX_OBJECT_BYTES: usize = 16 << 20;

/// The most sections of an object.
pub const MAX_SECTIONS: usize = 32;

/// The most symbols of an object.
pub const MAX_SYMBOLS: usize = 4096;

/// The most relocations of sections that are loaded, in all.
pub const MAX_RELOCATIONS: usize = 1 << 16;

/// The longest name of a symbol or a section.
pub const MAX_NAME_BYTES: usize = 256;

/// The prefix of the names of per-CPU sections.
const PER_CPU: &str = ".data..percpu";

/// What a symbol without a name is called.
pub const NAMELESS: &str = "a section";

type File<'a> = ElfBytes<'a, LittleEndian>;

/// What a section needs at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory that is only read.
    Read,
    /// Memory.
    ReadWrite,
    /// Code.
    Execute,
    /// Variables with a copy for every CPU.
    PerCpu,
}

/// A section that needs memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Of which sort.
    pub kind: Kind,
    /// How many bytes; at least 1.
    pub bytes: usize,
    /// The alignment that the object asks for, in bytes; not checked.
    pub align: usize,
}

/// Where sections come to lie.
pub trait Home {
    /// Memory for a section. Dropping it gives it back.
    type Place;
    /// Why there is none.
    type Error;

    /// Makes the memory of a section, which is zero.
    ///
    /// # Errors
    /// There is none of that kind, size or alignment.
    fn place(&mut self, wanted: Wanted) -> Result<Self::Place, Self::Error>;

    /// Where it begins, as instructions name it: of per-CPU variables the handle.
    fn address(&self, place: &Self::Place) -> usize;

    /// Writes to a section; to a per-CPU section as the initial value of all copies. The bytes lie in the section.
    ///
    /// # Errors
    /// A copy has no memory.
    fn write(&self, place: &Self::Place, offset: usize, bytes: &[u8]) -> Result<(), Self::Error>;

    /// The address of what is there for objects to use by that name.
    fn exported(&self, name: &str) -> Option<usize>;
}

/// A place in an object: a section, and an offset in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// Number of the section.
    pub section: usize,
    /// Offset in the section.
    pub offset: u64,
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "section {}, offset {:#x}", self.section, self.offset)
    }
}

/// Why an object cannot be loaded. Nothing is left of it.
#[derive(Debug)]
pub enum ObjectError<'a, E> {
    /// It is damaged.
    Elf(ParseError),
    /// It is no relocatable object of this machine.
    Machine {
        /// The machine that it is for.
        machine: u16,
        /// The type of the file.
        file_type: u16,
    },
    /// It has no sections or no symbols.
    Empty,
    /// It has too much of something.
    TooMany {
        /// Of what.
        what: &'static str,
        /// So many.
        count: usize,
        /// And so many are possible.
        limit: usize,
    },
    /// A name that is too long, or no text, or lies outside.
    Name {
        /// Where it begins in its table of names.
        offset: usize,
    },
    /// A section got no memory, or cannot be written.
    Section {
        /// Number of the section.
        section: usize,
        /// Why.
        error: E,
    },
    /// It uses something that nobody exports.
    UnknownSymbol {
        /// The name.
        name: &'a str,
        /// Where it is used.
        at: At,
    },
    /// A relocation of a type that the loader does not know.
    Relocation {
        /// The type.
        kind: u32,
        /// Where.
        at: At,
    },
    /// A relocation lies outside of its section.
    OutOfSection {
        /// Where.
        at: At,
        /// The length of the section.
        bytes: usize,
    },
    /// An address is too far away for the instruction that uses it.
    OutOfReach {
        /// What is used: its name, or [`NAMELESS`].
        symbol: &'a str,
        /// Where it is used.
        at: At,
        /// The address of that place.
        place: usize,
        /// What should have been written to 32 bits: its address, or how far it is.
        value: i64,
        /// As far as 32 bits reach, up and down.
        limit: i64,
    },
}

impl<E: fmt::Display> fmt::Display for ObjectError<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elf(error) => write!(f, "no object: {error}"),
            Self::Machine { machine, file_type } => write!(
                f,
                "a file of type {file_type} for machine {machine}, it is type {} for machine {}",
                abi::ET_REL,
                abi::EM_X86_64
            ),
            Self::Empty => f.write_str("an object without sections or symbols"),
            Self::TooMany { what, count, limit } => {
                write!(f, "{count} {what}, the limit is {limit}")
            }
            Self::Name { offset } => {
                write!(
                    f,
                    "no name of up to {MAX_NAME_BYTES} bytes at {offset:#x} of the names"
                )
            }
            Self::Section { section, error } => write!(f, "section {section}: {error}"),
            Self::UnknownSymbol { name, at } => {
                write!(f, "{at}: nobody exports {}", name.escape_debug())
            }
            Self::Relocation { kind, at } => {
                write!(f, "{at}: an unknown type of relocation, {kind}")
            }
            Self::OutOfSection { at, bytes } => write!(f, "{at}: the section ends at {bytes:#x}"),
            Self::OutOfReach {
                symbol,
                at,
                place,
                value,
                limit,
            } => write!(
                f,
                "{at}: {}, used at {place:#x}: {value:#x} is out of reach, the limit is {limit:#x} up and down",
                symbol.escape_debug()
            ),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> core::error::Error for ObjectError<'_, E> {}

impl<E> From<ParseError> for ObjectError<'_, E> {
    fn from(error: ParseError) -> Self {
        Self::Elf(error)
    }
}

/// Names that end with a zero.
#[derive(Clone, Copy, Debug)]
struct Names<'a>(&'a [u8]);

impl<'a> Names<'a> {
    fn of(file: &File<'a>, section: &SectionHeader) -> Result<Self, ParseError> {
        Ok(Self(file.section_data(section)?.0))
    }

    fn get<E>(self, offset: u32) -> Result<&'a str, ObjectError<'a, E>> {
        let offset = offset as usize;
        let name = self.0.get(offset..).and_then(|rest| {
            let rest = &rest[..rest.len().min(MAX_NAME_BYTES + 1)];
            let end = rest.iter().position(|&byte| byte == 0)?;
            core::str::from_utf8(&rest[..end]).ok()
        });
        name.ok_or(ObjectError::Name { offset })
    }
}

/// A section that has memory.
#[derive(Debug)]
struct Placed<P> {
    place: P,
    bytes: usize,
}

/// An object in memory.
#[derive(Debug)]
pub struct Loaded<'a, P> {
    symbols: SymbolTable<'a, LittleEndian>,
    names: Names<'a>,
    sections: [Option<Placed<P>>; MAX_SECTIONS],
}

impl<'a, P> Loaded<'a, P> {
    /// Loads an object. What it uses must stay where it is as long as it.
    ///
    /// # Errors
    /// [`ObjectError`]; all that was made of it has been dropped.
    pub fn load<H: Home<Place = P>>(
        object: &'a [u8],
        home: &mut H,
    ) -> Result<Self, ObjectError<'a, H::Error>> {
        at_most("bytes", object.len(), MAX_OBJECT_BYTES)?;
        let file = File::minimal_parse(object)?;
        let header = &file.ehdr;
        if header.e_machine != abi::EM_X86_64
            || header.e_type != abi::ET_REL
            || header.class != Class::ELF64
        {
            return Err(ObjectError::Machine {
                machine: header.e_machine,
                file_type: header.e_type,
            });
        }
        let headers = file.section_headers().ok_or(ObjectError::Empty)?;
        at_most("sections", headers.len(), MAX_SECTIONS)?;
        let section_names = Names::of(&file, &headers.get(usize::from(header.e_shstrndx))?)?;
        let (symbols, names) = symbols(&file)?;
        let mut loaded = Self {
            symbols,
            names,
            sections: [const { None }; MAX_SECTIONS],
        };
        for (section, header) in headers.iter().enumerate() {
            let Some(wanted) = wanted(&header, section_names.get(header.sh_name)?) else {
                continue;
            };
            let in_section = |error| ObjectError::Section { section, error };
            let place = home.place(wanted).map_err(in_section)?;
            let bytes = wanted.bytes;
            let placed = loaded.sections[section].insert(Placed { place, bytes });
            if header.sh_type != abi::SHT_NOBITS {
                let contents = file.section_data(&header)?.0;
                placed.write(home, At { section, offset: 0 }, contents)?;
            }
        }
        let mut relocations = 0;
        for header in headers.iter().filter(|it| it.sh_type == abi::SHT_RELA) {
            let section = header.sh_info as usize;
            let Some(Some(placed)) = loaded.sections.get(section) else {
                continue;
            };
            for relocation in file.section_data_as_relas(&header)? {
                relocations += 1;
                at_most("relocations", relocations, MAX_RELOCATIONS)?;
                let offset = relocation.r_offset;
                let at = At { section, offset };
                let symbol = loaded.symbols.get(relocation.r_sym as usize)?;
                let address = loaded.resolve(home, &symbol, at)?;
                let value = (address as i64).wrapping_add(relocation.r_addend);
                let here = home.address(&placed.place).wrapping_add(offset as usize);
                let narrow = |value: i64| {
                    let narrow = i32::try_from(value).map(i32::to_le_bytes);
                    narrow.map_err(|_| ObjectError::OutOfReach {
                        symbol: loaded.name_of::<H>(&symbol),
                        at,
                        place: here,
                        value,
                        limit: i64::from(i32::MAX),
                    })
                };
                match relocation.r_type {
                    abi::R_X86_64_64 => placed.write(home, at, &value.to_le_bytes())?,
                    abi::R_X86_64_PC32 | abi::R_X86_64_PLT32 => {
                        placed.write(home, at, &narrow(value.wrapping_sub(here as i64))?)?;
                    }
                    abi::R_X86_64_32S => placed.write(home, at, &narrow(value)?)?,
                    kind => return Err(ObjectError::Relocation { kind, at }),
                }
            }
        }
        Ok(loaded)
    }

    /// The address of something that the object defines: of a per-CPU variable the handle.
    pub fn symbol<H: Home<Place = P>>(&self, home: &H, name: &str) -> Option<usize> {
        let is_named = |symbol: &Symbol| {
            let own = self.names.get::<H::Error>(symbol.st_name);
            own.is_ok_and(|own| own == name)
        };
        let mut defined = self.symbols.iter().filter(|it| !it.is_undefined());
        self.address_of(home, &defined.find(is_named)?)
    }

    /// The address of a symbol that is defined in a section that has memory.
    fn address_of<H: Home<Place = P>>(&self, home: &H, symbol: &Symbol) -> Option<usize> {
        let section = self.sections.get(usize::from(symbol.st_shndx))?.as_ref()?;
        let start = home.address(&section.place);
        Some(start.wrapping_add(symbol.st_value as usize))
    }

    /// The name of a symbol, as far as it has one.
    fn name_of<H: Home<Place = P>>(&self, symbol: &Symbol) -> &'a str {
        let name = self.names.get::<H::Error>(symbol.st_name).ok();
        name.filter(|name| !name.is_empty()).unwrap_or(NAMELESS)
    }

    fn resolve<H: Home<Place = P>>(
        &self,
        home: &H,
        symbol: &Symbol,
        at: At,
    ) -> Result<usize, ObjectError<'a, H::Error>> {
        if let Some(address) = self.address_of(home, symbol) {
            return Ok(address);
        }
        let name = self.names.get(symbol.st_name)?;
        home.exported(name)
            .ok_or(ObjectError::UnknownSymbol { name, at })
    }
}

impl<P> Placed<P> {
    /// Writes to the section, if it is long enough.
    fn write<'a, H: Home<Place = P>>(
        &self,
        home: &H,
        at: At,
        bytes: &[u8],
    ) -> Result<(), ObjectError<'a, H::Error>> {
        let offset = usize::try_from(at.offset).ok();
        let Some(offset) = offset.filter(|offset| {
            let end = offset.checked_add(bytes.len());
            end.is_some_and(|end| end <= self.bytes)
        }) else {
            let bytes = self.bytes;
            return Err(ObjectError::OutOfSection { at, bytes });
        };
        let section = at.section;
        home.write(&self.place, offset, bytes)
            .map_err(|error| ObjectError::Section { section, error })
    }
}

/// The symbols of an object, and their names.
fn symbols<'a, E>(
    file: &File<'a>,
) -> Result<(SymbolTable<'a, LittleEndian>, Names<'a>), ObjectError<'a, E>> {
    let (symbols, _) = file.symbol_table()?.ok_or(ObjectError::Empty)?;
    at_most("symbols", symbols.len(), MAX_SYMBOLS)?;
    let headers = file.section_headers().ok_or(ObjectError::Empty)?;
    let mut tables = headers.iter().filter(|it| it.sh_type == abi::SHT_SYMTAB);
    let table = tables.next().ok_or(ObjectError::Empty)?;
    let names = Names::of(file, &headers.get(table.sh_link as usize)?)?;
    Ok((symbols, names))
}

/// What a section needs, if anything.
fn wanted(header: &SectionHeader, name: &str) -> Option<Wanted> {
    let (bytes, flags) = (header.sh_size as usize, header.sh_flags as u32);
    let is_needed = flags & abi::SHF_ALLOC != 0 && bytes > 0 && !name.starts_with(".eh_frame");
    is_needed.then(|| Wanted {
        kind: if name.starts_with(PER_CPU) {
            Kind::PerCpu
        } else if flags & abi::SHF_EXECINSTR != 0 {
            Kind::Execute
        } else if flags & abi::SHF_WRITE != 0 {
            Kind::ReadWrite
        } else {
            Kind::Read
        },
        bytes,
        align: header.sh_addralign.max(1) as usize,
    })
}

fn at_most<'a, E>(
    what: &'static str,
    count: usize,
    limit: usize,
) -> Result<(), ObjectError<'a, E>> {
    match count <= limit {
        true => Ok(()),
        false => Err(ObjectError::TooMany { what, count, limit }),
    }
}
