//! Checkpoints: a guest's state and its upper as two layers, from which it goes on here or on another host.
//!
//! ```text
//! guest/NAME/TAG/instance   what its upper held, on its stack
//! guest/NAME/TAG/state      its checkpoint files, with guest.json: what the guest is and which instance belongs to it
//! ```
//!
//! Invariants: the two belong together, as they were at one moment; a guest whose checkpoint fails runs on.

use std::path::Path;

use layerfs::monitor::Monitor;
use layerfs::{Error, LayerId, LayerName, Result as StoreResult};
use serde::{Deserialize, Serialize};

use super::{
    Activity, Drivers, Guest, GuestName, GuestRecord, GuestSpec, GuestState, Guests, Host, Scratch, Written, memory,
    state,
};
use crate::error::Result;
use std::sync::Arc;

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

    /// Makes a checkpoint of the running guest. It runs on, or ends if `end`.
    ///
    /// # Errors
    /// Of any kind; it runs on then.
    pub fn checkpoint(&self, name: &GuestName, tag: &str, end: bool, monitor: &dyn Monitor) -> Result<Checkpoint> {
        let record = self.guests.get(name)?;
        let guest = self.guest(&record)?;
        let (state_name, instance_name) = Self::names(name, tag)?;
        let expected = guest.status()?.memory_bytes.unwrap_or(0);
        // Memory is precious: it goes as soon as the state is in the store, or isn't wanted any more.
        let scratch = Scratch::new(&self.host, name, expected)?;
        let folder = scratch.path();
        let made = self.dump(&record, &*guest, folder, &instance_name, end, monitor);
        let made = made.and_then(|(written, instance, frozen)| {
            monitor.phase("storing", Some(written.memory_bytes + written.other_bytes));
            let description = Description { spec: record.spec.clone(), instance, instance_name: instance_name.clone() };
            description.write(folder)?;
            let store = self.guests.store();
            let previous = match &record.state_layer {
                Some(previous) => store.name(previous)?.map(|record| record.layer),
                None => None,
            };
            let (layer, report) = state::import(store, folder, &state_name, previous, monitor)?;
            Ok(Checkpoint {
                state: (state_name.clone(), layer),
                instance: (instance_name.clone(), instance),
                written,
                frozen_seconds: frozen,
                stored_bytes: report.new_stored_bytes,
            })
        });
        let goes_on = || guest.status().is_ok_and(|status| status.activity != Activity::Frozen);
        match made.is_ok() || goes_on() {
            true => drop(scratch),
            // It may have nothing else to go on from.
            false => drop(scratch.leave()),
        }
        let made = made?;
        self.guests.update(name, |record| {
            record.state_layer = Some(state_name);
            record.instance = Some(instance_name);
            if end {
                record.state = GuestState::Created;
            }
            Ok(())
        })?;
        Ok(made)
    }

    /// Dumps it, seals its upper, and lets it go on or ends it.
    fn dump(
        &self,
        record: &GuestRecord,
        guest: &dyn Guest,
        folder: &Path,
        instance_name: &LayerName,
        end: bool,
        monitor: &dyn Monitor,
    ) -> Result<(Written, LayerId, f64)> {
        monitor.phase("dumping", None);
        let began = std::time::Instant::now();
        let written = match guest.dump(folder) {
            Ok(written) => written,
            Err(error) => {
                // It may stand still all the same.
                if guest.status()?.activity != Activity::Absent
                    && let Err(second) = guest.resume()
                {
                    let text = format!("{error}; and it doesn't go on: {second}");
                    return Err(crate::Error::guest("dump", &record.spec.name, text));
                }
                return Err(error);
            }
        };
        monitor.phase("sealing", None);
        match self.host.seal(&record.spec.name, instance_name) {
            Ok(instance) => {
                if end {
                    guest.discard()?
                } else {
                    guest.resume()?
                }
                Ok((written, instance, began.elapsed().as_secs_f64()))
            }
            Err(error) => {
                guest.resume()?;
                Err(error)
            }
        }
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
            Some(record) => record,
            None => {
                let record = GuestRecord::new(description.spec.clone());
                self.guests.add(&record)?;
                record
            }
        };
        let guest = self.guest(&record)?;
        if guest.status()?.activity != Activity::Absent {
            return Err(Error::Busy(format!("guest {name} runs; `layerctl guest stop {name}` first")).into());
        }
        guest.discard()?;
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
