//! Where file content comes from on its way into the store.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom;

use crate::error::{Error, Result};

/// What a [`Source`] yields next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourcePiece {
    /// So many bytes now stand at the buffer's start (at least one).
    Data(usize),
    /// So many zero bytes follow, which weren't read.
    Hole(u64),
    /// That was all.
    End,
}

/// A file's content, in order.
pub trait Source {
    /// The next piece; `buffer` isn't empty.
    fn next(&mut self, buffer: &mut [u8]) -> Result<SourcePiece>;
}

/// Reads a stream to its end.
#[derive(Debug)]
pub struct ReadSource<R>(pub R);

impl<R: Read> Source for ReadSource<R> {
    fn next(&mut self, buffer: &mut [u8]) -> Result<SourcePiece> {
        loop {
            match self.0.read(buffer) {
                Ok(0) => return Ok(SourcePiece::End),
                Ok(count) => return Ok(SourcePiece::Data(count)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("reading the input", e)),
            }
        }
    }
}

/// Reads a file of the host, skipping its holes. Its length is what it was at the start; a file that shrinks
/// meanwhile ends early.
#[derive(Debug)]
pub struct FileSource<'a> {
    file: &'a File,
    path: PathBuf,
    at: u64,
    /// Up to here there is no hole.
    data_end: u64,
    end: u64,
    is_sparse: bool,
    /// Where its data is, if that need not be asked for.
    data: Option<Vec<Range<u64>>>,
}

impl<'a> FileSource<'a> {
    /// Reads `file`, which lies at `path`.
    pub fn new(file: &'a File, path: &Path) -> Result<FileSource<'a>> {
        let metadata = file.metadata().map_err(|e| Error::file("look at", path, e))?;
        let end = metadata.len();
        let is_sparse = metadata.blocks().saturating_mul(512) < end;
        let data_end = if is_sparse { 0 } else { end };
        Ok(FileSource { file, path: path.to_owned(), at: 0, data_end, end, is_sparse, data: None })
    }

    /// Doesn't look for holes: all data is in `data`, in order; if that isn't known, holes are read as the zeros that they are.
    #[must_use]
    pub fn without_seeking(self, data: Option<Vec<Range<u64>>>) -> FileSource<'a> {
        let is_sparse = self.is_sparse && data.is_some();
        let data_end = if is_sparse { 0 } else { self.end };
        FileSource { is_sparse, data_end, data, ..self }
    }

    /// Finds where data begins and ends from `at` on. Returns where it begins.
    fn seek_data(&mut self) -> Result<u64> {
        if let Some(data) = &self.data {
            let next = data.iter().find(|range| range.end > self.at);
            let range = next.map_or(self.end..self.end, |range| range.start.max(self.at)..range.end.min(self.end));
            self.data_end = range.end;
            return Ok(range.start.min(self.end));
        }
        let failed = |e| Error::file("seek in", &self.path, e);
        let start = match rustix::fs::seek(self.file, SeekFrom::Data(self.at)) {
            Ok(start) => start.min(self.end),
            Err(rustix::io::Errno::NXIO) => self.end,
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOTSUP) => {
                self.is_sparse = false;
                self.data_end = self.end;
                return Ok(self.at);
            }
            Err(e) => return Err(failed(e)),
        };
        if start < self.end {
            self.data_end = match rustix::fs::seek(self.file, SeekFrom::Hole(start)) {
                Ok(hole) => hole.min(self.end),
                // It has just become shorter.
                Err(rustix::io::Errno::NXIO) => self.end,
                Err(errno) => return Err(failed(errno)),
            };
        }
        Ok(start)
    }
}

impl Source for FileSource<'_> {
    fn next(&mut self, buffer: &mut [u8]) -> Result<SourcePiece> {
        if self.at >= self.end {
            return Ok(SourcePiece::End);
        }
        if self.is_sparse && self.at >= self.data_end {
            let start = self.seek_data()?;
            if start > self.at {
                let bytes = start - self.at;
                self.at = start;
                return Ok(SourcePiece::Hole(bytes));
            }
        }
        let want = (self.data_end - self.at).min(buffer.len() as u64) as usize;
        let count = read_some(self.file, &mut buffer[..want], self.at, || self.path.clone())?;
        self.at = if count == 0 { self.end } else { self.at + count as u64 };
        Ok(if count == 0 { SourcePiece::End } else { SourcePiece::Data(count) })
    }
}

/// Reads what there is of `file`, which lies at `path`, at byte `at`; returns how much that was, 0 at the end.
pub(crate) fn read_some(file: &File, buffer: &mut [u8], at: u64, path: impl Fn() -> PathBuf) -> Result<usize> {
    loop {
        match file.read_at(buffer, at) {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            result => return result.map_err(|e| Error::file("read", path(), e)),
        }
    }
}
