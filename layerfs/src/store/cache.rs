//! Verified plain bytes of chunks that were read lately, bounded in bytes.
//!
//! Invariants: the sum of the cached lengths stays under the limit; a chunk that several threads want at once is
//! read by one of them.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use crate::error::Result;
use crate::id::ChunkId;

const SHARDS: usize = 16;
const FLIGHTS: usize = 256;
/// What an entry takes besides its bytes, about.
const ENTRY_BYTES: usize = 160;

#[derive(Debug)]
pub(crate) struct ChunkCache {
    shards: Vec<Mutex<Shard>>,
    flights: Vec<Mutex<()>>,
    shard_limit: usize,
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Debug)]
struct Shard {
    chunks: LruCache<ChunkId, Bytes>,
    bytes: usize,
}

impl ChunkCache {
    pub fn new(limit_bytes: usize) -> ChunkCache {
        let shard = || Mutex::new(Shard { chunks: LruCache::unbounded(), bytes: 0 });
        ChunkCache {
            shards: (0..SHARDS).map(|_| shard()).collect(),
            flights: (0..FLIGHTS).map(|_| Mutex::new(())).collect(),
            shard_limit: limit_bytes / SHARDS,
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    fn shard(&self, id: &ChunkId) -> &Mutex<Shard> {
        &self.shards[usize::from(id.0[31]) % SHARDS]
    }

    /// The bytes of `id`, if they are here.
    pub fn peek(&self, id: &ChunkId) -> Option<Bytes> {
        self.shard(id).lock().chunks.get(id).cloned()
    }

    /// The bytes of `id`, from here or from `load`.
    pub fn get(&self, id: &ChunkId, load: impl FnOnce() -> Result<Bytes>) -> Result<Bytes> {
        if let Some(plain) = self.peek(id) {
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(plain);
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        let _flight = self.flights[usize::from(id.0[30]) % FLIGHTS].lock();
        if let Some(plain) = self.peek(id) {
            return Ok(plain);
        }
        let plain = load()?;
        self.insert(id, plain.clone());
        Ok(plain)
    }

    /// How often a chunk was here when it was wanted, and how often not.
    pub fn counts(&self) -> (u64, u64) {
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed))
    }

    /// Keeps `plain`, the bytes of `id`.
    pub fn insert(&self, id: &ChunkId, plain: Bytes) {
        let bytes = plain.len() + ENTRY_BYTES;
        if bytes > self.shard_limit {
            return;
        }
        let mut shard = self.shard(id).lock();
        if let Some(old) = shard.chunks.put(*id, plain) {
            shard.bytes -= old.len() + ENTRY_BYTES;
        }
        shard.bytes += bytes;
        while shard.bytes > self.shard_limit {
            let Some((_, old)) = shard.chunks.pop_lru() else { break };
            shard.bytes -= old.len() + ENTRY_BYTES;
        }
    }
}
