//! What each side remembers of each move. FORMAT.md, "Moves".
//!
//! Invariants: a row is durable when a call returns, together with what it means for the guest's record, in one write;
//! rows of moves that are over stay for a while, so that a side that missed the end can ask.

use std::sync::Arc;

use layerfs::attr::Time;
use layerfs::store::Store;
use layerfs::store::db::{Batch, Cf, Sync};
use layerfs::{Error, LayerId, Result, failpoint};
use serde::{Deserialize, Serialize};

use super::{Fate, MoveId, destination, source};
use crate::guest::{GuestName, GuestRecord, GuestSpec, GuestState, Guests};

const VERSION: u8 = 1;
const PREFIX: &[u8] = b"move/";
/// So many rows of moves that are over are kept.
const KEPT: usize = 256;

/// Which side of a move this host is, and how far it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "side")]
pub enum Side {
    /// The guest was here.
    Source {
        /// How far.
        phase: source::Phase,
    },
    /// The guest comes here.
    Destination {
        /// How far.
        phase: destination::Phase,
        /// Whether it goes back if it can't be restored.
        gives_back: bool,
        /// Whether there was a record of the guest before.
        was_known: bool,
    },
}

/// What is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers {
    /// What the guest's root lies on.
    pub instance: LayerId,
    /// Its state.
    pub state: LayerId,
    /// Whether it may run before all of its state is there.
    pub lazily: bool,
}

/// A move, as one side sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Its number.
    pub id: MoveId,
    /// What moves.
    pub spec: GuestSpec,
    /// The other host.
    pub peer: String,
    /// The guest's epoch once it has moved.
    pub epoch: u64,
    /// Which side this is, and how far.
    #[serde(flatten)]
    pub side: Side,
    /// What is restored, once it is known.
    pub layers: Option<Layers>,
    /// When it began, in seconds since 1970.
    pub began: i64,
    /// What went wrong last, for people.
    pub note: String,
}

impl Row {
    /// The move `id` of a guest to `peer`, as its source sees it.
    pub fn source(id: MoveId, record: &GuestRecord, peer: &str) -> Row {
        let side = Side::Source { phase: source::Phase::Moving };
        Row::new(id, record.spec.clone(), peer, record.epoch + 1, side)
    }

    /// The move `id` of a guest from `peer`, as its destination sees it.
    pub fn destination(id: MoveId, spec: GuestSpec, peer: &str, epoch: u64, gives_back: bool) -> Row {
        let side = Side::Destination { phase: destination::Phase::Arriving, gives_back, was_known: false };
        Row::new(id, spec, peer, epoch, side)
    }

    fn new(id: MoveId, spec: GuestSpec, peer: &str, epoch: u64, side: Side) -> Row {
        let (peer, began) = (peer.to_owned(), Time::now().seconds);
        Row { id, spec, peer, epoch, side, layers: None, began, note: String::new() }
    }

    /// The guest's name.
    pub fn guest(&self) -> &GuestName {
        &self.spec.name
    }

    /// Whether it is over.
    pub fn is_ended(&self) -> bool {
        match &self.side {
            Side::Source { phase } => phase.is_ended(),
            Side::Destination { phase, .. } => phase.is_ended(),
        }
    }

    /// Whether only the other side, or an operator, can tell how it goes on.
    pub fn is_in_doubt(&self) -> bool {
        match &self.side {
            Side::Source { phase } => *phase == source::Phase::Released,
            Side::Destination { phase, .. } => *phase == destination::Phase::Staged,
        }
    }

    /// What is answered to the other side.
    pub fn fate(&self) -> Fate {
        match &self.side {
            Side::Source { phase } => phase.fate(),
            Side::Destination { phase, .. } => phase.fate(),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        // Maps with text keys only: this can't fail.
        out.extend_from_slice(&serde_json::to_vec(self).unwrap_or_default());
        out
    }

    /// The row with these bytes.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for anything malformed, [`Error::Unsupported`] for a later version.
    pub fn decode(bytes: &[u8]) -> Result<Row> {
        match bytes.split_first() {
            Some((&VERSION, json)) => {
                serde_json::from_slice(json).map_err(|e| Error::corrupt("move record", e.to_string()))
            }
            Some((version, _)) => Err(Error::Unsupported { what: "move record", detail: format!("version {version}") }),
            None => Err(Error::corrupt("move record", "it is empty")),
        }
    }

    /// What this row means for the guest's record, of which `old` is what there was.
    fn record(&self, old: Option<GuestRecord>) -> Option<GuestRecord> {
        let known = old.is_some();
        let mut record = old.unwrap_or_else(|| GuestRecord::new(self.spec.clone()));
        match &self.side {
            Side::Source { phase } => self.source_record(*phase, &mut record),
            Side::Destination { phase, was_known, .. } => {
                use destination::Phase;
                match phase {
                    Phase::Arriving | Phase::Staged => {
                        record.state = GuestState::Arriving;
                        record.peer = Some(self.peer.clone());
                    }
                    Phase::Committed => {
                        record.spec = self.spec.clone();
                        record.state = GuestState::Stopped;
                        record.epoch = record.epoch.max(self.epoch);
                    }
                    Phase::Restored => record.state = GuestState::Running,
                    // It was never released to this host, and nothing was known of it.
                    Phase::Refused | Phase::Cleared if !was_known && record.epoch < self.epoch => return None,
                    Phase::Refused | Phase::Cleared if !known => return None,
                    Phase::Refused | Phase::Cleared => {
                        record.state = GuestState::Away;
                        record.peer = Some(self.peer.clone());
                    }
                }
            }
        }
        Some(record)
    }

    fn source_record(&self, phase: source::Phase, record: &mut GuestRecord) {
        use source::{Outcome, Phase};
        match phase {
            Phase::Moving | Phase::Ended(Outcome::Aborted) => record.state = GuestState::Running,
            Phase::Stopping => record.state = GuestState::Stopped,
            Phase::Released | Phase::Gone | Phase::Ended(Outcome::Moved | Outcome::GivenUp) => {
                record.state = GuestState::Away;
                record.epoch = record.epoch.max(self.epoch);
                record.peer = Some(self.peer.clone());
            }
            Phase::Returned | Phase::Ended(Outcome::Returned) => {
                record.state = if phase == Phase::Returned { GuestState::Stopped } else { GuestState::Running };
                // The destination had the last one.
                record.epoch = record.epoch.max(self.epoch + 1);
                record.peer = None;
            }
        }
    }
}

/// The moves of a store. Clones share them.
#[derive(Clone)]
pub struct Journal {
    store: Arc<Store>,
    guests: Guests,
}

impl Journal {
    /// That of the store of `guests`.
    pub fn new(guests: &Guests) -> Journal {
        Journal { store: guests.store().clone(), guests: guests.clone() }
    }

    /// Makes `row`, and what it means for its guest, durable.
    ///
    /// # Errors
    /// Those of the index. Unless it is [`Error::NoSpace`], the row may be durable all the same.
    pub fn write(&self, row: &Row) -> Result<()> {
        self.write_changing(row, |_| ())
    }

    /// The same; `change` has the last word on the guest's record.
    ///
    /// # Errors
    /// As [`Journal::write`].
    pub fn write_changing(&self, row: &Row, change: impl FnOnce(&mut GuestRecord)) -> Result<()> {
        let mut batch = Batch::new();
        batch.put(Cf::Transfers, key(row.id), row.encode());
        self.guests.change_with(row.guest(), batch, |old| {
            let mut record = row.record(old);
            if let Some(record) = &mut record {
                change(record);
            }
            Ok(record)
        })?;
        failpoint::hit("move.journalled");
        Ok(())
    }

    /// The move `id`.
    ///
    /// # Errors
    /// Those of the index.
    pub fn get(&self, id: MoveId) -> Result<Option<Row>> {
        self.store.db().get(Cf::Transfers, key(id))?.map(|bytes| Row::decode(&bytes)).transpose()
    }

    /// All of them, the oldest first.
    ///
    /// # Errors
    /// Those of the index.
    pub fn list(&self) -> Result<Vec<Row>> {
        let entries = self.store.db().iter(Cf::Transfers, PREFIX)?;
        let mut rows = entries.map(|entry| Row::decode(&entry?.1)).collect::<Result<Vec<Row>>>()?;
        rows.sort_by_key(|row| (row.began, row.id));
        Ok(rows)
    }

    /// The move of `guest` that isn't over, if there is one.
    ///
    /// # Errors
    /// Those of the index.
    pub fn open_of(&self, guest: &GuestName) -> Result<Option<Row>> {
        Ok(self.list()?.into_iter().rev().find(|row| row.guest() == guest && !row.is_ended()))
    }

    /// Forgets the oldest of those that are over, if there are many.
    ///
    /// # Errors
    /// Those of the index.
    pub fn prune(&self) -> Result<()> {
        let ended: Vec<Row> = self.list()?.into_iter().filter(Row::is_ended).collect();
        let mut batch = Batch::new();
        ended.iter().take(ended.len().saturating_sub(KEPT)).for_each(|row| batch.delete(Cf::Transfers, key(row.id)));
        if batch.is_empty() { Ok(()) } else { self.store.db().write(batch, Sync::No) }
    }
}

fn key(id: MoveId) -> Vec<u8> {
    [PREFIX, &id.0[..]].concat()
}

#[cfg(test)]
mod tests {
    use layerfs::store::StoreOptions;
    use layerfs::{ChunkId, LayerName};

    use super::*;

    fn record() -> GuestRecord {
        let (name, stack) = (GuestName::new("web").unwrap(), LayerName::new("app").unwrap());
        let spec = GuestSpec { name, driver: "fake".to_owned(), stack, options: serde_json::json!({}) };
        GuestRecord { state: GuestState::Running, epoch: 4, ..GuestRecord::new(spec) }
    }

    fn journal() -> (Journal, Guests, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        let guests = Guests::new(store);
        (Journal::new(&guests), guests, folder)
    }

    #[test]
    fn rows_are_pinned() {
        let mut row = Row::source(MoveId([1; 16]), &record(), "edge");
        row.began = 7;
        let layer = LayerId(ChunkId([2; 32]));
        row.layers = Some(Layers { instance: layer, state: layer, lazily: true });
        let two = "02".repeat(32);
        let json = format!(
            concat!(
                r#"{{"id":"{}","spec":{{"name":"web","driver":"fake","stack":"app","options":{{}}}},"peer":"edge","epoch":5,"#,
                r#""side":"source","phase":"moving","layers":{{"instance":"{}","state":"{}","lazily":true}},"began":7,"note":""}}"#
            ),
            "01".repeat(16),
            two,
            two,
        );
        assert_eq!(row.encode(), [&[1][..], json.as_bytes()].concat());
        assert_eq!(Row::decode(&row.encode()).unwrap(), row);
        let there = Row::destination(MoveId([1; 16]), record().spec, "core", 5, true);
        assert_eq!(Row::decode(&there.encode()).unwrap(), there);
        assert!((0..there.encode().len()).all(|cut| Row::decode(&there.encode()[..cut]).is_err()));
    }

    #[test]
    fn a_row_and_the_guests_record_change_together() {
        let (journal, guests, _folder) = journal();
        guests.add(&record()).unwrap();
        let name = &record().spec.name;
        let mut row = Row::source(MoveId([1; 16]), &record(), "edge");
        let mut states = Vec::new();
        use source::{Outcome, Phase};
        for phase in [Phase::Moving, Phase::Stopping, Phase::Released, Phase::Returned, Phase::Ended(Outcome::Returned)]
        {
            row.side = Side::Source { phase };
            journal.write(&row).unwrap();
            let record = guests.get(name).unwrap();
            states.push((record.state, record.epoch));
            assert_eq!(journal.open_of(name).unwrap().is_some(), !phase.is_ended());
        }
        let expected = [
            (GuestState::Running, 4),
            (GuestState::Stopped, 4),
            (GuestState::Away, 5),
            (GuestState::Stopped, 6),
            (GuestState::Running, 6),
        ];
        assert_eq!(states, expected);
    }

    #[test]
    fn a_guest_that_never_came_leaves_no_record_and_one_that_goes_back_leaves_its_epoch() {
        let (journal, guests, _folder) = journal();
        let name = record().spec.name;
        use destination::Phase;
        let write = |phase, was_known| {
            let mut row = Row::destination(MoveId([3; 16]), record().spec, "core", 5, true);
            row.side = Side::Destination { phase, gives_back: true, was_known };
            journal.write(&row).unwrap();
            guests.find(&name).unwrap().map(|record| (record.state, record.epoch))
        };
        assert_eq!(write(Phase::Arriving, false), Some((GuestState::Arriving, 0)));
        assert_eq!(write(Phase::Staged, false), Some((GuestState::Arriving, 0)));
        assert_eq!(write(Phase::Refused, false), None);
        assert_eq!(write(Phase::Cleared, false), None);
        write(Phase::Arriving, false);
        assert_eq!(write(Phase::Committed, false), Some((GuestState::Stopped, 5)));
        assert_eq!(write(Phase::Refused, false), Some((GuestState::Away, 5)));
        assert_eq!(write(Phase::Arriving, true), Some((GuestState::Arriving, 5)));
        assert_eq!(write(Phase::Refused, true), Some((GuestState::Away, 5)));
    }

    #[test]
    fn old_rows_are_forgotten_and_open_ones_never() {
        let (journal, guests, _folder) = journal();
        guests.add(&record()).unwrap();
        let row = |number: u16, phase| {
            let mut id = [0; 16];
            id[..2].copy_from_slice(&number.to_be_bytes());
            let mut row = Row::source(MoveId(id), &record(), "edge");
            (row.began, row.side) = (i64::from(number), Side::Source { phase });
            row
        };
        journal.write(&row(0, source::Phase::Released)).unwrap();
        let ended = source::Phase::Ended(source::Outcome::Aborted);
        (1..=KEPT as u16 + 3).for_each(|number| journal.write(&row(number, ended)).unwrap());
        journal.prune().unwrap();
        let left = journal.list().unwrap();
        assert_eq!((left.len(), left[0].began, left[1].began), (KEPT + 1, 0, 4));
    }
}
