//! Where each chunk lies. FORMAT.md, "Chunk index".
//!
//! Invariants: every entry refers to a record that was synced before the entry was written; entries change only
//! under one lock, so that a compare-and-set needs no more than that.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::chunk::{Class, Codec};
use crate::codec::{Put, Reader};
use crate::error::Result;
use crate::failpoint;
use crate::id::ChunkId;
use crate::store::db::{Batch, Cf, Db, Sync};
use crate::store::pack::PackId;

/// Where a chunk lies, and what its record's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub pack: PackId,
    /// Of the record's header in the pack.
    pub offset: u32,
    pub stored_bytes: u32,
    pub plain_bytes: u32,
    pub class: Class,
    pub codec: Codec,
}

impl Location {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(22);
        out.put_u64(self.pack.0);
        out.put_u32(self.offset);
        out.put_u32(self.stored_bytes);
        out.put_u32(self.plain_bytes);
        out.put_u8(self.class as u8);
        out.put_u8(self.codec as u8);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Location> {
        let mut reader = Reader::new("chunk index entry", bytes);
        let (pack, offset) = (PackId(reader.u64()?), reader.u32()?);
        let (stored_bytes, plain_bytes) = (reader.u32()?, reader.u32()?);
        let (class, codec) = (reader.u8()?, reader.u8()?);
        let class = Class::from_code(class).ok_or_else(|| reader.error(format!("class {class}")))?;
        let codec = Codec::from_code(codec).ok_or_else(|| reader.error(format!("codec {codec}")))?;
        reader.finish()?;
        Ok(Location { pack, offset, stored_bytes, plain_bytes, class, codec })
    }

    /// What the record takes in its pack, in bytes.
    pub fn record_bytes(&self) -> u64 {
        super::pack::RECORD_BYTES as u64 + u64::from(self.stored_bytes)
    }
}

#[derive(Debug)]
pub(crate) struct Index {
    db: Arc<Db>,
    change: Mutex<()>,
}

impl Index {
    pub fn new(db: Arc<Db>) -> Index {
        Index { db, change: Mutex::new(()) }
    }

    pub fn get(&self, id: &ChunkId) -> Result<Option<Location>> {
        self.db.get(Cf::Chunks, id.0)?.map(|bytes| Location::decode(&bytes)).transpose()
    }

    pub fn get_many(&self, ids: &[ChunkId]) -> Result<Vec<Option<Location>>> {
        let keys: Vec<[u8; 32]> = ids.iter().map(|id| id.0).collect();
        let found = self.db.get_many(Cf::Chunks, &keys)?;
        found.into_iter().map(|value| value.map(|bytes| Location::decode(&bytes)).transpose()).collect()
    }

    pub fn contains(&self, id: &ChunkId) -> Result<bool> {
        self.db.contains(Cf::Chunks, id.0)
    }

    /// [`Index::get`] that isn't misled by a sweep, which removes entries and puts some of them back.
    pub fn get_settled(&self, id: &ChunkId) -> Result<Option<Location>> {
        if let Some(location) = self.get(id)? {
            return Ok(Some(location));
        }
        let _change = self.change.lock();
        self.get(id)
    }

    /// [`Index::get_many`], likewise.
    pub fn get_many_settled(&self, ids: &[ChunkId]) -> Result<Vec<Option<Location>>> {
        let found = self.get_many(ids)?;
        if found.iter().all(Option::is_some) {
            return Ok(found);
        }
        let _change = self.change.lock();
        self.get_many(ids)
    }

    /// Adds entries whose records are synced. Unsynced itself: whoever calls it syncs the database then.
    pub fn add<'a>(&self, entries: impl IntoIterator<Item = (&'a ChunkId, &'a Location)>) -> Result<()> {
        let mut batch = Batch::new();
        entries.into_iter().for_each(|(id, location)| batch.put(Cf::Chunks, id.0, location.encode()));
        let _change = self.change.lock();
        self.db.write(batch, Sync::No)?;
        failpoint::hit("index.written");
        Ok(())
    }

    /// Removes those of `entries` that nobody wants, then asks again who is wanted after all and puts those back. Returns which
    /// are gone.
    ///
    /// Whoever wants a chunk says so first and looks into the index then, so one of the two sees the other. What was wanted
    /// before isn't touched: a removal may hold though what puts back fails.
    pub fn remove<W: Fn(&ChunkId, &Location) -> bool>(
        &self,
        entries: &[(ChunkId, Location)],
        ask: impl Fn() -> W,
    ) -> Result<Vec<bool>> {
        let _change = self.change.lock();
        let ids: Vec<ChunkId> = entries.iter().map(|(id, _)| *id).collect();
        let now = self.get_many(&ids)?;
        let is_wanted = ask();
        let mut is_gone: Vec<bool> =
            entries.iter().zip(now).map(|((id, then), now)| now == Some(*then) && !is_wanted(id, then)).collect();
        let mut batch = Batch::new();
        for ((id, _), _) in entries.iter().zip(&is_gone).filter(|(_, is_gone)| **is_gone) {
            batch.delete(Cf::Chunks, id.0);
        }
        self.db.write(batch, Sync::No)?;
        let is_wanted = ask();
        let mut back = Batch::new();
        back.takes_back();
        for ((id, location), is_gone) in entries.iter().zip(&mut is_gone) {
            if *is_gone && is_wanted(id, location) {
                back.put(Cf::Chunks, id.0, location.encode());
                *is_gone = false;
            }
        }
        if !back.is_empty() {
            self.db.write(back, Sync::No)?;
        }
        Ok(is_gone)
    }

    /// Sets each entry to its new location if it still has the old one.
    pub fn relocate(&self, moves: &[(ChunkId, Location, Location)]) -> Result<()> {
        let _change = self.change.lock();
        let ids: Vec<ChunkId> = moves.iter().map(|(id, ..)| *id).collect();
        let now = self.get_many(&ids)?;
        let mut batch = Batch::new();
        for ((id, _, new), _) in moves.iter().zip(now).filter(|((_, old, _), now)| now.as_ref() == Some(old)) {
            batch.put(Cf::Chunks, id.0, new.encode());
        }
        self.db.write(batch, Sync::No)
    }

    /// Removes entries that are known to be wrong, but for those that have changed since: their chunks have come again.
    pub fn forget(&self, entries: &[(ChunkId, Location)]) -> Result<()> {
        let _change = self.change.lock();
        let ids: Vec<ChunkId> = entries.iter().map(|(id, _)| *id).collect();
        let now = self.get_many(&ids)?;
        let mut batch = Batch::new();
        for ((id, _), _) in entries.iter().zip(now).filter(|((_, wrong), now)| now.as_ref() == Some(wrong)) {
            batch.delete(Cf::Chunks, id.0);
        }
        self.db.write(batch, Sync::No)
    }

    /// All entries in the order of their ids, as of now.
    pub fn iter(&self) -> Result<impl Iterator<Item = Result<(ChunkId, Location)>> + '_> {
        let entries = self.db.iter_from(Cf::Chunks, &[])?;
        Ok(entries.map(|entry| {
            let (key, value) = entry?;
            let mut reader = Reader::new("chunk index key", &key);
            let id = reader.id()?;
            reader.finish()?;
            Ok((id, Location::decode(&value)?))
        }))
    }

    /// The ids that begin with `start`, up to `most`.
    pub fn starting_with(&self, start: &[u8], most: usize) -> Result<Vec<ChunkId>> {
        let entries = self.db.iter_from(Cf::Chunks, start)?;
        let mut ids = Vec::new();
        for entry in entries.take(most) {
            let (key, _) = entry?;
            if !key.starts_with(start) {
                break;
            }
            ids.push(Reader::new("chunk index key", &key).id()?);
        }
        Ok(ids)
    }

    /// About how many chunks there are.
    pub fn estimated_count(&self) -> Result<u64> {
        self.db.estimated_count(Cf::Chunks)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::store::db::DbOptions;

    fn index() -> (tempfile::TempDir, Index) {
        let folder = tempfile::tempdir().unwrap();
        let options = DbOptions {
            block_cache_bytes: 1 << 20,
            write_buffer_bytes: 1 << 20,
            read_only: false,
            create: true,
            lenient: false,
        };
        let db = Db::open(&folder.path().join("index"), options).unwrap();
        (folder, Index::new(Arc::new(db)))
    }

    fn entries(count: u32) -> Vec<(ChunkId, Location)> {
        let location = |offset| Location {
            pack: PackId(1),
            offset,
            stored_bytes: 1,
            plain_bytes: 1,
            class: Class::Data,
            codec: Codec::Raw,
        };
        (0..count).map(|number| (ChunkId::of(&number.to_le_bytes()), location(number))).collect()
    }

    #[test]
    fn what_is_wanted_stays_though_the_disk_gets_full_while_others_are_removed() {
        let (_folder, index) = index();
        let entries = entries(3);
        index.add(entries.iter().map(|(id, location)| (id, location))).unwrap();
        let asked = Cell::new(0);
        let is_gone = index.remove(&entries, || {
            asked.set(asked.get() + 1);
            let times = asked.get();
            match times {
                // Before the removal, which then doesn't touch it.
                1 => assert!(index.contains(&entries[0].0).unwrap()),
                _ => {
                    let found = entries.iter().map(|(id, _)| index.contains(id).unwrap()).collect::<Vec<_>>();
                    assert_eq!(found, [true, false, false]);
                    index.db.fill_disk();
                }
            }
            let entries = entries.clone();
            move |id: &ChunkId, _: &Location| *id == entries[0].0 || (times > 1 && *id == entries[1].0)
        });
        assert_eq!((is_gone.unwrap(), asked.get()), (vec![false, false, true], 2));
        for ((id, location), is_there) in entries.iter().zip([true, true, false]) {
            assert_eq!(index.get(id).unwrap(), Some(*location).filter(|_| is_there));
        }
    }

    #[test]
    fn what_was_healed_meanwhile_is_not_forgotten() {
        let (_folder, index) = index();
        let entries = entries(2);
        let healed = Location { pack: PackId(2), ..entries[1].1 };
        index.add([(&entries[0].0, &entries[0].1), (&entries[1].0, &healed)]).unwrap();
        index.forget(&entries).unwrap();
        assert_eq!((index.get(&entries[0].0).unwrap(), index.get(&entries[1].0).unwrap()), (None, Some(healed)));
    }
}
