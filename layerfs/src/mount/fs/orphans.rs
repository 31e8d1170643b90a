//! Inodes without a name that the kernel has forgotten: their rows and their data go, some at a time, as a change of many costs hardly
//! more than a change of one.
//!
//! Invariants: an inode that is dropped here has no name, and the kernel doesn't know it, so nobody can come to it again; fewer
//! than [`AT_ONCE`] wait, and none while the mount is idle; should the daemon end before, whoever opens the upper next drops
//! them.

use parking_lot::Mutex;

use super::Fs;
use crate::id::Ino;
use crate::upper::Upper;
use crate::upper::table::{Change, Tables};

/// So many go in one change: those who want to change something else wait for it.
const AT_ONCE: usize = 32;

/// Those of one mount.
#[derive(Default)]
pub(super) struct Orphans {
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    inos: Vec<Ino>,
    /// Somebody says when the mount is idle.
    may_wait: bool,
}

impl Orphans {
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
        if is_orphan(&self.state.read().tables, ino) {
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
}
