//! A file's content as a tree of extents over chunks, with a bounded amount of it in memory at any time.
//!
//! FORMAT.md, "Content". A file of up to [`INLINE_MAX`] bytes is inline; else an [`Extent`] list that stands in
//! the inode record while it is short ([`DIRECT_MAX`]), and in a tree of *list nodes* above. Nodes are cut where
//! an entry's id says so, so that a change of one chunk changes one leaf and the way up to the root.
//! Invariant: the extents' lengths add up to the file's size; no two holes are neighbours.

use bytes::Bytes;

use crate::chunk::{ChunkRead, ChunkWrite, Class, MAX_CHUNK_BYTES};
use crate::chunker::Chunker;
use crate::closure::MAX_UPPER_NODES;
use crate::codec::{Put, Reader};
use crate::error::{Error, Result};
use crate::id::ChunkId;

/// The largest file that is kept in its inode record, in bytes.
pub const INLINE_MAX: usize = 512;
/// The most extents that an inode record holds itself.
pub const DIRECT_MAX: usize = 4;
/// The fewest and the most entries of a list node (but for the last of a level), and the mask of the id's first
/// two bytes that ends a node.
const NODE_MIN: usize = 32;
const NODE_MAX: usize = 512;
const NODE_MASK: u16 = 127;
/// No tree is higher: 32^8 entries would be needed.
const MAX_DEPTH: u8 = 8;

const HOLES_ARE_NEIGHBOURS: &str = "two holes are neighbours";

/// A run of a file's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Extent {
    /// A chunk, with its plain length in bytes.
    Chunk {
        /// Its id.
        id: ChunkId,
        /// Its plain length in bytes.
        bytes: u32,
    },
    /// So many zero bytes.
    Hole {
        /// Its length in bytes.
        bytes: u64,
    },
}

impl Extent {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Extent::Chunk { bytes, .. } => u64::from(*bytes),
            Extent::Hole { bytes } => *bytes,
        }
    }

    fn is_hole(&self) -> bool {
        matches!(self, Extent::Hole { .. })
    }

    /// Never true for an extent of a valid list.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where a file's extents stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum List {
    /// Here: up to [`DIRECT_MAX`] of them.
    Direct(Vec<Extent>),
    /// In a tree of list nodes.
    Tree {
        /// The root node.
        root: ChunkId,
        /// 1 if the root is a leaf.
        depth: u8,
    },
}

/// A file's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// The bytes themselves; empty files too.
    Inline(Vec<u8>),
    /// Extents.
    Extents {
        /// The file's length in bytes.
        bytes: u64,
        /// How much of it is in chunks (not in holes), in bytes.
        data_bytes: u64,
        /// What cut it.
        chunker: Chunker,
        /// Its extents.
        list: List,
    },
}

impl Content {
    /// An empty file.
    pub fn empty() -> Content {
        Content::Inline(Vec::new())
    }

    /// The file's length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Content::Inline(bytes) => bytes.len() as u64,
            Content::Extents { bytes, .. } => *bytes,
        }
    }

    /// Whether the file is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How much of the file isn't in holes, in bytes.
    pub fn data_bytes(&self) -> u64 {
        match self {
            Content::Inline(bytes) => bytes.len() as u64,
            Content::Extents { data_bytes, .. } => *data_bytes,
        }
    }

    /// Appends the encoding. FORMAT.md, "Content".
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Content::Inline(bytes) => {
                out.put_u8(0);
                out.put_bytes16(bytes);
            }
            Content::Extents { bytes, data_bytes, chunker, list } => {
                out.put_u8(if matches!(list, List::Direct(_)) { 1 } else { 2 });
                out.put_u8(*chunker as u8);
                out.put_u64(*bytes);
                out.put_u64(*data_bytes);
                match list {
                    List::Direct(extents) => {
                        out.put_u8(extents.len() as u8);
                        extents.iter().for_each(|extent| encode_extent(extent, out));
                    }
                    List::Tree { root, depth } => {
                        out.put_u8(*depth);
                        out.put_id(root);
                    }
                }
            }
        }
    }

    /// The file's length and how much of it isn't in holes, in bytes, from the start of an encoding.
    pub fn decode_lengths(reader: &mut Reader<'_>) -> Result<(u64, u64)> {
        if reader.u8()? == 0 {
            let bytes = reader.bytes16()?.len() as u64;
            return Ok((bytes, bytes));
        }
        let _chunker = reader.u8()?;
        Ok((reader.u64()?, reader.u64()?))
    }

    /// Takes an encoding off `reader`.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Content> {
        let tag = reader.u8()?;
        if tag == 0 {
            let bytes = reader.bytes16()?;
            if bytes.len() > INLINE_MAX {
                return Err(reader.error(format!("{} inline bytes", bytes.len())));
            }
            return Ok(Content::Inline(bytes.to_vec()));
        }
        let chunker = reader.u8()?;
        let chunker = Chunker::from_code(chunker).ok_or_else(|| reader.error(format!("unknown chunker {chunker}")))?;
        let bytes = reader.u64()?;
        let data_bytes = reader.u64()?;
        if bytes > i64::MAX as u64 || data_bytes > bytes {
            return Err(reader.error(format!("{data_bytes} bytes of data in a file of {bytes}")));
        }
        let list = match tag {
            1 => {
                let count = usize::from(reader.u8()?);
                if count > DIRECT_MAX {
                    return Err(reader.error(format!("{count} direct extents")));
                }
                let extents = (0..count).map(|_| decode_extent(reader)).collect::<Result<Vec<_>>>()?;
                check_sum(reader, extents.iter().map(Extent::len), bytes)?;
                check_holes(reader, extents.iter().map(Extent::is_hole))?;
                List::Direct(extents)
            }
            2 => {
                let depth = reader.u8()?;
                if depth == 0 || depth > MAX_DEPTH {
                    return Err(reader.error(format!("a list of depth {depth}")));
                }
                List::Tree { root: reader.id()?, depth }
            }
            other => return Err(reader.error(format!("unknown content tag {other}"))),
        };
        Ok(Content::Extents { bytes, data_bytes, chunker, list })
    }
}

fn check_sum(reader: &Reader<'_>, lengths: impl Iterator<Item = u64>, expected: u64) -> Result<()> {
    let sum = lengths.fold(0u64, u64::saturating_add);
    if sum == expected { Ok(()) } else { Err(reader.error(format!("extents of {sum} bytes in a file of {expected}"))) }
}

/// Checks that no two in a row are holes: what walks a list does a step for each, and zeros cost nothing to store.
fn check_holes(reader: &Reader<'_>, are_holes: impl Iterator<Item = bool>) -> Result<()> {
    let mut after_hole = false;
    for is_hole in are_holes {
        if after_hole && is_hole {
            return Err(reader.error(HOLES_ARE_NEIGHBOURS));
        }
        after_hole = is_hole;
    }
    Ok(())
}

fn encode_extent(extent: &Extent, out: &mut Vec<u8>) {
    match extent {
        Extent::Hole { bytes } => {
            out.put_u8(0);
            out.put_u64(*bytes);
        }
        Extent::Chunk { id, bytes } => {
            out.put_u8(1);
            out.put_u32(*bytes);
            out.put_id(id);
        }
    }
}

fn decode_extent(reader: &mut Reader<'_>) -> Result<Extent> {
    let extent = match reader.u8()? {
        0 => Extent::Hole { bytes: reader.u64()? },
        1 => Extent::Chunk { bytes: reader.u32()?, id: reader.id()? },
        other => return Err(reader.error(format!("unknown extent tag {other}"))),
    };
    let too_long = matches!(extent, Extent::Chunk { bytes, .. } if bytes as usize > MAX_CHUNK_BYTES);
    if extent.is_empty() || too_long {
        return Err(reader.error(format!("an extent of {} bytes", extent.len())));
    }
    Ok(extent)
}

/// An entry of a list node: an extent in a leaf, a child node above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In a leaf.
    Extent(Extent),
    /// Above: a node and how many of the file's bytes it spans.
    Node {
        /// The child.
        id: ChunkId,
        /// The bytes that it spans.
        bytes: u64,
    },
}

impl Entry {
    /// The bytes that it spans.
    pub fn len(&self) -> u64 {
        match self {
            Entry::Extent(extent) => extent.len(),
            Entry::Node { bytes, .. } => *bytes,
        }
    }

    /// Never true in a valid node.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn ends_node(&self) -> bool {
        let id = match self {
            Entry::Extent(Extent::Chunk { id, .. }) | Entry::Node { id, .. } => id,
            Entry::Extent(Extent::Hole { .. }) => return false,
        };
        u16::from_le_bytes([id.0[0], id.0[1]]) & NODE_MASK == 0
    }
}

/// Decodes the list node in `plain`, which stands `depth` levels above the extents (1 for a leaf).
/// FORMAT.md, "List nodes".
pub fn decode_node(plain: &[u8], depth: u8) -> Result<Vec<Entry>> {
    let mut reader = Reader::new("list node", plain);
    let found = reader.u8()?;
    if found != depth {
        return Err(reader.error(format!("depth {found} instead of {depth}")));
    }
    let count = usize::from(reader.u16()?);
    if count == 0 || count > NODE_MAX {
        return Err(reader.error(format!("{count} entries")));
    }
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        entries.push(if depth == 1 {
            Entry::Extent(decode_extent(&mut reader)?)
        } else {
            let bytes = reader.u64()?;
            Entry::Node { bytes, id: reader.id()? }
        });
    }
    check_holes(&reader, entries.iter().map(|entry| matches!(entry, Entry::Extent(extent) if extent.is_hole())))?;
    reader.finish()?;
    Ok(entries)
}

fn encode_node(depth: u8, entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(3 + entries.len() * 41);
    out.put_u8(depth);
    out.put_u16(entries.len() as u16);
    for entry in entries {
        match entry {
            Entry::Extent(extent) => encode_extent(extent, &mut out),
            Entry::Node { id, bytes } => {
                out.put_u64(*bytes);
                out.put_id(id);
            }
        }
    }
    out
}

/// Builds a file's [`Content`] from its extents in order, writing list nodes as they fill up.
/// Holds at most [`NODE_MAX`] entries per level.
#[derive(Debug)]
pub struct ContentBuilder {
    chunker: Chunker,
    bytes: u64,
    data_bytes: u64,
    /// `levels[0]` holds extents, `levels[n]` nodes of depth n.
    levels: Vec<Vec<Entry>>,
    hole: u64,
    upper_nodes: usize,
}

impl ContentBuilder {
    /// A builder for a file cut by `chunker`.
    pub fn new(chunker: Chunker) -> ContentBuilder {
        ContentBuilder { chunker, bytes: 0, data_bytes: 0, levels: vec![Vec::new()], hole: 0, upper_nodes: 0 }
    }

    /// Appends an extent. Neighbouring holes become one.
    pub fn push(&mut self, extent: Extent, out: &dyn ChunkWrite) -> Result<()> {
        self.bytes += extent.len();
        match extent {
            Extent::Hole { bytes } => {
                self.hole += bytes;
                Ok(())
            }
            Extent::Chunk { bytes, .. } => {
                self.flush_hole(out)?;
                self.data_bytes += u64::from(bytes);
                self.add(0, Entry::Extent(extent), out)
            }
        }
    }

    /// Ends the file.
    pub fn finish(mut self, out: &dyn ChunkWrite) -> Result<Content> {
        self.flush_hole(out)?;
        let ContentBuilder { chunker, bytes, data_bytes, .. } = self;
        if self.levels.len() == 1 && self.levels[0].len() <= DIRECT_MAX {
            let extents = self.levels.remove(0).into_iter().filter_map(|entry| match entry {
                Entry::Extent(extent) => Some(extent),
                Entry::Node { .. } => None,
            });
            return Ok(Content::Extents { bytes, data_bytes, chunker, list: List::Direct(extents.collect()) });
        }
        let mut level = 0;
        loop {
            let is_top = level + 1 == self.levels.len();
            if is_top && level > 0 && self.levels[level].len() == 1 {
                let Entry::Node { id, .. } = self.levels[level][0] else { unreachable!("extents are on level 0") };
                return Ok(Content::Extents {
                    bytes,
                    data_bytes,
                    chunker,
                    list: List::Tree { root: id, depth: level as u8 },
                });
            }
            if !self.levels[level].is_empty() {
                self.close_node(level, out)?;
            }
            level += 1;
        }
    }

    fn flush_hole(&mut self, out: &dyn ChunkWrite) -> Result<()> {
        match std::mem::take(&mut self.hole) {
            0 => Ok(()),
            bytes => self.add(0, Entry::Extent(Extent::Hole { bytes }), out),
        }
    }

    fn add(&mut self, level: usize, entry: Entry, out: &dyn ChunkWrite) -> Result<()> {
        if self.levels.len() == level {
            self.levels.push(Vec::new());
        }
        let ends = entry.ends_node();
        self.levels[level].push(entry);
        let count = self.levels[level].len();
        if count == NODE_MAX || (ends && count >= NODE_MIN) { self.close_node(level, out) } else { Ok(()) }
    }

    fn close_node(&mut self, level: usize, out: &dyn ChunkWrite) -> Result<()> {
        self.upper_nodes += usize::from(level > 0);
        if self.upper_nodes > MAX_UPPER_NODES {
            return Err(Error::invalid("a file has too many extents; see FORMAT.md, \"List nodes\""));
        }
        let entries = std::mem::take(&mut self.levels[level]);
        let bytes = entries.iter().map(Entry::len).sum();
        let id = out.put(Class::List, &encode_node(level as u8 + 1, &entries))?;
        self.add(level + 1, Entry::Node { id, bytes }, out)
    }
}

/// Walks a content's extents in order, from any offset, holding one node per level.
#[derive(Debug)]
pub struct Extents<'a, R: ChunkRead + ?Sized> {
    chunks: &'a R,
    /// (file offset, entry, its depth), the next on top.
    stack: Vec<(u64, Entry, u8)>,
    /// Whether the last one given was a hole. The next must not be one, in the next node either: nodes of one hole
    /// each, which a tree can repeat without end, would keep a reader busy for ever.
    after_hole: bool,
}

impl<'a, R: ChunkRead + ?Sized> Extents<'a, R> {
    /// The extents of `content` from the one that holds byte `from` on, each with its file offset. Inline content
    /// has none.
    pub fn new(chunks: &'a R, content: &Content, from: u64) -> Result<Extents<'a, R>> {
        let mut extents = Extents { chunks, stack: Vec::new(), after_hole: false };
        if let Content::Extents { bytes, list, .. } = content {
            match list {
                List::Direct(direct) => extents.push_all(0, direct.iter().map(|e| Entry::Extent(*e)), 0),
                List::Tree { root, depth } => extents.stack.push((0, Entry::Node { id: *root, bytes: *bytes }, *depth)),
            }
        }
        extents.skip_to(from)?;
        Ok(extents)
    }

    fn push_all(&mut self, offset: u64, entries: impl IntoIterator<Item = Entry>, depth: u8) {
        let first = self.stack.len();
        let mut at = offset;
        for entry in entries {
            self.stack.push((at, entry, depth));
            at += entry.len();
        }
        self.stack[first..].reverse();
    }

    fn open(&mut self, offset: u64, id: &ChunkId, bytes: u64, depth: u8) -> Result<()> {
        let entries = decode_node(&self.chunks.get(id)?, depth)?;
        let sum = entries.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.len()));
        if sum != bytes {
            return Err(Error::corrupt("list node", format!("{sum} bytes in a node that should span {bytes}")));
        }
        self.push_all(offset, entries, depth - 1);
        Ok(())
    }

    fn skip_to(&mut self, from: u64) -> Result<()> {
        while let Some((offset, entry, depth)) = self.stack.last().copied() {
            if offset + entry.len() <= from {
                self.stack.pop();
            } else if let Entry::Node { id, bytes } = entry {
                self.stack.pop();
                self.open(offset, &id, bytes, depth)?;
            } else {
                break;
            }
        }
        Ok(())
    }
}

impl<R: ChunkRead + ?Sized> Iterator for Extents<'_, R> {
    type Item = Result<(u64, Extent)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.stack.pop()? {
                (_, Entry::Extent(Extent::Hole { .. }), _) if self.after_hole => {
                    self.stack.clear();
                    return Some(Err(Error::corrupt("list node", HOLES_ARE_NEIGHBOURS)));
                }
                (offset, Entry::Extent(extent), _) => {
                    self.after_hole = extent.is_hole();
                    return Some(Ok((offset, extent)));
                }
                (offset, Entry::Node { id, bytes }, depth) => {
                    if let Err(error) = self.open(offset, &id, bytes, depth) {
                        self.stack.clear();
                        return Some(Err(error));
                    }
                }
            }
        }
    }
}

/// Reads up to `buffer.len()` bytes of `content` at `offset` into `buffer`; returns how many there were.
pub fn read_at(chunks: &dyn ChunkRead, content: &Content, offset: u64, buffer: &mut [u8]) -> Result<usize> {
    let left = content.len().saturating_sub(offset);
    let count = (buffer.len() as u64).min(left) as usize;
    let buffer = &mut buffer[..count];
    if let Content::Inline(bytes) = content {
        let start = (offset as usize).min(bytes.len());
        buffer.copy_from_slice(&bytes[start..start + count]);
        return Ok(count);
    }
    let end = offset + count as u64;
    if count == 0 {
        return Ok(0);
    }
    for next in Extents::new(chunks, content, offset)? {
        let (at, extent) = next?;
        if at >= end {
            break;
        }
        let from = at.max(offset);
        let to = (at + extent.len()).min(end);
        let target = &mut buffer[(from - offset) as usize..(to - offset) as usize];
        match extent {
            Extent::Hole { .. } => target.fill(0),
            Extent::Chunk { id, bytes } => {
                let plain = get_sized(chunks, &id, bytes)?;
                target.copy_from_slice(&plain[(from - at) as usize..(to - at) as usize]);
            }
        }
    }
    Ok(count)
}

/// The plain bytes of chunk `id`, which must be `bytes` long.
pub fn get_sized<R: ChunkRead + ?Sized>(chunks: &R, id: &ChunkId, bytes: u32) -> Result<Bytes> {
    let plain = chunks.get(id)?;
    if plain.len() != bytes as usize {
        return Err(Error::corrupt("extent", format!("chunk {id} has {} bytes, not {bytes}", plain.len())));
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chunk::MemoryChunks;

    fn build(out: &MemoryChunks, extents: &[Extent]) -> Content {
        let mut builder = ContentBuilder::new(Chunker::Tree);
        extents.iter().for_each(|extent| builder.push(*extent, out).unwrap());
        builder.finish(out).unwrap()
    }

    fn chunk(out: &MemoryChunks, seed: u32) -> Extent {
        let plain = seed.to_le_bytes().repeat(1 + seed as usize % 7);
        Extent::Chunk { id: out.put(Class::Data, &plain).unwrap(), bytes: plain.len() as u32 }
    }

    #[test]
    fn a_changed_chunk_changes_few_nodes() {
        let out = MemoryChunks::default();
        let mut extents: Vec<Extent> = (1..=20_000).map(|seed| chunk(&out, seed)).collect();
        build(&out, &extents);
        let before = out.len();
        extents[10_000] = chunk(&out, 50_000);
        let content = build(&out, &extents);
        assert!(out.len() - before <= 5, "{} new chunks", out.len() - before);
        assert!(matches!(content, Content::Extents { list: List::Tree { depth: 2.., .. }, .. }));
    }

    #[test]
    fn neighbouring_holes_are_refused() {
        let out = MemoryChunks::default();
        let decode = |extents: &[Extent]| {
            let (bytes, list) = (extents.iter().map(Extent::len).sum(), List::Direct(extents.to_vec()));
            let mut encoded = Vec::new();
            Content::Extents { bytes, data_bytes: 0, chunker: Chunker::Tree, list }.encode(&mut encoded);
            Content::decode(&mut Reader::new("content", &encoded))
        };
        let (hole, data) = (Extent::Hole { bytes: 1 }, chunk(&out, 1));
        assert!(decode(&[hole, data, hole]).is_ok());
        assert!(matches!(decode(&[data, hole, hole]), Err(Error::Corrupt { .. })));
        let leaf = |extents: &[Extent]| encode_node(1, &extents.iter().map(|e| Entry::Extent(*e)).collect::<Vec<_>>());
        assert_eq!(decode_node(&leaf(&[hole, data, hole]), 1).unwrap().len(), 3);
        assert!(matches!(decode_node(&leaf(&[hole; 512]), 1), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn a_tree_that_repeats_a_node_with_a_hole_is_left_at_the_second() {
        let out = MemoryChunks::default();
        let data = chunk(&out, 1);
        // One hole; a hole at the start and one at the end.
        for extents in
            [vec![Extent::Hole { bytes: 1 }], vec![Extent::Hole { bytes: 1 }, data, Extent::Hole { bytes: 1 }]]
        {
            let count = extents.len();
            let mut bytes: u64 = extents.iter().map(Extent::len).sum();
            let leaf: Vec<Entry> = extents.into_iter().map(Entry::Extent).collect();
            let mut root = out.put(Class::List, &encode_node(1, &leaf)).unwrap();
            for depth in 2..=6 {
                root = out.put(Class::List, &encode_node(depth, &[Entry::Node { id: root, bytes }; 512])).unwrap();
                bytes *= 512;
            }
            let list = List::Tree { root, depth: 6 };
            let content = Content::Extents { bytes, data_bytes: 0, chunker: Chunker::Tree, list };
            for from in [0, bytes / 2, bytes - 20] {
                let found: Vec<_> = Extents::new(&out, &content, from).unwrap().take(10).collect();
                assert!(found.len() <= count + 1, "{from}: {}", found.len());
                assert!(matches!(found.last(), Some(Err(Error::Corrupt { .. }))), "{from}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_list_reads_back(seeds in prop::collection::vec(prop::option::weighted(0.8, 1u32..50), 0..900), probe in 0.0f64..1.0) {
            let out = MemoryChunks::default();
            let mut expected = Vec::new();
            let extents: Vec<Extent> = seeds.iter().map(|seed| match seed {
                Some(seed) => {
                    expected.extend(seed.to_le_bytes().repeat(1 + *seed as usize % 7));
                    chunk(&out, *seed)
                }
                None => {
                    expected.extend([0; 9]);
                    Extent::Hole { bytes: 9 }
                }
            }).collect();
            let content = build(&out, &extents);
            let mut encoded = Vec::new();
            content.encode(&mut encoded);
            let mut reader = Reader::new("content", &encoded);
            prop_assert_eq!(&Content::decode(&mut reader).unwrap(), &content);
            reader.finish().unwrap();
            prop_assert_eq!(content.len(), expected.len() as u64);
            let from = (probe * expected.len() as f64) as usize;
            let mut buffer = vec![0; 1000];
            let count = read_at(&out, &content, from as u64, &mut buffer).unwrap();
            prop_assert_eq!(&buffer[..count], &expected[from..(from + 1000).min(expected.len())]);
            let found = Extents::new(&out, &content, from as u64).unwrap().collect::<Result<Vec<_>>>().unwrap();
            prop_assert!(found.first().is_none_or(|(at, extent)| (*at..at + extent.len()).contains(&(from as u64))));
        }
    }
}
