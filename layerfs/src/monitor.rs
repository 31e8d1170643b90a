//! How long work tells its progress, without knowing a terminal, and how it is cancelled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Receives the progress of one piece of work. All methods may be called from several threads.
pub trait Monitor: Send + Sync {
    /// A new phase begins: "reading", "checking", "sending". `total_bytes` is known for some.
    fn phase(&self, name: &str, total_bytes: Option<u64>);
    /// `bytes` more were processed.
    fn advance(&self, bytes: u64);
    /// `count` more items (files, chunks) were processed.
    fn items(&self, count: u64);
    /// A remark that the user should see, and that doesn't stop the work.
    fn warn(&self, message: &str);
    /// Whether the work should stop as soon as it can, with [`crate::Error::Cancelled`].
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Fails with [`crate::Error::Cancelled`] if the work should stop.
pub fn check(monitor: &dyn Monitor) -> crate::Result<()> {
    if monitor.is_cancelled() { Err(crate::Error::Cancelled) } else { Ok(()) }
}

/// Ignores everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Monitor for Silent {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, _: u64) {}
    fn items(&self, _: u64) {}
    fn warn(&self, message: &str) {
        tracing::warn!("{message}");
    }
}

/// Counts, for tests and for summaries.
#[derive(Clone, Debug, Default)]
pub struct Counting {
    /// Bytes processed.
    pub bytes: Arc<AtomicU64>,
    /// Items processed.
    pub items: Arc<AtomicU64>,
    /// Set to stop the work.
    pub cancelled: Arc<AtomicBool>,
}

impl Monitor for Counting {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    fn items(&self, count: u64) {
        self.items.fetch_add(count, Ordering::Relaxed);
    }
    fn warn(&self, message: &str) {
        tracing::warn!("{message}");
    }
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}
