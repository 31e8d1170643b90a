//! Files that are of use and can be done without: how much of the disk all of them together may take.
//!
//! Hides which goes when another needs its place: the least recently used of those that nobody uses. Invariants: what is known
//! here takes no more than the limit, but for what was in use when the store was opened; a file in use stays; one *on trial* goes for no
//! other, and soon, unless somebody uses it. What the files are, and where they lie, only those know who make them.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long a file on trial waits for somebody who uses it. It was written within half that time, and what is older than 30 s the kernel
/// writes to the disk.
const TRIAL: Duration = Duration::from_secs(15);

/// Names a spare file, for as long as the store is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SpareId(u64);

/// Takes a file's name away. It is called with the register locked, and must not come back to it.
type Remove = Box<dyn FnOnce() + Send>;

/// The register of a store's spare files.
#[derive(Debug, Default)]
pub struct Spares {
    limit_bytes: u64,
    register: Arc<Mutex<Register>>,
}

#[derive(Debug, Default)]
struct Register {
    files: HashMap<SpareId, Spare>,
    /// What the files take, and what is being written.
    bytes: u64,
    /// What of that is on trial.
    trial_bytes: u64,
    last_id: u64,
    clock: u64,
}

struct Spare {
    file: Arc<File>,
    bytes: u64,
    is_used: bool,
    last_used: u64,
    /// When it goes, if it is on trial.
    until: Option<Instant>,
    remove: Remove,
}

impl std::fmt::Debug for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare").field("bytes", &self.bytes).field("is_used", &self.is_used).finish_non_exhaustive()
    }
}

/// Room for a file that is being written; it is given back when this is dropped.
#[derive(Debug)]
pub struct Room {
    bytes: u64,
    is_trial: bool,
    register: Arc<Mutex<Register>>,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.register.lock().give_back(self.bytes, self.is_trial);
    }
}

impl Register {
    fn claim(&mut self, bytes: u64, is_trial: bool) {
        self.bytes += bytes;
        self.trial_bytes += if is_trial { bytes } else { 0 };
    }

    fn give_back(&mut self, bytes: u64, is_trial: bool) {
        self.bytes -= bytes;
        self.trial_bytes -= if is_trial { bytes } else { 0 };
    }

    fn put(&mut self, spare: Spare) -> SpareId {
        self.claim(spare.bytes, spare.until.is_some());
        self.last_id += 1;
        self.clock += 1;
        let id = SpareId(self.last_id);
        self.files.insert(id, Spare { last_used: self.clock, ..spare });
        id
    }

    fn take(&mut self, id: SpareId) -> Option<Spare> {
        let spare = self.files.remove(&id)?;
        self.give_back(spare.bytes, spare.until.is_some());
        Some(spare)
    }

    fn remove(&mut self, id: SpareId) {
        if let Some(spare) = self.take(id) {
            (spare.remove)();
        }
    }

    /// Removes one that nobody uses; false if there is none.
    fn remove_oldest(&mut self) -> bool {
        let idle = self.files.iter().filter(|(_, spare)| !spare.is_used);
        let Some(oldest) = idle.min_by_key(|(_, spare)| spare.last_used).map(|(id, _)| *id) else { return false };
        self.remove(oldest);
        true
    }
}

impl Spares {
    /// A register of files that together take at most `limit_bytes`.
    pub fn new(limit_bytes: u64) -> Spares {
        Spares { limit_bytes, register: Arc::default() }
    }

    /// Whether there may be any at all.
    pub fn is_on(&self) -> bool {
        self.limit_bytes > 0
    }

    /// Room for a file of `bytes`, for which others go; none if they can't.
    pub fn room(&self, bytes: u64) -> Option<Room> {
        let mut register = self.register.lock();
        let in_use: u64 = register.files.values().filter(|spare| spare.is_used).map(|spare| spare.bytes).sum();
        // Nobody shall go for what doesn't fit all the same.
        if in_use.saturating_add(bytes) > self.limit_bytes {
            return None;
        }
        while register.bytes.saturating_add(bytes) > self.limit_bytes {
            if !register.remove_oldest() {
                return None;
            }
        }
        register.claim(bytes, false);
        Some(Room { bytes, is_trial: false, register: self.register.clone() })
    }

    /// Room for a file of `bytes` on trial, for which no other goes; none if there isn't so much, or all that are on trial would have more
    /// than `most` bytes.
    pub fn room_on_trial(&self, bytes: u64, most: u64) -> Option<Room> {
        let mut register = self.register.lock();
        let fits = |used: u64, limit: u64| used.saturating_add(bytes) <= limit;
        if !fits(register.bytes, self.limit_bytes) || !fits(register.trial_bytes, most) {
            return None;
        }
        register.claim(bytes, true);
        Some(Room { bytes, is_trial: true, register: self.register.clone() })
    }

    /// A file was written into `room`; `remove` takes its name away.
    pub fn put(&self, room: Room, file: Arc<File>, remove: impl FnOnce() + Send + 'static) -> SpareId {
        let until = room.is_trial.then(|| Instant::now() + TRIAL);
        let spare = Spare { file, bytes: room.bytes, is_used: false, last_used: 0, until, remove: Box::new(remove) };
        let id = self.register.lock().put(spare);
        drop(room);
        id
    }

    /// A file of `bytes` has been in use since before the store was opened.
    pub fn found(&self, file: Arc<File>, bytes: u64, remove: impl FnOnce() + Send + 'static) -> SpareId {
        self.register.lock().put(Spare {
            file,
            bytes,
            is_used: true,
            last_used: 0,
            until: None,
            remove: Box::new(remove),
        })
    }

    /// The file, from now on in use; none if it had to go.
    pub fn begin_use(&self, id: SpareId) -> Option<Arc<File>> {
        let mut register = self.register.lock();
        register.clock += 1;
        let clock = register.clock;
        let spare = register.files.get_mut(&id)?;
        (spare.is_used, spare.last_used) = (true, clock);
        let (file, bytes) = (spare.file.clone(), spare.bytes);
        if spare.until.take().is_some() {
            register.trial_bytes -= bytes;
        }
        Some(file)
    }

    /// Removes those on trial whose time is over.
    pub fn end_trials(&self) {
        let (mut register, now) = (self.register.lock(), Instant::now());
        let is_over = |spare: &Spare| spare.until.is_some_and(|until| until <= now);
        let over: Vec<SpareId> = register.files.iter().filter(|(_, spare)| is_over(spare)).map(|(id, _)| *id).collect();
        over.into_iter().for_each(|id| register.remove(id));
    }

    /// Nobody uses it any more; it may go.
    pub fn end_use(&self, id: SpareId) {
        if let Some(spare) = self.register.lock().files.get_mut(&id) {
            spare.is_used = false;
        }
    }

    /// The file, if it is in use.
    pub fn used(&self, id: SpareId) -> Option<Arc<File>> {
        let register = self.register.lock();
        register.files.get(&id).filter(|spare| spare.is_used).map(|spare| spare.file.clone())
    }

    /// Removes it unless it is in use; false if it is.
    pub fn remove_idle(&self, id: SpareId) -> bool {
        let mut register = self.register.lock();
        if register.files.get(&id).is_some_and(|spare| spare.is_used) {
            return false;
        }
        register.remove(id);
        true
    }

    /// Removes the least recently used of those that nobody uses; false if there is none.
    pub fn remove_oldest(&self) -> bool {
        self.register.lock().remove_oldest()
    }

    /// Whether there is one that nobody uses.
    pub fn has_idle(&self) -> bool {
        self.register.lock().files.values().any(|spare| !spare.is_used)
    }

    /// What those that nobody uses allocate, in bytes.
    pub fn idle_bytes(&self) -> u64 {
        let register = self.register.lock();
        let idle = register.files.values().filter(|spare| !spare.is_used);
        idle.filter_map(|spare| spare.file.metadata().ok()).map(|stat| stat.blocks() * 512).sum()
    }

    /// Knows it no more: whatever becomes of it is somebody else's concern.
    pub fn give_up(&self, id: SpareId) {
        self.register.lock().take(id);
    }

    /// How many bytes those of `ids` take that are there.
    pub fn bytes_of(&self, ids: impl Iterator<Item = SpareId>) -> u64 {
        let register = self.register.lock();
        ids.filter_map(|id| register.files.get(&id)).map(|spare| spare.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    struct Scene {
        spares: Spares,
        removed: Arc<AtomicU64>,
    }

    impl Scene {
        fn new(limit: u64) -> Scene {
            Scene { spares: Spares::new(limit), removed: Arc::default() }
        }

        /// Adds a file whose bit among those removed is `bit`.
        fn put(&self, bytes: u64, bit: u32) -> Option<SpareId> {
            self.put_in(self.spares.room(bytes)?, bit)
        }

        fn put_in(&self, room: Room, bit: u32) -> Option<SpareId> {
            let removed = self.removed.clone();
            let file = Arc::new(tempfile::tempfile().unwrap());
            rustix::fs::fallocate(&*file, rustix::fs::FallocateFlags::empty(), 0, room.bytes << 12).unwrap();
            Some(self.spares.put(room, file, move || {
                removed.fetch_or(1 << bit, Ordering::Relaxed);
            }))
        }

        fn removed(&self) -> u64 {
            self.removed.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn the_least_recently_used_goes_and_what_is_in_use_stays() {
        let scene = Scene::new(100);
        let (first, second, third) = (scene.put(40, 0).unwrap(), scene.put(30, 1).unwrap(), scene.put(30, 2).unwrap());
        assert!(scene.spares.begin_use(first).is_some());
        scene.spares.end_use(first);
        assert!(scene.spares.begin_use(third).is_some());
        assert_eq!(scene.removed(), 0);
        let fourth = scene.put(10, 3).unwrap();
        assert_eq!(scene.removed(), 0b10, "the second was used least recently");
        assert!(scene.spares.begin_use(second).is_none());
        assert!(scene.put(71, 4).is_none(), "there is no room for it beside what is in use");
        assert_eq!(scene.removed(), 0b10, "nothing goes for what doesn't fit");
        assert!(scene.put(70, 4).is_some());
        assert_eq!(scene.removed(), 0b1011);
        assert!(!scene.spares.remove_idle(third), "it is in use");
        scene.spares.end_use(third);
        assert!(scene.spares.remove_idle(third));
        assert_eq!(scene.removed(), 0b1111);
        assert_eq!(scene.spares.bytes_of([first, second, third, fourth].into_iter()), 0);
    }

    #[test]
    fn who_needs_the_disk_gets_what_is_idle() {
        let scene = Scene::new(100);
        let [first, second, third] = [0, 1, 2].map(|bit| scene.put(10, bit).unwrap());
        let block = 10 << 12;
        assert!(scene.spares.begin_use(first).is_some() && scene.spares.has_idle());
        assert!((2 * block..3 * block).contains(&scene.spares.idle_bytes()), "{}", scene.spares.idle_bytes());
        assert!(scene.spares.remove_oldest());
        assert_eq!(scene.removed(), 0b10);
        assert!(scene.spares.begin_use(second).is_none());
        scene.spares.end_use(first);
        assert!(scene.spares.remove_oldest(), "the third was never used, the first is");
        assert_eq!(scene.removed(), 0b110);
        assert!(scene.spares.begin_use(third).is_none());
        assert!(scene.spares.remove_oldest() && !scene.spares.remove_oldest() && !scene.spares.has_idle());
        assert_eq!((scene.removed(), scene.spares.idle_bytes()), (0b111, 0));
    }

    #[test]
    fn what_is_on_trial_goes_soon_unless_it_is_used() {
        let scene = Scene::new(100);
        let lasting = scene.put(40, 0).unwrap();
        let on_trial = |bytes, bit| scene.put_in(scene.spares.room_on_trial(bytes, 50)?, bit);
        let (used, unused) = (on_trial(20, 1).unwrap(), on_trial(30, 2).unwrap());
        assert!(on_trial(1, 3).is_none(), "more than may be on trial");
        assert!(scene.spares.begin_use(used).is_some());
        assert!(on_trial(11, 3).is_none(), "another would have to go for it");
        let room = scene.spares.room_on_trial(10, 50).unwrap();
        drop(room);
        scene.spares.end_trials();
        assert_eq!(scene.removed(), 0, "its time isn't over");
        scene
            .spares
            .register
            .lock()
            .files
            .values_mut()
            .for_each(|spare| spare.until = spare.until.map(|_| Instant::now()));
        scene.spares.end_use(used);
        scene.spares.end_trials();
        assert_eq!(scene.removed(), 0b100);
        assert!(scene.spares.begin_use(unused).is_none() && scene.spares.begin_use(lasting).is_some());
        assert!(scene.spares.begin_use(used).is_some(), "it has become one as others are");
        assert_eq!(scene.spares.register.lock().trial_bytes, 0);
        assert!(scene.spares.room_on_trial(40, 40).is_some());
    }

    #[test]
    fn room_that_is_not_used_is_given_back() {
        let scene = Scene::new(100);
        let room = scene.spares.room(100).unwrap();
        assert!(scene.spares.room(1).is_none());
        drop(room);
        let all = scene.put(100, 0).unwrap();
        assert!(scene.spares.used(all).is_none());
        assert!(scene.spares.begin_use(all).is_some() && scene.spares.used(all).is_some());
        scene.spares.give_up(all);
        assert_eq!(scene.removed(), 0, "what is given up is somebody else's");
        assert!(scene.put(100, 1).is_some());
        assert!(!Spares::new(0).is_on());
    }
}
