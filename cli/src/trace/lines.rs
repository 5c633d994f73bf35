//! Lines of a trace, plain or gzip, in bounded memory.
//!
//! A line is at most [`MAX_LINE_BYTES`] long, a text [`MAX_TEXT_BYTES`], unpacked: a file of a megabyte may unpack to a
//! thousand of them, but not to more than that, and only a line of it is held at a time.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use crate::error::CliError;

/// The longest line that is read; a kernel's are a few hundred bytes.
pub const MAX_LINE_BYTES: usize = 64 << 10;

/// The longest text that is read, unpacked; the longest of the recorded traces is 20 MB.
pub const MAX_TEXT_BYTES: u64 = 4 << 30;

/// What a gzip file begins with.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The lines of a trace, one at a time.
pub struct Lines {
    reader: Box<dyn BufRead>,
    line: Vec<u8>,
    number: u64,
    /// Bytes that may still be read.
    left_bytes: u64,
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines")
            .field("number", &self.number)
            .field("left_bytes", &self.left_bytes)
            .finish_non_exhaustive()
    }
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
    pub fn of_bytes(name: &str, bytes: impl AsRef<[u8]> + 'static) -> Result<Self, CliError> {
        Self::of(name, io::Cursor::new(bytes))
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
            left_bytes: MAX_TEXT_BYTES,
        })
    }

    /// The next line, without its end; bytes that are no text are replaced.
    ///
    /// # Errors
    /// One line that names the file: it can't be read, ends too early, or the line or the text is too long.
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
        let Some(left_bytes) = self.left_bytes.checked_sub(read as u64) else {
            return Err(CliError::Input(format!(
                "{name}:{}: the trace is longer than {MAX_TEXT_BYTES} bytes",
                self.number
            )));
        };
        self.left_bytes = left_bytes;
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

#[cfg(test)]
mod tests {
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    use super::*;

    fn error(lines: &mut Lines) -> String {
        loop {
            match lines.next("t") {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the end"),
                Err(error) => return error.to_string(),
            }
        }
    }

    /// What unpacks to a gigabyte takes the memory of a line, and ends at a limit.
    #[test]
    fn a_little_gzip_is_no_long_text() {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        let comments = "#\n".repeat(1 << 20);
        for _ in 0..4 {
            gzip.write_all(comments.as_bytes()).unwrap();
        }
        let bomb = gzip.finish().unwrap();
        assert!(bomb.len() < 20_000);
        let mut lines = Lines::of_bytes("t", bomb.clone()).unwrap();
        lines.left_bytes = 1 << 20;
        let told = format!(
            "t:{}: the trace is longer than {MAX_TEXT_BYTES} bytes",
            (1 << 19) + 1
        );
        assert_eq!(error(&mut lines), told);
        // The same as one line.
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        gzip.write_all(&vec![b'x'; 4 << 20]).unwrap();
        let mut lines = Lines::of_bytes("t", gzip.finish().unwrap()).unwrap();
        let told = format!("t:1: the line is longer than {MAX_LINE_BYTES} bytes");
        assert_eq!(error(&mut lines), told);
        assert!(lines.line.capacity() <= 4 * MAX_LINE_BYTES);
    }

    /// Members of a gzip file follow each other, also empty ones.
    #[test]
    fn empty_members_are_passed_over() {
        let empty = GzEncoder::new(Vec::new(), Compression::best());
        let empty = empty.finish().unwrap();
        let mut last = GzEncoder::new(Vec::new(), Compression::best());
        last.write_all(b"# end").unwrap();
        let mut bytes = empty.repeat(20_000);
        bytes.extend(last.finish().unwrap());
        let mut lines = Lines::of_bytes("t", bytes).unwrap();
        assert_eq!(lines.next("t").unwrap().as_deref(), Some("# end"));
        assert!(lines.next("t").unwrap().is_none());
    }
}
