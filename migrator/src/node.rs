//! One store's side of the network: what tools call.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use layerfs::chunk::Verified;
use layerfs::error::ErrorClass;
use layerfs::monitor::Monitor;
use layerfs::store::Store;
use layerfs::{ChunkId, LayerId, LayerName};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::attempt::{self, Job, finish};
use crate::dial::{Dialer, Route};
use crate::error::{Error, Result};
use crate::get;
use crate::governor::{Controls, Priority, Rate, Way};
use crate::grants::Grants;
use crate::group::Groups;
use crate::identity::{Fingerprint, Identity, PublicKey};
use crate::lazy::pushes::Noted;
use crate::link::{Link, Patience};
use crate::listener::{self, Listener};
use crate::measured::{self, Measured};
use crate::migrate::{self, Migrations};
use crate::paths::{Connections, PathOptions};
use crate::peers::{Peer, Peers, Visible, normalize_address};
use crate::progress::TransferReport;
use crate::receive::Terms;
use crate::retry::is_transient;
use crate::send::{self, joined};
use crate::similar::Similar;
use crate::streams::{self, Streams, TRUSTED_KEY};
use crate::transfers::{Entry, Origin, Plan, Role, Transfer, Transfers};
use crate::wire::{MAX_ASK, MAX_NAMES, Message};

/// So many strangers are remembered.
const MAX_STRANGERS: usize = 16;

/// With several connections, one that is silent for so long is dead: the others do its part.
const PATH_SILENCE: Duration = Duration::from_secs(10);

/// How a node behaves.
#[derive(Clone, Debug, Default)]
pub struct NodeOptions {
    /// How patient its links are.
    pub patience: Patience,
    /// How its transfers use the network, unless they say otherwise.
    pub paths: PathOptions,
    /// The local addresses to call from, each a path of its own; none for what the system chooses.
    pub sources: Vec<IpAddr>,
}

/// What is known of layers that are pushed.
#[derive(Default)]
pub(crate) struct Knowing {
    /// What is similar to these chunks, which the peer holds, is told by them.
    pub known: Option<Arc<Similar>>,
    /// What the stacks of these layers were read of: goes in front of the offer.
    pub traces: Vec<(LayerId, Vec<ChunkId>)>,
    /// What a lazy push leaves is noted, to be sent later.
    pub rest_later: bool,
}

/// How layers are pushed.
#[derive(Clone, Copy, Debug, Default)]
pub struct PushOptions {
    /// Names that are taken there by other layers are replaced.
    pub force: bool,
    /// Only the layers' structure is sent, so that they can be mounted there; [`Node::push_rest`] sends the data.
    pub lazy: bool,
    /// Somebody waits for its end: nothing is searched for that would only save bytes.
    pub hurry: bool,
    /// How the network is used.
    pub paths: PathOptions,
    /// How the transfer is to go.
    pub manner: Manner,
    /// Only what it would cost is worked out, lazily or not: nothing is stored or named there.
    pub dry_run: bool,
}

/// How a transfer that is begun here goes. All of it can be changed while it runs, by [`Node::transfers`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Manner {
    /// The most that it may take of the network.
    pub limit: Option<Rate>,
    /// Who goes first.
    pub priority: Priority,
    /// Nobody can pause it.
    pub urgent: bool,
    /// The number under which it is listed: one of [`Transfers::new_id`]; any by default.
    pub id: Option<u64>,
}

/// How layers are pulled.
#[derive(Clone, Copy, Debug, Default)]
pub struct PullOptions {
    /// Names that are taken here by other layers are replaced.
    pub force: bool,
    /// Only the layers' structure is fetched, so that they can be mounted; [`Node::complete`] fetches the data.
    pub lazy: bool,
    /// How the network is used.
    pub paths: PathOptions,
    /// How the transfer is to go.
    pub manner: Manner,
    /// Only what it would cost is worked out, lazily or not: nothing is stored or named here.
    pub dry_run: bool,
}

/// A host that called and isn't a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stranger {
    /// Its key.
    pub key: PublicKey,
    /// From where it called.
    pub address: SocketAddr,
}

/// One store's side of the network. Clones share it.
#[derive(Clone)]
pub struct Node(Arc<Inner>);

struct Inner {
    store: Arc<Store>,
    identity: Identity,
    peers: Peers,
    options: NodeOptions,
    transfers: Transfers,
    strangers: Mutex<VecDeque<Stranger>>,
    groups: Groups,
    grants: Grants,
    streams: Streams,
    guests: Mutex<Weak<migrate::Inner>>,
}

impl Node {
    /// The node of `store`. Makes the host's key if there is none yet.
    ///
    /// # Errors
    /// Those of [`Identity::load_or_create`].
    pub fn open(store: Arc<Store>, options: NodeOptions) -> Result<Node> {
        let identity = Identity::load_or_create(store.folder())?;
        let peers = Peers::new(store.clone());
        let inner = Inner {
            store,
            identity,
            peers,
            options,
            transfers: Transfers::default(),
            strangers: Mutex::default(),
            groups: Groups::default(),
            grants: Grants::default(),
            streams: Streams::default(),
            guests: Mutex::default(),
        };
        Ok(Node(Arc::new(inner)))
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        &self.0.store
    }

    /// Who this host is.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// This host's public key.
    pub fn public_key(&self) -> PublicKey {
        self.0.identity.public_key()
    }

    /// The short form of this host's key, for people to compare.
    pub fn fingerprint(&self) -> Fingerprint {
        self.0.identity.fingerprint()
    }

    /// The peers on record.
    pub fn peers(&self) -> &Peers {
        &self.0.peers
    }

    /// The transfers that run, either way, and what limits them.
    pub fn transfers(&self) -> &Transfers {
        &self.0.transfers
    }

    /// How it behaves.
    pub fn options(&self) -> &NodeOptions {
        &self.0.options
    }

    /// Hosts that called of late and aren't peers, the latest first.
    pub fn strangers(&self) -> Vec<Stranger> {
        let peers = self.peers();
        let is_unknown = |stranger: &Stranger| !matches!(peers.by_key(&stranger.key), Ok(Some(_)));
        self.0.strangers.lock().iter().filter(|stranger| is_unknown(stranger)).copied().collect()
    }

    pub(crate) fn note_stranger(&self, key: PublicKey, address: SocketAddr) {
        let mut strangers = self.0.strangers.lock();
        strangers.retain(|stranger| stranger.key != key);
        strangers.push_front(Stranger { key, address });
        strangers.truncate(MAX_STRANGERS);
    }

    /// From now on peers' requests about guests are served so.
    pub(crate) fn serve_guests(&self, migrations: Weak<migrate::Inner>) {
        *self.0.guests.lock() = migrations;
    }

    /// Who moves guests here.
    ///
    /// # Errors
    /// [`ErrorClass::Unsupported`] if nobody does.
    pub(crate) fn migrations(&self) -> Result<Migrations> {
        let found = Migrations::of(&self.0.guests.lock());
        found.ok_or_else(|| Error::refused(ErrorClass::Unsupported, "this host takes no guests"))
    }

    /// The transfers that connections may join.
    pub(crate) fn groups(&self) -> &Groups {
        &self.0.groups
    }

    /// Where connections are brought that others make.
    pub fn streams(&self) -> &Streams {
        &self.0.streams
    }

    /// Serves whoever is at the other end of `stream`, with all rights, until it leaves.
    ///
    /// # Errors
    /// Of any kind; the other side has been told.
    pub async fn serve_stream<S>(&self, stream: S, label: &str) -> Result<()>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        listener::serve_trusted(self, stream, &streams::trusted_peer(label)?).await
    }

    /// What restricted peers have sent in broken attempts.
    pub(crate) fn grants(&self) -> &Grants {
        &self.0.grants
    }

    /// Listens for peers on `address` until the listener is closed or dropped.
    ///
    /// # Errors
    /// [`Error::Listen`] if the address can't be had.
    pub async fn listen(&self, address: SocketAddr) -> Result<Listener> {
        Listener::start(self.clone(), address).await
    }

    /// The key that the host at `address` shows. Nothing is sent to it, and nothing says yet whose key it is: compare
    /// its fingerprint before adding a peer with it.
    ///
    /// # Errors
    /// [`Error::Link`] or [`Error::Timeout`] if it can't be reached.
    pub async fn probe(&self, address: &str) -> Result<PublicKey> {
        let address = normalize_address(address)?;
        let dialer = self.dialer(&address, None, PathOptions::default());
        let (_, dialled) = dialer.any(&Route::all(&addresses(&address), &[])).await?;
        let mut stream = dialled.stream;
        let _ = timeout(dialer.patience.connect, tokio::io::AsyncWriteExt::shutdown(&mut stream)).await;
        dialled.found.get().ok_or_else(|| Error::protocol(&address, "it shows no key"))
    }

    /// Brings `names`, with all layers of their stacks, to the peer called `peer`. What is there already isn't sent.
    /// A link that fails is tried again, and the transfer goes on where it was.
    ///
    /// # Errors
    /// Of any kind; nothing is named there then, unless only the peer's last answer was lost.
    pub async fn push(
        &self,
        names: &[LayerName],
        peer: &str,
        options: PushOptions,
        monitor: Arc<dyn Monitor>,
    ) -> Result<TransferReport> {
        self.push_knowing(names, peer, options, Knowing::default(), monitor).await
    }

    /// The same, with what is `knowing` of what goes.
    pub(crate) async fn push_knowing(
        &self,
        names: &[LayerName],
        peer: &str,
        options: PushOptions,
        knowing: Knowing,
        monitor: Arc<dyn Monitor>,
    ) -> Result<TransferReport> {
        let peer = self.other_side(peer, options.paths).await?;
        let entry = self.begin(Role::Sending, names, &peer, options.manner, monitor)?;
        let result = self.push_listed(names, &peer, options, knowing, &entry).await;
        let is_slower = result.as_ref().is_ok_and(|report| report.link_was_full);
        self.remember(&peer, entry.transfer(), is_slower).await;
        entry.end(result)
    }

    async fn push_listed(
        &self,
        names: &[LayerName],
        peer: &Peer,
        options: PushOptions,
        knowing: Knowing,
        entry: &Entry,
    ) -> Result<TransferReport> {
        entry.transfer().set_dry(options.dry_run);
        let (store, wanted, to) = (self.store().clone(), names.to_vec(), peer.name.to_string());
        let leaves_rest = knowing.rest_later && options.lazy && !options.dry_run;
        let limit = options.manner.limit;
        let prepare = move || {
            let prepared = send::prepare(&store, &wanted, &Visible::All, options.force)?;
            // Before anything is named there: whatever ends this process, and becomes of the names here, the rest goes.
            let noted = if leaves_rest { Some(Noted::new(&store, prepared.tops(), &to, limit)?) } else { None };
            Ok((prepared.dry_run(options.dry_run), noted))
        };
        let (prepared, noted) = joined(spawn_blocking(prepare).await)?;
        // As of a pull, what would have to go is all of it.
        let prepared = if options.lazy && !options.dry_run { prepared.lazily() } else { prepared };
        let prepared = if options.hurry { prepared.in_a_hurry() } else { prepared };
        let prepared = prepared.knowing(knowing.known);
        let told = |(layer, ids): &(LayerId, Vec<ChunkId>)| {
            let layer = *layer;
            ids.chunks(MAX_ASK).map(|ids| Message::Traced { layer, ids: ids.to_vec() }).collect::<Vec<_>>()
        };
        let job = Job::Push(&prepared, names, knowing.traces.iter().flat_map(told).collect());
        let result = attempt::transfer(self, peer, job, options.paths, entry).await;
        if let Some(noted) = noted {
            // Nobody can have taken an offer that didn't go out.
            let went_out = entry.transfer().gate().meter(Way::Out).total() > 0;
            let is_known = |error: &Error| !went_out || !is_transient(error) && error.class() != ErrorClass::Busy;
            let is_refused = result.as_ref().is_err_and(is_known);
            let store = self.store().clone();
            joined(spawn_blocking(move || noted.settle(&store, is_refused)).await)?;
        }
        result
    }

    /// Brings `names`, with all layers of their stacks, from the peer called `peer`. What is here already isn't sent.
    /// A link that fails is tried again, and the transfer goes on where it was.
    ///
    /// # Errors
    /// Of any kind; nothing is named here then.
    pub async fn pull(
        &self,
        names: &[LayerName],
        peer: &str,
        options: PullOptions,
        monitor: Arc<dyn Monitor>,
    ) -> Result<TransferReport> {
        if names.is_empty() || names.len() > MAX_NAMES {
            return Err(layerfs::Error::invalid(format!("1 to {MAX_NAMES} names can be moved at once")).into());
        }
        let peer = self.other_side(peer, options.paths).await?;
        let entry = self.begin(Role::Receiving, names, &peer, options.manner, monitor)?;
        let result = self.pull_listed(names, &peer, options, &entry).await;
        self.remember(&peer, entry.transfer(), true).await;
        entry.end(result)
    }

    async fn pull_listed(
        &self,
        names: &[LayerName],
        peer: &Peer,
        options: PullOptions,
        entry: &Entry,
    ) -> Result<TransferReport> {
        entry.transfer().set_dry(options.dry_run);
        // A Look can't be dry; what comes later of a lazy pull costs as much.
        let is_lazy = options.lazy && !options.dry_run;
        let request = match is_lazy {
            true => Message::Look { names: names.to_vec(), layers: Vec::new() },
            false => Message::Fetch { names: names.to_vec(), dry_run: options.dry_run },
        };
        let (lazy, limit) = (is_lazy, options.manner.limit);
        let terms = Terms { lazy, limit, ..Terms::of_pull(self, peer, names, options.force) };
        let job = Job::Pull(request, Box::new(terms));
        attempt::transfer(self, peer, job, options.paths, entry).await
    }

    /// Gets the chunks `ids` from the peer called `peer`, as far as it has them whole and lets us have them; `sink` gets
    /// each as it comes. For healing what is damaged here. Returns how many there were.
    ///
    /// # Errors
    /// Of any kind, `sink`'s among them.
    pub async fn fetch_chunks(
        &self,
        ids: &[ChunkId],
        peer: &str,
        mut sink: impl FnMut(Verified) -> layerfs::Result<()> + Send,
    ) -> Result<u64> {
        let peer = self.peer(peer).await?;
        let mut link = self.connect(&peer).await?;
        let result = get::run(&mut link, ids, &mut sink).await;
        finish(link, result).await
    }

    pub(crate) fn begin(
        &self,
        role: Role,
        names: &[LayerName],
        peer: &Peer,
        manner: Manner,
        monitor: Arc<dyn Monitor>,
    ) -> Result<Entry> {
        let names = names.iter().map(LayerName::to_string).collect();
        let Manner { limit, priority, urgent, id } = manner;
        let controls = Controls { limit, priority, urgent, ..Controls::default() };
        let plan = Plan { role, origin: Origin::Here, peer: peer.name.to_string(), names, controls, id };
        self.transfers().begin(plan, monitor)
    }

    /// Keeps how fast the link was, for estimates. If it wasn't the slower side, as far as is known, it may be faster than that.
    async fn remember(&self, peer: &Peer, transfer: &Transfer, is_slower: bool) {
        let Some(rate) = transfer.measured_rate() else { return };
        let known = if is_slower {
            None
        } else {
            self.measured(peer.name.as_str()).await.unwrap_or_default().rate(transfer.role().way())
        };
        if known.is_some_and(|known| known >= rate) {
            return;
        }
        let new = match transfer.role() {
            Role::Sending => Measured { out_rate: Some(rate), ..Measured::default() },
            Role::Receiving => Measured { in_rate: Some(rate), ..Measured::default() },
        };
        self.remember_link(peer, new).await;
    }

    pub(crate) async fn remember_link(&self, peer: &Peer, new: Measured) {
        if peer.key == TRUSTED_KEY {
            return;
        }
        let (store, key) = (self.store().clone(), peer.key);
        let kept = joined(spawn_blocking(move || Ok(measured::remember(&store, &key, new)?)).await);
        if let Err(error) = kept {
            tracing::debug!(%error, "the speed of a link was not kept");
        }
    }

    /// How fast the link to the peer called `name` was when last measured.
    ///
    /// # Errors
    /// [`layerfs::Error::NotFound`].
    pub async fn measured(&self, name: &str) -> Result<Measured> {
        let (store, key) = (self.store().clone(), self.peer(name).await?.key);
        joined(spawn_blocking(move || Ok(measured::load(&store, &key))).await)
    }

    pub(crate) async fn peer(&self, name: &str) -> Result<Peer> {
        let (peers, name) = (self.peers().clone(), name.to_owned());
        joined(spawn_blocking(move || Ok(peers.get(&name)?)).await)
    }

    async fn other_side(&self, name: &str, paths: PathOptions) -> Result<Peer> {
        if paths.stream.is_some() { streams::trusted_peer(name) } else { self.peer(name).await }
    }

    /// One connection to `peer`, over any of its addresses.
    pub(crate) async fn connect(&self, peer: &Peer) -> Result<Link> {
        let dialer = self.dialer(peer.name.as_str(), Some(peer.key), PathOptions::default());
        let (_, dialled) = dialer.any(&self.routes(peer)?).await?;
        self.remember_link(peer, dialled.measured).await;
        Ok(Link::start(dialled.stream, peer.name.as_str(), dialer.patience))
    }

    /// The ways to `peer`.
    pub(crate) fn routes(&self, peer: &Peer) -> Result<Vec<Route>> {
        Ok(Route::all(&addresses(peer_address(peer)?), &self.options().sources))
    }

    pub(crate) fn dialer(&self, name: &str, key: Option<PublicKey>, paths: PathOptions) -> Dialer {
        let paths = paths.or(self.options().paths);
        let patience = paths.patience(self.options().patience);
        Dialer {
            node: self.clone(),
            name: name.to_owned(),
            key,
            kind: paths.transport.unwrap_or_default().kind(),
            patience,
            silence: if paths.connections == Some(Connections::Exactly(1)) {
                patience.idle
            } else {
                patience.idle.min(PATH_SILENCE)
            },
            counters: Arc::default(),
        }
    }
}

fn peer_address(peer: &Peer) -> Result<&str> {
    peer.address.as_deref().ok_or_else(|| {
        let message =
            format!("peer {0} has no address; `layerctl peer set {0} --address HOST[:PORT]` gives it one", peer.name);
        Error::refused(ErrorClass::Invalid, message)
    })
}

/// The addresses in a peer's record.
fn addresses(text: &str) -> Vec<&str> {
    text.split(',').collect()
}
