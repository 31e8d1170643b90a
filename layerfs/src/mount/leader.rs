//! Who of a mount's threads reads the device: one at a time, the *leader*, who also serves what it has read.
//!
//! The kernel queues what was done in order; one reader at a time, who serves what must be counted in order before it reads on, keeps
//! it so. And nobody is woken for a request that is soon done. The others are *followers*. Before the leader does what may take long
//! it gives the role away ([`Role::give`]). One follower is the *deputy*: while something is served he looks every
//! millisecond whether the leader has got stuck, on a disk or a lock that nobody foresaw, and takes the role then. When nothing comes
//! all sleep.
//!
//! Who waits for the end of a seal, or for who may do so, *stands aside*: it isn't counted, and another thread is made for it if need be.
//! Else as many programs that change something as there are threads would keep all others from reading, and the seal from a writer whose
//! bytes are read from here. So may 256 threads; others that wait count as busy.
//!
//! Invariants: one thread at most reads; as long as fewer than `limit` threads are busy, but for those aside, somebody reads or is about
//! to.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// What the deputy waits between two looks: the longest that a request waits for a leader who is stuck, about.
const LOOKS_EVERY: Duration = Duration::from_millis(1);

/// So many threads may stand aside and not count.
const ASIDE_MAX: usize = 256;

/// What the role is at, in the low bits of its word; the others count the changes.
const PHASE: u64 = 3;
const VACANT: u64 = 0;
const READS: u64 = 1;
const SERVES: u64 = 2;
/// It serves what must be done before anybody reads on, unless it gives the role away itself.
const COUNTS: u64 = 3;

/// The role's word as its holder has left it: whoever finds another there has lost the role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn(u64);

impl Turn {
    fn phase(self) -> u64 {
        self.0 & PHASE
    }

    /// The next change, to `phase`.
    fn next(self, phase: u64) -> Turn {
        Turn((self.0 & !PHASE).wrapping_add(PHASE + 1) | phase)
    }
}

/// The role, and those who want it.
#[derive(Debug)]
pub(super) struct Role {
    word: AtomicU64,
    /// Whether the deputy sleeps without a limit of time.
    dozes: AtomicBool,
    limit: usize,
    posts: Mutex<Posts>,
    /// Followers wait for it, but for the deputy.
    free: Condvar,
    deputy: Condvar,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Posts {
    threads: usize,
    /// Of the threads, those that stand aside.
    aside: usize,
    /// Of the threads, those that were told to end as there are too many, and haven't yet.
    leaving: usize,
    waiting: usize,
    has_deputy: bool,
    result: Option<io::Result<()>>,
}

impl Posts {
    fn staying(&self) -> usize {
        self.threads - self.leaving
    }
}

/// The role has been taken.
#[derive(Debug)]
pub(super) struct Taken {
    /// For reading.
    pub turn: Turn,
    /// There shall be one thread more; it counts already.
    pub wants_thread: bool,
}

impl Role {
    /// The role of a mount that is served by up to `limit` threads; there is one.
    pub fn new(limit: usize) -> Role {
        let posts = Posts { threads: 1, ..Posts::default() };
        Role {
            word: AtomicU64::new(VACANT),
            dozes: AtomicBool::new(false),
            limit: limit.max(1),
            posts: Mutex::new(posts),
            free: Condvar::new(),
            deputy: Condvar::new(),
            ended: Condvar::new(),
        }
    }

    fn turn(&self) -> Turn {
        Turn(self.word.load(Ordering::SeqCst))
    }

    fn change(&self, from: Turn, phase: u64) -> Option<Turn> {
        let to = from.next(phase);
        self.word.compare_exchange(from.0, to.0, Ordering::SeqCst, Ordering::SeqCst).ok().map(|_| to)
    }

    /// How many threads there may be now.
    fn most(&self, posts: &Posts) -> usize {
        self.limit + posts.aside.min(ASIDE_MAX)
    }

    /// Waits for the role; none if the calling thread shall end, as the mount has ended or there are too many.
    pub fn wait(&self) -> Option<Taken> {
        let mut posts = self.posts.lock();
        let mut last = None;
        let turn = loop {
            if posts.result.is_some() {
                return None;
            }
            let seen = self.turn();
            if seen.phase() == VACANT || (seen.phase() == SERVES && last == Some(seen)) {
                if let Some(turn) = self.change(seen, READS) {
                    break turn;
                }
                continue;
            }
            // The deputy stays, so that somebody has the role or looks for it.
            if posts.has_deputy && posts.staying() > self.most(&posts) {
                posts.leaving += 1;
                return None;
            }
            posts.waiting += 1;
            if posts.has_deputy {
                self.free.wait(&mut posts);
                last = None;
            } else {
                posts.has_deputy = true;
                last = self.look_later(&mut posts, seen, last);
                posts.has_deputy = false;
            }
            posts.waiting -= 1;
        };
        let wants_thread = self.takes_thread(&mut posts);
        // Somebody shall be the deputy, now or after this one.
        if !posts.has_deputy {
            self.free.notify_one();
        }
        Some(Taken { turn, wants_thread })
    }

    /// Whether there shall be one thread more, which counts already, as nobody waits for the role.
    fn takes_thread(&self, posts: &mut Posts) -> bool {
        let wants_thread = posts.waiting == 0 && posts.staying() < self.most(posts);
        posts.threads += usize::from(wants_thread);
        wants_thread
    }

    /// What the deputy does between two looks, of which the one before showed `last` and this one `seen`. Returns what he
    /// saw if nobody has woken him.
    fn look_later(
        &self,
        posts: &mut parking_lot::MutexGuard<'_, Posts>,
        seen: Turn,
        last: Option<Turn>,
    ) -> Option<Turn> {
        if seen.phase() == READS && last == Some(seen) {
            self.dozes.store(true, Ordering::SeqCst);
            // The leader looks whether he dozes after changing the word.
            if self.turn() == seen {
                self.deputy.wait(posts);
            }
            self.dozes.store(false, Ordering::SeqCst);
            return None;
        }
        self.deputy.wait_for(posts, LOOKS_EVERY).timed_out().then_some(seen)
    }

    /// The leader begins to serve what it has read; `in_order`: nobody takes the role from it meanwhile.
    pub fn serves(&self, turn: Turn, in_order: bool) -> Turn {
        let turn = turn.next(if in_order { COUNTS } else { SERVES });
        // Nobody else changes it while somebody reads.
        self.word.store(turn.0, Ordering::SeqCst);
        if self.dozes.load(Ordering::SeqCst) {
            let _posts = self.posts.lock();
            self.deputy.notify_one();
        }
        turn
    }

    /// The leader has served, and reads again; none if it has lost the role.
    pub fn reads(&self, turn: Turn) -> Option<Turn> {
        self.change(turn, READS)
    }

    /// Gives the role away while something is served, if it isn't lost already. Returns whether there shall be one thread
    /// more, which counts already.
    pub fn give(&self, turn: Turn) -> bool {
        if turn.phase() < SERVES || self.change(turn, VACANT).is_none() {
            return false;
        }
        let mut posts = self.posts.lock();
        if posts.waiting > usize::from(posts.has_deputy) {
            self.free.notify_one();
        } else if posts.has_deputy {
            self.deputy.notify_one();
        } else {
            return self.takes_thread(&mut posts);
        }
        false
    }

    /// The calling thread stands aside from here on, and isn't counted until [`Role::come_back`]. If it has the role it
    /// gives it away next. Returns whether there shall be one thread more, which counts already.
    pub fn stand_aside(&self) -> bool {
        let mut posts = self.posts.lock();
        posts.aside += 1;
        self.takes_thread(&mut posts)
    }

    /// What [`Role::stand_aside`] began is over.
    pub fn come_back(&self) {
        self.posts.lock().aside -= 1;
    }

    /// A thread ends, or one that counts couldn't be made.
    pub fn leave(&self) {
        let mut posts = self.posts.lock();
        posts.threads -= 1;
        posts.leaving = posts.leaving.saturating_sub(1);
        drop(posts);
        self.ended.notify_all();
    }

    /// The mount has ended, and everybody shall know.
    pub fn end(&self, result: io::Result<()>) {
        self.posts.lock().result.get_or_insert(result);
        self.free.notify_all();
        self.deputy.notify_all();
    }

    /// Waits until all threads have left.
    pub fn join(&self) -> io::Result<()> {
        let mut posts = self.posts.lock();
        while posts.threads > 0 {
            self.ended.wait(&mut posts);
        }
        posts.result.take().unwrap_or(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn one_has_the_role_and_may_give_it_away_once() {
        let role = Role::new(3);
        let taken = role.wait().unwrap();
        assert!(taken.wants_thread, "there is no deputy");
        let serving = role.serves(taken.turn, false);
        let reading = role.reads(serving).unwrap();
        assert!(role.reads(serving).is_none(), "an old turn counts for nothing");
        let serving = role.serves(reading, true);
        assert!(role.give(serving), "nobody waits: there shall be another thread");
        assert!(!role.give(serving));
        assert!(role.reads(serving).is_none());
        assert!(!role.wait().unwrap().wants_thread, "the limit is reached");
    }

    #[test]
    fn who_is_stuck_loses_the_role_and_who_reads_does_not() {
        let role = Arc::new(Role::new(2));
        let taken = role.wait().unwrap();
        let other = {
            let role = role.clone();
            std::thread::spawn(move || role.wait().unwrap().turn)
        };
        // The other one sees it reading until it dozes, and must be woken then.
        while !role.dozes.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let serving = role.serves(taken.turn, false);
        let theirs = other.join().unwrap();
        assert!(role.reads(serving).is_none());
        assert!(!role.give(serving));
        assert_eq!(role.turn(), theirs);
    }

    #[test]
    fn who_stands_aside_is_replaced_and_one_too_many_ends_when_it_is_back() {
        let role = Arc::new(Role::new(1));
        for _ in 0..2 {
            let taken = role.wait().unwrap();
            assert!(!taken.wants_thread, "the limit is reached");
            let serving = role.serves(taken.turn, false);
            assert!(role.stand_aside(), "nobody else reads");
            assert!(!role.give(serving), "there shall be one more only");
        }
        let taken = role.wait().unwrap();
        assert!(!taken.wants_thread, "two stand aside, and one reads");
        role.come_back();
        role.come_back();
        let deputy = {
            let role = role.clone();
            std::thread::spawn(move || role.wait().is_none())
        };
        while !role.posts.lock().has_deputy {
            std::thread::yield_now();
        }
        assert!(role.wait().is_none(), "there are three");
        role.leave();
        assert!(!deputy.is_finished() && role.posts.lock().result.is_none());
        assert_eq!(role.turn(), taken.turn);
        role.end(Ok(()));
        assert!(deputy.join().unwrap());
    }

    #[test]
    fn who_stands_aside_while_others_wait_needs_no_thread() {
        let role = Arc::new(Role::new(2));
        let taken = role.wait().unwrap();
        let deputy = {
            let role = role.clone();
            std::thread::spawn(move || role.wait().unwrap())
        };
        while !role.posts.lock().has_deputy {
            std::thread::yield_now();
        }
        assert!(taken.wants_thread && !role.stand_aside());
        let serving = role.serves(taken.turn, false);
        assert!(!role.give(serving));
        assert!(deputy.join().unwrap().wants_thread, "who takes the role has no deputy");
    }

    #[test]
    fn so_many_may_stand_aside_and_no_more() {
        let role = Role::new(2);
        assert!(role.wait().unwrap().wants_thread);
        assert_eq!((0..2 * ASIDE_MAX).filter(|_| role.stand_aside()).count(), ASIDE_MAX);
        (0..2 * ASIDE_MAX).for_each(|_| role.come_back());
        assert_eq!(role.posts.lock().threads, 2 + ASIDE_MAX);
    }

    #[test]
    fn the_end_reaches_everybody() {
        let role = Arc::new(Role::new(4));
        let taken = role.wait().unwrap();
        let others: Vec<_> = (0..3)
            .map(|_| {
                let role = role.clone();
                std::thread::spawn(move || role.wait().is_none())
            })
            .collect();
        role.end(Err(io::ErrorKind::NotFound.into()));
        role.end(Ok(()));
        assert!(others.into_iter().all(|other| other.join().unwrap()));
        assert!(role.wait().is_none());
        assert_eq!(taken.turn.phase(), READS);
        role.leave();
        role.leave();
        assert_eq!(role.join().unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
