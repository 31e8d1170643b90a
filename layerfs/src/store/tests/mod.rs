//! Tests of the store through its public face.

mod basics;
mod collect;
mod crash;
mod damage;
mod disk;
mod ingest;
mod tier;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::attr::Attrs;
use crate::chunk::{ChunkWrite, Class};
use crate::chunker::Chunker;
use crate::content::Content;
use crate::id::{ChunkId, Ino, LayerId, LayerName};
use crate::inode::{Inode, Node};
use crate::manifest::{LayerKind, LayerWriter};
use crate::monitor::Monitor;
use crate::store::{Expect, ReadSource, Session, Store, StoreOptions};

/// A store in a temporary folder, which goes when this is dropped.
pub(super) fn store() -> (tempfile::TempDir, Arc<Store>) {
    let folder = tempfile::Builder::new().prefix("layerfs-store-").tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
    (folder, store)
}

pub(super) fn name(text: &str) -> LayerName {
    LayerName::new(text).unwrap()
}

/// Bytes that don't compress and depend on `seed`.
pub(super) fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// An empty layer that differs by `next_ino`.
pub(super) fn empty_layer(out: &dyn ChunkWrite, next_ino: u64) -> LayerId {
    LayerWriter::new(out).finish(LayerKind::Base, None, Ino(next_ino)).unwrap().0
}

pub(super) fn put(out: &dyn ChunkWrite, seed: u64, bytes: usize) -> ChunkId {
    out.put(Class::Data, &noise(seed, bytes)).unwrap()
}

/// A layer with one file per seed, of `bytes` each.
pub(super) fn layer_of(session: &Session, parent: Option<LayerId>, seeds: &[u64], bytes: usize) -> LayerId {
    let mut contents: Vec<Content> = Vec::new();
    let mut ingest = session.ingest(|(), content| {
        contents.extend(content);
        Ok(())
    });
    for seed in seeds {
        ingest.file((), Chunker::Tree, &mut ReadSource(&noise(*seed, bytes)[..])).unwrap();
    }
    ingest.finish().unwrap();
    let mut writer = LayerWriter::new(session);
    let attrs = Attrs { permissions: 0o644, ..Attrs::default() };
    let mut inode = |ino, node| {
        writer.inode(&Inode { ino: Ino(ino), nlink: 1, attrs: attrs.clone(), xattrs: Vec::new(), node }).unwrap();
    };
    inode(1, Node::Folder);
    for (ino, content) in (2..).zip(contents) {
        inode(ino, Node::File(content));
    }
    let manifest = parent.map(|id| (id, crate::manifest::Manifest::load(session, id).unwrap()));
    let parent = manifest.as_ref().map(|(id, manifest)| (*id, manifest));
    writer.finish(LayerKind::Base, parent, Ino(2 + seeds.len() as u64)).unwrap().0
}

/// [`layer_of`], committed and named.
pub(super) fn named_layer(store: &Arc<Store>, text: &str, seeds: &[u64], bytes: usize) -> LayerId {
    let session = store.session(text);
    let layer = layer_of(&session, None, seeds, bytes);
    session.commit().unwrap();
    store.set_name(&name(text), layer, Expect::Any).unwrap();
    layer
}

/// Cuts work off when it comes to a phase.
pub(super) struct CutAt {
    phase: &'static str,
    is_there: AtomicBool,
}

impl CutAt {
    pub(super) fn new(phase: &'static str) -> CutAt {
        CutAt { phase, is_there: AtomicBool::new(false) }
    }
}

impl Monitor for CutAt {
    fn phase(&self, name: &str, _: Option<u64>) {
        self.is_there.fetch_or(name == self.phase, Ordering::Relaxed);
    }
    fn advance(&self, _: u64) {}
    fn items(&self, _: u64) {}
    fn warn(&self, _: &str) {}
    fn is_cancelled(&self) -> bool {
        self.is_there.load(Ordering::Relaxed)
    }
}

/// The phase of a rebuild that gives layers their names: the new index is in its place then.
pub(super) const NAMING: &str = "looking for layers without names";

/// The names that there are, sorted.
pub(super) fn names_of(store: &Store) -> Vec<String> {
    store.names().unwrap().into_iter().map(|(name, _)| name.to_string()).collect()
}
