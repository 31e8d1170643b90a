//! What was closed and can't be counted at once: it waits here until it can.
//!
//! Hides how often somebody looks. Invariant: what was put into a [`Queue`] is done before whoever empties it later goes on.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::id::Ino;

/// How often a file is looked at again.
const LOOKS: u32 = 10;

/// What waits, in order.
pub(super) struct Queue<T> {
    waiting: Mutex<VecDeque<T>>,
    count: AtomicUsize,
}

impl<T> Default for Queue<T> {
    fn default() -> Queue<T> {
        Queue { waiting: Mutex::default(), count: AtomicUsize::new(0) }
    }
}

impl<T> Queue<T> {
    pub fn put(&self, item: T) {
        self.waiting.lock().push_back(item);
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    /// Does `work` with each; when it returns, it has been done with all that were there before, by whomever.
    pub fn take_all(&self, mut work: impl FnMut(T)) {
        if self.count.load(Ordering::SeqCst) > 0 {
            let mut waiting = self.waiting.lock();
            while let Some(item) = waiting.pop_front() {
                work(item);
                self.count.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}

/// Files that programs closed while somebody had their data files still, perhaps only whoever was about to give them back: they
/// are looked at again after one request, two, four, and so on.
#[derive(Default)]
pub(super) struct Doubts {
    files: Mutex<HashMap<Ino, Doubt>>,
    count: AtomicUsize,
}

#[derive(Default)]
struct Doubt {
    looks: u32,
    left_out: u32,
}

impl Doubts {
    pub fn is_empty(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    pub fn add(&self, ino: Ino) {
        let mut files = self.files.lock();
        files.insert(ino, Doubt::default());
        self.count.store(files.len(), Ordering::Relaxed);
    }

    pub fn settle(&self, ino: Ino) {
        let mut files = self.files.lock();
        files.remove(&ino);
        self.count.store(files.len(), Ordering::Relaxed);
    }

    /// Those to look at now.
    pub fn due(&self) -> Vec<Ino> {
        let mut files = self.files.lock();
        let mut due = Vec::new();
        files.retain(|ino, doubt| {
            if doubt.left_out > 0 {
                doubt.left_out -= 1;
                return true;
            }
            due.push(*ino);
            doubt.left_out = 1 << doubt.looks;
            doubt.looks += 1;
            doubt.looks < LOOKS
        });
        self.count.store(files.len(), Ordering::Relaxed);
        due
    }
}
