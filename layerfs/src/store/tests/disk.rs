//! A full disk and a read-only one: a small tmpfs in a mount namespace of a child.

use std::path::Path;
use std::process::Command;

use super::*;
use crate::chunk::ChunkRead;
use crate::error::ErrorClass;
use crate::monitor::Silent;
use crate::store::{FsckOptions, GcOptions, Which, space};
use crate::testing::{Spawn, elsewhere};

/// Runs the test `child` of this file as `role`, in a shell that has prepared `$dir` by `prepare`.
fn run(role: &str, prepare: &str) {
    let folder = tempfile::Builder::new().prefix("layerfs-store-").tempdir().unwrap();
    let elsewhere = elsewhere();
    let (program, words): (&Path, &[&str]) =
        if rustix::process::geteuid().is_root() { (&elsewhere, &["-"]) } else { (Path::new("unshare"), &["-r", "-m"]) };
    let start = || {
        let mut command = Command::new(program);
        command.args(words);
        command
    };
    let probe = start().args(["mount", "-t", "tmpfs", "none"]).arg(folder.path()).output_locked();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        let mut err = std::io::stderr();
        let _ = std::io::Write::write_all(
            &mut err,
            format!("NOT TESTED: {role}: no mount namespace here: {probe:?}\n").as_bytes(),
        );
        return;
    }
    let exe = std::env::current_exe().unwrap();
    let test = "--exact store::tests::disk::child --test-threads=1 --nocapture";
    let status = start()
        .args(["sh", "-ec", &prepare.replace("RUN", &format!("\"$exe\" {test}"))])
        .env("dir", folder.path())
        .env("exe", exe)
        .env("LAYERFS_TEST_ROLE", role)
        .output_locked()
        .unwrap();
    assert!(status.status.success(), "{role}: {}", String::from_utf8_lossy(&[status.stdout, status.stderr].concat()));
}

#[test]
fn child() {
    let (Ok(role), Some(folder)) = (std::env::var("LAYERFS_TEST_ROLE"), std::env::var_os("dir")) else {
        return; // Only of use when the tests below start it.
    };
    let path = Path::new(&folder).join("store");
    match std::env::var("LAYERFS_TEST_PART").as_deref().unwrap_or(&role) {
        "full" => fills_up(&path),
        "fetch" => fetches(&path),
        "make" => {
            let store = Store::open(&path, StoreOptions::create()).unwrap();
            named_layer(&store, "l", &[1], 100_000);
        }
        "read-only" => reads_only(&path),
        other => panic!("role {other}"),
    }
}

fn fills_up(path: &Path) {
    let store = Store::open(path, StoreOptions::create()).unwrap();
    let mut count = 0;
    let error = loop {
        let session = store.session("fill");
        let seeds: Vec<u64> = (count * 4..count * 4 + 4).collect();
        let text = format!("l{count}");
        let mut files = seeds.iter().map(|seed| put_result(&session, *seed));
        let filled = files.by_ref().find_map(|result| result.err());
        if let Some(error) = filled.or_else(|| session.commit().err()) {
            break error;
        }
        let layer = layer_of(&session, None, &seeds, 250_000);
        if let Err(error) = session.commit() {
            break error;
        }
        store.set_name(&name(&text), layer, Expect::Absent).unwrap();
        count += 1;
        assert!(count < 1000, "the disk doesn't fill up");
    };
    assert_eq!(error.class(), ErrorClass::NoSpace, "{error}");
    assert!(count > 5, "{count} layers");
    // The store is as it was: nothing half-done, everything readable, removable, and then there is room again.
    assert_eq!(store.names().unwrap().len() as u64, count);
    assert!(store.fsck(&Silent, FsckOptions::default()).unwrap().is_clean());
    for number in 1..count {
        store.remove_name(&name(&format!("l{number}"))).unwrap();
    }
    let report = store.gc(&Silent, GcOptions::default()).unwrap();
    assert!(report.freed_bytes > 3_000_000, "{report:?}");
    named_layer(&store, "again", &[7000, 7001], 250_000);
    assert!(store.fsck(&Silent, FsckOptions::default()).unwrap().is_clean());
    assert!(store.scrub(&Silent).unwrap().is_clean());
    drop(store);
    let store = Store::open(path, StoreOptions::default()).unwrap();
    assert_eq!(store.names().unwrap().len(), 2);
}

fn fetches(path: &Path) {
    let elsewhere = tempfile::tempdir().unwrap();
    let store = Store::open(path, StoreOptions::create()).unwrap();
    store.connect_tier(Some(super::tier::Folder::new(elsewhere.path())));
    let seeds: Vec<u64> = (0..20).collect();
    let layer = named_layer(&store, "l", &seeds, 1_000_000);
    store.tier_sync(Which::All, &Silent).unwrap();
    let evicted = store.tier_evict(0, &Silent).unwrap();
    assert!(evicted.bytes > 20_000_000, "{evicted:?}");
    // There is room for the packs, and not for what they are to leave free.
    let leave = space::PACK_RESERVE_BYTES + (8 << 20);
    let filler = path.with_extension("filler");
    std::fs::write(&filler, vec![1; (space::free_bytes(path).unwrap() - leave) as usize]).unwrap();
    let error = store.tier_fetch(&Silent).unwrap_err();
    assert_eq!(error.class(), ErrorClass::NoSpace, "{error}");
    let left = std::fs::read_dir(store.packs.folder()).unwrap().count() as u64;
    assert_eq!(left, store.packs.list().unwrap().len() as u64, "a half-fetched pack stays");
    std::fs::remove_file(&filler).unwrap();
    store.tier_fetch(&Silent).unwrap();
    assert_eq!(store.packs.remote().unwrap(), []);
    store.check_stack(layer).unwrap();
}

fn put_result(session: &Session, seed: u64) -> crate::error::Result<ChunkId> {
    session.put(Class::Data, &noise(seed, 250_000))
}

fn reads_only(path: &Path) {
    let error = Store::open(path, StoreOptions::default()).map(|_| ()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Denied, "{error}");
    let store = Store::open(path, StoreOptions { read_only: true, ..StoreOptions::default() }).unwrap();
    let layer = store.name(&name("l")).unwrap().unwrap().layer;
    store.get(&layer.0).unwrap();
    store.check_stack(layer).unwrap();
    assert!(store.fsck(&Silent, FsckOptions::default()).unwrap().is_clean());
    assert_eq!(store.remove_name(&name("l")).unwrap_err().class(), ErrorClass::Denied);
    assert_eq!(store.gc(&Silent, GcOptions::default()).unwrap_err().class(), ErrorClass::Denied);
}

#[test]
fn a_full_disk_leaves_the_store_as_it_was() {
    run("full", "mount -t tmpfs -o size=80m none \"$dir\"; RUN");
}

#[test]
fn a_read_only_disk_is_told_and_can_be_read() {
    let prepare =
        "mount -t tmpfs -o size=80m none \"$dir\"; LAYERFS_TEST_PART=make RUN; mount -o remount,ro none \"$dir\"; RUN";
    run("read-only", prepare);
}

#[test]
fn a_fetch_leaves_free_what_packs_leave() {
    run("fetch", "mount -t tmpfs -o size=80m none \"$dir\"; RUN");
}
