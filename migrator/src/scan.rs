//! Reading what layers are made of, as chunks: list trees and table records, with parts left out.
//!
//! The same walks serve the sender (what is to be asked for), the receiver (is everything there and well formed) and
//! the permission filter (what may this key reach). Invariants: one list node per level and one table piece are held;
//! a malformed structure is an error, never a panic.

use std::marker::PhantomData;

use layerfs::chunk::ChunkRead;
use layerfs::codec::Reader;
use layerfs::content::{Content, Entry, Extent, List, decode_node, get_sized};
use layerfs::inode::{Dentry, Inode};
use layerfs::{ChunkId, Error, Result};

/// A piece of a table that has exactly this many bytes may end inside a record; every other piece ends with one.
/// FORMAT.md, "Tables".
pub const FULL_PIECE_BYTES: u32 = 32 * 1024;
/// A record may span pieces, but not more bytes than this.
const MAX_RECORD_BYTES: usize = 32 << 20;

/// A chunk that a content refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A node of the list tree.
    Node(ChunkId),
    /// A chunk of the content, with its plain length.
    Chunk(ChunkId, u32),
}

/// Visits every node and chunk of `content`, in order, parents first. `visit` says of a node whether to go into it.
///
/// # Errors
/// Those of `visit`, of reading, and [`Error::Corrupt`] for a malformed tree.
pub fn walk_content<R: ChunkRead + ?Sized>(
    chunks: &R,
    content: &Content,
    visit: &mut dyn FnMut(Part) -> Result<bool>,
) -> Result<()> {
    let Content::Extents { bytes, list, .. } = content else { return Ok(()) };
    match list {
        List::Direct(extents) => extents.iter().try_for_each(|extent| visit_extent(extent, visit)),
        List::Tree { root, depth } => walk_node(chunks, root, *bytes, *depth, visit),
    }
}

fn visit_extent(extent: &Extent, visit: &mut dyn FnMut(Part) -> Result<bool>) -> Result<()> {
    match extent {
        Extent::Chunk { id, bytes } => visit(Part::Chunk(*id, *bytes)).map(|_| ()),
        Extent::Hole { .. } => Ok(()),
    }
}

/// Recurses as deep as the content says, which its decoding bounds.
fn walk_node<R: ChunkRead + ?Sized>(
    chunks: &R,
    id: &ChunkId,
    bytes: u64,
    depth: u8,
    visit: &mut dyn FnMut(Part) -> Result<bool>,
) -> Result<()> {
    if !visit(Part::Node(*id))? {
        return Ok(());
    }
    let entries = decode_node(&chunks.get(id)?, depth)?;
    let sum = entries.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.len()));
    if sum != bytes {
        return Err(Error::corrupt("list node", format!("{sum} bytes in a node that should span {bytes}")));
    }
    for entry in &entries {
        match entry {
            Entry::Extent(extent) => visit_extent(extent, visit)?,
            Entry::Node { id, bytes } => walk_node(chunks, id, *bytes, depth - 1, visit)?,
        }
    }
    Ok(())
}

/// A piece of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its chunk.
    pub id: ChunkId,
    /// Its plain length.
    pub bytes: u32,
    /// Whether its records are wanted.
    pub open: bool,
}

/// A kind of record that tables consist of.
pub trait Record: Sized {
    /// The length of the record that `bytes` begins with, if so much can be told from them.
    fn length(bytes: &[u8]) -> Option<usize>;
    /// Decodes one.
    fn decode(reader: &mut Reader<'_>) -> Result<Self>;
}

impl Record for Inode {
    fn length(bytes: &[u8]) -> Option<usize> {
        let length = bytes.first_chunk::<4>()?;
        Some(4 + u32::from_le_bytes(*length) as usize)
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Inode> {
        Inode::decode(reader)
    }
}

impl Record for Dentry {
    fn length(bytes: &[u8]) -> Option<usize> {
        Some(18 + usize::from(*bytes.get(17)?))
    }

    fn decode(reader: &mut Reader<'_>) -> Result<Dentry> {
        Dentry::decode(reader)
    }
}

/// The records of a table's open pieces, in order. Records that reach into an open piece, or out of one, come too; so
/// may others.
pub struct Records<'a, T, R: ChunkRead + ?Sized> {
    chunks: &'a R,
    pieces: Vec<Piece>,
    /// The next piece to load.
    next: usize,
    buffer: Vec<u8>,
    at: usize,
    /// Whether the last loaded piece may end inside a record.
    may_continue: bool,
    loaded_bytes: u64,
    record: PhantomData<T>,
}

impl<'a, T: Record, R: ChunkRead + ?Sized> Records<'a, T, R> {
    /// The records of `pieces`, which are a table's, all and in order.
    pub fn new(chunks: &'a R, pieces: Vec<Piece>) -> Records<'a, T, R> {
        Records {
            chunks,
            pieces,
            next: 0,
            buffer: Vec::new(),
            at: 0,
            may_continue: false,
            loaded_bytes: 0,
            record: PhantomData,
        }
    }

    /// How many bytes of pieces were read until now.
    pub fn loaded_bytes(&self) -> u64 {
        self.loaded_bytes
    }

    /// The next record.
    ///
    /// # Errors
    /// Those of reading, and [`Error::Corrupt`] if a record is malformed or ends where it may not.
    pub fn next_record(&mut self) -> Result<Option<T>> {
        loop {
            let rest = &self.buffer[self.at..];
            if let Some(length) = T::length(rest) {
                if length > MAX_RECORD_BYTES {
                    return Err(Error::corrupt("table", format!("a record of {length} bytes")));
                }
                if length <= rest.len() {
                    let record = T::decode(&mut Reader::new("table record", &rest[..length]))?;
                    self.at += length;
                    return Ok(Some(record));
                }
            }
            let is_between_records = rest.is_empty();
            if !is_between_records && (!self.may_continue || self.next == self.pieces.len()) {
                return Err(Error::corrupt("table", "a record reaches over the end of its piece"));
            }
            if is_between_records && !self.seek() {
                return Ok(None);
            }
            self.load()?;
        }
    }

    /// Moves on to the next open piece, and back from it to where a record surely begins.
    fn seek(&mut self) -> bool {
        let first = self.next;
        let Some(distance) = self.pieces[first..].iter().position(|piece| piece.open) else { return false };
        self.next = first + distance;
        while self.next > first && self.pieces[self.next - 1].bytes == FULL_PIECE_BYTES {
            self.next -= 1;
        }
        true
    }

    fn load(&mut self) -> Result<()> {
        let piece = self.pieces[self.next];
        let plain = get_sized(self.chunks, &piece.id, piece.bytes)?;
        self.buffer.drain(..self.at);
        self.at = 0;
        self.buffer.extend_from_slice(&plain);
        self.may_continue = piece.bytes == FULL_PIECE_BYTES;
        self.loaded_bytes += u64::from(piece.bytes);
        self.next += 1;
        Ok(())
    }
}

/// All pieces of the table `content`, each open if `is_open` says so; `node` sees the list nodes.
///
/// # Errors
/// [`Error::Corrupt`] if `content` isn't a table's.
pub fn table_pieces<R: ChunkRead + ?Sized>(
    chunks: &R,
    content: &Content,
    node: &mut dyn FnMut(ChunkId) -> Result<()>,
    is_open: &mut dyn FnMut(ChunkId, u32) -> Result<bool>,
) -> Result<Vec<Piece>> {
    let Content::Extents { bytes, data_bytes, .. } = content else {
        return Err(Error::corrupt("table", "it is inline"));
    };
    if bytes != data_bytes {
        return Err(Error::corrupt("table", "it has holes"));
    }
    let mut pieces = Vec::new();
    walk_content(chunks, content, &mut |part| {
        match part {
            Part::Node(id) => node(id)?,
            Part::Chunk(id, bytes) => pieces.push(Piece { id, bytes, open: is_open(id, bytes)? }),
        }
        Ok(true)
    })?;
    Ok(pieces)
}
