//! A session: one piece of work that adds chunks (an import, a seal, a received transfer).
//!
//! It hides packs and their order of durability: packs are synced, then the index learns of their chunks, then
//! (after [`Session::commit`]) a name may be set. Invariants: the index never refers to bytes that aren't synced; a
//! session that ends without a commit leaves garbage at most; while a session lives, no chunk that it has mentioned
//! is collected, so keep it until the layer has its name.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::thread::JoinHandle;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::chunk::{self, ChunkRead, ChunkWrite, Class, MAX_CHUNK_BYTES, StoredChunk, Verified};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::id::{ChunkId, LayerId};
use crate::store::Store;
use crate::store::filter::Touched;
use crate::store::index::Location;
use crate::store::pack::PackWriter;

/// What a session has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct SessionReport {
    /// Chunks that were new.
    pub new_chunks: u64,
    /// Their plain bytes.
    pub new_plain_bytes: u64,
    /// What they take in packs, headers included.
    pub new_stored_bytes: u64,
    /// Chunks that were there already.
    pub known_chunks: u64,
    /// Their plain bytes.
    pub known_plain_bytes: u64,
}

/// Adds chunks to a store. May be used by several threads.
#[derive(Debug)]
pub struct Session {
    inner: Arc<Inner>,
}

/// What a session shares with its threads.
#[derive(Debug)]
pub(crate) struct Inner {
    store: Arc<Store>,
    label: String,
    number: u64,
    touched: Arc<Touched>,
    state: Mutex<State>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct State {
    /// What its chunks are for, if they are to be kept for that though the session ends.
    staged_for: Option<LayerId>,
    writer: Option<PackWriter>,
    /// Chunks in `writer`'s pack that the index doesn't know yet.
    pending: HashMap<ChunkId, Location>,
    /// The full pack before that, on its way to the disk.
    syncing: Option<Syncing>,
    /// Something failed: chunks that were accepted may be lost.
    failed: bool,
}

#[derive(Debug)]
struct Syncing {
    chunks: Arc<HashMap<ChunkId, Location>>,
    thread: JoinHandle<Result<()>>,
}

#[derive(Debug, Default)]
struct Counts {
    new_chunks: AtomicU64,
    new_plain_bytes: AtomicU64,
    new_stored_bytes: AtomicU64,
    known_chunks: AtomicU64,
    known_plain_bytes: AtomicU64,
}

impl Session {
    pub(crate) fn new(store: Arc<Store>, label: &str) -> Session {
        let touched = Arc::new(Touched::new());
        let number = store.register(touched.clone());
        let inner = Inner {
            store,
            label: label.to_owned(),
            number,
            touched,
            state: Mutex::default(),
            counts: Counts::default(),
        };
        let inner = Arc::new(inner);
        inner.store.register_pending(number, Arc::downgrade(&inner));
        Session { inner }
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// The store that it writes to.
    pub fn store(&self) -> &Arc<Store> {
        &self.inner.store
    }

    /// Stores a chunk that came from outside, unless it is there already. Returns whether it was new.
    pub fn put_verified(&self, chunk: Verified) -> Result<bool> {
        let stored = chunk.stored();
        if self.inner.is_known(&stored.id)? {
            self.inner.count_known(u64::from(stored.plain_bytes));
            return Ok(false);
        }
        self.inner.append(stored, false)
    }

    /// Stores a chunk even if it is there already, and lets the index refer to this copy from the next
    /// [`Session::flush`] on: heals a damaged chunk.
    pub fn replace(&self, chunk: Verified) -> Result<()> {
        self.inner.touched.insert(&chunk.stored().id);
        self.inner.append(chunk.stored(), true).map(|_| ())
    }

    /// Which of `ids` are there already, in the store or in this session. None of those is collected while the
    /// session lives.
    pub fn has_many(&self, ids: &[ChunkId]) -> Result<Vec<bool>> {
        ids.iter().for_each(|id| self.inner.touched.insert(id));
        let mut has: Vec<bool> = {
            let state = self.inner.state.lock();
            ids.iter().map(|id| state.holds(id)).collect()
        };
        let others: Vec<ChunkId> = ids.iter().zip(&has).filter(|(_, has)| !**has).map(|(id, _)| *id).collect();
        let mut found = self.inner.store.index.get_many(&others)?.into_iter();
        for (has, id) in has.iter_mut().zip(ids).filter(|(has, _)| !**has) {
            *has = found.next().flatten().is_some() && !self.inner.store.suspects.contains(id);
        }
        Ok(has)
    }

    /// From now on chunks are for `layer`: should the session end before that is here, they are kept from collection
    /// for a day, until [`Store::unstage`]. Call it before the first chunk.
    pub fn stage_for(&self, layer: LayerId) {
        self.inner.state.lock().staged_for = Some(layer);
    }

    /// Syncs the packs and adds their chunks to the index.
    pub fn flush(&self) -> Result<()> {
        self.inner.flush().map(|_| ())
    }

    /// Makes everything put so far durable: packs, then index. After that a name may be set; keep the session until
    /// it is.
    pub fn commit(&self) -> Result<()> {
        if self.inner.flush()? { Ok(()) } else { self.inner.store.db.sync() }
    }

    /// What was done so far.
    pub fn report(&self) -> SessionReport {
        let counts = &self.inner.counts;
        SessionReport {
            new_chunks: counts.new_chunks.load(Ordering::Relaxed),
            new_plain_bytes: counts.new_plain_bytes.load(Ordering::Relaxed),
            new_stored_bytes: counts.new_stored_bytes.load(Ordering::Relaxed),
            known_chunks: counts.known_chunks.load(Ordering::Relaxed),
            known_plain_bytes: counts.known_plain_bytes.load(Ordering::Relaxed),
        }
    }
}

impl Store {
    /// Lets the index know what sessions that [work for `layer`](Session::stage_for) have so far: one whose transfer was
    /// cut off may not have come to it yet when the next begins. Blocks; what fails there is told there.
    pub fn flush_staged(&self, layer: LayerId) {
        let live: Vec<Arc<Inner>> = self.sessions.lock().live.values().filter_map(Weak::upgrade).collect();
        for session in live.iter().filter(|session| session.is_staged_for(layer)) {
            if let Err(error) = session.flush() {
                tracing::debug!(label = session.label, %error, "what has come is not kept");
            }
        }
    }
}

impl ChunkWrite for Session {
    fn put(&self, class: Class, plain: &[u8]) -> Result<ChunkId> {
        match self.inner.prepare(class, plain)? {
            (id, None) => Ok(id),
            (id, Some(chunk)) => {
                self.inner.append(chunk.stored(), false)?;
                Ok(id)
            }
        }
    }
}

impl ChunkRead for Session {
    /// Reads from the store, and what this session hasn't flushed yet.
    fn get(&self, id: &ChunkId) -> Result<Bytes> {
        match self.inner.read_pending(id)? {
            Some(chunk) => Ok(chunk::verify(chunk)?.0),
            None => self.inner.store.get(id),
        }
    }
}

impl State {
    fn holds(&self, id: &ChunkId) -> bool {
        self.pending.contains_key(id) || self.syncing.as_ref().is_some_and(|syncing| syncing.chunks.contains_key(id))
    }
}

impl Inner {
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Whether a good copy of `id` is stored or about to be, as far as known. Protects it from collection first.
    fn is_known(&self, id: &ChunkId) -> Result<bool> {
        self.touched.insert(id);
        // In this order: a chunk leaves `state` only once the index has it.
        Ok(self.state.lock().holds(id) || (self.store.index.contains(id)? && !self.store.suspects.contains(id)))
    }

    fn count_known(&self, plain_bytes: u64) {
        self.counts.known_chunks.fetch_add(1, Ordering::Relaxed);
        self.counts.known_plain_bytes.fetch_add(plain_bytes, Ordering::Relaxed);
    }

    /// Hashes `plain` and compresses it, unless it is known.
    pub(crate) fn prepare(&self, class: Class, plain: &[u8]) -> Result<(ChunkId, Option<Verified>)> {
        if plain.is_empty() || plain.len() > MAX_CHUNK_BYTES {
            return Err(Error::invalid(format!("a chunk can't have {} bytes", plain.len())));
        }
        let id = ChunkId::of(plain);
        if self.is_known(&id)? {
            self.count_known(plain.len() as u64);
            return Ok((id, None));
        }
        Ok((id, Some(chunk::encode(id, class, plain, self.store.options.compression_level))))
    }

    /// Appends `chunk` to this session's pack unless another thread just did. Returns whether it did.
    pub(crate) fn append(&self, chunk: &StoredChunk, even_if_known: bool) -> Result<bool> {
        self.store.check_writable()?;
        let mut state = self.state.lock();
        state.check()?;
        if state.holds(&chunk.id) && !even_if_known {
            self.count_known(u64::from(chunk.plain_bytes));
            return Ok(false);
        }
        let result = self.append_locked(&mut state, chunk);
        state.failed |= result.is_err();
        result.map(|()| true)
    }

    fn append_locked(&self, state: &mut State, chunk: &StoredChunk) -> Result<()> {
        let writer = match &mut state.writer {
            Some(writer) => writer,
            none => {
                let writer = none.insert(self.store.packs.take()?);
                if let Some(layer) = state.staged_for {
                    self.store.stage(layer, writer.id())?;
                }
                writer
            }
        };
        let location = writer.append(chunk)?;
        state.pending.insert(chunk.id, location);
        self.counts.new_chunks.fetch_add(1, Ordering::Relaxed);
        self.counts.new_plain_bytes.fetch_add(u64::from(chunk.plain_bytes), Ordering::Relaxed);
        self.counts.new_stored_bytes.fetch_add(location.record_bytes(), Ordering::Relaxed);
        if chunk.class == Class::Manifest {
            failpoint::hit("manifest.stored");
        }
        if writer.is_full() { self.rotate(state) } else { Ok(()) }
    }

    fn is_staged_for(&self, layer: LayerId) -> bool {
        self.state.lock().staged_for == Some(layer)
    }

    /// Sends the full pack to the disk in the background; the next one is filled meanwhile.
    fn rotate(&self, state: &mut State) -> Result<()> {
        state.join()?;
        let Some(writer) = &mut state.writer else { return Ok(()) };
        writer.write_out()?;
        let store = self.store.clone();
        let (hand, taken) = mpsc::channel::<(PackWriter, Arc<HashMap<ChunkId, Location>>)>();
        let work = move || {
            let Ok((mut writer, entries)) = taken.recv() else { return Ok(()) };
            let result = writer.sync().and_then(|()| store.index_records(&entries));
            store.packs.give_back(writer);
            result
        };
        let thread = std::thread::Builder::new().name("pack-sync".to_owned()).spawn(work);
        let thread = thread.map_err(|e| Error::io("starting a thread", e))?;
        // Only now, when nothing can fail any more: until then the pack is finished with the session.
        let chunks = Arc::new(std::mem::take(&mut state.pending));
        if let Some(writer) = state.writer.take() {
            // It waits for that.
            let _ = hand.send((writer, chunks.clone()));
        }
        state.syncing = Some(Syncing { chunks, thread });
        Ok(())
    }

    /// Returns whether the index was made durable by that.
    pub(crate) fn flush(&self) -> Result<bool> {
        let mut state = self.state.lock();
        state.check()?;
        let result = self.flush_locked(&mut state);
        state.failed |= result.is_err();
        result
    }

    fn flush_locked(&self, state: &mut State) -> Result<bool> {
        state.join()?;
        if let Some(writer) = &mut state.writer
            && !state.pending.is_empty()
        {
            writer.sync()?;
            self.store.index_records(&state.pending)?;
            state.pending.clear();
            return Ok(true);
        }
        Ok(false)
    }

    /// Whether `id` is here and the index doesn't know it yet.
    pub(crate) fn is_pending(&self, id: &ChunkId) -> bool {
        self.state.lock().holds(id)
    }

    /// Chunk `id` if it is here and the index doesn't know it yet.
    pub(crate) fn read_pending(&self, id: &ChunkId) -> Result<Option<StoredChunk>> {
        let mut state = self.state.lock();
        let State { writer, pending, syncing, .. } = &mut *state;
        if let (Some(writer), Some(location)) = (writer, pending.get(id)) {
            return writer.read(id, location).map(Some);
        }
        match syncing.as_ref().and_then(|syncing| syncing.chunks.get(id)) {
            Some(location) => self.store.packs.read(id, location),
            None => Ok(None),
        }
    }
}

impl State {
    fn check(&self) -> Result<()> {
        if self.failed {
            return Err(Error::invalid("this piece of work has failed before and can't go on; start it again"));
        }
        Ok(())
    }

    fn join(&mut self) -> Result<()> {
        match self.syncing.take() {
            Some(syncing) => {
                syncing.thread.join().unwrap_or_else(|_| Err(Error::Index("a thread of the store panicked".to_owned())))
            }
            None => Ok(()),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        if let Err(error) = state.join() {
            tracing::warn!(label = self.label, %error, "a pack wasn't finished");
        }
        if let Some(writer) = state.writer.take() {
            self.store.finish_pack(writer);
        }
        self.store.unregister(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorClass;
    use crate::store::StoreOptions;

    #[test]
    fn what_the_index_is_told_does_not_lie_in_its_log_unsynced() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        let session = store.session("s");
        let put = |bytes: &[u8]| session.put(Class::Data, bytes).unwrap();
        put(b"flushed");
        session.flush().unwrap();
        assert!(store.db.is_synced());
        put(b"in a full pack");
        let mut state = session.inner.state.lock();
        session.inner.rotate(&mut state).unwrap();
        state.join().unwrap();
        drop(state);
        assert!(store.db.is_synced());
        put(b"committed");
        session.commit().unwrap();
        assert!(store.db.is_synced());
        // What somebody else has written, and nothing new.
        store.db.put(crate::store::db::Cf::Meta, "other", []).unwrap();
        assert!(!store.db.is_synced());
        session.commit().unwrap();
        assert!(store.db.is_synced());
    }

    #[test]
    fn a_full_pack_that_the_disk_has_no_room_for_stays_with_its_session() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        for synced in [false, true] {
            let session = store.session("full");
            if synced {
                session.put(Class::Data, b"synced").unwrap();
                session.commit().unwrap();
            }
            session.put(Class::Data, b"more").unwrap();
            let pack = {
                let mut state = session.inner.state.lock();
                let writer = state.writer.as_mut().unwrap();
                writer.refuse_writes();
                let pack = writer.id();
                assert_eq!(session.inner.rotate(&mut state).unwrap_err().class(), ErrorClass::NoSpace);
                assert!(state.writer.is_some() && state.syncing.is_none());
                pack
            };
            assert!(!store.packs.claim(pack), "it is still the session's");
            drop(session);
            assert_eq!(store.packs.path(pack).exists(), synced, "what was never synced goes");
            assert!(store.packs.claim(pack), "nobody owns it any more");
            store.packs.release(pack);
        }
    }
}
