//! The sending side's driver: does what [`Sender`] says, over a [`Link`], from a [`Store`].
//!
//! Three things run beside one another: a thread that works out what to ask for, a thread that reads wanted chunks
//! and packs them into frames, and the task here that moves messages. Invariant: the steps' order is kept: End goes the
//! way of the chunks.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use layerfs::error::ErrorClass;
use layerfs::manifest::Manifest;
use layerfs::monitor::Monitor;
use layerfs::store::{Pin, Store};
use layerfs::{ChunkId, LayerId, LayerName};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::access::visible_layers;
use crate::error::{Error, Result};
use crate::link::{Link, Outbox};
use crate::peers::Visible;
use crate::plan::{self, Candidate};
use crate::progress::Tally;
use crate::protocol::{Sender, SenderStep};
use crate::wire::{ChunksWriter, MAX_ASK, MAX_HINTS, MAX_LAYERS, MAX_NAMES, Message, Offer, OfferedLayer};

/// How often a monitor is asked whether to go on.
pub(crate) const CANCEL_CHECK: Duration = Duration::from_millis(200);
/// Batches of candidates that wait to be asked for.
const PLANNED_BATCHES: usize = 4;
/// Only so many of the latest names are looked at for hints.
const MAX_HINT_NAMES: usize = 1000;

/// What is offered, kept from collection meanwhile.
pub(crate) struct Prepared {
    offer: Offer,
    _pins: Vec<Pin>,
}

impl Prepared {
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
    let (hints, hint_pins) = hints(store, &offer.layers, visible)?;
    offer.hints = hints;
    pins.extend(hint_pins);
    Ok(Prepared { offer, _pins: pins })
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
    for top in visible_layers(store, visible)?.into_iter().take(MAX_HINT_NAMES) {
        let mut stack = Vec::new();
        let mut next = Some(top);
        while let Some(id) = next.filter(|id| seen.insert(*id)) {
            stack.push(id);
            next = Manifest::load(store.as_ref(), id)?.parent;
        }
        if next.is_some_and(|id| offered.contains(&id)) { related.extend(stack) } else { others.extend(stack) }
    }
    related.extend(others);
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
    let mut driver =
        Driver { link, store, offer: &prepared.offer, machine, tally, monitor, planner: None, reader: None };
    tally.phase("negotiate");
    monitor.phase("comparing", None);
    // The threads end by themselves once their queues are gone.
    driver.go(first).await
}

struct Driver<'a> {
    link: &'a mut Link,
    store: &'a Arc<Store>,
    offer: &'a Offer,
    machine: Sender,
    tally: &'a Arc<Tally>,
    monitor: &'a Arc<dyn Monitor>,
    planner: Option<Planner>,
    reader: Option<Reader>,
}

/// What happened next.
enum Event {
    Message(Message),
    Planned(Option<Vec<Candidate>>),
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
                Event::Planned(Some(batch)) => vec![self.machine.ask(batch)],
                Event::Planned(None) => {
                    self.finish_planner().await?;
                    self.machine.plan_finished()
                }
                Event::Sent(Some(count)) => {
                    self.machine.sent(count);
                    Vec::new()
                }
                Event::Sent(None) => return Err(self.why_reader_ended().await),
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
            match &mut self.reader {
                Some(reader) => reader.sent.recv().await,
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
                SenderStep::Send(message @ Message::End { .. }) => self.read(Job::Last(message)).await?,
                SenderStep::Send(message) => self.link.send(message).await?,
                SenderStep::Plan { lacking, held } => self.plan(&lacking, &held)?,
                SenderStep::SendChunks(ids) => self.read(Job::Chunks(ids)).await?,
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
        let offered = || self.offer.layers.iter().zip(lacking);
        let lacks: Vec<LayerId> = offered().filter(|(_, lacks)| **lacks).map(|(layer, _)| layer.id).collect();
        let total = offered().filter(|(_, lacks)| **lacks).map(|(layer, _)| layer.file_bytes).sum();
        // Ancestors first: what they share is the most.
        let mut held: Vec<LayerId> = offered().filter(|(_, lacks)| !**lacks).map(|(layer, _)| layer.id).collect();
        held.extend(self.offer.hints.iter().zip(held_hints).filter(|(_, held)| **held).map(|(id, _)| *id));
        self.tally.layers_lacking.store(lacks.len() as u64, Relaxed);
        self.tally.phase("send");
        self.monitor.phase("sending", Some(total));
        self.planner = Some(Planner::start(self.store.clone(), lacks, held));
        let outbox = self.link.outbox()?;
        self.reader = Some(Reader::start(self.store.clone(), outbox, self.tally.clone(), self.monitor.clone()));
        Ok(())
    }

    /// Hands `job` to the reading thread. Its queue holds more than the window allows, so this doesn't wait long.
    async fn read(&mut self, job: Job) -> Result<()> {
        let Some(reader) = &self.reader else { return Ok(()) };
        if reader.jobs.send(job).await.is_err() {
            return Err(self.why_reader_ended().await);
        }
        Ok(())
    }

    async fn finish_planner(&mut self) -> Result<()> {
        match self.planner.take() {
            Some(planner) => joined(planner.thread.await),
            None => Ok(()),
        }
    }

    /// The reading thread ends early only if it failed or the link did.
    async fn why_reader_ended(&mut self) -> Error {
        if let Some(reader) = self.reader.take()
            && let Err(error) = joined(reader.thread.await)
        {
            return error;
        }
        self.link.why_gone().await
    }
}

/// A panic in a thread of ours is a bug, but the daemon lives on.
pub(crate) fn joined<T>(result: Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    result.unwrap_or_else(|error| Err(Error::refused(ErrorClass::Io, format!("a worker thread failed: {error}"))))
}

/// The thread that works out what to ask for.
struct Planner {
    batches: mpsc::Receiver<Vec<Candidate>>,
    thread: JoinHandle<Result<()>>,
}

impl Planner {
    fn start(store: Arc<Store>, lacking: Vec<LayerId>, held: Vec<LayerId>) -> Planner {
        let (queue, batches) = mpsc::channel(PLANNED_BATCHES);
        let thread = tokio::task::spawn_blocking(move || {
            let mut batch = Vec::with_capacity(MAX_ASK);
            let gone = || layerfs::Error::Cancelled;
            plan::candidates(store.as_ref(), &lacking, &held, &mut |candidate| {
                batch.push(candidate);
                if batch.len() == MAX_ASK {
                    queue
                        .blocking_send(std::mem::replace(&mut batch, Vec::with_capacity(MAX_ASK)))
                        .map_err(|_| gone())?;
                }
                Ok(())
            })?;
            if !batch.is_empty() {
                queue.blocking_send(batch).map_err(|_| gone())?;
            }
            Ok(())
        });
        Planner { batches, thread }
    }
}

/// What the reading thread is to send.
enum Job {
    Chunks(Vec<ChunkId>),
    Last(Message),
}

/// The thread that reads chunks and packs them into frames.
struct Reader {
    jobs: mpsc::Sender<Job>,
    sent: mpsc::UnboundedReceiver<usize>,
    thread: JoinHandle<Result<()>>,
}

impl Reader {
    fn start(store: Arc<Store>, outbox: Outbox, tally: Arc<Tally>, monitor: Arc<dyn Monitor>) -> Reader {
        let (jobs, mut queue) = mpsc::channel(Sender::WINDOW / MAX_ASK + 2);
        let (report, sent) = mpsc::unbounded_channel();
        let thread = tokio::task::spawn_blocking(move || {
            while let Some(job) = queue.blocking_recv() {
                let is_gone = match job {
                    Job::Chunks(ids) => send_chunks(&store, &outbox, &ids, &tally, monitor.as_ref(), &report)?,
                    Job::Last(message) => {
                        tally.phase("commit");
                        monitor.phase("verifying", None);
                        outbox.blocking_send(message).is_err()
                    }
                };
                if is_gone {
                    break;
                }
            }
            Ok(())
        });
        Reader { jobs, sent, thread }
    }
}

/// Returns whether the link is gone.
fn send_chunks(
    store: &Store,
    outbox: &Outbox,
    ids: &[ChunkId],
    tally: &Tally,
    monitor: &dyn Monitor,
    report: &mpsc::UnboundedSender<usize>,
) -> Result<bool> {
    let mut frame = ChunksWriter::default();
    let (mut count, mut plain, mut stored) = (0, 0, 0);
    for (at, id) in ids.iter().enumerate() {
        let chunk = store.read_stored(id)?;
        frame.push(&chunk);
        count += 1;
        plain += u64::from(chunk.plain_bytes);
        stored += chunk.stored.len() as u64;
        if frame.is_full() || at + 1 == ids.len() {
            if outbox.blocking_send_frame(std::mem::take(&mut frame).finish()).is_err() {
                return Ok(true);
            }
            tally.chunks.fetch_add(count as u64, Relaxed);
            tally.plain_bytes.fetch_add(plain, Relaxed);
            tally.stored_bytes.fetch_add(stored, Relaxed);
            monitor.advance(plain);
            monitor.items(count as u64);
            // Nobody listens any more: the transfer has failed, and what is left of the queue is void.
            if report.send(count).is_err() {
                return Ok(true);
            }
            (count, plain, stored) = (0, 0, 0);
        }
    }
    Ok(false)
}
