//! Peers, the listener, push and pull.
//!
//! The listener is there when it was asked for, or as soon as there is a peer. A port that is taken is fatal only if
//! the user named it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use layerfs::LayerName;
use layerfs::monitor::Monitor;
use layerfs::store::Store;
use migrator::TransferReport;
use migrator::governor::Way;
use migrator::lazy::SourceStatus;
use migrator::link::Patience;
use migrator::measured::Measured;
use migrator::node::Manner;
use migrator::peers::{Visible, normalize_address};
use migrator::{
    Connections, Fingerprint, Lazy, LazyOptions, Listener, Node, NodeOptions, PathOptions, Peer, PeerName, PublicKey,
    PullOptions, PushOptions, RetryFor, Rights, Transport,
};
use tokio::sync::Mutex;

use super::layers::{layer_name, resolve, with_force_hint};
use crate::api::Empty;
use crate::api::peers::{
    Identity, NetworkRequest, PeerAddRequest, PeerInfo, PeerList, PeerRemoveRequest, PeerSetRequest, ProbeRequest,
    ProbeResult, StrangerInfo, StreamFailed, TransferRequest, TransferResult,
};
use crate::config::{DEFAULT_PORT, Listen, Settings};
use crate::daemon::http::Context;
use crate::daemon::work::Reporter;
use crate::failure::{Class, Failure, Result, describe};

impl From<migrator::Error> for Failure {
    fn from(error: migrator::Error) -> Failure {
        match error {
            migrator::Error::Store(error) => error.into(),
            other => Failure::new(other.class().into(), describe(&other)),
        }
    }
}

/// The daemon's side of the network.
pub struct Peering {
    node: Node,
    listen: Listen,
    listener: Mutex<Option<Listener>>,
    /// Brings what partial layers lack. None while the daemon stops.
    lazy: parking_lot::Mutex<Option<Lazy>>,
    lazy_options: LazyOptions,
    status: parking_lot::Mutex<ListenStatus>,
}

/// Where the listener is.
#[derive(Clone, Debug, Default)]
pub struct ListenStatus {
    /// Its address.
    pub listening: Option<String>,
    /// Why there is none though there should be.
    pub error: Option<String>,
}

impl Peering {
    /// No listener yet.
    pub fn new(store: &Arc<Store>, listen: Listen, lazy_options: LazyOptions, settings: &Settings) -> Result<Peering> {
        let paths = paths(&settings.network)?;
        let sources = settings.connect_from.clone();
        let below = Patience::default();
        let patience = paths.patience(below);
        let node = Node::open(store.clone(), NodeOptions { patience, paths, sources })?;
        let (listener, status, lazy) = Default::default();
        let peering = Peering { node, listen, listener, lazy, lazy_options, status };
        peering.start_lazy();
        Ok(peering)
    }

    /// Listens, if there is reason to and it doesn't yet.
    ///
    /// # Errors
    /// If the user named the address, and it can't be had.
    pub async fn start(&self) -> Result<()> {
        let mut listener = self.listener.lock().await;
        if listener.is_some() {
            return Ok(());
        }
        let bound = match &self.listen {
            Listen::Off => return Ok(()),
            Listen::At(address) => {
                let address: SocketAddr =
                    address.parse().map_err(|_| Failure::invalid(format!("{address:?} is no address to listen on")))?;
                self.node.listen(address).await
            }
            Listen::WhenPeersExist if self.node.peers().list()?.is_empty() => return Ok(()),
            Listen::WhenPeersExist => match self.node.listen(SocketAddr::from(([0u16; 8], DEFAULT_PORT))).await {
                Ok(listener) => Ok(listener),
                // There may be no IPv6.
                Err(_) => self.node.listen(SocketAddr::from(([0u8; 4], DEFAULT_PORT))).await,
            },
        };
        match bound {
            Ok(bound) => {
                tracing::info!("listens for peers on {}", bound.address());
                *self.status.lock() = ListenStatus { listening: Some(bound.address().to_string()), error: None };
                *listener = Some(bound);
                Ok(())
            }
            Err(error) if self.listen == Listen::WhenPeersExist => {
                let error = describe(&error);
                tracing::warn!("does not listen for peers: {error}");
                *self.status.lock() = ListenStatus { listening: None, error: Some(error) };
                Ok(())
            }
            Err(error) => {
                *self.status.lock() = ListenStatus { listening: None, error: Some(describe(&error)) };
                Err(error.into())
            }
        }
    }

    /// Stops to listen.
    pub async fn stop(&self) {
        let listener = self.listener.lock().await.take();
        *self.status.lock() = ListenStatus::default();
        if let Some(listener) = listener {
            listener.close().await;
        }
    }

    /// Brings what partial layers lack, from now on.
    pub fn start_lazy(&self) {
        let mut lazy = self.lazy.lock();
        if lazy.is_none() {
            *lazy = Some(Lazy::start(&self.node, self.lazy_options));
        }
    }

    /// Gives that up, so that nobody waits for another host any more.
    pub fn stop_lazy(&self) {
        *self.lazy.lock() = None;
    }

    /// Whether layers come or go in the background.
    pub fn is_moving(&self) -> bool {
        self.lazy.lock().as_ref().is_some_and(Lazy::is_busy)
    }

    /// The peers that partial layers come from.
    pub fn sources(&self) -> Vec<SourceStatus> {
        self.lazy.lock().as_ref().map(Lazy::sources).unwrap_or_default()
    }

    /// Pushes; what a lazy push leaves goes in the background.
    async fn push(
        &self,
        names: &[LayerName],
        peer: &str,
        options: PushOptions,
        monitor: Arc<dyn Monitor>,
    ) -> migrator::Result<TransferReport> {
        if !options.lazy {
            return self.node.push(names, peer, options, monitor).await;
        }
        let push = self.lazy.lock().as_ref().map(|lazy| lazy.push(names, peer, options, monitor));
        match push {
            Some(push) => push.await,
            None => Err(layerfs::Error::Busy("the daemon is about to exit; try again in a moment".to_owned()).into()),
        }
    }

    /// Whether it listens.
    pub fn is_listening(&self) -> bool {
        self.status().listening.is_some()
    }

    /// Where it listens.
    pub fn status(&self) -> ListenStatus {
        self.status.lock().clone()
    }

    /// Whether and where it was told to listen.
    pub fn listen(&self) -> &Listen {
        &self.listen
    }

    /// The node, for healing.
    pub fn node(&self) -> &Node {
        &self.node
    }
}

/// `/v1/push`.
pub fn push(context: &Context, request: TransferRequest) -> Result<TransferResult> {
    let label = format!("push {} to {}", request.names.join(" "), request.peer);
    for name in &request.names {
        // For its suggestions.
        resolve(&context.daemon.store, name)?;
    }
    let names = names(&request)?;
    let node = context.daemon.peering.node().clone();
    let options = PushOptions {
        force: request.force,
        lazy: request.lazy,
        hurry: false,
        dry_run: request.dry_run,
        manner: manner(&node, &request)?,
        paths: paths(&request.network)?,
    };
    let (peer, daemon) = (request.peer.clone(), context.daemon.clone());
    let push = |monitor| async move { daemon.peering.push(&names, &peer, options, monitor).await };
    run(context, label, &request, options.manner, "--force replaces it there", push)
        .and_then(|done| estimate(context, done, Way::Out, &request))
}

/// `/v1/pull`.
pub fn pull(context: &Context, request: TransferRequest) -> Result<TransferResult> {
    let label = format!("pull {} from {}", request.names.join(" "), request.peer);
    let names = names(&request)?;
    let node = context.daemon.peering.node().clone();
    let options = PullOptions {
        force: request.force,
        lazy: request.lazy,
        dry_run: request.dry_run,
        manner: manner(&node, &request)?,
        paths: paths(&request.network)?,
    };
    let peer = request.peer.clone();
    let pull = |monitor| async move { node.pull(&names, &peer, options, monitor).await };
    run(context, label, &request, options.manner, "--force replaces it", pull)
        .and_then(|done| estimate(context, done, Way::In, &request))
}

/// As the library has it.
pub fn paths(request: &NetworkRequest) -> Result<PathOptions> {
    let seconds = |seconds: Option<u64>| seconds.map(Duration::from_secs);
    let transport = match request.transport.as_deref() {
        None => None,
        Some("auto") => Some(Transport::Auto),
        Some("tcp") => Some(Transport::Tcp),
        Some("mptcp") => Some(Transport::Mptcp),
        Some("ssh") if request.stream.is_some() => None,
        Some("ssh") => return Err(Failure::invalid("SSH needs an address: give ssh://USER@HOST as the peer")),
        Some(other) => return Err(Failure::invalid(format!("{other:?} is no transport: use auto, tcp, mptcp or ssh"))),
    };
    if request.idle_seconds.is_some_and(|idle| idle < 3) || request.connect_seconds == Some(0) {
        return Err(Failure::invalid("an idle timeout has 3 s at least, and a connect timeout 1 s"));
    }
    Ok(PathOptions {
        connections: request.connections.map(|count| match count {
            0 => Connections::Auto,
            count => Connections::Exactly(count.min(32)),
        }),
        transport,
        retry_for: seconds(request.retry_for_seconds).map(RetryFor::Time),
        connect: seconds(request.connect_seconds),
        idle: seconds(request.idle_seconds),
        stream: request.stream,
    })
}

/// `/v1/stream-failed`.
pub fn stream_failed(context: &Context, request: StreamFailed) -> Result<Empty> {
    let StreamFailed { stream, failure } = request;
    let error = migrator::Error::Refused { class: failure.class.into(), message: failure.message };
    context.block_on(context.daemon.peering.node().streams().bring(stream, Err(error)));
    Ok(Empty {})
}

fn names(request: &TransferRequest) -> Result<Vec<LayerName>> {
    request.names.iter().map(|name| layer_name(name)).collect()
}

fn manner(node: &Node, request: &TransferRequest) -> Result<Manner> {
    let id = Some(node.transfers().new_id());
    Ok(Manner { limit: super::transfers::rate(request.limit)?, priority: request.priority.into(), urgent: false, id })
}

/// Does `transfer`, which gets the monitor to report to, as the request's work or in the background.
fn run<F>(
    context: &Context,
    label: String,
    request: &TransferRequest,
    manner: Manner,
    force_hint: &str,
    transfer: impl FnOnce(Arc<dyn Monitor>) -> F,
) -> Result<TransferResult>
where
    F: Future<Output = migrator::Result<TransferReport>> + Send + 'static,
{
    let id = manner.id.unwrap_or_default();
    if !request.background {
        context.label(label);
        let report = context.block_on(transfer(context.reporter.clone()));
        return finish(report, request, id, force_hint);
    }
    if request.network.stream.is_some() {
        return Err(Failure::invalid("an ssh:// transfer can't go on in the background: it is this command's own ssh"));
    }
    context.daemon.peering.node().peers().get(&request.peer)?;
    let entry = context.daemon.works.begin(label.clone(), true)?;
    let (events, mut unheard) = tokio::sync::mpsc::channel(1);
    let mut transfer = Box::pin(transfer(Arc::new(Reporter::new(entry.work().clone(), events))));
    // Whoever is told a number may ask for it at once.
    let transfers = context.daemon.peering.node().transfers().clone();
    let ended = context.block_on(async {
        tokio::select! {
            biased;
            outcome = &mut transfer => Some(outcome),
            () = transfers.begun(id) => None,
        }
    });
    if let Some(outcome) = ended {
        return finish(outcome, request, id, force_hint);
    }
    context.spawn(async move {
        if let Err(error) = transfer.await {
            tracing::warn!("{label} failed: {}", describe(&error));
        }
        // Nobody listens, but that is no reason to stop.
        unheard.close();
        drop(entry);
    });
    let (names, peer) = (request.names.clone(), request.peer.clone());
    Ok(TransferResult { names, peer, transfer: id, background: true, ..TransferResult::default() })
}

/// Round trips that a transfer takes once its connection is there.
const ROUND_TRIPS: f64 = 4.0;

/// Adds to what a dry run found how long the transfer would take: by the link as last measured, and the limits.
fn estimate(
    context: &Context,
    mut result: TransferResult,
    way: Way,
    request: &TransferRequest,
) -> Result<TransferResult> {
    if !result.dry_run {
        return Ok(result);
    }
    let node = context.daemon.peering.node();
    // Of a host that ssh leads to nothing is on record.
    let is_on_record = request.network.stream.is_none();
    let measured = if is_on_record { context.block_on(node.measured(&request.peer))? } else { Measured::default() };
    let common = node.transfers().governor().limit().map(migrator::Rate::bytes_per_second);
    let limits = [Some(request.limit).filter(|limit| *limit > 0), common];
    let round_trip = measured.round_trip_micros.unwrap_or_default() as f64 / 1e6;
    if let Some(rate) = measured.rate(way) {
        let rate = limits.into_iter().flatten().fold(rate, u64::min);
        result.estimated_rate = Some(rate);
        result.estimated_seconds = Some(ROUND_TRIPS * round_trip + result.would_send_bytes as f64 / rate.max(1) as f64);
    }
    Ok(result)
}

fn finish(
    outcome: migrator::Result<TransferReport>,
    request: &TransferRequest,
    transfer: u64,
    force_hint: &str,
) -> Result<TransferResult> {
    let report = outcome.map_err(|error| with_peers_hint(with_force_hint(error.into(), force_hint)))?;
    Ok(TransferResult {
        names: report.names.iter().map(LayerName::to_string).collect(),
        peer: request.peer.clone(),
        transfer,
        background: false,
        dry_run: report.dry_run,
        would_send_bytes: report.would_send_bytes,
        estimated_seconds: None,
        estimated_rate: None,
        connections: report.connections,
        retries: report.retries,
        layers_sent: report.layers_sent,
        chunks_sent: report.chunks_sent,
        chunks_reused: report.chunks_reused,
        bytes_sent: report.bytes_sent,
        bytes_received: report.bytes_received,
        seconds: report.seconds,
        phases: report.phases.iter().map(|phase| (phase.name.to_owned(), phase.seconds)).collect(),
    })
}

/// Adds where the peers' names are to the failure that there is no such peer.
pub fn with_peers_hint(failure: Failure) -> Failure {
    let is_unknown = failure.class == Class::NotFound && failure.message.starts_with("peer ");
    if is_unknown { failure.hint("`layerctl peer list` shows the peers that there are") } else { failure }
}

/// `/v1/peer-add`.
pub fn add(context: &Context, request: PeerAddRequest) -> Result<PeerInfo> {
    let peering = &context.daemon.peering;
    let peers = peering.node.peers();
    let name = PeerName::new(&request.name)?;
    let visible = if request.visible.is_empty() { Visible::All } else { Visible::Matching(request.visible) };
    let key: PublicKey = request.key.parse()?;
    if key == peering.node.public_key() {
        return Err(Failure::invalid("that is this host's own key").hint("run `layerctl peer id` on the other host"));
    }
    let peer = Peer {
        name,
        address: request.address.as_deref().map(normalize_address).transpose()?,
        key,
        rights: Rights { push: request.allow_push, pull: request.allow_pull, guests: request.allow_guests, visible },
    };
    let added = if request.force { peers.replace(peer) } else { peers.add(peer) };
    let added = added.map_err(|error| with_force_hint(error.into(), "--force replaces what is known of it"))?;
    context.block_on(peering.start())?;
    Ok(info(&added))
}

/// `/v1/peer-set`.
pub fn set(context: &Context, request: PeerSetRequest) -> Result<PeerInfo> {
    let peers = context.daemon.peering.node.peers();
    let changed = peers.change(&request.name, |peer| {
        if let Some(address) = request.address {
            peer.address = Some(address).filter(|address| !address.is_empty());
        }
        peer.rights.push = request.allow_push.unwrap_or(peer.rights.push);
        peer.rights.pull = request.allow_pull.unwrap_or(peer.rights.pull);
        peer.rights.guests = request.allow_guests.unwrap_or(peer.rights.guests);
        if let Some(patterns) = request.visible {
            peer.rights.visible = if patterns.is_empty() { Visible::All } else { Visible::Matching(patterns) };
        }
    });
    Ok(info(&changed.map_err(|error| with_peers_hint(error.into()))?))
}

/// `/v1/peer-probe`: the key that a host shows.
pub fn probe(context: &Context, request: ProbeRequest) -> Result<ProbeResult> {
    let key = context.block_on(context.daemon.peering.node.probe(&request.address))?;
    Ok(ProbeResult { key: key.to_string(), fingerprint: key.fingerprint().to_string() })
}

/// `/v1/peers`.
pub fn list(context: &Context, _: Empty) -> Result<PeerList> {
    let node = &context.daemon.peering.node;
    let stranger = |stranger: migrator::node::Stranger| StrangerInfo {
        address: stranger.address.to_string(),
        key: stranger.key.to_string(),
        fingerprint: stranger.key.fingerprint().to_string(),
    };
    Ok(PeerList {
        peers: node.peers().list()?.iter().map(info).collect(),
        strangers: node.strangers().into_iter().map(stranger).collect(),
    })
}

/// `/v1/peer-remove`: all of the names, or none.
pub fn remove(context: &Context, request: PeerRemoveRequest) -> Result<PeerList> {
    let peering = &context.daemon.peering;
    let peers = peering.node.peers();
    let found = request.names.iter().map(|name| peers.get(name).map_err(|error| with_peers_hint(error.into())));
    let found = found.collect::<Result<Vec<Peer>>>()?;
    for peer in &found {
        peers.remove(peer.name.as_str())?;
    }
    if peering.listen == Listen::WhenPeersExist && peers.list()?.is_empty() {
        context.block_on(peering.stop());
    }
    Ok(PeerList { peers: found.iter().map(info).collect(), strangers: Vec::new() })
}

/// `/v1/peer-id`.
pub fn id(context: &Context, _: Empty) -> Result<Identity> {
    let peering = &context.daemon.peering;
    let ListenStatus { listening, error } = peering.status();
    let listening = listening.and_then(|address| address.parse::<SocketAddr>().ok());
    let fingerprint: Fingerprint = peering.node.fingerprint();
    Ok(Identity {
        key: peering.node.public_key().to_string(),
        fingerprint: fingerprint.to_string(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        port: listening.map_or(DEFAULT_PORT, |address| address.port()),
        listening: listening.map(|address| address.to_string()),
        listen_error: error,
        listen: peering.listen.to_string(),
    })
}

fn info(peer: &Peer) -> PeerInfo {
    PeerInfo {
        name: peer.name.to_string(),
        address: peer.address.clone(),
        key: peer.key.to_string(),
        fingerprint: peer.key.fingerprint().to_string(),
        allow_push: peer.rights.push,
        allow_pull: peer.rights.pull,
        allow_guests: peer.rights.guests,
        visible: match &peer.rights.visible {
            Visible::All => Vec::new(),
            Visible::Matching(patterns) => patterns.clone(),
        },
    }
}
