//! Which data files hold what somebody counts on after the machine was lost, and which ones do soon.
//!
//! Hides how long a file counts as new. Invariants: a file that isn't *kept* was made less than [`NEW_FOR`] ago, and nobody has
//! synced it or put it in another's place since: a lost machine may leave it empty, as any filesystem that allocates late does. A
//! sync of the database makes the bytes of the files durable that are *owed* when it begins, and the names after them.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::id::Ino;
use crate::upper::table::Stamp;

/// After so long the kernel has begun to write what nobody synced: a file that is older is taken to be on the disk.
const NEW_FOR: Duration = Duration::from_secs(30);

/// Those of one upper.
#[derive(Debug)]
pub(super) struct Promises {
    ages: Mutex<Ages>,
    /// Data files that replace another's, whose bytes may not be on the disk yet.
    owed: Mutex<HashSet<Ino>>,
    /// So may others be, of which a daemon that died knew.
    owes_more: AtomicBool,
    /// Files that were emptied, and that nobody who writes to them has closed since.
    emptied: Mutex<HashSet<Ino>>,
    has_emptied: AtomicBool,
}

#[derive(Debug)]
struct Ages {
    /// When the next new inode was to have that number: the later one is half as old as a new file may be, at most.
    marks: [(Instant, Ino); 2],
    /// New files that are kept all the same; with the data file's stamp when it was synced last, if it was.
    kept: HashMap<Ino, Option<Stamp>>,
}

impl Ages {
    /// Inodes from the one that this returns on are new. `next` is the next one's number.
    fn new_from(&mut self, next: Ino, now: Instant) -> Ino {
        let [older, later] = self.marks;
        if now.duration_since(later.0) > NEW_FOR {
            self.marks = [(now, next); 2];
        } else if now.duration_since(later.0) > NEW_FOR / 2 || now.duration_since(older.0) > NEW_FOR {
            self.marks = [later, (now, next)];
        } else {
            return older.1;
        }
        let from = self.marks[0].1;
        self.kept.retain(|ino, _| *ino >= from);
        from
    }
}

impl Promises {
    /// Of an upper whose next new inode has number `next`: nothing that is there is new.
    pub fn new(next: Ino) -> Promises {
        Promises {
            ages: Mutex::new(Ages { marks: [(Instant::now(), next); 2], kept: HashMap::new() }),
            owed: Mutex::default(),
            owes_more: AtomicBool::new(false),
            emptied: Mutex::default(),
            has_emptied: AtomicBool::new(false),
        }
    }

    /// Whether somebody may count on the bytes of `ino`. `next` is the number of the next new inode.
    pub fn is_kept(&self, ino: Ino, next: Ino) -> bool {
        let mut ages = self.ages.lock();
        ino < ages.new_from(next, Instant::now()) || ages.kept.contains_key(&ino)
    }

    /// Somebody counts on the bytes of `ino` from now on; `synced`: on those that it had with that stamp.
    pub fn keep(&self, ino: Ino, synced: Option<Stamp>) {
        self.ages.lock().kept.insert(ino, synced);
    }

    /// The stamp of `ino` when it was synced last, if that is known.
    pub fn synced(&self, ino: Ino) -> Option<Stamp> {
        self.ages.lock().kept.get(&ino).copied().flatten()
    }

    /// Forgets what is old; `next` is the number of the next new inode.
    pub fn age(&self, next: Ino) {
        self.ages.lock().new_from(next, Instant::now());
    }

    /// The bytes of `ino` are owed, from before its name is changed.
    pub fn owe(&self, ino: Ino) {
        self.keep(ino, None);
        self.owed.lock().insert(ino);
    }

    /// A daemon that died may have owed the bytes of any files.
    pub fn owe_more(&self) {
        self.owes_more.store(true, Ordering::Release);
    }

    /// What is owed, and whether more may be than is known, for whoever makes it durable.
    pub fn take_owed(&self) -> (HashSet<Ino>, bool) {
        let owed = std::mem::take(&mut *self.owed.lock());
        (owed, self.owes_more.swap(false, Ordering::AcqRel))
    }

    /// `ino` was made empty, and had bytes before.
    pub fn emptied(&self, ino: Ino) {
        self.emptied.lock().insert(ino);
        self.has_emptied.store(true, Ordering::Release);
    }

    /// Somebody who wrote to `ino` closes it: whether it was emptied before.
    pub fn take_emptied(&self, ino: Ino) -> bool {
        if !self.has_emptied.load(Ordering::Acquire) {
            return false;
        }
        let mut emptied = self.emptied.lock();
        let was = emptied.remove(&ino);
        if emptied.is_empty() {
            self.has_emptied.store(false, Ordering::Release);
        }
        was
    }

    /// There is no `ino` any more.
    pub fn gone(&self, ino: Ino) {
        self.owed.lock().remove(&ino);
        self.take_emptied(ino);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_new_for_half_a_minute_at_most_and_until_somebody_counts_on_it() {
        let promises = Promises::new(Ino(10));
        let begun = promises.ages.lock().marks[0].0;
        let new_from = |next, seconds| promises.ages.lock().new_from(Ino(next), begun + Duration::from_secs(seconds));
        assert!(promises.is_kept(Ino(9), Ino(12)) && !promises.is_kept(Ino(10), Ino(12)));
        promises.keep(Ino(10), None);
        promises.keep(Ino(21), None);
        assert!(promises.is_kept(Ino(10), Ino(12)) && promises.is_kept(Ino(21), Ino(30)));
        assert_eq!(new_from(20, 15), Ino(10));
        assert_eq!(new_from(20, 16), Ino(10), "16 s are less than the limit");
        assert_eq!(new_from(30, 30), Ino(10));
        assert_eq!(new_from(30, 32), Ino(20));
        assert_eq!(promises.ages.lock().kept.keys().collect::<Vec<_>>(), [&Ino(21)], "the old one is kept anyway");
        assert_eq!(new_from(50, 80), Ino(50), "nobody asked for long");
    }

    #[test]
    fn what_is_owed_is_taken_once_and_not_when_it_is_gone() {
        let promises = Promises::new(Ino(10));
        promises.owe(Ino(11));
        promises.owe(Ino(12));
        promises.gone(Ino(12));
        assert_eq!(promises.take_owed().0, HashSet::from([Ino(11)]));
        assert!(promises.take_owed().0.is_empty() && promises.is_kept(Ino(11), Ino(13)));
        promises.owe_more();
        assert!(promises.take_owed().1 && !promises.take_owed().1);
        promises.emptied(Ino(11));
        assert!(!promises.take_emptied(Ino(12)));
        assert!(promises.take_emptied(Ino(11)) && !promises.take_emptied(Ino(11)));
    }
}
