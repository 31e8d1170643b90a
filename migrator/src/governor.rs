//! How fast, and in which order, transfers may use the network: rate limits, priorities, pausing, cancelling.
//!
//! It hides token buckets and the arithmetic of yielding behind one call: whoever writes to, or has read from, a link
//! awaits [`Gate::ready`] for each piece. All can be changed while transfers run. Invariants: over any second a bucket lets
//! through its rate and a tenth of that at most; a transfer that has to yield gets a trickle, never nothing, so that its
//! link stays alive, however many there are: in small pieces, first come first served; a pause takes effect between frames only; waiting holds no lock that a changed setting needs.
//!
//! What yields: a transfer of a lower priority, while one of a higher has something to move the same way. A transfer
//! that is slowed by its own limit leaves the rest to the others.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::clock::Clock;
use crate::meter::Meter;

/// A bucket holds what its rate gives in so many seconds: enough to make up for a timer that was late.
const BURST_SECONDS: f64 = 0.1;
/// What all transfers that have to yield share, in bytes per second, each way.
const TRICKLE: f64 = 16.0 * 1024.0;
/// So long after its last piece a transfer still counts as having something to move: it may be reading the next.
const LINGER: Duration = Duration::from_millis(150);
/// How often one that yields looks whether it has to.
const YIELD_CHECK: Duration = Duration::from_millis(25);
/// The largest piece that is let through at once.
const MAX_PIECE: usize = 128 * 1024;
/// The smallest.
const MIN_PIECE: usize = 1024;
/// A piece of a limited transfer is what goes in so many seconds.
const PIECE_SECONDS: f64 = 0.01;
/// What TLS adds to each record of up to 16 KiB.
const RECORD_OVERHEAD: usize = 22;
const RECORD_BYTES: usize = 16 * 1024;

/// Bytes per second; at least [`Rate::MIN`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rate(NonZeroU64);

impl Rate {
    /// The lowest rate, in bytes per second: below it a link could be taken for dead.
    pub const MIN: u64 = 1024;

    /// So many bytes per second, or [`Rate::MIN`] if that is more.
    pub fn new(bytes_per_second: u64) -> Rate {
        Rate(NonZeroU64::new(bytes_per_second.max(Rate::MIN)).unwrap_or(NonZeroU64::MIN))
    }

    /// In bytes per second.
    pub fn bytes_per_second(self) -> u64 {
        self.0.get()
    }
}

/// Who goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Only what others leave.
    Low,
    /// As usual.
    #[default]
    Normal,
    /// Somebody waits for it: a guest's last delta, a chunk that is being read.
    High,
}

impl Priority {
    /// All, the lowest first.
    pub const ALL: [Priority; 3] = [Priority::Low, Priority::Normal, Priority::High];

    fn index(self) -> usize {
        self as usize
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the peer.
    Out,
    /// From the peer.
    In,
}

/// What the receiving side of a transfer asks of the sending one: PROTOCOL.md, "Pace".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// No more than this.
    pub limit: Option<Rate>,
    /// How urgent it is.
    pub priority: Priority,
    /// Nothing for now.
    pub paused: bool,
}

/// Tokens are bytes. May be in debt, which makes what passes exact whatever the pieces' sizes.
#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl Default for Bucket {
    fn default() -> Bucket {
        Bucket { tokens: 0.0, filled: Instant::now() }
    }
}

impl Bucket {
    fn fill(&mut self, rate: f64, now: Instant) {
        let gained = now.saturating_duration_since(self.filled).as_secs_f64() * rate;
        self.tokens = (self.tokens + gained).min(rate * BURST_SECONDS);
        self.filled = now;
    }

    /// Takes `bytes` if the bucket isn't in debt; otherwise says how long it is.
    fn take(&mut self, rate: f64, bytes: f64, now: Instant) -> Option<Duration> {
        self.fill(rate, now);
        if self.tokens >= 0.0 {
            self.tokens -= bytes;
            return None;
        }
        Some(Duration::from_secs_f64((-self.tokens / rate).min(1.0)))
    }

    /// Takes `bytes` in any case.
    fn force(&mut self, rate: f64, bytes: f64, now: Instant) {
        self.fill(rate, now);
        self.tokens -= bytes;
    }
}

/// One way of all transfers together.
#[derive(Debug, Default)]
struct Lane {
    bucket: Mutex<Bucket>,
    trickle: Mutex<Bucket>,
    /// Who waits for the trickle, one after the other.
    trickle_turn: tokio::sync::Mutex<()>,
    /// Of each priority: who waits for or uses the network now.
    busy: [AtomicU32; 3],
    /// Of each priority: until when it counts as busy, in microseconds since the governor's beginning.
    lingers: [AtomicU64; 3],
    /// Of each priority: who waits for the common bucket, one after the other.
    turns: [tokio::sync::Mutex<()>; 3],
}

#[derive(Debug)]
struct Shared {
    clock: Clock,
    began: Instant,
    /// 0: none.
    limit: AtomicU64,
    lanes: [Lane; 2],
    changed: Notify,
}

impl Shared {
    fn limit(&self) -> Option<f64> {
        Some(self.limit.load(Ordering::Relaxed)).filter(|limit| *limit > 0).map(|limit| limit as f64)
    }

    fn lane(&self, way: Way) -> &Lane {
        &self.lanes[way as usize]
    }

    fn micros(&self) -> u64 {
        self.clock.now().saturating_duration_since(self.began).as_micros() as u64
    }

    /// Whether one of `priority` has to leave the way to others.
    fn yields(&self, way: Way, priority: Priority) -> bool {
        let lane = self.lane(way);
        let higher = priority.index() + 1..Priority::ALL.len();
        higher.into_iter().any(|other| {
            lane.busy[other].load(Ordering::Relaxed) > 0 || lane.lingers[other].load(Ordering::Relaxed) > self.micros()
        })
    }
}

/// What limits all transfers of a daemon together. Clones share it.
#[derive(Clone, Debug)]
pub struct Governor(Arc<Shared>);

impl Default for Governor {
    fn default() -> Governor {
        Governor::with(Clock::default())
    }
}

impl Governor {
    fn with(clock: Clock) -> Governor {
        Governor(Arc::new(Shared {
            began: clock.now(),
            clock,
            limit: AtomicU64::new(0),
            lanes: Default::default(),
            changed: Notify::new(),
        }))
    }

    /// What all transfers together may move, each way.
    pub fn limit(&self) -> Option<Rate> {
        Some(self.0.limit.load(Ordering::Relaxed)).filter(|limit| *limit > 0).map(Rate::new)
    }

    /// Changes [`Governor::limit`], at once.
    pub fn set_limit(&self, limit: Option<Rate>) {
        self.0.limit.store(limit.map_or(0, Rate::bytes_per_second), Ordering::Relaxed);
        self.0.changed.notify_waiters();
    }

    /// The gate of a new transfer.
    pub fn gate(&self, controls: Controls) -> Gate {
        Gate(Arc::new(Inner {
            shared: self.0.clone(),
            controls: Mutex::new(controls),
            asked: Mutex::default(),
            told: Mutex::new(Pace::default()),
            is_void: AtomicBool::new(false),
            was_slowed: AtomicBool::new(false),
            buckets: Default::default(),
            meters: Default::default(),
        }))
    }
}

/// How one transfer is to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Controls {
    /// The most that it may move, each way.
    pub limit: Option<Rate>,
    /// Who goes first.
    pub priority: Priority,
    /// It moves nothing.
    pub paused: bool,
    /// Pauses don't count, neither this side's nor the peer's: something stands still until it is over.
    #[serde(skip)]
    pub urgent: bool,
    /// The peer may raise the priority to high.
    #[serde(skip)]
    pub obliging: bool,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    controls: Mutex<Controls>,
    /// What the peer, as the receiving side, asked for.
    asked: Mutex<Option<Pace>>,
    /// What the peer, as the sending side, was told last.
    told: Mutex<Pace>,
    is_void: AtomicBool,
    was_slowed: AtomicBool,
    buckets: [Mutex<Bucket>; 2],
    meters: [Meter; 2],
}

/// A transfer's way to the network. Clones are the same; all connections of a transfer share one.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Inner>);

impl Default for Gate {
    /// A gate that nothing holds up.
    fn default() -> Gate {
        Governor::default().gate(Controls::default())
    }
}

impl Gate {
    /// The controls in force.
    pub fn controls(&self) -> Controls {
        *self.0.controls.lock()
    }

    /// Changes the controls, at once.
    pub fn change(&self, change: impl FnOnce(&mut Controls)) {
        change(&mut self.0.controls.lock());
        self.0.shared.changed.notify_waiters();
    }

    /// The receiving peer asks for `pace`.
    pub fn asked(&self, pace: Pace) {
        *self.0.asked.lock() = Some(pace);
        self.0.shared.changed.notify_waiters();
    }

    /// Takes over what the peer asked of `before`, an earlier gate of the same link.
    pub(crate) fn follow(&self, before: &Gate) {
        let asked = *before.0.asked.lock();
        let mut slot = self.0.asked.lock();
        *slot = slot.or(asked);
    }

    /// What to tell a sending peer, if it is something new. The daemon's own limit counts too, so that what is too much
    /// isn't sent in the first place.
    pub fn pace_to_tell(&self) -> Option<Pace> {
        let Controls { limit, priority, paused, .. } = self.controls();
        let common = Governor(self.0.shared.clone()).limit();
        let pace = Pace { limit: [limit, common].into_iter().flatten().min(), priority, paused };
        let mut told = self.0.told.lock();
        (std::mem::replace(&mut *told, pace) != pace).then_some(pace)
    }

    /// The controls with what the peer asks for.
    fn effective(&self) -> Controls {
        let mut controls = self.controls();
        let asked = *self.0.asked.lock();
        controls.paused |= asked.is_some_and(|asked| asked.paused);
        controls.paused &= !controls.urgent;
        let Some(asked) = asked else { return controls };
        controls.limit = [controls.limit, asked.limit].into_iter().flatten().min();
        match asked.priority {
            Priority::High if !controls.obliging => {}
            Priority::Normal => {}
            other => controls.priority = other,
        }
        controls
    }

    /// The transfer was given up: nothing waits any more, and what is queued need not go out.
    pub fn give_up(&self) {
        self.0.is_void.store(true, Ordering::Relaxed);
        self.0.shared.changed.notify_waiters();
    }

    /// Whether the transfer was given up.
    pub fn is_void(&self) -> bool {
        self.0.is_void.load(Ordering::Relaxed)
    }

    /// Whether it is paused, by either side.
    pub fn is_paused(&self) -> bool {
        self.effective().paused
    }

    /// The most bytes to ask for in one [`Gate::ready`].
    pub fn piece_bytes(&self, way: Way) -> usize {
        let Controls { limit, priority, .. } = self.effective();
        // The trickle would take many seconds for a large one, for which the other side hears nothing.
        if self.0.shared.yields(way, priority) {
            return MIN_PIECE;
        }
        let slowest = [limit.map(|rate| rate.bytes_per_second() as f64), self.0.shared.limit()];
        let rate = slowest.into_iter().flatten().fold(f64::INFINITY, f64::min);
        ((rate * PIECE_SECONDS) as usize).clamp(MIN_PIECE, MAX_PIECE)
    }

    /// Waits while the transfer is paused. Between frames.
    pub async fn open(&self) {
        loop {
            let changed = self.0.shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !self.effective().paused || self.is_void() {
                return;
            }
            self.0.was_slowed.store(true, Ordering::Relaxed);
            changed.await;
        }
    }

    /// Waits until `bytes` may go out, or, having come in, until more may be read. Hold the permit while they go.
    pub async fn ready(&self, way: Way, bytes: usize) -> Permit {
        self.0.meters[way as usize].add(bytes as u64);
        let cost = if self.is_void() { 0.0 } else { on_the_wire(bytes) };
        let was_limited = self.wait_for_own(way, cost).await;
        let priority = self.effective().priority;
        let permit = Permit::new(self.0.shared.clone(), way, priority, !was_limited);
        self.wait_for_higher(way, cost).await;
        self.wait_for_all(way, cost, priority).await;
        permit
    }

    /// Counts `bytes` that can't wait: answers and keep-alives.
    pub fn count(&self, way: Way, bytes: usize) {
        self.0.meters[way as usize].add(bytes as u64);
        let (cost, now) = (on_the_wire(bytes), self.0.shared.clock.now());
        if let Some(rate) = self.effective().limit {
            self.0.buckets[way as usize].lock().force(rate.bytes_per_second() as f64, cost, now);
        }
        if let Some(rate) = self.0.shared.limit() {
            self.0.shared.lane(way).bucket.lock().force(rate, cost, now);
        }
    }

    /// What has passed `way`.
    pub fn meter(&self, way: Way) -> &Meter {
        &self.0.meters[way as usize]
    }

    /// Returns whether there was something to wait for.
    async fn wait_for_own(&self, way: Way, cost: f64) -> bool {
        let bucket = &self.0.buckets[way as usize];
        let mut has_waited = false;
        while let Some(rate) = self.effective().limit {
            if self.is_void() {
                break;
            }
            let Some(wait) = bucket.lock().take(rate.bytes_per_second() as f64, cost, self.0.shared.clock.now()) else {
                break;
            };
            has_waited = true;
            self.sleep(wait).await;
        }
        has_waited
    }

    async fn wait_for_higher(&self, way: Way, cost: f64) {
        let shared = &self.0.shared;
        let lane = shared.lane(way);
        let turn = lane.trickle_turn.lock();
        tokio::pin!(turn);
        let mut its_turn = None;
        while !self.is_void() && shared.yields(way, self.effective().priority) {
            if its_turn.is_none() {
                tokio::select! {
                    biased;
                    first = &mut turn => its_turn = Some(first),
                    () = self.sleep(YIELD_CHECK) => {}
                }
                continue;
            }
            let wait = lane.trickle.lock().take(TRICKLE, cost, shared.clock.now());
            let Some(wait) = wait else { break };
            self.sleep(wait.min(YIELD_CHECK)).await;
        }
    }

    async fn wait_for_all(&self, way: Way, cost: f64, priority: Priority) {
        let shared = &self.0.shared;
        if shared.limit().is_none() || self.is_void() {
            return;
        }
        let lane = shared.lane(way);
        let _turn = lane.turns[priority.index()].lock().await;
        while let Some(rate) = shared.limit() {
            let wait = lane.bucket.lock().take(rate, cost, shared.clock.now()).filter(|_| !self.is_void());
            let Some(wait) = wait else { break };
            self.sleep(wait).await;
        }
    }

    /// Whether anything but the network ever held the transfer up.
    pub fn was_slowed(&self) -> bool {
        self.0.was_slowed.load(Ordering::Relaxed)
    }

    /// Waits for `time` or a changed setting.
    async fn sleep(&self, time: Duration) {
        self.0.was_slowed.store(true, Ordering::Relaxed);
        // Woken by the next change; one that came a moment ago is seen when the time is over.
        tokio::select! {
            () = self.0.shared.clock.sleep(time) => {}
            () = self.0.shared.changed.notified() => {}
        }
    }
}

/// Counts the transfer as having something to move. Dropped when the piece has gone.
#[derive(Debug)]
pub struct Permit {
    shared: Arc<Shared>,
    way: Way,
    priority: Priority,
    lingers: bool,
}

impl Permit {
    fn new(shared: Arc<Shared>, way: Way, priority: Priority, lingers: bool) -> Permit {
        shared.lane(way).busy[priority.index()].fetch_add(1, Ordering::Relaxed);
        Permit { shared, way, priority, lingers }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let (lane, index) = (self.shared.lane(self.way), self.priority.index());
        if self.lingers {
            let until = self.shared.micros() + LINGER.as_micros() as u64;
            lane.lingers[index].fetch_max(until, Ordering::Relaxed);
        }
        lane.busy[index].fetch_sub(1, Ordering::Relaxed);
    }
}

/// What `bytes` become by TLS.
fn on_the_wire(bytes: usize) -> f64 {
    (bytes + bytes.div_ceil(RECORD_BYTES) * RECORD_OVERHEAD) as f64
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn a_bucket_is_exact_whatever_the_pieces_and_however_late_the_timer() {
        for (rate, piece, late) in [(125e3, 1250.0, 0.02), (125e6, 131_072.0, 0.004), (1e6, 200_000.0, 0.0)] {
            let mut bucket = Bucket::default();
            let (mut now, mut moved) = (bucket.filled, 0.0);
            let end = now + Duration::from_secs(10);
            while now < end {
                match bucket.take(rate, piece, now) {
                    None => moved += piece,
                    Some(wait) => now += wait + Duration::from_secs_f64(late),
                }
            }
            let exactness = moved / (rate * 10.0);
            assert!((0.97..=1.03).contains(&exactness), "{rate}: {exactness}");
        }
    }

    #[tokio::test]
    async fn a_higher_priority_leaves_a_lower_one_a_trickle() {
        let governor = Governor::default();
        let gate = |priority| governor.gate(Controls { priority, ..Controls::default() });
        let (low, high) = (gate(Priority::Low), gate(Priority::High));
        assert!(!governor.0.yields(Way::Out, Priority::Low));
        let permit = high.ready(Way::Out, 1000).await;
        assert!(governor.0.yields(Way::Out, Priority::Normal) && !governor.0.yields(Way::Out, Priority::High));
        assert!(!governor.0.yields(Way::In, Priority::Low), "the ways are apart");
        // The trickle, once: the next has to wait for what is in debt.
        drop(low.ready(Way::Out, 64 * 1024).await);
        let waiting = low.ready(Way::Out, 1000);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(permit);
        assert!(governor.0.yields(Way::Out, Priority::Low), "it may be about to go on");
        drop(waiting.await);
        // One that its own limit holds up leaves the rest.
        high.change(|controls| controls.limit = Some(Rate::new(100_000)));
        while governor.0.yields(Way::Out, Priority::Low) {
            tokio::task::yield_now().await;
        }
        high.count(Way::Out, 20_000);
        drop(high.ready(Way::Out, 1000).await);
        assert!(!governor.0.yields(Way::Out, Priority::Low));
    }

    #[tokio::test]
    async fn limits_and_pauses_change_what_waits_already() {
        let governor = Governor::default();
        let gate = governor.gate(Controls { limit: Some(Rate::new(1024)), ..Controls::default() });
        drop(gate.ready(Way::Out, 1 << 20).await);
        let waiting = gate.ready(Way::Out, 1);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        gate.change(|controls| controls.limit = None);
        drop(waiting.await);

        governor.set_limit(Some(Rate::new(1024)));
        drop(gate.ready(Way::Out, 1 << 20).await);
        let waiting = gate.ready(Way::Out, 1);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        governor.set_limit(None);
        drop(waiting.await);

        gate.asked(Pace { paused: true, ..Pace::default() });
        let opening = gate.open();
        tokio::pin!(opening);
        assert!(futures::poll!(&mut opening).is_pending() && gate.is_paused());
        gate.asked(Pace::default());
        opening.await;

        let gate = governor.gate(Controls { paused: true, urgent: true, ..Controls::default() });
        gate.asked(Pace { paused: true, ..Pace::default() });
        gate.open().await;
        assert!(!gate.is_paused());

        let gate = governor.gate(Controls { limit: Some(Rate::new(1024)), paused: true, ..Controls::default() });
        gate.count(Way::Out, 1 << 20);
        gate.give_up();
        gate.open().await;
        drop(gate.ready(Way::Out, 1).await);
    }

    #[test]
    fn a_peer_may_ask_for_less_and_only_an_obliging_gate_gives_more() {
        let governor = Governor::default();
        let gate = governor.gate(Controls { limit: Some(Rate::new(5000)), ..Controls::default() });
        gate.asked(Pace { limit: Some(Rate::new(9000)), priority: Priority::High, paused: false });
        assert_eq!(gate.effective(), Controls { limit: Some(Rate::new(5000)), ..Controls::default() });
        gate.asked(Pace { limit: Some(Rate::new(2000)), priority: Priority::Low, paused: false });
        assert_eq!((gate.effective().limit, gate.effective().priority), (Some(Rate::new(2000)), Priority::Low));
        gate.change(|controls| controls.obliging = true);
        gate.asked(Pace { limit: None, priority: Priority::High, paused: false });
        assert_eq!((gate.effective().limit, gate.effective().priority), (Some(Rate::new(5000)), Priority::High));

        assert!(gate.pace_to_tell().is_some() && gate.pace_to_tell().is_none());
        governor.set_limit(Some(Rate::new(3000)));
        assert_eq!(gate.pace_to_tell().and_then(|pace| pace.limit), Some(Rate::new(3000)));
    }

    /// How far `governor` has let through more than its limit `way`, in bytes.
    fn debt(governor: &Governor, way: Way) -> f64 {
        let mut bucket = governor.0.lane(way).bucket.lock();
        bucket.fill(governor.limit().unwrap().bytes_per_second() as f64, Instant::now());
        -bucket.tokens
    }

    #[tokio::test]
    async fn what_several_links_bring_keeps_to_the_common_limit_whichever_message_it_is() {
        use crate::link::{Link, Patience};
        use crate::wire::{self, Bundle, ChunksWriter, Message};

        let bundle = |pages: Vec<u16>, bases| {
            let frame = vec![7; 120_000].into();
            Message::Bundle(Bundle { bases, pages, first: None, chunks: 1, plain_bytes: 4096, frame })
        };
        let plain = crate::tests::pair::noise(1, 120_000);
        let id = layerfs::ChunkId::of(&plain);
        let chunk = layerfs::chunk::encode(id, layerfs::chunk::Class::Data, &plain, 1).stored().clone();
        let mut writer = ChunksWriter::default();
        writer.push(&chunk);
        let mut frames = [writer.finish().to_vec(), Vec::new(), Vec::new()];
        wire::encode(&bundle(Vec::new(), Vec::new()), &mut frames[1]);
        wire::encode(&bundle(vec![1], vec![[1; 8]]), &mut frames[2]);
        for frame in frames {
            let governor = Governor::default();
            governor.set_limit(Some(Rate::new(1_000_000)));
            let pull = |frame: Vec<u8>| {
                let governor = governor.clone();
                async move {
                    let (near, far) = tokio::io::duplex(1 << 20);
                    let mut link = Link::start(near, "there", Patience::default());
                    link.govern(governor.gate(Controls::default()));
                    let (_, mut out) = tokio::io::split(far);
                    let mut bytes = Vec::new();
                    wire::encode(&Message::Hello(wire::Hello::OURS), &mut bytes);
                    bytes.extend([&frame[..]; 3].concat());
                    tokio::io::AsyncWriteExt::write_all(&mut out, &bytes).await.unwrap();
                    for _ in 0..3 {
                        assert!(link.recv().await.unwrap().is_bulk());
                        // What was read last may be owed, and what is small: nothing else.
                        let debt = debt(&governor, Way::In);
                        assert!(debt <= on_the_wire(frame.len()) + 1000.0, "{debt} bytes of type {:#x}", frame[4]);
                    }
                }
            };
            tokio::join!(pull(frame.clone()), pull(frame.clone()));
        }
    }

    #[test]
    fn however_many_have_to_yield_each_gets_its_share_of_the_trickle() {
        use std::cell::Cell;
        use std::rc::Rc;

        use crate::clock::simulated::Time;

        let time = Arc::new(Time::default());
        let clock = Clock::simulated(&time);
        let governor = Governor::with(clock.clone());
        let gate = |priority| governor.gate(Controls { priority, ..Controls::default() });
        let (normal, low) = (gate(Priority::Normal), gate(Priority::Low));
        let mut pool = futures::executor::LocalPool::new();
        let spawner = pool.spawner();
        let spawn = |task| futures::task::LocalSpawnExt::spawn_local(&spawner, task).unwrap();
        let left = Rc::new(Cell::new(16));
        let longest = Rc::new(Cell::new(Duration::ZERO));
        let busy = {
            let (clock, left) = (clock.clone(), left.clone());
            async move {
                while left.get() > 0 {
                    let permit = normal.ready(Way::Out, normal.piece_bytes(Way::Out)).await;
                    clock.sleep(Duration::from_millis(10)).await;
                    drop(permit);
                }
            }
        };
        spawn(busy.boxed_local());
        let began = clock.now();
        for _ in 0..16 {
            let (clock, left, low, longest) = (clock.clone(), left.clone(), low.clone(), longest.clone());
            let one = async move {
                for _ in 0..50 {
                    let asked = clock.now();
                    drop(low.ready(Way::Out, low.piece_bytes(Way::Out)).await);
                    longest.set(longest.get().max(clock.now() - asked));
                }
                left.set(left.get() - 1);
            };
            spawn(one.boxed_local());
        }
        pool.run_until_stalled();
        while left.get() > 0 {
            assert!(time.pass(), "nobody sleeps, and {} wait", left.get());
            pool.run_until_stalled();
        }
        assert!(longest.get() <= Duration::from_secs(10), "{:?}", longest.get());
        // It was a trickle.
        let rate = 16.0 * 50.0 * MIN_PIECE as f64 / (clock.now() - began).as_secs_f64();
        assert!((0.8 * TRICKLE..=TRICKLE).contains(&rate), "{rate} bytes per second");
    }
}
