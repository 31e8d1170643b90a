//! Layers that are mounted before their data is here: brings chunks when they are read, and the rest in the background.
//!
//! A [`Lazy`] belongs to a [`Node`] and is its store's [`ChunkFetcher`]. For each peer that partial layers come from it
//! has a connection for single chunks ([`source`]), and a transfer of low priority that completes the layers, tried
//! again until it succeeds, also by the next daemon.
//!
//! ```text
//! reader → Store::get → (not here) → fetch → flight ─┬─ the source's connection: Get, Chunks
//!                                                    └─ the background transfer, whichever brings it first
//! ```
//!
//! Invariants: a reader waits no longer than [`LazyOptions::timeout`], and not at all for a source that has been out of
//! reach for that long, unless a guest runs on what it reads: that would die of an error; what failed is tried anew by the next reader; what came is verified before anybody gets it.

mod flights;
mod order;
pub(crate) mod pushes;
mod rest;
mod source;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use layerfs::error::ErrorClass;
use layerfs::manifest::Manifest;
use layerfs::monitor::Monitor;
use layerfs::patience;
use layerfs::store::{ChunkFetcher, PartialLayer, Presence};
use layerfs::{ChunkId, LayerId, LayerName};
use parking_lot::{Mutex, RwLock};
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use crate::check::check_layer;
use crate::error::{Error, Result};
use crate::guest::{GuestState, Guests};
use crate::node::{Knowing, Node, PushOptions};
use crate::peers::Visible;
use crate::progress::TransferReport;
use crate::send::joined;
use flights::Flights;
use order::Order;
use source::Source;

/// What follows a chunk that somebody waits for is asked for along with it, up to so many plain bytes.
const NEIGHBOUR_BYTES: u32 = 128 * 1024;
/// How often a reader looks whether the background has brought its chunk, and whether the source is back.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often it is looked whether anything still needs the layers that come.
const NEED_CHECK: Duration = Duration::from_secs(2);
/// Between attempts of the background transfer.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// What is said of a source whose rest doesn't come.
const CANCELLED: &str = "the rest was cancelled; pull the layer again to fetch it";
/// For so long the background waits until the source has told its traces.
const TRACES: Duration = Duration::from_secs(2);

/// How patient readers are.
#[derive(Clone, Copy, Debug)]
pub struct LazyOptions {
    /// A read of a chunk that isn't here fails after so long. Not if a guest runs on it.
    pub timeout: Duration,
}

impl Default for LazyOptions {
    fn default() -> LazyOptions {
        LazyOptions { timeout: Duration::from_secs(30) }
    }
}

/// A peer that partial layers come from, as users see it.
#[derive(Clone, Debug, Serialize)]
pub struct SourceStatus {
    /// The peer's name.
    pub peer: String,
    /// Why chunks or the rest don't come at present.
    pub error: Option<String>,
}

/// Brings the chunks of a store's partial layers. Dropping it stops that; readers that wait get an error.
pub struct Lazy(Arc<Inner>);

pub(crate) struct Inner {
    node: Node,
    options: LazyOptions,
    runtime: tokio::runtime::Handle,
    stop: watch::Sender<bool>,
    flights: Flights,
    known: RwLock<Known>,
    /// Set when the partial layers have changed, and told by `changed`.
    is_stale: AtomicBool,
    changed: tokio::sync::Notify,
    /// Background transfers that run, by peer, and why the last attempt failed.
    jobs: Mutex<BTreeMap<String, Option<String>>>,
    /// Peers that what was pushed lazily goes to.
    pushes: Mutex<BTreeSet<String>>,
    /// Layers whose rest somebody has cancelled: it comes when they are pulled again, or with the next daemon.
    cancelled: Mutex<BTreeSet<LayerId>>,
    /// Layers of which was said that they can't be read.
    unreadable: Mutex<BTreeSet<LayerId>>,
}

/// The partial layers, as of the last look.
#[derive(Default)]
struct Known {
    layers: BTreeMap<LayerId, PartialLayer>,
    orders: HashMap<LayerId, Arc<Order>>,
    sources: HashMap<String, Arc<Source>>,
    /// Stacks whose traces were looked for.
    traced: HashSet<LayerId>,
}

/// What the store holds: a fetcher that may be gone.
struct Handle(Weak<Inner>);

impl ChunkFetcher for Handle {
    fn fetch(&self, id: &ChunkId) -> layerfs::Result<Bytes> {
        match self.0.upgrade() {
            Some(inner) => inner.fetch(id),
            None => Err(layerfs::Error::Absent { id: *id, detail: "nothing is fetched at present".to_owned() }),
        }
    }

    fn soon(&self, ids: &[ChunkId]) {
        if let Some(inner) = self.0.upgrade() {
            inner.soon(ids);
        }
    }

    fn marked(&self, layers: &[LayerId]) {
        if let Some(inner) = self.0.upgrade() {
            inner.cancelled.lock().retain(|layer| !layers.contains(layer));
        }
    }

    fn changed(&self) {
        if let Some(inner) = self.0.upgrade() {
            inner.is_stale.store(true, Ordering::Release);
            inner.changed.notify_one();
        }
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Lazy {
    /// Begins to bring what `node`'s store lacks. Call it within a tokio runtime.
    pub fn start(node: &Node, options: LazyOptions) -> Lazy {
        let inner = Arc::new(Inner {
            node: node.clone(),
            options,
            runtime: tokio::runtime::Handle::current(),
            stop: watch::Sender::new(false),
            flights: Flights::default(),
            known: RwLock::default(),
            is_stale: AtomicBool::new(true),
            changed: tokio::sync::Notify::new(),
            jobs: Mutex::default(),
            pushes: Mutex::default(),
            cancelled: Mutex::default(),
            unreadable: Mutex::default(),
        });
        node.store().set_fetcher(Arc::new(Handle(Arc::downgrade(&inner))));
        tokio::spawn(manage(inner.clone()));
        inner.changed.notify_one();
        Lazy(inner)
    }

    /// Stops; readers that wait get an error. What is partial goes on with the next start.
    pub fn stop(&self) {
        self.0.stop.send_replace(true);
        self.0.known.read().sources.values().for_each(|source| source.wake.notify_one());
    }

    /// [`Node::push`]; if that is lazy, what is lacking then goes in the background, also by the next daemon.
    ///
    /// # Errors
    /// As [`Node::push`]; those of the database.
    pub fn push(
        &self,
        names: &[LayerName],
        peer: &str,
        options: PushOptions,
        monitor: Arc<dyn Monitor>,
    ) -> impl Future<Output = Result<TransferReport>> + Send + use<> {
        let (inner, names, peer) = (self.0.clone(), names.to_vec(), peer.to_owned());
        async move {
            let knowing = Knowing { rest_later: true, ..Knowing::default() };
            let result = inner.node.push_knowing(&names, &peer, options, knowing, monitor).await;
            inner.changed.notify_one();
            result
        }
    }

    /// Whether anything comes or goes in the background.
    pub fn is_busy(&self) -> bool {
        self.0.node.store().has_partials() || !self.0.pushes.lock().is_empty()
    }

    /// The peers that partial layers come from.
    pub fn sources(&self) -> Vec<SourceStatus> {
        let jobs = self.0.jobs.lock().clone();
        let cancelled = self.0.cancelled.lock().clone();
        let known = self.0.known.read();
        let peers: BTreeSet<&String> = known.layers.values().flat_map(|partial| &partial.sources).collect();
        let is_held = |peer: &String| {
            let mut layers = known.layers.iter().filter(|(layer, _)| cancelled.contains(layer));
            layers.any(|(_, partial)| partial.sources.first() == Some(peer))
        };
        let status = |peer: &String| {
            let source = known.sources.get(peer).and_then(|source| source.failing());
            let error = source.map(|(_, error)| error).or_else(|| jobs.get(peer).cloned().flatten());
            let error = error.or_else(|| is_held(peer).then(|| CANCELLED.to_owned()));
            SourceStatus { peer: peer.clone(), error }
        };
        peers.into_iter().map(status).collect()
    }
}

impl Inner {
    fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }

    /// Says once that `layer` can't be read.
    fn tell_unreadable(&self, layer: LayerId, error: &layerfs::Error) {
        if self.unreadable.lock().insert(layer) {
            tracing::warn!(%layer, %error, "a layer can't be read; what it stands on is fetched all the same");
        }
    }

    /// Resolves at the end.
    async fn stopped(&self) {
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Waits for `event`, `time` or the end.
    async fn pause(&self, event: impl Future<Output = ()>, time: Duration) {
        tokio::select! {
            () = event => {}
            () = tokio::time::sleep(time) => {}
            () = self.stopped() => {}
        }
    }

    /// Whether some layer comes from `peer`.
    fn is_needed(&self, peer: &str) -> bool {
        !self.is_stopped() && self.known.read().layers.values().any(|partial| partial.sources.iter().any(|s| s == peer))
    }

    fn is_here(&self, id: &ChunkId) -> bool {
        let store = self.node.store();
        matches!(store.contains(id), Ok(true)) || store.is_arriving(id)
    }

    fn bytes_of(&self, id: &ChunkId) -> Option<u32> {
        self.known.read().orders.values().find_map(|order| order.bytes(id))
    }

    /// The peers that may have `id`, and the connections to them.
    fn sources_of(&self, id: &ChunkId) -> (Vec<String>, Vec<Arc<Source>>) {
        let known = self.known.read();
        let mut peers: Vec<String> = Vec::new();
        for (layer, partial) in &known.layers {
            // One whose order isn't known yet may have any.
            if known.orders.get(layer).is_none_or(|order| order.may_have(id)) {
                peers.extend(partial.sources.iter().filter(|peer| !peers.contains(peer)).cloned().collect::<Vec<_>>());
            }
        }
        let sources = peers.iter().filter_map(|peer| known.sources.get(peer).cloned()).collect();
        (peers, sources)
    }

    /// What follows `id` and isn't here.
    fn neighbours(&self, id: &ChunkId) -> Vec<ChunkId> {
        let known = self.known.read();
        let after = known.orders.values().map(|order| order.after(id, NEIGHBOUR_BYTES)).find(|after| !after.is_empty());
        let ids: Vec<ChunkId> = after.unwrap_or_default().iter().map(|(id, _)| *id).collect();
        drop(known);
        ids.into_iter().filter(|id| !self.is_here(id)).collect()
    }

    fn fetch(&self, id: &ChunkId) -> layerfs::Result<Bytes> {
        let began = Instant::now();
        // The layers may have been marked a moment ago.
        while self.is_stale.load(Ordering::Acquire) && began.elapsed() < self.options.timeout && !self.is_stopped() {
            std::thread::sleep(Duration::from_millis(2));
        }
        let (peers, sources) = self.sources_of(id);
        if peers.is_empty() {
            return Err(layerfs::Error::ChunkMissing(*id));
        }
        let (flight, is_new) = self.flights.join(id);
        if is_new && let Some(source) = sources.first() {
            source.want(id);
            source.guess(self.neighbours(id));
        }
        let outcome = self.wait(id, &flight, &peers, &sources, began);
        self.flights.leave(id, &flight);
        outcome
    }

    fn wait(
        &self,
        id: &ChunkId,
        flight: &flights::Flight,
        peers: &[String],
        sources: &[Arc<Source>],
        began: Instant,
    ) -> layerfs::Result<Bytes> {
        let timeout = self.options.timeout;
        let absent = |detail: String| Err(layerfs::Error::Absent { id: *id, detail });
        loop {
            match flight.wait(LOOK_EVERY) {
                Some(Some(plain)) => return Ok(plain),
                Some(None) => return Err(layerfs::Error::ChunkMissing(*id)),
                None => {}
            }
            if self.is_here(id) {
                return self.node.store().get_here(id);
            }
            let failing: Vec<(Instant, String)> = sources.iter().filter_map(|source| source.failing()).collect();
            let is_hopeless = !sources.is_empty()
                && failing.len() == sources.len()
                && failing.iter().all(|(since, _)| since.elapsed() > timeout);
            let why = failing.first().map(|(_, error)| error.clone());
            patience::waits();
            if patience::is_given_up() {
                return Err(layerfs::Error::GivenUp(*id));
            }
            if self.is_stopped() {
                return absent("the daemon stops".to_owned());
            }
            if (is_hopeless || began.elapsed() > timeout) && !self.is_run_on(id) {
                let seconds = timeout.as_secs();
                let why = why.unwrap_or_else(|| format!("{} did not send it within {seconds} s", peers.join(", ")));
                return absent(why);
            }
            // Another source may be reachable where the first isn't.
            if let Some(other) = sources.iter().skip(1).find(|source| source.failing().is_none())
                && !failing.is_empty()
            {
                other.want(id);
            }
        }
    }

    /// Whether a guest runs on a state that may have `id`. One that can't be told of is taken for one that doesn't run.
    fn is_run_on(&self, id: &ChunkId) -> bool {
        let store = self.node.store();
        let guests = Guests::new(store.clone()).list().unwrap_or_default();
        let states = guests.into_iter().filter(|guest| guest.state == GuestState::Running);
        let states = states.filter_map(|guest| Some(store.name(&guest.state_layer?).ok()??.layer));
        let coming: Vec<LayerId> = states
            .flat_map(|state| store.partials_of_stack(state).unwrap_or_default())
            .map(|(layer, _)| layer)
            .collect();
        let known = self.known.read();
        coming.iter().any(|layer| known.orders.get(layer).is_some_and(|order| order.may_have(id)))
    }

    fn soon(&self, ids: &[ChunkId]) {
        let Some(first) = ids.first() else { return };
        if let (_, sources) = self.sources_of(first)
            && let Some(source) = sources.first()
        {
            source.guess(ids.iter().copied().filter(|id| !self.flights.is_awaited(id)));
        }
    }

    /// `peer` doesn't have `id`.
    fn refused(&self, id: &ChunkId, peer: &str) {
        let (peers, sources) = self.sources_of(id);
        if self.flights.refuse(id, peer, &peers)
            && let Some(next) = sources.iter().skip_while(|source| source.peer != peer).nth(1)
        {
            next.want(id);
        }
    }

    /// A source told a trace. Blocks.
    fn learn(&self, layer: LayerId, ids: Vec<ChunkId>) -> Result<()> {
        self.node.store().extend_trace(layer, &ids)?;
        self.replay(&ids);
        Ok(())
    }

    /// Asks for what of `ids` isn't here, behind what readers want. Blocks.
    fn replay(&self, ids: &[ChunkId]) {
        for batch in ids.chunks(256) {
            let here = self.node.store().contains_many(batch).unwrap_or_default();
            let mut lacking = batch.iter().zip(here).filter(|(_, here)| !here).map(|(id, _)| *id).peekable();
            let Some(first) = lacking.peek() else { continue };
            if let Some(source) = self.sources_of(first).1.first() {
                source.replay(lacking);
            }
        }
    }
}

/// Follows the store's partial layers: knows their orders, keeps a connection and a transfer for each source.
async fn manage(inner: Arc<Inner>) {
    while !inner.is_stopped() {
        let before = inner.clone();
        let (new, peers) = match joined(spawn_blocking(move || Ok(refresh(&before))).await) {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "what is partial cannot be read");
                (Vec::new(), Vec::new())
            }
        };
        for source in new {
            inner.runtime.spawn(source::run(inner.clone(), source));
        }
        for peer in peers {
            if !inner.jobs.lock().contains_key(&peer) {
                inner.jobs.lock().insert(peer.clone(), None);
                inner.runtime.spawn(complete(inner.clone(), peer));
            }
        }
        push_rests(&inner).await;
        inner.pause(inner.changed.notified(), Duration::from_secs(3600)).await;
    }
}

/// Begins to send what was pushed lazily.
async fn push_rests(inner: &Arc<Inner>) {
    let store = inner.node.store().clone();
    let peers = match joined(spawn_blocking(move || pushes::list(&store)).await) {
        Ok(all) => all.into_keys(),
        Err(error) => return tracing::error!(%error, "what is to be pushed cannot be read"),
    };
    for peer in peers {
        if inner.pushes.lock().insert(peer.clone()) {
            inner.runtime.spawn(pushes::run(inner.clone(), peer));
        }
    }
}

/// Looks at the partial layers anew. Returns the sources that are new, and the peers to fetch the rest from, whatever can't
/// be read. Blocks.
fn refresh(inner: &Arc<Inner>) -> (Vec<Arc<Source>>, Vec<String>) {
    let store = inner.node.store();
    let mut new = Vec::new();
    let mut fetched = BTreeSet::new();
    let layers: BTreeMap<LayerId, PartialLayer>;
    {
        // In this order: who sees that nothing has changed since waits for the lock, and finds what had.
        let mut known = inner.known.write();
        inner.is_stale.store(false, Ordering::Release);
        layers = store.partials().into_iter().collect();
        known.orders.retain(|layer, _| layers.contains_key(layer));
        let needed: BTreeSet<String> = layers.values().flat_map(|partial| partial.sources.clone()).collect();
        for (peer, source) in known.sources.extract_if(|peer, _| !needed.contains(peer)) {
            tracing::debug!(peer, "is no source any more");
            source.wake.notify_one();
        }
        for peer in needed {
            let is_callable = inner.node.peers().get(&peer).is_ok_and(|peer| peer.address.is_some());
            if is_callable && !known.sources.contains_key(&peer) {
                let source = Arc::new(Source::new(&peer));
                new.push(source.clone());
                known.sources.insert(peer, source);
            }
        }
        known.layers = layers.clone();
    }
    inner.cancelled.lock().retain(|layer| layers.contains_key(layer));
    for (layer, partial) in &layers {
        if !partial.pushed && !inner.cancelled.lock().contains(layer) {
            fetched.extend(partial.sources.first().cloned());
        }
        if !inner.known.read().orders.contains_key(layer) {
            match Order::of(store, *layer) {
                Ok(order) => drop(inner.known.write().orders.insert(*layer, Arc::new(order))),
                // Its chunks come one by one, and with the rest.
                Err(error) => inner.tell_unreadable(*layer, &error),
            }
        }
    }
    if let Err(error) = replay_traces(inner) {
        tracing::warn!(%error, "what is read first can't be told; it comes when it is read");
    }
    (new, fetched.into_iter().collect())
}

/// For each named stack with partial layers: fetches first what earlier runs here read, and asks the source for its own.
fn replay_traces(inner: &Arc<Inner>) -> Result<()> {
    let store = inner.node.store();
    let mut tops: BTreeMap<LayerId, String> = BTreeMap::new();
    if store.has_partials() {
        for top in store.roots()? {
            let partials = match store.partials_of_stack(top) {
                Ok(partials) => partials,
                Err(error) => {
                    inner.tell_unreadable(top, &error);
                    continue;
                }
            };
            let source = partials.first().and_then(|(_, partial)| partial.sources.first().cloned());
            tops.extend(source.map(|source| (top, source)));
        }
    }
    let fresh: Vec<(LayerId, String)> = {
        let mut known = inner.known.write();
        known.traced.retain(|top| tops.contains_key(top));
        tops.into_iter().filter(|(top, _)| known.traced.insert(*top)).collect()
    };
    for (top, peer) in fresh {
        inner.replay(&store.trace(top)?);
        let source = inner.known.read().sources.get(&peer).cloned();
        if let Some(source) = source {
            source.ask_traces(vec![top]);
        }
    }
    Ok(())
}

/// The layers that come from `peer`, that something needs and nobody has cancelled; the marks of what nothing needs are
/// dropped. Blocks.
fn due(inner: &Inner, peer: &str) -> Result<Vec<LayerId>> {
    let store = inner.node.store();
    let mut needed = HashSet::new();
    let mut is_all_known = true;
    for root in store.roots()? {
        let mut next = Some(root);
        while let Some(layer) = next.filter(|layer| needed.insert(*layer)) {
            next = match Manifest::load(store.as_ref(), layer) {
                Ok(manifest) => manifest.parent,
                Err(error) => {
                    inner.tell_unreadable(layer, &error);
                    is_all_known = false;
                    None
                }
            };
        }
    }
    let of_peer =
        |partial: &PartialLayer| !partial.pushed && partial.sources.first().is_some_and(|first| first == peer);
    let layers: Vec<LayerId> =
        store.partials().into_iter().filter(|(_, partial)| of_peer(partial)).map(|(layer, _)| layer).collect();
    // What can't be read may stand on any.
    let is_needed = |layer: &LayerId| !is_all_known || needed.contains(layer);
    let (due, unneeded): (Vec<LayerId>, Vec<LayerId>) = layers.into_iter().partition(is_needed);
    // A collection takes what has come of these; their marks would only keep us trying.
    store.clear_unneeded(&unneeded)?;
    let cancelled = inner.cancelled.lock();
    Ok(due.into_iter().filter(|layer| !cancelled.contains(layer)).collect())
}

/// Takes the marks off those of `layers` of which everything is here though no source sent it: an import of the same content brought
/// it, or another transfer. Returns how many those are. What a source named that mayn't learn of every chunk stays marked, as it may
/// be somebody else's that is here. Blocks.
fn settle(inner: &Inner, layers: &[LayerId]) -> Result<usize> {
    let store = inner.node.store();
    let mut whole = Vec::new();
    // What it finds isn't collected as long as it lives.
    let session = store.session("complete");
    for layer in layers {
        let Some(partial) = store.partial(*layer) else { continue };
        let sees_all =
            |peer: &String| inner.node.peers().get(peer).is_ok_and(|peer| peer.rights.visible == Visible::All);
        let is_here = |presence: Presence| presence.here_bytes == presence.total_bytes;
        if !partial.sources.iter().all(sees_all) || !is_here(store.presence(*layer)?) {
            continue;
        }
        // What a session has not synced yet is not in the index, and doesn't count.
        store.flush_sessions();
        let checked = check_layer(store.as_ref(), *layer, &mut |ids| session.has_many(ids));
        match checked {
            Ok(()) => whole.push(*layer),
            Err(error) => tracing::debug!(%layer, %error, "a lazy layer isn't whole, though its data is here"),
        }
    }
    store.clear_partial(&whole)?;
    Ok(whole.len())
}

/// The background transfer from `peer`: again and again until nothing is partial any more.
async fn complete(inner: Arc<Inner>, peer: String) {
    let mut pause = FIRST_PAUSE;
    // What the source knows of earlier runs comes first.
    let source = inner.known.read().sources.get(&peer).cloned();
    if let Some(source) = source {
        inner.pause(source.traces_told(), TRACES).await;
    }
    loop {
        if inner.is_stopped() {
            break;
        }
        let (look, of) = (inner.clone(), peer.clone());
        let layers = match joined(spawn_blocking(move || due(&look, &of)).await) {
            Ok(layers) if layers.is_empty() => break,
            Ok(layers) => layers,
            Err(error) => {
                tracing::error!(peer, %error, "what is partial cannot be read");
                break;
            }
        };
        match attempt(&inner, &peer, &layers).await {
            Ok(report) => {
                tracing::info!(peer, layers = layers.len(), chunks = report.chunks_sent, "lazy layers are whole");
                pause = FIRST_PAUSE;
            }
            Err(Error::Store(layerfs::Error::Cancelled)) if inner.is_stopped() => {}
            Err(Error::Store(layerfs::Error::Cancelled)) => {
                let (look, of) = (inner.clone(), peer.clone());
                // Of what is still due somebody has cancelled it: what is read still comes, and other layers.
                if let Ok(left) = joined(spawn_blocking(move || due(&look, &of)).await) {
                    inner.cancelled.lock().extend(left.into_iter().filter(|layer| layers.contains(layer)));
                }
            }
            Err(error) => {
                // Once is news, a source that stays away isn't.
                let text = error.to_string();
                if inner.jobs.lock().insert(peer.clone(), Some(text.clone())) != Some(Some(text.clone())) {
                    tracing::warn!(peer, error = text, "the rest of lazy layers does not come; it is tried again");
                }
                let look = inner.clone();
                if joined(spawn_blocking(move || settle(&look, &layers)).await).is_ok_and(|settled| settled > 0) {
                    continue;
                }
                if error.class() == ErrorClass::NotFound {
                    pause = LAST_PAUSE;
                }
                inner.pause(std::future::pending(), pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }
    inner.jobs.lock().remove(&peer);
    // What became partial while this ended begins anew.
    let later = inner.clone();
    let left = joined(spawn_blocking(move || due(&later, &peer)).await);
    if left.is_ok_and(|layers| !layers.is_empty()) && !inner.is_stopped() {
        inner.changed.notify_one();
    }
}

/// One transfer, given up when nothing needs the layers any more.
async fn attempt(inner: &Arc<Inner>, peer: &str, layers: &[LayerId]) -> Result<TransferReport> {
    let watched = Arc::new(Watched::default());
    let transfer = inner.node.complete(layers, peer, watched.clone());
    tokio::pin!(transfer);
    loop {
        tokio::select! {
            result = &mut transfer => return result,
            () = inner.stopped() => {
                watched.cancel();
                return transfer.await;
            }
            () = tokio::time::sleep(NEED_CHECK) => {
                let (look, of) = (inner.clone(), peer.to_owned());
                let due = joined(spawn_blocking(move || due(&look, &of)).await)?;
                if !layers.iter().any(|layer| due.contains(layer)) {
                    watched.cancel();
                }
            }
        }
    }
}

/// A monitor for work that nobody watches and that can be given up.
#[derive(Debug, Default)]
struct Watched {
    cancelled: AtomicBool,
}

impl Watched {
    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

impl Monitor for Watched {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, _: u64) {}
    fn items(&self, _: u64) {}
    fn warn(&self, message: &str) {
        tracing::warn!("{message}");
    }
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
