//! Access traces: in which order the mounts of a stack first read its chunks.
//!
//! Hides how little it costs: a set and a list in memory while a mount runs, one record per top layer in the database
//! when it ends. A trace outlives the layer and its chunks, so that the next lazy transfer of the same stack can bring
//! first what is read first. Memory and disk are bounded: [`MAX_IDS`] ids a trace, [`MAX_TRACES`] traces.
//! FORMAT.md, "Traces".

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use crate::attr::Time;
use crate::codec::{Put, Reader};
use crate::error::{Error, Result};
use crate::id::{ChunkId, LayerId};
use crate::store::Store;
use crate::store::db::{Batch, Cf, Sync};

/// The most ids in a trace: about 300 MB of files.
pub const MAX_IDS: usize = 8192;
/// The most traces that a store keeps: the latest.
pub const MAX_TRACES: usize = 64;

const PREFIX: &[u8] = b"trace/";
const VERSION: u8 = 1;

/// A trace without its ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TraceInfo {
    /// The top layer of the stack.
    pub layer: LayerId,
    /// When it was last added to.
    pub recorded: Time,
    /// How many chunks it names.
    pub chunks: u64,
}

/// Notes which chunks are read, each at its first time. Shared by the readers of a mount.
#[derive(Debug, Default)]
pub struct Recorder {
    is_full: AtomicBool,
    /// Whether something was noted since the last [`Recorder::take_news`].
    is_new: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Eight bytes of each id: a mistake would cost a place in a list of hints.
    known: HashSet<[u8; 8]>,
    order: Vec<ChunkId>,
}

impl Recorder {
    /// Chunk `id` is read.
    pub fn note(&self, id: &ChunkId) {
        if self.is_full.load(Ordering::Relaxed) {
            return;
        }
        let mut short = [0; 8];
        short.copy_from_slice(&id.0[..8]);
        let mut seen = self.seen.lock();
        if seen.order.len() >= MAX_IDS || !seen.known.insert(short) {
            return;
        }
        seen.order.push(*id);
        let is_full = seen.order.len() == MAX_IDS;
        drop(seen);
        self.is_new.store(true, Ordering::Relaxed);
        self.is_full.store(is_full, Ordering::Relaxed);
    }

    /// What was noted so far, if that is more than the last time.
    pub fn take_news(&self) -> Option<Vec<ChunkId>> {
        self.is_new.swap(false, Ordering::Relaxed).then(|| self.seen.lock().order.clone())
    }

    /// What was noted so far.
    pub fn ids(&self) -> Vec<ChunkId> {
        self.seen.lock().order.clone()
    }
}

fn key(layer: LayerId) -> Vec<u8> {
    [PREFIX, &layer.0.0].concat()
}

fn encode(recorded: Time, ids: &[ChunkId]) -> Vec<u8> {
    let mut out = Vec::with_capacity(17 + ids.len() * 32);
    out.put_u8(VERSION);
    out.put_i64(recorded.seconds);
    out.put_u32(recorded.nanos);
    out.put_u32(ids.len() as u32);
    ids.iter().for_each(|id| out.put_id(id));
    out
}

fn decode(bytes: &[u8]) -> Result<(Time, Vec<ChunkId>)> {
    let mut reader = Reader::new("trace", bytes);
    match reader.u8()? {
        VERSION => {}
        other => return Err(Error::Unsupported { what: "trace", detail: format!("version {other}") }),
    }
    let recorded = Time { seconds: reader.i64()?, nanos: reader.u32()? };
    let count = reader.u32()? as usize;
    if count > MAX_IDS {
        return Err(reader.error(format!("{count} ids")));
    }
    let ids = (0..count).map(|_| reader.id()).collect::<Result<Vec<_>>>()?;
    reader.finish()?;
    Ok((recorded, ids))
}

fn layer_of(key: &[u8]) -> Result<LayerId> {
    let id = key.get(PREFIX.len()..).and_then(|id| <[u8; 32]>::try_from(id).ok());
    id.map(|id| LayerId(ChunkId(id))).ok_or_else(|| Error::corrupt("trace", "its key is no layer's"))
}

impl Store {
    /// The chunks that mounts of the stack of `layer` read, in the order of their first reading; empty if none is known.
    pub fn trace(&self, layer: LayerId) -> Result<Vec<ChunkId>> {
        Ok(match self.db.get(Cf::Meta, key(layer))? {
            Some(record) => decode(&record)?.1,
            None => Vec::new(),
        })
    }

    /// All traces, the latest first.
    pub fn traces(&self) -> Result<Vec<TraceInfo>> {
        let mut traces = Vec::new();
        for entry in self.db.iter(Cf::Meta, PREFIX)? {
            let (key, value) = entry?;
            // One that can't be read is as good as none, but shows up, to be dropped.
            let (recorded, ids) = decode(&value).unwrap_or_default();
            traces.push(TraceInfo { layer: layer_of(&key)?, recorded, chunks: ids.len() as u64 });
        }
        traces.sort_by_key(|trace| std::cmp::Reverse((trace.recorded.seconds, trace.recorded.nanos)));
        Ok(traces)
    }

    /// Keeps what a run over the stack of `layer` has read: in front of what earlier runs read besides.
    pub fn add_trace(&self, layer: LayerId, run: &[ChunkId]) -> Result<()> {
        if run.is_empty() || self.options.read_only {
            return Ok(());
        }
        // A trace that can't be read is replaced.
        let old = self.trace(layer).unwrap_or_default();
        self.set_trace(layer, run.iter().copied().chain(old))
    }

    /// Keeps what another host says that runs over the stack of `layer` read: behind what is known here.
    pub fn extend_trace(&self, layer: LayerId, ids: &[ChunkId]) -> Result<()> {
        let old = self.trace(layer).unwrap_or_default();
        self.set_trace(layer, old.into_iter().chain(ids.iter().copied()))
    }

    fn set_trace(&self, layer: LayerId, ids: impl Iterator<Item = ChunkId>) -> Result<()> {
        let mut known = HashSet::new();
        let ids: Vec<ChunkId> = ids.filter(|id| known.insert(*id)).take(MAX_IDS).collect();
        self.db.put(Cf::Meta, key(layer), encode(Time::now(), &ids))?;
        for old in self.traces()?.into_iter().skip(MAX_TRACES) {
            self.db.delete(Cf::Meta, key(old.layer))?;
        }
        Ok(())
    }

    /// Drops the traces of `layers`; returns how many there were.
    pub fn remove_traces(&self, layers: &[LayerId]) -> Result<u64> {
        let mut batch = Batch::new();
        for layer in layers {
            if self.db.contains(Cf::Meta, key(*layer))? {
                batch.delete(Cf::Meta, key(*layer));
            }
        }
        let count = batch.len() as u64;
        if count > 0 {
            self.db.write(batch, Sync::Yes)?;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreOptions;

    fn id(number: u32) -> ChunkId {
        ChunkId::of(&number.to_le_bytes())
    }

    #[test]
    fn a_recorder_keeps_first_times_in_order_up_to_its_bound() {
        let recorder = Recorder::default();
        for number in [3, 1, 3, 2, 1] {
            recorder.note(&id(number));
        }
        assert_eq!(recorder.take_news().unwrap(), [id(3), id(1), id(2)]);
        assert!(recorder.take_news().is_none());
        recorder.note(&id(1));
        assert!(recorder.take_news().is_none(), "nothing new was read");
        (0..20_000).for_each(|number| recorder.note(&id(number)));
        assert_eq!(recorder.ids().len(), MAX_IDS);
    }

    #[test]
    fn traces_are_merged_bounded_and_pinned() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        let layer = |number| LayerId(id(1000 + number));
        store.add_trace(layer(0), &[id(1), id(2), id(3)]).unwrap();
        store.add_trace(layer(0), &[id(4), id(2)]).unwrap();
        store.extend_trace(layer(0), &[id(5), id(1), id(5)]).unwrap();
        assert_eq!(store.trace(layer(0)).unwrap(), [id(4), id(2), id(1), id(3), id(5)]);
        store.add_trace(layer(0), &(0..9000).map(id).collect::<Vec<_>>()).unwrap();
        assert_eq!(store.trace(layer(0)).unwrap().len(), MAX_IDS);
        for number in 1..=MAX_TRACES as u32 {
            store.add_trace(layer(number), &[id(1)]).unwrap();
        }
        let all = store.traces().unwrap();
        assert_eq!((all.len(), all[0].layer), (MAX_TRACES, layer(MAX_TRACES as u32)));
        assert!(store.trace(layer(0)).unwrap().is_empty(), "the oldest has gone");
        assert_eq!(store.remove_traces(&[layer(1), layer(0)]).unwrap(), 1);
        let record = encode(Time { seconds: 5, nanos: 6 }, &[id(7)]);
        let expected = [&[1][..], &5i64.to_le_bytes(), &6u32.to_le_bytes(), &1u32.to_le_bytes(), &id(7).0].concat();
        assert_eq!(record, expected);
        for cut in 0..record.len() {
            assert!(decode(&record[..cut]).is_err());
        }
    }
}
