//! When a transfer that failed is begun again, and after how long.
//!
//! Invariants: only failures of the link are tried again, never an answer that somebody gave; the pauses grow up to
//! a limit and differ from host to host; an attempt that got somewhere earns the whole time anew.

use std::time::{Duration, Instant};

use layerfs::error::ErrorClass;

use crate::error::Error;

/// The first pause, and the longest.
const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(15);
/// For how long a transfer that had begun is tried again, unless told otherwise.
pub const DEFAULT_RETRY: Duration = Duration::from_secs(120);

/// For how long failures of the link are tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RetryFor {
    /// A peer that has never answered isn't tried again; a transfer that had begun is, for [`DEFAULT_RETRY`] since it
    /// last got on.
    #[default]
    Default,
    /// For so long since it last got on, also if the peer has never answered.
    Time(Duration),
}

/// Whether the same may work a little later.
pub(crate) fn is_transient(error: &Error) -> bool {
    match error {
        Error::Closed { .. } | Error::Timeout { .. } => true,
        // TLS that doesn't come about is a matter of keys or versions; a broken one is not.
        Error::Link { action, source, .. } => {
            !(action.starts_with("connecting") && source.kind() == std::io::ErrorKind::InvalidData)
        }
        Error::Remote { class, .. } => *class == ErrorClass::Network,
        _ => false,
    }
}

/// Whether `error`, the first answer of an attempt that isn't the first, may be about the one before: until the other side has
/// noticed that its connections broke, they keep their places.
pub(crate) fn is_transient_again(error: &Error) -> bool {
    matches!(error, Error::Remote { class: ErrorClass::Busy, .. })
}

/// The state of one transfer's attempts.
#[derive(Debug)]
pub(crate) struct Backoff {
    retry_for: RetryFor,
    failures: u32,
    has_connected: bool,
    last_progress: Instant,
}

impl Backoff {
    pub fn new(retry_for: RetryFor, now: Instant) -> Backoff {
        Backoff { retry_for, failures: 0, has_connected: false, last_progress: now }
    }

    /// The peer has answered.
    pub fn connected(&mut self) {
        self.has_connected = true;
    }

    /// The attempt got on with the transfer.
    pub fn progressed(&mut self, now: Instant) {
        self.failures = 0;
        self.last_progress = now;
    }

    /// How long to wait after another failure; `None` if it was the last. `random` is any number.
    pub fn pause(&mut self, now: Instant, random: u64) -> Option<Duration> {
        let patience = match self.retry_for {
            RetryFor::Time(time) => time,
            RetryFor::Default if self.has_connected => DEFAULT_RETRY,
            RetryFor::Default => Duration::ZERO,
        };
        let full = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures += 1;
        let left = patience.checked_sub(now.saturating_duration_since(self.last_progress))?;
        if left.is_zero() {
            return None;
        }
        // Between half and all of it, so that many callers of one host don't come back at once.
        let jittered = full / 2 + Duration::from_micros(random % (full.as_micros() as u64 / 2 + 1));
        Some(jittered.min(left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_end() {
        let start = Instant::now();
        let mut backoff = Backoff::new(RetryFor::Time(Duration::from_secs(100)), start);
        let mut now = start;
        let mut pauses = Vec::new();
        while let Some(pause) = backoff.pause(now, 0) {
            now += pause;
            pauses.push(pause);
            assert!(pauses.len() < 100);
        }
        assert_eq!(pauses[..3], [FIRST / 2, FIRST, FIRST * 2]);
        assert!(pauses.iter().all(|pause| *pause <= LONGEST) && pauses.contains(&(LONGEST / 2)));
        assert!(now <= start + Duration::from_secs(101));
        backoff.progressed(now);
        assert_eq!(backoff.pause(now, u64::MAX - 5).map(|pause| pause <= FIRST), Some(true));
    }

    #[test]
    fn who_never_answered_is_tried_again_only_if_asked_for() {
        let now = Instant::now();
        assert!(Backoff::new(RetryFor::Default, now).pause(now, 1).is_none());
        assert!(Backoff::new(RetryFor::Time(Duration::from_secs(1)), now).pause(now, 1).is_some());
        let mut begun = Backoff::new(RetryFor::Default, now);
        begun.connected();
        assert!(begun.pause(now, 1).is_some());
        assert!(begun.pause(now + DEFAULT_RETRY, 1).is_none());
    }

    #[test]
    fn answers_are_final() {
        let refused = Error::refused(ErrorClass::Exists, "taken");
        let denied = Error::Remote { peer: "p".into(), class: ErrorClass::Denied, message: String::new() };
        let reset = Error::link("reading from", "p", std::io::ErrorKind::ConnectionReset.into());
        assert!(!is_transient(&refused) && !is_transient(&denied) && is_transient(&reset));
        assert!(is_transient(&Error::Closed { peer: "p".into() }));
        let busy = Error::Remote { peer: "p".into(), class: ErrorClass::Busy, message: String::new() };
        assert!(!is_transient(&busy) && is_transient_again(&busy) && !is_transient_again(&denied));
    }
}
