//! What each side remembers of each move. FORMAT.md, "Moves".
//!
//! Invariants: a row is durable when a call returns, together with what it means for the guest's record, in one write;
//! rows of moves that are over stay for a while, so that a side that missed the end can ask; a row that can't be read is
//! taken for one that isn't over.

use std::sync::Arc;

use layerfs::attr::Time;
use layerfs::store::Store;
use layerfs::store::db::{Batch, Cf, Sync, WriteError};
use layerfs::{Error, LayerId, Result, failpoint};
use serde::{Deserialize, Serialize};

use super::{Fate, MoveId, destination, source};
use crate::guest::{GuestName, GuestRecord, GuestSpec, GuestState, Guests};
use crate::identity::PublicKey;
use crate::peers::Peer;
use crate::streams::TRUSTED_KEY;

const VERSION: u8 = 1;
const PREFIX: &[u8] = b"move/";
/// So many rows of moves that are over are kept, and as many of those that an operator or the destination ended in doubt.
const KEPT: usize = 256;
/// No epoch is higher: a guest could not get there by moving.
pub const MAX_EPOCH: u64 = u64::MAX >> 1;

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
    /// The other host's name when it began.
    pub peer: String,
    /// The other host's key, by which it is known whatever it is called; none if it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PublicKey>,
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
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no higher epoch.
    pub fn source(id: MoveId, record: &GuestRecord, peer: &Peer) -> Result<Row> {
        let side = Side::Source { phase: source::Phase::Moving };
        let next = record.epoch.checked_add(1).filter(|epoch| *epoch <= MAX_EPOCH);
        let too_high = || Error::invalid(format!("guest {} has epoch {}", record.spec.name, record.epoch));
        Ok(Row::new(id, record.spec.clone(), peer, next.ok_or_else(too_high)?, side))
    }

    /// The move `id` of a guest from `peer`, as its destination sees it.
    pub fn destination(id: MoveId, spec: GuestSpec, peer: &Peer, epoch: u64, gives_back: bool) -> Row {
        let side = Side::Destination { phase: destination::Phase::Arriving, gives_back, was_known: false };
        Row::new(id, spec, peer, epoch, side)
    }

    fn new(id: MoveId, spec: GuestSpec, peer: &Peer, epoch: u64, side: Side) -> Row {
        let key = Some(peer.key).filter(|key| *key != TRUSTED_KEY);
        let (peer, began) = (peer.name.to_string(), Time::now().seconds);
        Row { id, spec, peer, key, epoch, side, layers: None, began, note: String::new() }
    }

    /// Whether `peer` is the other host.
    pub fn is_with(&self, peer: &Peer) -> bool {
        match self.key {
            Some(key) => key == peer.key,
            None => self.peer == peer.name.as_str(),
        }
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

    /// Whether it ended here otherwise than the other side may have been told last: it may come back much later, and has to
    /// hear of it.
    fn is_news(&self) -> bool {
        use source::{Outcome, Phase};
        matches!(self.side, Side::Source { phase: Phase::Ended(Outcome::Returned | Outcome::GivenUp) })
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
                    // Somebody has taken another of that name on record since the first one was refused.
                    Phase::Cleared if !was_known && known && record.state == GuestState::Created => {}
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
                record.epoch = record.epoch.max(self.epoch.saturating_add(1));
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
    /// Those of the index. With [`WriteError::Unsure`] the row may be durable all the same.
    pub fn write(&self, row: &Row) -> Result<(), WriteError> {
        self.put(row, |_| Ok(()), |_| ())
    }

    /// The same, if the guest's record is as it was `seen`.
    ///
    /// # Errors
    /// As [`Journal::write`]; [`Error::Busy`] if it isn't: nothing has changed then.
    pub fn write_over(&self, row: &Row, seen: Option<&GuestRecord>) -> Result<(), WriteError> {
        let is_as_seen = |old: Option<&GuestRecord>| match old == seen {
            true => Ok(()),
            false => {
                Err(Error::Busy(format!("something else has just been done with guest {}; try again", row.guest())))
            }
        };
        self.put(row, is_as_seen, |_| ())
    }

    /// The same; `change` has the last word on the guest's record.
    ///
    /// # Errors
    /// As [`Journal::write`].
    pub fn write_changing(&self, row: &Row, change: impl FnOnce(&mut GuestRecord)) -> Result<(), WriteError> {
        self.put(row, |_| Ok(()), change)
    }

    fn put(
        &self,
        row: &Row,
        look: impl FnOnce(Option<&GuestRecord>) -> Result<()>,
        change: impl FnOnce(&mut GuestRecord),
    ) -> Result<(), WriteError> {
        let mut batch = Batch::new();
        batch.put(Cf::Transfers, key(row.id), row.encode());
        self.guests.change_with(row.guest(), batch, |old| {
            look(old.as_ref())?;
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

    /// All that can be read, the oldest first.
    ///
    /// # Errors
    /// Those of the index.
    pub fn list(&self) -> Result<Vec<Row>> {
        let (rows, unreadable) = self.read()?;
        unreadable.iter().for_each(|bad| tracing::error!(error = %bad.error, "the record of a move can't be read"));
        Ok(rows)
    }

    /// The move of `guest` that isn't over, if there is one.
    ///
    /// # Errors
    /// Those of the index, and of a row that can't be read and may be of this guest.
    pub fn open_of(&self, guest: &GuestName) -> Result<Option<Row>> {
        let (rows, unreadable) = self.read()?;
        let open = rows.into_iter().rev().find(|row| row.guest() == guest && !row.is_ended());
        let may_be_its = |bad: &Unreadable| bad.guest.as_deref().is_none_or(|name| name == guest.as_str());
        match unreadable.into_iter().find(may_be_its) {
            Some(bad) if open.is_none() => Err(bad.error),
            _ => Ok(open),
        }
    }

    /// Forgets the oldest of those that are over, if there are many.
    ///
    /// # Errors
    /// Those of the index.
    pub fn prune(&self) -> Result<()> {
        let ended = self.list()?.into_iter().filter(Row::is_ended);
        let (news, others): (Vec<Row>, Vec<Row>) = ended.partition(Row::is_news);
        let mut batch = Batch::new();
        for rows in [news, others] {
            rows.iter().take(rows.len().saturating_sub(KEPT)).for_each(|row| batch.delete(Cf::Transfers, key(row.id)));
        }
        if batch.is_empty() { Ok(()) } else { self.store.db().write(batch, Sync::No) }
    }

    /// The rows, the oldest first, and those that can't be read.
    fn read(&self) -> Result<(Vec<Row>, Vec<Unreadable>)> {
        let (mut rows, mut unreadable) = (Vec::new(), Vec::new());
        for entry in self.store.db().iter(Cf::Transfers, PREFIX)? {
            let bytes = entry?.1;
            match Row::decode(&bytes) {
                Ok(row) => rows.push(row),
                Err(error) => unreadable.push(Unreadable { guest: guest_in(&bytes), error }),
            }
        }
        rows.sort_by_key(|row| (row.began, row.id));
        Ok((rows, unreadable))
    }
}

/// A row that is damaged, or of a later version.
struct Unreadable {
    /// Whose it is, if that can be told.
    guest: Option<String>,
    error: Error,
}

/// The guest's name in a row whose other parts may be of any kind.
fn guest_in(bytes: &[u8]) -> Option<String> {
    let row: serde_json::Value = serde_json::from_slice(bytes.get(1..)?).ok()?;
    Some(row.get("spec")?.get("name")?.as_str()?.to_owned())
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

    fn peer(name: &str) -> Peer {
        let rights = crate::peers::Rights::default();
        Peer { name: crate::peers::PeerName::new(name).unwrap(), address: None, key: PublicKey([7; 32]), rights }
    }

    fn journal() -> (Journal, Guests, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        let guests = Guests::new(store);
        (Journal::new(&guests), guests, folder)
    }

    #[test]
    fn rows_are_pinned() {
        let mut row = Row::source(MoveId([1; 16]), &record(), &peer("edge")).unwrap();
        row.began = 7;
        let layer = LayerId(ChunkId([2; 32]));
        row.layers = Some(Layers { instance: layer, state: layer, lazily: true });
        let two = "02".repeat(32);
        let json = format!(
            concat!(
                r#"{{"id":"{}","spec":{{"name":"web","driver":"fake","stack":"app","options":{{}}}},"peer":"edge","key":"{}","epoch":5,"#,
                r#""side":"source","phase":"moving","layers":{{"instance":"{}","state":"{}","lazily":true}},"began":7,"note":""}}"#
            ),
            "01".repeat(16),
            PublicKey([7; 32]),
            two,
            two,
        );
        assert_eq!(row.encode(), [&[1][..], json.as_bytes()].concat());
        assert_eq!(Row::decode(&row.encode()).unwrap(), row);
        // One of before there were keys in them.
        let older = json.replace(&format!("\"key\":\"{}\",", PublicKey([7; 32])), "");
        let older = Row::decode(&[&[1][..], older.as_bytes()].concat()).unwrap();
        assert!(older.key.is_none() && older.is_with(&peer("edge")) && !older.is_with(&peer("core")));
        assert!(row.is_with(&peer("core")), "the same host under another name");
        assert!(!row.is_with(&Peer { key: PublicKey([8; 32]), ..peer("edge") }), "another host of the same name");
        let there = Row::destination(MoveId([1; 16]), record().spec, &peer("core"), 5, true);
        assert_eq!(Row::decode(&there.encode()).unwrap(), there);
        assert!((0..there.encode().len()).all(|cut| Row::decode(&there.encode()[..cut]).is_err()));
    }

    #[test]
    fn a_row_and_the_guests_record_change_together() {
        let (journal, guests, _folder) = journal();
        guests.add(&record()).unwrap();
        let name = &record().spec.name;
        let mut row = Row::source(MoveId([1; 16]), &record(), &peer("edge")).unwrap();
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
            let mut row = Row::destination(MoveId([3; 16]), record().spec, &peer("core"), 5, true);
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
            let mut row = Row::source(MoveId(id), &record(), &peer("edge")).unwrap();
            (row.began, row.side) = (i64::from(number), Side::Source { phase });
            row
        };
        journal.write(&row(0, source::Phase::Released)).unwrap();
        let ended = source::Phase::Ended(source::Outcome::Aborted);
        (1..=KEPT as u16 + 3).for_each(|number| journal.write(&row(number, ended)).unwrap());
        journal.prune().unwrap();
        let left = journal.list().unwrap();
        assert_eq!((left.len(), left[0].began, left[1].began), (KEPT + 1, 0, 4));
        // What a destination that comes back late has to hear is kept longer.
        let returned = source::Phase::Ended(source::Outcome::Returned);
        journal.write(&row(1, returned)).unwrap();
        (1000..1010).for_each(|number| journal.write(&row(number, ended)).unwrap());
        journal.prune().unwrap();
        let left = journal.list().unwrap();
        assert_eq!((left.len(), left[0].began, left[1].began), (KEPT + 2, 0, 1));
    }

    #[test]
    fn a_row_that_cant_be_read_keeps_nothing_but_its_own_guest_back() {
        let (journal, guests, _folder) = journal();
        guests.add(&record()).unwrap();
        let (web, other) = (record().spec.name, GuestName::new("other").unwrap());
        journal.write(&Row::source(MoveId([1; 16]), &record(), &peer("edge")).unwrap()).unwrap();
        let put = |id: u8, bytes: &[u8]| {
            let mut batch = Batch::new();
            batch.put(Cf::Transfers, key(MoveId([id; 16])), bytes);
            guests.store().db().write(batch, Sync::Yes).unwrap();
        };
        put(2, b"\x02{\"spec\":{\"name\":\"later\"}}");
        assert_eq!(journal.list().unwrap().len(), 1);
        assert!(journal.open_of(&web).unwrap().is_some() && journal.open_of(&other).unwrap().is_none());
        assert!(journal.open_of(&GuestName::new("later").unwrap()).is_err());
        put(2, b"\x01{");
        assert!(journal.open_of(&web).unwrap().is_some() && journal.open_of(&other).is_err());
    }

    #[test]
    fn a_row_isnt_written_over_a_record_that_has_changed_since() {
        let (journal, guests, _folder) = journal();
        let row = Row::destination(MoveId([1; 16]), record().spec, &peer("core"), 5, true);
        guests.add(&record()).unwrap();
        assert!(matches!(journal.write_over(&row, None), Err(WriteError::NotWritten(Error::Busy(_)))));
        assert_eq!((guests.get(row.guest()).unwrap(), journal.list().unwrap()), (record(), Vec::new()));
        journal.write_over(&row, Some(&record())).unwrap();
        assert_eq!(guests.get(row.guest()).unwrap().state, GuestState::Arriving);
    }

    #[test]
    fn epochs_end_somewhere() {
        for (epoch, is_fine) in [(0, true), (MAX_EPOCH - 1, true), (MAX_EPOCH, false), (u64::MAX, false)] {
            let record = GuestRecord { epoch, ..record() };
            assert_eq!(Row::source(MoveId([1; 16]), &record, &peer("edge")).is_ok(), is_fine, "{epoch}");
        }
    }
}
