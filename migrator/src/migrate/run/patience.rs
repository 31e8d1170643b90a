//! How long a guest that stands still waits for what its stop left to be sent: a link that crawls, or is held up, mustn't keep it from its
//! clients for ever.
//!
//! Hides what is expected of the link. How much there is to be sent of layers is known only once it has been sent, so whatever goes over
//! brings the time with it that it may take. Invariant: nothing that goes over at a quarter of the link's rate or faster is called off.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::super::Downtime;
use crate::governor::Way;
use crate::transfers::Transfers;

/// It may take so many times what is expected.
pub(super) const TIMES_EXPECTED: u32 = 4;

/// What is expected.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    /// It may take so long in any case.
    pub least: Duration,
    /// What was predicted, or allowed: the bytes are those of memory alone.
    pub expected: Downtime,
    /// What the link carries, in bytes per second.
    pub rate: f64,
}

impl Limit {
    /// How long it may take once so many bytes have gone over.
    fn after(&self, sent: u64) -> Duration {
        let beyond = sent.saturating_sub(self.expected.bytes) as f64 / self.rate;
        let beyond = if beyond.is_finite() { beyond } else { 0.0 };
        // What no duration can hold is no prediction.
        let expected = Duration::try_from_secs_f64(self.expected.seconds + beyond).unwrap_or_default();
        self.least.max(expected.saturating_mul(TIMES_EXPECTED))
    }
}

/// One stop's, which begins when sending does.
pub(super) struct Patience {
    transfers: Transfers,
    limit: Limit,
    began: Instant,
    /// The transfer that is under way, if any has begun.
    current: AtomicU64,
    /// Bytes of those before.
    sent: AtomicU64,
    has_ended: AtomicBool,
}

impl Patience {
    /// It begins now, for what is listed in `transfers`.
    pub fn new(transfers: Transfers, limit: Limit) -> Patience {
        let (current, sent, has_ended) = Default::default();
        Patience { transfers, limit, began: Instant::now(), current, sent, has_ended }
    }

    /// The number for the transfer that is next.
    pub fn next(&self) -> u64 {
        let id = self.transfers.new_id();
        self.current.store(id, Relaxed);
        id
    }

    /// The transfer has ended, with so many bytes.
    pub fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }

    /// How long it has taken so far.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Whether it has ended, as [`Patience::is_over`] has said.
    pub fn has_ended(&self) -> bool {
        self.has_ended.load(Relaxed)
    }

    /// Ends it if it has taken too long; says whether that is so.
    pub fn is_over(&self) -> bool {
        let elapsed = self.elapsed();
        let lasts = |going: u64| elapsed < self.limit.after(self.sent.load(Relaxed).saturating_add(going));
        // Only what runs is found, so that nothing counts twice.
        let current = || self.transfers.get(self.current.load(Relaxed)).ok();
        let going = || current().map_or(0, |transfer| transfer.gate().meter(Way::Out).total());
        let is_over = self.has_ended() || !(lasts(0) || lasts(going()));
        self.has_ended.fetch_or(is_over, Relaxed);
        is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_given_their_time_and_a_link_that_crawls_is_not() {
        let limit = |seconds, bytes| Limit {
            least: Duration::from_secs(60),
            expected: Downtime { seconds, bytes },
            rate: 12.5e6,
        };
        let after = |limit: Limit, sent: f64| limit.after(sent as u64).as_secs_f64();
        // Of memory alone.
        assert_eq!(after(limit(2.0, 20_000_000), 20e6), 60.0);
        assert_eq!(after(limit(20.0, 200_000_000), 200e6), 80.0);
        // An application of 1.5 GB, at every moment on its way.
        for seconds in 0..=120 {
            let sent = f64::from(seconds) * 12.5e6 / 3.9;
            assert!(after(limit(2.0, 20_000_000), sent) > f64::from(seconds), "{seconds}");
        }
        assert_eq!(after(limit(2.0, 0), 1.5e9), 488.0);
        // One that came to a stand.
        assert_eq!(after(limit(2.0, 20_000_000), 100e6), 60.0);
        for odd in [0.0, f64::NAN] {
            assert_eq!(after(Limit { rate: odd, ..limit(2.0, 0) }, 1e9), 60.0);
        }
        assert_eq!(after(limit(f64::INFINITY, 0), 1e9), 60.0);
    }
}
