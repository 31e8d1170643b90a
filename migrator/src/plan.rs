//! Which chunks a receiver may lack, worked out at the sender: everything that the lacking layers refer to, less what
//! layers refer to that the receiver holds whole. PROTOCOL.md, "What is asked for".
//!
//! Tables are compared piece by piece with those of all held layers; only pieces that none of them has are opened, and
//! of these the records' contents are compared with the content of the same inode in the most related held layers. So
//! the work and the questions grow with what changed. Nothing here has to be exact: a chunk too many costs 32 bytes on
//! the wire, and one too few is found by the receiver's verification.

use std::collections::{HashMap, HashSet};

use layerfs::chunk::ChunkRead;
use layerfs::closure::{Part, Records, walk_content};
use layerfs::content::Content;
use layerfs::inode::{Inode, Node};
use layerfs::manifest::Manifest;
use layerfs::{ChunkId, Ino, LayerId, Result};

/// A chunk that the receiver may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: ChunkId,
    /// Its plain length, where the structure that refers to it tells.
    pub bytes: u32,
}

/// No more ids of held layers' tables than this are kept (48 bytes each).
const MAX_KNOWN: usize = 400_000;
/// Records are compared with those of so many held layers at most, besides the stack's own.
const MAX_RELATED: usize = 4;
/// Of each of these so many bytes of table are read at most.
const MAX_RELATED_BYTES: u64 = 64 << 20;

/// Gives every candidate of the layers `lacking` (parents first) to `sink`, given that `held` are there whole.
///
/// # Errors
/// Those of `sink` and of reading.
pub fn candidates(
    chunks: &dyn ChunkRead,
    lacking: &[LayerId],
    held: &[LayerId],
    sink: &mut dyn FnMut(Candidate) -> Result<()>,
) -> Result<()> {
    let held = Held::load(chunks, held)?;
    let mut recent = Recent::default();
    let mut once = |id: ChunkId, bytes: u32| if recent.insert(id) { sink(Candidate { id, bytes }) } else { Ok(()) };
    for layer in lacking {
        LayerPlan { chunks, held: &held, sink: &mut once }.run(*layer)?;
    }
    Ok(())
}

/// What the held layers' tables consist of.
struct Held {
    layers: Vec<(LayerId, Manifest)>,
    /// Table piece or list node → the first layer that has it.
    known: HashMap<ChunkId, u16>,
}

impl Held {
    fn load(chunks: &dyn ChunkRead, held: &[LayerId]) -> Result<Held> {
        let mut all = Held { layers: Vec::with_capacity(held.len()), known: HashMap::new() };
        for id in held {
            let manifest = Manifest::load(chunks, *id)?;
            let number = all.layers.len() as u16;
            for table in manifest.contents() {
                if all.known.len() < MAX_KNOWN {
                    walk_content(chunks, table, &mut |part| {
                        all.known.entry(part.id()).or_insert(number);
                        Ok(true)
                    })?;
                }
            }
            all.layers.push((*id, manifest));
        }
        Ok(all)
    }
}

/// The walk over one lacking layer.
struct LayerPlan<'a> {
    chunks: &'a dyn ChunkRead,
    held: &'a Held,
    sink: &'a mut dyn FnMut(ChunkId, u32) -> Result<()>,
}

impl<'a> LayerPlan<'a> {
    fn run(&mut self, layer: LayerId) -> Result<()> {
        let bytes = self.chunks.get(&layer.0)?;
        let manifest = Manifest::decode(&bytes)?;
        (self.sink)(layer.0, bytes.len() as u32)?;
        if let Some(image) = &manifest.image {
            self.table(image, &mut |_, _| {})?;
        }
        let mut hits = vec![0u32; self.held.layers.len()];
        let mut shared = HashSet::new();
        self.table(&manifest.dentries, &mut |layer, _| hits[layer] += 1)?;
        self.table(&manifest.inodes, &mut |layer, piece| {
            hits[layer] += 1;
            shared.insert(piece);
        })?;
        let mut related = self.related(&manifest, &hits, &shared)?;
        let held = self.held;
        let mut inodes = Records::inodes(self.chunks, &manifest)?.only(|piece| !held.known.contains_key(piece));
        while let Some(inode) = inodes.next_inode()? {
            if let Node::File(content @ Content::Extents { .. }) = &inode.node {
                self.file(inode.ino, content, &mut related)?;
            }
        }
        Ok(())
    }

    /// Gives the list nodes and pieces of a table that no held layer has to the sink; of the other pieces `found` is
    /// told the held layer.
    fn table(&mut self, table: &Content, found: &mut dyn FnMut(usize, ChunkId)) -> Result<()> {
        walk_content(self.chunks, table, &mut |part| {
            match (part, self.held.known.get(&part.id())) {
                (Part::Chunk(id, _), Some(layer)) => found(usize::from(*layer), id),
                (Part::Node(_), Some(_)) => {}
                (Part::Chunk(id, bytes), None) => (self.sink)(id, bytes)?,
                (Part::Node(id), None) => (self.sink)(id, 0)?,
            }
            Ok(true)
        })
    }

    /// The held layers whose records are worth comparing: those below in the stack, top first, then those that share
    /// the most.
    fn related<'s>(&self, manifest: &Manifest, hits: &[u32], shared: &'s HashSet<ChunkId>) -> Result<Vec<Cursor<'s>>>
    where
        'a: 's,
    {
        let position = |id: LayerId| self.held.layers.iter().position(|(other, _)| *other == id);
        let mut chosen = Vec::new();
        let mut below = manifest.parent;
        while let Some(at) = below.and_then(position) {
            chosen.push(at);
            below = self.held.layers[at].1.parent;
        }
        let mut others: Vec<usize> = (0..hits.len()).filter(|at| hits[*at] > 0 && !chosen.contains(at)).collect();
        others.sort_by_key(|at| std::cmp::Reverse(hits[*at]));
        chosen.extend(others.into_iter().take(MAX_RELATED));
        chosen.into_iter().map(|at| Cursor::new(self.chunks, &self.held.layers[at].1, shared)).collect()
    }

    fn file(&mut self, ino: Ino, content: &Content, related: &mut [Cursor<'_>]) -> Result<()> {
        let mut there = HashSet::new();
        for cursor in related {
            if let Some(other) = cursor.content_of(ino)? {
                walk_content(self.chunks, other, &mut |part| Ok(there.insert(part.id())))?;
            }
        }
        walk_content(self.chunks, content, &mut |part| {
            let (id, bytes) = match part {
                Part::Node(id) => (id, 0),
                Part::Chunk(id, bytes) => (id, bytes),
            };
            if there.contains(&id) {
                return Ok(false);
            }
            (self.sink)(id, bytes).map(|()| true)
        })
    }
}

/// A held layer's inodes, visited in step with the lacking layer's.
struct Cursor<'a> {
    inodes: Records<'a>,
    current: Option<Inode>,
    is_at_end: bool,
}

impl<'a> Cursor<'a> {
    fn new(chunks: &'a dyn ChunkRead, manifest: &Manifest, shared: &'a HashSet<ChunkId>) -> Result<Cursor<'a>> {
        // What both layers have isn't opened there, so nothing in it will be looked for.
        let inodes = Records::inodes(chunks, manifest)?.only(|piece| !shared.contains(piece));
        Ok(Cursor { inodes, current: None, is_at_end: false })
    }

    /// The content of inode `ino`, if the layer has that as a file. `ino` grows from call to call.
    fn content_of(&mut self, ino: Ino) -> Result<Option<&Content>> {
        while !self.is_at_end && self.current.as_ref().is_none_or(|inode| inode.ino < ino) {
            self.current = self.inodes.next_inode()?;
            self.is_at_end = self.current.is_none() || self.inodes.loaded_bytes() > MAX_RELATED_BYTES;
        }
        Ok(match &self.current {
            Some(Inode { ino: found, node: Node::File(content), .. }) if *found == ino => Some(content),
            _ => None,
        })
    }
}

/// Remembers the ids of late, so that most repetitions aren't asked for twice, in bounded memory.
#[derive(Default)]
struct Recent {
    young: HashSet<[u8; 16]>,
    old: HashSet<[u8; 16]>,
}

impl Recent {
    const GENERATION: usize = 200_000;

    /// Whether `id` is new. (Half an id is enough: nobody makes 2^64 chunks.)
    fn insert(&mut self, id: ChunkId) -> bool {
        let mut half = [0; 16];
        half.copy_from_slice(&id.0[..16]);
        if self.old.contains(&half) || !self.young.insert(half) {
            return false;
        }
        if self.young.len() == Self::GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        true
    }
}
