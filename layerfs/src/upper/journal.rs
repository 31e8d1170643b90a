//! Answers that the kernel may ask for twice.
//!
//! A daemon can die between making a change and answering for it. The kernel then sends the request to the next
//! daemon, and doing it again would be wrong: `mkdir` would say that the name exists, an exchange would be undone. So
//! the row of a change that may not be done twice is accompanied, in the same atomic batch, by a row that says which
//! request it answers. Invariants: each thread that serves requests has a slot of its own, as it answers one request before it
//! takes the next, so the rows don't grow; a new daemon's rows don't overwrite those that it may still be asked for.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::codec::{Put, Reader};
use crate::error::Result;
use crate::id::{Ino, UpperId};
use crate::store::db::{Batch, Cf, Db, Sync};

/// The rows of so many daemons are kept: a request that each of that many has died over is given up.
const GENERATIONS: u32 = 8;

thread_local! {
    /// What this thread's journal slot is.
    static SLOT: Cell<Option<u32>> = const { Cell::new(None) };
    /// The request that this thread is answering, if that may not be done twice.
    static REQUEST: Cell<Option<u64>> = const { Cell::new(None) };
}

/// An upper's journal.
#[derive(Debug)]
pub struct Journal {
    generation: u32,
    slots: AtomicU32,
    /// Requests that daemons before this one did and perhaps did not answer, with the inode that the answer is about.
    done: Mutex<HashMap<u64, Ino>>,
}

impl Journal {
    /// A journal without a past. The rows of an earlier one are removed.
    pub(super) fn start(db: &Db, id: UpperId) -> Result<Journal> {
        let mut batch = Batch::new();
        for row in db.iter(Cf::Uppers, &prefix(id))? {
            batch.delete(Cf::Uppers, row?.0);
        }
        db.write(batch, Sync::No)?;
        Ok(Journal { generation: 1, slots: AtomicU32::new(0), done: Mutex::default() })
    }

    /// The journal that a daemon left which died.
    pub(super) fn resume(db: &Db, id: UpperId) -> Result<Journal> {
        let mut rows = Vec::new();
        let mut last = 0;
        for row in db.iter(Cf::Uppers, &prefix(id))? {
            let (key, value) = row?;
            let generation = key.get(9..13).map_or(0, |digits| digits.iter().fold(0, |n, d| n << 8 | u32::from(*d)));
            let mut reader = Reader::new("upper's journal", &value);
            let (request, ino) = (reader.u64()?, Ino(reader.u64()?));
            reader.finish()?;
            last = last.max(generation);
            rows.push((generation, key, request, ino));
        }
        let mut outdated = Batch::new();
        let mut done = HashMap::new();
        for (generation, key, request, ino) in rows {
            if generation + GENERATIONS <= last {
                outdated.delete(Cf::Uppers, key);
            } else {
                done.insert(request, ino);
            }
        }
        db.write(outdated, Sync::No)?;
        Ok(Journal { generation: last + 1, slots: AtomicU32::new(0), done: Mutex::new(done) })
    }

    /// Does `change` as the answer to the kernel's request `request`, which may not be done twice.
    pub fn answering<T>(&self, request: u64, change: impl FnOnce() -> T) -> T {
        let before = REQUEST.replace(Some(request));
        let result = change();
        REQUEST.set(before);
        result
    }

    /// Does `change`, which is no answer, in the midst of answering.
    pub fn aside<T>(&self, change: impl FnOnce() -> T) -> T {
        let before = REQUEST.replace(None);
        let result = change();
        REQUEST.set(before);
        result
    }

    /// If an earlier daemon did `request`: the inode that the answer is about (0 if about none).
    pub fn done(&self, request: u64) -> Option<Ino> {
        self.done.lock().remove(&request)
    }

    /// Adds to `batch`, which has the rows of a change, which request that change answers; `ino` is what the answer is
    /// about.
    pub(super) fn note(&self, id: UpperId, ino: Ino, batch: &mut Batch) {
        let Some(request) = REQUEST.get() else { return };
        let slot = SLOT.get().unwrap_or_else(|| {
            let slot = self.slots.fetch_add(1, Ordering::Relaxed);
            SLOT.set(Some(slot));
            slot
        });
        let mut value = Vec::with_capacity(16);
        value.put_u64(request);
        value.put_u64(ino.0);
        batch.put(Cf::Uppers, key(id, self.generation, slot), value);
    }
}

/// The prefix of the keys of the journal of upper `id`.
pub(super) fn prefix(id: UpperId) -> Vec<u8> {
    [&b"j"[..], &id.0.to_be_bytes()].concat()
}

fn key(id: UpperId, generation: u32, slot: u32) -> Vec<u8> {
    [&b"j"[..], &id.0.to_be_bytes(), &generation.to_be_bytes(), &slot.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::db::DbOptions;

    fn db() -> (tempfile::TempDir, Db) {
        let folder = tempfile::tempdir().unwrap();
        let options = DbOptions {
            block_cache_bytes: 1 << 20,
            write_buffer_bytes: 1 << 20,
            read_only: false,
            create: true,
            lenient: false,
        };
        let db = Db::open(&folder.path().join("index"), options).unwrap();
        (folder, db)
    }

    fn change(db: &Db, journal: &Journal, request: u64, ino: u64) {
        let mut batch = Batch::new();
        journal.answering(request, || journal.note(UpperId(7), Ino(ino), &mut batch));
        db.write(batch, Sync::No).unwrap();
    }

    #[test]
    fn what_the_last_daemons_did_is_known_once() {
        let (_folder, db) = db();
        let first = Journal::start(&db, UpperId(7)).unwrap();
        change(&db, &first, 100, 5);
        change(&db, &first, 102, 6);
        // The slot's row is that of the last request: the one before was answered.
        let second = Journal::resume(&db, UpperId(7)).unwrap();
        assert_eq!((second.done(100), second.done(102)), (None, Some(Ino(6))));
        assert_eq!(second.done(102), None);
        // The second daemon's rows leave alone what the first one's request may still need.
        change(&db, &second, 200, 0);
        let third = Journal::resume(&db, UpperId(7)).unwrap();
        assert_eq!((third.done(102), third.done(200)), (Some(Ino(6)), Some(Ino(0))));
        // Another upper's are its own, and a new mount knows nothing of an old one.
        assert_eq!(Journal::resume(&db, UpperId(8)).unwrap().done(102), None);
        assert_eq!(Journal::start(&db, UpperId(7)).unwrap().done(102), None);
        assert_eq!(Journal::resume(&db, UpperId(7)).unwrap().done(102), None);
    }

    #[test]
    fn rows_do_not_grow() {
        let (_folder, db) = db();
        Journal::start(&db, UpperId(7)).unwrap();
        for round in 0..50 {
            let journal = Journal::resume(&db, UpperId(7)).unwrap();
            (0..10).for_each(|request| change(&db, &journal, round * 100 + request, 1));
        }
        assert!(db.iter(Cf::Uppers, &prefix(UpperId(7))).unwrap().count() <= GENERATIONS as usize + 1);
    }

    #[test]
    fn a_change_that_answers_nothing_leaves_no_row() {
        let (_folder, db) = db();
        let journal = Journal::start(&db, UpperId(7)).unwrap();
        let mut batch = Batch::new();
        journal.note(UpperId(7), Ino(1), &mut batch);
        assert!(batch.is_empty());
    }
}
