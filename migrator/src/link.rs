//! A connection as a pair of message queues, whatever stream carries it.
//!
//! It hides framing, buffering, keep-alives and timeouts. Invariants: memory is bounded by the queues' lengths; a
//! link that is silent for longer than the idle timeout is dead; a last word (an error) is heard even if writing
//! has failed meanwhile.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::governor::{Gate, Rate, Way};
use crate::group::Trunk;
use crate::outbox::{self, Numbered, Outgoing, Takes};
use crate::send::joined;
use crate::socket::{Probe, Tuner};
use crate::wanted::Wanted;
use crate::wire::{self, FrameHeader, HEADER_BYTES, Hello, Message};

/// Messages that wait to be handled. A [`Message::Chunks`] has about half a MiB.
const INCOMING: usize = 4;
/// Messages that are taken before it's their turn, while the other side is to wait for an answer.
const MAX_EARLY: usize = 4;
/// How often it is looked whether a link that isn't read still takes what is written.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Small messages are collected up to so many bytes before they are written.
const COALESCE_BYTES: usize = 32 * 1024;
/// How much is read from a socket at once, as TLS asks for 4 KiB at a time.
const READ_BUFFER_BYTES: usize = 256 * 1024;
/// How long a failed link is listened to for the reason.
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(2);

pub use crate::outbox::{Gone, Outbox};

/// How patient a link is.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For connecting and for the TLS handshake, each.
    pub connect: Duration,
    /// For the next byte, either way.
    pub idle: Duration,
    /// After so long without anything to say, it says that it is alive. Well below the other side's `idle`.
    pub keep_alive: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(60),
            keep_alive: Duration::from_secs(10),
        }
    }
}

/// What passed through a socket, in bytes.
#[derive(Debug, Default)]
pub struct Counters {
    read: AtomicU64,
    written: AtomicU64,
    round_trip_micros: AtomicU64,
}

impl Counters {
    /// Bytes read.
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// How long a round trip took when the connection was made.
    pub fn round_trip(&self) -> Duration {
        Duration::from_micros(self.round_trip_micros.load(Ordering::Relaxed))
    }

    /// Notes how long a round trip took.
    pub fn set_round_trip(&self, time: Duration) {
        self.round_trip_micros.store(time.as_micros() as u64, Ordering::Relaxed);
    }

    /// Bytes written.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }
}

/// A stream whose bytes are counted, and read in large pieces.
pub struct Counted<S> {
    inner: S,
    counters: Arc<Counters>,
    /// Its probe lives as long as the stream.
    tuner: Option<Tuner>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<S> Counted<S> {
    /// Counts what passes through `inner`.
    pub fn new(inner: S, counters: Arc<Counters>) -> Counted<S> {
        Counted { inner, counters, tuner: None, buffer: vec![0; READ_BUFFER_BYTES].into(), start: 0, end: 0 }
    }
}

impl<S> Counted<S> {
    /// Keeps `probe` for as long as the stream lives, and fits the socket to its path.
    pub(crate) fn with_probe(self, probe: Arc<Probe>) -> Counted<S> {
        Counted { tuner: Some(Tuner::new(probe)), ..self }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.start == this.end {
            let mut fresh = ReadBuf::new(&mut this.buffer);
            match Pin::new(&mut this.inner).poll_read(context, &mut fresh) {
                Poll::Ready(Ok(())) => {
                    (this.start, this.end) = (0, fresh.filled().len());
                    this.counters.read.fetch_add(this.end as u64, Ordering::Relaxed);
                }
                other => return other,
            }
        }
        let count = out.remaining().min(this.end - this.start);
        out.put_slice(&this.buffer[this.start..this.start + count]);
        this.start += count;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.inner).poll_write(context, bytes);
        this.count_written(&result);
        result
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.inner).poll_write_vectored(context, pieces);
        this.count_written(&result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}

impl<S> Counted<S> {
    fn count_written(&mut self, result: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(count)) = result {
            if let Some(tuner) = &mut self.tuner {
                tuner.wrote();
            }
            self.counters.written.fetch_add(*count as u64, Ordering::Relaxed);
        }
    }
}

/// The gate that a link's writer and reader pass. It changes with each transfer on the link.
#[derive(Clone, Debug, Default)]
pub(crate) struct GateSlot(Arc<Mutex<Slot>>);

#[derive(Debug, Default)]
struct Slot {
    gate: Gate,
    /// The first connection's, if this one has joined it.
    joined: Option<GateSlot>,
}

impl GateSlot {
    pub(crate) fn get(&self) -> Gate {
        let slot = self.0.lock();
        slot.joined.as_ref().map_or_else(|| slot.gate.clone(), GateSlot::get)
    }
}

/// A connection to a peer.
pub struct Link {
    peer: String,
    gate: GateSlot,
    outbox: Option<Outbox>,
    incoming: mpsc::Receiver<Result<Message>>,
    /// What came while an answer was worked out.
    early: VecDeque<Message>,
    /// What ended the link then.
    last_word: Option<Error>,
    group: Option<OpenGroup>,
    was_grouped: bool,
    /// The number of the frame that comes next, if it has one.
    part: Option<u64>,
    has_heard: bool,
    reader: JoinHandle<()>,
    writer: JoinHandle<io::Result<()>>,
    is_greeted: bool,
}

/// What other connections bring to a transfer on a link.
struct OpenGroup {
    trunk: Arc<Trunk>,
    inbound: mpsc::Receiver<Message>,
}

impl Drop for OpenGroup {
    fn drop(&mut self) {
        self.trunk.finish();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
    }
}

impl Link {
    /// A link over `stream` to `peer`. Says Hello at once, and checks the other side's before anything else.
    pub fn start<S>(stream: S, peer: &str, patience: Patience) -> Link
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Link::over(stream, peer, patience, outbox::link_queue())
    }

    /// A link for a connection that joins a transfer: it takes frames when it has room, not ahead.
    pub(crate) fn start_joining<S>(stream: S, peer: &str, patience: Patience) -> Link
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        Link::over(stream, peer, patience, outbox::queue(2))
    }

    fn over<S>(stream: S, peer: &str, patience: Patience, (out_sender, out_receiver): (Outbox, Takes)) -> Link
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (read_half, write_half) = tokio::io::split(stream);
        let (in_sender, in_receiver) = mpsc::channel(INCOMING);
        out_sender.begin(Message::Hello(Hello::OURS));
        let gate = GateSlot::default();
        Link {
            peer: peer.to_owned(),
            outbox: Some(out_sender),
            incoming: in_receiver,
            early: VecDeque::new(),
            last_word: None,
            group: None,
            was_grouped: false,
            part: None,
            has_heard: false,
            reader: tokio::spawn(read_frames(read_half, in_sender, peer.to_owned(), gate.clone(), patience)),
            writer: tokio::spawn(write_frames(write_half, out_receiver, gate.clone(), patience)),
            gate,
            is_greeted: false,
        }
    }

    /// The peer's name or address.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// From now on what goes over the link passes `gate`: that of the transfer that uses it.
    pub fn govern(&mut self, gate: Gate) {
        let mut slot = self.gate.0.lock();
        gate.follow(&slot.gate);
        slot.gate = gate;
    }

    /// From now on what goes over the link passes the gate of the one that it has joined, whichever that is.
    pub(crate) fn govern_as(&mut self, first: &GateSlot) {
        self.gate.0.lock().joined = Some(first.clone());
    }

    /// The gate of the transfer that uses the link.
    pub fn gate(&self) -> Gate {
        self.gate.get()
    }

    /// The way out. Fails once the link is closed.
    pub fn outbox(&self) -> Result<Outbox> {
        self.outbox.clone().ok_or_else(|| Error::Closed { peer: self.peer.clone() })
    }

    /// Lets other connections join the transfer that follows.
    pub(crate) fn open_group(&mut self) -> Result<Arc<Trunk>> {
        let (trunk, inbound) = Trunk::new(self.outbox()?.shares(), self.gate.clone());
        self.group = Some(OpenGroup { trunk: trunk.clone(), inbound });
        self.was_grouped = true;
        Ok(trunk)
    }

    /// The transfer is over: the connections that joined it end.
    pub(crate) fn close_group(&mut self) {
        self.group = None;
    }

    /// Whether other connections may bring frames, perhaps for a second time.
    pub(crate) fn is_grouped(&self) -> bool {
        self.group.is_some()
    }

    /// Whether a transfer on this link had several connections.
    pub(crate) fn was_grouped(&self) -> bool {
        self.was_grouped
    }

    /// Whether the other side has said anything that belongs to a request.
    pub(crate) fn has_heard(&self) -> bool {
        self.has_heard
    }

    /// Queues a message, waiting for room.
    pub async fn send(&mut self, message: Message) -> Result<()> {
        match self.outbox()?.send(message).await {
            Ok(()) => Ok(()),
            Err(Gone) => Err(self.why_gone().await),
        }
    }

    /// The next message other than Alive.
    ///
    /// # Errors
    /// [`Error::Remote`] if the peer gives up, [`Error::Closed`] if it has left.
    pub async fn recv(&mut self) -> Result<Message> {
        match self.recv_or_end().await? {
            Some(message) => Ok(message),
            None => Err(Error::Closed { peer: self.peer.clone() }),
        }
    }

    /// The next message other than Alive; `None` if the peer has closed the link between messages.
    pub async fn recv_or_end(&mut self) -> Result<Option<Message>> {
        match (self.early.pop_front(), self.last_word.take()) {
            (Some(message), last_word) => {
                self.last_word = last_word;
                Ok(Some(message))
            }
            (None, Some(error)) => Err(error),
            (None, None) => self.recv_new().await,
        }
    }

    /// Waits for `job`, a thread that works out what the other side waits for. If the link goes meanwhile, the job is not
    /// `wanted` any more.
    pub(crate) async fn wait_for<T>(&mut self, mut job: JoinHandle<Result<T>>, wanted: &Wanted) -> Result<T> {
        let outbox = self.outbox()?;
        let why = loop {
            let has_room = self.early.len() < MAX_EARLY;
            let next = tokio::select! {
                biased;
                done = &mut job => return joined(done),
                next = self.recv_new(), if has_room => next,
                // Who has said so much already isn't heard; but a link that is gone takes nothing either.
                () = tokio::time::sleep(LOOK_EVERY), if !has_room => {
                    if outbox.is_gone() {
                        break Error::Closed { peer: self.peer.clone() };
                    }
                    continue;
                }
            };
            match next {
                Ok(Some(message)) => self.early.push_back(message),
                Ok(None) => break Error::Closed { peer: self.peer.clone() },
                Err(error) => break error,
            }
        };
        wanted.end();
        match joined(job.await) {
            Err(Error::Store(layerfs::Error::Cancelled)) => Err(why),
            done => {
                // An end is seen again.
                self.last_word = Some(why).filter(|why| !matches!(why, Error::Closed { .. }));
                done
            }
        }
    }

    async fn recv_new(&mut self) -> Result<Option<Message>> {
        loop {
            let message = match &mut self.group {
                None => self.incoming.recv().await,
                Some(group) => tokio::select! {
                    message = self.incoming.recv() => message,
                    Some(message) = group.inbound.recv() => return Ok(Some(message)),
                    () = group.trunk.superseded() => return Err(Error::Closed { peer: self.peer.clone() }),
                },
            };
            let Some(message) = message.transpose()? else { return Ok(None) };
            match message {
                Message::Alive => {}
                Message::Pace(pace) if self.is_greeted => self.gate.get().asked(pace),
                Message::Error { class, text } => {
                    return Err(Error::Remote { peer: self.peer.clone(), class, message: text });
                }
                Message::Hello(hello) if !self.is_greeted => {
                    self.check_hello(&hello)?;
                    self.is_greeted = true;
                }
                Message::Part { number } if self.is_greeted && self.group.is_some() => self.part = Some(number),
                // What came over a connection that was lost, and the sender doesn't know it.
                bulk if bulk.is_bulk() && self.is_repeated()? => {}
                other if self.is_greeted => {
                    self.has_heard = true;
                    return Ok(Some(other));
                }
                other => return Err(Error::protocol(&self.peer, format!("{} before Hello", other.kind()))),
            }
        }
    }

    /// Whether the frame that has come was there already.
    fn is_repeated(&mut self) -> Result<bool> {
        match (self.part.take(), &self.group) {
            (Some(number), Some(group)) => Ok(!group.trunk.is_new(number, &self.peer)?),
            _ => Ok(false),
        }
    }

    fn check_hello(&self, hello: &Hello) -> Result<()> {
        let is_ours = hello.version == wire::VERSION && (hello.lowest..=hello.highest).contains(&wire::VERSION);
        if !is_ours {
            let Hello { lowest, highest, .. } = *hello;
            return Err(Error::Version { peer: self.peer.clone(), lowest, highest, ours: wire::VERSION });
        }
        if hello.features & Hello::REQUIRED_FEATURES != 0 {
            let detail = format!("feature bits {:#x} of {}", hello.features, self.peer);
            return Err(layerfs::Error::Unsupported { what: "the protocol with", detail }.into());
        }
        Ok(())
    }

    /// Why nothing can be sent any more: the peer's last words if it left some.
    pub async fn why_gone(&mut self) -> Error {
        let last_words = async {
            loop {
                match self.recv_or_end().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return Error::Closed { peer: self.peer.clone() },
                    Err(error) => return error,
                }
            }
        };
        match timeout(LAST_WORDS, last_words).await {
            Ok(error) => error,
            Err(_) => Error::Closed { peer: self.peer.clone() },
        }
    }

    /// Writes what is queued, says good-bye and waits until the peer has heard it, but not for ever.
    pub async fn close(mut self) {
        self.outbox = None;
        self.group = None;
        let _ = timeout(LAST_WORDS, async {
            let _ = (&mut self.writer).await;
            // Closing with unread bytes would reset the connection and lose our last words on their way.
            while let Some(Ok(_)) = self.incoming.recv().await {}
        })
        .await;
    }

    /// Tells the peer of `error` if that makes sense, and closes.
    pub async fn close_with(mut self, error: &Error) {
        if error.is_worth_telling() {
            let message = Message::error(error.class(), error_text(error));
            let _ = timeout(LAST_WORDS, self.send(message)).await;
        }
        self.close().await;
    }
}

/// Tells whoever is at the other end of `stream` of `error`, and closes, without a look at what it says.
pub(crate) async fn turn_away<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, error: &Error, patience: Patience) {
    let mut words = Vec::new();
    wire::encode(&Message::Hello(Hello::OURS), &mut words);
    wire::encode(&Message::error(error.class(), error_text(error)), &mut words);
    if write(&mut stream, &words, patience).await.is_err() {
        return;
    }
    let _ = timeout(LAST_WORDS, async {
        let _ = stream.shutdown().await;
        let mut ignored = [0; 1024];
        while let Ok(1..) = stream.read(&mut ignored).await {}
    })
    .await;
}

/// An error with its sources: what a peer is told.
fn error_text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

/// Reads frames until the end or the first error, which is the last thing queued.
async fn read_frames<S: AsyncRead + Unpin>(
    mut stream: S,
    queue: mpsc::Sender<Result<Message>>,
    peer: String,
    gate: GateSlot,
    patience: Patience,
) {
    loop {
        let next = read_frame(&mut stream, &peer, &gate, patience.idle).await;
        let item = match next {
            Ok(Some(message)) => Ok(message),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        let is_last = item.is_err();
        if queue.send(item).await.is_err() || is_last {
            return;
        }
    }
}

/// The next message; `None` if the stream ends before its first byte.
async fn read_frame<S: AsyncRead + Unpin>(
    stream: &mut S,
    peer: &str,
    gate: &GateSlot,
    idle: Duration,
) -> Result<Option<Message>> {
    let broken = |error| Error::link("reading from", peer, error);
    let late = |_| Error::Timeout { action: "reading", peer: peer.to_owned(), seconds: idle.as_secs() };
    let closed = || Error::Closed { peer: peer.to_owned() };
    let mut header = [0; HEADER_BYTES];
    let mut filled = 0;
    while filled < HEADER_BYTES {
        let count = timeout(idle, stream.read(&mut header[filled..])).await.map_err(late)?;
        match count {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(closed()),
            Ok(count) => filled += count,
            // An end without TLS's good-bye: the connection was cut, or the peer died.
            Err(error) => return Err(broken(error)),
        }
    }
    let malformed = |error: layerfs::Error| Error::protocol(peer, error.to_string());
    let header = FrameHeader::decode(&header).map_err(malformed)?;
    let gate = gate.get();
    gate.count(Way::In, HEADER_BYTES);
    let mut body = BytesMut::with_capacity(header.body_bytes);
    // Who sends a byte now and then is no better than who sends none.
    let mut left = idle + Duration::from_secs(header.body_bytes as u64 / Rate::MIN);
    while body.len() < header.body_bytes {
        let began = Instant::now();
        // What has been read waits for its turn: a large piece of a trickle would do so for long.
        let most = if header.is_bulk() { gate.piece_bytes(Way::In) } else { header.body_bytes };
        let mut rest = (&mut *stream).take(most.min(header.body_bytes - body.len()) as u64);
        let read = timeout(idle.min(left), rest.read_buf(&mut body)).await.map_err(late)?;
        left = left.saturating_sub(began.elapsed());
        match read {
            Ok(0) => return Err(closed()),
            // Answers are small and urgent: only what carries chunks waits.
            Ok(count) if header.is_bulk() => drop(gate.ready(Way::In, count).await),
            Ok(count) => gate.count(Way::In, count),
            Err(error) => return Err(broken(error)),
        }
    }
    header.message(&body.freeze()).map(Some).map_err(malformed)
}

/// Writes what is queued until the queue is closed, then ends the stream.
async fn write_frames<S: AsyncWrite + Unpin>(
    mut stream: S,
    mut queue: Takes,
    gate: GateSlot,
    patience: Patience,
) -> io::Result<()> {
    let mut small = Vec::new();
    loop {
        let next = match timeout(patience.keep_alive, queue.recv()).await {
            Err(_) => Outgoing::Message(Message::Alive),
            Ok(None) => break,
            Ok(Some(next)) => next,
        };
        let mut next = Some(next);
        while let Some(mut outgoing) = next {
            if let Outgoing::Numbered(Numbered { number, frame }) = outgoing {
                wire::encode(&Message::Part { number }, &mut small);
                outgoing = Outgoing::Frame(frame);
            }
            match outgoing {
                // Of a transfer that was given up only the reason matters, and that at once.
                outgoing if gate.get().is_void() && !outgoing.is_last_word() => {}
                Outgoing::Message(message) => wire::encode(&message, &mut small),
                Outgoing::Frame(frame) => {
                    let gate = gate.get();
                    write_small(&mut stream, &mut small, &gate, patience).await?;
                    hold(&mut stream, &gate, patience).await?;
                    write_bulk(&mut stream, &frame, &gate, patience).await?;
                }
                Outgoing::Numbered(_) => {}
            }
            next = if small.len() < COALESCE_BYTES { queue.try_recv() } else { None };
        }
        write_small(&mut stream, &mut small, &gate.get(), patience).await?;
        timeout(patience.idle, stream.flush()).await??;
    }
    timeout(patience.idle, stream.shutdown()).await?
}

/// Writes messages that don't wait for anything, and empties `small`.
async fn write_small<S: AsyncWrite + Unpin>(
    stream: &mut S,
    small: &mut Vec<u8>,
    gate: &Gate,
    patience: Patience,
) -> io::Result<()> {
    gate.count(Way::Out, small.len());
    write(stream, small, patience).await?;
    small.clear();
    Ok(())
}

/// Says that it is alive while the transfer is paused.
async fn hold<S: AsyncWrite + Unpin>(stream: &mut S, gate: &Gate, patience: Patience) -> io::Result<()> {
    let mut alive = Vec::new();
    while timeout(patience.keep_alive, gate.open()).await.is_err() {
        wire::encode(&Message::Alive, &mut alive);
        write_small(stream, &mut alive, gate, patience).await?;
        timeout(patience.idle, stream.flush()).await??;
    }
    Ok(())
}

/// Writes a frame that carries chunks, as fast as `gate` lets it.
async fn write_bulk<S: AsyncWrite + Unpin>(
    stream: &mut S,
    frame: &[u8],
    gate: &Gate,
    patience: Patience,
) -> io::Result<()> {
    let mut rest = frame;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(gate.piece_bytes(Way::Out)));
        let permit = gate.ready(Way::Out, piece.len()).await;
        write(stream, piece, patience).await?;
        // What TLS keeps back of a slowed frame would come late and in bursts.
        if !after.is_empty() && piece.len() < 16 * 1024 {
            timeout(patience.idle, stream.flush()).await??;
        }
        drop(permit);
        rest = after;
    }
    Ok(())
}

async fn write<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8], patience: Patience) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        // A slow link gets on a little each time; a dead one doesn't.
        match timeout(patience.idle, stream.write(rest)).await?? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => rest = &rest[count..],
        }
    }
    Ok(())
}
