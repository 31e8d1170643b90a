//! What a mount is asked, how often, and how long the answers take; what it is working on now.
//!
//! Hides how it is counted without a common lock: each thread has a place of its own, and whoever looks adds them up. A
//! request costs two looks at the clock and some additions. Memory: some 160 KiB for a mount. Invariant: what is being
//! answered stands among what is running from its begin to its end, whatever it waits for.
//!
//! What the kernel answers from its caches isn't seen here: that is what the caches are for.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

/// What is asked of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
#[allow(missing_docs)] // they are named as in the kernel
pub enum Op {
    Lookup,
    Getattr,
    Setattr,
    Readlink,
    Make,
    Symlink,
    Link,
    Unlink,
    Rmdir,
    Rename,
    Open,
    Flush,
    Release,
    Read,
    Write,
    Fsync,
    Opendir,
    Readdir,
    Releasedir,
    Getxattr,
    Listxattr,
    Setxattr,
    Removexattr,
    Fallocate,
    Lseek,
    Copy,
}

impl Op {
    /// All of them.
    pub const ALL: [Op; 26] = [
        Op::Lookup,
        Op::Getattr,
        Op::Setattr,
        Op::Readlink,
        Op::Make,
        Op::Symlink,
        Op::Link,
        Op::Unlink,
        Op::Rmdir,
        Op::Rename,
        Op::Open,
        Op::Flush,
        Op::Release,
        Op::Read,
        Op::Write,
        Op::Fsync,
        Op::Opendir,
        Op::Readdir,
        Op::Releasedir,
        Op::Getxattr,
        Op::Listxattr,
        Op::Setxattr,
        Op::Removexattr,
        Op::Fallocate,
        Op::Lseek,
        Op::Copy,
    ];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Op::Lookup => "lookup",
            Op::Getattr => "getattr",
            Op::Setattr => "setattr",
            Op::Readlink => "readlink",
            Op::Make => "make",
            Op::Symlink => "symlink",
            Op::Link => "link",
            Op::Unlink => "unlink",
            Op::Rmdir => "rmdir",
            Op::Rename => "rename",
            Op::Open => "open",
            Op::Flush => "flush",
            Op::Release => "release",
            Op::Read => "read",
            Op::Write => "write",
            Op::Fsync => "fsync",
            Op::Opendir => "opendir",
            Op::Readdir => "readdir",
            Op::Releasedir => "releasedir",
            Op::Getxattr => "getxattr",
            Op::Listxattr => "listxattr",
            Op::Setxattr => "setxattr",
            Op::Removexattr => "removexattr",
            Op::Fallocate => "fallocate",
            Op::Lseek => "lseek",
            Op::Copy => "copy",
        }
    }
}

const OPS: usize = Op::ALL.len();
const PLACES: usize = 16;
/// Buckets of the histograms: each ends at twice the time of the one before.
pub const BUCKETS: usize = 24;
/// Where the first bucket ends.
const FIRST_BUCKET: Duration = Duration::from_micros(1);
/// A request that takes so long is told of, unless [`set_slow`] says otherwise.
const SLOW: Duration = Duration::from_secs(2);
/// The least time between two words about slow requests.
const TOLD_EVERY: Duration = Duration::from_secs(1);
/// A name is told of up to so many bytes.
const NAME_SHOWN: usize = 64;

static SLOW_NANOS: AtomicU64 = AtomicU64::new(SLOW.as_nanos() as u64);

/// From now on requests of all mounts of this process that take longer than `limit` are told of; zero: none.
pub fn set_slow(limit: Duration) {
    let nanos = if limit.is_zero() { u64::MAX } else { limit.as_nanos().min(u128::from(u64::MAX)) as u64 };
    SLOW_NANOS.store(nanos, Ordering::Relaxed);
}

/// The end of bucket `index`; what takes longer than the last counts in the last.
pub fn bucket_end(index: usize) -> Duration {
    FIRST_BUCKET * (1 << index.min(BUCKETS - 1))
}

fn bucket(nanos: u64) -> usize {
    let micros = nanos.div_ceil(FIRST_BUCKET.as_nanos() as u64);
    (micros.max(1).next_power_of_two().trailing_zeros() as usize).min(BUCKETS - 1)
}

/// How often one thing was asked, and how long it took.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OpCount {
    /// What.
    pub op: Op,
    /// How often.
    pub count: u64,
    /// How long all took together, in nanoseconds.
    pub nanos: u64,
    /// How many ended in each bucket; see [`bucket_end`].
    pub buckets: Vec<u64>,
}

impl OpCount {
    /// The time within which `part` (0 to 1) of them were answered, to the next bucket's end.
    pub fn quantile(&self, part: f64) -> Duration {
        let wanted = (self.count as f64 * part).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return bucket_end(index);
            }
        }
        Duration::ZERO
    }
}

/// What a mount has done since it began.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Activity {
    /// What was asked at least once.
    pub ops: Vec<OpCount>,
    /// Bytes that it gave to readers.
    pub read_bytes: u64,
    /// Bytes that it took from writers.
    pub written_bytes: u64,
    /// How many requests are being answered.
    pub running: u64,
}

/// A request that is being answered.
#[derive(Clone, Debug, Serialize)]
pub struct Running {
    /// What is asked.
    pub op: Op,
    /// Of what: a path if there is one.
    pub what: String,
    /// For how long.
    pub seconds: f64,
}

#[derive(Clone)]
struct Begun {
    number: u64,
    op: Op,
    about: u64,
    name: Option<Box<[u8]>>,
    at: Instant,
    is_told: bool,
}

/// What one thread has counted, or several if there are many.
struct Place {
    counts: [AtomicU64; OPS],
    nanos: [AtomicU64; OPS],
    buckets: [[AtomicU64; BUCKETS]; OPS],
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    running: Mutex<Vec<Begun>>,
}

impl Place {
    fn new() -> Place {
        Place {
            counts: [const { AtomicU64::new(0) }; OPS],
            nanos: [const { AtomicU64::new(0) }; OPS],
            buckets: [const { [const { AtomicU64::new(0) }; BUCKETS] }; OPS],
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            running: Mutex::default(),
        }
    }
}

/// The counters of one mount.
pub struct Watch {
    places: Box<[Place]>,
    numbers: AtomicU64,
    started: Instant,
    /// When a slow request was last told of, in nanoseconds since `started`.
    told: AtomicU64,
}

impl Default for Watch {
    fn default() -> Watch {
        let places = (0..PLACES).map(|_| Place::new()).collect();
        Watch { places, numbers: AtomicU64::new(0), started: Instant::now(), told: AtomicU64::new(0) }
    }
}

/// Which place this thread counts at.
fn place() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static PLACE: Cell<Option<usize>> = const { Cell::new(None) };
    }
    PLACE.get().unwrap_or_else(|| {
        let place = THREADS.fetch_add(1, Ordering::Relaxed) % PLACES;
        PLACE.set(Some(place));
        place
    })
}

/// A request while it is being answered; it has been when this is dropped.
pub(super) struct Seen<'w, F: Fn(Op, u64, Option<&[u8]>) -> String> {
    watch: &'w Watch,
    place: usize,
    number: u64,
    op: Op,
    at: Instant,
    describe: F,
}

impl Watch {
    /// A request begins, about the inode or folder of this number, and a name in that; `describe` says that in words,
    /// should it be slow.
    pub(super) fn begin<F: Fn(Op, u64, Option<&[u8]>) -> String>(
        &self,
        op: Op,
        about: u64,
        name: Option<&[u8]>,
        describe: F,
    ) -> Seen<'_, F> {
        let (place, at) = (place(), Instant::now());
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let name = name.map(Box::from);
        self.places[place].running.lock().push(Begun { number, op, about, name, at, is_told: false });
        Seen { watch: self, place, number, op, at, describe }
    }

    /// Bytes went to a reader.
    pub(super) fn read(&self, bytes: usize) {
        self.places[place()].read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes came from a writer.
    pub(super) fn written(&self, bytes: usize) {
        self.places[place()].written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that came from writers.
    pub(super) fn written_bytes(&self) -> u64 {
        self.places.iter().map(|place| place.written_bytes.load(Ordering::Relaxed)).sum()
    }

    /// What was done since the mount began.
    pub(super) fn activity(&self) -> Activity {
        let sum = |of: &dyn Fn(&Place) -> u64| self.places.iter().map(of).sum::<u64>();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut activity = Activity {
            ops: Vec::new(),
            read_bytes: sum(&|place| load(&place.read_bytes)),
            written_bytes: sum(&|place| load(&place.written_bytes)),
            running: sum(&|place| place.running.lock().len() as u64),
        };
        for op in Op::ALL {
            let index = op as usize;
            let count = sum(&|place| load(&place.counts[index]));
            if count > 0 {
                let nanos = sum(&|place| load(&place.nanos[index]));
                let buckets = (0..BUCKETS).map(|bucket| sum(&|place| load(&place.buckets[index][bucket]))).collect();
                activity.ops.push(OpCount { op, count, nanos, buckets });
            }
        }
        activity
    }

    /// What is being answered, and has been for at least `longer`; the longest first. With `untold`, what such a look has
    /// not met before.
    pub(super) fn running(
        &self,
        longer: Duration,
        untold: bool,
        describe: impl Fn(Op, u64, Option<&[u8]>) -> String,
    ) -> Vec<Running> {
        let mut found: Vec<Begun> = Vec::new();
        for place in &self.places {
            let mut running = place.running.lock();
            for begun in running.iter_mut().filter(|begun| begun.at.elapsed() >= longer && !(untold && begun.is_told)) {
                begun.is_told |= untold;
                found.push(begun.clone());
            }
        }
        found.sort_by_key(|begun| begun.at);
        let running = found.into_iter().map(|begun| Running {
            op: begun.op,
            what: describe(begun.op, begun.about, begun.name.as_deref()),
            seconds: begun.at.elapsed().as_secs_f64(),
        });
        running.collect()
    }

    /// Whether a slow request is to be told of now: a flood of them is told of now and then.
    fn may_tell(&self) -> bool {
        let now = self.started.elapsed().as_nanos() as u64 + 1;
        let last = self.told.load(Ordering::Relaxed);
        (last == 0 || now.saturating_sub(last) >= TOLD_EVERY.as_nanos() as u64)
            && self.told.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }
}

impl<F: Fn(Op, u64, Option<&[u8]>) -> String> Drop for Seen<'_, F> {
    fn drop(&mut self) {
        let place = &self.watch.places[self.place];
        let nanos = self.at.elapsed().as_nanos() as u64;
        let index = self.op as usize;
        place.counts[index].fetch_add(1, Ordering::Relaxed);
        place.nanos[index].fetch_add(nanos, Ordering::Relaxed);
        place.buckets[index][bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        let begun = {
            let mut running = place.running.lock();
            let found = running.iter().position(|begun| begun.number == self.number);
            found.map(|found| running.swap_remove(found))
        };
        if let Some(begun) = begun.filter(|_| nanos >= SLOW_NANOS.load(Ordering::Relaxed) && self.watch.may_tell()) {
            let what = (self.describe)(self.op, begun.about, begun.name.as_deref());
            tracing::warn!("a slow request: {} of {what} took {:.1} s", self.op.as_str(), nanos as f64 / 1e9);
        }
    }
}

/// `name` so that it can stand in a log.
pub(super) fn shown(name: &[u8]) -> String {
    let text = name[..name.len().min(NAME_SHOWN)].escape_ascii().to_string();
    if name.len() > NAME_SHOWN { text + "…" } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(_: Op, about: u64, name: Option<&[u8]>) -> String {
        format!("{about}/{}", shown(name.unwrap_or_default()))
    }

    #[test]
    fn buckets_end_where_they_say() {
        for (nanos, expected) in [(0, 0), (1000, 0), (1001, 1), (2000, 1), (2001, 2), (u64::MAX / 2, BUCKETS - 1)] {
            assert_eq!(bucket(nanos), expected, "{nanos}");
        }
        assert_eq!(bucket_end(3), Duration::from_micros(8));
        let op = OpCount { op: Op::Read, count: 100, nanos: 0, buckets: vec![98, 1, 1] };
        let micros = |part| op.quantile(part).as_micros();
        assert_eq!((micros(0.5), micros(0.99), micros(1.0)), (1, 2, 4));
    }

    #[test]
    fn what_runs_is_seen_and_what_ran_is_counted() {
        let watch = Watch::default();
        let outer = watch.begin(Op::Open, 7, None, describe);
        let inner = watch.begin(Op::Lookup, 8, Some(b"na\nme"), describe);
        let running = watch.running(Duration::ZERO, false, describe);
        assert_eq!(running.iter().map(|running| &*running.what).collect::<Vec<_>>(), ["7/", "8/na\\nme"]);
        assert_eq!(watch.running(Duration::ZERO, true, describe).len(), 2);
        assert_eq!(watch.running(Duration::ZERO, true, describe).len(), 0, "each is told of once");
        assert!(watch.running(Duration::from_secs(3600), false, describe).is_empty());
        drop(outer);
        assert_eq!(watch.activity().running, 1);
        drop(inner);
        std::thread::scope(|scope| {
            for _ in 0..40 {
                scope.spawn(|| (0..100).for_each(|_| drop(watch.begin(Op::Read, 1, None, describe))));
            }
        });
        watch.read(5);
        let activity = watch.activity();
        assert_eq!((activity.running, activity.read_bytes, activity.ops.len()), (0, 5, 3));
        let read = activity.ops.iter().find(|count| count.op == Op::Read).unwrap();
        assert_eq!((read.count, read.buckets.iter().sum::<u64>()), (4000, 4000));
    }

    #[test]
    fn every_op_counts_for_itself() {
        for (index, op) in Op::ALL.into_iter().enumerate() {
            assert_eq!((op as usize, format!("\"{}\"", op.as_str())), (index, serde_json::to_string(&op).unwrap()));
        }
    }
}
