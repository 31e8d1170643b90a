//! What of a file's (or table's) content the receiver has, and which of its chunks come closest to the rest.
//!
//! The content is laid beside an older one that the receiver holds. List nodes and chunks that both have are anchors;
//! what lies between two of them in the new content is paired with what lies between them in the old one: for disk and
//! memory images that is the same offset, for files cut by content the gap that an edit has left. A node that a content
//! repeats is shown each time, but opened once ([`Opened`]). Memory: the ids of the old content's nodes, and its extents
//! below those nodes that changed, up to [`MAX_EXTENTS`].

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use layerfs::chunk::{ChunkRead, Class};
use layerfs::closure::{Opened, Span, open_node};
use layerfs::content::{Content, Entry, Extent, List};
use layerfs::{ChunkId, Result};

use crate::plan::{Base, Candidate};

/// So many of the old content's extents are kept at most (48 bytes each): changed parts beyond go without bases.
const MAX_EXTENTS: usize = 500_000;
/// A gap of the old content up to this size is the base of all that stands in its place, whichever lies where.
const WHOLE_GAP: u64 = 256 * 1024;
/// No chunk gets bases of more bytes than this.
const MAX_BASE_BYTES: u64 = 512 * 1024;
/// So many chunks of a gap wait for its end; longer gaps are paired from their begin alone.
const MAX_GAP_CHUNKS: usize = 64;
/// A list node gets so many as its bases at most.
const MAX_BASE_NODES: usize = 16;
/// About what a list node has, as the structure doesn't tell.
const NODE_BYTES: u32 = 8 * 1024;

/// Something that a content consists of, with its place.
#[derive(Clone, Copy, Debug)]
struct Spot {
    id: ChunkId,
    offset: u64,
    bytes: u64,
    /// 0 for a chunk.
    depth: u8,
}

/// Shows the nodes and chunks of `content` in order, parents first; a node for which `visit` says no, and one that was
/// `opened`, isn't opened.
fn walk(
    chunks: &dyn ChunkRead,
    content: &Content,
    opened: &mut Opened,
    visit: &mut dyn FnMut(Spot) -> Result<bool>,
) -> Result<()> {
    let Content::Extents { bytes, list, .. } = content else { return Ok(()) };
    opened.begin();
    match list {
        List::Direct(extents) => {
            let mut offset = 0;
            for extent in extents {
                visit_extent(extent, offset, visit)?;
                offset += extent.len();
            }
            Ok(())
        }
        List::Tree { root, depth } => {
            let root = Spot { id: *root, offset: 0, bytes: *bytes, depth: *depth };
            NodeWalk { chunks, opened, visit }.node(root)
        }
    }
}

fn visit_extent(extent: &Extent, offset: u64, visit: &mut dyn FnMut(Spot) -> Result<bool>) -> Result<()> {
    match extent {
        Extent::Chunk { id, bytes } => visit(Spot { id: *id, offset, bytes: u64::from(*bytes), depth: 0 }).map(|_| ()),
        Extent::Hole { .. } => Ok(()),
    }
}

struct NodeWalk<'a> {
    chunks: &'a dyn ChunkRead,
    opened: &'a mut Opened,
    visit: &'a mut dyn FnMut(Spot) -> Result<bool>,
}

impl NodeWalk<'_> {
    fn node(&mut self, spot: Spot) -> Result<()> {
        let span = Span { id: spot.id, bytes: spot.bytes, depth: spot.depth };
        if !(self.visit)(spot)? || self.opened.contains(&span) {
            return Ok(());
        }
        self.opened.insert(span)?;
        let mut offset = spot.offset;
        for entry in open_node(self.chunks, &span)? {
            match entry {
                Entry::Extent(extent) => visit_extent(&extent, offset, self.visit)?,
                Entry::Node { id, bytes } => self.node(Spot { id, offset, bytes, depth: spot.depth - 1 })?,
            }
            offset += entry.len();
        }
        Ok(())
    }
}

/// The nodes of `content`, found without opening the leaves.
fn nodes(chunks: &dyn ChunkRead, content: &Content) -> Result<HashSet<ChunkId>> {
    let mut nodes = HashSet::new();
    walk(chunks, content, &mut Opened::default(), &mut |spot| {
        if spot.depth > 0 {
            nodes.insert(spot.id);
        }
        Ok(spot.depth > 1)
    })?;
    Ok(nodes)
}

/// An older content, as far as the new one differs from it.
#[derive(Default)]
struct Old {
    /// Shared nodes, and all chunks outside of these → where they lie.
    anchors: HashMap<ChunkId, u64>,
    /// Chunks outside of shared nodes, in order.
    chunks: Vec<Spot>,
    /// Nodes that aren't shared, by depth, in order.
    nodes: Vec<Vec<Spot>>,
}

impl Old {
    fn load(chunks: &dyn ChunkRead, old: &Content, new_nodes: &HashSet<ChunkId>) -> Result<Old> {
        let mut all = Old::default();
        let mut node_count = 0;
        walk(chunks, old, &mut Opened::default(), &mut |spot| {
            let is_shared = spot.depth > 0 && new_nodes.contains(&spot.id);
            if all.chunks.len() >= MAX_EXTENTS || node_count >= MAX_EXTENTS {
                return Ok(false);
            }
            node_count += usize::from(spot.depth > 0);
            if is_shared || spot.depth == 0 {
                all.anchors.entry(spot.id).or_insert(spot.offset);
            }
            match spot.depth {
                0 => all.chunks.push(spot),
                depth if !is_shared => {
                    let depth = usize::from(depth);
                    all.nodes.resize(all.nodes.len().max(depth + 1), Vec::new());
                    all.nodes[depth].push(spot);
                }
                _ => {}
            }
            Ok(!is_shared)
        })?;
        Ok(all)
    }

    /// The chunks that lie in `from..to`, up to [`MAX_BASE_BYTES`].
    fn between(&self, from: u64, to: u64) -> Vec<Base> {
        let first = self.chunks.partition_point(|spot| spot.offset + spot.bytes <= from);
        let mut bases = Vec::new();
        let mut total = 0;
        for spot in self.chunks[first..].iter().take_while(|spot| spot.offset < to) {
            total += spot.bytes;
            if total > MAX_BASE_BYTES {
                break;
            }
            bases.push(Base { id: spot.id, bytes: spot.bytes as u32 });
        }
        bases
    }

    /// The nodes of that depth which lie in `from..to`: what is the same in the new one may be from any.
    fn nodes_between(&self, from: u64, to: u64, depth: u8) -> Option<Arc<[Base]>> {
        let nodes = self.nodes.get(usize::from(depth))?;
        let first = nodes.partition_point(|node| node.offset + node.bytes <= from);
        let found = nodes[first..].iter().take_while(|node| node.offset < to).take(MAX_BASE_NODES);
        let bases: Vec<Base> = found.map(|node| Base { id: node.id, bytes: NODE_BYTES }).collect();
        (!bases.is_empty()).then(|| bases.into())
    }
}

/// Two offsets that belong together: in the new content and in the old one.
#[derive(Clone, Copy, Debug, Default)]
struct Anchor {
    new: u64,
    old: u64,
}

/// Gives every node and chunk of `new` to `sink` that neither stands in `olds` nor is known otherwise, with those
/// chunks of the first of `olds` that lie where it lies. `class` is that of the content's chunks; what was `opened` before
/// has been given.
///
/// # Errors
/// Those of `sink` and of reading.
pub(crate) fn align(
    chunks: &dyn ChunkRead,
    class: Class,
    new: &Content,
    olds: &[&Content],
    opened: &mut Opened,
    is_known: &dyn Fn(&ChunkId) -> bool,
    sink: &mut dyn FnMut(Candidate) -> Result<()>,
) -> Result<()> {
    let mut walk_state =
        Alignment { class, old: Old::default(), last: Anchor::default(), is_anchored: false, gap: Vec::new(), sink };
    let mut others = Vec::new();
    if !olds.is_empty() {
        let new_nodes = nodes(chunks, new)?;
        walk_state.old = Old::load(chunks, olds[0], &new_nodes)?;
        for old in &olds[1..] {
            others.push(Old::load(chunks, old, &new_nodes)?.anchors);
        }
    }
    walk(chunks, new, opened, &mut |spot| {
        if let Some(old) = walk_state.old.anchors.get(&spot.id).copied() {
            walk_state.anchor(spot, old)?;
            return Ok(false);
        }
        if is_known(&spot.id) || others.iter().any(|other| other.contains_key(&spot.id)) {
            return Ok(false);
        }
        walk_state.lacking(spot).map(|()| true)
    })?;
    let ends = olds.first().map(|old| Anchor { new: new.len(), old: old.len() });
    walk_state.end_gap(ends)
}

struct Alignment<'a> {
    class: Class,
    old: Old,
    /// Where the last thing that both have ends.
    last: Anchor,
    /// Whether there was such a thing: then the content is the old one's successor, and what is new in it is new.
    is_anchored: bool,
    /// The chunks since then.
    gap: Vec<Spot>,
    sink: &'a mut dyn FnMut(Candidate) -> Result<()>,
}

impl Alignment<'_> {
    fn anchor(&mut self, spot: Spot, old: u64) -> Result<()> {
        self.is_anchored = true;
        self.end_gap(Some(Anchor { new: spot.offset, old }))?;
        self.last = Anchor { new: spot.offset + spot.bytes, old: old + spot.bytes };
        Ok(())
    }

    fn lacking(&mut self, spot: Spot) -> Result<()> {
        if spot.depth > 0 {
            // Nodes are wanted before what they refer to, so that nothing has to be looked for twice.
            let at = self.last.old + (spot.offset - self.last.new);
            let bases = self.old.nodes_between(at, at.saturating_add(spot.bytes), spot.depth);
            let is_certain = self.is_anchored || self.class == Class::Table;
            return (self.sink)(Candidate { id: spot.id, bytes: 0, class: Class::List, bases, is_certain });
        }
        self.gap.push(spot);
        if self.gap.len() == MAX_GAP_CHUNKS { self.end_gap(None) } else { Ok(()) }
    }

    /// What lies between the last anchor and `next` goes out, paired with what lies there in the old content.
    fn end_gap(&mut self, next: Option<Anchor>) -> Result<()> {
        let gap = std::mem::take(&mut self.gap);
        let (Some(first), Some(last)) = (gap.first(), gap.last()) else { return Ok(()) };
        let from = self.last.old + (first.offset - self.last.new);
        let end = last.offset + last.bytes;
        let to = match next {
            // What moved backwards tells nothing of this gap.
            Some(next) if next.old >= self.last.old => next.old,
            _ => from + (end - first.offset),
        };
        let whole: Option<Arc<[Base]>> = (to.saturating_sub(self.last.old) <= WHOLE_GAP)
            .then(|| self.old.between(self.last.old, to))
            .filter(|bases| !bases.is_empty())
            .map(Arc::from);
        let is_certain = self.is_anchored || self.class == Class::Table;
        for spot in gap {
            let bases = match (&whole, next) {
                (Some(whole), _) => Some(whole.clone()),
                (None, next) => self.nearest(spot, next),
            };
            let candidate = Candidate { id: spot.id, bytes: spot.bytes as u32, class: self.class, bases, is_certain };
            (self.sink)(candidate)?;
        }
        // A gap that goes on is paired on from here.
        if next.is_none() {
            self.last = Anchor { new: end, old: to };
        }
        Ok(())
    }

    /// What lies where `spot` does, counted from the nearer of the two anchors.
    fn nearest(&self, spot: Spot, next: Option<Anchor>) -> Option<Arc<[Base]>> {
        let from_left = self.last.old + (spot.offset - self.last.new);
        let at = match next {
            Some(next) if next.new - spot.offset < spot.offset - self.last.new => {
                next.old.saturating_sub(next.new - spot.offset)
            }
            _ => from_left,
        };
        let bases = self.old.between(at, at + spot.bytes);
        (!bases.is_empty()).then(|| bases.into())
    }
}
