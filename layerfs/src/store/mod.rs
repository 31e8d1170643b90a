//! The store: content-addressed chunks in packs, their index, and the names of layers.
//!
//! It hides where and how chunks lie. It never sees a path of a tree. Durability has one order: packs synced → index
//! → manifest → name; so a name that exists is complete, and a crash leaves garbage at worst.
//!
//! A store has one owner at a time (the daemon), which holds a lock on it. [`Store`] is cheap to share and may be
//! used by any number of threads.

mod cache;
mod check;
pub mod db;
mod filter;
mod fsck;
mod gc;
mod index;
mod ingest;
pub(crate) mod lost_names;
mod names;
mod offload;
mod open;
mod pack;
mod packs;
mod parcel;
mod partial;
mod pins;
mod rebuild;
mod rewrite;
mod scan;
mod scrub;
mod session;
mod source;
pub(crate) mod space;
pub mod spare;
mod staged;
mod stat;
mod suspects;
#[cfg(test)]
mod tests;
mod tier;
pub mod trace;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::chunk::{self, ChunkRead, Class, StoredChunk};
use crate::error::{Error, Result};
use crate::id::ChunkId;
pub use fsck::{FsckOptions, FsckReport, Problem, ProblemKind};
pub use gc::{GcOptions, GcReport};
pub use ingest::Ingest;
pub use names::{Expect, NameChange, NameRecord};
pub use offload::{Moved, TierStat, Which};
pub use open::StoreOptions;
pub use pack::PackId;
pub use parcel::{MAX_PARCEL_BYTES, Parcel, read_parcel};
pub use partial::{ChunkFetcher, PartialLayer, Presence};
pub use pins::{Pin, RootSource};
pub use rebuild::{RebuildReport, rebuild, rebuild_from};
pub use scrub::{DamagedChunk, ScrubReport};
pub use session::{Session, SessionReport};
pub(crate) use source::read_some;
pub use source::{FileSource, ReadSource, Source, SourcePiece};

pub use stat::{ClassStat, StoreStat};
pub use tier::Objects;

use cache::ChunkCache;
use db::Db;
use filter::Touched;
use gc::Collector;
use index::{Index, Location};
use packs::Packs;
use partial::Partials;
use pins::Roots;
use spare::Spares;
use suspects::Suspects;

/// What the index knows of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ChunkInfo {
    /// What it holds.
    pub class: Class,
    /// Its plain length in bytes.
    pub plain_bytes: u32,
    /// What it takes in its pack, in bytes, without its header.
    pub stored_bytes: u32,
    /// The pack that it lies in.
    pub pack: PackId,
}

impl From<Location> for ChunkInfo {
    fn from(location: Location) -> ChunkInfo {
        let Location { class, plain_bytes, stored_bytes, pack, .. } = location;
        ChunkInfo { class, plain_bytes, stored_bytes, pack }
    }
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    options: StoreOptions,
    db: Arc<Db>,
    index: Index,
    packs: Packs,
    cache: ChunkCache,
    suspects: Suspects,
    partials: Partials,
    roots: Roots,
    /// Held while names are compared and set.
    names_change: Mutex<()>,
    sessions: Mutex<Sessions>,
    collector: Collector,
    spares: Spares,
    /// Locked for as long as the store is open. Last, so that it is released last.
    _lock: Option<open::StoreLock>,
}

#[derive(Debug, Default)]
struct Sessions {
    next: u64,
    touched: HashMap<u64, Arc<Touched>>,
    /// To look for chunks that the index doesn't know yet.
    live: HashMap<u64, Weak<session::Inner>>,
}

/// How often a chunk that moves while it is read is looked up again.
const READ_ATTEMPTS: usize = 8;

impl Store {
    /// The store's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where derived tables lie.
    pub fn tables_folder(&self) -> PathBuf {
        self.folder.join("tables")
    }

    /// Where the uppers' data files lie.
    pub fn uppers_folder(&self) -> PathBuf {
        self.folder.join("uppers")
    }

    /// Where files of uppers lie whose records were lost; the user removes them.
    pub(crate) fn lost_uppers_folder(&self) -> PathBuf {
        self.uppers_folder().join("lost")
    }

    /// A folder for temporary files; emptied when the store is opened.
    pub fn tmp_folder(&self) -> PathBuf {
        self.folder.join("tmp")
    }

    /// How it was opened.
    pub fn options(&self) -> &StoreOptions {
        &self.options
    }

    /// The files that it can do without, and how much of the disk they may take.
    pub fn spares(&self) -> &Spares {
        &self.spares
    }

    /// The index database, for those who keep records of their own in it.
    pub fn db(&self) -> &Arc<Db> {
        &self.db
    }

    /// Begins a piece of work that adds chunks. `label` names it in logs.
    pub fn session(self: &Arc<Store>, label: &str) -> Session {
        Session::new(self.clone(), label)
    }

    /// Whether chunk `id` is here.
    pub fn contains(&self, id: &ChunkId) -> Result<bool> {
        Ok(self.index.get_settled(id)?.is_some())
    }

    /// Which of `ids` are here. To rely on the answer, ask [`Session::has_many`] instead.
    pub fn contains_many(&self, ids: &[ChunkId]) -> Result<Vec<bool>> {
        Ok(self.index.get_many_settled(ids)?.iter().map(Option::is_some).collect())
    }

    /// The chunks whose ids begin with `start`, up to four.
    pub fn find(&self, start: &[u8]) -> Result<Vec<ChunkId>> {
        self.index.starting_with(start, 4)
    }

    /// What the index knows of chunk `id`.
    pub fn info(&self, id: &ChunkId) -> Result<Option<ChunkInfo>> {
        Ok(self.index.get_settled(id)?.map(ChunkInfo::from))
    }

    /// What the index knows of each of `ids`.
    pub fn info_many(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkInfo>>> {
        Ok(self.index.get_many_settled(ids)?.into_iter().map(|location| location.map(ChunkInfo::from)).collect())
    }

    /// Chunk `id` as it lies in its pack, not verified: for the wire, whose other end verifies.
    ///
    /// # Errors
    /// [`Error::ChunkMissing`], or [`Error::ChunkDamaged`] if even the record's header is wrong.
    pub fn read_stored(&self, id: &ChunkId) -> Result<StoredChunk> {
        let mut last = None;
        for _ in 0..READ_ATTEMPTS {
            let location = self.index.get_settled(id)?.ok_or(Error::ChunkMissing(*id))?;
            if last == Some(location) {
                break;
            }
            if let Some(stored) = self.packs.read(id, &location)? {
                return Ok(stored);
            }
            // The pack was rewritten meanwhile: the index knows where the chunk went.
            last = Some(location);
        }
        Err(Error::ChunkMissing(*id))
    }

    /// How many chunks that were wanted stood in the cache since the store was opened, and how many didn't.
    pub fn cache_counts(&self) -> (u64, u64) {
        self.cache.counts()
    }

    /// The verified plain bytes of chunk `id`, past the cache: for work that reads much and once.
    pub fn get_uncached(&self, id: &ChunkId) -> Result<Bytes> {
        match self.cache.peek(id) {
            Some(plain) => Ok(plain),
            None => self.read_verified(id),
        }
    }

    fn read_verified(&self, id: &ChunkId) -> Result<Bytes> {
        self.suspects.note(self.read_stored(id).and_then(chunk::verify)).map(|(plain, _)| plain)
    }

    /// Lets the index refer to these records, which are synced, durably, and with it all that was written before.
    ///
    /// Such a write is large. A machine that dies may leave holes in what its log has unsynced, and the index isn't opened
    /// with a hole in it: it is to lie there for as short as can be.
    fn index_records(&self, records: &HashMap<ChunkId, Location>) -> Result<()> {
        self.index.add(records.iter())?;
        self.db.sync()?;
        self.suspects.clear(records.keys());
        Ok(())
    }

    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.options.read_only {
            return Err(Error::Denied("the store is open for reading only".to_owned()));
        }
        Ok(())
    }

    fn register(&self, touched: Arc<Touched>) -> u64 {
        let mut sessions = self.sessions.lock();
        sessions.next += 1;
        let number = sessions.next;
        sessions.touched.insert(number, touched);
        number
    }

    /// Lets readers find what session `number` hasn't synced yet.
    fn register_pending(&self, number: u64, session: Weak<session::Inner>) {
        self.sessions.lock().live.insert(number, session);
    }

    /// Chunk `id` if some session has it and hasn't told the index yet.
    pub(crate) fn read_pending(&self, id: &ChunkId) -> Result<Option<StoredChunk>> {
        let live: Vec<_> = self.sessions.lock().live.values().filter_map(Weak::upgrade).collect();
        for session in live {
            if let Some(stored) = session.read_pending(id)? {
                return Ok(Some(stored));
            }
        }
        Ok(None)
    }

    /// Whether some session has chunk `id` and hasn't told the index yet.
    pub fn is_arriving(&self, id: &ChunkId) -> bool {
        let live: Vec<_> = self.sessions.lock().live.values().filter_map(Weak::upgrade).collect();
        live.iter().any(|session| session.is_pending(id))
    }

    /// Lets the index know of what all sessions have put until now. What one of them can't keep is its own affair.
    pub fn flush_sessions(&self) {
        let live: Vec<_> = self.sessions.lock().live.values().filter_map(Weak::upgrade).collect();
        for session in live {
            if let Err(error) = session.flush() {
                tracing::debug!(%error, "another session's chunks were not made durable");
            }
        }
    }

    fn unregister(&self, number: u64) {
        let mut sessions = self.sessions.lock();
        sessions.live.remove(&number);
        if let Some(touched) = sessions.touched.remove(&number) {
            self.collector.absorb(touched);
        }
    }
}

impl ChunkRead for Store {
    fn get(&self, id: &ChunkId) -> Result<Bytes> {
        match self.cache.get(id, || self.read_verified(id)) {
            // Outside of the cache's locks: others must not wait for another host.
            Err(Error::ChunkMissing(_)) if self.partials.any() => {
                let plain = self.get_absent(id)?;
                self.cache.insert(id, plain.clone());
                Ok(plain)
            }
            result => result,
        }
    }

    fn get_once(&self, id: &ChunkId) -> Result<Bytes> {
        match self.get_uncached(id) {
            Err(Error::ChunkMissing(_)) if self.partials.any() => self.get_absent(id),
            result => result,
        }
    }

    fn is_remote(&self) -> bool {
        self.partials.any()
    }

    fn soon(&self, ids: &[ChunkId]) {
        if self.partials.any() {
            self.expect_soon(ids);
        }
    }
}

/// A store's chunks past its cache.
pub(crate) struct Uncached<'a>(pub &'a Store);

impl ChunkRead for Uncached<'_> {
    fn get(&self, id: &ChunkId) -> Result<Bytes> {
        self.0.get_uncached(id)
    }
}
