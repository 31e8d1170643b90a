//! Streams the records of a layer's table off its chunks, without ever holding the table.
//!
//! Hides that a record may be split over chunks. Memory: one chunk, or one record if it is longer than that.
//! Invariants: a table holds no holes; no record is longer than [`MAX_RECORD_BYTES`].

use std::ops::Range;

use bytes::Bytes;

use crate::chunk::ChunkRead;
use crate::codec::Reader;
use crate::content::{Content, Extent, Extents, get_sized};
use crate::error::{Error, Result};
use crate::inode::{DentryRef, Inode};

/// The longest record of a table, in bytes: an inode with all the extended attributes that it may carry.
pub const MAX_RECORD_BYTES: usize = 16 * 1024 * 1024;
/// Bytes of the shortest dentry record: the fixed part and a name of one byte.
pub const MIN_DENTRY_BYTES: u64 = 19;
/// Bytes of the shortest inode record: length, the fixed part and no extended attribute.
pub const MIN_INODE_BYTES: u64 = 66;

/// Which of a layer's two tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Dentries,
    Inodes,
}

impl Kind {
    fn what(self) -> &'static str {
        match self {
            Kind::Dentries => "dentry table",
            Kind::Inodes => "inode table",
        }
    }

    /// The whole length of the record that starts with `head`, or how many bytes it takes to tell.
    fn record_bytes(self, head: &[u8]) -> Result<usize, usize> {
        match self {
            Kind::Dentries => head.get(17).map(|name| 18 + usize::from(*name)).ok_or(18),
            Kind::Inodes => match head.first_chunk::<4>() {
                Some(length) => Ok((u32::from_le_bytes(*length) as usize).saturating_add(4)),
                None => Err(4),
            },
        }
    }
}

/// The raw records of one table, in order.
pub struct Records<'a> {
    kind: Kind,
    chunks: &'a dyn ChunkRead,
    extents: Extents<'a, dyn ChunkRead + 'a>,
    current: Bytes,
    position: usize,
    /// A record that is split over chunks, as it is put together.
    split: Vec<u8>,
}

impl<'a> Records<'a> {
    /// The records of the table of dentries in `content`.
    pub fn dentries(chunks: &'a dyn ChunkRead, content: &Content) -> Result<Records<'a>> {
        Records::new(Kind::Dentries, chunks, content)
    }

    /// The records of the table of inodes in `content`.
    pub fn inodes(chunks: &'a dyn ChunkRead, content: &Content) -> Result<Records<'a>> {
        Records::new(Kind::Inodes, chunks, content)
    }

    fn new(kind: Kind, chunks: &'a dyn ChunkRead, content: &Content) -> Result<Records<'a>> {
        if matches!(content, Content::Inline(bytes) if !bytes.is_empty()) {
            return Err(Error::corrupt(kind.what(), "it stands in the manifest"));
        }
        let extents = Extents::new(chunks, content, 0)?;
        Ok(Records { kind, chunks, extents, current: Bytes::new(), position: 0, split: Vec::new() })
    }

    /// The next record's bytes, or none after the last.
    pub fn next_record(&mut self) -> Result<Option<&[u8]>> {
        self.split.clear();
        if self.position == self.current.len() && !self.next_chunk()? {
            return Ok(None);
        }
        if let Some(range) = self.whole_record()? {
            self.position = range.end;
            return Ok(Some(&self.current[range]));
        }
        self.join()?;
        Ok(Some(&self.split))
    }

    /// The next dentry, or none after the last.
    pub fn next_dentry(&mut self) -> Result<Option<DentryRef<'_>>> {
        let Some(record) = self.next_record()? else { return Ok(None) };
        let mut reader = Reader::new("dentry record", record);
        let dentry = DentryRef::decode(&mut reader)?;
        reader.finish()?;
        Ok(Some(dentry))
    }

    /// The next inode, or none after the last.
    pub fn next_inode(&mut self) -> Result<Option<Inode>> {
        let Some(record) = self.next_record()? else { return Ok(None) };
        let mut reader = Reader::new("inode record", record);
        let inode = Inode::decode(&mut reader)?;
        reader.finish()?;
        Ok(Some(inode))
    }

    /// Where in the current chunk the next record lies, if all of it does.
    fn whole_record(&self) -> Result<Option<Range<usize>>> {
        let rest = &self.current[self.position..];
        match self.kind.record_bytes(rest) {
            Ok(bytes) if bytes <= rest.len() => Ok(Some(self.position..self.position + bytes)),
            Ok(bytes) if bytes > MAX_RECORD_BYTES => Err(self.too_long(bytes)),
            _ => Ok(None),
        }
    }

    /// Puts a record together that starts in the current chunk and ends in a later one.
    fn join(&mut self) -> Result<()> {
        loop {
            let wanted = match self.kind.record_bytes(&self.split) {
                Ok(bytes) if bytes > MAX_RECORD_BYTES => return Err(self.too_long(bytes)),
                Ok(bytes) if bytes == self.split.len() => return Ok(()),
                Ok(bytes) | Err(bytes) => bytes - self.split.len(),
            };
            if self.position == self.current.len() && !self.next_chunk()? {
                return Err(Error::corrupt(self.kind.what(), "it ends within a record"));
            }
            let end = self.current.len().min(self.position + wanted);
            self.split.extend_from_slice(&self.current[self.position..end]);
            self.position = end;
        }
    }

    fn next_chunk(&mut self) -> Result<bool> {
        match self.extents.next().transpose()? {
            None => Ok(false),
            Some((_, Extent::Hole { .. })) => Err(Error::corrupt(self.kind.what(), "it has a hole")),
            Some((_, Extent::Chunk { id, bytes })) => {
                self.current = get_sized(self.chunks, &id, bytes)?;
                self.position = 0;
                Ok(true)
            }
        }
    }

    fn too_long(&self, bytes: usize) -> Error {
        Error::corrupt(self.kind.what(), format!("a record of {bytes} bytes"))
    }
}
