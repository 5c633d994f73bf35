//! Lines of a trace, plain or gzip, in bounded memory.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use crate::error::CliError;

/// The longest line that is read; a kernel's are a few hundred bytes.
const MAX_LINE_BYTES: usize = 64 << 10;

/// What a gzip file begins with.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The lines of a trace, one at a time.
pub struct Lines {
    reader: Box<dyn BufRead>,
    line: Vec<u8>,
    number: u64,
}

impl Lines {
    /// Opens the trace at `path`.
    ///
    /// # Errors
    /// One line that names the file.
    pub fn open(path: &Path) -> Result<Self, CliError> {
        let name = path.display();
        let file = File::open(path)
            .map_err(|error| CliError::Input(format!("cannot open {name}: {error}")))?;
        Self::of(&name.to_string(), BufReader::new(file))
    }

    /// A trace in memory.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn of_bytes(name: &str, bytes: &'static [u8]) -> Result<Self, CliError> {
        Self::of(name, bytes)
    }

    fn of(name: &str, mut reader: impl BufRead + 'static) -> Result<Self, CliError> {
        let mut start = Vec::new();
        reader
            .by_ref()
            .take(GZIP_MAGIC.len() as u64)
            .read_to_end(&mut start)
            .map_err(|error| read_error(name, &error))?;
        let is_gzip = start == GZIP_MAGIC;
        let whole = io::Cursor::new(start).chain(reader);
        Ok(Self {
            reader: if is_gzip {
                Box::new(BufReader::new(MultiGzDecoder::new(whole)))
            } else {
                Box::new(whole)
            },
            line: Vec::new(),
            number: 0,
        })
    }

    /// The next line, without its end; bytes that are no text are replaced.
    ///
    /// # Errors
    /// One line that names the file: it can't be read, ends too early, or the line is too long.
    pub fn next(&mut self, name: &str) -> Result<Option<Cow<'_, str>>, CliError> {
        self.line.clear();
        self.number += 1;
        let read = self
            .reader
            .by_ref()
            .take(MAX_LINE_BYTES as u64 + 1)
            .read_until(b'\n', &mut self.line)
            .map_err(|error| read_error(name, &error))?;
        if read == 0 {
            return Ok(None);
        }
        if self.line.last() == Some(&b'\n') {
            self.line.pop();
        }
        if self.line.len() > MAX_LINE_BYTES {
            return Err(CliError::Input(format!(
                "{name}:{}: the line is longer than {MAX_LINE_BYTES} bytes",
                self.number
            )));
        }
        Ok(Some(String::from_utf8_lossy(&self.line)))
    }
}

fn read_error(name: &str, error: &io::Error) -> CliError {
    CliError::Input(match error.kind() {
        io::ErrorKind::UnexpectedEof => format!("{name}: the gzip data ends too early"),
        _ => format!("cannot read {name}: {error}"),
    })
}
