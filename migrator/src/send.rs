//! The sending side's driver: does what [`Sender`] says, over a [`Link`], from a [`Store`].
//!
//! Three things run beside one another: a thread that works out what to ask for, the encoder's threads that make frames of
//! wanted chunks, and the task here that moves messages. Invariant: the steps' order is kept: End goes the way of the
//! chunks.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use layerfs::error::ErrorClass;
use layerfs::manifest::Manifest;
use layerfs::monitor::Monitor;
use layerfs::store::{Pin, Store};
use layerfs::{LayerId, LayerName};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::access::{Access, visible_layers};
use crate::encode::{Encoder, Job, Work};
use crate::error::{Error, Result};
use crate::link::Link;
use crate::peers::Visible;
use crate::plan::{self, Candidate};
use crate::progress::Tally;
use crate::protocol::{Sender, SenderStep};
use crate::similar::Similar;
use crate::structure;
use crate::wanted::{Polled, Wanted};
use crate::wire::{MAX_ASK, MAX_HINTS, MAX_LAYERS, MAX_NAMES, Message, Offer, OfferedLayer};

/// How often a monitor is asked whether to go on.
pub(crate) const CANCEL_CHECK: Duration = Duration::from_millis(200);
/// Batches of candidates that wait to be asked for.
const PLANNED_BATCHES: usize = 4;
/// So many ids are asked for at a time where readers fetch some of them meanwhile.
const MAX_ASK_OF_REST: usize = 64;
/// So many at first: their ids fit into what a new connection sends in its first round trip, and so the answer comes after one.
const FIRST_ASK: usize = 256;
/// So much is sent without asking at most, in one transfer: a transfer that is resumed would send it again.
const MAX_CHUNKS_AHEAD: usize = 4096;
const MAX_BYTES_AHEAD: u64 = 4 << 20;
/// Only so many of the latest names are looked at for hints.
const MAX_HINT_NAMES: usize = 1000;

/// What is offered, kept from collection meanwhile.
pub(crate) struct Prepared {
    offer: Offer,
    /// Somebody waits for its end: less work goes before fewer bytes.
    is_in_a_hurry: bool,
    /// Where similar chunks are looked for, if not in all that the receiver holds.
    known: Option<Arc<Similar>>,
    _pins: Vec<Pin>,
}

impl Prepared {
    /// Only what it would cost is to be known.
    pub fn is_dry(&self) -> bool {
        self.offer.dry_run
    }

    /// The same, dry or not.
    pub fn dry_run(mut self, is_dry: bool) -> Prepared {
        self.offer.dry_run = is_dry;
        self
    }

    /// The layers that the names refer to.
    pub fn tops(&self) -> Vec<LayerId> {
        let mut tops: Vec<LayerId> =
            self.offer.names.iter().map(|(_, top)| self.offer.layers[usize::from(*top)].id).collect();
        tops.sort_unstable();
        tops.dedup();
        tops
    }

    /// How many names it has.
    pub fn names(&self) -> usize {
        self.offer.names.len()
    }
}

/// Looks up `names`, as far as `visible`, and makes an offer of them. Blocks.
///
/// # Errors
/// [`layerfs::Error::NotFound`] for a name that isn't there or not to be seen, [`layerfs::Error::Invalid`] for too many.
pub(crate) fn prepare(store: &Arc<Store>, names: &[LayerName], visible: &Visible, force: bool) -> Result<Prepared> {
    let mut offer = Offer { force, ..Offer::default() };
    let mut pins = Vec::new();
    if names.is_empty() || names.len() > MAX_NAMES {
        return Err(layerfs::Error::invalid(format!("1 to {MAX_NAMES} names can be moved at once")).into());
    }
    for name in names {
        let not_found = || layerfs::Error::NotFound { what: "layer", name: name.to_string() };
        let record = if visible.allows(name) { store.name(name)? } else { None };
        let top = record.ok_or_else(not_found)?.layer;
        pins.push(store.pin(top)?);
        let index = add_stack(store, top, &mut offer.layers)?;
        if !offer.names.iter().any(|(other, _)| other == name) {
            offer.names.push((name.clone(), index));
        }
    }
    finish_offer(store, offer, pins, visible)
}

/// Makes an offer of the stacks of `tops`, without names: for a receiver that has their structure. Blocks.
///
/// # Errors
/// [`layerfs::Error::LayerMissing`] for what isn't here whole, or not for those who see `visible`;
/// [`layerfs::Error::Cancelled`] if it isn't `wanted` any more.
pub(crate) fn prepare_layers(
    store: &Arc<Store>,
    tops: &[LayerId],
    visible: &Visible,
    wanted: &Wanted,
) -> Result<Prepared> {
    let access = Access::new(store, visible, wanted)?;
    let mut offer = Offer::default();
    let mut pins = Vec::new();
    for top in tops {
        if !access.holds(top) {
            return Err(layerfs::Error::LayerMissing(*top).into());
        }
        pins.push(store.pin(*top)?);
        add_stack(store, *top, &mut offer.layers)?;
    }
    finish_offer(store, offer, pins, visible)
}

fn finish_offer(store: &Arc<Store>, mut offer: Offer, mut pins: Vec<Pin>, visible: &Visible) -> Result<Prepared> {
    let partial = offer.layers.iter().find_map(|layer| Some((layer.id, store.partial(layer.id)?)));
    if let Some((id, partial)) = partial {
        let source = partial.sources.first().map_or("another host", String::as_str);
        let message = format!(
            "layer {} is partial here, its data is still coming from {source}; wait until it is whole, or take it there",
            id.0.short()
        );
        return Err(Error::refused(ErrorClass::Busy, message));
    }
    let (hints, hint_pins) = hints(store, &offer.layers, visible)?;
    offer.hints = hints;
    pins.extend(hint_pins);
    Ok(Prepared { offer, is_in_a_hurry: false, known: None, _pins: pins })
}

impl Prepared {
    /// Somebody waits for its end.
    pub(crate) fn in_a_hurry(mut self) -> Prepared {
        self.is_in_a_hurry = true;
        self
    }

    /// Similar chunks are looked for there, also in a hurry.
    pub(crate) fn knowing(mut self, known: Option<Arc<Similar>>) -> Prepared {
        self.known = known;
        self
    }

    /// Only the structure is to be sent.
    pub(crate) fn lazily(mut self) -> Prepared {
        self.offer.lazy = true;
        self
    }
}

/// Adds the stack of `top` to `layers`, parents first, and returns where `top` is.
fn add_stack(store: &Store, top: LayerId, layers: &mut Vec<OfferedLayer>) -> Result<u16> {
    let mut stack = Vec::new();
    let mut next = Some(top);
    while let Some(id) = next.filter(|id| !layers.iter().any(|layer| layer.id == *id)) {
        let manifest = Manifest::load(store, id)?;
        stack.push(OfferedLayer { id, file_bytes: manifest.file_bytes });
        next = manifest.parent;
    }
    layers.extend(stack.into_iter().rev());
    if layers.len() > MAX_LAYERS {
        return Err(layerfs::Error::invalid(format!(
            "up to {MAX_LAYERS} layers can be moved at once; move fewer names"
        ))
        .into());
    }
    let index = layers.iter().position(|layer| layer.id == top);
    Ok(index.unwrap_or_default() as u16)
}

/// Other layers that the receiver may have, those that have most in common with `offered` first: layers on top of
/// offered ones, then the latest. Pinned, as the receiver's answer is built upon.
fn hints(store: &Arc<Store>, offered: &[OfferedLayer], visible: &Visible) -> Result<(Vec<LayerId>, Vec<Pin>)> {
    let offered: HashSet<LayerId> = offered.iter().map(|layer| layer.id).collect();
    let mut seen = offered.clone();
    let (mut related, mut others) = (Vec::new(), Vec::new());
    'tops: for top in visible_layers(store, visible)?.into_iter().take(MAX_HINT_NAMES) {
        let mut stack = Vec::new();
        let mut next = Some(top);
        while let Some(id) = next.filter(|id| seen.insert(*id)) {
            stack.push(id);
            next = match Manifest::load(store.as_ref(), id) {
                Ok(manifest) => manifest.parent,
                Err(error) => {
                    tracing::warn!(layer = %id, stack = %top, %error, "a stack can't be read and is built upon by nothing");
                    continue 'tops;
                }
            };
        }
        if next.is_some_and(|id| offered.contains(&id)) { related.extend(stack) } else { others.extend(stack) }
    }
    related.extend(others);
    related.retain(|layer| store.partial(*layer).is_none());
    related.truncate(MAX_HINTS);
    let pins = related.iter().map(|id| store.pin(*id)).collect::<layerfs::Result<_>>()?;
    Ok((related, pins))
}

/// Sends what `prepared` offers. Returns how many names the receiver has changed.
///
/// # Errors
/// The store's, the link's, or the receiver's own words.
pub(crate) async fn run(
    link: &mut Link,
    store: &Arc<Store>,
    prepared: &Prepared,
    tally: &Arc<Tally>,
    monitor: &Arc<dyn Monitor>,
) -> Result<u16> {
    let offer = prepared.offer.clone();
    tally.layers.store(offer.layers.len() as u64, Relaxed);
    let (machine, first) = Sender::new(offer);
    let mut driver = Driver { link, store, prepared, machine, tally, monitor, planner: None, encoder: None };
    tally.phase("negotiate");
    monitor.phase("comparing", None);
    // The threads end by themselves once their queues are gone.
    driver.go(first).await
}

struct Driver<'a> {
    link: &'a mut Link,
    store: &'a Arc<Store>,
    prepared: &'a Prepared,
    machine: Sender,
    tally: &'a Arc<Tally>,
    monitor: &'a Arc<dyn Monitor>,
    planner: Option<Planner>,
    encoder: Option<Encoder>,
}

/// What happened next.
enum Event {
    Message(Message),
    Planned(Option<Planned>),
    Sent(Option<usize>),
    Tick,
}

impl Driver<'_> {
    async fn go(&mut self, first: SenderStep) -> Result<u16> {
        let mut ticks = tokio::time::interval(CANCEL_CHECK);
        if let Some(changed) = self.perform(vec![first]).await? {
            return Ok(changed);
        }
        loop {
            let event = self.next(&mut ticks).await?;
            let steps = match event {
                Event::Message(message) => {
                    let violation = |v: crate::protocol::Violation| Error::protocol(self.link.peer(), v.0);
                    self.machine.on_message(message).map_err(violation)?
                }
                Event::Planned(Some(planned)) => {
                    let (Planned::Ask(batch) | Planned::Ahead(batch)) = &planned;
                    let bytes = batch.iter().map(|candidate| u64::from(candidate.bytes)).sum();
                    self.tally.expected_bytes.fetch_add(bytes, Relaxed);
                    vec![match planned {
                        Planned::Ask(batch) => self.machine.ask(batch),
                        Planned::Ahead(batch) => self.machine.send_ahead(batch),
                    }]
                }
                Event::Planned(None) => {
                    self.finish_planner().await?;
                    self.machine.plan_finished()
                }
                Event::Sent(Some(count)) => {
                    self.machine.sent(count);
                    Vec::new()
                }
                Event::Sent(None) => return Err(self.why_encoder_ended().await),
                Event::Tick => {
                    layerfs::monitor::check(self.monitor.as_ref())?;
                    Vec::new()
                }
            };
            if let Some(changed) = self.perform(steps).await? {
                return Ok(changed);
            }
        }
    }

    async fn next(&mut self, ticks: &mut tokio::time::Interval) -> Result<Event> {
        let may_ask = self.machine.may_ask();
        let planned = async {
            match &mut self.planner {
                Some(planner) if may_ask => planner.batches.recv().await,
                _ => std::future::pending().await,
            }
        };
        let sent = async {
            match &mut self.encoder {
                Some(encoder) => encoder.sent.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            message = self.link.recv() => message.map(Event::Message),
            batch = planned => Ok(Event::Planned(batch)),
            count = sent => Ok(Event::Sent(count)),
            _ = ticks.tick() => Ok(Event::Tick),
        }
    }

    /// Does `steps` in order; returns the number of changed names when it is over.
    async fn perform(&mut self, steps: Vec<SenderStep>) -> Result<Option<u16>> {
        for step in steps {
            match step {
                SenderStep::Send(message @ Message::End { .. }) => self.encode(Job::Last(message)).await?,
                SenderStep::Send(message) => self.link.send(message).await?,
                SenderStep::Plan { lacking, held } => self.plan(&lacking, &held)?,
                SenderStep::SendChunks(chunks) => self.encode(Job::Chunks(chunks)).await?,
                SenderStep::Reused { chunks, bytes } => {
                    self.tally.reused.fetch_add(chunks as u64, Relaxed);
                    self.monitor.advance(bytes);
                }
                SenderStep::Finish { changed } => return Ok(Some(changed)),
            }
        }
        Ok(None)
    }

    fn plan(&mut self, lacking: &[bool], held_hints: &[bool]) -> Result<()> {
        let offer = &self.prepared.offer;
        let offered = || offer.layers.iter().zip(lacking);
        let lacks: Vec<LayerId> = offered().filter(|(_, lacks)| **lacks).map(|(layer, _)| layer.id).collect();
        let sizes = offered().filter(|(_, lacks)| **lacks).map(|(layer, _)| layer.file_bytes);
        let total = sizes.fold(0, u64::saturating_add);
        // Ancestors first: what they share is the most.
        let mut held: Vec<LayerId> = offered().filter(|(_, lacks)| !**lacks).map(|(layer, _)| layer.id).collect();
        held.extend(offer.hints.iter().zip(held_hints).filter(|(_, held)| **held).map(|(id, _)| *id));
        self.tally.layers_lacking.store(lacks.len() as u64, Relaxed);
        self.tally.lacking_bytes.store(total, Relaxed);
        self.tally.phase("send");
        self.monitor.phase("sending", Some(total));
        // What was sent before a link failed is there: it shall be asked for.
        let is_again = self.tally.chunks.load(Relaxed) > 0;
        let sent_ahead = Arc::new(AtomicU64::new(if is_again { MAX_BYTES_AHEAD } else { 0 }));
        // Nor are similar chunks looked for, which takes a look at all that the receiver holds.
        let is_in_a_hurry = self.prepared.is_in_a_hurry;
        let searched = if is_in_a_hurry { Vec::new() } else { held.clone() };
        let known = self.prepared.known.clone();
        let similar = known.unwrap_or_else(|| Similar::new(self.store.clone(), lacks.clone(), searched));
        let kind = match (offer.lazy, offer.names.is_empty()) {
            (true, _) => Kind::Structure,
            (false, true) => Kind::Rest,
            (false, false) => Kind::Whole,
        };
        let monitor = self.monitor.clone();
        self.planner = Some(Planner::start(self.store.clone(), lacks, held, sent_ahead.clone(), kind, monitor));
        let work = Work {
            store: self.store.clone(),
            outbox: self.link.outbox()?,
            tally: self.tally.clone(),
            monitor: self.monitor.clone(),
            is_dry: offer.dry_run,
            sent_ahead,
            similar,
            is_in_a_hurry,
        };
        self.encoder = Some(Encoder::start(work, Sender::WINDOW / MAX_ASK + 2 * PLANNED_BATCHES));
        Ok(())
    }

    /// Hands `job` to the encoder. Its queue holds more than the window allows; only what goes ahead waits here.
    async fn encode(&mut self, job: Job) -> Result<()> {
        let Some(encoder) = &self.encoder else { return Ok(()) };
        if encoder.jobs.send(job).await.is_err() {
            return Err(self.why_encoder_ended().await);
        }
        Ok(())
    }

    async fn finish_planner(&mut self) -> Result<()> {
        match self.planner.take() {
            Some(planner) => joined(planner.thread.await),
            None => Ok(()),
        }
    }

    /// The encoder ends early only if it failed or the link did.
    async fn why_encoder_ended(&mut self) -> Error {
        if let Some(Encoder { jobs, thread, .. }) = self.encoder.take() {
            // It waits for these.
            drop(jobs);
            if let Err(error) = joined(thread.await) {
                return error;
            }
        }
        self.link.why_gone().await
    }
}

/// A panic in a thread of ours is a bug, but the daemon lives on.
pub(crate) fn joined<T>(result: Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    result.unwrap_or_else(|error| Err(Error::refused(ErrorClass::Io, format!("a worker thread failed: {error}"))))
}

/// What the planner has found.
enum Planned {
    /// What the receiver may have.
    Ask(Vec<Candidate>),
    /// What it lacks.
    Ahead(Vec<Candidate>),
}

/// What of the layers is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Whole,
    /// What a mount needs.
    Structure,
    /// What is lacking where the structure is.
    Rest,
}

/// The thread that works out what to ask for.
struct Planner {
    batches: mpsc::Receiver<Planned>,
    thread: JoinHandle<Result<()>>,
}

impl Planner {
    fn start(
        store: Arc<Store>,
        lacking: Vec<LayerId>,
        held: Vec<LayerId>,
        bytes_ahead: Arc<AtomicU64>,
        kind: Kind,
        monitor: Arc<dyn Monitor>,
    ) -> Planner {
        // Of the rest a part may come otherwise before it's its turn: small questions can be answered late.
        let most_later = if kind == Kind::Rest { MAX_ASK_OF_REST } else { MAX_ASK };
        let (queue, batches) = mpsc::channel(PLANNED_BATCHES);
        let taken: mpsc::Sender<Planned> = queue.clone();
        let thread = tokio::task::spawn_blocking(move || {
            // What is in hand may be a lot that nothing has to be asked of.
            let wanted = Wanted::until(move || monitor.is_cancelled() || taken.is_closed());
            let chunks = Polled::new(store.as_ref(), &wanted);
            let give = |planned| queue.blocking_send(planned).map_err(|_| layerfs::Error::Cancelled);
            let (mut ask, mut ahead) = (Vec::new(), Vec::new());
            let (mut chunks_ahead, mut most) = (0, most_later.min(FIRST_ASK));
            // The questions first: their answers take a while, for which there is something to send then.
            let flush = |ask: &mut Vec<Candidate>, ahead: &mut Vec<Candidate>| -> layerfs::Result<()> {
                for (batch, planned) in [(ask, Planned::Ask as fn(_) -> _), (ahead, Planned::Ahead)] {
                    if !batch.is_empty() {
                        give(planned(std::mem::take(batch)))?;
                    }
                }
                Ok(())
            };
            let mut sink = |mut candidate: Candidate| {
                // The structure is there.
                candidate.is_certain &= kind != Kind::Rest;
                candidate.is_certain &= chunks_ahead < MAX_CHUNKS_AHEAD && bytes_ahead.load(Relaxed) < MAX_BYTES_AHEAD;
                chunks_ahead += usize::from(candidate.is_certain);
                if candidate.is_certain { &mut ahead } else { &mut ask }.push(candidate);
                if ask.len() < most && ahead.len() < MAX_ASK {
                    return Ok(());
                }
                most = most_later;
                flush(&mut ask, &mut ahead)
            };
            if kind == Kind::Structure {
                structure::candidates(&chunks, &lacking, &mut sink)?;
            } else {
                plan::candidates(&chunks, &lacking, &held, &mut sink)?;
            }
            Ok(flush(&mut ask, &mut ahead)?)
        });
        Planner { batches, thread }
    }
}
