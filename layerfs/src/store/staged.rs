//! What transfers that haven't ended well have brought: kept from collection for a while, so that they can go on.
//!
//! Hides how that is remembered: which packs hold chunks that came for which layer, from when on; and how chunks that a
//! process wrote whose end came before it told the index are found again. Invariants: a row is there before the index
//! knows the first chunk that it keeps; rows go when the layer has come whole, and by themselves after [`KEPT_FOR`]. A
//! manifest isn't kept: one that is there says that its layer is. FORMAT.md, "Index database".

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::time::Duration;

use crate::attr::Time;
use crate::chunk::{self, Class};
use crate::codec::{Put, Reader};
use crate::error::{Error, Result};
use crate::id::{ChunkId, LayerId};
use crate::store::db::{Batch, Cf, Sync};
use crate::store::index::Location;
use crate::store::pack::read_record;
use crate::store::scan::{Found, PackScan};
use crate::store::{PackId, Store};

const PREFIX: &[u8] = b"staged/";

/// So long chunks wait for the rest of their layer.
pub const KEPT_FOR: Duration = Duration::from_secs(24 * 60 * 60);

/// The packs that a process which was killed may have been filling: one that was full and being synced, and the next.
const LAST_PACKS: usize = 2;
/// Records looked up at once.
const BATCH: usize = 1024;

fn prefix_of(layer: LayerId) -> Vec<u8> {
    [PREFIX, &layer.0.0[..]].concat()
}

fn key(layer: LayerId, pack: PackId) -> Vec<u8> {
    [&prefix_of(layer)[..], &pack.0.to_be_bytes()].concat()
}

impl Store {
    /// Chunks for `layer` will come to `pack`.
    pub(crate) fn stage(&self, layer: LayerId, pack: PackId) -> Result<()> {
        let mut since = Vec::new();
        since.put_i64(Time::now().seconds);
        let mut batch = Batch::new();
        batch.put(Cf::Transfers, key(layer, pack), since);
        // Written before the index rows that matter, it survives whatever they survive.
        self.db().write(batch, Sync::No)
    }

    /// `layers` have come whole, or won't: nothing is kept for them any more.
    ///
    /// # Errors
    /// Those of the database.
    pub fn unstage(&self, layers: &[LayerId]) -> Result<()> {
        let mut batch = Batch::new();
        for layer in layers {
            for row in self.db().iter(Cf::Transfers, &prefix_of(*layer))? {
                batch.delete(Cf::Transfers, row?.0);
            }
        }
        if batch.is_empty() { Ok(()) } else { self.db().write(batch, Sync::No) }
    }

    /// The packs that hold chunks for layers that are still to come. Rows that are too old at `now`, or damaged, go.
    pub(crate) fn staged_packs(&self, now: Time) -> Result<HashSet<PackId>> {
        Ok(self.staged_rows(now)?.into_iter().map(|row| row.pack).collect())
    }

    fn staged_rows(&self, now: Time) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let mut old = Batch::new();
        for row in self.db().iter(Cf::Transfers, PREFIX)? {
            let (key, value) = row?;
            let since = Reader::new("staged record", &value).i64().unwrap_or(i64::MIN);
            let pack = key.last_chunk::<8>().map(|pack| PackId(u64::from_be_bytes(*pack)));
            // Of a clock that was put back nothing is to be feared but that it takes longer.
            match pack.filter(|_| now.seconds.saturating_sub(since) < KEPT_FOR.as_secs() as i64) {
                Some(pack) => rows.push(Row { layer: key[..key.len() - 8].to_vec(), since, pack }),
                None => old.delete(Cf::Transfers, key),
            }
        }
        if !old.is_empty() && self.check_writable().is_ok() {
            self.db().write(old, Sync::No)?;
        }
        Ok(rows)
    }

    /// Tells the index of chunks that came for a layer and of which it wasn't told because the process was killed.
    /// Returns how many there were. For the start, before anybody uses the store.
    pub(crate) fn recover_staged(&self) -> Result<u64> {
        let mut rows = self.staged_rows(Time::now())?;
        rows.sort_unstable_by(|a, b| (&a.layer, b.since, b.pack).cmp(&(&b.layer, a.since, a.pack)));
        let mut packs = BTreeSet::new();
        for of_layer in rows.chunk_by(|a, b| a.layer == b.layer) {
            packs.extend(of_layer.iter().take(LAST_PACKS).map(|row| row.pack));
        }
        let mut count = 0;
        for pack in packs {
            let Some(file) = self.packs.file(pack)? else { continue };
            let mut records = Vec::new();
            for found in PackScan::open(pack, self.packs.path(pack))? {
                if let Found::Record(offset, header) = found? {
                    records.push((header.id, header.location(pack, offset)));
                }
                if records.len() == BATCH {
                    count += self.recover(&file, &std::mem::take(&mut records))?;
                }
            }
            count += self.recover(&file, &records)?;
        }
        Ok(count)
    }

    fn recover(&self, file: &File, records: &[(ChunkId, Location)]) -> Result<u64> {
        let ids: Vec<ChunkId> = records.iter().map(|(id, _)| *id).collect();
        let known = self.index.get_many(&ids)?;
        let is_new = |(record, known): &(&(ChunkId, Location), &Option<Location>)| {
            known.is_none() && record.1.class != Class::Manifest
        };
        let unknown = records.iter().zip(&known).filter(is_new).map(|(record, _)| *record);
        // What the kill tore apart doesn't verify, and isn't there.
        let whole =
            |(id, location): &(ChunkId, Location)| read_record(file, id, location).and_then(chunk::verify).is_ok();
        let found: HashMap<ChunkId, Location> = unknown.filter(whole).collect();
        if !found.is_empty() {
            file.sync_data().map_err(|e| Error::io("syncing a pack", e))?;
            self.index.add(found.iter())?;
            self.db().sync()?;
        }
        Ok(found.len() as u64)
    }
}

struct Row {
    /// The key's part that names the layer.
    layer: Vec<u8>,
    since: i64,
    pack: PackId,
}
