//! Garbage collection, alone and against everything else; figures.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::chunk::ChunkRead;
use crate::monitor::Silent;
use crate::store::{FsckOptions, GcOptions, GcReport};

fn gc(store: &Store) -> GcReport {
    store.gc(&Silent, GcOptions::default()).unwrap()
}

fn assert_clean(store: &Store) {
    let report = store.fsck(&Silent, FsckOptions::default()).unwrap();
    assert!(report.is_clean(), "{report:#?}");
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_folder(&path, &target);
        } else {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

fn pack_bytes(store: &Store) -> u64 {
    store.packs.list().unwrap().iter().map(|(_, bytes)| bytes).sum()
}

#[test]
fn what_is_named_stays_and_the_rest_goes() {
    let (_folder, store) = store();
    let a = named_layer(&store, "a", &[1, 2, 3], 300_000);
    named_layer(&store, "b", &[3, 4, 5, 6, 7, 8], 300_000);
    let before = pack_bytes(&store);
    let idle = gc(&store);
    assert_eq!((idle.dead_chunks, idle.live_layers, idle.packs_removed), (0, 2, 0));
    store.remove_name(&name("b")).unwrap();
    let dry = store.gc(&Silent, GcOptions { dry_run: true, ..GcOptions::default() }).unwrap();
    assert_eq!(pack_bytes(&store), before);
    let report = gc(&store);
    assert_eq!((report.dead_chunks, report.dead_bytes), (dry.dead_chunks, dry.dead_bytes));
    assert!(report.dead_bytes > 1_400_000 && report.live_layers == 1, "{report:?}");
    assert!(pack_bytes(&store) < before / 2, "{} of {before}", pack_bytes(&store));
    store.check_stack(a).unwrap();
    assert_clean(&store);
    assert!(store.scrub(&Silent).unwrap().is_clean());
    assert_eq!(store.last_gc().unwrap().unwrap().1, store.dead_bytes().unwrap());
    store.remove_name(&name("a")).unwrap();
    gc(&store);
    assert_eq!(store.stat(&Silent).unwrap().chunks, 0);
    assert_eq!(store.packs.list().unwrap(), []);
}

#[test]
fn what_an_unfinished_transfer_brought_waits_for_a_day() {
    use crate::attr::Time;
    use crate::store::staged::KEPT_FOR;

    let (folder, store) = store();
    named_layer(&store, "a", &[1], 100_000);
    let coming = LayerId(ChunkId([7; 32]));
    let session = store.session("receive");
    session.stage_for(coming);
    let ids: Vec<_> = [2, 3].iter().map(|seed| session.put(Class::Data, &noise(*seed, 100_000)).unwrap()).collect();
    drop(session);
    let session = store.session("receive");
    session.stage_for(coming);
    let unflushed = session.put(Class::Data, &noise(4, 100_000)).unwrap();
    session.flush().unwrap();
    drop(session);
    drop(store);
    let store = Store::open(&folder.path().join("store"), StoreOptions::default()).unwrap();
    let is_here = |id: &ChunkId| store.get(id).is_ok();
    let all = [ids.clone(), vec![unflushed]].concat();
    let here = all.iter().filter(|id| is_here(id)).count();
    assert!(here >= 1, "what was flushed is here");
    // Twice, as the first time might move what is small to where nobody knows it.
    for _ in 0..2 {
        let report = gc(&store);
        assert!(report.staged_bytes > 100_000 && report.dead_chunks == 0, "{report:?}");
        assert_eq!(all.iter().filter(|id| is_here(id)).count(), here);
    }
    assert_clean(&store);
    let later = Time { seconds: Time::now().seconds + KEPT_FOR.as_secs() as i64, nanos: 0 };
    assert!(!store.staged_packs(Time::now()).unwrap().is_empty());
    assert!(store.staged_packs(later).unwrap().is_empty(), "it is void after a day");
    assert!(store.staged_packs(Time::now()).unwrap().is_empty(), "and its rows are gone");
    assert_eq!(gc(&store).dead_chunks, here as u64);
}

#[test]
fn a_transfer_finds_what_another_is_still_keeping() {
    let (_folder, store) = store();
    let (first, second) = (store.session("receive"), store.session("receive"));
    let coming = LayerId(ChunkId([7; 32]));
    first.stage_for(coming);
    let ids = [first.put(Class::Data, &noise(1, 100_000)).unwrap()];
    assert_eq!(second.has_many(&ids).unwrap(), [false], "only its own session knows it");
    store.flush_staged(LayerId(ChunkId([8; 32])));
    assert_eq!(second.has_many(&ids).unwrap(), [false], "it was for another layer");
    store.flush_staged(coming);
    assert_eq!(second.has_many(&ids).unwrap(), [true]);
}

#[test]
fn what_a_killed_process_had_written_is_found_again() {
    let (folder, store) = store();
    let session = store.session("receive");
    session.stage_for(LayerId(ChunkId([7; 32])));
    let ids: Vec<_> = (0..40).map(|seed| session.put(Class::Data, &noise(seed, 100_000)).unwrap()).collect();
    // As a kill leaves it: the packs as far as they were written, no word to the index.
    let copy = folder.path().join("copy");
    copy_folder(&folder.path().join("store"), &copy);
    let after = Store::open(&copy, StoreOptions::default()).unwrap();
    let found = ids.iter().take_while(|id| after.get(id).is_ok()).count();
    assert!((20..40).contains(&found), "{found}: all but what was in a buffer");
    assert!(ids[found..].iter().all(|id| after.get(id).is_err()));
    assert_clean(&after);
    assert!(after.scrub(&Silent).unwrap().is_clean());
    assert_eq!(gc(&after).dead_chunks, 0);
}

#[test]
fn nothing_is_kept_for_what_has_come_or_is_given_up() {
    let (_folder, store) = store();
    let coming = LayerId(ChunkId([7; 32]));
    for end in ["come", "given up"] {
        let session = store.session("receive");
        session.stage_for(coming);
        let id = session.put(Class::Data, &noise(5, 100_000)).unwrap();
        session.flush().unwrap();
        drop(session);
        assert_eq!(gc(&store).dead_chunks, 0);
        match end {
            "come" => store.unstage(&[coming]).unwrap(),
            _ => drop(store.gc(&Silent, GcOptions { unfinished: true, ..GcOptions::default() }).unwrap()),
        }
        gc(&store);
        assert!(store.get(&id).is_err(), "{end}");
    }
}

#[test]
fn pins_sources_and_parents_keep_layers() {
    let (_folder, store) = store();
    let session = store.session("s");
    let base = layer_of(&session, None, &[1], 100_000);
    let top = layer_of(&session, Some(base), &[2], 100_000);
    let other = layer_of(&session, None, &[3], 100_000);
    session.commit().unwrap();
    let pin = store.pin(top).unwrap();
    store.add_root_source(Box::new(move || Ok(vec![other])));
    drop(session);
    let report = gc(&store);
    assert_eq!((report.live_layers, report.dead_chunks), (3, 0));
    store.check_stack(top).unwrap();
    drop(pin);
    assert_eq!(gc(&store).live_layers, 1);
    store.check_stack(other).unwrap();
    assert!(store.check_layer(base).is_err());
}

#[test]
fn a_living_session_keeps_what_it_mentioned() {
    let (_folder, store) = store();
    let old = named_layer(&store, "old", &[1, 2], 200_000);
    store.remove_name(&name("old")).unwrap();
    let session = store.session("same again");
    let again = layer_of(&session, None, &[1, 2], 200_000);
    assert_eq!((again, session.report().new_chunks), (old, 0));
    assert_eq!(gc(&store).dead_chunks, 0);
    session.commit().unwrap();
    store.set_name(&name("new"), again, Expect::Absent).unwrap();
    drop(session);
    assert_eq!(gc(&store).dead_chunks, 0);
    store.check_stack(again).unwrap();
}

#[test]
fn small_packs_are_merged_and_spare_ones_are_not_appended_to_after_that() {
    let (_folder, store) = store();
    let sessions: Vec<_> = (0..5).map(|n| store.session(&n.to_string())).collect();
    for (n, session) in sessions.iter().enumerate() {
        let layer = layer_of(session, None, &[n as u64 + 10], 50_000);
        session.commit().unwrap();
        store.set_name(&name(&n.to_string()), layer, Expect::Absent).unwrap();
    }
    drop(sessions);
    assert_eq!(store.packs.list().unwrap().len(), 5);
    assert_eq!(gc(&store).packs_rewritten, 5);
    assert_eq!(store.packs.list().unwrap().len(), 1);
    named_layer(&store, "more", &[99], 50_000);
    assert_eq!(gc(&store).packs_rewritten, 0);
    assert_clean(&store);
}

#[test]
fn imports_names_and_collections_race() {
    let (_folder, store) = store();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..3u64)
            .map(|thread| {
                let store = &store;
                scope.spawn(move || {
                    for round in 0..60u64 {
                        // The same few layers again and again, so that chunks die and come back.
                        let seed = (round * 7 + thread) % 5;
                        let text = format!("t{thread}");
                        let layer = named_layer(store, &text, &[seed, seed + 1, 100 + round % 3], 40_000);
                        store.check_stack(layer).unwrap();
                        if round % 3 == 0 {
                            // The layer goes by another name, then loses the first.
                            store.set_name(&name(&format!("{text}-kept")), layer, Expect::Any).unwrap();
                            store.remove_name(&name(&text)).unwrap();
                            store.check_stack(layer).unwrap();
                        }
                    }
                })
            })
            .collect();
        let collector = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                if let Err(error) = store.gc(&Silent, GcOptions::default()) {
                    panic!("{error}: {error:?}");
                }
                count += 1;
            }
            count
        });
        let reader = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for (_, record) in store.names().unwrap() {
                    // A layer that just lost its name may go; one that a pin could get may not.
                    if let Ok(pin) = store.pin(record.layer) {
                        store.check_stack(pin.layer()).unwrap();
                    }
                }
            }
        });
        let written: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        done.store(true, Ordering::Relaxed);
        written.into_iter().for_each(|writer| writer.unwrap());
        assert!(collector.join().unwrap() > 1);
        reader.join().unwrap();
    });
    gc(&store);
    assert_clean(&store);
    assert!(store.scrub(&Silent).unwrap().is_clean());
}

#[test]
fn figures_add_up() {
    let (_folder, store) = store();
    named_layer(&store, "a", &[1, 2], 100_000);
    named_layer(&store, "b", &[1, 2, 3], 100_000);
    let stat = store.stat(&Silent).unwrap();
    assert_eq!((stat.names, stat.layers, stat.referenced_bytes), (2, 2, 500_000));
    assert_eq!(stat.classes[Class::Data as usize].plain_bytes, 300_000);
    assert_eq!(stat.dead_bytes, 0);
    assert!(stat.dedup_ratio > 1.6 && stat.dedup_ratio < 1.7, "{}", stat.dedup_ratio);
    assert_eq!(stat.pack_bytes, stat.stored_bytes + 16 * stat.packs);
}
