//! Tests of the store through its public face.

mod basics;
mod ingest;

use std::sync::Arc;

use crate::chunk::{ChunkWrite, Class};
use crate::id::{ChunkId, Ino, LayerId, LayerName};
use crate::manifest::{LayerKind, LayerWriter};
use crate::store::{Store, StoreOptions};

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
