//! Reads a pack from its begin to its end, without the index. FORMAT.md, "Packs".
//!
//! Invariants: finds every record whose header is good, even behind damage; never trusts a length that leads out
//! of the file; what lies behind the last good record is a torn tail.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::store::pack::{HEADER_BYTES, PackId, RECORD_BYTES, RECORD_MAGIC, RecordHeader, check_header};

const WINDOW_BYTES: usize = 256 * 1024;

/// What a scan meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A record's header, at this offset. Its bytes lie in the file whole.
    Record(u32, RecordHeader),
    /// Bytes that are no record, in front of more records.
    Damage {
        /// Where they begin.
        from: u64,
        /// Where the next record is.
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
}

impl PackScan {
    /// Opens pack `id` at `path` and checks its header.
    pub fn open(id: PackId, path: PathBuf) -> Result<PackScan> {
        let file = File::open(&path).map_err(|e| Error::file("open", &path, e))?;
        let end = file.metadata().map_err(|e| Error::file("look at", &path, e))?.len();
        let mut scan = PackScan { file, path, at: HEADER_BYTES as u64, end, window: Vec::new(), window_at: 0 };
        let header = scan.bytes(0, HEADER_BYTES)?.to_vec();
        check_header(&header, id)?;
        Ok(scan)
    }

    /// Up to `count` bytes at `at`; fewer at the end.
    fn bytes(&mut self, at: u64, count: usize) -> Result<&[u8]> {
        let count = count.min(self.end.saturating_sub(at) as usize);
        let held = self.window_at..self.window_at + self.window.len() as u64;
        if at < held.start || at + count as u64 > held.end {
            // Records are mostly longer than a header: a window pays when they are small.
            let want = WINDOW_BYTES.max(count).min(self.end.saturating_sub(at) as usize);
            self.window.resize(want, 0);
            self.window_at = at;
            self.file.read_exact_at(&mut self.window, at).map_err(|e| Error::file("read", &self.path, e))?;
        }
        let start = (at - self.window_at) as usize;
        Ok(&self.window[start..start + count])
    }

    /// The header at `at`, if there is one whose record lies in the file whole.
    fn record(&mut self, at: u64) -> Result<Option<RecordHeader>> {
        let end = self.end;
        let bytes = self.bytes(at, RECORD_BYTES)?;
        if bytes.len() < RECORD_BYTES {
            return Ok(None);
        }
        match RecordHeader::decode(bytes) {
            Ok(header) => {
                let fits = at + RECORD_BYTES as u64 + u64::from(header.stored_bytes) <= end;
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
                Ok(Found::Tail { from })
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
