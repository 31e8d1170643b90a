//! A process that dies at a named step leaves a store in which every name is whole.
//!
//! The test runs itself again as a child that is armed and works on a store; the parent looks at what is left.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::failpoint;
use crate::monitor::Silent;
use crate::store::{FsckOptions, GcOptions, rebuild};
use crate::testing::Spawn;

/// The steps of the store itself: all but those of seals, squashes, transfers, guests, moves and the second tier.
fn steps() -> impl Iterator<Item = &'static str> {
    let is_elsewhere = |step: &str| {
        ["seal.", "squash.", "receive.", "move.", "guest.", "tier."].iter().any(|other| step.starts_with(other))
    };
    failpoint::NAMES.iter().copied().filter(move |step| !is_elsewhere(step))
}

/// Work that passes every step several times. Writes each name to `told` once it was reported as set.
fn work(path: &Path, told: &Path) {
    let store = Store::open(path, StoreOptions::create()).unwrap();
    let mut told = std::fs::File::options().create(true).append(true).open(told).unwrap();
    for round in 0..3u64 {
        for number in 0..3u64 {
            let text = format!("r{round}n{number}");
            // Two sessions at once, so that there are several packs.
            let other = store.session("other");
            put(&other, 1000 + round * 3 + number, 50_000);
            other.commit().unwrap();
            named_layer(&store, &text, &[round * 2 + number, round * 2 + number + 1], 700_000);
            writeln!(told, "{text}").unwrap();
        }
        for number in 0..2 {
            let text = format!("r{round}n{number}");
            writeln!(told, "-{text}").unwrap();
            store.remove_name(&name(&text)).unwrap();
        }
        store.gc(&Silent, GcOptions::default()).unwrap();
    }
}

#[test]
fn child() {
    let (Some(path), Some(step)) = (std::env::var_os("LAYERFS_TEST_STORE"), std::env::var("LAYERFS_TEST_STEP").ok())
    else {
        return; // Only of use when the test below starts it.
    };
    let (step, nth) = step.split_once(':').unwrap();
    assert!(failpoint::arm(step, nth.parse().unwrap()));
    let path = Path::new(&path);
    work(path, &path.with_extension("told"));
}

#[test]
fn names_are_whole_after_a_crash_at_every_step() {
    for step in steps() {
        for nth in [1, 2, 5] {
            let folder = tempfile::Builder::new().prefix("layerfs-store-").tempdir().unwrap();
            let path = folder.path().join("store");
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "store::tests::crash::child", "--test-threads=1", "--quiet"])
                .env("LAYERFS_TEST_STORE", &path)
                .env("LAYERFS_TEST_STEP", format!("{step}:{nth}"))
                .stdout(std::process::Stdio::null())
                .status_locked()
                .unwrap();
            assert!(nth > 2 || status.signal() == Some(libc::SIGKILL), "{step}:{nth} was not met: {status}");
            look_at(&path, &format!("{step}:{nth}"));
        }
    }
}

fn look_at(path: &Path, what: &str) {
    let store = Store::open(path, StoreOptions::create()).unwrap();
    let report = store.fsck(&Silent, FsckOptions::default()).unwrap();
    assert!(report.is_clean(), "{what}: {report:#?}");
    let told = std::fs::read_to_string(path.with_extension("told")).unwrap_or_default();
    for text in told.lines().filter(|line| !line.starts_with('-')) {
        let is_there = store.name(&name(text)).unwrap().is_some();
        assert!(is_there || told.contains(&format!("-{text}\n")), "{what}: {text} is gone");
    }
    assert!(store.scrub(&Silent).unwrap().is_clean(), "{what}");
    // Garbage goes, and work goes on.
    let count = store.names().unwrap().len();
    store.gc(&Silent, GcOptions::default()).unwrap();
    named_layer(&store, "after", &[0, 1, 77], 700_000);
    assert_eq!(store.names().unwrap().len(), count + 1, "{what}");
    let report = store.fsck(&Silent, FsckOptions::default()).unwrap();
    assert!(report.is_clean(), "{what}: {report:#?}");
}

#[test]
fn rebuilding_child() {
    let (Some(path), Ok(step)) = (std::env::var_os("LAYERFS_TEST_REBUILD"), std::env::var("LAYERFS_TEST_STEP")) else {
        return; // Only of use when the test below starts it.
    };
    assert!(failpoint::arm(&step, 1));
    rebuild(Path::new(&path), StoreOptions::default(), &Silent).unwrap();
}

#[test]
fn all_names_or_none_are_recovered_when_a_rebuild_is_killed() {
    for (step, count) in [("name.before", 0), ("name.after", 2)] {
        let (_folder, store) = store();
        let path = store.folder().to_owned();
        let layers = [1, 2].map(|seed| named_layer(&store, &format!("n{seed}"), &[seed], 60_000));
        drop(store);
        std::fs::write(path.join("index/CURRENT"), "rubbish").unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::crash::rebuilding_child", "--test-threads=1", "--quiet"])
            .env("LAYERFS_TEST_REBUILD", &path)
            .env("LAYERFS_TEST_STEP", step)
            .stdout(std::process::Stdio::null())
            .status_locked()
            .unwrap();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{step} was not met: {status}");
        let store = Store::open(&path, StoreOptions::default()).unwrap();
        assert_eq!(names_of(&store).len(), count, "{step}");
        assert_eq!(store.gc(&Silent, GcOptions::default()).is_ok(), count == 2, "{step}");
        drop(store);
        let report = rebuild(&path, StoreOptions::default(), &Silent).unwrap();
        assert_eq!(report.recovered.len(), 2 - count, "{step}: {report:?}");
        let store = Store::open(&path, StoreOptions::default()).unwrap();
        assert_eq!(names_of(&store).len(), 2, "{step}");
        store.gc(&Silent, GcOptions::default()).unwrap();
        layers.iter().for_each(|layer| store.check_stack(*layer).unwrap());
    }
}
