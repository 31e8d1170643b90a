//! Reads a pack from its begin to its end, without the index. FORMAT.md, "Packs".
//!
//! Invariants: finds every record whose header is good, even behind damage and blocks of the disk that can't be read;
//! never trusts a length that leads out of the file; what lies behind the last good record is a torn tail, if it can be
//! read. A pack that gets shorter meanwhile ends where it does then.

use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::store::pack::{HEADER_BYTES, PackId, RECORD_BYTES, RECORD_MAGIC, RecordHeader, check_header, read_exact_at};

const WINDOW_BYTES: usize = 256 * 1024;
/// What a disk fails to read at least.
const BLOCK_BYTES: u64 = 4096;

/// What a scan meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A record's header, at this offset. Its bytes lie in the file whole.
    Record(u32, RecordHeader),
    /// Bytes that are no record, in front of more records, or that the disk can't read.
    Damage {
        /// Where they begin.
        from: u64,
        /// Where the next record is, or the end.
        to: u64,
    },
    /// Bytes that are no record, up to the end: what a crash leaves.
    Tail {
        /// Where they begin.
        from: u64,
    },
}

/// Scans one pack.
#[derive(Debug)]
pub(crate) struct PackScan {
    file: File,
    path: PathBuf,
    at: u64,
    end: u64,
    window: Vec<u8>,
    window_at: u64,
    /// Whether a search came upon something that can't be read.
    is_unreadable: bool,
}

/// Where the block behind that of `at` begins.
fn next_block(at: u64) -> u64 {
    (at / BLOCK_BYTES + 1) * BLOCK_BYTES
}

impl PackScan {
    /// Opens pack `id` at `path` and checks its header. One that the disk can't read is passed over: the records say no less.
    pub fn open(id: PackId, path: PathBuf) -> Result<PackScan> {
        let file = File::open(&path).map_err(|e| Error::file("open", &path, e))?;
        let end = file.metadata().map_err(|e| Error::file("look at", &path, e))?.len();
        let at = HEADER_BYTES as u64;
        let mut scan = PackScan { file, path, at, end, window: Vec::new(), window_at: 0, is_unreadable: false };
        let header = scan.bytes(0, HEADER_BYTES)?.to_vec();
        let is_unreadable = header.is_empty() && scan.end > 0;
        if !is_unreadable {
            check_header(&header, id)?;
        }
        Ok(scan)
    }

    /// Up to `count` bytes at `at`; fewer at the end, and in front of what can't be read.
    fn bytes(&mut self, at: u64, count: usize) -> Result<&[u8]> {
        let count = count.min(self.end.saturating_sub(at) as usize);
        let held = self.window_at..self.window_at + self.window.len() as u64;
        if at < held.start || at + count as u64 > held.end {
            self.read_window(at, count)?;
        }
        let start = (at - self.window_at) as usize;
        Ok(&self.window[start..self.window.len().min(start + count)])
    }

    /// Lets the window begin at `at`, with `count` bytes at least if they can be read.
    fn read_window(&mut self, at: u64, count: usize) -> Result<()> {
        self.window_at = at;
        // Records are mostly longer than a header: a window pays when they are small.
        let mut want = WINDOW_BYTES.max(count).min(self.end.saturating_sub(at) as usize);
        loop {
            self.window.resize(want, 0);
            if want == 0 {
                return Ok(());
            }
            let Err(error) = read_exact_at(&self.file, &mut self.window, at) else { return Ok(()) };
            let end_of_block = (next_block(at) - at) as usize;
            want = match error.raw_os_error() {
                _ if error.kind() == ErrorKind::UnexpectedEof => {
                    // Whoever appended to it has taken back what wasn't synced.
                    let end = self.file.metadata().map_err(|e| Error::file("look at", &self.path, e))?.len();
                    if end >= self.end {
                        return Err(Error::file("read", &self.path, error));
                    }
                    self.end = end;
                    want.min(end.saturating_sub(at) as usize)
                }
                Some(libc::EIO) => {
                    if want <= end_of_block {
                        0
                    } else {
                        end_of_block.max(want / 2)
                    }
                }
                _ => return Err(Error::file("read", &self.path, error)),
            };
        }
    }

    /// The header at `at`, if there is one whose record lies in the file whole.
    fn record(&mut self, at: u64) -> Result<Option<RecordHeader>> {
        let bytes = self.bytes(at, RECORD_BYTES)?;
        if bytes.len() < RECORD_BYTES {
            return Ok(None);
        }
        match RecordHeader::decode(bytes) {
            Ok(header) => {
                let fits = at + RECORD_BYTES as u64 + u64::from(header.stored_bytes) <= self.end;
                Ok(Some(header).filter(|_| fits && at <= u64::from(u32::MAX)))
            }
            Err(error @ Error::Unsupported { .. }) => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// The offset of the next good record behind `from`.
    fn search(&mut self, from: u64) -> Result<Option<u64>> {
        let mut at = from + 1;
        while at + RECORD_BYTES as u64 <= self.end {
            let window = self.bytes(at, WINDOW_BYTES)?;
            match window.len() {
                0 => {
                    self.is_unreadable = true;
                    at = next_block(at);
                    continue;
                }
                // In front of a block that can't be read.
                count if count < RECORD_MAGIC.len() => {
                    at += count as u64;
                    continue;
                }
                _ => {}
            }
            match window.windows(4).position(|four| four == RECORD_MAGIC) {
                Some(position) => {
                    at += position as u64;
                    if self.record(at)?.is_some() {
                        return Ok(Some(at));
                    }
                    at += 1;
                }
                None => at += (window.len() - 3) as u64,
            }
        }
        Ok(None)
    }

    fn step(&mut self) -> Result<Found> {
        let from = self.at;
        self.is_unreadable = false;
        if let Some(header) = self.record(from)? {
            self.at += RECORD_BYTES as u64 + u64::from(header.stored_bytes);
            return Ok(Found::Record(from as u32, header));
        }
        match self.search(from)? {
            Some(to) => {
                self.at = to;
                Ok(Found::Damage { from, to })
            }
            None => {
                self.at = self.end;
                let to = self.end;
                Ok(if self.is_unreadable { Found::Damage { from, to } } else { Found::Tail { from } })
            }
        }
    }
}

impl Iterator for PackScan {
    type Item = Result<Found>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let found = self.step();
        if found.is_err() {
            self.at = self.end;
        }
        Some(found)
    }
}
