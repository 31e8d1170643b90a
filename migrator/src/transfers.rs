//! The transfers of a node: those that run, either way and whoever began them, and those that ended of late.
//!
//! It hides where progress, rates and controls of a transfer are kept; a [`Transfer`] is the [`Monitor`] that the drivers
//! report to. Invariants: a transfer is listed from before its first message until [`KEPT_FOR`] after its end, and of
//! those that ended at most [`KEPT`]; numbers are never used twice while the node lives; a cancelled transfer fails
//! with [`layerfs::Error::Cancelled`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use layerfs::error::ErrorClass;
use layerfs::monitor::Monitor;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Notify;

use crate::error::{Error, Result};
use crate::governor::{Controls, Gate, Governor, Way};
use crate::meter::Meter;

/// So many transfers that ended are remembered.
pub const KEPT: usize = 32;
/// For so long.
pub const KEPT_FOR: Duration = Duration::from_secs(15 * 60);
/// A peer may have so many transfers at a time with this host; those that were begun here don't count.
pub const MAX_OF_PEER: usize = 16;

/// Which side of a transfer this host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Layers go from here to the peer.
    Sending,
    /// Layers come from the peer.
    Receiving,
}

impl Role {
    /// Which way the chunks go.
    pub fn way(self) -> Way {
        match self {
            Role::Sending => Way::Out,
            Role::Receiving => Way::In,
        }
    }
}

/// Who began a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Somebody at this host.
    Here,
    /// The peer.
    Peer,
}

/// How a transfer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It runs.
    Running,
    /// Either side holds it.
    Paused,
    /// It ended well.
    Done,
    /// It ended otherwise.
    Failed,
    /// It was cancelled at this host, or cut off by its end.
    Cancelled,
}

/// What is known of a transfer.
#[derive(Clone, Debug, Serialize)]
pub struct TransferInfo {
    /// Its number.
    pub id: u64,
    /// Which side this host is.
    pub role: Role,
    /// Who began it.
    pub origin: Origin,
    /// The peer's name.
    pub peer: String,
    /// The layers' names; empty until known.
    pub names: Vec<String>,
    /// Nothing is moved: it only finds out what would be.
    pub dry_run: bool,
    /// How it stands.
    pub state: State,
    /// What is being done.
    pub phase: String,
    /// Plain bytes of layers done, of which those that were there already are a part.
    pub bytes: u64,
    /// How many there are, if known.
    pub total_bytes: Option<u64>,
    /// Chunks moved.
    pub chunks: u64,
    /// Bytes written to the network.
    pub bytes_sent: u64,
    /// Bytes read from the network.
    pub bytes_received: u64,
    /// Bytes per second on the network of late, the chunks' way.
    pub rate: f64,
    /// How much longer it takes, as far as one can tell.
    pub seconds_left: Option<f64>,
    /// How long it has taken.
    pub seconds: f64,
    /// How it is to go.
    #[serde(flatten)]
    pub controls: Controls,
    /// Connections that carry it.
    pub connections: u32,
    /// Why it failed.
    pub error: Option<String>,
}

/// How far a transfer is.
#[derive(Debug)]
struct Course {
    phase: String,
    total: Option<u64>,
    since: Instant,
    /// How long the phase took in which chunks were moved.
    moving: Option<Duration>,
    outcome: Option<(State, Option<String>, Instant)>,
}

/// One transfer. Reports to it go on to the monitor of who asked for it.
pub struct Transfer {
    id: u64,
    role: Role,
    origin: Origin,
    peer: String,
    names: Mutex<Vec<String>>,
    gate: Gate,
    monitor: Arc<dyn Monitor>,
    started: Instant,
    course: Mutex<Course>,
    bytes: AtomicU64,
    plain: Meter,
    chunks: AtomicU64,
    connections: AtomicU32,
    is_cancelled: AtomicBool,
    is_dry: AtomicBool,
}

impl Transfer {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Which side of it this host is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its gate, which every connection of it passes.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// What is being moved, once it is known.
    pub fn set_names(&self, names: impl Iterator<Item = String>) {
        *self.names.lock() = names.collect();
    }

    /// Whether it moves nothing, and only finds out what would be moved.
    pub fn set_dry(&self, is_dry: bool) {
        self.is_dry.store(is_dry, Relaxed);
    }

    /// So many connections carry it now.
    pub fn set_connections(&self, count: u32) {
        self.connections.store(count, Relaxed);
    }

    /// Makes it end as soon as it can.
    pub fn cancel(&self) {
        self.is_cancelled.store(true, Relaxed);
        self.gate.give_up();
    }

    /// What is known of it.
    pub fn info(&self) -> TransferInfo {
        let course = self.course.lock();
        let (bytes, controls) = (self.bytes.load(Relaxed), self.gate.controls());
        let state = match &course.outcome {
            Some((state, ..)) => *state,
            None if self.gate.is_paused() => State::Paused,
            None => State::Running,
        };
        let ended = course.outcome.as_ref().map(|(_, _, at)| *at);
        let is_running = state == State::Running;
        TransferInfo {
            id: self.id,
            role: self.role,
            origin: self.origin,
            peer: self.peer.clone(),
            names: self.names.lock().clone(),
            dry_run: self.is_dry.load(Relaxed),
            state,
            phase: course.phase.clone(),
            bytes,
            total_bytes: course.total,
            chunks: self.chunks.load(Relaxed),
            bytes_sent: self.gate.meter(Way::Out).total(),
            bytes_received: self.gate.meter(Way::In).total(),
            rate: if is_running { self.gate.meter(self.role.way()).rate() } else { 0.0 },
            seconds_left: is_running.then(|| self.seconds_left(&course, bytes)).flatten(),
            seconds: ended.unwrap_or_else(Instant::now).duration_since(self.started).as_secs_f64(),
            controls,
            connections: if ended.is_some() { 0 } else { self.connections.load(Relaxed) },
            error: course.outcome.as_ref().and_then(|(_, error, _)| error.clone()),
        }
    }

    /// By the rate of late; by that of the whole phase if nothing came of late.
    fn seconds_left(&self, course: &Course, bytes: u64) -> Option<f64> {
        let left = course.total?.checked_sub(bytes)?;
        let of_late = self.plain.rate();
        let average = bytes as f64 / course.since.elapsed().as_secs_f64().max(0.001);
        let rate = if of_late > 0.0 { of_late } else { average };
        (rate > 0.0).then(|| left as f64 / rate)
    }

    /// How fast the network was, in bytes per second, the chunks' way: if enough was moved to tell, and nothing but the
    /// network held it up.
    pub fn measured_rate(&self) -> Option<u64> {
        let seconds = self.course.lock().moving?.as_secs_f64();
        let moved = self.gate.meter(self.role.way()).total();
        let is_enough = (moved >= 1 << 20 && seconds >= 1.0) || moved >= 32 << 20;
        (is_enough && !self.gate.was_slowed()).then(|| (moved as f64 / seconds.max(0.001)) as u64)
    }

    fn end(&self, state: State, error: Option<String>) {
        let mut course = self.course.lock();
        course.outcome.get_or_insert((state, error, Instant::now()));
    }
}

impl Monitor for Transfer {
    fn phase(&self, name: &str, total_bytes: Option<u64>) {
        let mut course = self.course.lock();
        if course.phase != name {
            // The bytes of the last phase with a total stay on show.
            if total_bytes.is_some() {
                self.bytes.store(0, Relaxed);
                course.since = Instant::now();
            } else if course.total.is_some() && course.moving.is_none() {
                course.moving = Some(course.since.elapsed());
            }
            course.phase = name.to_owned();
        }
        course.total = total_bytes.or(course.total);
        drop(course);
        self.monitor.phase(name, total_bytes);
    }

    fn advance(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
        self.plain.add(bytes);
        self.monitor.advance(bytes);
    }

    fn items(&self, count: u64) {
        self.chunks.fetch_add(count, Relaxed);
        self.monitor.items(count);
    }

    fn warn(&self, message: &str) {
        self.monitor.warn(message);
    }

    fn is_cancelled(&self) -> bool {
        let is_cancelled = self.is_cancelled.load(Relaxed) || self.monitor.is_cancelled();
        if is_cancelled {
            self.gate.give_up();
        }
        is_cancelled
    }
}

/// What is to be transferred.
pub struct Plan {
    /// Which side this host is.
    pub role: Role,
    /// Who began it.
    pub origin: Origin,
    /// The peer's name.
    pub peer: String,
    /// The layers' names, as far as known.
    pub names: Vec<String>,
    /// How it is to go.
    pub controls: Controls,
    /// The number that it is to have: one of [`Transfers::new_id`].
    pub id: Option<u64>,
}

#[derive(Default)]
struct Register {
    running: BTreeMap<u64, Arc<Transfer>>,
    ended: VecDeque<Arc<Transfer>>,
}

impl Register {
    fn forget_old(&mut self) {
        let is_old = |transfer: &Arc<Transfer>| {
            let course = transfer.course.lock();
            course.outcome.as_ref().is_some_and(|(_, _, at)| at.elapsed() > KEPT_FOR)
        };
        while self.ended.len() > KEPT || self.ended.front().is_some_and(is_old) {
            self.ended.pop_front();
        }
    }
}

/// The transfers of a node. Clones share them.
#[derive(Clone, Default)]
pub struct Transfers(Arc<Inner>);

#[derive(Default)]
struct Inner {
    governor: Governor,
    last_id: AtomicU64,
    register: Mutex<Register>,
    /// Told whenever a transfer has begun.
    has_begun: Notify,
}

impl Transfers {
    /// What limits all of them together.
    pub fn governor(&self) -> &Governor {
        &self.0.governor
    }

    /// A number for a transfer.
    pub fn new_id(&self) -> u64 {
        self.0.last_id.fetch_add(1, Relaxed) + 1
    }

    /// All that run, then those that ended, the latest last.
    pub fn list(&self) -> Vec<TransferInfo> {
        let mut register = self.0.register.lock();
        register.forget_old();
        register.ended.iter().chain(register.running.values()).map(|transfer| transfer.info()).collect()
    }

    /// Waits until the transfer with this number has begun, from when on it is listed.
    pub async fn begun(&self, id: u64) {
        loop {
            let told = self.0.has_begun.notified();
            let mut told = std::pin::pin!(told);
            // What begins from here on is told.
            told.as_mut().enable();
            if self.list().iter().any(|transfer| transfer.id == id) {
                return;
            }
            told.await;
        }
    }

    /// The running transfer with this number.
    ///
    /// # Errors
    /// [`layerfs::Error::NotFound`].
    pub fn get(&self, id: u64) -> Result<Arc<Transfer>> {
        let found = self.0.register.lock().running.get(&id).cloned();
        Ok(found.ok_or_else(|| layerfs::Error::NotFound { what: "running transfer", name: id.to_string() })?)
    }

    /// A transfer begins. It is listed as running until the [`Entry`] is dropped.
    ///
    /// # Errors
    /// If the peer that begins it has too many already.
    pub fn begin(&self, plan: Plan, monitor: Arc<dyn Monitor>) -> Result<Entry> {
        let id = plan.id.unwrap_or_else(|| self.new_id());
        let now = Instant::now();
        let transfer = Arc::new(Transfer {
            id,
            role: plan.role,
            origin: plan.origin,
            peer: plan.peer,
            names: Mutex::new(plan.names),
            gate: self.0.governor.gate(plan.controls),
            monitor,
            started: now,
            course: Mutex::new(Course {
                phase: "starting".to_owned(),
                total: None,
                since: now,
                moving: None,
                outcome: None,
            }),
            bytes: AtomicU64::new(0),
            plain: Meter::default(),
            chunks: AtomicU64::new(0),
            connections: AtomicU32::new(0),
            is_cancelled: AtomicBool::new(false),
            is_dry: AtomicBool::new(false),
        });
        let mut register = self.0.register.lock();
        let is_of_same = |other: &&Arc<Transfer>| other.origin == Origin::Peer && other.peer == transfer.peer;
        if transfer.origin == Origin::Peer && register.running.values().filter(is_of_same).count() >= MAX_OF_PEER {
            let message = format!("{MAX_OF_PEER} transfers with this host run already; wait until one has ended");
            return Err(Error::refused(ErrorClass::Busy, message));
        }
        register.running.insert(id, transfer.clone());
        drop(register);
        self.0.has_begun.notify_waiters();
        Ok(Entry { transfers: self.clone(), transfer })
    }
}

/// A running transfer's place in the list.
pub struct Entry {
    transfers: Transfers,
    transfer: Arc<Transfer>,
}

impl Entry {
    /// The transfer.
    pub fn transfer(&self) -> &Arc<Transfer> {
        &self.transfer
    }

    /// The same, for drivers to report to.
    pub fn monitor(&self) -> Arc<dyn Monitor> {
        self.transfer.clone()
    }

    /// It ended so; passes `result` on.
    pub fn end<T>(self, result: Result<T>) -> Result<T> {
        match &result {
            Ok(_) => self.transfer.end(State::Done, None),
            Err(Error::Store(layerfs::Error::Cancelled)) => self.transfer.end(State::Cancelled, None),
            Err(error) => self.transfer.end(State::Failed, Some(error.to_string())),
        }
        result
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Without an outcome its task was dropped: the connection or the daemon ends.
        self.transfer.end(State::Cancelled, Some("it was cut off".to_owned()));
        let mut register = self.transfers.0.register.lock();
        register.running.remove(&self.transfer.id);
        register.ended.push_back(self.transfer.clone());
        register.forget_old();
    }
}

#[cfg(test)]
mod tests {
    use layerfs::monitor::Silent;

    use super::*;
    use crate::governor::{Priority, Rate};

    fn plan(origin: Origin) -> Plan {
        let controls = Controls { limit: Some(Rate::new(5000)), priority: Priority::Low, ..Controls::default() };
        let (peer, names) = ("edge".to_owned(), vec!["app".to_owned()]);
        Plan { role: Role::Sending, origin, peer, names, controls, id: None }
    }

    #[test]
    fn a_transfer_is_listed_while_it_runs_and_for_a_while_after() {
        let transfers = Transfers::default();
        let entry = transfers.begin(plan(Origin::Here), Arc::new(Silent)).unwrap();
        let transfer = transfers.get(1).unwrap();
        transfer.phase("sending", Some(100));
        transfer.advance(40);
        let info = &transfers.list()[0];
        assert_eq!((info.id, info.state, info.bytes, info.total_bytes), (1, State::Running, 40, Some(100)));
        assert_eq!((info.controls.limit, info.controls.priority), (Some(Rate::new(5000)), Priority::Low));
        transfer.gate().change(|controls| controls.paused = true);
        assert_eq!((transfers.list()[0].state, transfers.list()[0].seconds_left), (State::Paused, None));
        transfer.phase("verifying", None);
        assert_eq!(transfers.list()[0].bytes, 40);
        let failed = entry.end::<()>(Err(Error::Closed { peer: "edge".to_owned() }));
        assert!(failed.is_err());
        let info = &transfers.list()[0];
        assert!(info.state == State::Failed && info.error.as_ref().is_some_and(|text| text.contains("edge")));
        assert!(transfers.get(1).is_err(), "it can no longer be changed");
        for _ in 0..KEPT + 3 {
            let entry = transfers.begin(plan(Origin::Here), Arc::new(Silent)).unwrap();
            let _ = entry.end(Ok(()));
        }
        assert_eq!(transfers.list().len(), KEPT);
    }

    #[test]
    fn cancelling_ends_it_as_cancelled() {
        let transfers = Transfers::default();
        let entry = transfers.begin(plan(Origin::Here), Arc::new(Silent)).unwrap();
        transfers.get(1).unwrap().cancel();
        let checked = layerfs::monitor::check(entry.monitor().as_ref()).map_err(Error::from);
        assert!(entry.end(checked).is_err());
        assert_eq!(transfers.list()[0].state, State::Cancelled);
    }

    #[test]
    fn a_peer_has_so_many_at_a_time() {
        let transfers = Transfers::default();
        let begin = || transfers.begin(plan(Origin::Peer), Arc::new(Silent));
        let mut running: Vec<Entry> = (0..MAX_OF_PEER).map(|_| begin().unwrap()).collect();
        assert_eq!(begin().err().map(|error| error.class()), Some(ErrorClass::Busy));
        assert!(transfers.begin(plan(Origin::Here), Arc::new(Silent)).is_ok());
        running.pop();
        assert!(begin().is_ok());
    }
}
