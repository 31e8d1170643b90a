//! The receiving side's driver: does what [`Receiver`] says, over a [`Link`], into a [`Store`].
//!
//! Chunks are verified by several threads at once and appended by one at a time, in the order of their coming, so
//! that they lie in the packs as they lay at the sender. Invariants: at most [`MAX_JOBS`] frames are in memory beyond
//! the link's; nothing is named before the layers were verified whole; what arrived before a failure stays, unnamed, for
//! the next attempt.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesOrdered;
use layerfs::chunk::{self, StoredChunk, Verified};
use layerfs::error::ErrorClass;
use layerfs::manifest::Manifest;
use layerfs::monitor::Monitor;
use layerfs::store::{Expect, NameChange, Pin, Session, Store};
use layerfs::{ChunkId, LayerId, LayerName, failpoint};
use tokio::task::{JoinHandle, spawn_blocking};

use crate::access::Access;
use crate::check::{Extent, check_extent};
use crate::error::{Error, Result};
use crate::governor::Rate;
use crate::grants::Grants;
use crate::identity::PublicKey;
use crate::link::Link;
use crate::node::Node;
use crate::peers::{Peer, Visible};
use crate::progress::Tally;
use crate::protocol::{Receiver, ReceiverStep};
use crate::send::{CANCEL_CHECK, joined};
use crate::unbundle::{self, Half, Opened, Waiting};
use crate::wanted::{Polled, Wanted};
use crate::wire::{Bundle, Message, Offer};

/// Frames that are being verified or wait to be appended.
const MAX_JOBS: usize = 8;
/// How often what has come is made durable: a host that dies loses no more than that.
const FLUSH_EVERY: Duration = Duration::from_secs(3);
/// Of what completes partial layers so many chunks are wanted beforehand, and then those of another question.
const MAX_AWAITED_OF_REST: usize = 64;
/// A restricted peer may send so many chunks in one transfer: each is remembered.
const MAX_RESTRICTED_CHUNKS: u64 = 4_000_000;

/// On what terms layers are received.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    /// What the peer may see, and which names it may set.
    pub visible: Visible,
    /// Only these names are wanted (a pull), with whether they may be replaced; `None` takes what is offered (a push).
    pub wanted: Option<(Vec<LayerName>, bool)>,
    /// Where to keep what the peer with this key has sent, should the attempt fail.
    pub kept: Option<(Grants, PublicKey)>,
    /// Whether a pull wants only the layers' structure now.
    pub lazy: bool,
    /// The most that the rest of a lazy pull may take of the network.
    pub limit: Option<Rate>,
    /// These layers, partial here, are to be completed (a pull); no names are set.
    pub completes: Vec<LayerId>,
    /// The peer's name.
    pub peer: String,
}

impl Terms {
    /// Those of a pull from `peer` of `names`, which may be replaced with `force`.
    pub fn of_pull(node: &Node, peer: &Peer, names: &[LayerName], force: bool) -> Terms {
        // We choose the names; which of our chunks the peer learns of is still its key's matter.
        Terms { wanted: Some((names.to_vec(), force)), ..Terms::of_push(node, peer) }
    }

    /// Those of what `peer` pushes.
    pub fn of_push(node: &Node, peer: &Peer) -> Terms {
        Terms {
            visible: peer.rights.visible.clone(),
            wanted: None,
            kept: Some((node.grants().clone(), peer.key)),
            lazy: false,
            limit: None,
            completes: Vec::new(),
            peer: peer.name.to_string(),
        }
    }
}

/// Receives one transfer. With `first`, that is its first message. Returns the names and how many were changed.
///
/// # Errors
/// The store's, the link's, or the sender's own words.
pub(crate) async fn run(
    link: &mut Link,
    store: &Arc<Store>,
    terms: Terms,
    first: Option<Message>,
    tally: &Arc<Tally>,
    monitor: &Arc<dyn Monitor>,
) -> Result<(Vec<LayerName>, u16)> {
    let context = Arc::new(Context { store: store.clone(), session: store.session("receive"), terms });
    tally.phase("negotiate");
    monitor.phase("comparing", None);
    let mut driver = Driver {
        link,
        context: context.clone(),
        machine: Receiver::default(),
        tally,
        monitor,
        accepted: None,
        checking: None,
        to_check: VecDeque::new(),
        verifying: FuturesOrdered::new(),
        waiting: Waiting::default(),
        appending: None,
        flushed: Instant::now(),
        changed: 0,
    };
    if driver.link.is_grouped() {
        driver.machine.expect_several_connections();
    }
    let result = driver.go(first).await;
    let names = driver.accepted.as_ref().map(|accepted| accepted.names()).unwrap_or_default();
    if let (Err(_), Some((grants, key)), Some(accepted)) = (&result, &context.terms.kept, &driver.accepted) {
        grants.keep(*key, accepted.access.take_granted());
    }
    drop(driver);
    if let Err(error) = &result
        && error.class() != ErrorClass::NoSpace
    {
        // What has come is verified: the next attempt need not fetch it again.
        let flushed = joined(spawn_blocking(move || Ok(context.session.flush()?)).await);
        if let Err(error) = flushed {
            tracing::debug!(%error, "received chunks were not kept");
        }
    }
    result.map(|changed| (names, changed))
}

struct Context {
    store: Arc<Store>,
    session: Session,
    terms: Terms,
}

/// An offer that was accepted.
struct Accepted {
    offer: Offer,
    force: bool,
    lacking: Vec<bool>,
    access: Access,
    /// Something that is held is damaged: all is asked for, so that it comes again.
    is_doubted: bool,
    /// What is held stays while the transfer builds upon it.
    _pins: Vec<Pin>,
}

impl Accepted {
    fn names(&self) -> Vec<LayerName> {
        self.offer.names.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Whether the transfer may build upon `layer`.
    fn holds(&self, layer: &LayerId) -> bool {
        !self.is_doubted && self.access.holds(layer)
    }

    /// Whether it completes what is partial here.
    fn is_rest(&self) -> bool {
        self.offer.names.is_empty()
    }

    fn layer_of(&self, index: u16) -> LayerId {
        self.offer.layers[usize::from(index)].id
    }
}

struct Driver<'a> {
    link: &'a mut Link,
    context: Arc<Context>,
    machine: Receiver,
    tally: &'a Arc<Tally>,
    monitor: &'a Arc<dyn Monitor>,
    accepted: Option<Arc<Accepted>>,
    checking: Option<JoinHandle<Result<Vec<bool>>>>,
    to_check: VecDeque<Vec<ChunkId>>,
    verifying: FuturesOrdered<JoinHandle<Result<Batch>>>,
    /// Bundles with holes.
    waiting: Waiting,
    appending: Option<JoinHandle<Result<()>>>,
    flushed: Instant,
    changed: u16,
}

/// What became of a frame.
enum Batch {
    /// Verified chunks.
    Chunks(Vec<Verified>),
    /// A bundle.
    Bundle(Opened),
}

/// What happened next.
enum Event {
    Message(Message),
    Checked(Vec<bool>),
    Verified(Batch),
    Appended,
    Tick,
}

impl Driver<'_> {
    async fn go(&mut self, first: Option<Message>) -> Result<u16> {
        let mut ticks = tokio::time::interval(CANCEL_CHECK);
        let mut next = first;
        loop {
            let event = match next.take() {
                Some(message) => Event::Message(message),
                None => self.next(&mut ticks).await?,
            };
            if let Some(pace) = self.link.gate().pace_to_tell() {
                self.link.send(Message::Pace(pace)).await?;
            }
            let steps = self.on_event(event)?;
            if !self.waiting.is_empty() && self.verifying.is_empty() && self.machine.has_all_come() {
                return Err(Error::protocol(self.link.peer(), "a bundle names chunks that did not come"));
            }
            if self.perform(steps).await? {
                return Ok(self.changed);
            }
            self.check_next();
        }
    }

    fn on_event(&mut self, event: Event) -> Result<Vec<ReceiverStep>> {
        match event {
            Event::Message(message) => {
                let violation = |v: crate::protocol::Violation| Error::protocol(self.link.peer(), v.0);
                return self.machine.on_message(message).map_err(violation);
            }
            Event::Checked(present) => {
                let reused = present.iter().filter(|present| **present).count();
                self.tally.reused.fetch_add(reused as u64, Relaxed);
                if self.is_dry() {
                    self.tally.chunks.fetch_add((present.len() - reused) as u64, Relaxed);
                }
                return Ok(self.machine.have_checked(&present));
            }
            Event::Verified(batch) => return self.verified(batch),
            Event::Appended => failpoint::hit("receive.chunk"),
            Event::Tick => layerfs::monitor::check(self.monitor.as_ref())?,
        }
        Ok(Vec::new())
    }

    /// Waits for the next thing to happen. While too much is in memory, messages wait.
    async fn next(&mut self, ticks: &mut tokio::time::Interval) -> Result<Event> {
        let has_room = self.verifying.len() < MAX_JOBS;
        let may_append = self.appending.is_none() && !self.verifying.is_empty();
        tokio::select! {
            biased;
            result = finished(&mut self.appending) => joined(result).map(|()| Event::Appended),
            Some(result) = self.verifying.next(), if may_append => joined(result).map(Event::Verified),
            result = finished(&mut self.checking) => joined(result).map(Event::Checked),
            message = self.link.recv(), if has_room => message.map(Event::Message),
            _ = ticks.tick() => Ok(Event::Tick),
        }
    }

    /// Does `steps` in order; returns whether it is over.
    async fn perform(&mut self, steps: Vec<ReceiverStep>) -> Result<bool> {
        let mut steps = VecDeque::from(steps);
        while let Some(step) = steps.pop_front() {
            match step {
                ReceiverStep::Send(message) => self.link.send(message).await?,
                ReceiverStep::CheckOffer(offer) => steps.extend(self.check_offer(offer).await?),
                ReceiverStep::CheckHave(ids) => {
                    self.to_check.push_back(ids);
                }
                ReceiverStep::Store(chunks) => self.verify(chunks)?,
                ReceiverStep::Open(bundle) => self.open(bundle)?,
                ReceiverStep::Commit => steps.extend(self.commit().await?),
                ReceiverStep::Finish => return Ok(true),
            }
        }
        Ok(false)
    }

    async fn check_offer(&mut self, offer: Offer) -> Result<Vec<ReceiverStep>> {
        let (context, wanted) = (self.context.clone(), Wanted::by(self.monitor));
        let is_wanted = wanted.clone();
        let begin = move || {
            let accepted = accept(&context, offer, &is_wanted)?;
            if let Some(layer) = layers_lacking(&accepted).last().filter(|_| !accepted.offer.dry_run) {
                context.store.flush_staged(layer);
                context.session.stage_for(layer);
            }
            Ok(accepted)
        };
        let accepted = Arc::new(self.link.wait_for(spawn_blocking(begin), &wanted).await?);
        let held = accepted.offer.hints.iter().map(|hint| accepted.holds(hint)).collect();
        let lacking = accepted.lacking.clone();
        let lacks = || accepted.offer.layers.iter().zip(&lacking).filter(|(_, lacks)| **lacks);
        self.tally.layers.store(lacking.len() as u64, Relaxed);
        self.tally.layers_lacking.store(lacks().count() as u64, Relaxed);
        self.tally.phase("receive");
        let total = lacks().fold(0u64, |sum, (layer, _)| sum.saturating_add(layer.file_bytes));
        self.monitor.phase("receiving", Some(total));
        self.accepted = Some(accepted);
        failpoint::hit("receive.offered");
        Ok(self.machine.offer_checked(lacking, held))
    }

    /// Looks which chunks of the next question are here, if that isn't better done later: what readers of a partial layer
    /// fetch for themselves need not come twice.
    fn check_next(&mut self) {
        let is_rest = self.accepted.as_ref().is_some_and(|accepted| accepted.is_rest());
        if self.checking.is_some() || is_rest && self.machine.awaited() >= MAX_AWAITED_OF_REST {
            return;
        }
        if let (Some(ids), Some(accepted)) = (self.to_check.pop_front(), self.accepted.clone()) {
            let context = self.context.clone();
            self.checking = Some(spawn_blocking(move || {
                let mut there = accepted.access.has(&context.session, &ids)?;
                if is_rest && context.terms.visible == Visible::All {
                    let store = &context.store;
                    there.iter_mut().zip(&ids).for_each(|(there, id)| *there = *there || store.is_arriving(id));
                }
                Ok(there)
            }));
        }
    }

    fn verify(&mut self, chunks: Vec<StoredChunk>) -> Result<()> {
        let sum = |of: fn(&StoredChunk) -> u64| chunks.iter().map(of).sum::<u64>();
        let plain = sum(|chunk| u64::from(chunk.plain_bytes));
        self.count(chunks.len(), plain, sum(|chunk| chunk.stored.len() as u64))?;
        self.verifying.push_back(spawn_blocking(move || {
            let verified = chunks.into_iter().map(|chunk| chunk::verify(chunk).map(|(_, verified)| verified));
            Ok(Batch::Chunks(verified.collect::<layerfs::Result<Vec<_>>>()?))
        }));
        Ok(())
    }

    fn open(&mut self, bundle: Bundle) -> Result<()> {
        self.count(usize::from(bundle.chunks), u64::from(bundle.plain_bytes), bundle.frame.len() as u64)?;
        let (context, accepted) = (self.context.clone(), self.accepted.clone());
        let peer = self.link.peer().to_owned();
        self.verifying.push_back(spawn_blocking(move || {
            let Some(accepted) = accepted else { return Err(Error::protocol(&peer, "a bundle before its offer")) };
            let opened = unbundle::open(&context.store, &context.session, &accepted.access, &bundle, &peer);
            if let (Err(error), Some((grants, key))) = (&opened, &context.terms.kept)
                && unbundle::is_damaged_base(error)
            {
                grants.doubt(*key);
            }
            opened.map(Batch::Bundle)
        }));
        Ok(())
    }

    fn fill(&mut self, half: Half, ids: HashMap<u32, ChunkId>) {
        let (context, peer) = (self.context.clone(), self.link.peer().to_owned());
        self.verifying
            .push_back(spawn_blocking(move || unbundle::fill(&context.store, half, &ids, &peer).map(Batch::Bundle)));
    }

    fn count(&self, chunks: usize, plain_bytes: u64, stored_bytes: u64) -> Result<()> {
        let restricted = self.context.terms.visible != Visible::All;
        if restricted && self.machine.received() > MAX_RESTRICTED_CHUNKS {
            let message = format!("a peer with restricted rights may send {MAX_RESTRICTED_CHUNKS} chunks at once");
            return Err(Error::refused(ErrorClass::Denied, message));
        }
        self.tally.chunks.fetch_add(chunks as u64, Relaxed);
        self.tally.plain_bytes.fetch_add(plain_bytes, Relaxed);
        self.tally.stored_bytes.fetch_add(stored_bytes, Relaxed);
        self.monitor.advance(plain_bytes);
        self.monitor.items(chunks as u64);
        Ok(())
    }

    /// Appends what is verified, and tells the machine which chunks a bundle held.
    fn verified(&mut self, batch: Batch) -> Result<Vec<ReceiverStep>> {
        let mut steps = Vec::new();
        match batch {
            Batch::Chunks(chunks) => self.append(chunks),
            Batch::Bundle(Opened::Half(half)) => self.waiting.add(half, self.link.peer())?,
            Batch::Bundle(Opened::Whole(chunks, first)) => {
                let ids: Vec<ChunkId> = chunks.iter().map(|chunk| chunk.stored().id).collect();
                self.append(chunks);
                self.waiting.arrived(first, &ids);
                let violation = |v: crate::protocol::Violation| Error::protocol(self.link.peer(), v.0);
                steps = self.machine.opened(ids).map_err(violation)?;
            }
        }
        while let Some((half, ids)) = self.waiting.next() {
            self.fill(half, ids);
        }
        Ok(steps)
    }

    fn append(&mut self, chunks: Vec<Verified>) {
        let context = self.context.clone();
        let accepted = self.accepted.clone();
        let flushes = self.flushed.elapsed() >= FLUSH_EVERY;
        if flushes {
            self.flushed = Instant::now();
        }
        self.appending = Some(spawn_blocking(move || {
            if let Some(accepted) = accepted {
                accepted.access.grant(chunks.iter().map(|chunk| chunk.stored().id));
            }
            for chunk in chunks {
                context.session.put_verified(chunk)?;
            }
            if flushes {
                context.session.flush()?;
            }
            Ok(())
        }));
    }

    /// Whether only what the transfer would cost is to be known.
    fn is_dry(&self) -> bool {
        self.accepted.as_ref().is_some_and(|accepted| accepted.offer.dry_run)
    }

    async fn commit(&mut self) -> Result<Vec<ReceiverStep>> {
        self.tally.would_send_bytes.store(self.machine.would_send().unwrap_or_default(), Relaxed);
        self.tally.phase("commit");
        self.monitor.phase("verifying", None);
        if let Some(appending) = self.appending.take() {
            joined(appending.await)?;
        }
        while let Some(verified) = self.verifying.next().await {
            // Of bundles there are none: the machine waits for them.
            let (Batch::Chunks(chunks) | Batch::Bundle(Opened::Whole(chunks, _))) = joined(verified)? else { continue };
            self.append(chunks);
            if let Some(appending) = self.appending.take() {
                joined(appending.await)?;
                failpoint::hit("receive.chunk");
            }
        }
        let Some(accepted) = self.accepted.clone() else { return Ok(Vec::new()) };
        let (context, wanted) = (self.context.clone(), Wanted::by(self.monitor));
        let is_wanted = wanted.clone();
        let job = spawn_blocking(move || commit(&context, &accepted, &is_wanted));
        self.changed = self.link.wait_for(job, &wanted).await?;
        Ok(self.machine.committed(self.changed))
    }
}

/// Waits for the job in `slot` and empties it; for ever if there is none.
async fn finished<T>(slot: &mut Option<JoinHandle<T>>) -> Result<T, tokio::task::JoinError> {
    let Some(job) = slot else { return std::future::pending().await };
    let result = job.await;
    *slot = None;
    result
}

/// Sees which layers are held and whether the names may be set, while that is `wanted`. Blocks.
fn accept(context: &Context, offer: Offer, wanted: &Wanted) -> Result<Accepted> {
    let Context { store, terms, .. } = context;
    let refused = |class, message: &str| Err(Error::refused(class, message));
    if terms.wanted.is_some() && offer.lazy != terms.lazy {
        return refused(ErrorClass::Invalid, "another kind of transfer than the one asked for was offered");
    }
    if offer.lazy && terms.visible != Visible::All {
        // What of its data happens to be here could be another tenant's.
        let message = "layers come lazily only between hosts that may see all of each other's names; leave out --lazy";
        return refused(ErrorClass::Denied, message);
    }
    if offer.names.is_empty() {
        check_completion(context, &offer)?;
    }
    let force = match &terms.wanted {
        Some((names, force)) => {
            let is_wanted = |(name, _): &(LayerName, u16)| names.contains(name);
            if !offer.names.iter().all(is_wanted)
                || !names.iter().all(|name| offer.names.iter().any(|(n, _)| n == name))
            {
                return Err(Error::refused(ErrorClass::Invalid, "other names than those asked for were offered"));
            }
            *force
        }
        None => offer.force,
    };
    for (name, top) in &offer.names {
        // The answer is the same whether the name exists or not.
        if terms.wanted.is_none() && !terms.visible.allows(name) {
            return Err(Error::refused(ErrorClass::Denied, format!("this key may not set the name {name}")));
        }
        let taken = store.name(name)?.is_some_and(|record| record.layer != offer.layers[usize::from(*top)].id);
        if taken && !force {
            let message = format!("the name {name} is taken by another layer; use --force to replace it");
            return Err(Error::refused(ErrorClass::Exists, message));
        }
    }
    let access = Access::new(store, &terms.visible, wanted)?;
    if let Some((grants, key)) = &terms.kept {
        access.grant_again(grants.take(key));
    }
    let is_doubted = !offer.dry_run && terms.kept.as_ref().is_some_and(|(grants, key)| grants.take_doubt(key));
    let lacking: Vec<bool> = offer.layers.iter().map(|layer| is_doubted || !access.holds(&layer.id)).collect();
    let offered = offer.layers.iter().map(|layer| &layer.id);
    let held = offered.chain(&offer.hints).filter(|id| access.holds(id));
    let pins = held.map(|id| store.pin(*id)).collect::<layerfs::Result<_>>()?;
    Ok(Accepted { offer, force, lacking, access, is_doubted, _pins: pins })
}

/// An offer without names may only bring what partial layers lack: those that were asked for, or that the peer has
/// pushed before.
fn check_completion(context: &Context, offer: &Offer) -> Result<()> {
    let Context { store, terms, .. } = context;
    let is_offered = |layer: &LayerId| offer.layers.iter().any(|offered| offered.id == *layer);
    let is_its = |layer: &LayerId| store.partial(*layer).is_some_and(|partial| partial.sources.contains(&terms.peer));
    let is_due = match terms.completes.as_slice() {
        [] => terms.wanted.is_none() && offer.layers.iter().any(|layer| is_its(&layer.id)),
        layers => layers.iter().all(is_offered),
    };
    if is_due {
        return Ok(());
    }
    Err(Error::refused(ErrorClass::NotFound, "nothing is partial here that this offer could complete"))
}

fn layers_lacking(accepted: &Accepted) -> impl Iterator<Item = LayerId> {
    accepted.offer.layers.iter().zip(&accepted.lacking).filter(|(_, lacks)| **lacks).map(|(layer, _)| layer.id)
}

/// How many of the names refer to other layers here, or to none.
fn would_change(store: &Store, accepted: &Accepted) -> Result<u16> {
    let mut changed = 0;
    for (name, top) in &accepted.offer.names {
        changed += u16::from(store.name(name)?.is_none_or(|record| record.layer != accepted.layer_of(*top)));
    }
    Ok(changed)
}

/// Makes the chunks durable, verifies the layers while that is `wanted`, sets the names. Blocks. Returns how many names have
/// changed; in a dry run, how many would.
fn commit(context: &Context, accepted: &Accepted, wanted: &Wanted) -> Result<u16> {
    let Context { store, session, .. } = context;
    if accepted.offer.dry_run {
        return would_change(store, accepted);
    }
    if accepted.is_rest() {
        // Some of it others have brought.
        store.flush_sessions();
    }
    session.commit()?;
    failpoint::hit("receive.staged");
    let extent = if accepted.offer.lazy { Extent::Structure } else { Extent::Whole };
    let layers = accepted.offer.layers.iter().zip(&accepted.lacking);
    let mut whole: HashSet<LayerId> = layers.clone().filter(|(_, lacks)| !**lacks).map(|(layer, _)| layer.id).collect();
    for (layer, _) in layers.filter(|(_, lacks)| **lacks) {
        check_extent(&Polled::new(store.as_ref(), wanted), layer.id, extent, &mut |ids| {
            accepted.access.has(session, ids)
        })?;
        // A parent that is here but not the peer's to see would come into its reach by this layer.
        let parent = Manifest::load(store.as_ref(), layer.id)?.parent;
        if let Some(parent) = parent.filter(|parent| !whole.contains(parent)) {
            return Err(layerfs::Error::LayerMissing(parent).into());
        }
        whole.insert(layer.id);
    }
    wanted.check()?;
    failpoint::hit("receive.verified");
    let mut changes = Vec::new();
    let mut changed = 0;
    for (name, top) in &accepted.offer.names {
        let layer = accepted.layer_of(*top);
        if store.name(name)?.is_none_or(|record| record.layer != layer) {
            changed += 1;
        }
        let expect = if accepted.force { Expect::Any } else { Expect::Absent };
        changes.push(NameChange { name: name.clone(), layer, expect });
    }
    let fresh: Vec<LayerId> = layers_lacking(accepted).collect();
    if accepted.offer.lazy {
        let (terms, limit) = (&context.terms, context.terms.limit.map_or(0, Rate::bytes_per_second));
        store.set_partial_names(&changes, &fresh, &terms.peer, terms.wanted.is_none(), limit)?;
    } else {
        if changed > 0 {
            store.set_names(&changes)?;
        }
        store.clear_partial(&fresh)?;
    }
    // From here on names keep what has come.
    store.unstage(&fresh)?;
    failpoint::hit("receive.named");
    Ok(changed)
}
