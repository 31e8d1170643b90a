//! Seals while files are written to.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use super::*;
use crate::id::Ino;
use crate::monitor::Monitor;
use crate::mount::caller::Caller;
use crate::store::GcOptions;

const BYTES: usize = 300_000;

fn bytes_of(view: &View, name: &[u8]) -> Vec<u8> {
    let (ino, _) = view.lookup(Ino::ROOT, name).unwrap().unwrap();
    let mut bytes = vec![0; BYTES];
    assert_eq!(view.read_at(ino, 0, &mut bytes).unwrap(), BYTES);
    bytes
}

/// A writer fills `first` and then `second` with the next number, each with one write: a layer that is the tree at one
/// instant has whole writes, and `second` is at most one behind. So for files that are copied up whole, and by range.
#[test]
fn a_layer_is_the_tree_at_one_instant() {
    for ranges_from in [u64::MAX, 1] {
        let fs = empty_fs(store()).with_ranges_from(ranges_from);
        let make = |name: &[u8]| fs.make(Ino::ROOT, name, libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
        let (first, second) = (make(b"first"), make(b"second"));
        let (rounds, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let _stops = Stops(&stop);
            let writer = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let round = rounds.load(Ordering::Relaxed) + 1;
                    for ino in [first, second] {
                        assert_eq!(fs.write(ino, 0, &[round as u8; BYTES], None).unwrap().bytes, BYTES);
                    }
                    rounds.store(round, Ordering::Relaxed);
                }
            });
            for _ in 0..15 {
                // Something has changed since the last one, and is being changed.
                let before = rounds.load(Ordering::Relaxed);
                while rounds.load(Ordering::Relaxed) < before + 2 && !writer.is_finished() {
                    std::thread::yield_now();
                }
                let report = seal_fs(store(), &fs);
                let view = View::open(store(), report.layer).unwrap();
                let (one, other) = (bytes_of(&view, b"first"), bytes_of(&view, b"second"));
                assert!(one.iter().all(|byte| *byte == one[0]), "half of a write is in the layer");
                assert!(other.iter().all(|byte| *byte == other[0]), "half of a write is in the layer");
                assert!(one[0].wrapping_sub(other[0]) <= 1, "{} and {}: of different instants", one[0], other[0]);
            }
        });
    }
}

#[test]
fn what_waits_for_a_seal_names_itself() {
    use std::time::Duration;
    let fs = empty_fs(store());
    let make =
        |folder: Ino, name: &[u8], kind: u32| fs.make(folder, name, kind | 0o755, 0, 0, Caller::ROOT).unwrap().ino;
    let outer = make(Ino::ROOT, b"outer", libc::S_IFDIR);
    seal_fs(store(), &fs);
    let inner = make(outer, b"inner", libc::S_IFDIR);
    let (frozen, _) = fs.begin_seal().unwrap().freeze().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| make(inner, b"n\new", libc::S_IFREG));
        while fs.running(Duration::ZERO, false).is_empty() {
            std::thread::yield_now();
        }
        let running = fs.running(Duration::ZERO, true);
        assert_eq!((running.len(), running[0].op.as_str()), (1, "make"));
        assert_eq!(running[0].what, "/outer/inner/n\\new");
        assert!(fs.running(Duration::ZERO, true).is_empty(), "it is told of once");
        drop(frozen);
        waiting.join().unwrap();
    });
    assert!(fs.running(Duration::ZERO, false).is_empty());
    let made = fs.activity().ops.into_iter().find(|count| count.op.as_str() == "make").unwrap();
    assert_eq!(made.count, 3);
}

#[test]
fn what_was_read_ahead_is_not_read_again_and_removed_files_do_no_harm() {
    let fs = empty_fs(store());
    let make = |name: &[u8]| fs.make(Ino::ROOT, name, libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
    let kept = make(b"kept");
    fs.write(kept, 0, &[1; BYTES], None).unwrap();
    assert_eq!(seal_fs(store(), &fs).read_bytes, BYTES as u64);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stops = Stops(&stop);
        let churn = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let gone = make(b"gone");
                fs.write(gone, 0, &[2; 10_000], None).unwrap();
                fs.setattr(gone, crate::mount::fs::SetAttr { size: Some(0), ..Default::default() }, Caller::ROOT)
                    .unwrap();
                fs.unlink(Ino::ROOT, b"gone").unwrap();
                fs.forget(gone, 1);
            }
        });
        for _ in 0..30 {
            seal_fs(store(), &fs);
        }
        drop(stops);
        churn.join().unwrap();
    });
    assert_eq!(bytes_of(&fs.view(), b"kept"), [1; BYTES]);
}

/// The seal takes the data file away, and the next write makes another, which may have holes where sealed bytes show through.
#[test]
fn who_reads_and_seeks_during_seals_finds_the_file() {
    for ranges_from in [u64::MAX, 1] {
        let fs = empty_fs(store()).with_ranges_from(ranges_from);
        let file = fs.make(Ino::ROOT, b"file", libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
        fs.write(file, 0, &[1; BYTES], None).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stops = Stops(&stop);
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut bytes = vec![0; BYTES];
                    while !stop.load(Ordering::Relaxed) {
                        assert_eq!((fs.seek(file, 0, true), fs.seek(file, 0, false)), (Ok(0), Ok(BYTES as u64)));
                        assert_eq!(fs.read(file, 0, &mut bytes), Ok(BYTES));
                        assert!(bytes.iter().all(|byte| *byte == 1));
                    }
                });
            }
            for round in 0..30 {
                fs.write(file, round * 1000, &[1; 10], None).unwrap();
                seal_fs(store(), &fs);
            }
            drop(stops);
        });
    }
}

/// Holds a collection up while it marks.
struct HoldsMarking {
    is_marking: AtomicBool,
    /// Whether it has come there, and whether it may go on.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl HoldsMarking {
    fn new() -> HoldsMarking {
        HoldsMarking { is_marking: AtomicBool::new(false), state: Mutex::default(), changed: Condvar::new() }
    }

    fn wait_until_it_is_there(&self) {
        let mut state = self.state.lock();
        self.changed.wait_while(&mut state, |(is_there, _)| !*is_there);
    }

    fn let_go(&self) {
        self.state.lock().1 = true;
        self.changed.notify_all();
    }
}

impl Monitor for HoldsMarking {
    fn phase(&self, name: &str, _: Option<u64>) {
        self.is_marking.store(name == "marking", Ordering::Relaxed);
    }
    fn advance(&self, _: u64) {}
    fn items(&self, _: u64) {}
    fn warn(&self, _: &str) {}
    fn is_cancelled(&self) -> bool {
        if self.is_marking.load(Ordering::Relaxed) {
            let mut state = self.state.lock();
            state.0 = true;
            self.changed.notify_all();
            self.changed.wait_while(&mut state, |(_, may_go_on)| !*may_go_on);
        }
        false
    }
}

#[test]
fn a_seal_waits_for_no_collection_that_marks() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
    let fs = empty_fs(&store);
    let make = |name: &[u8]| {
        let ino = fs.make(Ino::ROOT, name, libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
        fs.write(ino, 0, &[7; BYTES], None).unwrap();
    };
    make(b"first");
    seal_fs(&store, &fs);
    make(b"second");
    let (gate, done) = (HoldsMarking::new(), AtomicBool::new(false));
    let report = std::thread::scope(|scope| {
        let collection = scope.spawn(|| store.gc(&gate, GcOptions::default()));
        gate.wait_until_it_is_there();
        let sealing = scope.spawn(|| {
            let report = seal_fs(&store, &fs);
            done.store(true, Ordering::Relaxed);
            report
        });
        let was_done = within_seconds(60, || done.load(Ordering::Relaxed));
        gate.let_go();
        collection.join().unwrap().unwrap();
        assert!(was_done, "the seal went on only when the collection did");
        sealing.join().unwrap()
    });
    // What came while it marked stays.
    store.gc(&Silent, GcOptions::default()).unwrap();
    store.check_stack(report.layer).unwrap();
    let view = View::open(&store, report.layer).unwrap();
    assert_eq!((bytes_of(&view, b"first"), bytes_of(&view, b"second")), (vec![7; BYTES], vec![7; BYTES]));
}
