//! Partial layers: those whose tables are here while some of their data is still on its way from another host.
//!
//! Hides which layers those are, and how a chunk that isn't here yet comes to whoever reads it. Invariants: a layer's
//! mark is written together with the name that lets it be seen, and goes only once the layer was checked whole; of a
//! partial layer everything but chunks of data is here; a read of a missing chunk ends within the fetcher's time, and
//! its failure is remembered nowhere. FORMAT.md, "Partial layers".

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use serde::Serialize;

use crate::attr::Time;
use crate::chunk::{self, Class};
use crate::closure::{Part, Records, walk_content};
use crate::codec::{Put, Reader};
use crate::error::{Error, Result};
use crate::id::{ChunkId, LayerId};
use crate::inode::Node;
use crate::manifest::Manifest;
use crate::store::db::{Batch, Cf, Db, Sync};
use crate::store::names::NameChange;
use crate::store::{Store, Uncached};

const PREFIX: &[u8] = b"partial/";
const VERSION: u8 = 1;
const FLAG_PUSHED: u8 = 1;
const FLAG_LIMITED: u8 = 2;
/// So many sources of a layer are kept, the latest first.
const MAX_SOURCES: usize = 8;
/// How long a count of what is here holds at least.
const FRESH: Duration = Duration::from_millis(500);
/// Chunks looked up at once.
const BATCH: usize = 1024;

/// What there is to know of a partial layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PartialLayer {
    /// The peers that have it, the latest first.
    pub sources: Vec<String>,
    /// Whether the source brings the rest by itself; otherwise this side fetches it.
    pub pushed: bool,
    /// Since when it is partial.
    pub since: Time,
    /// The most that the rest may take of the network when this side fetches it, in bytes per second; 0: no limit.
    pub limit: u64,
}

impl PartialLayer {
    fn encode(&self) -> Vec<u8> {
        let limited = if self.limit > 0 { FLAG_LIMITED } else { 0 };
        let mut out = vec![VERSION, limited | if self.pushed { FLAG_PUSHED } else { 0 }];
        out.put_i64(self.since.seconds);
        out.put_u32(self.since.nanos);
        out.put_u8(self.sources.len() as u8);
        self.sources.iter().for_each(|source| out.put_bytes16(source.as_bytes()));
        if self.limit > 0 {
            out.put_u64(self.limit);
        }
        out
    }

    fn decode(bytes: &[u8]) -> Result<PartialLayer> {
        let mut reader = Reader::new("partial layer record", bytes);
        let version = reader.u8()?;
        if version != VERSION {
            return Err(Error::Unsupported { what: "partial layer record", detail: format!("version {version}") });
        }
        let flags = reader.u8()?;
        let since = Time { seconds: reader.i64()?, nanos: reader.u32()? };
        let count = reader.u8()?;
        let mut sources = Vec::new();
        for _ in 0..count {
            let text = std::str::from_utf8(reader.bytes16()?).map_err(|_| reader.error("a source that isn't text"))?;
            sources.push(text.to_owned());
        }
        if flags & !(FLAG_PUSHED | FLAG_LIMITED) != 0 {
            return Err(reader.error(format!("flags {flags:#x}")));
        }
        let limit = if flags & FLAG_LIMITED != 0 { reader.u64()? } else { 0 };
        reader.finish()?;
        Ok(PartialLayer { sources, pushed: flags & FLAG_PUSHED != 0, since, limit })
    }
}

/// How much of a partial layer, or of the partial layers of a stack, is here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Presence {
    /// Plain bytes of data, each chunk counted as often as a layer refers to it.
    pub total_bytes: u64,
    /// Of these, what is here.
    pub here_bytes: u64,
}

impl Presence {
    /// In percent, rounded down: 100 is everything.
    pub fn percent(&self) -> u64 {
        (self.here_bytes * 100).checked_div(self.total_bytes).unwrap_or(100)
    }
}

/// Brings chunks from elsewhere. Registered by [`Store::set_fetcher`].
pub trait ChunkFetcher: Send + std::marker::Sync {
    /// The verified plain bytes of chunk `id`, which a reader waits for. Blocks, but for a bounded time only, and no
    /// longer than anybody waits ([`crate::patience`]).
    ///
    /// # Errors
    /// [`Error::ChunkMissing`] if no source can have it, [`Error::Absent`] if none has brought it in time,
    /// [`Error::GivenUp`] if the reader has been killed.
    fn fetch(&self, id: &ChunkId) -> Result<Bytes>;

    /// These will probably be read soon, in this order. Doesn't wait.
    fn soon(&self, ids: &[ChunkId]);

    /// Which layers are partial has changed. Doesn't wait.
    fn changed(&self);

    /// These layers were marked as partial, again if they were before. [`ChunkFetcher::changed`] follows. Doesn't wait.
    fn marked(&self, layers: &[LayerId]);
}

#[derive(Default)]
pub(crate) struct Partials {
    /// How many there are, so that nobody locks anything in a store without.
    count: AtomicUsize,
    layers: RwLock<BTreeMap<LayerId, PartialLayer>>,
    fetcher: RwLock<Option<Arc<dyn ChunkFetcher>>>,
    counted: Mutex<BTreeMap<LayerId, Counted>>,
}

#[derive(Clone, Copy)]
struct Counted {
    presence: Presence,
    at: Instant,
    took: Duration,
}

impl std::fmt::Debug for Partials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Partials").field("layers", &self.layers).finish_non_exhaustive()
    }
}

impl Partials {
    pub fn load(db: &Db) -> Result<Partials> {
        let partials = Partials::default();
        for entry in db.iter(Cf::Transfers, PREFIX)? {
            let (key, value) = entry?;
            let id = key.get(PREFIX.len()..).and_then(|id| <[u8; 32]>::try_from(id).ok());
            let id = id.ok_or_else(|| Error::corrupt("partial layer record", "its key is no layer's"))?;
            partials.layers.write().insert(LayerId(ChunkId(id)), PartialLayer::decode(&value)?);
        }
        partials.recount();
        Ok(partials)
    }

    fn recount(&self) {
        self.count.store(self.layers.read().len(), Ordering::Release);
    }

    /// Whether there is any.
    pub fn any(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }
}

fn key(layer: LayerId) -> Vec<u8> {
    [PREFIX, &layer.0.0].concat()
}

impl Store {
    /// Who is asked for chunks of partial layers that aren't here.
    pub fn set_fetcher(&self, fetcher: Arc<dyn ChunkFetcher>) {
        *self.partials.fetcher.write() = Some(fetcher);
    }

    /// Whether any layer is partial.
    pub fn has_partials(&self) -> bool {
        self.partials.any()
    }

    /// What there is to know of `layer` if it is partial. Those below it are another question:
    /// [`Store::partials_of_stack`].
    pub fn partial(&self, layer: LayerId) -> Option<PartialLayer> {
        if !self.partials.any() {
            return None;
        }
        self.partials.layers.read().get(&layer).cloned()
    }

    /// All partial layers.
    pub fn partials(&self) -> Vec<(LayerId, PartialLayer)> {
        self.partials.layers.read().iter().map(|(layer, partial)| (*layer, partial.clone())).collect()
    }

    /// The partial layers among `top` and all below it, top first.
    pub fn partials_of_stack(&self, top: LayerId) -> Result<Vec<(LayerId, PartialLayer)>> {
        let mut found = Vec::new();
        let mut next = if self.partials.any() { Some(top) } else { None };
        while let Some(layer) = next {
            found.extend(self.partial(layer).map(|partial| (layer, partial)));
            next = Manifest::load(&Uncached(self), layer)?.parent;
        }
        Ok(found)
    }

    /// Sets names, as [`Store::set_names`] does, of stacks of which `layers` have everything but their data, and marks
    /// these as partial, to be had from the peer `source`, the rest with `limit` ([`PartialLayer::limit`]), in the same atomic write.
    ///
    /// # Errors
    /// As [`Store::set_names_with`]; no mark is set then.
    pub fn set_partial_names(
        &self,
        changes: &[NameChange],
        layers: &[LayerId],
        source: &str,
        pushed: bool,
        limit: u64,
    ) -> Result<()> {
        let mut batch = Batch::new();
        let mut before = Vec::new();
        {
            let mut all = self.partials.layers.write();
            for layer in layers {
                let old = all.get(layer).cloned();
                let mut sources = vec![source.to_owned()];
                sources.extend(old.iter().flat_map(|old| old.sources.iter()).filter(|other| *other != source).cloned());
                sources.truncate(MAX_SOURCES);
                let since = old.as_ref().map_or_else(Time::now, |old| old.since);
                // Once this side fetches it, it goes on doing so.
                let pushed = pushed && old.as_ref().is_none_or(|old| old.pushed);
                let partial = PartialLayer { sources, pushed, since, limit };
                batch.put(Cf::Transfers, key(*layer), partial.encode());
                all.insert(*layer, partial.clone());
                before.push((*layer, old, partial));
            }
        }
        // Before the names, as a collection that checks the layers must know that they lack something.
        self.partials.recount();
        let result = self.set_names_with(changes, batch);
        {
            let mut all = self.partials.layers.write();
            for (layer, old, new) in before {
                match if result.is_ok() { Some(new) } else { old } {
                    // Again if it was written: until it had its name it seemed that nobody needed it.
                    Some(partial) => all.insert(layer, partial),
                    None => all.remove(&layer),
                };
            }
        }
        self.partials.recount();
        if let (Ok(_), Some(fetcher)) = (&result, self.partials.fetcher.read().clone()) {
            fetcher.marked(layers);
        }
        self.tell_fetcher();
        result
    }

    fn tell_fetcher(&self) {
        let fetcher = self.partials.fetcher.read().clone();
        if let Some(fetcher) = fetcher {
            fetcher.changed();
        }
    }

    /// Takes the marks off `layers`: they were checked whole, or nothing needs them any more.
    pub fn clear_partial(&self, layers: &[LayerId]) -> Result<()> {
        let marked: Vec<LayerId> = layers.iter().copied().filter(|layer| self.partial(*layer).is_some()).collect();
        if marked.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new();
        marked.iter().for_each(|layer| batch.delete(Cf::Transfers, key(*layer)));
        self.db.write(batch, Sync::Yes)?;
        self.partials.layers.write().retain(|layer, _| !marked.contains(layer));
        self.partials.counted.lock().retain(|layer, _| !marked.contains(layer));
        self.partials.recount();
        self.tell_fetcher();
        Ok(())
    }

    /// Takes the marks off layers that a collection has removed.
    pub(crate) fn clear_dead_partials(&self, live: &HashSet<LayerId>) -> Result<()> {
        let dead: Vec<LayerId> =
            self.partials().into_iter().map(|(layer, _)| layer).filter(|layer| !live.contains(layer)).collect();
        // One that was marked since the collection looked has its manifest.
        let dead = dead.into_iter().filter(|layer| matches!(self.contains(&layer.0), Ok(false))).collect::<Vec<_>>();
        self.clear_partial(&dead)
    }

    /// How much of `layer`'s data is here. Reads its tables, but not again for a multiple of the time that it took.
    pub fn presence(&self, layer: LayerId) -> Result<Presence> {
        if let Some(counted) = self.partials.counted.lock().get(&layer)
            && counted.at.elapsed() < FRESH.max(counted.took * 20)
        {
            return Ok(counted.presence);
        }
        let began = Instant::now();
        let mut presence = Presence::default();
        let mut batch = Vec::with_capacity(BATCH);
        let count = |batch: &mut Vec<(ChunkId, u32)>, presence: &mut Presence| -> Result<()> {
            let ids: Vec<ChunkId> = batch.iter().map(|(id, _)| *id).collect();
            for ((id, bytes), mut here) in batch.drain(..).zip(self.contains_many(&ids)?) {
                here = here || self.is_arriving(&id);
                presence.total_bytes += u64::from(bytes);
                presence.here_bytes += if here { u64::from(bytes) } else { 0 };
            }
            Ok(())
        };
        self.data_in_order(layer, &mut |id, bytes| {
            batch.push((id, bytes));
            if batch.len() == BATCH { count(&mut batch, &mut presence) } else { Ok(()) }
        })?;
        count(&mut batch, &mut presence)?;
        let counted = Counted { presence, at: Instant::now(), took: began.elapsed() };
        self.partials.counted.lock().insert(layer, counted);
        Ok(presence)
    }

    /// Shows every reference of `layer` (without those below) to a chunk of data, in the order of its inodes, with the
    /// chunk's plain length. Never asks another host.
    pub fn data_in_order(&self, layer: LayerId, show: &mut dyn FnMut(ChunkId, u32) -> Result<()>) -> Result<()> {
        let chunks = Uncached(self);
        let manifest = Manifest::load(&chunks, layer)?;
        let mut inodes = Records::inodes(&chunks, &manifest)?;
        while let Some(inode) = inodes.next_inode()? {
            if let Node::File(content) = &inode.node {
                walk_content(&chunks, content, &mut |part| match part {
                    Part::Chunk(id, bytes) => show(id, bytes).map(|()| true),
                    Part::Node(_) => Ok(true),
                })?;
            }
        }
        Ok(())
    }

    /// Chunk `id`, which has just come: from the index, or from a session that hasn't synced it yet. Never asks another
    /// host.
    pub fn get_here(&self, id: &ChunkId) -> Result<Bytes> {
        match self.read_pending(id)? {
            Some(stored) => Ok(chunk::verify(stored)?.0),
            None => self.read_verified(id),
        }
    }

    /// Takes the marks off those of `layers` that no name, mount or upper needs: nobody reads them, and a collection
    /// removes what has come.
    pub fn clear_unneeded(&self, layers: &[LayerId]) -> Result<()> {
        if layers.is_empty() {
            return Ok(());
        }
        // A name that is being set has its mark first.
        let _names = self.names_change.lock();
        let mut needed = HashSet::new();
        for root in self.roots()? {
            let mut next = Some(root);
            while let Some(layer) = next.filter(|layer| needed.insert(*layer)) {
                next = Manifest::load(&Uncached(self), layer)?.parent;
            }
        }
        let unneeded: Vec<LayerId> = layers.iter().copied().filter(|layer| !needed.contains(layer)).collect();
        self.clear_partial(&unneeded)
    }

    /// A chunk that isn't in the index: one that a session has and hasn't synced yet, or one from another host.
    pub(crate) fn get_absent(&self, id: &ChunkId) -> Result<Bytes> {
        if let Some(stored) = self.read_pending(id)? {
            return Ok(chunk::verify(stored)?.0);
        }
        // It may have gone from a session to the index between the two looks.
        match self.read_verified(id) {
            Err(Error::ChunkMissing(_)) => {}
            result => return result,
        }
        let fetcher = self.partials.fetcher.read().clone();
        fetcher.ok_or(Error::ChunkMissing(*id))?.fetch(id)
    }

    /// Tells the fetcher which of `ids` aren't here and will be read soon.
    pub(crate) fn expect_soon(&self, ids: &[ChunkId]) {
        let Some(fetcher) = self.partials.fetcher.read().clone() else { return };
        let Ok(here) = self.contains_many(ids) else { return };
        let absent: Vec<ChunkId> = ids.iter().zip(here).filter(|(_, here)| !here).map(|(id, _)| *id).collect();
        if !absent.is_empty() {
            fetcher.soon(&absent);
        }
    }

    /// Whether a chunk of class `class` may be missing in `layer`.
    pub(crate) fn may_lack(&self, layer: LayerId, class: Class) -> bool {
        class == Class::Data && self.partials.any() && self.partials.layers.read().contains_key(&layer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_and_are_pinned() {
        let sources = vec!["a".to_owned(), "bc".to_owned()];
        let since = Time { seconds: 1, nanos: 2 };
        for (pushed, limit, flags, last) in [(true, 0, 1, &[][..]), (false, 0x0102, 2, &[2, 1, 0, 0, 0, 0, 0, 0])] {
            let partial = PartialLayer { sources: sources.clone(), pushed, since, limit };
            let record = partial.encode();
            assert_eq!(PartialLayer::decode(&record).unwrap(), partial);
            let times = [&1i64.to_le_bytes()[..], &2u32.to_le_bytes()].concat();
            let expected = [&[1, flags][..], &times, &[2, 1, 0], b"a", &[2, 0], b"bc", last];
            assert_eq!(record, expected.concat());
            for cut in 0..record.len() {
                assert!(PartialLayer::decode(&record[..cut]).is_err());
            }
        }
    }
}
