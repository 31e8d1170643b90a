//! A connection as a pair of message queues, whatever stream carries it.
//!
//! It hides framing, buffering, keep-alives and timeouts. Invariants: memory is bounded by the queues' lengths; a
//! link that is silent for longer than the idle timeout is dead; a last word (an error) is heard even if writing
//! has failed meanwhile.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::governor::{Gate, Way};
use crate::wire::{self, FrameHeader, HEADER_BYTES, Hello, Message};

/// Messages that wait to be handled, and to be written. A [`Message::Chunks`] has about half a MiB.
const INCOMING: usize = 4;
const OUTGOING: usize = 4;
/// Small messages are collected up to so many bytes before they are written.
const COALESCE_BYTES: usize = 32 * 1024;
/// How much is read from a socket at once, as TLS asks for 4 KiB at a time.
const READ_BUFFER_BYTES: usize = 256 * 1024;
/// How long a failed link is listened to for the reason.
const LAST_WORDS: Duration = Duration::from_secs(2);

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
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<S> Counted<S> {
    /// Counts what passes through `inner`.
    pub fn new(inner: S, counters: Arc<Counters>) -> Counted<S> {
        Counted { inner, counters, buffer: vec![0; READ_BUFFER_BYTES].into(), start: 0, end: 0 }
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
    fn count_written(&self, result: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(count)) = result {
            self.counters.written.fetch_add(*count as u64, Ordering::Relaxed);
        }
    }
}

/// So many bytes that could not be sent yet lie in a socket at most.
const UNSENT_BYTES: u32 = 256 * 1024;

/// Sets a socket up: small messages go at once, and what the link can't take yet stays with us, so that whoever makes
/// frames sees how fast it is.
pub(crate) fn set_up(stream: &tokio::net::TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    socket2::SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES)
}

/// What is to be written.
#[derive(Debug)]
enum Outgoing {
    Message(Message),
    /// A frame that is encoded already.
    Frame(Bytes),
}

impl Outgoing {
    fn is_last_word(&self) -> bool {
        matches!(self, Outgoing::Message(Message::Error { .. } | Message::Alive))
    }
}

/// The way out of a link. Clones write to the same link.
#[derive(Clone, Debug)]
pub struct Outbox(mpsc::Sender<Outgoing>);

/// The link is gone; [`Link::recv`] tells why.
#[derive(Debug)]
pub struct Gone;

impl Outbox {
    /// Queues a message, waiting for room.
    pub async fn send(&self, message: Message) -> Result<(), Gone> {
        self.0.send(Outgoing::Message(message)).await.map_err(|_| Gone)
    }

    /// Queues a message from a blocking thread.
    pub fn blocking_send(&self, message: Message) -> Result<(), Gone> {
        self.0.blocking_send(Outgoing::Message(message)).map_err(|_| Gone)
    }

    /// Queues an encoded frame from a blocking thread.
    pub fn blocking_send_frame(&self, frame: Bytes) -> Result<(), Gone> {
        self.0.blocking_send(Outgoing::Frame(frame)).map_err(|_| Gone)
    }
}

/// The gate that a link's writer and reader pass. It changes with each transfer on the link.
#[derive(Clone, Debug, Default)]
struct GateSlot(Arc<Mutex<Gate>>);

impl GateSlot {
    fn get(&self) -> Gate {
        self.0.lock().clone()
    }
}

/// A connection to a peer.
pub struct Link {
    peer: String,
    gate: GateSlot,
    outbox: Option<mpsc::Sender<Outgoing>>,
    incoming: mpsc::Receiver<Result<Message>>,
    reader: JoinHandle<()>,
    writer: JoinHandle<io::Result<()>>,
    is_greeted: bool,
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
        let (read_half, write_half) = tokio::io::split(stream);
        let (out_sender, out_receiver) = mpsc::channel(OUTGOING);
        let (in_sender, in_receiver) = mpsc::channel(INCOMING);
        let hello = out_sender.try_send(Outgoing::Message(Message::Hello(Hello::OURS)));
        debug_assert!(hello.is_ok(), "a new queue has room");
        let gate = GateSlot::default();
        Link {
            peer: peer.to_owned(),
            outbox: Some(out_sender),
            incoming: in_receiver,
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
        gate.follow(&slot);
        *slot = gate;
    }

    /// The gate of the transfer that uses the link.
    pub fn gate(&self) -> Gate {
        self.gate.get()
    }

    /// The way out. Fails once the link is closed.
    pub fn outbox(&self) -> Result<Outbox> {
        self.outbox.clone().map(Outbox).ok_or_else(|| Error::Closed { peer: self.peer.clone() })
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
        loop {
            let Some(message) = self.incoming.recv().await.transpose()? else { return Ok(None) };
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
                other if self.is_greeted => return Ok(Some(other)),
                other => return Err(Error::protocol(&self.peer, format!("{} before Hello", other.kind()))),
            }
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
    while body.len() < header.body_bytes {
        let mut rest = (&mut *stream).take((header.body_bytes - body.len()) as u64);
        match timeout(idle, rest.read_buf(&mut body)).await.map_err(late)? {
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
    mut queue: mpsc::Receiver<Outgoing>,
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
        while let Some(outgoing) = next {
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
            }
            next = if small.len() < COALESCE_BYTES { queue.try_recv().ok() } else { None };
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
        let (piece, after) = rest.split_at(rest.len().min(gate.piece_bytes()));
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
    // In pieces, so that a slow link isn't taken for a dead one.
    for piece in bytes.chunks(128 * 1024) {
        timeout(patience.idle, stream.write_all(piece)).await??;
    }
    Ok(())
}
