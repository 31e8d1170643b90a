//! Data files that are to go, and the order in which a change reaches the disk.
//!
//! The host's filesystem makes an unlinked file's end durable within seconds, the database's log its rows when somebody syncs. So
//! that no row comes back without its file, a file that somebody counts on waits here until the removal of its row is durable: for a
//! sync that others ask for, or for ours, [`DELAY`] later, which many share. Invariants: a file is put here after its row's removal was
//! written, and nobody comes to it by its inode any more; who makes another of a number that can come back waits until it has gone
//! ([`Removals::clear`]); what is left here when the process ends the next opening removes.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::Result;
use crate::id::Ino;
use crate::patience;
use crate::store::Store;
use crate::upper::data::DataFolder;

/// How long the first that is put here waits for others, and the last for somebody's sync.
const DELAY: Duration = Duration::from_secs(1);
/// So many bytes, or files, don't wait.
const MANY_BYTES: u64 = 64 << 20;
const MANY_FILES: usize = 8192;

/// Those of one upper.
pub(super) struct Removals {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    store: Arc<Store>,
    data: Arc<DataFolder>,
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Held by whoever unlinks. What he takes stays in the queue until it has gone, so that others wait for him.
    unlinking: Mutex<()>,
}

#[derive(Default)]
struct Queue {
    /// With about what each takes, in bytes.
    files: VecDeque<(Ino, u64)>,
    /// Those of them whose inodes a sealed layer has, so that there may be another file of that number.
    sealed: HashSet<Ino>,
    /// How many were ever put here before the first of these.
    taken: u64,
    /// The removal of the rows of so many, counted likewise, is durable.
    durable: u64,
    /// What all of them take.
    bytes: u64,
    /// When the thread is to do something; none if there is no thread.
    due: Option<Instant>,
    is_ending: bool,
}

impl Queue {
    /// How many were ever put here.
    fn put(&self) -> u64 {
        self.taken + self.files.len() as u64
    }

    fn add(&mut self, ino: Ino, bytes: u64) {
        // A sparse file may have any length.
        let bytes = bytes.min(MANY_BYTES);
        self.files.push_back((ino, bytes));
        self.bytes += bytes;
    }

    fn is_long(&self) -> bool {
        self.bytes >= MANY_BYTES || self.files.len() >= MANY_FILES
    }

    /// Those that can go, the first ones.
    fn durable(&self) -> Vec<Ino> {
        let count = (self.durable.saturating_sub(self.taken) as usize).min(self.files.len());
        self.files.iter().take(count).map(|(ino, _)| *ino).collect()
    }

    /// The first `count` have gone.
    fn gone(&mut self, count: usize) {
        self.taken += count as u64;
        for (ino, bytes) in self.files.drain(..count) {
            self.bytes -= bytes;
            self.sealed.remove(&ino);
        }
    }
}

impl Removals {
    pub fn new(store: Arc<Store>, data: Arc<DataFolder>) -> Removals {
        let shared = Shared { store, data, queue: Mutex::default(), wake: Condvar::new(), unlinking: Mutex::default() };
        Removals { shared: Arc::new(shared), thread: Mutex::default() }
    }

    /// The data file of `ino`, of `bytes` bytes, goes once it is durable that its row has gone. `is_sealed`: a sealed layer has the inode.
    pub fn put(&self, ino: Ino, bytes: u64, is_sealed: bool) {
        let mut queue = self.shared.queue.lock();
        queue.add(ino, bytes);
        if is_sealed {
            queue.sealed.insert(ino);
        }
        let is_long = queue.is_long();
        let has_thread = queue.due.is_some();
        if is_long || !has_thread {
            queue.due = Some(Instant::now() + if is_long { Duration::ZERO } else { DELAY });
        }
        drop(queue);
        match has_thread {
            true if is_long => drop(self.shared.wake.notify_one()),
            true => {}
            false => self.begin(),
        }
    }

    fn begin(&self) {
        let mut thread = self.thread.lock();
        if let Some(ended) = thread.take() {
            let _ = ended.join();
        }
        let shared = self.shared.clone();
        match std::thread::Builder::new().name("removals".to_owned()).spawn(move || shared.work()) {
            Ok(begun) => *thread = Some(begun),
            Err(error) => {
                tracing::warn!(%error, "no thread for removing data files: the next removal tries again");
                self.shared.queue.lock().due = None;
            }
        }
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.shared.queue.lock().files.is_empty()
    }

    /// Nobody shall wait for long for the room that they have.
    pub fn hurry(&self) {
        let mut queue = self.shared.queue.lock();
        if queue.due.is_some() {
            queue.due = Some(Instant::now());
            self.shared.wake.notify_one();
        }
    }

    /// There is to be another data file of `ino`: the one that waits here goes first.
    ///
    /// # Errors
    /// Those of the disk; it is here still then.
    pub fn clear(&self, ino: Ino) -> Result<()> {
        if !self.shared.queue.lock().sealed.contains(&ino) {
            return Ok(());
        }
        patience::waits();
        self.shared.flush()
    }

    /// They go now, or have gone when this returns. False if there were none.
    pub fn flush(&self) -> bool {
        !self.is_empty() && self.shared.flush().is_ok()
    }

    /// Makes durable everything that was written to the rows, the bytes that names depend on before.
    pub fn sync(&self) -> Result<()> {
        self.shared.sync()
    }
}

impl Drop for Removals {
    fn drop(&mut self) {
        self.shared.queue.lock().is_ending = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.get_mut().take() {
            let _ = thread.join();
        }
        self.flush();
    }
}

impl Shared {
    fn sync(&self) -> Result<()> {
        let put = self.queue.lock().put();
        self.data.sync_folder()?;
        self.store.db().sync()?;
        let mut queue = self.queue.lock();
        queue.durable = queue.durable.max(put);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let _unlinking = self.unlinking.lock();
        let needs_sync = {
            let queue = self.queue.lock();
            queue.durable < queue.put()
        };
        let synced = if needs_sync { self.sync() } else { Ok(()) };
        let files = self.queue.lock().durable();
        files.iter().for_each(|ino| self.data.unlink(*ino));
        self.queue.lock().gone(files.len());
        synced
    }

    /// What the thread does: it ends when nothing waits.
    fn work(&self) {
        let mut queue = self.queue.lock();
        while let Some(due) = queue.due.filter(|_| !queue.is_ending) {
            if Instant::now() < due {
                self.wake.wait_until(&mut queue, due);
                continue;
            }
            drop(queue);
            if let Err(error) = self.flush() {
                tracing::warn!(%error, "removed files take room still: it can't be made durable that they are gone");
            }
            queue = self.queue.lock();
            if queue.files.is_empty() {
                queue.due = None;
            } else if queue.due == Some(due) {
                queue.due = Some(Instant::now() + DELAY);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_is_what_a_sync_has_covered() {
        let mut queue = Queue::default();
        let put = |queue: &mut Queue, inos: &[u64]| inos.iter().for_each(|ino| queue.add(Ino(*ino), MANY_BYTES / 2));
        let take = |queue: &mut Queue| {
            let files = queue.durable();
            queue.gone(files.len());
            files
        };
        put(&mut queue, &[1, 2, 3]);
        queue.sealed.insert(Ino(1));
        assert_eq!(take(&mut queue), []);
        queue.durable = 1;
        assert!(queue.durable() == [Ino(1)] && queue.sealed.contains(&Ino(1)) && !queue.files.is_empty());
        assert_eq!(take(&mut queue), [Ino(1)]);
        assert!(queue.sealed.is_empty());
        assert!(queue.is_long() && queue.put() == 3);
        queue.durable = 2;
        assert_eq!(take(&mut queue), [Ino(2)]);
        assert!(!queue.is_long(), "only what waits counts");
        put(&mut queue, &[4]);
        queue.durable = queue.put();
        put(&mut queue, &[5]);
        assert_eq!(take(&mut queue), [Ino(3), Ino(4)]);
        queue.durable = 100;
        assert_eq!(take(&mut queue), [Ino(5)]);
        queue.add(Ino(6), u64::MAX);
        queue.add(Ino(7), u64::MAX);
        assert!(queue.is_long());
    }
}
