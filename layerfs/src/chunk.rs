//! What a chunk is, its one verification, and the seam behind which chunks are kept.
//!
//! Invariants: a chunk has 1 to [`MAX_CHUNK_BYTES`] plain bytes; bytes that came from a disk or a peer become
//! usable only through [`verify`], which returns the only type that a [`crate::store::Session`] takes from
//! outside.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use crate::error::{Error, Result};
use crate::id::ChunkId;

/// The most plain bytes that a chunk may hold.
pub const MAX_CHUNK_BYTES: usize = 256 * 1024;

/// The most bytes that a stored chunk may take: incompressible bytes are stored raw, so never more than plain.
pub const MAX_STORED_BYTES: usize = MAX_CHUNK_BYTES;

/// What a chunk holds. FORMAT.md, "Chunk classes".
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Class {
    /// File content.
    Data = 0,
    /// A node of a chunk list.
    List = 1,
    /// A piece of a layer's table of inodes or dentries.
    Table = 2,
    /// A layer's manifest.
    Manifest = 3,
}

impl Class {
    /// All classes.
    pub const ALL: [Class; 4] = [Class::Data, Class::List, Class::Table, Class::Manifest];

    /// The class with code `code`.
    pub fn from_code(code: u8) -> Option<Class> {
        Class::ALL.get(usize::from(code)).copied()
    }
}

/// How a stored chunk's bytes are encoded. FORMAT.md, "Codecs".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Codec {
    /// The codec with code `code`.
    pub fn from_code(code: u8) -> Option<Codec> {
        match code {
            0 => Some(Codec::Raw),
            1 => Some(Codec::Zstd),
            _ => None,
        }
    }
}

/// A chunk as it lies in a pack or goes over the wire: not to be trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    /// The id that it claims.
    pub id: ChunkId,
    /// What it claims to hold.
    pub class: Class,
    /// How `stored` is encoded.
    pub codec: Codec,
    /// Plain length in bytes, as claimed.
    pub plain_bytes: u32,
    /// The encoded bytes.
    pub stored: Bytes,
}

/// A chunk whose plain bytes have been compared with its id. Only [`verify`] and [`encode`] make one.
#[derive(Clone, Debug)]
pub struct Verified {
    stored: StoredChunk,
}

impl Verified {
    /// The chunk.
    pub fn stored(&self) -> &StoredChunk {
        &self.stored
    }
}

/// Decodes `chunk` and compares its plain bytes with its id: the one place where this is done.
/// Returns the plain bytes, and the proof.
///
/// # Errors
/// [`Error::ChunkDamaged`] if lengths, encoding or hash are wrong.
pub fn verify(chunk: StoredChunk) -> Result<(Bytes, Verified)> {
    let damaged = |detail: String| Error::ChunkDamaged { id: chunk.id, detail };
    let plain_bytes = chunk.plain_bytes as usize;
    if plain_bytes == 0 || plain_bytes > MAX_CHUNK_BYTES || chunk.stored.len() > MAX_STORED_BYTES {
        return Err(damaged(format!("{plain_bytes} plain bytes in {} stored ones", chunk.stored.len())));
    }
    let plain = match chunk.codec {
        Codec::Raw => chunk.stored.clone(),
        Codec::Zstd => {
            let plain = decompress(&chunk.stored, plain_bytes).map_err(|e| damaged(format!("zstd: {e}")))?;
            Bytes::from(plain)
        }
    };
    if plain.len() != plain_bytes {
        return Err(damaged(format!("{} plain bytes instead of {plain_bytes}", plain.len())));
    }
    if ChunkId::of(&plain) != chunk.id {
        return Err(damaged("its bytes hash to another id".to_owned()));
    }
    Ok((plain, Verified { stored: chunk }))
}

/// Makes the stored form of `plain`: compressed at zstd `level` if that is smaller, raw otherwise.
/// `id` must be `ChunkId::of(plain)`; callers have just computed it.
pub fn encode(id: ChunkId, class: Class, plain: &[u8], level: i32) -> Verified {
    debug_assert!(!plain.is_empty() && plain.len() <= MAX_CHUNK_BYTES);
    let compressed = compress(plain, level).filter(|c| c.len() + plain.len() / 32 < plain.len());
    let (codec, stored) = match compressed {
        Some(bytes) => (Codec::Zstd, Bytes::from(bytes)),
        None => (Codec::Raw, Bytes::copy_from_slice(plain)),
    };
    Verified { stored: StoredChunk { id, class, codec, plain_bytes: plain.len() as u32, stored } }
}

thread_local! {
    static COMPRESSOR: std::cell::RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> =
        const { std::cell::RefCell::new(None) };
    static DECOMPRESSOR: std::cell::RefCell<Option<zstd::bulk::Decompressor<'static>>> =
        const { std::cell::RefCell::new(None) };
}

fn compress(plain: &[u8], level: i32) -> Option<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(made_for, _)| *made_for != level) {
            *slot = zstd::bulk::Compressor::new(level).ok().map(|compressor| (level, compressor));
        }
        slot.as_mut().and_then(|(_, compressor)| compressor.compress(plain).ok())
    })
}

fn decompress(stored: &[u8], plain_bytes: usize) -> std::io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot.insert(zstd::bulk::Decompressor::new()?),
        };
        decompressor.decompress(stored, plain_bytes)
    })
}

/// Where chunks are read from. Implemented by the store, by [`MemoryChunks`], and by whoever fetches on demand.
pub trait ChunkRead: Send + Sync {
    /// The verified plain bytes of chunk `id`.
    ///
    /// # Errors
    /// [`Error::ChunkMissing`], [`Error::ChunkDamaged`], or that of the disk.
    fn get(&self, id: &ChunkId) -> Result<Bytes>;

    /// As [`ChunkRead::get`], for what won't be needed again soon: it takes no place in a cache.
    ///
    /// # Errors
    /// As [`ChunkRead::get`].
    fn get_once(&self, id: &ChunkId) -> Result<Bytes> {
        self.get(id)
    }

    /// Whether some chunks may have to come from another host, so that reading far ahead pays.
    fn is_remote(&self) -> bool {
        false
    }

    /// A hint: these will be read soon, in this order. Costs nothing where nothing is remote.
    fn soon(&self, _ids: &[ChunkId]) {}
}

/// Where chunks are written to. Implemented by the store's sessions and by [`MemoryChunks`].
pub trait ChunkWrite: Send + Sync {
    /// Stores `plain` (1 to [`MAX_CHUNK_BYTES`] bytes) unless it is there already, and returns its id.
    /// It is durable only once the session that it belongs to is.
    fn put(&self, class: Class, plain: &[u8]) -> Result<ChunkId>;
}

/// Chunks in memory: the fake for tests.
#[derive(Clone, Debug, Default)]
pub struct MemoryChunks {
    chunks: Arc<RwLock<HashMap<ChunkId, (Class, Bytes)>>>,
}

impl MemoryChunks {
    /// How many chunks there are.
    pub fn len(&self) -> usize {
        self.chunks.read().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All ids with their plain lengths.
    pub fn ids(&self) -> Vec<(ChunkId, usize)> {
        self.chunks.read().iter().map(|(id, (_, plain))| (*id, plain.len())).collect()
    }

    /// Forgets a chunk, to see what happens without it.
    pub fn forget(&self, id: &ChunkId) {
        self.chunks.write().remove(id);
    }
}

impl ChunkRead for MemoryChunks {
    fn get(&self, id: &ChunkId) -> Result<Bytes> {
        self.chunks.read().get(id).map(|(_, plain)| plain.clone()).ok_or(Error::ChunkMissing(*id))
    }
}

impl ChunkWrite for MemoryChunks {
    fn put(&self, class: Class, plain: &[u8]) -> Result<ChunkId> {
        let id = ChunkId::of(plain);
        self.chunks.write().entry(id).or_insert_with(|| (class, Bytes::copy_from_slice(plain)));
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoding_round_trips_and_damage_is_seen() {
        for plain in [
            b"x".to_vec(),
            vec![7; MAX_CHUNK_BYTES],
            (0..100_000u32).flat_map(u32::to_le_bytes).take(200_000).collect(),
        ] {
            let id = ChunkId::of(&plain);
            let chunk = encode(id, Class::Data, &plain, 3).stored().clone();
            assert_eq!(verify(chunk.clone()).unwrap().0, plain);
            for position in [0, chunk.stored.len() / 2, chunk.stored.len() - 1] {
                let mut bytes = chunk.stored.to_vec();
                bytes[position] ^= 1;
                let damaged = StoredChunk { stored: bytes.into(), ..chunk.clone() };
                // A flipped bit in a zstd frame may decode to the same bytes only if it is unused; the hash decides.
                if let Ok((same, _)) = verify(damaged) {
                    assert_eq!(same, plain);
                }
            }
            for wrong in [0, chunk.plain_bytes - 1, chunk.plain_bytes + 1, u32::MAX] {
                assert!(verify(StoredChunk { plain_bytes: wrong, ..chunk.clone() }).is_err());
            }
        }
    }
}
