//! Pieces of work: what the daemon is doing, how far it is, and how it is cancelled.
//!
//! Invariant: a piece of work is in the register from before it begins until after it has ended, so that an empty
//! register means that nothing is under way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{Notify, mpsc};

use crate::api::{Event, Progress, WorkInfo};
use crate::failure::{Class, Failure, Result};
use crate::units;

/// So many long pieces of work at a time at most; streams aren't counted.
const MOST_WORKS: usize = 128;

/// All that is under way.
#[derive(Debug, Default)]
pub struct Works {
    inner: Mutex<Register>,
    /// Told whenever a piece of work has ended.
    ended: Notify,
}

#[derive(Debug, Default)]
struct Register {
    last_number: u64,
    current: BTreeMap<u64, Arc<Work>>,
    last_ended: Option<Instant>,
    is_closed: bool,
}

/// One piece of work.
#[derive(Debug)]
pub struct Work {
    /// Its number.
    pub number: u64,
    label: Mutex<String>,
    /// Whether the user waits for it as work, not as a short question.
    is_long: bool,
    /// Whether it takes threads, of which there are only so many.
    takes_threads: bool,
    started: Instant,
    phase: Mutex<(String, Option<u64>)>,
    bytes: AtomicU64,
    items: AtomicU64,
    cancelled: AtomicBool,
    /// Told when it is cancelled.
    cancelling: Notify,
}

impl Work {
    /// Asks it to stop as soon as it can.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        self.cancelling.notify_one();
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Resolves when it is asked to stop; for one waiter.
    pub async fn cancelled(&self) {
        while !self.is_cancelled() {
            self.cancelling.notified().await;
        }
    }

    /// Tells users what it is: "import debian".
    pub fn set_label(&self, label: String) {
        *self.label.lock() = label;
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let (phase, total_bytes) = self.phase.lock().clone();
        let (bytes, items) = (self.bytes.load(Ordering::Relaxed), self.items.load(Ordering::Relaxed));
        Progress { phase, bytes, total_bytes, items }
    }
}

impl Works {
    /// Registers a piece of work.
    ///
    /// # Errors
    /// [`Class::Busy`] if the daemon is about to exit, or has [`MOST_WORKS`] already.
    pub fn begin(self: &Arc<Works>, label: String, is_long: bool) -> Result<Entry> {
        self.register(label, is_long, is_long)
    }

    /// Registers a stream. It holds no thread, and works wait for theirs: however many there are, it is let in.
    ///
    /// # Errors
    /// [`Class::Busy`] if the daemon is about to exit.
    pub fn begin_stream(self: &Arc<Works>) -> Result<Entry> {
        self.register("stream".to_owned(), true, false)
    }

    fn register(self: &Arc<Works>, label: String, is_long: bool, takes_threads: bool) -> Result<Entry> {
        let mut register = self.inner.lock();
        // Each takes a few of the runtime's threads, and waits for others: were all taken by such as wait, nothing would go on.
        if takes_threads && register.current.values().filter(|work| work.takes_threads).count() >= MOST_WORKS {
            let failure = Failure::new(Class::Busy, format!("the daemon does {MOST_WORKS} things at a time already"));
            return Err(failure.hint("wait for some of them; `layerctl daemon status` shows what they are"));
        }
        if register.is_closed {
            return Err(Failure::new(Class::Busy, "the daemon is about to exit; try again in a moment"));
        }
        register.last_number += 1;
        let work = Arc::new(Work {
            number: register.last_number,
            label: Mutex::new(label),
            is_long,
            takes_threads,
            started: Instant::now(),
            phase: Mutex::default(),
            bytes: AtomicU64::new(0),
            items: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            cancelling: Notify::new(),
        });
        register.current.insert(work.number, work.clone());
        Ok(Entry { works: self.clone(), work })
    }

    /// The piece of work with this number.
    pub fn get(&self, number: u64) -> Option<Arc<Work>> {
        self.inner.lock().current.get(&number).cloned()
    }

    /// What is under way, as users see it.
    pub fn list(&self) -> Vec<WorkInfo> {
        let info = |work: &Arc<Work>| WorkInfo {
            work: work.number,
            label: work.label.lock().clone(),
            seconds: units::seconds(work.started.elapsed()),
            progress: work.progress(),
        };
        self.inner.lock().current.values().filter(|work| work.is_long).map(info).collect()
    }

    /// Since when nothing is under way; none if something is.
    pub fn idle_since(&self, otherwise: Instant) -> Option<Instant> {
        let register = self.inner.lock();
        register.current.is_empty().then(|| register.last_ended.unwrap_or(otherwise))
    }

    /// Accepts no more work if none is under way; returns whether that is so.
    pub fn close_if_idle(&self) -> bool {
        let mut register = self.inner.lock();
        register.is_closed |= register.current.is_empty();
        register.is_closed
    }

    /// Accepts no more work. False if that was so already: whoever did that ends the daemon, and waits for all others.
    #[must_use]
    pub fn close(&self) -> bool {
        !std::mem::replace(&mut self.inner.lock().is_closed, true)
    }

    /// Accepts work again.
    pub fn reopen(&self) {
        self.inner.lock().is_closed = false;
    }

    /// Asks all work but `except` to stop as soon as it can.
    pub fn cancel_all(&self, except: Option<u64>) {
        self.inner.lock().current.values().filter(|work| Some(work.number) != except).for_each(|work| work.cancel());
    }

    /// Waits until nothing is under way but the work `except`.
    pub async fn wait_until_done(&self, except: Option<u64>) {
        loop {
            let ended = self.ended.notified();
            if self.inner.lock().current.keys().all(|number| Some(*number) == except) {
                return;
            }
            ended.await;
        }
    }
}

/// A piece of work's place in the register.
#[derive(Debug)]
pub struct Entry {
    works: Arc<Works>,
    work: Arc<Work>,
}

impl Entry {
    /// The work.
    pub fn work(&self) -> &Arc<Work> {
        &self.work
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut register = self.works.inner.lock();
        register.current.remove(&self.work.number);
        register.last_ended = Some(Instant::now());
        let is_idle = register.current.is_empty();
        drop(register);
        self.works.ended.notify_waiters();
        if is_idle && self.work.is_long {
            super::memory::give_back();
        }
    }
}

/// Cancels a piece of work when it is dropped: the client went away, or has its answer.
#[derive(Debug)]
pub struct CancelOnDrop(pub Arc<Work>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// What an operation gets to report to the one who asked for it.
pub struct Reporter {
    work: Arc<Work>,
    events: mpsc::Sender<Event>,
}

impl Reporter {
    /// Reports on `work` to `events`.
    pub fn new(work: Arc<Work>, events: mpsc::Sender<Event>) -> Reporter {
        Reporter { work, events }
    }

    /// The work.
    pub fn work(&self) -> &Arc<Work> {
        &self.work
    }

    /// Sends one item of the answer; waits if the client is slow.
    pub fn item<T: Serialize>(&self, item: &T) -> Result<()> {
        let value = serde_json::to_value(item)
            .map_err(|e| Failure::new(Class::Failure, format!("encoding the answer: {e}")))?;
        let sent = self.events.blocking_send(Event::Item(value));
        sent.map_err(|_| layerfs::Error::Cancelled.into())
    }

    /// Fails if the work should stop.
    pub fn check(&self) -> Result<()> {
        Ok(layerfs::monitor::check(self)?)
    }
}

impl layerfs::monitor::Monitor for Reporter {
    fn phase(&self, name: &str, total_bytes: Option<u64>) {
        let mut phase = self.work.phase.lock();
        if phase.0 != name {
            self.work.bytes.store(0, Ordering::Relaxed);
            self.work.items.store(0, Ordering::Relaxed);
        }
        *phase = (name.to_owned(), total_bytes);
    }

    fn advance(&self, bytes: u64) {
        self.work.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn items(&self, count: u64) {
        self.work.items.fetch_add(count, Ordering::Relaxed);
    }

    fn warn(&self, message: &str) {
        tracing::warn!(work = self.work.number, "{message}");
        // A full channel must not hold the work up; the log has it.
        let _ = self.events.try_send(Event::Warning(message.to_owned()));
    }

    fn is_cancelled(&self) -> bool {
        self.work.is_cancelled() || self.events.is_closed()
    }
}

#[cfg(test)]
mod tests {
    use layerfs::monitor::Monitor;

    use super::*;

    #[test]
    fn work_is_registered_until_it_ends() {
        let works = Arc::new(Works::default());
        let entry = works.begin("import x".into(), true).unwrap();
        assert_eq!(works.list()[0].label, "import x");
        assert!(!works.close_if_idle());
        drop(entry);
        assert!(works.list().is_empty());
        assert!(works.close_if_idle());
        assert_eq!(works.begin("late".into(), true).unwrap_err().class, Class::Busy);
    }

    #[test]
    fn one_closes_it_until_it_is_open_again() {
        let works = Works::default();
        assert!(works.close() && !works.close());
        works.reopen();
        assert!(works.close());
        works.reopen();
        assert!(works.close_if_idle() && !works.close());
    }

    #[test]
    fn works_are_counted_and_streams_are_not() {
        let works = Arc::new(Works::default());
        let streams: Vec<_> = (0..MOST_WORKS).map(|_| works.begin_stream().unwrap()).collect();
        let all: Vec<_> = (0..MOST_WORKS).map(|_| works.begin("push x".into(), true).unwrap()).collect();
        assert_eq!(works.begin("push x".into(), true).unwrap_err().class, Class::Busy);
        drop((works.begin("list".into(), false).unwrap(), works.begin_stream().unwrap()));
        assert_eq!(works.list().len(), 2 * MOST_WORKS);
        drop((streams, all));
        assert!(works.close());
        assert_eq!(works.begin_stream().unwrap_err().class, Class::Busy);
    }

    #[test]
    fn a_phase_counts_from_zero_and_a_gone_client_cancels() {
        let works = Arc::new(Works::default());
        let entry = works.begin("x".into(), true).unwrap();
        let (events, receiver) = mpsc::channel(1);
        let reporter = Reporter::new(entry.work().clone(), events);
        reporter.phase("reading", Some(10));
        reporter.advance(10);
        reporter.phase("writing", None);
        reporter.items(2);
        let expected = Progress { phase: "writing".into(), bytes: 0, total_bytes: None, items: 2 };
        assert_eq!(entry.work().progress(), expected);
        assert!(!reporter.is_cancelled());
        drop(receiver);
        assert!(reporter.is_cancelled());
    }
}
