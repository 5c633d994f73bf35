//! Loadable modules of the kernel, with a home that only counts and checks.

use crate::object::{Home, Kind, Loaded, Wanted};
use std::cell::RefCell;
use std::fmt;
use std::rc::{Rc, Weak};

/// The most bytes that a home grants a section, and all of them.
const MAX_BYTES: usize = 1 << 20;

/// Where code and handles begin: close together, with the code out of the reach of 32 bits, and both at the ends of addresses.
const HOMES: &[(usize, usize)] = &[
    (0x4000_0000, 0),
    (1 << 40, 0),
    (usize::MAX - MAX_BYTES, 1 << 33),
];

/// A home for sections, which it forgets when they are dropped.
#[derive(Debug)]
pub struct Arena {
    code: usize,
    handles: usize,
    granted: usize,
    sections: Vec<Weak<Section>>,
}

/// The memory of a section.
#[derive(Debug)]
pub struct Section {
    start: usize,
    bytes: RefCell<Vec<u8>>,
}

/// The home grants no more.
#[derive(Debug)]
pub struct Full {
    bytes: usize,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, the limit is {MAX_BYTES}", self.bytes)
    }
}

impl Arena {
    /// A home whose code and data begin at one address, and its handles at another.
    pub fn new(code: usize, handles: usize) -> Self {
        Self {
            code,
            handles,
            granted: 0,
            sections: Vec::new(),
        }
    }

    /// The sections that are there.
    pub fn sections(&self) -> impl Iterator<Item = Rc<Section>> {
        self.sections.iter().filter_map(Weak::upgrade)
    }

    /// The word that lies at an address.
    pub fn word(&self, address: usize) -> Option<u64> {
        self.sections().find_map(|section| {
            let offset = address.checked_sub(section.start)?;
            let bytes = section.bytes.borrow();
            let word = bytes.get(offset..)?.first_chunk()?;
            Some(u64::from_le_bytes(*word))
        })
    }
}

impl Home for Arena {
    type Place = Rc<Section>;
    type Error = Full;

    fn place(&mut self, wanted: Wanted) -> Result<Rc<Section>, Full> {
        let Wanted { kind, bytes, align } = wanted;
        assert!(bytes > 0 && align > 0);
        let granted = self.granted.saturating_add(bytes);
        if granted > MAX_BYTES {
            return Err(Full { bytes });
        }
        let start = match kind {
            Kind::PerCpu => self.handles + 0x1000 + self.granted,
            Kind::Read | Kind::ReadWrite | Kind::Execute => self.code + self.granted,
        };
        self.granted = granted;
        let bytes = RefCell::new(vec![0; bytes]);
        let section = Rc::new(Section { start, bytes });
        self.sections.push(Rc::downgrade(&section));
        Ok(section)
    }

    fn address(&self, section: &Rc<Section>) -> usize {
        section.start
    }

    fn write(&self, section: &Rc<Section>, offset: usize, bytes: &[u8]) -> Result<(), Full> {
        // It panics if the object loader lets a write out of its section.
        section.bytes.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn exported(&self, name: &str) -> Option<usize> {
        match name {
            "SHARED_HITS" => Some(self.handles + 0x800),
            "MODULE_HITS" => Some(self.handles + 0x900),
            _ => None,
        }
    }
}

/// Loads the bytes as a module, near the handles and far away.
pub fn load_object(data: &[u8]) {
    for &(code, handles) in HOMES {
        let mut home = Arena::new(code, handles);
        match Loaded::load(data, &mut home) {
            Ok(loaded) => {
                for name in ["counter_hit", "MODULE_HITS", "", "\u{fffd}"] {
                    let _ = loaded.symbol(&home, name);
                }
            }
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        }
        assert_eq!(home.sections().count(), 0, "something is left of it");
    }
}
