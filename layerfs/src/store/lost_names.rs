//! Names that were lost with the index: the mark that says so, and how layers get names again.
//!
//! Invariants: the mark stands in a new index before that takes the old one's place; it goes, or says that there is
//! nothing more to be had for now, in the one write that sets the recovered names; while layers may lack the names that
//! they had, nothing is collected. FORMAT.md, "Index database".

use std::collections::{BTreeMap, BTreeSet};

use crate::chunk::Class;
use crate::error::{Error, ErrorClass, Result};
use crate::id::{LayerId, LayerName};
use crate::manifest::Manifest;
use crate::monitor::{self, Monitor};
use crate::store::check;
use crate::store::db::{Batch, Cf, Db};
use crate::store::names::{self, Expect, NameChange};
use crate::store::pack::PackId;
use crate::store::{Store, Uncached};

const KEY: &[u8] = b"names.lost";
/// Stands in a new index that not all records of uppers could be taken over to, until it was looked which files are
/// without a record ([`crate::upper`]).
pub(crate) const UPPERS_KEY: &[u8] = b"uppers.lost";
/// What the names are called that were lost.
pub(crate) const SUBJECT: &str = "the list of names";
/// What is wrong with them while layers may lack theirs, and the way out.
pub(crate) const UNRECOVERED: &str = "it was lost, and layers have not all got names again; stop the daemon and run \
                                      `layerctl fsck --rebuild`, with --tier if there is a second tier";

/// How far the recovery of names is that were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LostNames {
    /// Layers that are whole may have no name.
    Unrecovered = 0,
    /// Every layer that is whole has one. Others may become whole: by packs that come back, or a second tier.
    Incomplete = 1,
}

impl LostNames {
    /// What `db` says; none if no names were lost.
    pub fn read(db: &Db) -> Result<Option<LostNames>> {
        Ok(db.get(Cf::Meta, KEY)?.map(|value| match value[..] {
            [1] => LostNames::Incomplete,
            // Of what no version has written the worst is assumed.
            _ => LostNames::Unrecovered,
        }))
    }

    /// The write that makes it `state`.
    pub fn change(state: Option<LostNames>) -> Batch {
        let mut batch = Batch::new();
        match state {
            Some(state) => batch.put(Cf::Meta, KEY, [state as u8]),
            None => batch.delete(Cf::Meta, KEY),
        }
        batch
    }
}

impl Store {
    /// Fails while layers may lack the names that they had.
    pub(crate) fn check_names_recovered(&self) -> Result<()> {
        match LostNames::read(&self.db)? {
            Some(LostNames::Unrecovered) => Err(Error::corrupt(SUBJECT, UNRECOVERED)),
            Some(LostNames::Incomplete) | None => Ok(()),
        }
    }
}

/// Names each complete layer that no named stack holds and no other complete layer lies on. Returns the names.
///
/// `manifests` are those that were read: layer → the layer that it lies on.
///
/// # Errors
/// What keeps it from looking at a layer; then no name is set, and the mark stays as it is.
pub(crate) fn recover(
    store: &Store,
    manifests: &BTreeMap<LayerId, Option<LayerId>>,
    monitor: &dyn Monitor,
) -> Result<Vec<String>> {
    monitor.phase("looking for layers without names", None);
    let named = named_stacks(store, manifests)?;
    let mut complete = BTreeSet::new();
    let (mut incomplete, mut unread) = (0, unread_layers(store, manifests, &named)?);
    for layer in manifests.keys().filter(|layer| !named.contains(layer)) {
        monitor::check(monitor)?;
        match store.check_stack(*layer) {
            Ok(()) => drop(complete.insert(*layer)),
            Err(error) if is_lost(&error) => incomplete += 1,
            Err(error) if error.class() == ErrorClass::Network && !store.has_tier() => unread += 1,
            Err(error) => return Err(error),
        }
        monitor.items(1);
    }
    let parents: BTreeSet<LayerId> = complete.iter().filter_map(|layer| *manifests.get(layer)?).collect();
    let mut changes: Vec<NameChange> = Vec::new();
    for layer in complete.difference(&parents) {
        let short = LayerName::new(&format!("recovered/{}", layer.0.short()))?;
        let is_taken = store.db.contains(Cf::Names, short.as_str())? || changes.iter().any(|other| other.name == short);
        let name = if is_taken { LayerName::new(&format!("recovered/{layer}"))? } else { short };
        changes.push(NameChange { name, layer: *layer, expect: Expect::Absent });
    }
    let state = match store.has_tier() {
        false if unread > 0 => Some(LostNames::Unrecovered),
        // Whether there is a second tier isn't known of a store whose records are lost.
        false => Some(LostNames::Incomplete),
        true => Some(LostNames::Incomplete).filter(|_| incomplete + unread > 0),
    };
    store.set_names_with(&changes, LostNames::change(state))?;
    if state == Some(LostNames::Unrecovered) {
        monitor.warn(&format!(
            "{unread} layers are in the second tier, all or in part, and have no name yet; repeat this with --tier"
        ));
    } else if incomplete + unread > 0 {
        monitor.warn(&format!(
            "{} layers are incomplete and have no name; should their packs come back, repeat this",
            incomplete + unread
        ));
    }
    Ok(changes.iter().map(|change| change.name.to_string()).collect())
}

/// All layers in the stacks of names.
fn named_stacks(store: &Store, manifests: &BTreeMap<LayerId, Option<LayerId>>) -> Result<BTreeSet<LayerId>> {
    let mut layers = BTreeSet::new();
    for entry in store.db.iter_from(Cf::Names, &[])? {
        let (key, value) = entry?;
        // A row that can't be read keeps nothing.
        let Ok((_, record)) = names::decode_row(&key, &value) else { continue };
        let mut next = Some(record.layer);
        while let Some(layer) = next.filter(|layer| layers.insert(*layer)) {
            next = match manifests.get(&layer) {
                Some(parent) => *parent,
                None => Manifest::load(&Uncached(store), layer).ok().and_then(|manifest| manifest.parent),
            };
        }
    }
    Ok(layers)
}

/// How many layers there are in packs of the second tier that were not read, and that no named stack holds.
fn unread_layers(
    store: &Store,
    manifests: &BTreeMap<LayerId, Option<LayerId>>,
    named: &BTreeSet<LayerId>,
) -> Result<u64> {
    let remote: BTreeSet<PackId> = store.packs.remote()?.into_iter().map(|(id, _)| id).collect();
    if remote.is_empty() {
        return Ok(0);
    }
    let mut count = 0;
    for entry in store.index.iter()? {
        let (id, location) = entry?;
        let (layer, is_remote) = (LayerId(id), remote.contains(&location.pack));
        let is_unread = is_remote && location.class == Class::Manifest && !manifests.contains_key(&layer);
        count += u64::from(is_unread && !named.contains(&layer));
    }
    Ok(count)
}

/// Whether `error` says that a layer isn't whole, and not that it could not be looked at just now.
fn is_lost(error: &Error) -> bool {
    use ErrorClass::{Busy, Denied, Io, Network, NoSpace};
    !matches!(error.class(), Busy | Denied | Io | Network | NoSpace) || check::is_damage(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ChunkId;

    #[test]
    fn what_can_not_be_looked_at_just_now_is_not_lost() {
        let missing = Error::ChunkMissing(ChunkId::of(b"chunk"));
        let failed = |code| Error::io("reading a pack", std::io::Error::from_raw_os_error(code));
        let (place, class) = ("bucket".to_owned(), ErrorClass::Network);
        let away = Error::Tier { action: "reading from", place, class, detail: "so".to_owned() };
        assert!(is_lost(&missing) && is_lost(&failed(libc::EIO)));
        assert!(!is_lost(&failed(libc::EMFILE)) && !is_lost(&failed(libc::EACCES)) && !is_lost(&away));
    }
}
