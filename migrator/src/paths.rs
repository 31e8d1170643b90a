//! How many connections a transfer has, over which routes, and their coming and going.
//!
//! One to begin with; one for each further route as soon as there is something to carry; then twice as many whenever
//! something says that one isn't enough (a long round trip, losses, a window that is full), for as long as that makes the
//! transfer faster. Invariants: a connection that fails costs nothing but what it carried; its route is tried again
//! later, ever more seldom.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::dial::{Dialer, Route, Transport};
use crate::error::Result;
use crate::group::{Token, Trunk};
use crate::link::{Link, Patience};
use crate::progress::Tally;
use crate::retry::RetryFor;
use crate::socket::{FAR_ROUND_TRIP, Info, Probe};
use crate::transfers::Transfer;
use crate::wire::Message;

/// The most connections that are chosen without being told.
pub const MAX_AUTO: usize = 32;
/// How often the transfer is looked at: what there is to carry is known in between, and who is to help with it shall be called at once.
const TICK: Duration = Duration::from_millis(25);
/// The shortest time over which a rate is taken.
const SHORTEST_ROUND: Duration = Duration::from_millis(500);
const LONGEST_ROUND: Duration = Duration::from_secs(3);
/// So much in one round is worth further connections.
const ENOUGH_BYTES: u64 = 256 << 10;
/// A rate counts as better from here on, in percent of the one before.
const BETTER_PERCENT: u64 = 112;
const SOME_ROUND_TRIP: Duration = Duration::from_millis(4);
/// With a long round trip, from so much to carry on, several connections are opened before the first has shown what it
/// can do: by then they are up to speed together.
const MUCH_BYTES: u64 = 4 << 20;
/// From so much on a shorter round trip is reason enough.
const VERY_MUCH_BYTES: u64 = 16 << 20;
/// So many begin together then, over a short and over a long round trip: each doubles what it carries with every one.
const FEW: usize = 4;
const MANY: usize = 16;
/// From so much that may have to be carried over a long round trip, there are as many as there may be.
const HUGE_BYTES: u64 = 1 << 30;
/// A connection keeps so much under way without effort; without losses more of them are of no use, and stand in each other's way.
const EASY_BYTES: u64 = 512 << 10;
/// After a round that brought nothing, so long until the next try.
const REST: Duration = Duration::from_secs(15);
/// After a connection failed, so long until its route is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How many connections a transfer may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Connections {
    /// As many as it takes, up to [`MAX_AUTO`].
    #[default]
    Auto,
    /// So many.
    Exactly(u8),
}

/// How a transfer uses the network. What is `None` is as the node has it.
#[derive(Clone, Copy, Debug, Default)]
pub struct PathOptions {
    /// How many connections.
    pub connections: Option<Connections>,
    /// Over what.
    pub transport: Option<Transport>,
    /// For how long a failed link is tried again.
    pub retry_for: Option<RetryFor>,
    /// For connecting and for the handshake, each.
    pub connect: Option<Duration>,
    /// After so long without a word, a link is dead.
    pub idle: Option<Duration>,
    /// Not to call at all, but to use what is brought as this ([`crate::streams::Streams::bring`]).
    pub stream: Option<u64>,
}

impl PathOptions {
    pub(crate) fn or(self, below: PathOptions) -> PathOptions {
        PathOptions {
            connections: self.connections.or(below.connections),
            transport: self.transport.or(below.transport),
            retry_for: self.retry_for.or(below.retry_for),
            connect: self.connect.or(below.connect),
            idle: self.idle.or(below.idle),
            stream: self.stream.or(below.stream),
        }
    }

    /// The patience that this asks for, and `below` where it says nothing.
    pub fn patience(&self, below: Patience) -> Patience {
        let idle = self.idle.unwrap_or(below.idle);
        Patience { connect: self.connect.unwrap_or(below.connect), idle, keep_alive: below.keep_alive.min(idle / 3) }
    }
}

/// What is seen of a transfer at one time.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    /// Bytes that have passed, both ways.
    bytes: u64,
    /// Whether frames wait for a connection with room. Unknown to a receiver.
    is_backed_up: Option<bool>,
    /// What is to be carried at most, as far as is known.
    expected_bytes: u64,
    /// Bytes of the layers that the receiver lacks, of which it may have most.
    lacking_bytes: u64,
    info: Info,
}

impl Sample {
    /// How many connections to begin with.
    fn first_target(&self, routes: usize) -> usize {
        let is_far = self.info.round_trip >= FAR_ROUND_TRIP;
        let few = match self.expected_bytes {
            VERY_MUCH_BYTES.. if is_far && self.lacking_bytes >= HUGE_BYTES => MAX_AUTO,
            VERY_MUCH_BYTES.. if is_far => MANY,
            VERY_MUCH_BYTES.. if self.info.round_trip >= SOME_ROUND_TRIP => FEW,
            _ if is_far => FEW,
            _ => 1,
        };
        routes.max(few)
    }

    /// Whether so much is to come that several connections shall begin together.
    fn is_much(&self) -> bool {
        match self.expected_bytes {
            VERY_MUCH_BYTES.. => self.info.round_trip >= SOME_ROUND_TRIP,
            MUCH_BYTES.. => self.info.round_trip >= FAR_ROUND_TRIP,
            _ => false,
        }
    }
}

/// Decides how many connections there should be. Pure.
#[derive(Debug)]
struct Chooser {
    choice: Connections,
    routes: usize,
    target: usize,
    round: Round,
    /// The rate before the last growth, in bytes a second.
    before: Option<u64>,
    rest_until: Option<Instant>,
    has_spread: bool,
}

#[derive(Debug)]
struct Round {
    since: Instant,
    bytes: u64,
    samples: u32,
    backed_up: u32,
    /// The first round after a change says nothing.
    is_settling: bool,
}

impl Chooser {
    fn new(choice: Connections, routes: usize, now: Instant) -> Chooser {
        let target = match choice {
            Connections::Auto => 1,
            Connections::Exactly(count) => usize::from(count).max(1),
        };
        let round = Round { since: now, bytes: 0, samples: 0, backed_up: 0, is_settling: true };
        Chooser { choice, routes, target, round, before: None, rest_until: None, has_spread: false }
    }

    /// How many connections there should be now.
    fn look(&mut self, now: Instant, sample: Sample) -> usize {
        if self.choice != Connections::Auto {
            return self.target;
        }
        self.round.samples += 1;
        self.round.backed_up += u32::from(sample.is_backed_up.unwrap_or(true));
        let bytes = sample.bytes - self.round.bytes;
        let is_worth_it = bytes > ENOUGH_BYTES && self.is_busy() || sample.is_much();
        if !self.has_spread && is_worth_it {
            self.has_spread = true;
            // There is something to carry: every route shall do its part, and a long one gets up to speed by several.
            let first = sample.first_target(self.routes);
            if first > 1 {
                self.grow_to(first, now, sample.bytes);
                return self.target;
            }
        }
        let long_enough = (sample.info.round_trip * 8).clamp(SHORTEST_ROUND, LONGEST_ROUND);
        let took = now.saturating_duration_since(self.round.since);
        if took < long_enough {
            return self.target;
        }
        let rate = bytes * 1000 / took.as_millis().max(1) as u64;
        if !self.round.is_settling && self.rest_until.is_none_or(|until| until <= now) {
            self.judge(now, rate, &sample);
        }
        self.begin_round(now, sample.bytes, false);
        self.target
    }

    fn is_busy(&self) -> bool {
        self.round.backed_up * 2 >= self.round.samples
    }

    /// After a whole round at `rate`.
    fn judge(&mut self, now: Instant, rate: u64, sample: &Sample) {
        let helped = self.before.is_none_or(|before| rate * 100 >= before * BETTER_PERCENT);
        if !helped {
            self.before = None;
            self.rest_until = Some(now + REST);
            return;
        }
        let info = &sample.info;
        let under_way = (u128::from(rate) * info.round_trip.as_micros() / 1_000_000) as u64;
        let is_far = info.round_trip >= SOME_ROUND_TRIP && under_way > self.target as u64 * EASY_BYTES;
        let wants = is_far || info.is_lossy() || info.is_window_limited();
        if self.is_busy() && wants && rate > 0 && self.target < MAX_AUTO {
            self.before = Some(rate);
            self.grow_to(self.target * 2, now, sample.bytes);
        }
    }

    fn grow_to(&mut self, target: usize, now: Instant, bytes: u64) {
        self.target = target.clamp(1, MAX_AUTO);
        self.begin_round(now, bytes, true);
    }

    fn begin_round(&mut self, now: Instant, bytes: u64, is_settling: bool) {
        self.round = Round { since: now, bytes, samples: 0, backed_up: 0, is_settling };
    }
}

/// Which route a further connection takes: the one with the fewest connections that may be tried.
#[derive(Debug)]
struct Routes {
    all: Vec<State>,
}

#[derive(Debug)]
struct State {
    connections: usize,
    pause: Duration,
    not_before: Option<Instant>,
}

impl Routes {
    fn new(count: usize) -> Routes {
        let state = |_| State { connections: 0, pause: FIRST_PAUSE, not_before: None };
        Routes { all: (0..count).map(state).collect() }
    }

    fn next(&self, now: Instant) -> Option<usize> {
        let may = |state: &State| state.not_before.is_none_or(|time| time <= now);
        let free = self.all.iter().enumerate().filter(|(_, state)| may(state));
        free.min_by_key(|(at, state)| (state.connections, *at)).map(|(at, _)| at)
    }

    fn ended(&mut self, at: usize, lived: Duration, now: Instant) {
        let state = &mut self.all[at];
        state.connections -= 1;
        if lived > state.pause * 4 {
            state.pause = FIRST_PAUSE;
        }
        state.not_before = Some(now + state.pause);
        state.pause = (state.pause * 2).min(LONGEST_PAUSE);
    }
}

/// One transfer's further connections.
pub(crate) struct Manager {
    pub dialer: Dialer,
    pub trunk: Arc<Trunk>,
    pub token: Token,
    pub routes: Vec<Route>,
    /// The route and the socket of the first connection.
    pub first: (usize, Weak<Probe>),
    pub choice: Connections,
    /// Whether this side sends.
    pub is_sending: bool,
    /// Where the number of connections is shown.
    pub transfer: Arc<Transfer>,
    /// Knows what is still to come.
    pub tally: Arc<Tally>,
}

impl Manager {
    /// Opens connections as they are wanted, until the transfer is over.
    pub async fn run(self) {
        let mut chooser = Chooser::new(self.choice, self.routes.len(), Instant::now());
        let mut routes = Routes::new(self.routes.len());
        routes.all[self.first.0].connections += 1;
        let mut connections: JoinSet<(usize, Duration)> = JoinSet::new();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.trunk.is_over() => break,
                Some(Ok((route, lived))) = connections.join_next() => routes.ended(route, lived, Instant::now()),
                _ = ticks.tick() => {
                    let now = Instant::now();
                    let target = chooser.look(now, self.sample());
                    self.transfer.set_connections(1 + self.trunk.joined() as u32);
                    // Those that are being dialled count too.
                    if connections.len() + 1 < target && let Some(at) = routes.next(now) {
                        routes.all[at].connections += 1;
                        connections.spawn(self.connection(at));
                        ticks.reset_immediately();
                    }
                }
            }
        }
        // They say good-bye by themselves, in bounded time.
        while connections.join_next().await.is_some() {}
    }

    fn sample(&self) -> Sample {
        let counters = &self.dialer.counters;
        let probe = self.first.1.upgrade();
        Sample {
            bytes: counters.written() + counters.read(),
            is_backed_up: self.is_sending.then(|| self.trunk.is_backed_up()),
            expected_bytes: self.tally.expected_bytes.load(Relaxed),
            lacking_bytes: self.tally.lacking_bytes.load(Relaxed),
            info: probe.and_then(|probe| probe.info()).unwrap_or_default(),
        }
    }

    /// One further connection, from its call to its end. Says how long it carried.
    fn connection(&self, at: usize) -> impl Future<Output = (usize, Duration)> + Send + 'static {
        let (dialer, trunk, token, route) =
            (self.dialer.clone(), self.trunk.clone(), self.token, self.routes[at].clone());
        async move {
            let mut since = Instant::now();
            let result: Result<()> = async {
                let dialled = tokio::select! {
                    dialled = dialer.dial(&route) => dialled?,
                    () = trunk.is_over() => return Ok(()),
                };
                since = Instant::now();
                let mut link = Link::start_joining(dialled.stream, &dialer.name, dialer.patience);
                link.send(Message::Join { token }).await?;
                trunk.carry(link).await
            }
            .await;
            if let Err(error) = result {
                tracing::debug!(to = route.to, %error, "a further connection failed");
            }
            (at, since.elapsed())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    /// In a second.
    const TICKS: u64 = 1000 / TICK.as_millis() as u64;

    /// Plays a link that carries `rate(connections)` bytes a second for `seconds`, and tells how many there were in the end.
    fn play(routes: usize, info: Info, seconds: u64, rate: impl Fn(usize) -> u64) -> usize {
        let start = Instant::now();
        let mut chooser = Chooser::new(Connections::Auto, routes, start);
        let (mut bytes, mut target) = (0, 1);
        for tick in 0..seconds * TICKS {
            bytes += rate(target) / TICKS;
            let sample = Sample { bytes, is_backed_up: Some(true), info, ..Sample::default() };
            target = chooser.look(start + TICK * (tick as u32 + 1), sample);
        }
        target
    }

    #[test]
    fn more_connections_only_as_long_as_they_help() {
        let long = Info { round_trip: Duration::from_millis(200), ..Info::default() };
        let short = Info { round_trip: Duration::from_micros(200), ..Info::default() };
        assert_eq!(play(1, long, 60, |count| 4 * count as u64 * MIB), MAX_AUTO);
        assert_eq!(play(1, short, 60, |count| count as u64 * MIB), 1);
        assert_eq!(play(1, long, 10, |_| 16 * MIB), 8, "four at once, then one try");
        assert_eq!(play(1, long, 10, |_| MIB), 4, "four at once; so little is under way that they do");
        assert_eq!(play(3, short, 10, |_| MIB), 3, "one for each route");
        let some = Info { round_trip: Duration::from_millis(20), ..Info::default() };
        let first = |expected_bytes| {
            let mut chooser = Chooser::new(Connections::Auto, 1, Instant::now());
            chooser.look(Instant::now(), Sample { expected_bytes, info: some, ..Sample::default() })
        };
        assert_eq!((first(MUCH_BYTES), first(VERY_MUCH_BYTES)), (1, 4));
        let huge = |lacking_bytes, info| {
            let mut chooser = Chooser::new(Connections::Auto, 1, Instant::now());
            let sample = Sample { expected_bytes: VERY_MUCH_BYTES, lacking_bytes, info, ..Sample::default() };
            chooser.look(Instant::now(), sample)
        };
        assert_eq!((huge(HUGE_BYTES, long), huge(MIB, long), huge(HUGE_BYTES, some)), (MAX_AUTO, MANY, FEW));
        let lossy = Info { segments_out: 10_000, segments_again: 100, ..short };
        assert!(play(1, lossy, 60, |count| count.min(4) as u64 * MIB) >= 4);
    }

    #[test]
    fn a_slow_sender_and_a_fixed_number_leave_it_alone() {
        let start = Instant::now();
        let mut chooser = Chooser::new(Connections::Auto, 2, start);
        let idle = Sample { is_backed_up: Some(false), ..Sample::default() };
        for tick in 1..400 {
            let sample = Sample { bytes: u64::from(tick) * MIB / 4, ..idle };
            assert_eq!(chooser.look(start + TICK * tick, sample), 1);
        }
        let mut fixed = Chooser::new(Connections::Exactly(5), 1, start);
        assert_eq!(fixed.look(start + TICK, idle), 5);
    }

    #[test]
    fn a_failed_route_is_left_alone_for_a_while() {
        let mut routes = Routes::new(2);
        let now = Instant::now();
        routes.all[0].connections = 1;
        assert_eq!(routes.next(now), Some(1));
        routes.all[1].connections = 1;
        routes.ended(1, Duration::ZERO, now);
        assert_eq!(routes.next(now), Some(0));
        assert_eq!(routes.next(now + FIRST_PAUSE), Some(1));
    }
}
