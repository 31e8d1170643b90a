//! Work on threads that ends soon after nobody waits for it any more.
//!
//! What a peer sends decides how much there is to read before it gets an answer: a thread that went on after the peer has
//! left, or the user has cancelled, would be lost to all others for as long. So whoever reads for a peer reads through
//! [`Polled`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use layerfs::chunk::ChunkRead;
use layerfs::monitor::Monitor;
use layerfs::{ChunkId, Error, Result};

/// Whether anybody still waits. Clones say the same.
#[derive(Clone, Default)]
pub struct Wanted {
    is_over: Arc<AtomicBool>,
    ends: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
}

impl Wanted {
    /// Until [`Wanted::end`], or until `ends` says so.
    pub(crate) fn until(ends: impl Fn() -> bool + Send + Sync + 'static) -> Wanted {
        Wanted { is_over: Arc::default(), ends: Some(Arc::new(ends)) }
    }

    /// Until [`Wanted::end`], or until `monitor` is cancelled.
    pub(crate) fn by(monitor: &Arc<dyn Monitor>) -> Wanted {
        let monitor = monitor.clone();
        Wanted::until(move || monitor.is_cancelled())
    }

    /// Nobody waits any more.
    pub(crate) fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    /// Fails with [`Error::Cancelled`] if nobody waits any more.
    pub(crate) fn check(&self) -> Result<()> {
        let is_over = self.is_over.load(Ordering::Relaxed) || self.ends.as_ref().is_some_and(|ends| ends());
        if is_over { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// Chunks that can be read for as long as somebody waits.
pub(crate) struct Polled<'a> {
    chunks: &'a dyn ChunkRead,
    wanted: &'a Wanted,
}

impl<'a> Polled<'a> {
    /// Reads from `chunks` while that is `wanted`.
    pub fn new(chunks: &'a dyn ChunkRead, wanted: &'a Wanted) -> Polled<'a> {
        Polled { chunks, wanted }
    }
}

impl ChunkRead for Polled<'_> {
    fn get(&self, id: &ChunkId) -> Result<Bytes> {
        self.wanted.check()?;
        self.chunks.get(id)
    }

    fn get_once(&self, id: &ChunkId) -> Result<Bytes> {
        self.wanted.check()?;
        self.chunks.get_once(id)
    }

    fn is_remote(&self) -> bool {
        self.chunks.is_remote()
    }

    fn soon(&self, ids: &[ChunkId]) {
        self.chunks.soon(ids);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::link::{Link, Patience};
    use crate::wire::Message;

    #[tokio::test(flavor = "multi_thread")]
    async fn who_leaves_ends_what_is_worked_out_for_him() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let mut link = Link::start(near, "there", Patience::default());
        let mut other = Link::start(far, "here", Patience::default());
        other.send(Message::End { chunks: 3 }).await.unwrap();
        let done = link.wait_for(tokio::task::spawn_blocking(|| Ok(7)), &Wanted::default()).await.unwrap();
        // What came meanwhile isn't lost.
        assert_eq!((done, link.recv().await.unwrap()), (7, Message::End { chunks: 3 }));

        let wanted = Wanted::default();
        let is_wanted = wanted.clone();
        let endless = tokio::task::spawn_blocking(move || -> crate::Result<()> {
            loop {
                is_wanted.check()?;
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        drop(other);
        let error = link.wait_for(endless, &wanted).await.unwrap_err();
        assert!(matches!(error, crate::Error::Closed { .. } | crate::Error::Link { .. }), "{error}");
    }
}
