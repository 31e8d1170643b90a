//! Everything that a layer consists of: its manifest, its tables, their list nodes, its files' list nodes and data.
//!
//! It hides how records and lists refer to chunks from those who only want to know *which* chunks. Invariant: a
//! visitor sees every chunk of the layer, except below what it calls known; at most one table chunk, one record
//! and one list node per level are in memory.

use crate::chunk::{ChunkRead, Class};
use crate::codec::Reader;
use crate::content::{Content, Entry, Extent, List, decode_node};
use crate::error::{Error, Result};
use crate::id::{ChunkId, LayerId};
use crate::inode::{Dentry, Inode, Node};
use crate::manifest::Manifest;
use crate::table::records::MAX_RECORD_BYTES;

/// What a walk tells.
pub trait ClosureVisitor {
    /// The layer has this chunk of metadata (manifest, table piece or list node); it is opened next.
    fn meta(&mut self, id: &ChunkId, class: Class) -> Result<()>;
    /// The layer has this chunk of data.
    fn data(&mut self, id: &ChunkId, plain_bytes: u32) -> Result<()>;
    /// Whether this chunk of metadata and all below it need not be opened.
    fn is_known(&self, id: &ChunkId) -> bool;
    /// This chunk of metadata and all below it has been seen.
    fn seen(&mut self, id: &ChunkId);
    /// The layer has this inode record. Returns whether to walk its content.
    fn inode(&mut self, inode: &Inode) -> Result<bool>;
}

/// Walks one layer, without those below it. Returns its manifest.
pub fn walk_layer(chunks: &dyn ChunkRead, layer: LayerId, visitor: &mut dyn ClosureVisitor) -> Result<Manifest> {
    visitor.meta(&layer.0, Class::Manifest)?;
    let manifest = Manifest::load(chunks, layer)?;
    let dentries = walk_table(chunks, &manifest.dentries, Table::Dentries, visitor)?;
    let inodes = walk_table(chunks, &manifest.inodes, Table::Inodes, visitor)?;
    for (found, expected, what) in
        [(dentries, manifest.dentry_count, "dentries"), (inodes, manifest.inode_count, "inodes")]
    {
        // What is known isn't counted again.
        if found.is_some_and(|found| found != expected) {
            return Err(Error::corrupt("manifest", format!("it doesn't have the {expected} {what} that it says")));
        }
    }
    Ok(manifest)
}

/// Walks a layer and all below it, top first; `skip` says of which layers (with all below) not to bother.
pub fn walk_stack(
    chunks: &dyn ChunkRead,
    layer: LayerId,
    visitor: &mut dyn ClosureVisitor,
    mut skip: impl FnMut(LayerId) -> bool,
) -> Result<()> {
    let mut next = Some((layer, None));
    while let Some((layer, depth)) = next.filter(|(layer, _)| !skip(*layer)) {
        let manifest = walk_layer(chunks, layer, visitor)?;
        if depth.is_some_and(|depth| depth != manifest.depth) {
            return Err(Error::corrupt("manifest", "its parent has another depth than it says"));
        }
        next = manifest.parent.map(|parent| (parent, manifest.depth.checked_sub(1)));
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Table {
    Inodes,
    Dentries,
}

/// Walks a table; returns how many records it has, `None` if some of it was known.
fn walk_table(
    chunks: &dyn ChunkRead,
    table: &Content,
    kind: Table,
    visitor: &mut dyn ClosureVisitor,
) -> Result<Option<u64>> {
    let mut walk = TableWalk { chunks, kind, visitor, carry: Vec::new(), count: Some(0) };
    match table {
        Content::Inline(bytes) if bytes.is_empty() => {}
        Content::Inline(_) => return Err(Error::corrupt("manifest", "a table inside of it")),
        Content::Extents { list: List::Direct(extents), .. } => {
            extents.iter().try_for_each(|extent| walk.extent(extent))?;
        }
        Content::Extents { list: List::Tree { root, depth }, .. } => walk.node(root, *depth)?,
    }
    match walk.carry.len() {
        0 => Ok(walk.count),
        left => Err(Error::corrupt("table", format!("{left} bytes too many at its end"))),
    }
}

struct TableWalk<'a> {
    chunks: &'a dyn ChunkRead,
    kind: Table,
    visitor: &'a mut dyn ClosureVisitor,
    /// The begin of a record that goes on in the next chunk.
    carry: Vec<u8>,
    count: Option<u64>,
}

impl TableWalk<'_> {
    fn node(&mut self, id: &ChunkId, depth: u8) -> Result<()> {
        self.visitor.meta(id, Class::List)?;
        let starts_clean = self.carry.is_empty();
        if starts_clean && self.visitor.is_known(id) {
            self.count = None;
            return Ok(());
        }
        for entry in decode_node(&self.chunks.get(id)?, depth)? {
            match entry {
                Entry::Node { id, .. } => self.node(&id, depth - 1)?,
                Entry::Extent(extent) => self.extent(&extent)?,
            }
        }
        if starts_clean && self.carry.is_empty() {
            self.visitor.seen(id);
        }
        Ok(())
    }

    fn extent(&mut self, extent: &Extent) -> Result<()> {
        let Extent::Chunk { id, bytes } = extent else { return Err(Error::corrupt("table", "a hole in it")) };
        self.visitor.meta(id, Class::Table)?;
        let starts_clean = self.carry.is_empty();
        if starts_clean && self.visitor.is_known(id) {
            self.count = None;
            return Ok(());
        }
        let plain = self.chunks.get(id)?;
        if plain.len() != *bytes as usize {
            return Err(Error::corrupt("table", format!("a piece of {} bytes instead of {bytes}", plain.len())));
        }
        if starts_clean {
            let used = self.records(&plain)?;
            self.carry.extend_from_slice(&plain[used..]);
        } else {
            let mut joined = std::mem::take(&mut self.carry);
            joined.extend_from_slice(&plain);
            let used = self.records(&joined)?;
            joined.drain(..used);
            self.carry = joined;
        }
        if self.carry.len() > MAX_RECORD_BYTES {
            return Err(Error::corrupt("table", "a record that is too large"));
        }
        if starts_clean && self.carry.is_empty() {
            self.visitor.seen(id);
        }
        Ok(())
    }

    /// Decodes the whole records at the start of `bytes`; returns how many bytes they take.
    fn records(&mut self, bytes: &[u8]) -> Result<usize> {
        let mut used = 0;
        while let Some(length) = whole_record(self.kind, &bytes[used..]) {
            let mut reader = Reader::new("table", &bytes[used..used + length]);
            match self.kind {
                Table::Dentries => drop(Dentry::decode(&mut reader)?),
                Table::Inodes => {
                    let inode = Inode::decode(&mut reader)?;
                    let wants_content = self.visitor.inode(&inode)?;
                    if let (Node::File(content), true) = (&inode.node, wants_content) {
                        walk_content(self.chunks, content, self.visitor)?;
                    }
                }
            }
            reader.finish()?;
            used += length;
            self.count = self.count.map(|count| count + 1);
        }
        Ok(used)
    }
}

/// The length of the record at the start of `bytes`, if all of it is there.
fn whole_record(kind: Table, bytes: &[u8]) -> Option<usize> {
    let length = match kind {
        // FORMAT.md, "Dentry records": folder, inode, kind, length of the name, name.
        Table::Dentries => 18 + usize::from(*bytes.get(17)?),
        // FORMAT.md, "Inode records": length, then so many bytes.
        Table::Inodes => {
            let length = bytes.get(..4)?.try_into().ok()?;
            4 + u32::from_le_bytes(length) as usize
        }
    };
    (length <= bytes.len()).then_some(length)
}

/// Walks a file's content.
pub fn walk_content(chunks: &dyn ChunkRead, content: &Content, visitor: &mut dyn ClosureVisitor) -> Result<()> {
    match content {
        Content::Inline(_) => Ok(()),
        Content::Extents { list: List::Direct(extents), .. } => {
            extents.iter().try_for_each(|extent| visit_extent(extent, visitor))
        }
        Content::Extents { list: List::Tree { root, depth }, .. } => walk_node(chunks, root, *depth, visitor),
    }
}

fn visit_extent(extent: &Extent, visitor: &mut dyn ClosureVisitor) -> Result<()> {
    match extent {
        Extent::Chunk { id, bytes } => visitor.data(id, *bytes),
        Extent::Hole { .. } => Ok(()),
    }
}

fn walk_node(chunks: &dyn ChunkRead, id: &ChunkId, depth: u8, visitor: &mut dyn ClosureVisitor) -> Result<()> {
    visitor.meta(id, Class::List)?;
    if visitor.is_known(id) {
        return Ok(());
    }
    for entry in decode_node(&chunks.get(id)?, depth)? {
        match entry {
            Entry::Node { id, .. } => walk_node(chunks, &id, depth - 1, visitor)?,
            Entry::Extent(extent) => visit_extent(&extent, visitor)?,
        }
    }
    visitor.seen(id);
    Ok(())
}

/// Chunks of metadata that have been seen, up to a bound: beyond it some are opened again.
#[derive(Debug, Default)]
pub struct Known {
    ids: std::collections::HashSet<ChunkId>,
}

impl Known {
    /// About 8 MiB.
    const MAX: usize = 128 * 1024;

    /// Whether `id` has been seen.
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.ids.contains(id)
    }

    /// `id` and all below it has been seen.
    pub fn insert(&mut self, id: &ChunkId) {
        if self.ids.len() < Self::MAX {
            self.ids.insert(*id);
        }
    }
}
