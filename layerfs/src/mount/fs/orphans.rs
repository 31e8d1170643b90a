//! Inodes without a name that the kernel has forgotten: their rows and their data go, some at a time, as a change of many costs hardly
//! more than a change of one.
//!
//! Invariants: an inode that is dropped here has no name, and the kernel doesn't know it, so nobody can come to it again; fewer
//! than [`AT_ONCE`] wait, none of them large, and none while the mount is idle, unless a seal goes on, or the disk is full; should the
//! daemon end before, whoever opens the upper next drops them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Fs;
use crate::id::Ino;
use crate::patience;
use crate::upper::table::{Change, Tables};
use crate::upper::{LARGE_BYTES, Upper};

/// So many go in one change: those who want to change something else wait for it.
const AT_ONCE: usize = 32;
/// The longest wait for that. A program may keep it from forgetting, for ever.
const FORGETS_IN: Duration = Duration::from_millis(20);
const LOOKS_EVERY: Duration = Duration::from_micros(200);

/// Those of one mount.
#[derive(Default)]
pub(super) struct Orphans {
    waiting: Mutex<Waiting>,
    /// Inodes that lost their last name and are still here, with their data.
    removed: Mutex<BTreeSet<Ino>>,
}

#[derive(Default)]
struct Waiting {
    inos: Vec<Ino>,
    /// Somebody says when the mount is idle.
    may_wait: bool,
}

impl Orphans {
    /// Adds one with `bytes` of data; returns those to drop now.
    fn put(&self, ino: Ino, bytes: u64) -> Vec<Ino> {
        let mut waiting = self.waiting.lock();
        waiting.inos.push(ino);
        if waiting.may_wait && waiting.inos.len() < AT_ONCE && bytes < LARGE_BYTES {
            return Vec::new();
        }
        std::mem::take(&mut waiting.inos)
    }

    /// Those that wait, from now on no more.
    fn take(&self) -> Vec<Ino> {
        std::mem::take(&mut self.waiting.lock().inos)
    }

    /// `ino`, which has data here, has just lost its last name.
    pub fn removed(&self, ino: Ino) {
        self.removed.lock().insert(ino);
    }

    /// The data of `ino` are no more, or nobody shall wait for that.
    pub fn gone(&self, ino: Ino) {
        self.removed.lock().remove(&ino);
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

    /// There is nothing to do just now: does what waits. While a seal goes on it does nothing, as whoever calls it would let
    /// others wait; the seal's end calls it too.
    pub fn idle(&self) {
        let (Some(upper), Some(_gate)) = (&self.upper, self.gate.try_read()) else { return };
        self.close_late();
        let waiting = self.orphans.take();
        if !waiting.is_empty() {
            self.drop_all(upper, &waiting);
        }
    }

    /// Drops those that wait; false if there are none.
    pub(super) fn drop_waiting(&self) -> bool {
        let Some(upper) = &self.upper else { return false };
        let waiting = self.orphans.take();
        if !waiting.is_empty() {
            let _gate = self.changes();
            self.drop_all(upper, &waiting);
        }
        !waiting.is_empty()
    }

    /// Somebody is about to write past us, who can't be given room once it lacks: where there is little, warm copies and what was removed
    /// go first. The kernel may have had this request taken before those that say what it has forgotten.
    pub(super) fn clear_the_way(&self, upper: &Upper) {
        upper.warm().keep_free();
        let is_any_removed = !self.orphans.removed.lock().is_empty();
        if !is_any_removed && !upper.has_removals() || upper.has_plenty() {
            return;
        }
        if is_any_removed {
            self.drop_waiting();
            self.await_forgets();
        }
        patience::waits();
        upper.free_removed();
    }

    /// Waits for the end of what was removed, but not for long; false if there is nothing.
    pub(super) fn await_removed(&self) -> bool {
        let is_any_removed = !self.orphans.removed.lock().is_empty();
        if is_any_removed {
            self.await_forgets();
        }
        is_any_removed
    }

    /// Waits until the kernel has forgotten what was removed, but not for long.
    fn await_forgets(&self) {
        let begun = Instant::now();
        while self.removed_and_closed().next().is_some() {
            if begun.elapsed() >= FORGETS_IN {
                self.removed_and_closed().for_each(|ino| self.orphans.gone(ino));
                return;
            }
            patience::waits();
            std::thread::sleep(LOOKS_EVERY);
        }
    }

    /// Those that the kernel should forget, if no program keeps it from that.
    fn removed_and_closed(&self) -> impl Iterator<Item = Ino> {
        let removed: Vec<Ino> = self.orphans.removed.lock().iter().copied().collect();
        removed.into_iter().filter(|ino| self.opens.get(*ino).is_none_or(|open| open.record.count == 0))
    }

    /// The kernel doesn't know `ino` any more: it is dropped, now or soon, if it has no name.
    pub(super) fn drop_if_orphan(&self, upper: &Upper, ino: Ino) {
        let state = self.state.read();
        let Some(orphan) = state.tables.inode(ino).filter(|inode| inode.inode.nlink == 0) else { return };
        let bytes = orphan.backed.map_or(0, |backed| backed.bytes);
        drop(state);
        let now = self.orphans.put(ino, bytes);
        if !now.is_empty() {
            let _gate = self.changes();
            self.drop_all(upper, &now);
        }
    }

    /// Drops the inodes that nobody can reach any more, because nobody has the mount any more: the kernel neither.
    pub fn drop_orphans(&self) {
        let Some(upper) = &self.upper else { return };
        let state = self.state.read();
        let orphans = state.tables.inodes().filter(|inode| inode.inode.nlink == 0).map(|inode| inode.inode.ino);
        let orphans: Vec<Ino> = orphans.collect();
        drop(state);
        // It doesn't know them any more, whether it said so or not.
        for ino in &orphans {
            self.lookups.take(*ino, u64::MAX);
        }
        for inos in orphans.chunks(AT_ONCE) {
            let _gate = self.changes();
            self.drop_all(upper, inos);
        }
    }

    /// Drops those of `inos` that have no name, and that the kernel hasn't come to know again. If that fails, the next opening of the upper
    /// does it. Whoever calls it holds seals back.
    fn drop_all(&self, upper: &Upper, inos: &[Ino]) {
        let mut state = self.state.write();
        // Those that had a name still when the kernel forgot them may have been looked up since.
        let is_forgotten = |ino: &Ino| is_orphan(&state.tables, *ino) && !self.lookups.is_known(*ino);
        let orphans: Vec<Ino> = inos.iter().copied().filter(is_forgotten).collect();
        let bytes = |ino: &Ino| state.tables.inode(*ino).and_then(|inode| Some(inode.backed?.bytes));
        let orphans: Vec<_> = orphans.into_iter().map(|ino| (ino, bytes(&ino))).collect();
        let mut change = Change::new();
        change.makes_room();
        orphans.iter().for_each(|(ino, _)| change.forget(*ino));
        let result = upper.commit(&mut state.tables, change);
        drop(state);
        match result {
            Ok(()) => orphans.into_iter().for_each(|(ino, bytes)| self.removed(upper, ino, bytes)),
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
        remove(1);
        assert!(fs.drop_waiting() && !fs.drop_waiting());
        assert_eq!(held(), before);
        remove(1);
        let large = make();
        fs.write(large, LARGE_BYTES, b"data", None).unwrap();
        fs.forget(large, 1);
        assert_eq!(held(), before, "who waits goes with what is large");
        fs.idle();
    }

    #[test]
    fn who_has_nothing_to_do_waits_for_no_seal() {
        let fs = empty_fs(store());
        fs.says_when_idle();
        let before = fs.upper_counts().0;
        let made = fs.make(Ino::ROOT, b"gone", libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
        fs.unlink(Ino::ROOT, b"gone").unwrap();
        fs.forget(made, 1);
        let (frozen, _) = fs.begin_seal().unwrap().freeze().unwrap();
        // The device's only reader calls it.
        fs.idle();
        drop(frozen);
        assert_eq!(fs.upper_counts().0, before, "the end of a seal leaves nothing");
    }

    #[test]
    fn who_opens_a_file_waits_briefly_for_what_the_kernel_forgets() {
        let fs = empty_fs(store());
        let upper = fs.upper().unwrap();
        let [made, other] = [b"a", b"b"].map(|name| {
            let made = fs.make(Ino::ROOT, name, libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
            fs.write(made, 0, b"data", None).unwrap();
            made
        });
        let awaited = || fs.removed_and_closed().collect::<Vec<_>>();
        fs.opened(made, libc::O_RDWR);
        fs.unlink(Ino::ROOT, b"a").unwrap();
        assert_eq!(awaited(), [], "somebody has it open");
        fs.release(made, libc::O_RDWR, false);
        fs.unlink(Ino::ROOT, b"b").unwrap();
        assert_eq!(awaited(), [made, other]);
        std::thread::scope(|scope| {
            scope.spawn(|| fs.forget(made, 1));
            fs.await_forgets();
        });
        assert_eq!(awaited(), [], "for one we don't wait any more");
        assert!(upper.data().stat(made).is_err() && upper.data().stat(other).is_ok());
        fs.forget(other, 1);
        assert!(upper.data().stat(other).is_err());
    }
    #[test]
    fn what_somebody_counts_on_goes_once_its_rows_removal_is_durable() {
        let fs = empty_fs(store());
        let upper = fs.upper().unwrap();
        let made = fs.make(Ino::ROOT, b"kept", libc::S_IFREG | 0o644, 0, 0, Caller::ROOT).unwrap().ino;
        fs.write(made, 0, b"data", None).unwrap();
        fs.fsync(made).unwrap();
        fs.unlink(Ino::ROOT, b"kept").unwrap();
        fs.forget(made, 1);
        assert_eq!(fs.orphans.removed.lock().len(), 0);
        assert!(upper.has_removals() && upper.data().stat(made).is_ok());
        assert!(upper.free_removed() && !upper.has_removals());
        assert!(upper.data().stat(made).is_err());
    }
}
