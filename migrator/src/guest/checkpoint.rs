//! Checkpoints: a guest's state and its upper as two layers, from which it goes on here or on another host.
//!
//! ```text
//! guest/NAME/TAG/instance   what its upper held, on its stack
//! guest/NAME/TAG/state      its checkpoint files, with guest.json: what the guest is and which instance belongs to it
//! ```
//!
//! Invariants: the two belong together, as they were at one moment; a guest whose checkpoint fails runs on.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use layerfs::monitor::Monitor;
use layerfs::store::{Expect, NameChange, NameRecord, Store};
use layerfs::view::View;
use layerfs::{Error, Ino, LayerId, LayerName, Result as StoreResult};
use serde::{Deserialize, Serialize};

use super::{
    Activity, Drivers, Guest, GuestName, GuestRecord, GuestSpec, GuestState, Guests, Host, Scratch, Written, memory,
    state,
};
use crate::error::Result;

/// The tag of checkpoints that have no other.
pub const DEFAULT_TAG: &str = "checkpoint";
/// The file in a state that says what the state is of.
pub const DESCRIPTION: &str = "guest.json";
/// No description is longer, in bytes.
const MAX_DESCRIPTION: u64 = 1 << 20;

/// What a state is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// The guest.
    pub spec: GuestSpec,
    /// The layer that its root was on.
    pub instance: LayerId,
    /// That layer's name.
    pub instance_name: LayerName,
}

impl Description {
    /// Reads that of the state in `folder`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none, [`Error::Corrupt`].
    pub fn read(folder: &Path) -> StoreResult<Description> {
        let path = folder.join(DESCRIPTION);
        let metadata = std::fs::metadata(&path);
        let bytes =
            metadata.map_err(|_| Error::invalid("this layer is no guest's state")).map(|metadata| metadata.len())?;
        if bytes > MAX_DESCRIPTION {
            return Err(Error::corrupt("guest's description", "it is too long"));
        }
        let json = std::fs::read(&path).map_err(|error| Error::file("read", &path, error))?;
        serde_json::from_slice(&json).map_err(|error| Error::corrupt("guest's description", error.to_string()))
    }

    /// Whether `layer` is a state with one. The states of moves have none.
    fn is_in(store: &Arc<Store>, layer: LayerId) -> StoreResult<bool> {
        Ok(View::open(store, layer)?.lookup(Ino::ROOT, DESCRIPTION.as_bytes())?.is_some())
    }

    /// Adds it to the state in `folder`.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn write(&self, folder: &Path) -> StoreResult<()> {
        let path = folder.join(DESCRIPTION);
        let json = serde_json::to_vec_pretty(self).map_err(|error| Error::invalid(error.to_string()))?;
        std::fs::write(&path, json).map_err(|error| Error::file("write", path, error))
    }
}

/// A checkpoint that was made.
#[derive(Clone, Debug, Serialize)]
pub struct Checkpoint {
    /// The state's layer and its name.
    pub state: (LayerName, LayerId),
    /// The instance's layer and its name.
    pub instance: (LayerName, LayerId),
    /// What was dumped.
    pub written: Written,
    /// How long the guest stood still, in seconds.
    pub frozen_seconds: f64,
    /// Bytes that were new to the store.
    pub stored_bytes: u64,
}

/// What a checkpoint's layers are called until both are there: an earlier checkpoint of the same names is whole until then. What a daemon
/// that died has left the next checkpoint takes away.
struct Passing<'a> {
    store: &'a Store,
    state: LayerName,
    instance: LayerName,
}

impl<'a> Passing<'a> {
    fn of(store: &'a Store, (state, instance): &(LayerName, LayerName)) -> StoreResult<Passing<'a>> {
        let passing = |name: &LayerName| LayerName::new(&format!("{name}-new"));
        Ok(Passing { store, state: passing(state)?, instance: passing(instance)? })
    }
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        for name in [&self.state, &self.instance] {
            match self.store.remove_name(name) {
                Ok(_) | Err(Error::NotFound { .. }) => {}
                Err(error) => tracing::warn!(%name, %error, "a name stays that was of use for a while"),
            }
        }
    }
}

/// The states that guests may have in a store, by guest. They are looked for when the first is asked for, and once.
pub struct States {
    store: Arc<Store>,
    found: OnceLock<HashMap<String, Vec<(NameRecord, String)>>>,
}

impl States {
    /// Those in `store`.
    pub fn new(store: &Arc<Store>) -> States {
        States { store: store.clone(), found: OnceLock::new() }
    }

    /// What tags of `guest` refer to, the latest first.
    fn of(&self, guest: &GuestName) -> StoreResult<impl Iterator<Item = (NameRecord, &str)>> {
        let found = match self.found.get() {
            Some(found) => found,
            None => {
                let found = self.look()?;
                self.found.get_or_init(|| found)
            }
        };
        let states = found.get(guest.as_str()).map(Vec::as_slice).unwrap_or_default();
        Ok(states.iter().map(|(at, tag)| (*at, tag.as_str())))
    }

    fn look(&self) -> StoreResult<HashMap<String, Vec<(NameRecord, String)>>> {
        let mut found: HashMap<String, Vec<(NameRecord, String)>> = HashMap::new();
        for (name, at) in self.store.names()? {
            // A tag may be of several parts, a guest's name is one.
            let parts = name.as_str().strip_prefix("guest/").and_then(|rest| rest.split_once('/'));
            if let Some((guest, rest)) = parts
                && let Some(tag) = rest.strip_suffix("/state")
            {
                found.entry(guest.to_owned()).or_default().push((at, tag.to_owned()));
            }
        }
        found.values_mut().for_each(|states| states.sort_by_key(|(at, _)| std::cmp::Reverse(at.created)));
        Ok(found)
    }
}

/// A guest with all that works on it.
pub struct Hosted<'a> {
    /// The records.
    pub guests: &'a Guests,
    /// Which drivers there are.
    pub drivers: &'a dyn Drivers,
    /// The host.
    pub host: Arc<dyn Host>,
}

impl Hosted<'_> {
    /// The guest with this record.
    ///
    /// # Errors
    /// As [`Drivers::guest`].
    pub fn guest(&self, record: &GuestRecord) -> Result<Arc<dyn Guest>> {
        self.drivers.guest(record, self.host.clone())
    }

    /// The names of the layers of a checkpoint with `tag`: state and instance.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `tag` can't be part of a name.
    pub fn names(name: &GuestName, tag: &str) -> StoreResult<(LayerName, LayerName)> {
        Ok((name.layer(&format!("{tag}/state"))?, name.layer(&format!("{tag}/instance"))?))
    }

    /// The names of the latest checkpoint of a guest that is here: state and instance. It is the one on its record, unless that is a move's
    /// state, from which nothing goes on any more.
    ///
    /// # Errors
    /// Those of the index and of reading the layers.
    pub fn latest(
        &self,
        name: &GuestName,
        record: Option<&GuestRecord>,
    ) -> StoreResult<Option<(LayerName, LayerName)>> {
        self.latest_of(name, record, &States::new(self.guests.store()))
    }

    /// The same, for one of many guests: names are gone through once for all that are looked for in `states`.
    ///
    /// # Errors
    /// As [`Hosted::latest`].
    pub fn latest_of(
        &self,
        name: &GuestName,
        record: Option<&GuestRecord>,
        states: &States,
    ) -> StoreResult<Option<(LayerName, LayerName)>> {
        let store = self.guests.store();
        let on_record = record.and_then(|record| Some((record.state_layer.clone()?, record.instance.clone()?)));
        if let Some((state, instance)) = on_record
            && let Some(found) = store.name(&state)?
            && Description::is_in(store, found.layer)?
        {
            return Ok(Some((state, instance)));
        }
        for (at, tag) in states.of(name)? {
            if Description::is_in(store, at.layer)? {
                return Self::names(name, tag).map(Some);
            }
        }
        Ok(None)
    }

    /// Takes back what a checkpoint that was cut off has left of the guest with this record: it goes on, with its network, and what was
    /// written goes. Fine if there is nothing. Nobody else works on it meanwhile.
    ///
    /// # Errors
    /// If it doesn't go on; what was written stays then.
    pub fn wake(&self, record: &GuestRecord) -> Result<()> {
        let guest = self.guest(record)?;
        // One that runs may still be cut off from its network.
        if guest.status()?.activity != Activity::Absent {
            guest.resume()?;
        }
        self.host.remove_scratches(&record.spec.name)
    }

    /// Makes a checkpoint of the running guest. It runs on, or ends if `end`, when its state is in the store. One that an earlier
    /// checkpoint has left standing still goes on first.
    ///
    /// # Errors
    /// Of any kind; it runs on then, unless it couldn't be ended after its state was stored, which the message says.
    pub fn checkpoint(&self, name: &GuestName, tag: &str, end: bool, monitor: &dyn Monitor) -> Result<Checkpoint> {
        let record = self.guests.get(name)?;
        let guest = self.guest(&record)?;
        let names = Self::names(name, tag)?;
        let mut status = guest.status()?;
        if status.activity == Activity::Frozen {
            self.wake(&record)?;
            status = guest.status()?;
        }
        // Memory is precious: it goes as soon as the state is in the store, or isn't wanted any more.
        let scratch = Scratch::new(&self.host, name, status.memory_bytes.unwrap_or(0))?;
        let made = self.make(&record, &*guest, scratch.path(), names, end, monitor);
        match made.is_ok() || guest.status().is_ok_and(|status| status.activity != Activity::Frozen) {
            true => drop(scratch),
            // It may have nothing else to go on from.
            false => drop(scratch.leave()),
        }
        made
    }

    fn make(
        &self,
        record: &GuestRecord,
        guest: &dyn Guest,
        folder: &Path,
        names: (LayerName, LayerName),
        end: bool,
        monitor: &dyn Monitor,
    ) -> Result<Checkpoint> {
        let name = &record.spec.name;
        let made = self.store(record, guest, folder, names, end, monitor);
        let made = made.map_err(|error| Self::go_on(guest, name, error))?;
        if end {
            guest.discard().map_err(|error| {
                let hint = format!("`layerctl guest start {name}` lets it go on, `layerctl guest stop {name}` ends it");
                crate::Error::guest("end", name, format!("{error}; {hint}"))
            })?;
            self.guests.update(name, |record| {
                record.state = GuestState::Created;
                Ok(())
            })?;
        }
        Ok(made)
    }

    /// Lets it go on, as `error` is in the way of its checkpoint. Returns what is to be said.
    fn go_on(guest: &dyn Guest, name: &GuestName, error: crate::Error) -> crate::Error {
        let resumed = guest.status().and_then(|status| match status.activity {
            Activity::Absent => Ok(()),
            _ => guest.resume(),
        });
        match resumed {
            Ok(()) => error,
            Err(second) => {
                let hint = format!("`layerctl guest start {name}` tries that again");
                crate::Error::guest("checkpoint", name, format!("{error}; and it doesn't go on: {second}; {hint}"))
            }
        }
    }

    /// Dumps it, seals its upper, lets it go on unless it is to `end`, and stores its state.
    fn store(
        &self,
        record: &GuestRecord,
        guest: &dyn Guest,
        folder: &Path,
        names: (LayerName, LayerName),
        end: bool,
        monitor: &dyn Monitor,
    ) -> Result<Checkpoint> {
        let (name, store) = (&record.spec.name, self.guests.store());
        let passing = Passing::of(store, &names)?;
        let (state_name, instance_name) = names;
        monitor.phase("dumping", None);
        let mut began = std::time::Instant::now();
        let written = super::dump(guest, folder, monitor, |error| {
            tracing::info!(%error, "a dump is tried again");
            began = std::time::Instant::now();
        })?;
        monitor.phase("sealing", None);
        let instance = self.host.seal(name, &passing.instance)?;
        if !end {
            guest.resume()?;
        }
        let frozen_seconds = began.elapsed().as_secs_f64();
        monitor.phase("storing", Some(written.memory_bytes + written.other_bytes));
        let description = Description { spec: record.spec.clone(), instance, instance_name: instance_name.clone() };
        description.write(folder)?;
        let previous = match &record.state_layer {
            Some(previous) => store.name(previous)?.map(|record| record.layer),
            None => None,
        };
        let (layer, report) = state::import(store, folder, &passing.state, previous, monitor)?;
        let called = |name: &LayerName, layer| NameChange { name: name.clone(), layer, expect: Expect::Any };
        store.set_names(&[called(&state_name, layer), called(&instance_name, instance)])?;
        self.guests.update(name, |record| {
            record.state_layer = Some(state_name.clone());
            record.instance = Some(instance_name.clone());
            Ok(())
        })?;
        let (state, instance) = ((state_name, layer), (instance_name, instance));
        Ok(Checkpoint { state, instance, written, frozen_seconds, stored_bytes: report.new_stored_bytes })
    }

    /// Lets a guest go on from the checkpoint whose state is `state`, in the place of whatever it has here; it mustn't run. A
    /// guest that isn't on record is taken on record.
    ///
    /// # Errors
    /// Of any kind; it doesn't run then.
    pub fn restore(&self, name: &GuestName, state: LayerId, state_name: Option<LayerName>) -> Result<GuestRecord> {
        let from = self.host.open_layer(name, state)?;
        let restored = self.restore_from(name, (state, &from), state_name);
        let closed = self.host.close_layer(name);
        let restored = restored?;
        closed?;
        Ok(restored)
    }

    fn restore_from(
        &self,
        name: &GuestName,
        (state, from): (LayerId, &Path),
        state_name: Option<LayerName>,
    ) -> Result<GuestRecord> {
        let description = Description::read(from)?;
        if description.spec.name != *name {
            let what = &description.spec.name;
            return Err(Error::invalid(format!("this is the state of guest {what}, not of {name}")).into());
        }
        let store = self.guests.store();
        if layerfs::manifest::Manifest::load(&**store, description.instance).is_err() {
            let detail = format!(
                "the layer {} that its root was on is not in this store; push or pull {} as well",
                description.instance, description.instance_name
            );
            return Err(Error::NotFound { what: "layer", name: detail }.into());
        }
        let record = match self.guests.find(name)? {
            Some(record) if record.state == GuestState::Arriving => {
                return Err(Error::Busy(format!("guest {name} is on its way to this host")).into());
            }
            Some(record) => record,
            None => {
                let record = GuestRecord::new(description.spec.clone());
                self.guests.add(&record)?;
                record
            }
        };
        let guest = self.guest(&record)?;
        let in_the_way = match guest.status()?.activity {
            Activity::Absent => None,
            Activity::Running => Some(format!("guest {name} runs; `layerctl guest stop {name}` first")),
            Activity::Frozen => Some(format!(
                "guest {name} stands still; `layerctl guest start {name}` lets it go on, `layerctl guest stop {name}` ends it"
            )),
        };
        if let Some(text) = in_the_way {
            return Err(Error::Busy(text).into());
        }
        guest.discard()?;
        self.host.remove_scratches(name)?;
        self.host.unmount(name, true)?;
        self.host.mount(name, description.instance)?;
        memory::restore(&*guest, store, (state, from), None)?;
        Ok(self.guests.update(name, |record| {
            record.state = GuestState::Running;
            record.spec = description.spec;
            record.state_layer = state_name;
            record.instance = Some(description.instance_name);
            Ok(())
        })?)
    }
}
