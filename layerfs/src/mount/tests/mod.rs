//! Tests of mounts: against a reference with no kernel in the loop, and through real ones.

#![allow(clippy::print_stderr)] // a test that can't run says so

mod killed;
mod passed;
mod real;
#[path = "real.rs"]
#[allow(clippy::duplicate_mod)] // once for each transport
mod real_by_io_uring;
mod reference;
mod sealing;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use crate::id::{LayerName, UpperId};
use crate::manifest::LayerKind;
use crate::monitor::Silent;
use crate::mount::fs::Fs;
use crate::seal::{SealOptions, SealReport, seal};
use crate::store::{Expect, Store, StoreOptions};
use crate::upper::Upper;
use crate::view::View;

/// A store for all tests of this process that need no store of their own.
static STORE: LazyLock<(tempfile::TempDir, Arc<Store>)> = LazyLock::new(|| {
    let folder = tempfile::Builder::new().prefix("layerfs-mount-").tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
    // What is static isn't dropped.
    // SAFETY: the function may be called at the end: it removes files that nobody reads any more.
    #[allow(unsafe_code)]
    unsafe {
        libc::atexit(remove_store);
    }
    (folder, store)
});

extern "C" fn remove_store() {
    let _ = std::fs::remove_dir_all(STORE.0.path());
}

/// Stops others when it is dropped, also by a failure: else they would go on for ever, and fill the disk.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Whether `is_so` becomes true in that time.
fn within_seconds(seconds: u64, is_so: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(seconds) {
        if is_so() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

pub(crate) fn store() -> &'static Arc<Store> {
    &STORE.1
}

fn unique_name(prefix: &str) -> LayerName {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    LayerName::new(&format!("{prefix}-{number}")).unwrap()
}

pub(crate) fn empty_fs(store: &Arc<Store>) -> Fs {
    let view = Arc::new(View::empty(store.clone()));
    let (upper, tables) = Upper::create(store, &view, None).unwrap();
    Fs::writable(view, upper, tables)
}

fn reopen(store: &Arc<Store>, id: UpperId) -> Fs {
    let (upper, tables) = Upper::open(store, id).unwrap();
    let view = match upper.record().base {
        Some(base) => View::open(store, base).unwrap(),
        None => Arc::new(View::empty(store.clone())),
    };
    Fs::writable(view, upper, tables)
}

pub(crate) fn seal_fs(store: &Arc<Store>, fs: &Fs) -> SealReport {
    let options = SealOptions { name: unique_name("sealed"), expect: Expect::Absent, kind: LayerKind::Instance };
    seal(store, fs, &options, &Silent).unwrap()
}
