//! What was closed and can't be counted at once: it waits here until it can.
//!
//! Hides how often somebody looks. Invariant: what was put into a [`Queue`] is done before whoever empties it later goes on.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::id::Ino;

/// Two to this are the most requests between two looks at a file.
const RAREST: u32 = 10;

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
/// are looked at again after one request, two, four, and so on, up to a thousand: they may be mapped for long.
pub(super) struct Doubts {
    /// Files, and after how many requests each is looked at.
    files: Mutex<HashMap<Ino, Doubt>>,
    requests: AtomicU64,
    /// The least of those numbers of requests.
    next: AtomicU64,
}

#[derive(Default)]
struct Doubt {
    looks: u32,
    due: u64,
}

impl Default for Doubts {
    fn default() -> Doubts {
        Doubts { files: Mutex::default(), requests: AtomicU64::new(0), next: AtomicU64::new(u64::MAX) }
    }
}

impl Doubts {
    fn plan(&self, files: &HashMap<Ino, Doubt>) {
        let next = files.values().map(|doubt| doubt.due).min();
        self.next.store(next.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub fn add(&self, ino: Ino) {
        let mut files = self.files.lock();
        files.insert(ino, Doubt::default());
        self.next.store(0, Ordering::Relaxed);
    }

    pub fn settle(&self, ino: Ino) {
        let mut files = self.files.lock();
        files.remove(&ino);
        self.plan(&files);
    }

    /// Counts a request. Those to look at now; what it costs when there are none at all is nothing.
    pub fn due(&self) -> Vec<Ino> {
        let next = self.next.load(Ordering::Relaxed);
        if next == u64::MAX {
            return Vec::new();
        }
        let now = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        if now < next {
            return Vec::new();
        }
        let mut files = self.files.lock();
        let mut due = Vec::new();
        for (ino, doubt) in files.iter_mut().filter(|(_, doubt)| doubt.due <= now) {
            due.push(*ino);
            // Multiples of the step, so that many files are looked at together.
            let step = 1 << doubt.looks;
            doubt.due = (now / step + 1) * step;
            doubt.looks = (doubt.looks + 1).min(RAREST);
        }
        self.plan(&files);
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_in_doubt_are_looked_at_ever_more_rarely_and_never_forgotten() {
        let doubts = Doubts::default();
        assert!(doubts.due().is_empty());
        doubts.add(Ino(7));
        let looks = (0..5000).filter(|_| doubts.due() == [Ino(7)]).count();
        assert!((12..=16).contains(&looks), "{looks} looks");
        assert!((0..1024).any(|_| doubts.due() == [Ino(7)]), "it was forgotten");
        doubts.add(Ino(8));
        assert_eq!(doubts.due(), [Ino(8)], "a new one waits for the old");
        doubts.settle(Ino(7));
        doubts.settle(Ino(8));
        assert!((0..5000).all(|_| doubts.due().is_empty()));
    }
}
