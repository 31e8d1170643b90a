//! One peer as the source of single chunks: a connection that is kept, and the questions on it.
//!
//! Hides what is asked for when. Three queues: what readers wait for, what they will probably read next, and what an
//! earlier run read (a trace); the next question is taken from the first that has something. Questions of the first kind
//! go out at once; the others share a window ([`Window`]) that grows while answers come promptly and shrinks when they are late, so
//! that it holds what bandwidth and delay need and a reader's own question never waits long behind them.
//! Invariants: the queues are bounded; a chunk stands in a question once; what was asked on a lost connection is asked
//! again if somebody waits for it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::chunk::{self, StoredChunk, Verified};
use layerfs::store::Session;
use layerfs::{ChunkId, LayerId};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::spawn_blocking;

use super::Inner;
use crate::error::{Error, Result};
use crate::link::Link;
use crate::send::joined;
use crate::wire::Message;

/// The most ids that wait in each of the queues of guesses.
const MAX_QUEUED: usize = 32 * 1024;
/// A question of guesses has so many ids and plain bytes at most.
const BATCH_IDS: usize = 64;
const BATCH_BYTES: u64 = 256 * 1024;
/// Readers' questions under way at most.
const MAX_URGENT: usize = 64;
/// What may be under way of guesses, in plain bytes: at first, at least, at most.
const FIRST_WINDOW: u64 = 512 * 1024;
const LEAST_WINDOW: u64 = 64 * 1024;
const LARGEST_WINDOW: u64 = 32 << 20;
/// A chunk whose length isn't known counts as so many bytes.
const USUAL_BYTES: u32 = 32 * 1024;
/// An answer that takes this much longer than the fastest is prompt, respectively late.
const PROMPT: Duration = Duration::from_millis(60);
const LATE: Duration = Duration::from_millis(150);
/// A reader's own answer that takes this much longer than the fastest has waited behind guesses.
const HELD_UP: Duration = Duration::from_millis(15);
/// For so long after one was held up there are no more guesses than then.
const CALM: Duration = Duration::from_secs(1);
/// Chunks that came are made durable after so many bytes or so long, whichever is first.
const FLUSH_BYTES: u64 = 32 << 20;
const FLUSH_EVERY: Duration = Duration::from_secs(2);
/// A connection that nobody has used for so long is closed.
const IDLE: Duration = Duration::from_secs(60);
/// Between attempts to reach the source.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LAST_PAUSE: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(250);

/// A peer that has chunks.
#[derive(Debug)]
pub(super) struct Source {
    pub peer: String,
    queue: Mutex<Queue>,
    pub wake: Notify,
    state: Mutex<State>,
    /// Whether all traces that were asked for have come.
    told: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Queue {
    urgent: VecDeque<ChunkId>,
    near: VecDeque<ChunkId>,
    traced: VecDeque<ChunkId>,
    /// In one of the queues of guesses, or asked for.
    known: HashSet<ChunkId>,
    asked: HashSet<ChunkId>,
    /// Stacks whose traces are to be asked for.
    traces: Vec<LayerId>,
}

#[derive(Debug, Default)]
struct State {
    failing_since: Option<Instant>,
    error: Option<String>,
}

/// A question under way.
struct Question {
    ids: Vec<ChunkId>,
    awaited: HashSet<ChunkId>,
    is_urgent: bool,
    bytes: u64,
    sent: Instant,
}

/// How much may be under way of guesses.
#[derive(Debug)]
struct Window {
    bytes: u64,
    /// The fastest answer to guesses, and to a reader.
    fastest: Duration,
    fastest_urgent: Duration,
    held_up: Option<Instant>,
}

impl Window {
    fn new() -> Window {
        Window { bytes: FIRST_WINDOW, fastest: Duration::MAX, fastest_urgent: Duration::MAX, held_up: None }
    }

    /// Guesses of so many `bytes` were answered at `now`.
    fn on_guesses(&mut self, took: Duration, bytes: u64, now: Instant) {
        self.fastest = self.fastest.min(took);
        let is_calm = self.held_up.is_none_or(|last| now.duration_since(last) > CALM);
        if took < self.fastest * 2 + PROMPT && is_calm {
            self.bytes = (self.bytes + bytes).min(LARGEST_WINDOW);
        } else if took > self.fastest * 3 + LATE {
            self.bytes = (self.bytes * 3 / 4).max(LEAST_WINDOW);
        }
    }

    /// A reader, who reads here and there (what follows in order is guessed before), was answered at `now`.
    fn on_urgent(&mut self, took: Duration, now: Instant) {
        self.fastest_urgent = self.fastest_urgent.min(took);
        if took > self.fastest_urgent * 2 + HELD_UP {
            self.bytes = (self.bytes / 2).max(LEAST_WINDOW);
            self.held_up = Some(now);
        }
    }
}

impl Source {
    pub fn new(peer: &str) -> Source {
        Source {
            peer: peer.to_owned(),
            queue: Mutex::default(),
            wake: Notify::new(),
            state: Mutex::default(),
            told: watch::Sender::new(true),
        }
    }

    /// Somebody waits for `id`.
    pub fn want(&self, id: &ChunkId) {
        let mut queue = self.queue.lock();
        if !queue.asked.contains(id) && !queue.urgent.contains(id) {
            queue.urgent.push_back(*id);
        }
        drop(queue);
        self.wake.notify_one();
    }

    /// These will probably be wanted next.
    pub fn guess(&self, ids: impl IntoIterator<Item = ChunkId>) {
        let mut queue = self.queue.lock();
        for id in ids {
            if queue.near.len() < MAX_QUEUED && !queue.asked.contains(&id) && queue.known.insert(id) {
                queue.near.push_back(id);
            }
        }
        drop(queue);
        self.wake.notify_one();
    }

    /// An earlier run wanted these.
    pub fn replay(&self, ids: impl IntoIterator<Item = ChunkId>) {
        let mut queue = self.queue.lock();
        for id in ids {
            if queue.traced.len() < MAX_QUEUED && !queue.asked.contains(&id) && queue.known.insert(id) {
                queue.traced.push_back(id);
            }
        }
        drop(queue);
        self.wake.notify_one();
    }

    /// Asks for the traces of these stacks.
    pub fn ask_traces(&self, layers: Vec<LayerId>) {
        self.told.send_replace(false);
        self.queue.lock().traces.extend(layers);
        self.wake.notify_one();
    }

    /// Resolves when the traces that were asked for have come.
    pub async fn traces_told(&self) {
        let _ = self.told.subscribe().wait_for(|told| *told).await;
    }

    /// Since when it can't be reached, and why; `None` if it could be the last time.
    pub fn failing(&self) -> Option<(Instant, String)> {
        let state = self.state.lock();
        Some((state.failing_since?, state.error.clone().unwrap_or_default()))
    }

    fn up(&self) {
        *self.state.lock() = State::default();
    }

    fn down(&self, since: Instant, error: &Error) {
        let mut state = self.state.lock();
        state.failing_since.get_or_insert(since);
        state.error = Some(describe(error));
    }

    fn has_work(&self) -> bool {
        let queue = self.queue.lock();
        !(queue.urgent.is_empty() && queue.near.is_empty() && queue.traced.is_empty() && queue.traces.is_empty())
    }

    /// The next question, if its kind has room.
    fn next(&self, inner: &Inner, urgent_room: usize, guess_room: u64) -> Option<Question> {
        let mut guard = self.queue.lock();
        let queue = &mut *guard;
        let mut ids = Vec::new();
        let mut bytes = 0;
        let is_urgent = !queue.urgent.is_empty() && urgent_room > 0;
        if is_urgent {
            ids.extend(queue.urgent.drain(..queue.urgent.len().min(BATCH_IDS)));
        } else {
            while ids.len() < BATCH_IDS && bytes < BATCH_BYTES.min(guess_room) {
                let Some(id) = queue.near.pop_front().or_else(|| queue.traced.pop_front()) else { break };
                queue.known.remove(&id);
                // What a reader has asked for meanwhile is under way, and what the background brought is here.
                if !queue.asked.contains(&id) && !inner.is_here(&id) {
                    bytes += u64::from(inner.bytes_of(&id).unwrap_or(USUAL_BYTES));
                    ids.push(id);
                }
            }
        }
        if ids.is_empty() {
            return None;
        }
        queue.asked.extend(&ids);
        Some(Question { awaited: ids.iter().copied().collect(), ids, is_urgent, bytes, sent: Instant::now() })
    }

    /// A lost connection's questions: asked again if somebody waits.
    fn take_back(&self, inner: &Inner, questions: VecDeque<Question>) {
        let mut queue = self.queue.lock();
        for id in questions.iter().flat_map(|question| &question.awaited) {
            queue.asked.remove(id);
        }
        for id in inner.flights.awaited() {
            if !queue.asked.contains(&id) && !queue.urgent.contains(&id) {
                queue.urgent.push_back(id);
            }
        }
    }
}

fn describe(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Serves `source` until nothing needs it any more.
pub(super) async fn run(inner: Arc<Inner>, source: Arc<Source>) {
    let mut pause = FIRST_PAUSE;
    while inner.is_needed(&source.peer) {
        // While it can't be reached it is tried again and again, so that readers needn't try for themselves.
        if !source.has_work() && source.failing().is_none() {
            inner.pause(source.wake.notified(), IDLE).await;
            continue;
        }
        let began = Instant::now();
        let (lost, error) = match inner.node.link_to(&source.peer).await {
            Err(error) => (began, error),
            Ok(link) => {
                let mut connection = Connection::new(&inner, &source, link);
                match connection.run().await {
                    Ok(()) => {
                        connection.link.close().await;
                        continue;
                    }
                    Err(error) => {
                        if connection.has_answered {
                            pause = FIRST_PAUSE;
                        }
                        (connection.heard, error)
                    }
                }
            }
        };
        if inner.is_stopped() {
            return;
        }
        tracing::debug!(peer = source.peer, error = describe(&error), "a source of chunks is lost");
        source.down(lost, &error);
        inner.pause(std::future::pending(), pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

struct Connection<'a> {
    inner: &'a Arc<Inner>,
    source: &'a Arc<Source>,
    link: Link,
    questions: VecDeque<Question>,
    /// How many chunks of the first question's answer have come.
    came: u64,
    /// Whether traces were asked for on top of the questions: they are answered in order.
    traces_after: Option<usize>,
    window: Window,
    heard: Instant,
    has_answered: bool,
    used: Instant,
    session: Arc<Session>,
    unflushed: u64,
    flushed: Instant,
}

impl<'a> Connection<'a> {
    fn new(inner: &'a Arc<Inner>, source: &'a Arc<Source>, link: Link) -> Connection<'a> {
        let now = Instant::now();
        Connection {
            inner,
            source,
            link,
            questions: VecDeque::new(),
            came: 0,
            traces_after: None,
            window: Window::new(),
            heard: now,
            has_answered: false,
            used: now,
            session: Arc::new(inner.node.store().session("lazy")),
            unflushed: 0,
            flushed: now,
        }
    }

    async fn run(&mut self) -> Result<()> {
        let result = self.talk().await;
        self.source.take_back(self.inner, std::mem::take(&mut self.questions));
        let flushed = self.flush().await;
        result.and(flushed)
    }

    async fn talk(&mut self) -> Result<()> {
        let mut ticks = tokio::time::interval(TICK);
        loop {
            if self.inner.is_stopped() {
                return Ok(());
            }
            self.ask().await?;
            tokio::select! {
                biased;
                message = self.link.recv() => {
                    self.heard = Instant::now();
                    if !self.has_answered {
                        self.has_answered = true;
                        self.source.up();
                    }
                    self.on_message(message?).await?;
                }
                () = self.source.wake.notified() => {}
                _ = ticks.tick() => {
                    if self.unflushed > 0 && self.flushed.elapsed() > FLUSH_EVERY {
                        self.flush().await?;
                    }
                    self.check_alive()?;
                    let is_idle = self.questions.is_empty() && self.traces_after.is_none();
                    if is_idle && (self.used.elapsed() > IDLE || !self.inner.is_needed(&self.source.peer)) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// A connection on which nothing comes while somebody waits is as good as none.
    fn check_alive(&self) -> Result<()> {
        let patience = self.inner.options.timeout;
        let oldest = self.questions.front().map(|question| question.sent);
        match oldest {
            Some(sent) if sent.elapsed() > patience && self.heard.elapsed() > patience => Err(Error::Timeout {
                action: "waiting for chunks",
                peer: self.source.peer.clone(),
                seconds: patience.as_secs(),
            }),
            _ => Ok(()),
        }
    }

    async fn ask(&mut self) -> Result<()> {
        if self.traces_after.is_none() {
            let mut layers = std::mem::take(&mut self.source.queue.lock().traces);
            layers.truncate(crate::wire::MAX_HINTS);
            if !layers.is_empty() {
                self.traces_after = Some(self.questions.len());
                self.link.send(Message::Trace { layers }).await?;
            }
        }
        loop {
            let urgent = self.questions.iter().filter(|question| question.is_urgent).count();
            let guessed: u64 = self.questions.iter().map(|question| question.bytes).sum();
            let room = self.window.bytes.saturating_sub(guessed);
            let Some(question) = self.source.next(self.inner, MAX_URGENT.saturating_sub(urgent), room) else {
                return Ok(());
            };
            self.used = Instant::now();
            self.link.send(Message::Get { ids: question.ids.clone() }).await?;
            self.questions.push_back(question);
        }
    }

    async fn on_message(&mut self, message: Message) -> Result<()> {
        if self.traces_after == Some(0) {
            return match message {
                Message::Traced { layer, ids } => self.traced(layer, ids).await,
                Message::End { .. } => {
                    self.traces_after = None;
                    self.source.told.send_replace(self.source.queue.lock().traces.is_empty());
                    Ok(())
                }
                other => Err(Error::protocol(self.link.peer(), format!("{} after Trace", other.kind()))),
            };
        }
        match message {
            Message::Chunks(chunks) => self.chunks(chunks).await,
            Message::End { chunks } if chunks == self.came => {
                self.answered();
                Ok(())
            }
            other => Err(Error::protocol(self.link.peer(), format!("{} after Get", other.kind()))),
        }
    }

    async fn traced(&mut self, layer: LayerId, ids: Vec<ChunkId>) -> Result<()> {
        let inner = self.inner.clone();
        joined(spawn_blocking(move || inner.learn(layer, ids)).await)
    }

    async fn chunks(&mut self, chunks: Vec<StoredChunk>) -> Result<()> {
        let peer = self.link.peer().to_owned();
        let first = self.questions.front_mut().ok_or_else(|| Error::protocol(&peer, "chunks that nobody asked for"))?;
        for chunk in &chunks {
            if !first.awaited.remove(&chunk.id) {
                return Err(Error::protocol(&peer, format!("chunk {} was not asked for", chunk.id)));
            }
        }
        self.came += chunks.len() as u64;
        self.unflushed += chunks.iter().map(|chunk| chunk.stored.len() as u64).sum::<u64>();
        {
            let mut queue = self.source.queue.lock();
            for chunk in &chunks {
                queue.asked.remove(&chunk.id);
            }
        }
        let (inner, session) = (self.inner.clone(), self.session.clone());
        let take = move || {
            let mut verified: Vec<Verified> = Vec::with_capacity(chunks.len());
            for chunk in chunks {
                let id = chunk.id;
                let (plain, proof) = chunk::verify(chunk)?;
                inner.flights.land(&id, &plain);
                verified.push(proof);
            }
            // A full disk must not keep readers from what has come.
            for proof in verified {
                session.put_verified(proof)?;
            }
            Ok(())
        };
        joined(spawn_blocking(take).await)?;
        if self.unflushed > FLUSH_BYTES { self.flush().await } else { Ok(()) }
    }

    /// The first question's answer is complete: what is missing from it isn't there.
    fn answered(&mut self) {
        self.came = 0;
        if let Some(after) = &mut self.traces_after {
            *after -= 1;
        }
        let Some(question) = self.questions.pop_front() else { return };
        {
            let mut queue = self.source.queue.lock();
            for id in &question.awaited {
                queue.asked.remove(id);
            }
        }
        question.awaited.iter().for_each(|id| self.inner.refused(id, &self.source.peer));
        let (took, now) = (question.sent.elapsed(), Instant::now());
        match question.is_urgent {
            true => self.window.on_urgent(took, now),
            false => self.window.on_guesses(took, question.bytes, now),
        }
    }

    /// Makes what came durable, and lets everybody find it in the index.
    async fn flush(&mut self) -> Result<()> {
        self.unflushed = 0;
        self.flushed = Instant::now();
        let session = self.session.clone();
        joined(spawn_blocking(move || Ok(session.flush()?)).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_grow_with_a_fast_link_and_leave_the_way_to_readers() {
        let ms = Duration::from_millis;
        let (mut window, mut now) = (Window::new(), Instant::now());
        for _ in 0..200 {
            now += ms(20);
            window.on_guesses(ms(20), BATCH_BYTES, now);
        }
        assert_eq!(window.bytes, LARGEST_WINDOW);
        // Somebody who reads here and there waits behind all that.
        window.on_urgent(ms(6), now);
        assert_eq!(window.bytes, LARGEST_WINDOW);
        for _ in 0..20 {
            now += ms(150);
            window.on_urgent(ms(150), now);
            window.on_guesses(ms(20), BATCH_BYTES, now);
        }
        assert_eq!(window.bytes, LEAST_WINDOW);
        // Once nobody is held up it grows again.
        now += CALM + ms(1);
        window.on_urgent(ms(7), now);
        window.on_guesses(ms(20), BATCH_BYTES, now);
        assert_eq!(window.bytes, LEAST_WINDOW + BATCH_BYTES);
        // Late answers make it smaller by themselves.
        window.on_guesses(ms(1000), BATCH_BYTES, now);
        assert!(window.bytes < LEAST_WINDOW + BATCH_BYTES);
    }
}
