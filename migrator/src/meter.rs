//! How many bytes passed, and how fast of late.
//!
//! Invariants: adding is cheap; the rate looks back over [`WINDOW`] and no further, however long nothing is added.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// One slot of the window.
const SLOT: Duration = Duration::from_millis(250);
const SLOTS: usize = 16;
/// What the rate is taken of.
pub const WINDOW: Duration = Duration::from_millis(250 * SLOTS as u64);

#[derive(Debug)]
struct State {
    began: Instant,
    total: u64,
    slots: [u64; SLOTS],
    /// The slot in use, counted from the beginning.
    current: u64,
}

/// Counts bytes.
#[derive(Debug)]
pub struct Meter(Mutex<State>);

impl Default for Meter {
    fn default() -> Meter {
        Meter(Mutex::new(State { began: Instant::now(), total: 0, slots: [0; SLOTS], current: 0 }))
    }
}

impl State {
    fn turn_to(&mut self, now: Instant) {
        let slot = now.saturating_duration_since(self.began).as_nanos() / SLOT.as_nanos();
        let slot = u64::try_from(slot).unwrap_or(u64::MAX).max(self.current);
        for passed in (self.current + 1..=slot).take(SLOTS) {
            self.slots[(passed % SLOTS as u64) as usize] = 0;
        }
        self.current = slot;
    }

    fn add(&mut self, bytes: u64, now: Instant) {
        self.turn_to(now);
        self.slots[(self.current % SLOTS as u64) as usize] += bytes;
        self.total += bytes;
    }

    fn rate(&mut self, now: Instant) -> f64 {
        self.turn_to(now);
        let since = now.saturating_duration_since(self.began);
        // The slot in use has only begun.
        let into = Duration::from_nanos((since.as_nanos() % SLOT.as_nanos()) as u64);
        let seconds = since.min(WINDOW - SLOT + into).as_secs_f64();
        // The first moments say nothing.
        if seconds < 0.05 { 0.0 } else { self.slots.iter().sum::<u64>() as f64 / seconds }
    }
}

impl Meter {
    /// So many more.
    pub fn add(&self, bytes: u64) {
        self.0.lock().add(bytes, Instant::now());
    }

    /// All that were added.
    pub fn total(&self) -> u64 {
        self.0.lock().total
    }

    /// Bytes per second over the last [`WINDOW`], or since the beginning if that is less.
    pub fn rate(&self) -> f64 {
        self.0.lock().rate(Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_late() {
        let meter = Meter::default();
        let mut state = meter.0.lock();
        let began = state.began;
        let at = |millis: u64| began + Duration::from_millis(millis);
        (0..100).for_each(|n| state.add(1000, at(n * 10)));
        let rate = state.rate(at(1000));
        assert!((99_000.0..=101_000.0).contains(&rate), "{rate}");
        (100..2000).for_each(|n| state.add(500, at(n * 10)));
        let rate = state.rate(at(20_000));
        assert!((49_000.0..=51_000.0).contains(&rate), "{rate}");
        assert_eq!(state.rate(at(60_000)), 0.0);
        assert_eq!(state.total, 100_000 + 950_000);
    }
}
