//! Connections that others make and bring: an SSH session's input and output, most of all.
//!
//! Such a stream needs no TLS and no key: whoever brought it vouches for the other end. Invariant: a peer made of one
//! has a key that nobody can show ([`TRUSTED_KEY`]), so that nothing that came over TCP is ever taken for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use crate::error::{Error, Result};
use crate::identity::PublicKey;
use crate::peers::{Peer, PeerName, Rights};

/// How long a transfer waits for its stream: somebody may have to type a password.
const ARRIVAL: Duration = Duration::from_secs(120);

/// How long a stream waits for its transfer to begin: that looks at every layer first.
const OPENING: Duration = Duration::from_secs(60);

/// The all-zero key: a point of small order, which [`PublicKey`] takes neither from TLS nor from people.
pub(crate) const TRUSTED_KEY: PublicKey = PublicKey([0; 32]);

/// Whatever bytes go both ways through.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A stream, or why there will be none.
type Brought = Result<Box<dyn Stream>>;

/// Where streams wait for their transfers.
#[derive(Clone, Default)]
pub struct Streams(Arc<Inner>);

#[derive(Default)]
struct Inner {
    awaited: Mutex<HashMap<u64, mpsc::Sender<Brought>>>,
    opened: Notify,
}

impl Streams {
    /// A place for the streams of one transfer, until it is dropped.
    pub(crate) fn open(&self, id: u64) -> Arrivals {
        let (sender, queue) = mpsc::channel(1);
        self.0.awaited.lock().insert(id, sender);
        self.0.opened.notify_waiters();
        Arrivals { streams: self.clone(), id, queue: tokio::sync::Mutex::new(queue) }
    }

    /// Brings a stream to the transfer that awaits it as `id`, or the news that there is none. The transfer may be
    /// about to begin. Says whether it took it.
    pub async fn bring(&self, id: u64, stream: Brought) -> bool {
        let sender = async {
            loop {
                let opened = self.0.opened.notified();
                tokio::pin!(opened);
                opened.as_mut().enable();
                if let Some(sender) = self.0.awaited.lock().get(&id).cloned() {
                    return sender;
                }
                opened.await;
            }
        };
        match timeout(OPENING, sender).await {
            Ok(sender) => sender.send(stream).await.is_ok(),
            Err(_) => false,
        }
    }
}

/// The streams of one transfer, as they come.
pub(crate) struct Arrivals {
    streams: Streams,
    id: u64,
    queue: tokio::sync::Mutex<mpsc::Receiver<Brought>>,
}

impl Arrivals {
    /// The next one.
    pub async fn next(&self, peer: &str) -> Brought {
        let late = |_| Error::Timeout { action: "connecting", peer: peer.to_owned(), seconds: ARRIVAL.as_secs() };
        let brought = timeout(ARRIVAL, async { self.queue.lock().await.recv().await }).await.map_err(late)?;
        brought.unwrap_or_else(|| Err(Error::Closed { peer: peer.to_owned() }))
    }
}

impl Drop for Arrivals {
    fn drop(&mut self) {
        self.streams.0.awaited.lock().remove(&self.id);
    }
}

/// Who is at the other end of a stream, as far as rights go: somebody who may do what the user may who brought it.
pub(crate) fn trusted_peer(label: &str) -> Result<Peer> {
    let fits = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let name: String = label.chars().map(fits).take(64).collect();
    let name = PeerName::new(name.trim_start_matches(['-', '.', '_'])).or_else(|_| PeerName::new("ssh"))?;
    Ok(Peer { name, address: None, key: TRUSTED_KEY, rights: Rights::default() })
}
