//! Names: what makes a layer stay. FORMAT.md, "Names".
//!
//! Invariants: a name refers to a layer that is complete and durable; several names change at once or not at all.

use std::collections::HashSet;

use crate::attr::Time;
use crate::codec::{Put, Reader};
use crate::error::{Error, Result};
use crate::failpoint;
use crate::id::{LayerId, LayerName};
use crate::manifest::Manifest;
use crate::store::Store;
use crate::store::db::{Batch, Cf, Sync};

/// What a name refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct NameRecord {
    /// The layer.
    pub layer: LayerId,
    /// When the name was set.
    pub created: Time,
}

impl NameRecord {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(45);
        out.put_u8(1);
        out.put_id(&self.layer.0);
        out.put_i64(self.created.seconds);
        out.put_u32(self.created.nanos);
        out
    }

    fn decode(bytes: &[u8]) -> Result<NameRecord> {
        let mut reader = Reader::new("name record", bytes);
        match reader.u8()? {
            1 => {}
            other => return Err(Error::Unsupported { what: "name record", detail: format!("version {other}") }),
        }
        let layer = LayerId(reader.id()?);
        let created = Time { seconds: reader.i64()?, nanos: reader.u32()? };
        reader.finish()?;
        Ok(NameRecord { layer, created })
    }
}

/// What a name must be for it to be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// There is no such name, or it refers to the same layer already.
    Absent,
    /// It refers to this layer.
    Is(LayerId),
    /// Whatever it is.
    Any,
}

/// A name to set.
#[derive(Clone, Debug)]
pub struct NameChange {
    /// The name.
    pub name: LayerName,
    /// What it shall refer to.
    pub layer: LayerId,
    /// What it must be before.
    pub expect: Expect,
}

/// The fewest hexadecimal digits that stand for a layer.
const MIN_PREFIX: usize = 8;

/// A row of names.
pub(crate) fn decode_row(key: &[u8], value: &[u8]) -> Result<(LayerName, NameRecord)> {
    let name = std::str::from_utf8(key).map_err(|_| Error::corrupt("name", "it is not text"))?;
    Ok((LayerName::new(name)?, NameRecord::decode(value)?))
}

impl Store {
    /// All names, sorted.
    pub fn names(&self) -> Result<Vec<(LayerName, NameRecord)>> {
        let mut names = Vec::new();
        for entry in self.db.iter(Cf::Names, &[])? {
            let (key, value) = entry?;
            names.push(decode_row(&key, &value)?);
        }
        Ok(names)
    }

    /// What `name` refers to.
    pub fn name(&self, name: &LayerName) -> Result<Option<NameRecord>> {
        self.db.get(Cf::Names, name.as_str())?.map(|value| NameRecord::decode(&value)).transpose()
    }

    /// The layer that `text` stands for: a name, or at least eight hexadecimal digits that begin the id of a layer in
    /// some named stack.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Invalid`] if several layers begin so.
    pub fn resolve(&self, text: &str) -> Result<LayerId> {
        if let Ok(name) = LayerName::new(text)
            && let Some(record) = self.name(&name)?
        {
            return Ok(record.layer);
        }
        let not_found = || Error::NotFound { what: "layer", name: text.to_owned() };
        let prefix = text.to_ascii_lowercase();
        if prefix.len() < MIN_PREFIX || prefix.len() > 64 || !prefix.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(not_found());
        }
        let mut found = HashSet::new();
        let mut seen = HashSet::new();
        for root in self.roots()? {
            let mut next = Some(root);
            while let Some(layer) = next.filter(|layer| seen.insert(*layer)) {
                if layer.to_string().starts_with(&prefix) {
                    found.insert(layer);
                }
                next = Manifest::load(self, layer)?.parent;
            }
        }
        match found.len() {
            0 => Err(not_found()),
            1 => found.into_iter().next().ok_or_else(not_found),
            count => Err(Error::invalid(format!("{text:?} stands for {count} layers; give more digits"))),
        }
    }

    /// Sets one name, durably. See [`Store::set_names_with`].
    pub fn set_name(&self, name: &LayerName, layer: LayerId, expect: Expect) -> Result<()> {
        self.set_names(&[NameChange { name: name.clone(), layer, expect }])
    }

    /// Sets several names at once, durably. See [`Store::set_names_with`].
    pub fn set_names(&self, changes: &[NameChange]) -> Result<()> {
        self.set_names_with(changes, Batch::new())
    }

    /// Sets names and applies `also` in one atomic, durable write.
    ///
    /// The layers must be complete and committed, and protected until now by the session that made them, by a pin, or
    /// by another name.
    ///
    /// # Errors
    /// [`Error::Exists`] or [`Error::Busy`] if a name isn't as expected, [`Error::LayerMissing`].
    pub fn set_names_with(&self, changes: &[NameChange], also: Batch) -> Result<()> {
        self.check_writable()?;
        let _names = self.names_change.lock();
        let mut batch = Batch::new();
        for NameChange { name, layer, expect } in changes {
            let now = self.name(name)?.map(|record| record.layer);
            match (expect, now) {
                (Expect::Any, _) | (Expect::Absent, None) => {}
                (Expect::Absent, Some(now)) if now == *layer => {}
                (Expect::Absent, Some(_)) => {
                    return Err(Error::Exists { what: "layer", name: name.to_string() });
                }
                (Expect::Is(expected), now) if now == Some(*expected) => {}
                (Expect::Is(_), _) => {
                    return Err(Error::Busy(format!("name {name} was changed meanwhile; look at it and try again")));
                }
            }
            self.require_layer(*layer)?;
            if now != Some(*layer) {
                batch.put(Cf::Names, name.as_str(), NameRecord { layer: *layer, created: Time::now() }.encode());
            }
        }
        batch.append(also);
        failpoint::hit("name.before");
        self.db.write(batch, Sync::Yes)?;
        failpoint::hit("name.after");
        Ok(())
    }

    /// Removes a name, durably, and returns what it was.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn remove_name(&self, name: &LayerName) -> Result<NameRecord> {
        self.check_writable()?;
        let _names = self.names_change.lock();
        let record = self.name(name)?.ok_or_else(|| Error::NotFound { what: "layer", name: name.to_string() })?;
        let mut batch = Batch::new();
        batch.delete(Cf::Names, name.as_str());
        self.db.write(batch, Sync::Yes)?;
        Ok(record)
    }

    /// Checks that `layer` and the layers below it are here, and keeps them from a collection that is running.
    ///
    /// A collection removes manifests before anything else, so a layer whose manifest is in the index is whole.
    pub(crate) fn require_layer(&self, layer: LayerId) -> Result<()> {
        self.protect_layer(layer)?;
        let mut next = Some(layer);
        while let Some(layer) = next {
            if !self.contains(&layer.0)? {
                return Err(Error::LayerMissing(layer));
            }
            next = Manifest::load(self, layer)?.parent;
        }
        Ok(())
    }
}
