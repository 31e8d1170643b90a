//! What a transfer cost, and the counters behind it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use layerfs::LayerName;
use parking_lot::Mutex;
use serde::Serialize;

/// What a transfer did. Bytes are those on the socket, TLS included.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TransferReport {
    /// The peer's name.
    pub peer: String,
    /// The names that were moved.
    pub names: Vec<LayerName>,
    /// How many of them were set; the others were there already.
    pub names_changed: u16,
    /// Layers in the named stacks.
    pub layers: u64,
    /// Layers that the receiver lacked.
    pub layers_sent: u64,
    /// Bytes that this side wrote to the socket.
    pub bytes_sent: u64,
    /// Bytes that this side read from the socket.
    pub bytes_received: u64,
    /// Chunks that went over the link.
    pub chunks_sent: u64,
    /// Their plain bytes.
    pub chunk_plain_bytes: u64,
    /// Their bytes as stored and sent.
    pub chunk_stored_bytes: u64,
    /// Chunks that were asked for and were there already (those of layers in common aren't even asked for).
    pub chunks_reused: u64,
    /// The most connections that it had at a time.
    pub connections: u64,
    /// How often it was begun again because the link had failed.
    pub retries: u64,
    /// Bytes of frames that went out again because one of several connections was lost.
    pub resent_bytes: u64,
    /// The sending side waited longer for the link than the link for it: bytes over time tell how fast the link is. Only the sender knows.
    pub link_was_full: bool,
    /// Nothing was moved: the chunks are those that would have been.
    pub dry_run: bool,
    /// In a dry run: the bytes that would have gone over, TLS not included.
    pub would_send_bytes: u64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// How long each phase took.
    pub phases: Vec<Phase>,
}

/// A part of a transfer.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// "connect", "negotiate", "send", "commit".
    pub name: &'static str,
    /// How long it took, in seconds.
    pub seconds: f64,
}

#[derive(Debug, Default)]
struct Phases {
    done: Vec<Phase>,
    current: Option<(&'static str, Instant)>,
}

/// The counters of one transfer while it runs.
#[derive(Debug)]
pub(crate) struct Tally {
    started: Instant,
    phases: Mutex<Phases>,
    pub chunks: AtomicU64,
    pub plain_bytes: AtomicU64,
    pub stored_bytes: AtomicU64,
    pub reused: AtomicU64,
    pub would_send_bytes: AtomicU64,
    pub layers: AtomicU64,
    pub layers_lacking: AtomicU64,
    pub connections: AtomicU64,
    pub retries: AtomicU64,
    pub resent_bytes: AtomicU64,
    /// How long the link had nothing to send, and how long what was to be sent waited for it, in microseconds.
    pub link_idle_micros: AtomicU64,
    pub link_full_micros: AtomicU64,
    /// Plain bytes of what was asked for or sent unasked: the most that is still to come, as far as is known.
    pub expected_bytes: AtomicU64,
    /// Plain bytes of the layers that the receiver lacks, of whose chunks it may have any number.
    pub lacking_bytes: AtomicU64,
}

impl Tally {
    pub fn new() -> Tally {
        let count = || AtomicU64::new(0);
        Tally {
            started: Instant::now(),
            phases: Mutex::default(),
            chunks: count(),
            plain_bytes: count(),
            stored_bytes: count(),
            reused: count(),
            would_send_bytes: count(),
            layers: count(),
            layers_lacking: count(),
            connections: AtomicU64::new(1),
            retries: count(),
            resent_bytes: count(),
            link_idle_micros: count(),
            link_full_micros: count(),
            expected_bytes: count(),
            lacking_bytes: count(),
        }
    }

    /// Phase `name` begins, the last one ends.
    pub fn phase(&self, name: &'static str) {
        let mut phases = self.phases.lock();
        let now = Instant::now();
        if let Some((name, since)) = phases.current.replace((name, now)) {
            phases.done.push(Phase { name, seconds: seconds(now - since) });
        }
    }

    /// Everything counted so far.
    pub fn report(&self) -> TransferReport {
        let phases = self.phases.lock();
        let mut all = phases.done.clone();
        all.extend(phases.current.map(|(name, since)| Phase { name, seconds: seconds(since.elapsed()) }));
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TransferReport {
            layers: get(&self.layers),
            layers_sent: get(&self.layers_lacking),
            chunks_sent: get(&self.chunks),
            chunk_plain_bytes: get(&self.plain_bytes),
            chunk_stored_bytes: get(&self.stored_bytes),
            chunks_reused: get(&self.reused),
            connections: get(&self.connections),
            retries: get(&self.retries),
            resent_bytes: get(&self.resent_bytes),
            link_was_full: get(&self.link_full_micros) > get(&self.link_idle_micros),
            would_send_bytes: get(&self.would_send_bytes),
            seconds: seconds(self.started.elapsed()),
            phases: all,
            ..TransferReport::default()
        }
    }
}

/// Whole microseconds are enough.
fn seconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e6
}
