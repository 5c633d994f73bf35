//! Loadable modules of the kernel, with a home that only counts and checks.

use crate::object::{Home, Kind, Loaded, Wanted};
use std::cell::RefCell;
use std::fmt;

/// The most bytes that the home grants a section, and all of them.
const MAX_BYTES: usize = 1 << 20;

#[derive(Debug)]
struct Arena {
    granted: usize,
}

#[derive(Debug)]
struct Section {
    start: usize,
    bytes: RefCell<Vec<u8>>,
}

/// The home grants no more.
#[derive(Debug)]
struct Full {
    bytes: usize,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, the limit is {MAX_BYTES}", self.bytes)
    }
}

impl Home for Arena {
    type Place = Section;
    type Error = Full;

    fn place(&mut self, wanted: Wanted) -> Result<Section, Full> {
        let Wanted { kind, bytes, align } = wanted;
        assert!(bytes > 0 && align > 0);
        let granted = self.granted.saturating_add(bytes);
        if granted > MAX_BYTES {
            return Err(Full { bytes });
        }
        let start = match kind {
            Kind::PerCpu => 0x1000 + self.granted,
            Kind::Read | Kind::ReadWrite | Kind::Execute => 0x4000_0000 + self.granted,
        };
        self.granted = granted;
        let bytes = RefCell::new(vec![0; bytes]);
        Ok(Section { start, bytes })
    }

    fn address(&self, section: &Section) -> usize {
        section.start
    }

    fn write(&self, section: &Section, offset: usize, bytes: &[u8]) -> Result<(), Full> {
        // It panics if the object loader lets a write out of its section.
        section.bytes.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn exported(&self, name: &str) -> Option<usize> {
        (name == "SHARED_HITS").then_some(0x800)
    }
}

/// Loads the bytes as a module.
pub fn load_object(data: &[u8]) {
    let mut home = Arena { granted: 0 };
    match Loaded::load(data, &mut home) {
        Ok(loaded) => {
            for name in ["counter_hit", "MODULE_HITS", "", "\u{fffd}"] {
                let _ = loaded.symbol(&home, name);
            }
        }
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
}
