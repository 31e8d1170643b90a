//! Everything that a layer consists of: its manifest, its tables, their list nodes, its files' list nodes and data.
//!
//! It hides how manifest, tables, records and lists refer to chunks from those who only want to know *which* chunks.
//! Invariants: a visitor is shown every chunk at least once, before it is opened, except below what it doesn't want
//! opened; a malformed structure is an error, never a panic. Memory: one list node per level, one table piece or
//! record, a byte for each piece of a table, and the ids of nodes that were opened ([`Opened`]).

mod records;

use std::collections::HashSet;

use serde::Serialize;

use crate::chunk::{ChunkRead, Class};
use crate::content::{Content, Entry, Extent, List, decode_node};
use crate::error::{Error, Result};
use crate::id::{ChunkId, Ino, LayerId};
use crate::inode::Node;
use crate::manifest::Manifest;

pub use records::Records;
pub(crate) use records::{MIN_DENTRY_BYTES, MIN_INODE_BYTES};

/// So many nodes above the leaves a content may have, each counted once. FORMAT.md, "List nodes".
pub(crate) const MAX_UPPER_NODES: usize = 64 * 1024;
/// So many nodes are remembered in a generation, of which there are two, for each of leaves and nodes above.
const GENERATION: usize = 7 << 12;

/// A chunk that a content refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A node of the list tree.
    Node(ChunkId),
    /// A chunk of the content, with its plain length in bytes.
    Chunk(ChunkId, u32),
}

impl Part {
    /// The chunk.
    pub fn id(self) -> ChunkId {
        match self {
            Part::Node(id) | Part::Chunk(id, _) => id,
        }
    }
}

/// Shows every node and chunk of `content` to `visit`, in order, parents first. A node for which `visit` answers
/// false isn't opened.
///
/// # Errors
/// Those of `visit` and of reading; [`Error::Corrupt`] for a malformed tree.
pub fn walk_content(
    chunks: &dyn ChunkRead,
    content: &Content,
    visit: &mut dyn FnMut(Part) -> Result<bool>,
) -> Result<()> {
    walk_new(chunks, content, &mut Opened::default(), visit)
}

/// [`walk_content`], but what stands below nodes that were `opened`, in a content before this one too, isn't shown again.
///
/// # Errors
/// As [`walk_content`].
pub fn walk_new(
    chunks: &dyn ChunkRead,
    content: &Content,
    opened: &mut Opened,
    visit: &mut dyn FnMut(Part) -> Result<bool>,
) -> Result<()> {
    let Content::Extents { bytes, list, .. } = content else { return Ok(()) };
    opened.begin();
    match list {
        List::Direct(extents) => extents.iter().try_for_each(|extent| visit_extent(extent, visit)),
        List::Tree { root, depth } => {
            NodeWalk { chunks, opened, visit }.node(Span { id: *root, bytes: *bytes, depth: *depth })
        }
    }
}

fn visit_extent(extent: &Extent, visit: &mut dyn FnMut(Part) -> Result<bool>) -> Result<()> {
    match extent {
        Extent::Chunk { id, bytes } => visit(Part::Chunk(*id, *bytes)).map(|_| ()),
        Extent::Hole { .. } => Ok(()),
    }
}

/// A node, and what is said of it above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// The node.
    pub id: ChunkId,
    /// The bytes of the content that it spans.
    pub bytes: u64,
    /// So many levels it stands above the extents; 1 for a leaf.
    pub depth: u8,
}

/// The list nodes that a walk has opened, so that a list which repeats them, as a few KiB can 2^54 times, isn't followed
/// twice.
///
/// Of the content at hand all nodes above the leaves are known, which is enough for the walk to grow with what is stored
/// and not with what that spells out; a content that has too many of them is refused. Of leaves, and of contents before,
/// those of late are known. Memory: 13 MiB at most.
#[derive(Debug, Default)]
pub struct Opened {
    /// Above the leaves, in the content at hand.
    upper: HashSet<Span>,
    upper_lately: Lately,
    leaves_lately: Lately,
}

impl Opened {
    /// Another content follows.
    pub fn begin(&mut self) {
        self.upper.clear();
    }

    /// Whether `span` was opened.
    pub fn contains(&self, span: &Span) -> bool {
        if span.depth <= 1 { &self.leaves_lately } else { &self.upper_lately }.contains(span)
            || self.upper.contains(span)
    }

    /// `span` is opened.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the content has too many nodes.
    pub fn insert(&mut self, span: Span) -> Result<()> {
        if span.depth <= 1 {
            self.leaves_lately.insert(span);
            return Ok(());
        }
        self.upper_lately.insert(span);
        self.upper.insert(span);
        if self.upper.len() > MAX_UPPER_NODES {
            let detail = format!("a list has more than {MAX_UPPER_NODES} nodes above its leaves");
            return Err(Error::corrupt("list node", detail));
        }
        Ok(())
    }
}

/// What came of late, in two generations.
#[derive(Debug, Default)]
struct Lately {
    young: HashSet<Span>,
    old: HashSet<Span>,
}

impl Lately {
    fn contains(&self, span: &Span) -> bool {
        self.young.contains(span) || self.old.contains(span)
    }

    fn insert(&mut self, span: Span) {
        self.young.insert(span);
        if self.young.len() == GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
    }
}

struct NodeWalk<'a> {
    chunks: &'a dyn ChunkRead,
    opened: &'a mut Opened,
    visit: &'a mut dyn FnMut(Part) -> Result<bool>,
}

impl NodeWalk<'_> {
    /// Recurses as deep as the content says, which its decoding bounds.
    fn node(&mut self, span: Span) -> Result<()> {
        if self.opened.contains(&span) || !(self.visit)(Part::Node(span.id))? {
            return Ok(());
        }
        self.opened.insert(span)?;
        open_node(self.chunks, &span)?.iter().try_for_each(|entry| match entry {
            Entry::Extent(extent) => visit_extent(extent, self.visit),
            Entry::Node { id, bytes } => self.node(Span { id: *id, bytes: *bytes, depth: span.depth - 1 }),
        })
    }
}

/// The entries of the node at `span`, which span as much as it should.
///
/// # Errors
/// Those of reading; [`Error::Corrupt`] for what is malformed.
pub fn open_node(chunks: &dyn ChunkRead, span: &Span) -> Result<Vec<Entry>> {
    let entries = decode_node(&chunks.get(&span.id)?, span.depth)?;
    let sum = entries.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.len()));
    if sum != span.bytes {
        return Err(Error::corrupt("list node", format!("{sum} bytes in a node that should span {}", span.bytes)));
    }
    Ok(entries)
}

/// What a chunk is for within a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The manifest itself.
    Manifest,
    /// The table of inodes, or the list of its chunks.
    Inodes,
    /// The table of dentries, or the list of its chunks.
    Dentries,
    /// What an image says of itself, or the list of its chunks.
    Image,
    /// The content of this inode, or the list of its chunks.
    File(Ino),
}

/// A chunk that a layer needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkUse {
    /// The chunk.
    pub id: ChunkId,
    /// What it holds.
    pub class: Class,
    /// What for.
    pub role: Role,
}

/// Who is shown a layer's chunks. The answer says whether to open a piece of a table, or a list node of a file, and
/// go on with what it refers to; all else is opened anyway.
pub type Visit<'a> = dyn FnMut(ChunkUse) -> Result<bool> + 'a;

/// Shows every chunk of `layer` to `visit`, without the layers below it. Returns its manifest.
///
/// # Errors
/// Those of `visit` and of reading; [`Error::Corrupt`] for what is malformed in the opened part.
pub fn walk_layer(chunks: &dyn ChunkRead, layer: LayerId, visit: &mut Visit<'_>) -> Result<Manifest> {
    visit(ChunkUse { id: layer.0, class: Class::Manifest, role: Role::Manifest })?;
    let manifest = Manifest::load(chunks, layer)?;
    if let Some(image) = &manifest.image {
        show_content(chunks, image, Role::Image, visit)?;
    }
    let wanted = show_table(chunks, &manifest.dentries, Role::Dentries, visit)?;
    let mut dentries = Records::dentries(chunks, &manifest)?.only(wanted);
    while dentries.next_dentry()?.is_some() {}
    let wanted = show_table(chunks, &manifest.inodes, Role::Inodes, visit)?;
    let mut inodes = Records::inodes(chunks, &manifest)?.only(wanted);
    while let Some(inode) = inodes.next_inode()? {
        if let Node::File(content) = &inode.node {
            show_content(chunks, content, Role::File(inode.ino), visit)?;
        }
    }
    Ok(manifest)
}

fn show_content(chunks: &dyn ChunkRead, content: &Content, role: Role, visit: &mut Visit<'_>) -> Result<()> {
    walk_content(chunks, content, &mut |part| match part {
        Part::Node(id) => visit(ChunkUse { id, class: Class::List, role }),
        Part::Chunk(id, _) => visit(ChunkUse { id, class: Class::Data, role }),
    })
}

/// Shows the nodes and pieces of a table. Returns which of the pieces, asked for in order, to open.
fn show_table(
    chunks: &dyn ChunkRead,
    table: &Content,
    role: Role,
    visit: &mut Visit<'_>,
) -> Result<impl FnMut(&ChunkId) -> bool + use<>> {
    let mut answers = Vec::new();
    walk_content(chunks, table, &mut |part| {
        match part {
            Part::Node(id) => drop(visit(ChunkUse { id, class: Class::List, role })?),
            Part::Chunk(id, _) => answers.push(visit(ChunkUse { id, class: Class::Table, role })?),
        }
        Ok(true)
    })?;
    let mut answers = answers.into_iter();
    Ok(move |_: &ChunkId| answers.next().unwrap_or(true))
}

/// [`walk_layer`] of a layer and all below it, top first; `skip` says of which layers (with all below) not to bother.
///
/// # Errors
/// As [`walk_layer`]; [`Error::Corrupt`] too for layers that don't fit on one another.
pub fn walk_stack(
    chunks: &dyn ChunkRead,
    top: LayerId,
    visit: &mut Visit<'_>,
    mut skip: impl FnMut(LayerId) -> bool,
) -> Result<()> {
    let mut next = Some((top, None));
    while let Some((layer, depth)) = next.filter(|(layer, _)| !skip(*layer)) {
        let manifest = walk_layer(chunks, layer, visit)?;
        if depth.is_some_and(|depth| depth != manifest.depth) {
            return Err(Error::corrupt("manifest", "its parent has another depth than it says"));
        }
        next = manifest.parent.map(|parent| (parent, manifest.depth.checked_sub(1)));
    }
    Ok(())
}

/// Chunks of metadata that walks have opened, up to a bound: beyond it some are opened again.
///
/// Whoever answers by it must forget it when a walk fails, as not all below what it knows was shown then.
#[derive(Debug, Default)]
pub struct Known {
    /// With the class, and whether it was for dentries: what the same bytes mean elsewhere is another question.
    chunks: HashSet<(ChunkId, Class, bool)>,
}

impl Known {
    /// A hash set of 2^18 slots is full then: about 9 MiB.
    const MAX: usize = 7 << 15;

    /// Whether `chunk` wasn't known yet: what [`Visit`] is to answer. Of data nothing is kept.
    pub fn is_new(&mut self, chunk: &ChunkUse) -> bool {
        let key = (chunk.id, chunk.class, chunk.role == Role::Dentries);
        match chunk.class {
            Class::Data => true,
            _ if self.chunks.len() < Self::MAX => self.chunks.insert(key),
            _ => !self.chunks.contains(&key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attr::Attrs;
    use crate::chunk::{ChunkWrite, MemoryChunks};
    use crate::chunker::Chunker;
    use crate::codec::Put;
    use crate::inode::Inode;
    use crate::manifest::{LayerKind, LayerWriter};

    fn inode(ino: u64, node: Node) -> Inode {
        Inode { ino: Ino(ino), nlink: 1, attrs: Attrs::default(), xattrs: Vec::new(), node }
    }

    /// A file of one chunk.
    fn file(chunks: &MemoryChunks, ino: u64, plain: &[u8]) -> Inode {
        let extent = Extent::Chunk { id: chunks.put(Class::Data, plain).unwrap(), bytes: plain.len() as u32 };
        let bytes = plain.len() as u64;
        let list = List::Direct(vec![extent]);
        inode(ino, Node::File(Content::Extents { bytes, data_bytes: bytes, chunker: Chunker::Tree, list }))
    }

    fn layer(chunks: &MemoryChunks, inodes: &[Inode]) -> LayerId {
        let mut writer = LayerWriter::new(chunks);
        inodes.iter().for_each(|inode| writer.inode(inode).unwrap());
        writer.finish(LayerKind::Base, None, Ino(10_000)).unwrap().0
    }

    fn data(chunks: &MemoryChunks, layer: LayerId, known: &mut Known) -> HashSet<ChunkId> {
        let mut data = HashSet::new();
        let mut visit = |chunk: ChunkUse| {
            data.extend((chunk.class == Class::Data).then_some(chunk.id));
            Ok(known.is_new(&chunk))
        };
        walk_layer(chunks, layer, &mut visit).unwrap();
        data
    }

    #[test]
    fn what_is_known_is_passed_over_but_not_a_record_that_is_split() {
        let chunks = MemoryChunks::default();
        // The same start of a long record, twice with another end.
        let long = |plain: &[u8]| {
            let mut inode = file(&chunks, 5000, plain);
            inode.xattrs = vec![(b"user.long".to_vec(), vec![7; 40_000])];
            inode
        };
        let mut inodes: Vec<Inode> = (1..5000).map(|ino| file(&chunks, ino, &ino.to_le_bytes())).collect();
        inodes.push(long(b"one"));
        let first = layer(&chunks, &inodes);
        *inodes.last_mut().unwrap() = long(b"other");
        let second = layer(&chunks, &inodes);
        let mut known = Known::default();
        assert_eq!(data(&chunks, first, &mut known).len(), 5000);
        let of_second = data(&chunks, second, &mut known);
        assert!(of_second.contains(&ChunkId::of(b"other")) && of_second.len() < 1000, "{}", of_second.len());
    }

    #[test]
    fn what_a_list_spells_out_does_not_count_but_what_it_has() {
        let chunks = MemoryChunks::default();
        let leaf = |seed: u32| {
            let mut node = vec![1, 1, 0, 1];
            node.put_u32(4);
            node.put_id(&ChunkId::of(&seed.to_le_bytes()));
            (chunks.put(Class::List, &node).unwrap(), 4u64)
        };
        let above = |depth: u8, children: &[(ChunkId, u64)]| {
            let mut node = vec![depth];
            node.put_u16(children.len() as u16);
            for (id, bytes) in children {
                node.put_u64(*bytes);
                node.put_id(id);
            }
            (chunks.put(Class::List, &node).unwrap(), children.iter().map(|(_, bytes)| bytes).sum::<u64>())
        };
        let tree = |depth: u8, nodes: Vec<(ChunkId, u64)>| {
            let upper: Vec<_> = nodes.chunks(512).map(|children| above(depth, children)).collect();
            let (root, bytes) = above(depth + 1, &upper);
            let list = List::Tree { root, depth: depth + 1 };
            Content::Extents { bytes, data_bytes: bytes, chunker: Chunker::Tree, list }
        };
        let count = |content: &Content, opened: &mut Opened| {
            let mut nodes = 0;
            let mut visit = |part| {
                nodes += usize::from(matches!(part, Part::Node(_)));
                Ok(true)
            };
            walk_new(&chunks, content, opened, &mut visit).map(|()| nodes)
        };
        // More leaves than are remembered, all shown.
        let leaves: Vec<_> = (0..70_000).map(leaf).collect();
        let many = tree(2, leaves.clone());
        let mut opened = Opened::default();
        assert_eq!(count(&many, &mut opened).unwrap(), 70_000 + 70_000usize.div_ceil(512) + 1);
        // Another file with the same content.
        assert_eq!(count(&many, &mut opened).unwrap(), 0);
        // As many nodes above leaves can't be kept apart.
        let upper: Vec<_> = leaves.iter().map(|leaf| above(2, &[*leaf])).collect();
        let error = count(&tree(3, upper.clone()), &mut Opened::default()).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        // 1024 of them with a leaf each, below two nodes that are repeated too.
        let repeated = [&upper[..1024]; 70].concat();
        assert_eq!(count(&tree(3, repeated), &mut Opened::default()).unwrap(), 2 * 1024 + 2 + 1);
    }

    #[test]
    fn a_list_that_repeats_its_nodes_is_walked_once() {
        let chunks = MemoryChunks::default();
        let mut node = vec![1, 1, 0, 1];
        node.put_u32(3);
        node.put_id(&chunks.put(Class::Data, b"abc").unwrap());
        let (mut root, mut bytes) = (chunks.put(Class::List, &node).unwrap(), 3u64);
        for depth in 2..=8 {
            let mut node = vec![depth];
            node.put_u16(128);
            for _ in 0..128 {
                node.put_u64(bytes);
                node.put_id(&root);
            }
            (root, bytes) = (chunks.put(Class::List, &node).unwrap(), bytes * 128);
        }
        let list = List::Tree { root, depth: 8 };
        let content = Content::Extents { bytes, data_bytes: bytes, chunker: Chunker::Tree, list };
        let mut parts = 0;
        walk_content(&chunks, &content, &mut |_| {
            parts += 1;
            Ok(true)
        })
        .unwrap();
        assert_eq!(parts, 9);
    }

    #[test]
    fn a_record_of_more_than_16_mib_is_not_written() {
        let chunks = MemoryChunks::default();
        let mut inode = inode(3, Node::Folder);
        let fill = |count: u32| (0..count).map(|n| (format!("user.{n:05}").into_bytes(), vec![1; 65_536])).collect();
        inode.xattrs = fill(255);
        LayerWriter::new(&chunks).inode(&inode).unwrap();
        inode.xattrs = fill(256);
        let error = LayerWriter::new(&chunks).inode(&inode).unwrap_err();
        assert!(matches!(&error, Error::Invalid(message) if message.contains("inode 3 ")), "{error}");
    }
}
