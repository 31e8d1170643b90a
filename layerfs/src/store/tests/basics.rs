//! Opening, chunks, sessions, names, pins.

use super::*;
use crate::chunk::{ChunkRead, MemoryChunks, encode, verify};
use crate::error::{Error, ErrorClass};
use crate::store::db::{Batch, Cf, Sync};
use crate::store::pack::PackId;
use crate::store::{Expect, NameChange};

/// What every implementation of the two chunk traits must do.
fn conforms(write: &dyn ChunkWrite, read: &dyn ChunkRead) {
    let plains = [vec![1], vec![0; 5000], noise(1, 100_000), noise(2, crate::chunk::MAX_CHUNK_BYTES)];
    for plain in &plains {
        let id = write.put(Class::Data, plain).unwrap();
        assert_eq!(id, ChunkId::of(plain));
        assert_eq!(write.put(Class::Data, plain).unwrap(), id);
        assert_eq!(read.get(&id).unwrap(), plain);
    }
    let absent = ChunkId::of(b"absent");
    assert!(matches!(read.get(&absent), Err(Error::ChunkMissing(id)) if id == absent));
}

#[test]
fn chunk_traits_conform() {
    let memory = MemoryChunks::default();
    conforms(&memory, &memory);
    let (_folder, store) = store();
    let session = store.session("test");
    conforms(&session, &session);
    session.commit().unwrap();
    conforms(&session, &*store);
    assert!(session.put(Class::Data, &[]).is_err());
    assert!(session.put(Class::Data, &vec![1; crate::chunk::MAX_CHUNK_BYTES + 1]).is_err());
}

#[test]
fn committed_chunks_survive_reopening_and_others_leave_no_trace() {
    let (folder, store) = store();
    let path = store.folder().to_owned();
    let session = store.session("kept");
    let kept = put(&session, 1, 70_000);
    session.commit().unwrap();
    let lost = put(&session, 2, 70_000);
    assert!(store.get(&lost).is_err(), "unsynced chunks aren't in the index");
    assert_eq!(session.get(&lost).unwrap(), noise(2, 70_000));
    drop(session);
    let next = store.session("next");
    let third = put(&next, 3, 10);
    next.commit().unwrap();
    assert_eq!(store.info(&kept).unwrap().unwrap().pack, store.info(&third).unwrap().unwrap().pack);
    drop(next);
    drop(store);
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    assert_eq!(store.get(&kept).unwrap(), noise(1, 70_000));
    assert_eq!(store.get(&third).unwrap(), noise(3, 10));
    assert_eq!(store.contains_many(&[kept, lost, third]).unwrap(), [true, false, true]);
    drop(store);
    drop(folder);
}

#[test]
fn a_session_fills_several_packs_from_several_threads() {
    let (_folder, store) = store();
    let session = store.session("big");
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let session = &session;
            scope.spawn(move || {
                (0..160).for_each(|n| {
                    put(session, thread * 100 + n, 256 * 1024);
                })
            });
        }
    });
    session.commit().unwrap();
    let report = session.report();
    assert_eq!((report.new_chunks, report.known_chunks), (460, 180));
    assert!(store.packs.list().unwrap().len() >= 2);
    for seed in 0..460 {
        assert_eq!(store.get(&ChunkId::of(&noise(seed, 256 * 1024))).unwrap().len(), 256 * 1024);
    }
}

#[test]
fn received_chunks_are_stored_as_they_came_and_can_replace_damaged_ones() {
    let (_folder, store) = store();
    let plain = noise(5, 4000);
    let id = ChunkId::of(&plain);
    let session = store.session("receive");
    assert_eq!(session.has_many(&[id]).unwrap(), [false]);
    assert!(session.put_verified(encode(id, Class::Data, &plain, 3)).unwrap());
    assert_eq!(session.has_many(&[id]).unwrap(), [true]);
    assert!(!session.put_verified(encode(id, Class::Data, &plain, 3)).unwrap());
    session.commit().unwrap();
    assert_eq!(verify(store.read_stored(&id).unwrap()).unwrap().0, plain);
    let pack = store.packs.path(store.info(&id).unwrap().unwrap().pack);
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[200] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    assert!(matches!(store.get(&id), Err(Error::ChunkDamaged { .. })));
    session.replace(encode(id, Class::Data, &plain, 3)).unwrap();
    session.commit().unwrap();
    assert_eq!(store.get(&id).unwrap(), plain);
}

#[test]
fn names_change_only_as_expected_and_all_at_once() {
    let (_folder, store) = store();
    let session = store.session("layers");
    let (a, b) = (empty_layer(&session, 10), empty_layer(&session, 11));
    session.commit().unwrap();
    store.set_name(&name("a"), a, Expect::Absent).unwrap();
    store.set_name(&name("a"), a, Expect::Absent).unwrap();
    let taken = store.set_name(&name("a"), b, Expect::Absent).unwrap_err();
    assert_eq!(taken.class(), ErrorClass::Exists);
    let change = |name_: &str, layer, expect| NameChange { name: name(name_), layer, expect };
    let both = [change("new", b, Expect::Absent), change("a", b, Expect::Is(b))];
    assert_eq!(store.set_names(&both).unwrap_err().class(), ErrorClass::Busy);
    assert_eq!(store.name(&name("new")).unwrap(), None);
    let mut also = Batch::new();
    also.put(Cf::Uppers, "upper", "row");
    store.set_names_with(&[change("new", b, Expect::Absent), change("a", b, Expect::Is(a))], also).unwrap();
    assert_eq!(store.db().get(Cf::Uppers, "upper").unwrap().unwrap(), b"row");
    let names: Vec<_> =
        store.names().unwrap().into_iter().map(|(name, record)| (name.to_string(), record.layer)).collect();
    assert_eq!(names, [("a".to_owned(), b), ("new".to_owned(), b)]);
    assert_eq!(store.resolve("new").unwrap(), b);
    assert_eq!(store.resolve(&b.to_string()[..8]).unwrap(), b);
    assert_eq!(store.resolve(&a.to_string()).unwrap_err().class(), ErrorClass::NotFound);
    store.remove_name(&name("new")).unwrap();
    assert_eq!(store.remove_name(&name("new")).unwrap_err().class(), ErrorClass::NotFound);
    let absent = LayerId(ChunkId::of(b"no such layer"));
    assert!(matches!(store.set_name(&name("x"), absent, Expect::Any), Err(Error::LayerMissing(_))));
    assert!(store.pin(absent).is_err());
    let pin = store.pin(a).unwrap();
    assert_eq!(store.roots().unwrap().len(), 2);
    drop(pin);
    assert_eq!(store.roots().unwrap(), [b]);
}

#[test]
fn the_database_iterates_by_prefix_and_applies_batches_whole() {
    let (_folder, store) = store();
    let db = store.db();
    let mut batch = Batch::new();
    for key in ["a1", "a2", "b1"] {
        batch.put(Cf::Peers, key, "x");
    }
    batch.delete(Cf::Peers, "a2");
    db.write(batch, Sync::Yes).unwrap();
    let keys = |prefix: &[u8]| db.iter(Cf::Peers, prefix).unwrap().map(|e| e.unwrap().0.to_vec()).collect::<Vec<_>>();
    assert_eq!(keys(b"a"), [b"a1"]);
    assert_eq!(keys(b"").len(), 2);
    assert_eq!(db.iter_from(Cf::Peers, b"b").unwrap().count(), 1);
}

#[test]
fn what_was_removed_beyond_a_prefix_is_not_walked_over() {
    let (_folder, store) = store();
    let db = store.db();
    for remove in [false, true] {
        let mut batch = Batch::new();
        for number in 0..1000 {
            let key = format!("b{number:04}");
            match remove {
                true => batch.delete(Cf::Peers, key),
                false => batch.put(Cf::Peers, key, "x"),
            }
        }
        batch.put(Cf::Peers, "a", "x");
        db.write(batch, Sync::No).unwrap();
    }
    rocksdb::perf::set_perf_stats(rocksdb::perf::PerfStatsLevel::EnableCount);
    let mut counts = rocksdb::perf::PerfContext::default();
    counts.reset();
    assert_eq!(db.iter(Cf::Peers, b"a").unwrap().count(), 1);
    assert_eq!(counts.metric(rocksdb::perf::PerfMetric::InternalDeleteSkippedCount), 0);
    assert_eq!(db.iter_from(Cf::Peers, b"a").unwrap().count(), 1);
    assert!(counts.metric(rocksdb::perf::PerfMetric::InternalDeleteSkippedCount) >= 1000, "nothing was counted");
}

#[test]
fn opening_refuses_what_it_should() {
    let (folder, store) = store();
    let path = store.folder().to_owned();
    let open = |options| Store::open(&path, options).map(|_| ());
    assert_eq!(open(StoreOptions::default()).unwrap_err().class(), ErrorClass::Busy);
    drop(store);
    let read_only = Store::open(&path, StoreOptions { read_only: true, ..StoreOptions::default() }).unwrap();
    let session = read_only.session("x");
    assert_eq!(session.put(Class::Data, b"x").unwrap_err().class(), ErrorClass::Denied);
    assert_eq!(read_only.db().put(Cf::Meta, "x", "y").unwrap_err().class(), ErrorClass::Denied);
    drop((session, read_only));
    std::fs::write(path.join("format"), "layerfs store 2\n").unwrap();
    assert_eq!(open(StoreOptions::create()).unwrap_err().class(), ErrorClass::Unsupported);
    std::fs::write(path.join("format"), "something\n").unwrap();
    assert_eq!(open(StoreOptions::create()).unwrap_err().class(), ErrorClass::Corrupt);
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    assert_eq!(Store::open(&other, StoreOptions::default()).map(|_| ()).unwrap_err().class(), ErrorClass::NotFound);
    std::fs::write(other.join("letter"), "dear").unwrap();
    assert_eq!(Store::open(&other, StoreOptions::create()).map(|_| ()).unwrap_err().class(), ErrorClass::Invalid);
}

#[test]
fn a_file_with_the_name_of_a_new_pack_stays_and_lost_numbers_are_not_given_again() {
    let (_folder, store) = store();
    let path = store.folder().to_owned();
    let session = store.session("s");
    put(&session, 1, 1000);
    session.commit().unwrap();
    let (first, _) = store.packs.list().unwrap()[0];
    let foreign = store.packs.path(PackId(first.0 + 1));
    std::fs::write(&foreign, "a pack that came back").unwrap();
    let other = store.session("other");
    let id = put(&other, 2, 1000);
    other.commit().unwrap();
    assert_eq!(std::fs::read(&foreign).unwrap(), b"a pack that came back");
    assert_eq!(store.get(&id).unwrap(), noise(2, 1000));
    let last = store.index.get(&id).unwrap().unwrap().pack;
    assert_eq!(last, PackId(first.0 + 2));
    // It is lost, and the index still refers to it.
    std::fs::remove_file(store.packs.path(last)).unwrap();
    drop((session, other, store));
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    let third = put_committed(&store, 3);
    assert_eq!(store.index.get(&third).unwrap().unwrap().pack, PackId(last.0 + 1));
}

fn put_committed(store: &Arc<Store>, seed: u64) -> ChunkId {
    let session = store.session("s");
    let id = put(&session, seed, 1000);
    session.commit().unwrap();
    id
}
