//! The guests of this host, as the store's database has them.
//!
//! FORMAT.md, "Guests". Hides where they are kept. Invariants: a record survives the daemon; a change of a record is
//! durable when the call returns; an epoch never becomes less.

use std::sync::Arc;

use layerfs::store::Store;
use layerfs::store::db::{Batch, Cf, Sync, WriteError};
use layerfs::{Error, LayerName, Result};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::GuestName;

const RECORD_VERSION: u8 = 1;
const PREFIX: &[u8] = b"guest.";
/// The longest record, in bytes: options come from outside.
const MAX_RECORD: usize = 256 * 1024;

/// What a guest is, on whatever host. It moves along with it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// Its name.
    pub name: GuestName,
    /// Its driver: "process", "oci", "lxc", "qemu".
    pub driver: String,
    /// The top of the sealed stack (base and application) that it was made on.
    pub stack: LayerName,
    /// What its driver has to know: an object that only the driver reads.
    pub options: serde_json::Value,
}

/// Where in its life a guest is on this host. What really runs is for the driver to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestState {
    /// It doesn't run here, and may be started.
    Created,
    /// It runs here.
    Running,
    /// It stands still after a dump, and may go on here or elsewhere.
    Stopped,
    /// It is on its way here; nothing of it may run yet.
    Arriving,
    /// It is another host's now: nothing of it may run here.
    Away,
}

impl GuestState {
    /// The state's name.
    pub fn as_str(self) -> &'static str {
        match self {
            GuestState::Created => "created",
            GuestState::Running => "running",
            GuestState::Stopped => "stopped",
            GuestState::Arriving => "arriving",
            GuestState::Away => "away",
        }
    }
}

/// A guest on this host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestRecord {
    /// What it is.
    pub spec: GuestSpec,
    /// Where in its life.
    pub state: GuestState,
    /// Counts its moves: of two copies, the one with the lower number is old and must not run.
    pub epoch: u64,
    /// The peer that it went to or comes from, if it did.
    #[serde(default)]
    pub peer: Option<String>,
    /// The layer that holds its latest state, if it has been dumped.
    #[serde(default)]
    pub state_layer: Option<LayerName>,
    /// The layer that holds what its upper held then.
    #[serde(default)]
    pub instance: Option<LayerName>,
}

impl GuestRecord {
    /// A new guest.
    pub fn new(spec: GuestSpec) -> GuestRecord {
        GuestRecord { spec, state: GuestState::Created, epoch: 0, peer: None, state_layer: None, instance: None }
    }

    /// The record of FORMAT.md, "Guests".
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![RECORD_VERSION];
        // Maps with text keys and plain numbers only: this can't fail.
        out.extend_from_slice(&serde_json::to_vec(self).unwrap_or_default());
        out
    }

    /// The guest with this record.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for anything malformed, [`Error::Unsupported`] for a later version.
    pub fn decode(record: &[u8]) -> Result<GuestRecord> {
        match record.split_first() {
            Some((&RECORD_VERSION, json)) => {
                serde_json::from_slice(json).map_err(|e| Error::corrupt("guest record", e.to_string()))
            }
            Some((version, _)) => {
                Err(Error::Unsupported { what: "guest record", detail: format!("version {version}") })
            }
            None => Err(Error::corrupt("guest record", "it is empty")),
        }
    }
}

/// The guests on record. Clones share them.
#[derive(Clone)]
pub struct Guests {
    store: Arc<Store>,
    changing: Arc<Mutex<()>>,
}

impl Guests {
    /// Those of `store`.
    pub fn new(store: Arc<Store>) -> Guests {
        Guests { store, changing: Arc::default() }
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The guest called `name`.
    ///
    /// # Errors
    /// [`Error::NotFound`], and those of the index.
    pub fn get(&self, name: &GuestName) -> Result<GuestRecord> {
        self.find(name)?.ok_or_else(|| Error::NotFound { what: "guest", name: name.to_string() })
    }

    /// The guest called `name`, if there is one.
    ///
    /// # Errors
    /// Those of the index.
    pub fn find(&self, name: &GuestName) -> Result<Option<GuestRecord>> {
        self.store.db().get(Cf::Meta, key(name))?.map(|record| GuestRecord::decode(&record)).transpose()
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// Those of the index.
    pub fn list(&self) -> Result<Vec<GuestRecord>> {
        self.store.db().iter(Cf::Meta, PREFIX)?.map(|entry| GuestRecord::decode(&entry?.1)).collect()
    }

    /// Takes a new guest on record.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Invalid`] if it is too long.
    pub fn add(&self, record: &GuestRecord) -> Result<()> {
        let name = &record.spec.name;
        let changed = self.change_with(name, Batch::new(), |old| match old {
            Some(_) => Err(Error::Exists { what: "guest", name: name.to_string() }),
            None => Ok(Some(record.clone())),
        });
        Ok(changed.map(drop)?)
    }

    /// Changes the guest called `name` by `change`, durably, and returns what it is now.
    ///
    /// # Errors
    /// [`Error::NotFound`], and those of `change`: nothing has changed then.
    pub fn update(&self, name: &GuestName, change: impl FnOnce(&mut GuestRecord) -> Result<()>) -> Result<GuestRecord> {
        let not_found = || Error::NotFound { what: "guest", name: name.to_string() };
        let changed = self.change_with(name, Batch::new(), |old| {
            let mut record = old.ok_or_else(not_found)?;
            change(&mut record)?;
            Ok(Some(record))
        })?;
        changed.ok_or_else(not_found)
    }

    /// Makes of the guest called `name`, if there is one, what `change` says (nothing: it is forgotten), and applies
    /// `also`, in one durable write. Returns what it is now.
    ///
    /// # Errors
    /// Those of `change`, with which nothing has changed, and of the index.
    pub fn change_with(
        &self,
        name: &GuestName,
        mut also: Batch,
        change: impl FnOnce(Option<GuestRecord>) -> Result<Option<GuestRecord>>,
    ) -> Result<Option<GuestRecord>, WriteError> {
        let _changing = self.changing.lock();
        let new = self.changed(name, &mut also, change).map_err(WriteError::NotWritten)?;
        self.store.db().apply(also, Sync::Yes)?;
        Ok(new)
    }

    /// What `change` makes of the guest called `name`, which is added to `also`.
    fn changed(
        &self,
        name: &GuestName,
        also: &mut Batch,
        change: impl FnOnce(Option<GuestRecord>) -> Result<Option<GuestRecord>>,
    ) -> Result<Option<GuestRecord>> {
        let old = self.find(name)?;
        let least = old.as_ref().map_or(0, |record| record.epoch);
        let new = change(old)?;
        match &new {
            Some(record) if record.epoch < least || record.spec.name != *name => {
                return Err(Error::invalid(format!("guest {name} cannot go back to epoch {}", record.epoch)));
            }
            Some(record) => also.put(Cf::Meta, key(name), checked(record)?),
            None => also.delete(Cf::Meta, key(name)),
        }
        Ok(new)
    }

    /// Forgets the guest called `name`. Fine if there is none.
    ///
    /// # Errors
    /// Those of the index.
    pub fn remove(&self, name: &GuestName) -> Result<()> {
        let _changing = self.changing.lock();
        let mut batch = Batch::new();
        batch.delete(Cf::Meta, key(name));
        self.store.db().write(batch, Sync::Yes)
    }
}

fn checked(record: &GuestRecord) -> Result<Vec<u8>> {
    let bytes = record.encode();
    if bytes.len() > MAX_RECORD {
        return Err(Error::invalid(format!("guest {} has too many options", record.spec.name)));
    }
    Ok(bytes)
}

fn key(name: &GuestName) -> Vec<u8> {
    [PREFIX, name.as_str().as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use layerfs::store::StoreOptions;

    use super::*;

    fn record(name: &str) -> GuestRecord {
        GuestRecord::new(GuestSpec {
            name: GuestName::new(name).unwrap(),
            driver: "process".to_owned(),
            stack: LayerName::new("app").unwrap(),
            options: serde_json::json!({ "command": ["/bin/prog"] }),
        })
    }

    #[test]
    fn records_are_pinned() {
        let json = r#"{"spec":{"name":"web","driver":"process","stack":"app","options":{"command":["/bin/prog"]}},"state":"created","epoch":0,"peer":null,"state_layer":null,"instance":null}"#;
        let bytes = [&[1][..], json.as_bytes()].concat();
        assert_eq!(record("web").encode(), bytes);
        assert_eq!(GuestRecord::decode(&bytes).unwrap(), record("web"));
        assert!((0..bytes.len()).all(|cut| GuestRecord::decode(&bytes[..cut]).is_err()));
        assert!(matches!(GuestRecord::decode(&[2]), Err(Error::Unsupported { .. })));
    }

    #[test]
    fn guests_are_kept_and_epochs_only_grow() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        let guests = Guests::new(store);
        let (web, game) = (record("web"), record("game"));
        guests.add(&web).unwrap();
        guests.add(&game).unwrap();
        assert!(matches!(guests.add(&web), Err(Error::Exists { .. })));
        assert_eq!(guests.list().unwrap(), [game.clone(), web.clone()]);
        let name = &web.spec.name;
        let changed = guests
            .update(name, |record| {
                (record.epoch, record.state) = (3, GuestState::Away);
                Ok(())
            })
            .unwrap();
        assert_eq!(guests.get(name).unwrap(), changed);
        let back = guests.update(name, |record| {
            record.epoch = 2;
            Ok(())
        });
        assert!(back.is_err());
        assert_eq!(guests.get(name).unwrap().epoch, 3);
        guests.remove(name).unwrap();
        assert_eq!(guests.list().unwrap(), [game]);
    }
}
