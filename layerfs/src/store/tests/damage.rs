//! Bad bytes, lost files, full disks: what is seen, and what can be made whole.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::*;
use crate::chunk::{ChunkRead, ChunkWrite, Codec, StoredChunk, encode};
use crate::error::{Error, ErrorClass};
use crate::monitor::Silent;
use crate::mount::caller::Caller;
use crate::mount::fs::Fs;
use crate::store::db::Cf;
use crate::store::lost_names;
use crate::store::pack::{PackId, RECORD_BYTES, RecordHeader, bad_blocks, check_header, encode_header};
use crate::store::scan::{Found, PackScan};
use crate::store::{FsckOptions, GcOptions, ProblemKind, rebuild};
use crate::upper::{self, Upper};
use crate::view::View;

#[test]
fn golden_bytes_of_a_pack() {
    assert_eq!(encode_header(PackId(0x0102)), b"LFPK\x01\x00\x00\x00\x02\x01\x00\x00\x00\x00\x00\x00");
    let id = ChunkId::of(b"layerfs");
    let chunk = StoredChunk { id, class: Class::List, codec: Codec::Raw, plain_bytes: 7, stored: "layerfs".into() };
    let mut record = Vec::new();
    RecordHeader::of(&chunk).encode(&mut record);
    let hex: String = record.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        hex,
        "4c464352010007000000070000000322e72d22a2f59fca659542b8a2e92fcddc0bde21a6078f7f3af14e947e0a6922523291"
    );
    assert_eq!(record.len(), RECORD_BYTES);
    assert_eq!(RecordHeader::decode(&record).unwrap(), RecordHeader::of(&chunk));
}

#[test]
fn headers_of_other_versions_and_packs_are_refused() {
    let good = encode_header(PackId(7));
    check_header(&good, PackId(7)).unwrap();
    assert_eq!(check_header(&good, PackId(8)).unwrap_err().class(), ErrorClass::Corrupt);
    assert_eq!(check_header(&good[..10], PackId(7)).unwrap_err().class(), ErrorClass::Corrupt);
    for (position, class) in [(0, ErrorClass::Corrupt), (4, ErrorClass::Unsupported), (6, ErrorClass::Unsupported)] {
        let mut bad = good.clone();
        bad[position] ^= 2;
        assert_eq!(check_header(&bad, PackId(7)).unwrap_err().class(), class, "byte {position}");
    }
}

/// The only pack of a store.
fn the_pack(store: &Store) -> (PackId, std::path::PathBuf) {
    let packs = store.packs.list().unwrap();
    assert_eq!(packs.len(), 1);
    (packs[0].0, store.packs.path(packs[0].0))
}

#[test]
fn a_scan_finds_every_good_record_whatever_is_damaged() {
    let (_folder, store) = store();
    let session = store.session("s");
    (0..20).for_each(|seed| {
        put(&session, seed, 3000);
    });
    session.commit().unwrap();
    let (id, path) = the_pack(&store);
    let bytes = std::fs::read(&path).unwrap();
    let scan = || PackScan::open(id, path.clone()).unwrap().map(|found| found.unwrap()).collect::<Vec<_>>();
    let whole = scan();
    assert_eq!(whole.len(), 20);
    let record_bytes = RECORD_BYTES + 3000;
    for cut in [1, RECORD_BYTES, RECORD_BYTES + 1, record_bytes - 1] {
        std::fs::write(&path, &bytes[..16 + 19 * record_bytes + cut]).unwrap();
        let found = scan();
        assert_eq!(found[..19], whole[..19]);
        assert_eq!(found[19..], [Found::Tail { from: (16 + 19 * record_bytes) as u64 }]);
    }
    for byte in [0, 4, 5, 7, 11, 20, 49] {
        let mut bad = bytes.clone();
        bad[16 + 5 * record_bytes + byte] ^= 0x40;
        std::fs::write(&path, &bad).unwrap();
        let found = scan();
        assert_eq!(found.len(), 20);
        assert!(matches!(found[5], Found::Damage { .. }));
        assert_eq!(found[6..], whole[6..]);
    }
    std::fs::write(&path, &bytes).unwrap();
}

#[test]
fn a_scan_finds_every_record_around_blocks_that_can_not_be_read() {
    let (_folder, store) = store();
    let session = store.session("s");
    (0..200).for_each(|seed| {
        put(&session, seed, 3000);
    });
    session.commit().unwrap();
    let (id, path) = the_pack(&store);
    let scan = || PackScan::open(id, path.clone()).unwrap().map(|found| found.unwrap()).collect::<Vec<_>>();
    let whole = scan();
    let (file, end) = (std::fs::File::open(&path).unwrap(), path.metadata().unwrap().len());
    let blocks = |first: u64, last: u64| first * 4096..(last * 4096).min(end);
    for bad in [blocks(0, 1), blocks(20, 21), blocks(33, 40), blocks(70, 71), blocks(140, 1000), blocks(0, 1000)] {
        bad_blocks::set(&file, bad.clone());
        let found = scan();
        let is_header_good = |at: u64| at + RECORD_BYTES as u64 <= bad.start || at >= bad.end;
        let good = whole.iter().filter(|found| matches!(found, Found::Record(at, _) if is_header_good(u64::from(*at))));
        let records = found.iter().filter(|found| matches!(found, Found::Record(..)));
        assert!(good.eq(records), "{bad:?}");
        let damage = found.iter().filter(|found| matches!(found, Found::Damage { .. })).count();
        let lost = whole.len() - found.iter().filter(|found| matches!(found, Found::Record(..))).count();
        assert_eq!((damage > 0, found.len()), (lost > 0, whole.len() - lost + damage), "{bad:?}");
    }
    bad_blocks::set(&file, 0..0);
    assert_eq!(scan(), whole);
}

#[test]
fn a_pack_that_gets_shorter_while_it_is_scanned_ends_there() {
    let (_folder, store) = store();
    let session = store.session("s");
    (0..200).for_each(|seed| {
        put(&session, seed, 3000);
    });
    session.commit().unwrap();
    let (id, path) = the_pack(&store);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let record_bytes = (RECORD_BYTES + 3000) as u64;
    // As a session that ends without a commit does, in front of where the scan is and behind it.
    for (stay, found) in [(150, 150), (20, 86)] {
        let mut scan = PackScan::open(id, path.clone()).unwrap();
        assert!(scan.by_ref().take(10).all(|found| matches!(found, Ok(Found::Record(..)))));
        file.set_len(16 + stay * record_bytes).unwrap();
        let rest: Vec<_> = scan.map(|found| found.unwrap()).collect();
        let records = rest.iter().filter(|found| matches!(found, Found::Record(..))).count();
        assert!(records + 10 <= found && records + 10 >= stay as usize, "{records} of {stay}");
        assert!(!rest.iter().any(|found| matches!(found, Found::Damage { .. })), "{stay}");
    }
}

#[test]
fn a_block_that_can_not_be_read_costs_its_chunks_alone() {
    let (_folder, store) = store();
    let path = store.folder().to_owned();
    let layers: Vec<LayerId> = (0..8).map(|n| named_layer(&store, &format!("n{n}"), &[n], 60_000)).collect();
    // For a collection: most of the pack is dead.
    for n in 0..6 {
        store.remove_name(&name(&format!("n{n}"))).unwrap();
    }
    let entries: Vec<_> = store.index.iter().unwrap().map(|entry| entry.unwrap()).collect();
    let (_, pack_path) = the_pack(&store);
    let file = std::fs::File::open(&pack_path).unwrap();
    // The bytes of a record of data that is needed.
    let needed = noise(6, 60_000);
    let (victim, location) = entries
        .iter()
        .find(|(id, location)| location.class == Class::Data && needed.starts_with(&store.get_uncached(id).unwrap()))
        .unwrap();
    let at = u64::from(location.offset) + RECORD_BYTES as u64;
    bad_blocks::set(&file, (at + 4096) / 4096 * 4096..(at + 8192) / 4096 * 4096);
    // The pack stays, and neither a collection nor a repair fails.
    store.gc(&Silent, GcOptions::default()).unwrap();
    assert!(pack_path.exists() && store.index.contains(victim).unwrap());
    assert!(store.get_uncached(victim).is_err());
    store.check_stack(layers[7]).unwrap();
    store.fsck(&Silent, FsckOptions { repair: true }).unwrap();
    drop(store);
    let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    assert!(report.records_kept && report.damaged_chunks == 1, "{report:?}");
    assert_eq!(report.chunks, entries.len() as u64 - 1);
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    layers.iter().enumerate().for_each(|(n, layer)| assert_eq!(store.check_stack(*layer).is_ok(), n != 6, "{n}"));
    // A header that can't be read: a repair meets it too.
    bad_blocks::set(&file, 0..4096);
    let report = store.fsck(&Silent, FsckOptions { repair: true }).unwrap();
    assert!(report.problems.iter().any(|problem| problem.kind == ProblemKind::PackDamaged), "{report:#?}");
    bad_blocks::set(&file, 0..0);
}

#[test]
fn flipped_bits_are_found_reported_with_names_and_healed() {
    let (_folder, store) = store();
    let layer = named_layer(&store, "hurt", &[1, 2, 3], 60_000);
    named_layer(&store, "fine", &[4], 60_000);
    let id = ChunkId::of(&noise(2, 60_000)[..0x1]);
    assert!(store.get(&id).is_err());
    let stored: Vec<_> = store.index.iter().unwrap().map(|entry| entry.unwrap()).collect();
    let (id, location) =
        stored.iter().find(|(_, location)| location.class == Class::Data && location.offset > 16).unwrap();
    let (_, path) = the_pack(&store);
    let plain = store.get_uncached(id).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let at = u64::from(location.offset) + RECORD_BYTES as u64 + 100;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    assert!(store.fsck(&Silent, FsckOptions::default()).unwrap().is_clean(), "fsck doesn't read data");
    let report = store.scrub(&Silent).unwrap();
    assert_eq!(report.damaged.iter().map(|chunk| chunk.id).collect::<Vec<_>>(), [*id]);
    assert_eq!(report.damaged[0].names.len(), 1);
    // Its record's header too: now fsck sees that the chunk is gone.
    file.write_all_at(b"XXXX", u64::from(location.offset)).unwrap();
    let report = store.fsck(&Silent, FsckOptions::default()).unwrap();
    assert!(
        report.problems.iter().any(|p| p.kind == ProblemKind::ChunkGone && p.subject == id.to_string()),
        "{report:#?}"
    );
    let session = store.session("heal");
    session.replace(encode(*id, Class::Data, &plain, 3)).unwrap();
    session.commit().unwrap();
    assert!(store.scrub(&Silent).unwrap().is_clean());
    let report = store.fsck(&Silent, FsckOptions::default()).unwrap();
    assert!(report.problems.iter().all(|problem| problem.kind == ProblemKind::PackDamaged), "{report:#?}");
    drop(session);
    let report = store.fsck(&Silent, FsckOptions { repair: true }).unwrap();
    assert!(report.problem_count == 1 && report.problems[0].repaired, "{report:#?}");
    assert!(store.fsck(&Silent, FsckOptions::default()).unwrap().is_clean());
    store.check_stack(layer).unwrap();
}

#[test]
fn what_is_known_to_be_damaged_is_stored_again_when_it_comes_again() {
    for by_scrub in [false, true] {
        let (_folder, store) = store();
        let plain = noise(7, 60_000);
        let put = || {
            let session = store.session("again");
            let id = session.put(Class::Data, &plain).unwrap();
            let known = session.has_many(&[id]).unwrap()[0];
            session.commit().unwrap();
            assert!(known, "what was just put is there");
            (id, session.report().new_chunks)
        };
        let (id, new) = put();
        assert_eq!((new, put().1), (1, 0), "a good copy is kept once");
        let (_, path) = the_pack(&store);
        let location = store.index.get(&id).unwrap().unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"rot", u64::from(location.offset) + RECORD_BYTES as u64 + 100).unwrap();
        match by_scrub {
            true => assert_eq!(store.scrub(&Silent).unwrap().damaged.len(), 1),
            false => assert!(matches!(store.get(&id), Err(Error::ChunkDamaged { .. }))),
        }
        assert!(!store.session("ask").has_many(&[id]).unwrap()[0], "a damaged copy is as good as none");
        assert_eq!((put().1, put().1), (1, 0), "it heals once");
        assert_eq!(store.get(&id).unwrap(), plain);
        assert!(store.scrub(&Silent).unwrap().is_clean());
    }
}

#[test]
fn a_lost_pack_is_told_and_its_chunks_can_come_again() {
    let (_folder, store) = store();
    let layer = named_layer(&store, "l", &[1, 2, 3], 60_000);
    let (id, path) = the_pack(&store);
    std::fs::remove_file(path).unwrap();
    store.packs.forget_open(id);
    let report = store.fsck(&Silent, FsckOptions { repair: true }).unwrap();
    assert!(report.problems.iter().any(|problem| problem.kind == ProblemKind::LayerBroken && problem.names == ["l"]));
    assert!(report.problems.iter().any(|problem| problem.kind == ProblemKind::ChunkGone && problem.repaired));
    assert_eq!(named_layer(&store, "again", &[1, 2, 3], 60_000), layer);
    assert!(store.fsck(&Silent, FsckOptions::default()).unwrap().is_clean());
}

#[test]
fn what_could_not_be_looked_at_is_told_and_not_forgotten() {
    let (_folder, store) = store();
    let layer = named_layer(&store, "l", &[1, 2, 3], 60_000);
    let (id, path) = the_pack(&store);
    let aside = store.tmp_folder().join("aside");
    // It can be opened, and every read of it fails with something that says nothing of the chunks.
    std::fs::rename(&path, &aside).unwrap();
    std::fs::create_dir(&path).unwrap();
    store.packs.forget_open(id);
    let before = store.index.iter().unwrap().count();
    let report = store.fsck(&Silent, FsckOptions { repair: true }).unwrap();
    let told: Vec<_> = report.problems.iter().filter(|problem| problem.kind == ProblemKind::PackUnreadable).collect();
    assert!(told.iter().any(|problem| problem.detail.contains("could be looked at")), "{report:#?}");
    assert!(!report.problems.iter().any(|problem| problem.kind == ProblemKind::ChunkGone), "{report:#?}");
    assert_eq!(store.index.iter().unwrap().count(), before);
    let report = store.scrub(&Silent).unwrap();
    assert!(!report.is_clean() && report.damaged.is_empty() && report.unchecked_packs == 1, "{report:#?}");
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(&aside, &path).unwrap();
    store.packs.forget_open(id);
    assert!(store.fsck(&Silent, FsckOptions::default()).unwrap().is_clean());
    assert!(store.scrub(&Silent).unwrap().is_clean());
    store.check_stack(layer).unwrap();
}

#[test]
fn the_index_can_be_made_anew_from_packs_alone() {
    let (_folder, store) = store();
    let path = store.folder().to_owned();
    let session = store.session("s");
    let base = layer_of(&session, None, &[1, 2], 80_000);
    let top = layer_of(&session, Some(base), &[3], 80_000);
    session.commit().unwrap();
    store.set_name(&name("top"), top, Expect::Absent).unwrap();
    drop(session);
    let busy = rebuild(&path, StoreOptions::default(), &Silent).unwrap_err();
    assert_eq!(busy.class(), ErrorClass::Busy);
    drop(store);
    let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    assert!(report.records_kept && report.recovered.is_empty(), "{report:?}");
    assert_eq!((report.names, report.layers), (1, 2));
    let check = |names: &[&str]| {
        let store = Store::open(&path, StoreOptions::default()).unwrap();
        let found: Vec<_> = store.names().unwrap().into_iter().map(|(name, _)| name.to_string()).collect();
        assert_eq!(found, names);
        store.check_stack(top).unwrap();
        assert!(store.fsck(&Silent, FsckOptions::default()).unwrap().is_clean());
    };
    check(&["top"]);
    // Without any index, and with a torn tail.
    std::fs::remove_dir_all(path.join("index")).unwrap();
    assert!(Store::open(&path, StoreOptions::default()).is_err());
    let pack = std::fs::read_dir(path.join("packs")).unwrap().next().unwrap().unwrap().path();
    let file = std::fs::File::options().append(true).open(pack).unwrap();
    std::io::Write::write_all(&mut &file, b"LFCR torn").unwrap();
    let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    assert_eq!(report.recovered, [format!("recovered/{}", top.0.short())]);
    assert_eq!((report.names, report.layers), (1, 2));
    check(&[report.recovered[0].as_str()]);
    // With an index full of rubbish.
    std::fs::write(path.join("index/CURRENT"), "rubbish").unwrap();
    assert!(Store::open(&path, StoreOptions::default()).is_err());
    rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    check(&[format!("recovered/{}", top.0.short()).as_str()]);
}

#[test]
fn names_are_recovered_by_the_next_rebuild_if_one_is_cut_off() {
    let (_folder, store) = store();
    let path = store.folder().to_owned();
    let session = store.session("s");
    let base = layer_of(&session, None, &[1, 2], 80_000);
    let top = layer_of(&session, Some(base), &[3], 80_000);
    let other = layer_of(&session, None, &[4], 80_000);
    session.commit().unwrap();
    for (text, layer) in [("top", top), ("other", other)] {
        store.set_name(&name(text), layer, Expect::Absent).unwrap();
    }
    drop(session);
    drop(store);
    std::fs::write(path.join("index/CURRENT"), "rubbish").unwrap();
    let error = rebuild(&path, StoreOptions::default(), &CutAt::new(NAMING)).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    // Nothing that has lost its name goes meanwhile.
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    assert_eq!(names_of(&store), [""; 0]);
    let before = store.index.iter().unwrap().count();
    for dry_run in [true, false] {
        let error = store.gc(&Silent, GcOptions { dry_run, ..GcOptions::default() }).unwrap_err();
        assert!(error.class() == ErrorClass::Corrupt && error.to_string().contains("fsck --rebuild"), "{error}");
    }
    assert_eq!(store.index.iter().unwrap().count(), before);
    // A check tells of it, repairs nothing of it, and names the way out.
    for repair in [false, true] {
        let report = store.fsck(&Silent, FsckOptions { repair }).unwrap();
        let [problem] = &report.problems[..] else { panic!("{report:?}") };
        assert!(!report.is_clean() && problem.kind == ProblemKind::NamesLost && !problem.repaired, "{problem:?}");
        assert!(problem.detail.contains("fsck --rebuild"), "{problem:?}");
    }
    store.set_name(&name("mine"), other, Expect::Absent).unwrap();
    drop(store);
    // As if it had been killed before the damaged index was put aside, and another before its index was complete.
    std::fs::rename(path.join("index.damaged"), path.join("index.new")).unwrap();
    std::fs::create_dir(path.join("index.making")).unwrap();
    let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    let recovered = format!("recovered/{}", top.0.short());
    assert!(report.records_kept && report.recovered == [recovered.as_str()], "{report:?}");
    assert_eq!((report.names, report.layers), (2, 3), "{report:?}");
    assert_eq!(std::fs::read(path.join("index.damaged/CURRENT")).unwrap(), b"rubbish");
    assert!(!path.join("index.new").exists() && !path.join("index.making").exists());
    // Again: what has a name gets no second one.
    let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    assert!(report.records_kept && report.recovered.is_empty(), "{report:?}");
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    assert_eq!(names_of(&store), ["mine", recovered.as_str()]);
    store.gc(&Silent, GcOptions::default()).unwrap();
    assert!(store.fsck(&Silent, FsckOptions::default()).unwrap().is_clean());
    [top, other].iter().for_each(|layer| store.check_stack(*layer).unwrap());
}

#[test]
fn names_that_a_damaged_log_has_lost_are_told_and_their_layers_stay() {
    let (_folder, store) = store();
    let path = store.folder().to_owned();
    let layers: Vec<LayerId> = (0..20).map(|n| named_layer(&store, &format!("n{n}"), &[n], 60_000)).collect();
    drop(store);
    // In the middle of what was written: all of it is still in the log.
    let log = std::fs::read_dir(path.join("index")).unwrap().map(|entry| entry.unwrap().path());
    let log = log.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    let log = log.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&log).unwrap();
    let at = bytes.windows(3).position(|three| three == b"n10").unwrap();
    bytes[at] ^= 1;
    std::fs::write(&log, bytes).unwrap();
    let error = Store::open(&path, StoreOptions::default()).unwrap_err();
    assert!(error.to_string().contains("fsck --rebuild"), "{error}");
    let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    assert!(!report.records_kept && report.record_problems[0].contains("log is damaged"), "{report:?}");
    assert!(!report.recovered.is_empty() && path.join("index.damaged").exists(), "{report:?}");
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    let named: Vec<LayerId> = store.names().unwrap().into_iter().map(|(_, record)| record.layer).collect();
    assert!(layers.iter().all(|layer| named.contains(layer)), "{report:?}");
    assert_eq!(store.gc(&Silent, GcOptions::default()).unwrap().dead_chunks, 0);
    layers.iter().for_each(|layer| store.check_stack(*layer).unwrap());
    drop(store);
    // The next one reads all of the index that this one has made.
    let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    assert!(report.records_kept && report.recovered.is_empty(), "{report:?}");
}

/// Writes all of the index to its tables, and damages the begin of the one of `family`.
fn damage_table(path: &Path, family: &str) {
    drop(Store::open(path, StoreOptions::default()).unwrap());
    let mark = format!("name{family}");
    let mut damaged = 0;
    for entry in std::fs::read_dir(path.join("index")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        if path.extension().is_some_and(|extension| extension == "sst")
            && bytes.windows(mark.len()).any(|window| window == mark.as_bytes())
        {
            bytes[2] ^= 0x40;
            std::fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
    }
    assert_eq!(damaged, 1, "{family}");
}

#[test]
fn what_can_not_be_read_of_one_family_does_not_cost_others_nor_files_of_uppers() {
    for family in ["names", "uppers"] {
        let (_folder, store) = store();
        let path = store.folder().to_owned();
        let layer = named_layer(&store, "l", &[1], 60_000);
        // So many that they take several blocks.
        (0..500).for_each(|number| store.set_name(&name(&format!("n{number:03}")), layer, Expect::Absent).unwrap());
        let view = Arc::new(View::empty(store.clone()));
        let (upper, tables) = Upper::create(&store, &view, Some(name("up"))).unwrap();
        let (id, next_ino) = (upper.id(), upper.next_ino());
        let fs = Fs::writable(view.clone(), upper, tables);
        let ino = fs.make(Ino::ROOT, b"file", libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
        fs.write(ino, 0, b"precious", None).unwrap();
        fs.fsync(ino).unwrap();
        drop((fs, view, store));
        damage_table(&path, family);
        let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
        let [problem] = &report.record_problems[..] else { panic!("{report:?}") };
        assert!(!report.records_kept && problem.contains(family), "{report:?}");
        let store = Store::open(&path, StoreOptions::default()).unwrap();
        let names = names_of(&store);
        assert!(names.contains(&"n499".to_owned()) && names.contains(&"n000".to_owned()) == (family != "names"));
        crate::mount::attach(&store).unwrap();
        crate::mount::attach(&store).unwrap();
        let data_file = format!("{:x}", ino.0);
        let (there, aside) =
            (store.uppers_folder().join(id.to_string()), store.lost_uppers_folder().join(id.to_string()));
        let report = store.fsck(&Silent, FsckOptions::default()).unwrap();
        if family == "names" {
            let (upper, tables) = Upper::open(&store, id).unwrap();
            assert_eq!(std::fs::read(there.join(&data_file)).unwrap(), b"precious");
            assert!(tables.inode(ino).is_some() && !aside.exists() && upper.next_ino() >= next_ino);
            assert!(report.is_clean(), "{report:?}");
        } else {
            assert!(!there.exists() && upper::list(store.db()).unwrap().is_empty());
            assert_eq!(std::fs::read(aside.join(&data_file)).unwrap(), b"precious");
            let [problem] = &report.problems[..] else { panic!("{report:?}") };
            assert!(problem.kind == ProblemKind::StrayFile && problem.subject == aside.display().to_string());
            let view = View::empty(store.clone());
            let (new, _) = Upper::create(&store, &view, Some(name("up"))).unwrap();
            assert!(new.id() > id, "a number is never given again");
        }
    }
}

#[test]
fn a_data_file_whose_row_is_lost_is_put_aside_and_its_number_stays_taken() {
    let (_folder, store) = store();
    let view = View::empty(store.clone());
    let (upper, _) = Upper::create(&store, &view, None).unwrap();
    let (id, lost) = (upper.id(), Ino(upper.next_ino().0 + 5000));
    drop(upper);
    let folder = store.uppers_folder().join(id.to_string());
    for name in [format!("{:x}", lost.0), format!("{:x}.map", lost.0)] {
        std::fs::write(folder.join(name), "precious").unwrap();
    }
    store.db.put(Cf::Meta, lost_names::UPPERS_KEY, [0]).unwrap();
    crate::mount::attach(&store).unwrap();
    let (upper, _) = Upper::open(&store, id).unwrap();
    assert!(upper.next_ino() > lost);
    let aside = store.lost_uppers_folder().join(id.to_string());
    for name in [format!("{:x}", lost.0), format!("{:x}.map", lost.0)] {
        assert_eq!(std::fs::read(aside.join(name)).unwrap(), b"precious");
    }
    assert!(!store.db.contains(Cf::Meta, lost_names::UPPERS_KEY).unwrap());
}

#[test]
fn a_layer_whose_recovered_name_is_taken_gets_one_with_all_digits() {
    let (_folder, store) = store();
    let path = store.folder().to_owned();
    let lost = named_layer(&store, "lost", &[1], 60_000);
    let other = named_layer(&store, "other", &[2], 60_000);
    drop(store);
    std::fs::write(path.join("index/CURRENT"), "rubbish").unwrap();
    rebuild(&path, StoreOptions::default(), &CutAt::new(NAMING)).unwrap_err();
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    let short = format!("recovered/{}", lost.0.short());
    store.set_name(&name(&short), other, Expect::Absent).unwrap();
    drop(store);
    let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    assert_eq!(report.recovered, [format!("recovered/{lost}")]);
}

#[test]
fn a_rebuild_tells_what_is_missing_and_counts_what_is_there() {
    let (_folder, store) = store();
    let path = store.folder().to_owned();
    let base = named_layer(&store, "base", &[1], 60_000);
    let session = store.session("s");
    let top = layer_of(&session, Some(base), &[2], 60_000);
    session.commit().unwrap();
    drop(session);
    for text in ["top", "also"] {
        store.set_name(&name(text), top, Expect::Absent).unwrap();
    }
    // The record of its manifest alone: the scan goes on behind it.
    let location = store.index.get(&base.0).unwrap().unwrap();
    let file = std::fs::File::options().write(true).open(store.packs.path(location.pack)).unwrap();
    file.write_all_at(b"XXXX", u64::from(location.offset)).unwrap();
    // A row that no version has written.
    store.db.put(Cf::Names, "odd", [99]).unwrap();
    drop(store);
    let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    assert!(report.records_kept, "{report:?}");
    assert_eq!((report.names, report.layers), (3, 1), "{report:?}");
    let missing: Vec<_> = report.missing_layers.into_iter().collect();
    assert_eq!(missing, [(base, ["also", "base", "top"].map(str::to_owned).to_vec())]);
    for pack in std::fs::read_dir(path.join("packs")).unwrap() {
        std::fs::remove_file(pack.unwrap().path()).unwrap();
    }
    let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
    assert_eq!((report.names, report.layers, report.chunks), (3, 0, 0), "{report:?}");
    assert_eq!(report.missing_layers.len(), 2, "{report:?}");
}

#[test]
fn a_damaged_layer_stops_a_collection_before_it_removes_anything() {
    let (_folder, store) = store();
    let layer = named_layer(&store, "l", &[1], 60_000);
    named_layer(&store, "m", &[2], 60_000);
    store.remove_name(&name("m")).unwrap();
    store.index.forget(&[(layer.0, store.index.get(&layer.0).unwrap().unwrap())]).unwrap();
    let path = store.folder().to_owned();
    drop(store);
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    let before = store.index.iter().unwrap().count();
    let error = store.gc(&Silent, GcOptions::default()).unwrap_err();
    assert!(matches!(error, Error::LayerMissing(_)), "{error}");
    assert_eq!(store.index.iter().unwrap().count(), before);
}
