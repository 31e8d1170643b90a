//! Inodes without a name that the kernel has forgotten: their rows and their data go, some at a time, as a change of many costs hardly
//! more than a change of one. A thread of the mount's does it, while the next names are removed.
//!
//! Invariants: whoever finds no room waits until all have gone that are to go, and holds no lock then. An inode that is dropped here has no name, and the kernel doesn't know it, so nobody can come to it again; fewer
//! than [`AT_ONCE`] wait, and none while the mount is idle; should the daemon end before, whoever opens the upper next drops
//! them.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};
use parking_lot::{Condvar, Mutex};

use super::Fs;
use crate::id::Ino;
use crate::upper::Upper;
use crate::upper::table::{Change, Tables};

/// So many go in one change: those who want to change something else wait for it.
const AT_ONCE: usize = 32;
/// The most that are left to the thread: whoever comes with more drops them himself.
const LEFT_MAX: usize = 1024;

/// Those of one mount.
#[derive(Default)]
pub(super) struct Orphans {
    waiting: Mutex<Waiting>,
    left: Mutex<Left>,
    /// Nothing is left to the thread any more.
    are_gone: Condvar,
}

/// What the thread has to do.
#[derive(Default)]
struct Left {
    count: usize,
    jobs: Option<Sender<Ino>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Waiting {
    inos: Vec<Ino>,
    /// Somebody says when the mount is idle.
    may_wait: bool,
}

impl Orphans {
    /// Leaves one to the thread; false if there is none, or it has enough to do.
    fn leave(&self, ino: Ino) -> bool {
        let mut left = self.left.lock();
        let is_taken = left.count < LEFT_MAX && left.jobs.as_ref().is_some_and(|jobs| jobs.send(ino).is_ok());
        left.count += usize::from(is_taken);
        is_taken
    }

    /// Waits until nothing is left to the thread. Hold no lock.
    pub fn wait(&self) {
        let mut left = self.left.lock();
        while left.count > 0 {
            self.are_gone.wait(&mut left);
        }
    }

    /// Whether something is left to the thread.
    pub fn are_waiting(&self) -> bool {
        self.left.lock().count > 0
    }

    /// Adds one; returns those to drop now.
    fn put(&self, ino: Ino) -> Vec<Ino> {
        let mut waiting = self.waiting.lock();
        waiting.inos.push(ino);
        if waiting.may_wait && waiting.inos.len() < AT_ONCE {
            return Vec::new();
        }
        std::mem::take(&mut waiting.inos)
    }
}

fn is_orphan(tables: &Tables, ino: Ino) -> bool {
    tables.inode(ino).is_some_and(|inode| inode.inode.nlink == 0)
}

impl Fs {
    /// From now on what nobody can reach any more may wait until others go with it, or until [`Fs::idle`] is called: whoever says
    /// this calls that whenever there is nothing to do.
    pub fn says_when_idle(&self) {
        self.orphans.waiting.lock().may_wait = true;
    }

    /// From now on a thread drops what nobody can reach any more, until [`Fs::stop_dropping`].
    pub(in crate::mount) fn drop_apart(self: &Arc<Fs>) {
        let (send, receive) = unbounded();
        let fs = Arc::downgrade(self);
        match std::thread::Builder::new().name("layerfs-drop".to_owned()).spawn(move || drop_left(&fs, &receive)) {
            Ok(thread) => {
                let mut left = self.orphans.left.lock();
                (left.jobs, left.thread) = (Some(send), Some(thread));
            }
            Err(error) => tracing::warn!(%error, "cannot start a thread that removes data files"),
        }
    }

    /// Ends what [`Fs::drop_apart`] began, when all is done that was left to it.
    pub(in crate::mount) fn stop_dropping(&self) {
        let thread = {
            let mut left = self.orphans.left.lock();
            left.jobs = None;
            left.thread.take()
        };
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    /// There is nothing to do just now.
    pub fn idle(&self) {
        let Some(upper) = &self.upper else { return };
        let waiting = std::mem::take(&mut self.orphans.waiting.lock().inos);
        if !waiting.is_empty() {
            self.drop_all(upper, &waiting);
        }
    }

    /// The kernel doesn't know `ino` any more: it is dropped, now or soon, if it has no name.
    pub(super) fn drop_if_orphan(&self, upper: &Upper, ino: Ino) {
        if is_orphan(&self.state.read().tables, ino) && !self.orphans.leave(ino) {
            let now = self.orphans.put(ino);
            if !now.is_empty() {
                self.drop_all(upper, &now);
            }
        }
    }

    /// Drops the inodes that nobody can reach any more, because nobody has the mount any more.
    pub fn drop_orphans(&self) {
        let Some(upper) = &self.upper else { return };
        let state = self.state.read();
        let orphans = state.tables.inodes().filter(|inode| inode.inode.nlink == 0).map(|inode| inode.inode.ino);
        let orphans: Vec<Ino> = orphans.collect();
        drop(state);
        orphans.chunks(AT_ONCE).for_each(|inos| self.drop_all(upper, inos));
    }

    /// Drops those of `inos` that have no name. If that fails, the next opening of the upper does it.
    fn drop_all(&self, upper: &Upper, inos: &[Ino]) {
        let _gate = self.changes();
        let mut state = self.state.write();
        let orphans: Vec<Ino> = inos.iter().copied().filter(|ino| is_orphan(&state.tables, *ino)).collect();
        let mut change = Change::new();
        change.makes_room();
        orphans.iter().for_each(|ino| change.forget(*ino));
        let result = upper.commit(&mut state.tables, change);
        drop(state);
        match result {
            Ok(()) => orphans.into_iter().for_each(|ino| self.removed(upper, ino)),
            Err(error) => tracing::warn!(count = orphans.len(), %error, "cannot drop unlinked inodes now"),
        }
    }
}

fn drop_left(fs: &Weak<Fs>, jobs: &Receiver<Ino>) {
    while let Ok(first) = jobs.recv() {
        let inos: Vec<Ino> = std::iter::once(first).chain(jobs.try_iter().take(AT_ONCE - 1)).collect();
        let Some(fs) = fs.upgrade() else { return };
        if let Some(upper) = &fs.upper {
            fs.drop_all(upper, &inos);
        }
        let mut left = fs.orphans.left.lock();
        left.count -= inos.len();
        if left.count == 0 {
            fs.orphans.are_gone.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::caller::Caller;
    use crate::mount::tests::{empty_fs, store};

    #[test]
    fn removed_files_go_together_and_when_there_is_nothing_to_do() {
        let fs = empty_fs(store());
        let make = || {
            let made = fs.make(Ino::ROOT, b"gone", libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
            fs.write(made, 0, b"data", None).unwrap();
            fs.unlink(Ino::ROOT, b"gone").unwrap();
            made
        };
        let remove = |count| (0..count).for_each(|_| fs.forget(make(), 1));
        let held = || fs.upper_counts().0 as usize;
        let before = held();
        remove(1);
        assert_eq!(held(), before, "nobody says when it is idle");
        fs.says_when_idle();
        remove(AT_ONCE - 1);
        assert_eq!(held(), before + AT_ONCE - 1);
        remove(1);
        assert_eq!(held(), before);
        let in_use = make();
        remove(3);
        fs.idle();
        assert_eq!(held(), before + 1, "what somebody has in use stays");
        fs.forget(in_use, 1);
        remove(1);
        fs.drop_orphans();
        assert_eq!(held(), before);
        fs.idle();
    }

    #[test]
    fn a_thread_drops_them_and_whoever_needs_the_room_waits_for_it() {
        let fs = Arc::new(empty_fs(store()));
        let remove = |count| {
            for _ in 0..count {
                let made = fs.make(Ino::ROOT, b"gone", libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
                fs.write(made, 0, b"data", None).unwrap();
                fs.unlink(Ino::ROOT, b"gone").unwrap();
                fs.forget(made, 1);
            }
        };
        let held = || (fs.upper_counts().0, fs.upper().unwrap().data().inos().unwrap().len());
        let before = held();
        fs.drop_apart();
        // It waits for its turn to change something: meanwhile there are more than it is left.
        let seal = fs.gate.write();
        let waits = std::thread::scope(|scope| {
            let inos: Vec<Ino> = (0..LEFT_MAX as u64).map(|number| Ino(1 << 40 | number)).collect();
            assert!(inos.iter().all(|ino| fs.orphans.leave(*ino)) && !fs.orphans.leave(Ino(1 << 41)));
            let waiter = scope.spawn(|| fs.orphans.wait());
            assert!(fs.orphans.are_waiting() && !waiter.is_finished());
            drop(seal);
            waiter.join()
        });
        assert!(waits.is_ok() && !fs.orphans.are_waiting());
        remove(3 * AT_ONCE);
        fs.orphans.wait();
        assert_eq!(held(), before);
        remove(AT_ONCE);
        fs.stop_dropping();
        assert_eq!(held(), before, "it ended before it had dropped all");
        remove(1);
        assert_eq!(held(), before, "nothing drops them any more");
    }
}
