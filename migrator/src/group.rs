//! One transfer over several connections. PROTOCOL.md, "Several connections".
//!
//! The first connection carries the transfer; those that join it carry frames with chunks only. Hides how frames are
//! spread and merged. Invariants: a connection joins only if its key is that of the first one's; one that dies gives back
//! what it hadn't confirmed, and the transfer goes on without it; the transfer's memory stays bounded
//! ([`crate::outbox`]).

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};

use crate::error::{Error, Result};
use crate::identity::PublicKey;
use crate::link::{GateSlot, Link};
use crate::outbox::{Numbered, Outbox, Shares};
use crate::wire::Message;

/// Connections that may join one transfer.
pub const MAX_JOINED: usize = 32;
/// How long a connection that joins waits for its transfer to be known.
const OPENING: Duration = Duration::from_secs(3);
/// Frames of joined connections that wait to be handled.
const INCOMING: usize = 4;

/// Numbers that have come beyond one that hasn't, at most.
const MAX_GAPS: usize = 65_536;

/// The numbers of the frames that have come.
#[derive(Debug, Default)]
struct Seen {
    /// All below have.
    below: u64,
    beyond: BTreeSet<u64>,
}

impl Seen {
    fn insert(&mut self, number: u64) -> bool {
        if number < self.below || !self.beyond.insert(number) {
            return false;
        }
        while self.beyond.remove(&self.below) {
            self.below += 1;
        }
        true
    }
}

/// Names a transfer to the connections that join it. Whoever knows it still needs the right key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(pub [u8; 16]);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// If the system has no random numbers.
    pub(crate) fn random() -> Result<Token> {
        use ring::rand::SecureRandom;
        let mut token = [0; 16];
        ring::rand::SystemRandom::new()
            .fill(&mut token)
            .map_err(|_| Error::refused(layerfs::error::ErrorClass::Io, "the system gives no random numbers"))?;
        Ok(Token(token))
    }
}

/// What the connections of one transfer share.
#[derive(Debug)]
pub(crate) struct Trunk {
    shares: Shares,
    gate: GateSlot,
    inbound: mpsc::Sender<Message>,
    over: watch::Sender<bool>,
    joined: AtomicUsize,
    most_joined: AtomicUsize,
    returned_bytes: AtomicU64,
    seen: Mutex<Seen>,
    /// Another attempt at the same transfer has begun.
    is_superseded: AtomicBool,
}

impl Trunk {
    /// The trunk of a link that writes to `shares` and passes `gate`, and the queue of what joined connections bring.
    pub fn new(shares: Shares, gate: GateSlot) -> (Arc<Trunk>, mpsc::Receiver<Message>) {
        let (inbound, queue) = mpsc::channel(INCOMING);
        let trunk = Trunk {
            shares,
            gate,
            inbound,
            over: watch::Sender::new(false),
            joined: AtomicUsize::new(0),
            most_joined: AtomicUsize::new(0),
            returned_bytes: AtomicU64::new(0),
            seen: Mutex::default(),
            is_superseded: AtomicBool::new(false),
        };
        (Arc::new(trunk), queue)
    }

    /// Connections that carry frames beside the first.
    pub fn joined(&self) -> usize {
        self.joined.load(Relaxed)
    }

    /// The most connections that carried frames beside the first at any time.
    pub fn most_joined(&self) -> usize {
        self.most_joined.load(Relaxed)
    }

    /// Bytes of frames that went out again because a connection was lost.
    pub fn returned_bytes(&self) -> u64 {
        self.returned_bytes.load(Relaxed)
    }

    /// Whether frames are waiting for a connection with room.
    pub fn is_backed_up(&self) -> bool {
        self.shares.is_backed_up()
    }

    /// The transfer is over: joined connections end.
    pub fn finish(&self) {
        self.over.send_replace(true);
    }

    /// Whether frame `number` has not come before. Asked once for each that comes.
    ///
    /// # Errors
    /// If the numbers have too many gaps.
    pub fn is_new(&self, number: u64, peer: &str) -> Result<bool> {
        let mut seen = self.seen.lock();
        let is_new = seen.insert(number);
        if seen.beyond.len() > MAX_GAPS {
            return Err(Error::protocol(peer, "frames whose numbers have too many gaps"));
        }
        Ok(is_new)
    }

    /// Waits until the transfer is over.
    pub async fn is_over(&self) {
        let mut over = self.over.subscribe();
        let _ = over.wait_for(|over| *over).await;
    }

    /// Ends the transfer, because its caller has begun it anew.
    pub fn supersede(&self) {
        self.is_superseded.store(true, Relaxed);
        self.finish();
    }

    /// Waits until another attempt takes this one's place.
    pub async fn superseded(&self) {
        let mut over = self.over.subscribe();
        while !self.is_superseded.load(Relaxed) {
            if over.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Carries frames over `link` until the transfer or the link is over. What wasn't confirmed goes back.
    pub async fn carry(self: &Arc<Trunk>, mut link: Link) -> Result<()> {
        let now = self.joined.fetch_add(1, Relaxed) + 1;
        let _seat = Seat(self.clone());
        if now > MAX_JOINED {
            let error = Error::protocol(link.peer(), format!("more than {MAX_JOINED} connections in one transfer"));
            link.close_with(&error).await;
            return Err(error);
        }
        self.most_joined.fetch_max(now, Relaxed);
        self.shares.resize(now);
        link.govern_as(&self.gate);
        let outbox = link.outbox()?;
        let kept = Kept { trunk: self, frames: Mutex::default() };
        let mut over = self.over.subscribe();
        let outcome = tokio::select! {
            result = self.bring(&mut link, &kept) => result,
            () = self.take(outbox, &kept) => Ok(()),
            _ = over.wait_for(|over| *over) => Ok(()),
        };
        drop(kept);
        match &outcome {
            Ok(()) => link.close().await,
            Err(error) => link.close_with(error).await,
        }
        outcome
    }

    /// Frames from here to the other side.
    async fn take(&self, outbox: Outbox, kept: &Kept<'_>) {
        while let Some(frame) = self.shares.next_frame().await {
            kept.frames.lock().push(frame.clone());
            if outbox.send_numbered(frame).await.is_err() {
                break;
            }
        }
        // Whoever reads, or waits for the end, tells why.
        std::future::pending().await
    }

    /// Frames from the other side, and its confirmations.
    async fn bring(&self, link: &mut Link, kept: &Kept<'_>) -> Result<()> {
        let (mut count, mut part) = (0, None);
        loop {
            match link.recv().await? {
                Message::Part { number } => part = Some(number),
                Message::Got { frames } => {
                    kept.frames.lock().confirm(frames, &self.shares).map_err(|d| Error::protocol(link.peer(), d))?;
                }
                message if message.is_bulk() && part.is_some() => {
                    let is_new = part.take().map_or(Ok(false), |number| self.is_new(number, link.peer()))?;
                    if is_new && self.inbound.send(message).await.is_err() {
                        // The transfer is over, and says so itself.
                        return std::future::pending().await;
                    }
                    count += 1;
                    link.send(Message::Got { frames: count }).await?;
                }
                other => {
                    let detail = format!("{} on a connection that joined", other.kind());
                    return Err(Error::protocol(link.peer(), detail));
                }
            }
        }
    }
}

/// A joined connection's place.
struct Seat(Arc<Trunk>);

impl Drop for Seat {
    fn drop(&mut self) {
        let left = self.0.joined.fetch_sub(1, Relaxed) - 1;
        self.0.shares.resize(left);
    }
}

/// The frames that one connection has taken and that aren't confirmed. Dropping it gives them back.
struct Kept<'a> {
    trunk: &'a Trunk,
    frames: Mutex<KeptFrames>,
}

#[derive(Default)]
struct KeptFrames {
    frames: VecDeque<Numbered>,
    confirmed: u64,
}

impl KeptFrames {
    fn push(&mut self, frame: Numbered) {
        self.frames.push_back(frame);
    }

    /// The other side has so many frames of this connection.
    fn confirm(&mut self, count: u64, shares: &Shares) -> Result<(), String> {
        while self.confirmed < count {
            let frame = self.frames.pop_front().ok_or_else(|| format!("Got {count} frames of {}", self.confirmed))?;
            self.confirmed += 1;
            shares.confirm(&frame);
        }
        Ok(())
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        let frames = &mut self.frames.get_mut().frames;
        if !*self.trunk.over.borrow() {
            let bytes: usize = frames.iter().map(|frame| frame.frame.len()).sum();
            self.trunk.returned_bytes.fetch_add(bytes as u64, Relaxed);
        }
        self.trunk.shares.give_back(frames.drain(..));
    }
}

/// The transfers that other connections may join.
#[derive(Clone, Debug, Default)]
pub(crate) struct Groups(Arc<All>);

#[derive(Debug, Default)]
struct All {
    entries: Mutex<HashMap<Token, Entry>>,
    opened: Notify,
}

#[derive(Debug)]
struct Entry {
    key: PublicKey,
    trunk: Arc<Trunk>,
    gone: watch::Receiver<()>,
}

/// A transfer's place among the groups.
#[derive(Debug)]
pub(crate) struct Membership {
    groups: Groups,
    token: Token,
    trunk: Arc<Trunk>,
    _gone: watch::Sender<()>,
}

impl Groups {
    /// Makes `trunk` known as `token`, for connections with `key`. An earlier attempt with that token is ended, and
    /// waited for: what it has received is kept for this one.
    ///
    /// # Errors
    /// If the token is another key's.
    pub async fn open(&self, token: Token, key: PublicKey, trunk: &Arc<Trunk>) -> Result<Membership> {
        loop {
            let earlier = {
                let mut groups = self.0.entries.lock();
                match groups.get(&token) {
                    None => {
                        let (sender, gone) = watch::channel(());
                        groups.insert(token, Entry { key, trunk: trunk.clone(), gone });
                        self.0.opened.notify_waiters();
                        return Ok(Membership { groups: self.clone(), token, trunk: trunk.clone(), _gone: sender });
                    }
                    Some(entry) if entry.key != key => return Err(unknown()),
                    Some(entry) => {
                        entry.trunk.supersede();
                        entry.gone.clone()
                    }
                }
            };
            let mut earlier = earlier;
            while earlier.changed().await.is_ok() {}
        }
    }

    /// The transfer called `token`, if `key` is its own. One that is just being opened is waited for: its connection
    /// and this one are strangers to one another on the way.
    ///
    /// # Errors
    /// The same for one that isn't there and one of another key.
    pub async fn find(&self, token: Token, key: PublicKey) -> Result<Arc<Trunk>> {
        let found = async {
            loop {
                let opened = self.0.opened.notified();
                tokio::pin!(opened);
                opened.as_mut().enable();
                if let Some(entry) = self.0.entries.lock().get(&token).filter(|entry| entry.key == key) {
                    return entry.trunk.clone();
                }
                opened.await;
            }
        };
        tokio::time::timeout(OPENING, found).await.map_err(|_| unknown())
    }
}

fn unknown() -> Error {
    Error::refused(layerfs::error::ErrorClass::NotFound, "there is no such transfer to join; it may be over")
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.trunk.finish();
        self.groups.0.entries.lock().remove(&self.token);
    }
}

#[cfg(test)]
mod tests {
    use super::Seen;

    #[test]
    fn each_number_is_new_once() {
        let mut seen = Seen::default();
        for (number, is_new) in [(0, true), (2, true), (2, false), (0, false), (1, true), (1, false), (3, true)] {
            assert_eq!(seen.insert(number), is_new, "{number}");
        }
        assert!(seen.below == 4 && seen.beyond.is_empty());
    }
}
