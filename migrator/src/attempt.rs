//! A transfer from its first attempt to its last: connects, lets further connections join, and begins again when the link
//! fails.
//!
//! Invariants: each attempt is a transfer of its own for the protocol, so that nothing depends on how the last one
//! ended; what an attempt has brought over is there for the next.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use layerfs::LayerName;
use layerfs::monitor::Monitor;

use crate::dial::{Dialer, Route};
use crate::error::Result;
use crate::group::Token;
use crate::link::{Counted, Counters, Link};
use crate::node::Node;
use crate::paths::{Connections, Manager, PathOptions};
use crate::peers::Peer;
use crate::progress::{Tally, TransferReport};
use crate::receive::{self, Terms};
use crate::retry::{Backoff, is_transient, is_transient_again};
use crate::send::{self, CANCEL_CHECK, Prepared};
use crate::streams::Arrivals;
use crate::transfers::Entry;
use crate::wire::Message;

/// What is transferred.
pub(crate) enum Job<'a> {
    /// These names go to the peer; what stands in front of the offer goes first.
    Push(&'a Prepared, &'a [LayerName], Vec<Message>),
    /// What this message asks for comes from the peer, on these terms.
    Pull(Message, Box<Terms>),
}

impl Job<'_> {
    fn is_dry(&self) -> bool {
        match self {
            Job::Push(prepared, ..) => prepared.is_dry(),
            Job::Pull(request, _) => matches!(request, Message::Fetch { dry_run: true, .. }),
        }
    }
}

/// What all attempts at one transfer have in common.
struct Call<'a> {
    node: &'a Node,
    peer: &'a Peer,
    entry: &'a Entry,
    dialer: Dialer,
    routes: Vec<Route>,
    /// Where connections come from that aren't dialled.
    arrivals: Option<Arrivals>,
    choice: Connections,
    token: Token,
    job: Job<'a>,
    tally: Arc<Tally>,
    monitor: Arc<dyn Monitor>,
    /// Whether the peer has answered in this attempt.
    is_answered: AtomicBool,
}

/// Attempts at `job` until one succeeds or there is no use in another.
///
/// # Errors
/// That of the last attempt.
pub(crate) async fn transfer(
    node: &Node,
    peer: &Peer,
    job: Job<'_>,
    paths: PathOptions,
    entry: &Entry,
) -> Result<TransferReport> {
    let paths = paths.or(node.options().paths);
    let call = Call {
        node,
        peer,
        entry,
        dialer: node.dialer(peer.name.as_str(), Some(peer.key), paths),
        routes: if paths.stream.is_some() { Vec::new() } else { node.routes(peer)? },
        arrivals: paths.stream.map(|id| node.streams().open(id)),
        choice: match paths.stream {
            Some(_) => Connections::Exactly(1),
            // What carries nothing needs one connection.
            None if job.is_dry() => Connections::Exactly(1),
            None => paths.connections.unwrap_or_default(),
        },
        token: Token::random()?,
        job,
        tally: Arc::new(Tally::new()),
        monitor: entry.monitor(),
        is_answered: AtomicBool::new(false),
    };
    let mut backoff = Backoff::new(paths.retry_for.unwrap_or_default(), Instant::now());
    loop {
        let chunks_before = call.tally.chunks.load(Relaxed);
        let error = match call.attempt(&mut backoff).await {
            Ok((names, changed)) => {
                let report = report(&call.tally, &call.dialer.counters, peer, names, changed);
                return Ok(TransferReport { dry_run: call.job.is_dry(), ..report });
            }
            Err(error) => error,
        };
        if call.tally.chunks.load(Relaxed) > chunks_before {
            backoff.progressed(Instant::now());
        }
        let is_again = call.tally.retries.load(Relaxed) > 0 && !call.is_answered.load(Relaxed);
        let may_pass = is_transient(&error) || is_again && is_transient_again(&error);
        let random = Token::random()?.0.first_chunk().map_or(0, |eight| u64::from_le_bytes(*eight));
        let Some(pause) = backoff.pause(Instant::now(), random).filter(|_| may_pass) else {
            return Err(error);
        };
        tracing::info!(peer = peer.name.as_str(), %error, "a transfer is tried again in {pause:?}");
        call.monitor.phase("waiting for the link", None);
        call.tally.retries.fetch_add(1, Relaxed);
        wait(pause, call.monitor.as_ref()).await?;
    }
}

impl Call<'_> {
    async fn attempt(&self, backoff: &mut Backoff) -> Result<(Vec<LayerName>, u16)> {
        self.is_answered.store(false, Relaxed);
        self.tally.phase("connect");
        self.monitor.phase("connecting", None);
        let (peer, patience) = (self.peer.name.as_str(), self.dialer.patience);
        let (mut link, first) = match &self.arrivals {
            Some(arrivals) => {
                let stream = arrivals.next(peer).await?;
                let counted = Counted::new(stream, self.dialer.counters.clone());
                (Link::start(counted, peer, patience), (0, Weak::new()))
            }
            None => {
                let (route, dialled) = self.dialer.any(&self.routes).await?;
                self.node.remember_link(self.peer, dialled.measured).await;
                (Link::start(dialled.stream, peer, patience), (route, dialled.probe))
            }
        };
        backoff.connected();
        self.entry.transfer().set_connections(1);
        link.govern(self.entry.transfer().gate().clone());
        let several = self.choice != Connections::Exactly(1);
        let trunk = if several { Some(link.open_group()?) } else { None };
        if let Some(trunk) = &trunk {
            let manager = Manager {
                dialer: self.dialer.clone(),
                trunk: trunk.clone(),
                token: self.token,
                routes: self.routes.clone(),
                first,
                choice: self.choice,
                is_sending: matches!(self.job, Job::Push(..)),
                transfer: self.entry.transfer().clone(),
                tally: self.tally.clone(),
            };
            // Ends by itself when the group is closed or the link dropped.
            tokio::spawn(manager.run());
        }
        let result = self.run(&mut link).await;
        self.is_answered.store(link.has_heard(), Relaxed);
        if let Some(trunk) = trunk {
            self.tally.connections.fetch_max(trunk.most_joined() as u64 + 1, Relaxed);
            self.tally.resent_bytes.fetch_add(trunk.returned_bytes(), Relaxed);
        }
        link.close_group();
        if result.is_ok() && self.arrivals.is_none() {
            // The other side has said that all is done: nobody needs to wait a round trip for its good-bye.
            tokio::spawn(link.close());
            return result;
        }
        finish(link, result).await
    }

    async fn run(&self, link: &mut Link) -> Result<(Vec<LayerName>, u16)> {
        let store = self.node.store();
        if self.choice != Connections::Exactly(1) {
            link.send(Message::Group { token: self.token }).await?;
        }
        match &self.job {
            Job::Push(prepared, names, first) => {
                for message in first {
                    link.send(message.clone()).await?;
                }
                let changed = send::run(link, store, prepared, &self.tally, &self.monitor).await?;
                Ok((names.to_vec(), changed))
            }
            Job::Pull(request, terms) => {
                link.send(request.clone()).await?;
                let terms = (**terms).clone();
                receive::run(link, store, terms, None, &self.tally, &self.monitor).await
            }
        }
    }
}

/// Waits for `pause`, unless the user doesn't want to.
async fn wait(pause: Duration, monitor: &dyn Monitor) -> Result<()> {
    let until = Instant::now() + pause;
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        layerfs::monitor::check(monitor)?;
        tokio::time::sleep(left.min(CANCEL_CHECK)).await;
    }
    Ok(())
}

/// Closes `link` as befits `result`.
pub(crate) async fn finish<T>(link: Link, result: Result<T>) -> Result<T> {
    match &result {
        Ok(_) => link.close().await,
        Err(error) => link.close_with(error).await,
    }
    result
}

fn report(tally: &Tally, counters: &Counters, peer: &Peer, names: Vec<LayerName>, changed: u16) -> TransferReport {
    TransferReport {
        peer: peer.name.to_string(),
        names,
        names_changed: changed,
        bytes_sent: counters.written(),
        bytes_received: counters.read(),
        ..tally.report()
    }
}
