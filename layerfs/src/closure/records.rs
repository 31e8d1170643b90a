//! Streams the records of a layer's table off its chunks, without ever holding the table, and checks them.
//!
//! Hides that a record may be split over pieces, and that of some pieces nothing is wanted. Memory: one piece, or one
//! record if it is longer than that. Invariants of what comes out: keys grow strictly, numbers are below the
//! manifest's next one, there are never more records than it says, and not fewer unless pieces were passed over.

use std::ops::Range;

use bytes::Bytes;

use crate::chunk::ChunkRead;
use crate::codec::Reader;
use crate::content::{Content, Extent, Extents, get_sized};
use crate::error::{Error, Result};
use crate::id::{ChunkId, Ino};
use crate::inode::{DentryRef, Inode, MAX_RECORD_BYTES, Target};
use crate::manifest::{Manifest, TABLE_MAX};

/// Bytes of the shortest dentry record: the fixed part and a name of one byte.
pub(crate) const MIN_DENTRY_BYTES: u64 = 19;
/// Bytes of the shortest inode record: length, the fixed part and no extended attribute.
pub(crate) const MIN_INODE_BYTES: u64 = 66;

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

/// Says of a piece whether its records are wanted.
type Wants<'a> = dyn FnMut(&ChunkId) -> bool + 'a;

/// The records of one table, in order.
pub struct Records<'a> {
    kind: Kind,
    chunks: &'a dyn ChunkRead,
    extents: Extents<'a, dyn ChunkRead + 'a>,
    wants: Option<Box<Wants<'a>>>,
    current: Bytes,
    /// Where the next record begins in `current`.
    position: usize,
    /// Where the record that came last lies in `current`; if nowhere, it is `split`.
    record: Option<Range<usize>>,
    /// A record that is split over pieces, as it is put together.
    split: Vec<u8>,
    /// Whether the last piece may end inside of a record. FORMAT.md, "Tables": only the longest pieces do.
    may_continue: bool,
    has_skipped: bool,
    loaded_bytes: u64,
    next_ino: Ino,
    has_parent: bool,
    expected: u64,
    count: u64,
    /// The greatest key until now; of an inode just the number.
    last: (Ino, Vec<u8>),
}

impl<'a> Records<'a> {
    /// The records of the dentry table of the layer with `manifest`.
    pub fn dentries(chunks: &'a dyn ChunkRead, manifest: &Manifest) -> Result<Records<'a>> {
        Records::new(Kind::Dentries, chunks, manifest, &manifest.dentries, manifest.dentry_count)
    }

    /// The records of the inode table of the layer with `manifest`.
    pub fn inodes(chunks: &'a dyn ChunkRead, manifest: &Manifest) -> Result<Records<'a>> {
        Records::new(Kind::Inodes, chunks, manifest, &manifest.inodes, manifest.inode_count)
    }

    fn new(
        kind: Kind,
        chunks: &'a dyn ChunkRead,
        manifest: &Manifest,
        table: &Content,
        expected: u64,
    ) -> Result<Records<'a>> {
        if matches!(table, Content::Inline(bytes) if !bytes.is_empty()) {
            return Err(Error::corrupt(kind.what(), "it stands in the manifest"));
        }
        Ok(Records {
            kind,
            chunks,
            extents: Extents::new(chunks, table, 0)?,
            wants: None,
            current: Bytes::new(),
            position: 0,
            record: None,
            split: Vec::new(),
            may_continue: false,
            has_skipped: false,
            loaded_bytes: 0,
            next_ino: manifest.next_ino,
            has_parent: manifest.parent.is_some(),
            expected,
            count: 0,
            last: (Ino(0), Vec::new()),
        })
    }

    /// Only the records of those pieces that `wants`, asked for each in order, answers with true. Others come too:
    /// those of pieces with a part of a record that is split.
    pub fn only(mut self, wants: impl FnMut(&ChunkId) -> bool + 'a) -> Records<'a> {
        self.wants = Some(Box::new(wants));
        self
    }

    /// How many bytes of pieces were read until now.
    pub fn loaded_bytes(&self) -> u64 {
        self.loaded_bytes
    }

    /// The next dentry, or none after the last.
    pub fn next_dentry(&mut self) -> Result<Option<DentryRef<'_>>> {
        if !self.advance()? {
            return Ok(None);
        }
        let record = record_of(&self.record, &self.current, &self.split);
        let mut reader = Reader::new("dentry record", record);
        let dentry = DentryRef::decode(&mut reader)?;
        reader.finish()?;
        let in_range = |ino: Ino| ino < self.next_ino;
        let fits = match dentry.target {
            Target::Inode { ino, .. } => in_range(ino) && ino != Ino::ROOT,
            Target::Whiteout => self.has_parent,
        };
        if !fits || !in_range(dentry.folder) || (dentry.folder, dentry.name) <= (self.last.0, &self.last.1) {
            let (name, folder) = (dentry.name.escape_ascii(), dentry.folder);
            let detail = format!("\"{name}\" in folder {folder} is out of order or refers to nothing");
            return Err(Error::corrupt(self.kind.what(), detail));
        }
        self.last.0 = dentry.folder;
        self.last.1.clear();
        self.last.1.extend_from_slice(dentry.name);
        Ok(Some(dentry))
    }

    /// The next inode, or none after the last.
    pub fn next_inode(&mut self) -> Result<Option<Inode>> {
        if !self.advance()? {
            return Ok(None);
        }
        let mut reader = Reader::new("inode record", self.record());
        let inode = Inode::decode(&mut reader)?;
        reader.finish()?;
        if inode.ino <= self.last.0 || inode.ino >= self.next_ino {
            let detail = format!("inode {} after {}, below {}", inode.ino, self.last.0, self.next_ino);
            return Err(Error::corrupt(self.kind.what(), detail));
        }
        self.last.0 = inode.ino;
        Ok(Some(inode))
    }

    /// The bytes of the record that came last.
    pub fn record(&self) -> &[u8] {
        record_of(&self.record, &self.current, &self.split)
    }

    /// Moves on to the next record; false after the last.
    fn advance(&mut self) -> Result<bool> {
        self.split.clear();
        self.record = None;
        if self.position == self.current.len() && !self.next_piece()? {
            let is_whole = self.has_skipped || self.count == self.expected;
            return if is_whole { Ok(false) } else { Err(self.wrong_count()) };
        }
        if self.count == self.expected {
            return Err(self.wrong_count());
        }
        self.count += 1;
        match self.whole_record()? {
            Some(range) => {
                self.position = range.end;
                self.record = Some(range);
            }
            None => self.join()?,
        }
        Ok(true)
    }

    /// Where in the current piece the next record lies, if all of it does.
    fn whole_record(&self) -> Result<Option<Range<usize>>> {
        let rest = &self.current[self.position..];
        match self.kind.record_bytes(rest) {
            Ok(bytes) if bytes > MAX_RECORD_BYTES => Err(self.too_long(bytes)),
            Ok(bytes) if bytes <= rest.len() => Ok(Some(self.position..self.position + bytes)),
            _ => Ok(None),
        }
    }

    /// Puts a record together that starts in the current piece and ends in a later one.
    fn join(&mut self) -> Result<()> {
        loop {
            let wanted = match self.kind.record_bytes(&self.split) {
                Ok(bytes) if bytes > MAX_RECORD_BYTES => return Err(self.too_long(bytes)),
                Ok(bytes) if bytes == self.split.len() => return Ok(()),
                Ok(bytes) | Err(bytes) => bytes - self.split.len(),
            };
            if self.position == self.current.len() && !(self.may_continue && self.next_piece()?) {
                return Err(Error::corrupt(self.kind.what(), "a record reaches over the end of its piece"));
            }
            let end = self.current.len().min(self.position + wanted);
            self.split.extend_from_slice(&self.current[self.position..end]);
            self.position = end;
        }
    }

    /// Loads the next piece that is wanted, or that has a part of a split record.
    fn next_piece(&mut self) -> Result<bool> {
        while let Some((_, extent)) = self.extents.next().transpose()? {
            let Extent::Chunk { id, bytes } = extent else {
                return Err(Error::corrupt(self.kind.what(), "it has a hole"));
            };
            let is_wanted = self.wants.as_mut().is_none_or(|wants| wants(&id));
            // What a split record says depends on several pieces, so none of their ids alone tells that it is known.
            let has_split_record = self.may_continue || bytes as usize == TABLE_MAX;
            self.may_continue = bytes as usize == TABLE_MAX;
            if is_wanted || has_split_record {
                self.current = get_sized(self.chunks, &id, bytes)?;
                self.position = 0;
                self.loaded_bytes += u64::from(bytes);
                return Ok(true);
            }
            self.has_skipped = true;
        }
        Ok(false)
    }

    fn too_long(&self, bytes: usize) -> Error {
        Error::corrupt(self.kind.what(), format!("a record of {bytes} bytes"))
    }

    fn wrong_count(&self) -> Error {
        let than = if self.count == self.expected { "more" } else { "fewer" };
        Error::corrupt(self.kind.what(), format!("{than} than the {} records of the manifest", self.expected))
    }
}

fn record_of<'r>(record: &Option<Range<usize>>, current: &'r Bytes, split: &'r [u8]) -> &'r [u8] {
    record.clone().map_or(split, |range| &current[range])
}
