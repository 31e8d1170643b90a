//! Being called: accepts connections, tells peers from strangers, serves what peers ask for.
//!
//! Invariants: the number of connections is bounded; a stranger's bytes are never parsed beyond the handshake; every
//! failure is told to the peer and ends its connection only.

use std::net::SocketAddr;
use std::sync::Arc;

use layerfs::error::ErrorClass;
use layerfs::monitor::Silent;
use layerfs::{LayerId, LayerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::error::{Error, Result};
use crate::get;
use crate::governor::{Controls, Gate, Priority};
use crate::group::Trunk;
use crate::identity::PublicKey;
use crate::link::{self, Counted, Counters, Link};
use crate::node::Node;
use crate::peers::{Peer, Visible};
use crate::progress::Tally;
use crate::receive::{self, Terms};
use crate::send;
use crate::slots::{MAX_OF_PEER, Slot, Slots};
use crate::socket::{self, Probe};
use crate::streams::TRUSTED_KEY;
use crate::tls;
use crate::transfers::{Entry, Origin, Plan, Role};
use crate::wanted;
use crate::wire::{Message, Offer};

/// Connections at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 192;

/// A socket that is listened on. Dropping it stops listening and cuts its connections.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: Option<JoinHandle<()>>,
}

impl Listener {
    pub(crate) async fn start(node: Node, address: SocketAddr) -> Result<Listener> {
        let failed = |source| Error::Listen { address, source };
        let socket = socket::listen(address).map_err(failed)?;
        let config = tls::server_config(node.identity()).map_err(|e| failed(std::io::Error::other(e)))?;
        let address = socket.local_addr().map_err(failed)?;
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(accept_all(node, socket, TlsAcceptor::from(config), stopped));
        Ok(Listener { address, stop, task: Some(task) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops listening, cuts the connections and waits until they are gone.
    pub async fn close(mut self) {
        self.stop.send_replace(true);
        if let Some(task) = self.task.take() {
            let _ = task.await;
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

async fn accept_all(node: Node, socket: TcpListener, acceptor: TlsAcceptor, mut stopped: watch::Receiver<bool>) {
    let (room, slots) = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), Slots::default());
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let slot = tokio::select! {
            _ = stopped.changed() => break,
            slot = room.clone().acquire_owned() => slot,
        };
        let Ok(slot) = slot else { break };
        let (stream, from) = tokio::select! {
            _ = stopped.changed() => break,
            accepted = socket.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection failed");
                    // Out of descriptors, most likely: give others time to end.
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        while connections.try_join_next().is_some() {}
        let Some(place) = slots.enter(from.ip()) else {
            tracing::warn!(%from, "too many callers from there have not shown their keys; turned away");
            continue;
        };
        let (node, acceptor) = (node.clone(), acceptor.clone());
        connections.spawn(async move {
            if let Err(error) = serve(node, acceptor, stream, from, place).await {
                tracing::info!(%from, error = error_chain(&error), "a connection failed");
            }
            drop(slot);
        });
    }
    connections.shutdown().await;
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

async fn serve(node: Node, acceptor: TlsAcceptor, stream: TcpStream, from: SocketAddr, place: Slot) -> Result<()> {
    let patience = node.options().patience;
    let address = from.to_string();
    let set_up = |e| Error::link("setting up", &address, e);
    socket::set_up(&stream, patience.idle).map_err(set_up)?;
    let probe = Arc::new(Probe::new(&stream).map_err(set_up)?);
    let counters = Arc::new(Counters::default());
    let counted = Counted::new(stream, counters.clone()).with_probe(probe);
    let handshake = timeout(patience.connect, acceptor.accept(counted)).await;
    let late = |_| Error::Timeout { action: "handshake", peer: address.clone(), seconds: patience.connect.as_secs() };
    let stream = handshake.map_err(late)?.map_err(|e| Error::link("shaking hands with", &address, e))?;
    let key = tls::peer_key(stream.get_ref().1).ok_or_else(|| Error::protocol(&address, "it shows no key"))?;
    let peers = node.peers().clone();
    let peer = crate::send::joined(tokio::task::spawn_blocking(move || Ok(peers.by_key(&key)?)).await)?;
    let Some(peer) = peer else {
        node.note_stranger(key, from);
        let error = stranger_error(&key);
        link::turn_away(stream, &error, patience).await;
        return Err(error);
    };
    let Some(_seat) = place.sit(key) else {
        let message = format!("{MAX_OF_PEER} connections of this key are open here; close some, or wait");
        let error = Error::refused(ErrorClass::Busy, message);
        link::turn_away(stream, &error, patience).await;
        return Err(error);
    };
    let mut link = Link::start(stream, peer.name.as_str(), patience);
    let result = match serve_peer(&node, &peer, &mut link).await {
        Ok(Some(trunk)) => trunk.carry(link).await,
        Ok(None) => {
            link.close().await;
            Ok(())
        }
        Err(error) => {
            link.close_with(&error).await;
            Err(error)
        }
    };
    tracing::debug!(
        peer = peer.name.as_str(),
        read = counters.read(),
        written = counters.written(),
        "connection closed"
    );
    result
}

/// Serves a stream that somebody who may do everything here has brought.
pub(crate) async fn serve_trusted<S>(node: &Node, stream: S, peer: &Peer) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut link = Link::start(stream, peer.name.as_str(), node.options().patience);
    let result = serve_peer(node, peer, &mut link).await.map(drop);
    match &result {
        Ok(()) => link.close().await,
        Err(error) => link.close_with(error).await,
    }
    result
}

fn stranger_error(key: &PublicKey) -> Error {
    let fingerprint = key.fingerprint();
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let message = format!(
        "the host that was called ({host}) doesn't know the caller's key {fingerprint}; `layerctl peer add NAME ADDRESS` \
         there makes the caller its peer"
    );
    Error::refused(ErrorClass::Denied, message)
}

/// Does what the peer asks for until it leaves. Gives the transfer that the connection is to join, if so.
pub(crate) async fn serve_peer(node: &Node, peer: &Peer, link: &mut Link) -> Result<Option<Arc<Trunk>>> {
    let mut membership = None;
    let answerer = get::Answerer::new(node.store(), peer);
    while let Some(request) = link.recv_or_end().await? {
        // As they are now: a connection may be older than what its peer may do.
        let peer = &current(node, peer).await?;
        match request {
            Message::Group { token } if membership.is_none() => {
                let trunk = link.open_group()?;
                membership = Some(node.groups().open(token, peer.key, &trunk).await?);
                continue;
            }
            Message::Join { token } if membership.is_none() => {
                return node.groups().find(token, peer.key).await.map(Some);
            }
            // Of the last transfer: sent for a second time after a connection was lost, and not needed any more.
            message if message.is_bulk() && link.was_grouped() => continue,
            Message::Offer(offer) => {
                require(peer.rights.push, "push to")?;
                let names = offer.names.iter().map(|(name, _)| name.clone()).collect();
                let entry = begin(node, peer, Role::Receiving, names, link)?;
                entry.transfer().set_dry(offer.dry_run);
                let result = take(node, peer, link, offer, &entry).await;
                entry.end(result)?;
            }
            Message::Fetch { names, dry_run } => {
                require(peer.rights.pull, "pull from")?;
                let entry = begin(node, peer, Role::Sending, names.clone(), link)?;
                entry.transfer().set_dry(dry_run);
                let result = give(node, peer, link, Wanted::Whole(names, dry_run), &entry).await;
                entry.end(result)?;
            }
            Message::Get { ids } => {
                require(peer.rights.pull, "get chunks from")?;
                // Somebody waits for them.
                link.govern(urgent(node, peer));
                answerer.chunks(link, &peer.rights.visible, ids).await?;
            }
            Message::Look { names, layers } => {
                require(peer.rights.pull, "pull from")?;
                let entry = begin(node, peer, Role::Sending, names.clone(), link)?;
                let wanted = if layers.is_empty() { Wanted::Structure(names) } else { Wanted::Rest(layers) };
                let result = give(node, peer, link, wanted, &entry).await;
                entry.end(result)?;
            }
            Message::Trace { layers } => {
                require(peer.rights.pull, "pull from")?;
                answerer.traces(link, &peer.rights.visible, layers).await?;
            }
            Message::Traced { layer, ids } => {
                require(peer.rights.push, "push to")?;
                // Whoever may move guests here tells what they have read.
                let is_of_guest = peer.rights.guests && peer.rights.visible == Visible::All;
                answerer.learn(layer, ids, is_of_guest).await?;
                // It stands in front of an offer, and belongs to that transfer.
                continue;
            }
            message if message.is_about_guests() => {
                let answer = node.migrations()?.serve(peer, message).await?;
                link.send(answer).await?;
            }
            other => return Err(Error::protocol(link.peer(), format!("{} as a request", other.kind()))),
        }
        link.close_group();
        membership = None;
    }
    Ok(None)
}

/// The peer with the key of `peer`, as it is on record now.
async fn current(node: &Node, peer: &Peer) -> Result<Peer> {
    if peer.key == TRUSTED_KEY {
        return Ok(peer.clone());
    }
    let (peers, key) = (node.peers().clone(), peer.key);
    let found = send::joined(tokio::task::spawn_blocking(move || Ok(peers.by_key(&key)?)).await)?;
    found.ok_or_else(|| stranger_error(&peer.key))
}

/// A transfer that `peer` begins.
fn begin(node: &Node, peer: &Peer, role: Role, names: Vec<LayerName>, link: &mut Link) -> Result<Entry> {
    // Tenants among each other are equal: only who may see all names may say that it is urgent.
    let controls = Controls { obliging: peer.rights.visible == Visible::All, ..Controls::default() };
    let names = names.iter().map(LayerName::to_string).collect();
    let plan = Plan { role, origin: Origin::Peer, peer: peer.name.to_string(), names, controls, id: None };
    let entry = node.transfers().begin(plan, Arc::new(Silent))?;
    entry.transfer().set_connections(1);
    link.govern(entry.transfer().gate().clone());
    Ok(entry)
}

/// Receives what `peer` pushes.
async fn take(node: &Node, peer: &Peer, link: &mut Link, offer: Offer, entry: &Entry) -> Result<()> {
    let (tally, monitor) = (Arc::new(Tally::new()), entry.monitor());
    let terms = Terms::of_push(node, peer);
    let first = Some(Message::Offer(offer));
    let (names, changed) = receive::run(link, node.store(), terms, first, &tally, &monitor).await?;
    log(peer, "received", &tally, names.len(), changed);
    Ok(())
}

/// What a peer pulls.
enum Wanted {
    /// All, or only what that would cost.
    Whole(Vec<LayerName>, bool),
    /// Without the data.
    Structure(Vec<LayerName>),
    /// The data of what it has the structure of.
    Rest(Vec<LayerId>),
}

/// The gate for single chunks.
fn urgent(node: &Node, peer: &Peer) -> Gate {
    // Tenants among each other are equal.
    let priority = if peer.rights.visible == Visible::All { Priority::High } else { Priority::Normal };
    node.transfers().governor().gate(Controls { priority, ..Controls::default() })
}

/// Sends what `peer` pulls.
async fn give(node: &Node, peer: &Peer, link: &mut Link, wanted: Wanted, entry: &Entry) -> Result<()> {
    let (tally, monitor) = (Arc::new(Tally::new()), entry.monitor());
    let (store, visible) = (node.store().clone(), peer.rights.visible.clone());
    let look = wanted::Wanted::by(&monitor);
    let is_wanted = look.clone();
    let prepare = move || match wanted {
        Wanted::Whole(names, is_dry) => Ok(send::prepare(&store, &names, &visible, false)?.dry_run(is_dry)),
        Wanted::Structure(names) => Ok(send::prepare(&store, &names, &visible, false)?.lazily()),
        Wanted::Rest(layers) => send::prepare_layers(&store, &layers, &visible, &look),
    };
    let prepared = link.wait_for(tokio::task::spawn_blocking(prepare), &is_wanted).await?;
    let changed = send::run(link, node.store(), &prepared, &tally, &monitor).await?;
    log(peer, "sent", &tally, prepared.names(), changed);
    Ok(())
}

fn require(right: bool, what: &str) -> Result<()> {
    if right {
        return Ok(());
    }
    Err(Error::refused(ErrorClass::Denied, format!("this key may not {what} this host; its operator can allow it")))
}

fn log(peer: &Peer, what: &str, tally: &Tally, names: usize, changed: u16) {
    let report = tally.report();
    tracing::info!(
        peer = peer.name.as_str(),
        names,
        changed,
        chunks = report.chunks_sent,
        stored_bytes = report.chunk_stored_bytes,
        seconds = report.seconds,
        "{what} layers"
    );
}
