//! Which chunks a receiver may lack, worked out at the sender: everything that the lacking layers refer to, less what
//! layers refer to that the receiver holds whole. PROTOCOL.md, "What is asked for".
//!
//! Tables are compared piece by piece with those of all held layers; only pieces that none of them has are opened, and
//! of these the records' contents are compared with the content of the same inode in the most related held layers. So
//! the work and the questions grow with what changed. What is new is paired with what stood in its place there. Nothing here has to be exact: a chunk too many costs 32 bytes on
//! the wire, and one too few is found by the receiver's verification.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use layerfs::chunk::{ChunkRead, Class};
use layerfs::closure::{Opened, Part, Records, walk_content};
use layerfs::content::Content;
use layerfs::inode::{Inode, Node};
use layerfs::manifest::Manifest;
use layerfs::{ChunkId, Ino, LayerId, Result};

use crate::align::align;

/// A chunk that the receiver may lack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: ChunkId,
    /// Its plain length, where the structure that refers to it tells.
    pub bytes: u32,
    /// What it holds.
    pub class: Class,
    /// Chunks that the receiver holds and that this one probably resembles.
    pub bases: Option<Arc<[Base]>>,
    /// Whether the receiver lacks it almost certainly, so that asking would be a waste.
    pub is_certain: bool,
}

impl Candidate {
    /// A chunk of which no more is known.
    pub fn new(id: ChunkId, bytes: u32) -> Candidate {
        Candidate { id, bytes, class: Class::Data, bases: None, is_certain: false }
    }
}

/// A chunk of a held layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Its id.
    pub id: ChunkId,
    /// Its plain length, or a guess.
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
    let mut once = |candidate: Candidate| if recent.insert(candidate.id) { sink(candidate) } else { Ok(()) };
    let mut opened = Opened::default();
    for layer in lacking {
        LayerPlan { chunks, held: &held, opened: &mut opened, sink: &mut once }.run(*layer)?;
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

/// One of a manifest's tables.
type TableOf = fn(&Manifest) -> &Content;

/// The walk over one lacking layer.
struct LayerPlan<'a> {
    chunks: &'a dyn ChunkRead,
    held: &'a Held,
    /// List nodes whose content was given.
    opened: &'a mut Opened,
    sink: &'a mut dyn FnMut(Candidate) -> Result<()>,
}

impl<'a> LayerPlan<'a> {
    fn run(&mut self, layer: LayerId) -> Result<()> {
        let bytes = self.chunks.get(&layer.0)?;
        let manifest = Manifest::decode(&bytes)?;
        let mut hits = vec![0u32; self.held.layers.len()];
        let mut shared = HashSet::new();
        self.hits(&manifest.dentries, &mut |layer, _| hits[layer] += 1)?;
        self.hits(&manifest.inodes, &mut |layer, piece| {
            hits[layer] += 1;
            shared.insert(piece);
        })?;
        let held = self.held;
        let related = self.related(&manifest, &hits);
        let nearest = related.first().map(|at| &held.layers[*at]);
        let base = nearest.map(|(id, _)| Arc::from([Base { id: id.0, bytes: bytes.len() as u32 }]));
        (self.sink)(Candidate {
            id: layer.0,
            bytes: bytes.len() as u32,
            class: Class::Manifest,
            bases: base,
            is_certain: true,
        })?;
        let is_known = |id: &ChunkId| held.known.contains_key(id);
        if let Some(image) = &manifest.image {
            let old: Vec<&Content> = nearest.iter().filter_map(|(_, manifest)| manifest.image.as_ref()).collect();
            align(self.chunks, Class::Data, image, &old, self.opened, &is_known, self.sink)?;
        }
        let tables: [(&Content, TableOf); 2] =
            [(&manifest.dentries, |m| &m.dentries), (&manifest.inodes, |m| &m.inodes)];
        for (table, of) in tables {
            let old: Vec<&Content> = nearest.iter().map(|(_, manifest)| of(manifest)).collect();
            align(self.chunks, Class::Table, table, &old, self.opened, &is_known, self.sink)?;
        }
        let cursors = related.iter().map(|at| Cursor::new(self.chunks, &held.layers[*at].1, &shared));
        let mut cursors = cursors.collect::<Result<Vec<_>>>()?;
        let mut inodes = Records::inodes(self.chunks, &manifest)?.only(|piece| !held.known.contains_key(piece));
        while let Some(inode) = inodes.next_inode()? {
            if let Node::File(content @ Content::Extents { .. }) = &inode.node {
                self.file(inode.ino, content, &mut cursors)?;
            }
        }
        Ok(())
    }

    /// Tells `found` which held layer has each piece of `table` that one has.
    fn hits(&self, table: &Content, found: &mut dyn FnMut(usize, ChunkId)) -> Result<()> {
        walk_content(self.chunks, table, &mut |part| {
            if let (Part::Chunk(id, _), Some(layer)) = (part, self.held.known.get(&part.id())) {
                found(usize::from(*layer), id);
            }
            Ok(true)
        })
    }

    /// The held layers that are worth comparing with, as places in [`Held::layers`]: those that share the most, with
    /// the same parent before others, and of the same kind; then those below in the stack, top first.
    fn related(&self, manifest: &Manifest, hits: &[u32]) -> Vec<usize> {
        let layers = &self.held.layers;
        let position = |id: LayerId| layers.iter().position(|(other, _)| *other == id);
        let mut below = Vec::new();
        let mut next = manifest.parent;
        while let Some(at) = next.and_then(position) {
            below.push(at);
            next = layers[at].1.parent;
        }
        // A guest's state has no parent, and neither has a base, whose inodes have the same numbers and nothing else in common.
        let is_alike = |at: usize| layers[at].1.kind == manifest.kind;
        let is_sibling =
            |at: usize| layers[at].1.parent == manifest.parent && (manifest.parent.is_some() || is_alike(at));
        let mut others: Vec<usize> = (0..hits.len()).filter(|at| !below.contains(at)).collect();
        others.retain(|at| hits[*at] > 0 || is_sibling(*at));
        others.sort_by_key(|at| std::cmp::Reverse((hits[*at], is_sibling(*at), is_alike(*at))));
        others.truncate(MAX_RELATED);
        // A layer's predecessor stands beside it. What it stands on was left as it is, mostly.
        others.extend(below);
        others
    }

    fn file(&mut self, ino: Ino, content: &Content, related: &mut [Cursor<'_>]) -> Result<()> {
        let mut olds = Vec::new();
        for cursor in related {
            if let Some(other @ Content::Extents { .. }) = cursor.content_of(ino)? {
                olds.push(other);
            }
        }
        align(self.chunks, Class::Data, content, &olds, self.opened, &|_| false, self.sink)
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

#[cfg(test)]
mod tests {
    use layerfs::attr::Attrs;
    use layerfs::chunk::{ChunkWrite, MemoryChunks};
    use layerfs::chunker::Chunker;
    use layerfs::codec::Put;
    use layerfs::content::List;
    use layerfs::manifest::{LayerKind, LayerWriter};
    use layerfs::monitor::Silent;
    use layerfs::{Error, LayerName};

    use super::*;
    use crate::check::check_layer;
    use crate::guest::state;
    use crate::tests::pair::{Host, add_layer, noise};

    #[test]
    fn a_state_is_compared_with_the_last_one_and_not_with_a_base_of_the_same_inode_numbers() {
        let host = Host::new();
        let folder = tempfile::tempdir().unwrap();
        let memory = folder.path().join(state::MEMORY_FILE);
        let mut bytes = noise(1, 4 << 20);
        let disk = add_layer(host.store(), "disk", &[("disk.raw".to_owned(), noise(2, 4 << 20))].into());
        let import = |bytes: &[u8], previous| {
            std::fs::write(&memory, bytes).unwrap();
            let name = LayerName::new("guest/web/state").unwrap();
            state::import(host.store(), folder.path(), &name, previous, &Silent).unwrap().0
        };
        let old = import(&bytes, None);
        (0..bytes.len()).step_by(64 << 10).for_each(|at| bytes[at] ^= 1);
        // A dump has more files than a scan, so nothing of their tables is the same.
        std::fs::write(folder.path().join("accel"), "tcg").unwrap();
        let new = import(&bytes, Some(old));
        let paired_with = |new: LayerId, held: &[LayerId]| {
            let mut bases = Vec::new();
            let mut sink = |candidate: Candidate| {
                if candidate.class == Class::Data {
                    bases.push(candidate.bases);
                }
                Ok(())
            };
            candidates(host.store().as_ref(), &[new], held, &mut sink).unwrap();
            bases
        };
        let mut of_old = HashSet::new();
        host.store()
            .data_in_order(old, &mut |id, _| {
                of_old.insert(id);
                Ok(())
            })
            .unwrap();
        let paired = paired_with(new, &[disk, old]);
        assert!(paired.iter().flatten().all(|bases| bases.iter().all(|base| of_old.contains(&base.id))));
        assert_eq!(paired.iter().flatten().count(), 64);
        // The first one is compared with nothing.
        let first = paired_with(old, &[disk]);
        assert_eq!((first.len(), first.iter().flatten().count()), (64, 0));
    }

    /// The node of `depth` above `children`.
    fn above(chunks: &MemoryChunks, depth: u8, children: &[(ChunkId, u64)]) -> (ChunkId, u64) {
        let mut node = vec![depth];
        node.put_u16(children.len() as u16);
        for (id, bytes) in children {
            node.put_u64(*bytes);
            node.put_id(id);
        }
        (chunks.put(Class::List, &node).unwrap(), children.iter().map(|(_, bytes)| bytes).sum())
    }

    fn leaf(chunks: &MemoryChunks, plain: &[u8]) -> (ChunkId, u64) {
        let mut node = vec![1, 1, 0, 1];
        node.put_u32(plain.len() as u32);
        node.put_id(&chunks.put(Class::Data, plain).unwrap());
        (chunks.put(Class::List, &node).unwrap(), plain.len() as u64)
    }

    /// Files whose list trees have this root, of this depth.
    fn files_of_tree(chunks: &MemoryChunks, count: u64, (root, bytes): (ChunkId, u64), depth: u8) -> LayerId {
        let list = List::Tree { root, depth };
        let content = Content::Extents { bytes, data_bytes: bytes, chunker: Chunker::Tree, list };
        let inode = |ino, node| Inode { ino: Ino(ino), nlink: 1, attrs: Attrs::default(), xattrs: Vec::new(), node };
        let mut writer = LayerWriter::new(chunks);
        writer.inode(&inode(1, Node::Folder)).unwrap();
        (2..count + 2).for_each(|ino| writer.inode(&inode(ino, Node::File(content.clone()))).unwrap());
        writer.finish(LayerKind::Base, None, Ino(count + 2)).unwrap().0
    }

    #[test]
    fn a_list_that_repeats_its_nodes_is_planned_and_checked_once() {
        let chunks = MemoryChunks::default();
        let mut bomb = leaf(&chunks, b"abc");
        for depth in 2..=6 {
            bomb = above(&chunks, depth, &[bomb; 512]);
        }
        let distinct: Vec<_> = (0..70_000u32).map(|n| leaf(&chunks, &n.to_le_bytes())).collect();
        let mut filler: Vec<_> = distinct.chunks(512).map(|leaves| above(&chunks, 2, leaves)).collect();
        for depth in 3..=6 {
            filler = vec![above(&chunks, depth, &filler)];
        }
        let behind = above(&chunks, 7, &[vec![filler[0]], vec![bomb; 511]].concat());
        // A leaf and its chunk, five nodes above; the filler's, with five nodes above those that hold leaves; the root.
        let (of_bomb, of_filler) = (2 + 5, 2 * 70_000 + 70_000usize.div_ceil(512) + 4);
        for (root, depth, count) in [(bomb, 6, of_bomb), (behind, 7, of_bomb + of_filler + 1)] {
            // Many files, whose lists are the same.
            let layer = files_of_tree(&chunks, 2000, root, depth);
            let mut found = HashSet::new();
            let mut add = |candidate: Candidate| {
                if matches!(candidate.class, Class::List | Class::Data) {
                    found.insert(candidate.id);
                }
                Ok(())
            };
            candidates(&chunks, &[layer], &[], &mut add).unwrap();
            let manifest = Manifest::load(&chunks, layer).unwrap();
            walk_content(&chunks, &manifest.inodes, &mut |part| {
                found.remove(&part.id());
                Ok(true)
            })
            .unwrap();
            assert_eq!(found.len(), count);
            // What it is compared with may repeat its nodes as well.
            let twin = files_of_tree(&chunks, 2, root, depth);
            let other = files_of_tree(&chunks, 3, above(&chunks, depth + 1, &[root; 2]), depth + 1);
            candidates(&chunks, &[other], &[twin], &mut |_| Ok(())).unwrap();
            candidates(&chunks, &[twin], &[other], &mut |_| Ok(())).unwrap();
            check_layer(&chunks, layer, &mut |ids| Ok(vec![true; ids.len()])).unwrap();
        }
    }

    #[test]
    fn what_nobody_waits_for_is_not_worked_out() {
        let host = Host::new();
        let layer = add_layer(host.store(), "app", &[("large".to_owned(), noise(1, 1 << 20))].into());
        let wanted = crate::wanted::Wanted::default();
        let chunks = crate::wanted::Polled::new(host.store().as_ref(), &wanted);
        let mut found = 0;
        let mut end = |_| {
            found += 1;
            wanted.end();
            Ok(())
        };
        let error = candidates(&chunks, &[layer], &[], &mut end).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        let error = check_layer(&chunks, layer, &mut |ids| Ok(vec![true; ids.len()])).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
    }
}
