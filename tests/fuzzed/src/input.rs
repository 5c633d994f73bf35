//! Numbers from bytes; zeroes where they end.

/// The bytes that are left.
#[derive(Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&byte, rest)) => {
                self.0 = rest;
                byte
            }
            None => 0,
        }
    }

    /// A number of so many bytes.
    pub fn number(&mut self, bytes: u32) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    /// A number below `end`, of two bytes.
    pub fn below(&mut self, end: usize) -> usize {
        self.number(2) as usize % end
    }

    /// One of some things.
    pub fn one_of<T: Clone>(&mut self, things: &[T]) -> T {
        things[usize::from(self.byte()) % things.len()].clone()
    }

    /// A number that is 64 bits wide, near a power of two, or small.
    pub fn size(&mut self) -> usize {
        match self.byte() {
            kind @ 0..64 => (1_usize << kind).wrapping_add_signed(isize::from(self.byte() as i8)),
            64..72 => self.number(8) as usize,
            72..160 => self.number(2) as usize,
            _ => self.byte().into(),
        }
    }
}
