//! The data of files that were copied up by range: where each byte is, and what a change makes of the map.
//!
//! Invariants: a granule becomes the upper's only when all its bytes are in the data file, and before whoever wrote it
//! hears of it; what lies behind the bytes that show through from below is the upper's without an entry in the map.
//! Whoever changes a file holds its stripe; a reader holds nothing, and reads again if the map was taken away under it.

use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::super::errno::{Errno, FsResult, fail};
use super::Fs;
use super::files::{read_file, write_file};
use crate::chunk::ChunkRead;
use crate::content::{self, Content, Extent, Extents};
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::readahead::FileReader;
use crate::splice::Changed;
use crate::store::{Source, SourcePiece};
use crate::upper::Upper;
use crate::upper::ranges::{GRANULE, Leaf, RangeMap, by_leaf, touching};
use crate::upper::table::{Change, Tables};

/// The most leaves of a map that are committed at once.
const LEAVES_AT_ONCE: usize = 1024;
/// The most bytes that a seal reads of one at a time.
const READ_MAX: u64 = 256 * 1024;

/// A file that was copied up by range, as it is at one moment.
pub(super) struct Ranged {
    /// The sealed file.
    pub base: Arc<FileReader>,
    /// How much of it shows through.
    pub base_bytes: u64,
    /// The file's length.
    pub bytes: u64,
    /// What is the upper's.
    pub map: Arc<RangeMap>,
}

/// How a piece of a write went: how many bytes of it were written, and what ended it early.
type Piece = (usize, Option<Errno>);

impl Ranged {
    /// The end of the granules that the map tells of.
    pub fn map_end(&self) -> u64 {
        self.base_bytes.next_multiple_of(GRANULE)
    }

    /// Whether byte `at` is the upper's, and up to where that holds, but at most to `end`.
    pub fn run(&self, at: u64, end: u64) -> (bool, u64) {
        let map_end = self.map_end();
        if at >= map_end {
            return (true, end);
        }
        match self.map.run(at, end.min(map_end)) {
            (true, until) if until == map_end => (true, end.max(until)),
            found => found,
        }
    }

    /// Reads up to `buffer.len()` bytes at `offset`.
    pub fn read(&self, file: &File, offset: u64, buffer: &mut [u8]) -> FsResult<usize> {
        let count = (buffer.len() as u64).min(self.bytes.saturating_sub(offset)) as usize;
        let (mut at, end) = (offset, offset + count as u64);
        while at < end {
            let (ours, until) = self.run(at, end);
            let target = &mut buffer[(at - offset) as usize..(until - offset) as usize];
            let there = if ours { read_file(file, at, target)? } else { self.read_base(at, target)? };
            target[there..].fill(0);
            at = until;
        }
        Ok(count)
    }

    fn read_base(&self, at: u64, buffer: &mut [u8]) -> FsResult<usize> {
        let count = (buffer.len() as u64).min(self.base_bytes.saturating_sub(at)) as usize;
        Ok(self.base.read_at(at, &mut buffer[..count])?)
    }

    /// Where `SEEK_DATA` (if `data`) or `SEEK_HOLE` leads from `offset`.
    pub fn seek(&self, chunks: &dyn ChunkRead, file: &File, offset: u64, data: bool) -> FsResult<u64> {
        if offset >= self.bytes {
            return fail(libc::ENXIO);
        }
        let mut at = offset;
        while at < self.bytes {
            let (ours, until) = self.run(at, self.bytes);
            let found = if ours { seek_file(file, at, until, data)? } else { self.seek_base(chunks, at, until, data)? };
            if let Some(found) = found {
                return Ok(found);
            }
            at = until;
        }
        if data { fail(libc::ENXIO) } else { Ok(self.bytes) }
    }

    fn seek_base(&self, chunks: &dyn ChunkRead, at: u64, until: u64, data: bool) -> FsResult<Option<u64>> {
        let shown = until.min(self.base_bytes);
        for next in Extents::new(chunks, self.base.content(), at)? {
            let (start, extent) = next?;
            let start = start.max(at);
            if start >= shown {
                break;
            }
            if matches!(extent, Extent::Chunk { .. }) == data {
                return Ok(Some(start));
            }
        }
        let behind = shown.max(at);
        Ok((behind < until && !data).then_some(behind))
    }
}

/// The blocks of a data file that allocates `own`, over `base_bytes` of data that show through but for `map`.
pub(super) fn blocks(base_bytes: u64, map: &RangeMap, own: u64) -> u64 {
    own + base_bytes.saturating_sub(map.count() * GRANULE).div_ceil(512)
}

/// The first byte of data (or of a hole) of `file` between `at` and `until`.
pub(super) fn seek_file(file: &File, at: u64, until: u64, data: bool) -> FsResult<Option<u64>> {
    use rustix::fs::SeekFrom;
    match rustix::fs::seek(file, if data { SeekFrom::Data(at) } else { SeekFrom::Hole(at) }) {
        Ok(found) => Ok((found < until).then_some(found)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// A file that was copied up by range, for sealing.
pub struct ChangedFile {
    ranged: Ranged,
    chunks: Arc<dyn ChunkRead>,
    file: File,
    path: PathBuf,
    /// Where [`Source::next`] is.
    at: u64,
}

impl ChangedFile {
    pub(super) fn new(ranged: Ranged, chunks: Arc<dyn ChunkRead>, (file, path): (File, PathBuf)) -> ChangedFile {
        ChangedFile { ranged, chunks, file, path, at: 0 }
    }

    /// What it was before.
    pub fn before(&self) -> &Content {
        self.ranged.base.content()
    }

    /// How much of it is the upper's, in bytes, at most.
    pub fn changed_bytes(&self) -> u64 {
        (self.ranged.map.count() * GRANULE + self.ranged.bytes.saturating_sub(self.ranged.base_bytes))
            .min(self.ranged.bytes)
    }

    fn read_own(&self, at: u64, until: u64, buffer: &mut [u8]) -> Result<SourcePiece> {
        let failed = |errno: Errno| Error::file("read", &self.path, std::io::Error::from_raw_os_error(errno.0));
        let start = seek_file(&self.file, at, until, true).map_err(failed)?.unwrap_or(until);
        if start > at {
            return Ok(SourcePiece::Hole(start - at));
        }
        let end = seek_file(&self.file, at, until, false).map_err(failed)?.unwrap_or(until);
        let target = &mut buffer[..((end - at).min(READ_MAX)) as usize];
        let count = read_file(&self.file, at, target).map_err(failed)?;
        target[count..].fill(0);
        Ok(SourcePiece::Data(target.len()))
    }

    fn read_below(&self, at: u64, until: u64, buffer: &mut [u8]) -> Result<SourcePiece> {
        let until = until.min(self.ranged.base_bytes);
        let content = self.ranged.base.content();
        if let Some(next) = Extents::new(&*self.chunks, content, at)?.next() {
            let (start, extent) = next?;
            if matches!(extent, Extent::Hole { .. }) {
                return Ok(SourcePiece::Hole((start + extent.len()).min(until) - at));
            }
        }
        let count = (until - at).min(READ_MAX).min(buffer.len() as u64) as usize;
        content::read_at(&*self.chunks, content, at, &mut buffer[..count]).map(SourcePiece::Data)
    }
}

impl Changed for ChangedFile {
    fn len(&self) -> u64 {
        self.ranged.bytes
    }

    fn is_clean(&self, from: u64, to: u64) -> bool {
        to <= self.ranged.base_bytes && self.ranged.map.is_clean(from, to)
    }

    fn read(&mut self, at: u64, buffer: &mut [u8]) -> Result<SourcePiece> {
        if at >= self.ranged.bytes {
            return Ok(SourcePiece::End);
        }
        match self.ranged.run(at, self.ranged.bytes) {
            (true, until) => self.read_own(at, until.min(at + buffer.len() as u64), buffer),
            // The last granule that shows through is zero behind it.
            (false, until) if at >= self.ranged.base_bytes => Ok(SourcePiece::Hole(until - at)),
            (false, until) => self.read_below(at, until, buffer),
        }
    }
}

impl Source for ChangedFile {
    fn next(&mut self, buffer: &mut [u8]) -> Result<SourcePiece> {
        let piece = self.read(self.at, buffer)?;
        self.at += match piece {
            SourcePiece::Data(count) => count as u64,
            SourcePiece::Hole(bytes) => bytes,
            SourcePiece::End => 0,
        };
        Ok(piece)
    }
}

impl Fs {
    /// Reads from a file that was copied up by range; none if it is so no more.
    pub(super) fn read_ranged(
        &self,
        upper: &Upper,
        ino: Ino,
        ranged: &Ranged,
        offset: u64,
        buffer: &mut [u8],
    ) -> FsResult<Option<usize>> {
        let is_current = || upper.data().map(ino).is_some_and(|map| Arc::ptr_eq(&map, &ranged.map));
        let result = match upper.data().file(ino) {
            Ok(file) => ranged.read(&file, offset, buffer),
            Err(error) => Err(error.into()),
        };
        if is_current() { result.map(Some) } else { Ok(None) }
    }

    /// Writes into a file that was copied up by range, whose stripe is held.
    pub(super) fn write_ranged(
        &self,
        upper: &Upper,
        ino: Ino,
        ranged: &Ranged,
        offset: u64,
        data: &[u8],
    ) -> FsResult<Piece> {
        let file = upper.data().file(ino)?;
        let end = offset + data.len() as u64;
        let mut done = 0;
        let mut failure = None;
        while done < data.len() && failure.is_none() {
            let at = offset + done as u64;
            let until = self.piece_end(ranged, at, end);
            let piece = &data[done..(until - offset) as usize];
            let (count, error) = match until - at < GRANULE && self.needs_old(ranged, at, until) {
                true => self.compose(upper, ino, ranged, &file, at, piece),
                false => self.write_whole(upper, ino, ranged, &file, at, piece),
            };
            done += count;
            failure = error;
        }
        if failure.is_some() {
            // Rather than a length that nobody wrote.
            let length = ranged.bytes.max(offset + done as u64);
            if file.metadata().is_ok_and(|stat| stat.len() > length) {
                let _ = file.set_len(length);
            }
        }
        Ok((done, failure))
    }

    /// Where the piece of a write that begins at `at` ends: a granule that needs its old bytes is a piece of its own.
    fn piece_end(&self, ranged: &Ranged, at: u64, end: u64) -> u64 {
        let first_end = (at / GRANULE + 1) * GRANULE;
        if self.needs_old(ranged, at, first_end.min(end)) {
            return first_end.min(end);
        }
        let last = end / GRANULE * GRANULE;
        if last > at && last < end && self.needs_old(ranged, last, end) { last } else { end }
    }

    /// Whether a write of the bytes from `at` to `end`, which lie in one granule, needs the granule's other bytes.
    fn needs_old(&self, ranged: &Ranged, at: u64, end: u64) -> bool {
        let start = at / GRANULE * GRANULE;
        let is_whole = at == start && (end == start + GRANULE || end >= ranged.bytes);
        !is_whole && !ranged.run(at, end).0
    }

    /// Writes a piece that is whole granules, or lies in granules that are the upper's.
    fn write_whole(&self, upper: &Upper, ino: Ino, ranged: &Ranged, file: &File, at: u64, piece: &[u8]) -> Piece {
        let (mut count, mut failure) = write_file(file, at, piece);
        let end = at + count as u64;
        let is_whole = count == piece.len();
        let granules = touching(at..end.min(ranged.map_end()).max(at));
        // Of a write that was cut off the last granule isn't whole.
        let marked =
            if is_whole { granules } else { granules.start..(end / GRANULE).clamp(granules.start, granules.end) };
        if !is_whole && !ranged.run(end.saturating_sub(1).max(at), end).0 {
            count = ((marked.end * GRANULE).saturating_sub(at) as usize).min(count);
        }
        if let Err(error) = upper.data().mark(ino, &ranged.map, marked) {
            (count, failure) = (0, Some(error.into()));
        }
        (count, failure)
    }

    /// Writes a piece of one granule that isn't the upper's yet, along with the granule's other bytes.
    fn compose(&self, upper: &Upper, ino: Ino, ranged: &Ranged, file: &File, at: u64, piece: &[u8]) -> Piece {
        let start = at / GRANULE * GRANULE;
        let end = (start + GRANULE).min(ranged.bytes.max(at + piece.len() as u64));
        let mut granule = vec![0; (end - start) as usize];
        if let Err(errno) = ranged.read(file, start, &mut granule) {
            return (0, Some(errno));
        }
        granule[(at - start) as usize..][..piece.len()].copy_from_slice(piece);
        match write_file(file, start, &granule) {
            (_, Some(errno)) => (0, Some(errno)),
            _ => match upper.data().mark(ino, &ranged.map, start / GRANULE..start / GRANULE + 1) {
                Ok(()) => (piece.len(), None),
                Err(error) => (0, Some(error.into())),
            },
        }
    }

    /// `fallocate` for a file that was copied up by range, whose stripe is held. Whether its data file has changed.
    pub(super) fn allocate_ranged(
        &self,
        upper: &Upper,
        ino: Ino,
        ranged: &Ranged,
        mode: i32,
        range: Range<u64>,
    ) -> FsResult<bool> {
        if mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0 {
            upper.data().allocate(ino, mode, range.start, range.end - range.start)?;
            return self.zero_ranged(upper, ino, ranged, range).map(|()| true);
        }
        // What shows through is nobody's to reserve space for; it is there, as far as anybody can read.
        let start = range.start.max(ranged.map_end());
        if start < range.end {
            upper.data().allocate(ino, mode, start, range.end - start)?;
        } else if mode & libc::FALLOC_FL_KEEP_SIZE == 0 && range.end > ranged.bytes {
            upper.data().set_len(ino, range.end)?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// What shows through in `range` is zero from now on; the data file has no bytes there.
    fn zero_ranged(&self, upper: &Upper, ino: Ino, ranged: &Ranged, range: Range<u64>) -> FsResult<()> {
        let file = upper.data().file(ino)?;
        let range = range.start..range.end.min(ranged.base_bytes);
        if range.is_empty() {
            return Ok(());
        }
        let zeros = [0; GRANULE as usize];
        let first = range.start.div_ceil(GRANULE);
        // Behind the bytes that show through the last granule is zero anyway.
        let last = if range.end == ranged.base_bytes { range.end.div_ceil(GRANULE) } else { range.end / GRANULE };
        let head = range.start..(first * GRANULE).min(range.end);
        let tail = (last * GRANULE).max(head.end)..range.end;
        for edge in [head, tail] {
            if !edge.is_empty() && !ranged.run(edge.start, edge.end).0 {
                let piece = &zeros[..(edge.end - edge.start) as usize];
                if let (_, Some(errno)) = self.compose(upper, ino, ranged, &file, edge.start, piece) {
                    return Err(errno);
                }
            }
        }
        self.mark_zeroed(upper, ino, ranged, first..last)
    }

    /// `granules`, of which the data file has no bytes, are the upper's: at once in rows, as there is nothing to wait for.
    fn mark_zeroed(&self, upper: &Upper, ino: Ino, ranged: &Ranged, granules: Range<u64>) -> FsResult<()> {
        let mut leaves = by_leaf(granules).peekable();
        while leaves.peek().is_some() {
            let mut state = self.state.write();
            let mut rows = Vec::new();
            for (index, part) in leaves.by_ref().take(LEAVES_AT_ONCE) {
                rows.extend(ranged.map.row_with_range(index, part).map(|row| (index, row)));
            }
            save_rows(upper, &mut state.tables, ino, &ranged.map, rows)?;
        }
        Ok(())
    }

    /// Makes durable what is the upper's of `ino`, once `sync` has made its data so.
    pub(super) fn sync_ranged(
        &self,
        upper: &Upper,
        ino: Ino,
        map: &Arc<RangeMap>,
        sync: impl FnOnce() -> Result<()>,
    ) -> FsResult<()> {
        // What is added from here on may not be on the disk afterwards.
        let leaves = map.unsaved();
        sync()?;
        for part in leaves.chunks(LEAVES_AT_ONCE) {
            let mut state = self.state.write();
            if !upper.data().map(ino).is_some_and(|now| Arc::ptr_eq(&now, map)) {
                break;
            }
            let rows = part.iter().filter_map(|(index, leaf)| Some((*index, map.row_with(*index, leaf)?)));
            save_rows(upper, &mut state.tables, ino, map, rows.collect())?;
        }
        Ok(())
    }
}

/// Writes rows of a map. `tables` are locked, so that nobody else does.
fn save_rows(upper: &Upper, tables: &mut Tables, ino: Ino, map: &RangeMap, rows: Vec<(u64, Leaf)>) -> Result<()> {
    let mut change = Change::new();
    rows.iter().for_each(|(index, row)| change.leaf(ino, *index, Some(row.clone())));
    upper.commit(tables, change)?;
    rows.into_iter().for_each(|(index, row)| map.saved(index, row));
    Ok(())
}
