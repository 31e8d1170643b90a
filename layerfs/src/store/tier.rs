//! The second tier: packs that lie in an object store too, or only there. FORMAT.md, "Second tier".
//!
//! It hides which packs are there, and reading from them by ranges. Invariants: a pack counts as stored there only
//! after its upload was confirmed, and its file goes only then; an object is named by its content and never changed; a
//! read from there is verified like every other, and ends with an error at worst, in bounded time, not counting for how
//! long a limit holds it up. Memory: [`WINDOWS`] windows of [`WINDOW_BYTES`], and a record for each pack.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::{Mutex, RwLock};

use crate::codec::{Put, Reader};
use crate::error::{Error, ErrorClass, Result};
use crate::monitor::Monitor;
use crate::store::db::{Batch, Cf, Db, Sync as Durable};
use crate::store::pack::PackId;

/// So much is read at once, if the record isn't longer: neighbours in a pack are mostly wanted together.
const WINDOW_BYTES: u64 = 512 * 1024;
/// So many windows are kept.
const WINDOWS: NonZeroUsize = NonZeroUsize::new(32).unwrap();
/// So many reads may be under way at a time, each of another pack.
const FLIGHTS: usize = 16;
/// After a failure nobody waits for the next one for so long.
const PAUSE: Duration = Duration::from_secs(3);
/// Keys of the records in the family `meta`.
pub(crate) const KEY: &[u8] = b"tier.pack.";
const VERSION: u8 = 1;

/// Objects by name, elsewhere. An implementation bounds the time for which a call may get nowhere.
pub trait Objects: Send + Sync + fmt::Debug {
    /// Uploads the file at `path`; when this returns the object is there for good. `monitor` is told the bytes that have
    /// got there, and may end it.
    fn put(&self, name: &str, path: &Path, monitor: &dyn Monitor) -> Result<()>;
    /// `bytes` bytes of an object from `at` on, fewer at its end, none after it.
    fn read(&self, name: &str, at: u64, bytes: u64) -> Result<Bytes>;
    /// An object's length; none if there is no such object.
    fn size(&self, name: &str) -> Result<Option<u64>>;
    /// Removes an object, if it is there.
    fn remove(&self, name: &str) -> Result<()>;
    /// All objects with their lengths.
    fn list(&self) -> Result<Vec<(String, u64)>>;
    /// Where they are, for messages.
    fn place(&self) -> String;
}

/// What is known of a pack there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// An upload was begun, and not confirmed.
    Uploading = 0,
    /// It is there.
    Stored = 1,
    /// Nothing needs it any more; it is to be removed.
    Dead = 2,
}

/// A pack's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub state: State,
    /// BLAKE3 of the pack's file.
    pub hash: [u8; 32],
    pub bytes: u64,
}

impl Record {
    /// The object's name.
    pub fn object(&self) -> String {
        object_name(&self.hash)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION, self.state as u8];
        out.extend_from_slice(&self.hash);
        out.put_u64(self.bytes);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Record> {
        let mut reader = Reader::new("tier record", bytes);
        match reader.u8()? {
            VERSION => {}
            other => return Err(Error::Unsupported { what: "tier record", detail: format!("version {other}") }),
        }
        let state = match reader.u8()? {
            0 => State::Uploading,
            1 => State::Stored,
            2 => State::Dead,
            other => return Err(reader.error(format!("state {other}"))),
        };
        let mut hash = [0; 32];
        hash.copy_from_slice(reader.take(32)?);
        let bytes = reader.u64()?;
        reader.finish()?;
        Ok(Record { state, hash, bytes })
    }
}

/// The name of the object that holds the pack with this hash.
pub(crate) fn object_name(hash: &[u8; 32]) -> String {
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("packs/{hex}.pack")
}

/// The hash that an object's name says.
pub(crate) fn parse_object_name(name: &str) -> Option<[u8; 32]> {
    let hex = name.strip_prefix("packs/")?.strip_suffix(".pack").filter(|hex| hex.len() == 64 && hex.is_ascii())?;
    let mut hash = [0; 32];
    for (byte, at) in hash.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&hex[at..at + 2], 16).ok()?;
    }
    (object_name(&hash) == name).then_some(hash)
}

/// The key of a pack's record.
pub(crate) fn key(pack: PackId) -> Vec<u8> {
    [KEY, pack.to_string().as_bytes()].concat()
}

/// All records in `db`.
pub(crate) fn records(db: &Db) -> Result<BTreeMap<PackId, Record>> {
    let mut records = BTreeMap::new();
    for entry in db.iter(Cf::Meta, KEY)? {
        let (key, value) = entry?;
        let id = std::str::from_utf8(&key[KEY.len()..]).ok().and_then(|text| u64::from_str_radix(text, 16).ok());
        let id = id.ok_or_else(|| Error::corrupt("tier record", "its key is no pack's number"))?;
        records.insert(PackId(id), Record::decode(&value)?);
    }
    Ok(records)
}

/// A part of a pack that was read lately: its pack and where it begins.
type Window = (PackId, u64);

/// What is known of packs elsewhere, and the way to them.
#[derive(Debug)]
pub(crate) struct Tier {
    db: Option<Arc<Db>>,
    records: RwLock<BTreeMap<PackId, Record>>,
    objects: RwLock<Option<Arc<dyn Objects>>>,
    windows: Mutex<LruCache<Window, Bytes>>,
    flights: Vec<Mutex<()>>,
    /// When it failed last, and how.
    failed: Mutex<Option<(Instant, String)>>,
    /// Held by the one who uploads or evicts.
    pub working: Mutex<()>,
}

impl Tier {
    /// What `db` knows.
    pub fn open(db: Arc<Db>) -> Result<Tier> {
        let records = records(&db)?;
        Ok(Tier { db: Some(db), records: RwLock::new(records), ..Tier::none() })
    }

    /// Nothing.
    pub fn none() -> Tier {
        Tier {
            db: None,
            records: RwLock::default(),
            objects: RwLock::default(),
            windows: Mutex::new(LruCache::new(WINDOWS)),
            flights: (0..FLIGHTS).map(|_| Mutex::new(())).collect(),
            failed: Mutex::default(),
            working: Mutex::default(),
        }
    }

    /// Uses `objects` from now on.
    pub fn connect(&self, objects: Option<Arc<dyn Objects>>) {
        *self.objects.write() = objects;
        *self.failed.lock() = None;
    }

    /// The way there.
    pub fn objects(&self) -> Result<Arc<dyn Objects>> {
        self.objects.read().clone().ok_or_else(|| Error::Tier {
            action: "reaching",
            place: "the second tier".to_owned(),
            class: ErrorClass::Network,
            detail: "the daemon has no access to it; `layerctl tier status` says why".to_owned(),
        })
    }

    /// Whether there is a way there.
    pub fn is_connected(&self) -> bool {
        self.objects.read().is_some()
    }

    /// What is known of a pack.
    pub fn record(&self, pack: PackId) -> Option<Record> {
        self.records.read().get(&pack).copied()
    }

    /// The record of a pack that is there for sure.
    pub fn stored(&self, pack: PackId) -> Option<Record> {
        self.record(pack).filter(|record| record.state == State::Stored)
    }

    /// All records.
    pub fn all(&self) -> Vec<(PackId, Record)> {
        self.records.read().iter().map(|(id, record)| (*id, *record)).collect()
    }

    /// The greatest pack number that is known there.
    pub fn last(&self) -> Option<PackId> {
        self.records.read().last_key_value().map(|(id, _)| *id)
    }

    /// Sets what is known of a pack, or forgets it, durably.
    pub fn set(&self, pack: PackId, record: Option<Record>) -> Result<()> {
        let db = self.db.as_ref().ok_or_else(|| Error::invalid("this store has no second tier"))?;
        let mut batch = Batch::new();
        match &record {
            Some(record) => batch.put(Cf::Meta, key(pack), record.encode()),
            None => batch.delete(Cf::Meta, key(pack)),
        }
        db.write(batch, Durable::Yes)?;
        match record {
            Some(record) => drop(self.records.write().insert(pack, record)),
            None => drop(self.records.write().remove(&pack)),
        }
        Ok(())
    }

    /// `bytes` bytes of pack `pack` from `at` on; `None` if it isn't there, fewer at its end.
    ///
    /// # Errors
    /// [`Error::Tier`], at once if it has failed a moment ago.
    pub fn read(&self, pack: PackId, at: u64, bytes: u64) -> Result<Option<Bytes>> {
        let Some(record) = self.stored(pack) else { return Ok(None) };
        // A server calls such a range an error, which would say nothing of what is damaged: the index.
        if at >= record.bytes {
            return Ok(Some(Bytes::new()));
        }
        if let Some(found) = self.window(pack, at, bytes) {
            return Ok(Some(found));
        }
        let _flight = self.flights[pack.0 as usize % FLIGHTS].lock();
        if let Some(found) = self.window(pack, at, bytes) {
            return Ok(Some(found));
        }
        self.check_pause()?;
        let objects = self.objects()?;
        let want = bytes.max(WINDOW_BYTES).min(record.bytes.saturating_sub(at));
        let read = objects.read(&record.object(), at, want).inspect_err(|error| {
            if error.class() == ErrorClass::Network {
                *self.failed.lock() = Some((Instant::now(), error.to_string()));
            }
        })?;
        self.windows.lock().put((pack, at), read.clone());
        Ok(Some(read.slice(..read.len().min(bytes as usize))))
    }

    fn window(&self, pack: PackId, at: u64, bytes: u64) -> Option<Bytes> {
        let mut windows = self.windows.lock();
        let covers = |(id, start): &Window, held: &Bytes| {
            *id == pack && *start <= at && at + bytes <= *start + held.len() as u64
        };
        let found = windows.iter().find(|(window, held)| covers(window, held)).map(|(window, _)| *window)?;
        let held = windows.get(&found)?;
        let from = (at - found.1) as usize;
        Some(held.slice(from..from + bytes as usize))
    }

    /// Those who wait for a tier that doesn't answer shall not wait one after the other.
    fn check_pause(&self) -> Result<()> {
        let mut failed = self.failed.lock();
        match &*failed {
            Some((when, detail)) if when.elapsed() < PAUSE => Err(Error::Tier {
                action: "reading from",
                place: self.objects()?.place(),
                class: ErrorClass::Network,
                detail: format!("it failed a moment ago ({detail})"),
            }),
            _ => {
                *failed = None;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_record_and_object_name() {
        let record = Record { state: State::Stored, hash: [0xab; 32], bytes: 0x0102 };
        let bytes = record.encode();
        assert_eq!(bytes[..2], [1, 1]);
        assert_eq!((bytes.len(), &bytes[34..]), (42, &[2, 1, 0, 0, 0, 0, 0, 0][..]));
        assert_eq!(Record::decode(&bytes).unwrap(), record);
        assert!(Record::decode(&bytes[..41]).is_err() && Record::decode(&[9; 42]).is_err());
        assert_eq!(record.object(), format!("packs/{}.pack", "ab".repeat(32)));
        assert_eq!(parse_object_name(&record.object()), Some(record.hash));
        assert_eq!(parse_object_name(&record.object().to_uppercase()), None);
        assert_eq!(key(PackId(0x1f)), b"tier.pack.000000000000001f");
    }
}
