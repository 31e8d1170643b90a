//! The second tier, with a folder in the place of a bucket.

use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;

use super::*;
use crate::chunk::ChunkRead;
use crate::closure::walk_stack;
use crate::error::{Error, ErrorClass, Result};
use crate::failpoint;
use crate::monitor::Silent;
use crate::store::pack::PackId;
use crate::store::tier::{Record, State};
use crate::store::{FsckOptions, GcOptions, Objects, ProblemKind, Which, rebuild, rebuild_from};
use crate::testing::Spawn;

/// A bucket that is a folder.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    is_gone: AtomicBool,
    /// Nothing may be removed.
    keeps_all: AtomicBool,
    reads: AtomicU64,
    /// How often it was asked for anything but bytes.
    asked: AtomicU64,
}

impl Folder {
    pub(super) fn new(path: &Path) -> Arc<Folder> {
        std::fs::create_dir_all(path.join("packs")).unwrap();
        Arc::new(Folder {
            path: path.to_owned(),
            is_gone: AtomicBool::new(false),
            keeps_all: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            asked: AtomicU64::new(0),
        })
    }

    fn check(&self) -> Result<()> {
        if self.is_gone.load(Ordering::Relaxed) {
            let (place, class) = (self.place(), ErrorClass::Network);
            return Err(Error::Tier { action: "reading from", place, class, detail: "it is gone".to_owned() });
        }
        Ok(())
    }

    fn count(&self) -> usize {
        std::fs::read_dir(self.path.join("packs")).unwrap().count()
    }
}

impl Objects for Folder {
    fn put(&self, name: &str, path: &Path, monitor: &dyn Monitor) -> Result<()> {
        self.check()?;
        monitor.advance(std::fs::copy(path, self.path.join(name)).unwrap());
        Ok(())
    }

    fn read(&self, name: &str, at: u64, bytes: u64) -> Result<Bytes> {
        self.check()?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        let file = std::fs::File::open(self.path.join(name)).map_err(|e| {
            let (place, class) = (self.place(), ErrorClass::NotFound);
            Error::Tier { action: "reading from", place, class, detail: e.to_string() }
        })?;
        let end = file.metadata().unwrap().len().min(at + bytes);
        let mut buffer = vec![0; end.saturating_sub(at) as usize];
        file.read_exact_at(&mut buffer, at).unwrap();
        Ok(buffer.into())
    }

    fn size(&self, name: &str) -> Result<Option<u64>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.check()?;
        Ok(std::fs::metadata(self.path.join(name)).ok().map(|metadata| metadata.len()))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.check()?;
        if self.keeps_all.load(Ordering::Relaxed) {
            let (place, class) = (self.place(), ErrorClass::Denied);
            return Err(Error::Tier { action: "removing from", place, class, detail: "all is kept".to_owned() });
        }
        let _ = std::fs::remove_file(self.path.join(name));
        Ok(())
    }

    fn list(&self) -> Result<Vec<(String, u64)>> {
        self.check()?;
        let entries = std::fs::read_dir(self.path.join("packs")).unwrap().map(|entry| entry.unwrap());
        let object = |entry: std::fs::DirEntry| {
            (format!("packs/{}", entry.file_name().to_string_lossy()), entry.metadata().unwrap().len())
        };
        Ok(entries.map(object).collect())
    }

    fn place(&self) -> String {
        self.path.display().to_string()
    }
}

fn open(path: &Path, bucket: &Arc<Folder>) -> Arc<Store> {
    // No cache: every read goes to the packs.
    let store = Store::open(path, StoreOptions { cache_bytes: 0, ..StoreOptions::create() }).unwrap();
    store.connect_tier(Some(bucket.clone()));
    store
}

/// Reads every chunk of the stack.
fn read_all(store: &Store, layer: LayerId) -> Result<u64> {
    let mut count = 0;
    walk_stack(
        store,
        layer,
        &mut |chunk| {
            count += 1;
            store.get(&chunk.id).map(|_| true)
        },
        |_| false,
    )?;
    Ok(count)
}

fn assert_clean(store: &Store) {
    let report = store.fsck(&Silent, FsckOptions::default()).unwrap();
    assert!(report.is_clean(), "{report:#?}");
}

#[test]
fn what_is_evicted_is_read_from_there() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket) = (folder.path().join("store"), Folder::new(&folder.path().join("bucket")));
    let store = open(&path, &bucket);
    let a = named_layer(&store, "a", &[1, 2, 3], 300_000);
    let moved = store.tier_sync(Which::Full, &Silent).unwrap();
    assert_eq!(moved.packs, 0, "a small pack isn't full");
    assert_eq!(store.tier_evict(0, &Silent).unwrap().packs, 0, "what isn't there stays");
    assert_eq!(store.tier_sync(Which::All, &Silent).unwrap().packs, 1);
    assert_eq!(store.tier_sync(Which::All, &Silent).unwrap().packs, 0);
    let evicted = store.tier_evict(0, &Silent).unwrap();
    assert!(evicted.packs == 1 && evicted.bytes > 900_000);
    assert_eq!(store.packs.list().unwrap(), []);
    let chunks = read_all(&store, a).unwrap();
    let reads = bucket.reads.load(Ordering::Relaxed);
    assert!(reads > 0 && reads < chunks, "{reads} reads for {chunks} chunks: no read-ahead");
    assert_clean(&store);
    assert!(store.scrub(&Silent).unwrap().is_clean());
    let stat = store.stat(&Silent).unwrap();
    assert_eq!((stat.tier.remote_packs, stat.tier.local_packs, stat.packs, stat.dead_bytes), (1, 0, 0, 0));
    // A new pack doesn't get the number of one that is elsewhere, after a restart either.
    drop(store);
    let store = open(&path, &bucket);
    let b = named_layer(&store, "b", &[4, 5], 300_000);
    assert_eq!(store.packs.list().unwrap()[0].0.0, 2);
    read_all(&store, a).unwrap();
    read_all(&store, b).unwrap();
    // Back again, and without it.
    assert_eq!(store.tier_forget().unwrap_err().class(), ErrorClass::Busy);
    assert_eq!(store.tier_fetch(&Silent).unwrap().packs, 1);
    store.tier_forget().unwrap();
    bucket.is_gone.store(true, Ordering::Relaxed);
    read_all(&store, a).unwrap();
    assert_clean(&store);
}

#[test]
fn what_a_kill_left_of_a_fetch_goes_and_nothing_else() {
    let (_folder, store) = store();
    let path = store.folder().to_owned();
    named_layer(&store, "a", &[1], 300_000);
    drop(store);
    let packs = path.join("packs");
    let ours = ["0000000000000001.pack.123-0.tmp", "00000000000000ff.pack.1-23.tmp"];
    let others = ["notes.tmp", "0000000000000001.pack.tmp", "0000000000000001.pack.1.tmp", "1.pack.1-2.tmp"];
    ours.iter().chain(&others).for_each(|name| std::fs::write(packs.join(name), "half").unwrap());
    let count = || {
        let there = |names: &[&str]| names.iter().filter(|name| packs.join(name).exists()).count();
        (there(&ours), there(&others))
    };
    drop(Store::open(&path, StoreOptions { read_only: true, ..StoreOptions::default() }).unwrap());
    assert_eq!(count(), (2, 4));
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    assert_eq!((count(), store.packs.list().unwrap().len()), ((0, 4), 1));
}

#[test]
fn dead_packs_go_there_too() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket) = (folder.path().join("store"), Folder::new(&folder.path().join("bucket")));
    let store = open(&path, &bucket);
    named_layer(&store, "a", &[1, 2, 3], 300_000);
    store.tier_sync(Which::All, &Silent).unwrap();
    store.tier_evict(0, &Silent).unwrap();
    let b = named_layer(&store, "b", &[4, 5], 300_000);
    store.tier_sync(Which::All, &Silent).unwrap();
    assert_eq!(bucket.count(), 2);
    store.remove_name(&name("a")).unwrap();
    let report = store.gc(&Silent, GcOptions::default()).unwrap();
    assert!(report.packs_removed == 1 && report.freed_bytes > 900_000, "{report:?}");
    assert_eq!(bucket.count(), 1);
    // One that can't be removed now is removed later.
    bucket.is_gone.store(true, Ordering::Relaxed);
    store.remove_name(&name("b")).unwrap();
    store.gc(&Silent, GcOptions::default()).unwrap();
    assert_eq!((bucket.count(), store.tier_stat().unwrap().dead_packs), (1, 1));
    assert!(store.name(&name("b")).unwrap().is_none() && store.check_stack(b).is_err());
    bucket.is_gone.store(false, Ordering::Relaxed);
    store.tier_sync(Which::All, &Silent).unwrap();
    assert_eq!((bucket.count(), store.tier_stat().unwrap().dead_packs), (0, 0));
}

#[test]
fn a_tier_that_does_not_answer_is_asked_once_and_not_for_each_pack() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket) = (folder.path().join("store"), Folder::new(&folder.path().join("bucket")));
    let store = open(&path, &bucket);
    for text in ["a", "b", "c"] {
        named_layer(&store, text, &[u64::from(text.as_bytes()[0])], 300_000);
        store.tier_sync(Which::All, &Silent).unwrap();
    }
    store.tier_evict(0, &Silent).unwrap();
    bucket.is_gone.store(true, Ordering::Relaxed);
    let asked = || bucket.asked.swap(0, Ordering::Relaxed);
    asked();
    let report = store.fsck(&Silent, FsckOptions { repair: true }).unwrap();
    let unread = report.problems.iter().filter(|problem| problem.kind == ProblemKind::PackUnreadable).count();
    assert_eq!((asked(), unread), (1, 3), "{report:#?}");
    for text in ["a", "b", "c"] {
        store.remove_name(&name(text)).unwrap();
    }
    assert_eq!(store.gc(&Silent, GcOptions::default()).unwrap().packs_removed, 3);
    assert_eq!((asked(), store.tier_stat().unwrap().dead_packs, bucket.count()), (1, 3, 3));
    bucket.is_gone.store(false, Ordering::Relaxed);
    store.tier_sync(Which::All, &Silent).unwrap();
    assert_eq!((asked(), store.tier_stat().unwrap().dead_packs, bucket.count()), (3, 0, 0));
}

#[test]
fn a_tier_that_is_gone_or_damaged_is_an_error_and_local_data_work() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket) = (folder.path().join("store"), Folder::new(&folder.path().join("bucket")));
    let store = open(&path, &bucket);
    let a = named_layer(&store, "a", &[1, 2, 3], 300_000);
    store.tier_sync(Which::All, &Silent).unwrap();
    store.tier_evict(0, &Silent).unwrap();
    let b = named_layer(&store, "b", &[4, 5], 300_000);
    bucket.is_gone.store(true, Ordering::Relaxed);
    let error = read_all(&store, a).unwrap_err();
    assert!(error.class() == ErrorClass::Network && error.errno() == libc::EIO, "{error}");
    // The next one doesn't wait for it again.
    let reads = bucket.reads.load(Ordering::Relaxed);
    assert!(read_all(&store, a).unwrap_err().to_string().contains("a moment ago"));
    assert_eq!(bucket.reads.load(Ordering::Relaxed), reads);
    read_all(&store, b).unwrap();
    // What can't be reached isn't forgotten by a repair.
    let report = store.fsck(&Silent, FsckOptions { repair: true }).unwrap();
    assert!(!report.is_clean());
    bucket.is_gone.store(false, Ordering::Relaxed);
    store.connect_tier(Some(bucket.clone()));
    read_all(&store, a).unwrap();
    assert_clean(&store);
    // Bytes that are wrong there are never taken.
    let object = std::fs::read_dir(bucket.path.join("packs")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&object).unwrap();
    bytes.iter_mut().skip(16).step_by(1000).for_each(|byte| *byte ^= 1);
    std::fs::write(&object, &bytes).unwrap();
    store.connect_tier(Some(bucket.clone()));
    drop(store);
    let store = open(&path, &bucket);
    assert_eq!(read_all(&store, a).unwrap_err().class(), ErrorClass::Corrupt);
    assert_eq!(store.tier_fetch(&Silent).unwrap_err().class(), ErrorClass::Corrupt);
    // An object that vanished is uploaded again rather than evicted.
    store.tier_sync(Which::All, &Silent).unwrap();
    let own = store.packs.list().unwrap()[0];
    let record = store.packs.tier().stored(own.0).unwrap();
    std::fs::remove_file(bucket.path.join(record.object())).unwrap();
    assert_eq!(store.tier_evict(0, &Silent).unwrap().packs, 0);
    assert_eq!(store.tier_sync(Which::All, &Silent).unwrap().packs, 1);
    read_all(&store, b).unwrap();
}

#[test]
fn a_lost_disk_comes_back_from_there() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket) = (folder.path().join("store"), Folder::new(&folder.path().join("bucket")));
    let store = open(&path, &bucket);
    let a = named_layer(&store, "a", &[1, 2, 3], 300_000);
    store.tier_sync(Which::All, &Silent).unwrap();
    let b = named_layer(&store, "b", &[4, 5], 300_000);
    store.tier_sync(Which::All, &Silent).unwrap();
    store.tier_evict(0, &Silent).unwrap();
    drop(store);
    // With the index whole, a rebuild without the tier keeps what is only there.
    let report = rebuild(&path, StoreOptions::create(), &Silent).unwrap();
    assert!(report.records_kept && report.chunks > 5, "{report:?}");
    assert_eq!((report.names, report.layers), (2, 2), "{report:?}");
    let store = open(&path, &bucket);
    read_all(&store, a).unwrap();
    drop(store);
    std::fs::remove_dir_all(&path).unwrap();
    drop(Store::open(&path, StoreOptions::create()).unwrap());
    let report = rebuild_from(&path, StoreOptions::create(), Some(bucket.clone()), &Silent).unwrap();
    assert_eq!((report.recovered.len(), report.packs), (2, 2), "{report:?}");
    assert_eq!((report.names, report.layers), (2, 2), "{report:?}");
    let store = open(&path, &bucket);
    assert_eq!(store.packs.list().unwrap(), []);
    assert!(read_all(&store, a).unwrap() > 0 && read_all(&store, b).unwrap() > 0);
    assert_clean(&store);
}

/// A store whose index is lost, with one layer only in the bucket and another only here.
fn half_there(folder: &Path) -> (PathBuf, Arc<Folder>, [LayerId; 2]) {
    let (path, bucket) = (folder.join("store"), Folder::new(&folder.join("bucket")));
    let store = open(&path, &bucket);
    let there = named_layer(&store, "there", &[1, 2, 3], 300_000);
    store.tier_sync(Which::All, &Silent).unwrap();
    store.tier_evict(0, &Silent).unwrap();
    let here = named_layer(&store, "here", &[4, 5], 300_000);
    drop(store);
    std::fs::write(path.join("index/CURRENT"), "rubbish").unwrap();
    (path, bucket, [there, here])
}

fn recovered(layer: LayerId) -> String {
    format!("recovered/{}", layer.0.short())
}

fn assert_both_are_kept(path: &Path, bucket: &Arc<Folder>, layers: [LayerId; 2]) {
    let store = open(path, bucket);
    let mut names = layers.map(recovered);
    names.sort_unstable();
    assert_eq!(names_of(&store), names);
    store.gc(&Silent, GcOptions::default()).unwrap();
    for layer in layers {
        assert!(read_all(&store, layer).unwrap() > 0);
    }
    assert_clean(&store);
}

#[test]
fn a_rebuild_in_two_steps_gives_all_layers_names() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket, [there, here]) = half_there(folder.path());
    let report = rebuild(&path, StoreOptions::create(), &Silent).unwrap();
    assert_eq!(report.recovered, [recovered(here)], "{report:?}");
    // What is known to be here isn't held up by what may be elsewhere.
    open(&path, &bucket).gc(&Silent, GcOptions::default()).unwrap();
    let report = rebuild_from(&path, StoreOptions::create(), Some(bucket.clone()), &Silent).unwrap();
    assert_eq!(report.recovered, [recovered(there)], "{report:?}");
    assert_both_are_kept(&path, &bucket, [there, here]);
}

#[test]
fn layers_in_the_tier_stay_without_it_after_a_rebuild_that_was_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket, [there, here]) = half_there(folder.path());
    let error = rebuild_from(&path, StoreOptions::create(), Some(bucket.clone()), &CutAt::new(NAMING)).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    // The pack in the tier is known by now, but its layers can't be looked at.
    let report = rebuild(&path, StoreOptions::create(), &Silent).unwrap();
    assert_eq!(report.recovered, [recovered(here)], "{report:?}");
    let error = open(&path, &bucket).gc(&Silent, GcOptions::default()).unwrap_err();
    assert!(error.class() == ErrorClass::Corrupt && error.to_string().contains("--tier"), "{error}");
    let checked = open(&path, &bucket).fsck(&Silent, FsckOptions::default()).unwrap();
    assert!(checked.problems.iter().any(|problem| problem.detail.contains("--tier")), "{checked:?}");
    let report = rebuild_from(&path, StoreOptions::create(), Some(bucket.clone()), &Silent).unwrap();
    assert_eq!(report.recovered, [recovered(there)], "{report:?}");
    assert_both_are_kept(&path, &bucket, [there, here]);
    let report = rebuild_from(&path, StoreOptions::create(), Some(bucket.clone()), &Silent).unwrap();
    assert!(report.recovered.is_empty(), "{report:?}");
}

#[test]
fn an_object_whose_number_is_taken_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket) = (folder.path().join("store"), Folder::new(&folder.path().join("bucket")));
    let store = open(&path, &bucket);
    named_layer(&store, "a", &[1, 2, 3], 300_000);
    store.tier_sync(Which::All, &Silent).unwrap();
    drop(store);
    std::fs::remove_dir_all(&path).unwrap();
    let store = Store::open(&path, StoreOptions::create()).unwrap();
    let b = named_layer(&store, "b", &[4], 300_000);
    drop(store);
    let report = rebuild_from(&path, StoreOptions::create(), Some(bucket.clone()), &Silent).unwrap();
    assert!(report.pack_problems.len() == 1 && report.pack_problems[0].contains("has its number"), "{report:?}");
    read_all(&open(&path, &bucket), b).unwrap();
}

#[test]
fn one_pack_that_is_damaged_does_not_keep_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket) = (folder.path().join("store"), Folder::new(&folder.path().join("bucket")));
    let store = open(&path, &bucket);
    let layers = [("a", &[1][..]), ("b", &[2, 3]), ("c", &[4, 5, 6])].map(|(text, seeds)| {
        let layer = named_layer(&store, text, seeds, 300_000);
        store.tier_sync(Which::All, &Silent).unwrap();
        layer
    });
    store.tier_evict(0, &Silent).unwrap();
    // Of the first pack there is less than there was, the second is gone.
    let packs = store.packs.remote().unwrap();
    let object = |at: usize| bucket.path.join(store.packs.tier().stored(packs[at].0).unwrap().object());
    std::fs::File::options().write(true).open(object(0)).unwrap().set_len(1000).unwrap();
    std::fs::remove_file(object(1)).unwrap();
    assert_eq!(store.tier_fetch(&Silent).unwrap_err().class(), ErrorClass::Corrupt);
    assert_eq!(store.packs.list().unwrap(), packs[2..]);
    bucket.is_gone.store(true, Ordering::Relaxed);
    read_all(&store, layers[2]).unwrap();
    bucket.is_gone.store(false, Ordering::Relaxed);
    // Here too: of a pack that can't be read, the others go up.
    std::fs::create_dir(store.packs.path(PackId(0))).unwrap();
    named_layer(&store, "d", &[7], 300_000);
    let stored = store.tier_stat().unwrap().stored_packs;
    assert!(matches!(store.tier_sync(Which::All, &Silent), Err(Error::File { .. })));
    assert_eq!(store.tier_stat().unwrap().stored_packs, stored + 1);
}

#[test]
fn a_bucket_that_keeps_all_gets_new_packs() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket) = (folder.path().join("store"), Folder::new(&folder.path().join("bucket")));
    let store = open(&path, &bucket);
    named_layer(&store, "a", &[1], 300_000);
    store.tier_sync(Which::All, &Silent).unwrap();
    bucket.keeps_all.store(true, Ordering::Relaxed);
    store.remove_name(&name("a")).unwrap();
    store.gc(&Silent, GcOptions::default()).unwrap();
    named_layer(&store, "b", &[2, 3], 300_000);
    assert_eq!(store.tier_sync(Which::All, &Silent).unwrap_err().class(), ErrorClass::Denied);
    let stat = store.tier_stat().unwrap();
    assert_eq!((stat.stored_packs, stat.local_packs, stat.dead_packs), (1, 0, 1));
}

#[test]
fn an_upload_that_was_cut_off_leaves_nothing_if_its_pack_has_changed() {
    let folder = tempfile::tempdir().unwrap();
    let (path, bucket) = (folder.path().join("store"), Folder::new(&folder.path().join("bucket")));
    let store = open(&path, &bucket);
    named_layer(&store, "a", &[1], 300_000);
    let pack = store.packs.list().unwrap()[0].0;
    let cut = Record { state: State::Uploading, hash: [7; 32], bytes: 4 };
    std::fs::write(bucket.path.join(cut.object()), "half").unwrap();
    store.packs.tier().set(pack, Some(cut)).unwrap();
    store.tier_sync(Which::All, &Silent).unwrap();
    assert_eq!((bucket.count(), store.tier_stat().unwrap().stored_packs), (1, 1));
}

/// Work that passes every step of the tier several times.
fn work(path: &Path, told: &Path) {
    use std::io::Write;
    let bucket = Folder::new(&path.with_extension("bucket"));
    let store = open(path, &bucket);
    let mut told = std::fs::File::options().create(true).append(true).open(told).unwrap();
    for round in 0..4u64 {
        let text = format!("r{round}");
        named_layer(&store, &text, &[round, round + 1], 400_000);
        writeln!(told, "{text}").unwrap();
        store.tier_sync(Which::All, &Silent).unwrap();
        store.tier_evict(0, &Silent).unwrap();
        if round > 0 {
            let text = format!("r{}", round - 1);
            writeln!(told, "-{text}").unwrap();
            store.remove_name(&name(&text)).unwrap();
            store.gc(&Silent, GcOptions::default()).unwrap();
        }
    }
}

#[test]
fn child() {
    let (Some(path), Ok(step)) = (std::env::var_os("LAYERFS_TEST_TIER"), std::env::var("LAYERFS_TEST_STEP")) else {
        return; // Only of use when the test below starts it.
    };
    let (step, nth) = step.split_once(':').unwrap();
    assert!(failpoint::arm(step, nth.parse().unwrap()));
    let path = Path::new(&path);
    work(path, &path.with_extension("told"));
}

#[test]
fn nothing_is_lost_by_a_crash_at_every_step() {
    for step in failpoint::NAMES.iter().filter(|step| step.starts_with("tier.")) {
        for nth in [1, 3] {
            let what = format!("{step}:{nth}");
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("store");
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "store::tests::tier::child", "--test-threads=1", "--quiet"])
                .env("LAYERFS_TEST_TIER", &path)
                .env("LAYERFS_TEST_STEP", &what)
                .stdout(std::process::Stdio::null())
                .status_locked()
                .unwrap();
            assert!(nth > 1 || status.signal() == Some(libc::SIGKILL), "{what} was not met: {status}");
            let bucket = Folder::new(&path.with_extension("bucket"));
            let store = open(&path, &bucket);
            let told = std::fs::read_to_string(path.with_extension("told")).unwrap();
            for text in told.lines().filter(|line| !line.starts_with('-')) {
                let record = store.name(&name(text)).unwrap();
                assert!(record.is_some() || told.contains(&format!("-{text}\n")), "{what}: {text} is gone");
                record.map(|record| read_all(&store, record.layer).unwrap());
            }
            assert_clean(&store);
            // What the crash left over there goes with the next run: each object has a live pack's record then.
            store.gc(&Silent, GcOptions::default()).unwrap();
            store.tier_sync(Which::All, &Silent).unwrap();
            store.tier_evict(0, &Silent).unwrap();
            assert_eq!(bucket.count() as u64, store.tier_stat().unwrap().stored_packs, "{what}");
            assert_eq!(store.packs.list().unwrap(), [], "{what}");
            for (_, record) in store.names().unwrap() {
                read_all(&store, record.layer).unwrap();
            }
        }
    }
}
