//! How much work a chunk's way over the link is worth: between "as it lies in the pack" and the slowest compression.
//!
//! Two sides wait for one another: the encoders for room on the link, the link for frames. Who waits more has time to
//! spare: a link that is waited for gets smaller frames, one that waits gets quicker ones. Harder work is begun only if
//! its measured speed would keep the link busy, so that a fast link's processors aren't spent on bytes that cost nothing.
//! Invariant: decisions rest on frames that were made with the effort in force.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

/// What resembles its bases is compressed with this level at least: zstd then passes over what is alike as quickly as
/// with the lower ones, of whose differences a fourth is left, as they look for less.
const LEAST_NEAR_LEVEL: i32 = 9;

/// While somebody waits, changed pages are compressed with this level at most.
const HURRIED_PAGES_LEVEL: i32 = 6;

/// How hard to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Effort(u8);

/// zstd's level for each effort; at the first only what must go in bundles is compressed.
const LEVELS: [i32; 8] = [1, 3, 3, 6, 9, 12, 16, 19];
/// Plain bytes a second that one thread is thought to manage with each effort, until it was measured.
const SPEEDS: [f64; 8] = [1e9, 150e6, 120e6, 60e6, 30e6, 14e6, 5e6, 2.5e6];

impl Effort {
    /// What a transfer begins with: good enough if it is small, and left at once if the link is quick.
    pub const FIRST: Effort = Effort(5);
    /// What one begins with that looks in known chunks for whatever it sends: most of that has bases, and the link waits for it.
    pub const FIRST_KNOWING: Effort = Effort(3);
    /// The least that also tells in few bytes what differs from known chunks, whose long prefixes take their time.
    const LEAST_THOROUGH: Effort = Effort(4);
    /// The least that compresses anew what has no bases.
    pub(crate) const LEAST_REPACKED: Effort = Effort(2);
    /// The least that looks at what the receiver has.
    const LEAST_BASES: Effort = Effort(1);
    const MOST: Effort = Effort(LEVELS.len() as u8 - 1);

    /// zstd's level.
    pub fn level(self) -> i32 {
        LEVELS[usize::from(self.0)]
    }

    /// zstd's level for what resembles its bases.
    pub fn level_when_near(self) -> i32 {
        self.level().max(LEAST_NEAR_LEVEL)
    }

    /// zstd's level for what resembles chunks that are known to be read: often several, of which it has a page or two each.
    pub fn level_when_known(self) -> i32 {
        if self < Effort::LEAST_THOROUGH { self.level() } else { self.level_when_near() }
    }

    /// zstd's level for changed pages, which are compressed against what they were.
    pub fn level_of_pages(self, is_in_a_hurry: bool) -> i32 {
        if is_in_a_hurry { self.level().min(HURRIED_PAGES_LEVEL) } else { self.level_when_near() }
    }

    /// Whether chunks are compared with what the receiver has.
    pub fn uses_bases(self) -> bool {
        self.0 >= 1
    }

    /// Whether chunks are compared page by page first, which costs the least work and some bytes: the link waits for frames,
    /// and has done so for a while.
    pub fn saves_work(self) -> bool {
        self <= Effort::LEAST_REPACKED
    }

    /// Whether bases are looked for by content.
    pub fn searches(self) -> bool {
        self.uses_bases()
    }

    /// Whether chunks of so many plain bytes are compressed anew, together, without bases.
    pub fn repacks(self, plain_bytes: usize) -> bool {
        match self.0 {
            0 | 1 => false,
            2 => plain_bytes < 8 * 1024,
            _ => true,
        }
    }

    fn raised(self) -> Effort {
        Effort(self.0 + 1).min(Effort::MOST)
    }

    fn lowered(self, by: u8) -> Effort {
        Effort(self.0.saturating_sub(by))
    }
}

/// The effort in force.
#[derive(Debug)]
pub(crate) struct Level(AtomicU8);

impl Level {
    pub fn new(effort: Effort) -> Level {
        Level(AtomicU8::new(effort.0))
    }

    pub fn get(&self) -> Effort {
        Effort(self.0.load(Ordering::Relaxed))
    }

    fn set(&self, effort: Effort) {
        self.0.store(effort.0, Ordering::Relaxed);
    }
}

/// What one frame (or some together) has cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// With what effort it was made.
    pub effort: Effort,
    /// The plain bytes in it.
    pub plain_bytes: u64,
    /// Its bytes.
    pub wire_bytes: u64,
    /// How long one thread worked on it.
    pub work: Duration,
    /// How long the link had nothing to send.
    pub link_waited: Duration,
    /// How long it had to wait for room on the link.
    pub waited_for_link: Duration,
}

/// Sums up costs and turns the level.
#[derive(Debug)]
pub(crate) struct Gauge {
    threads: f64,
    speeds: [f64; LEVELS.len()],
    sum: Option<Cost>,
    link_rate: Option<f64>,
    /// The most bytes a second that have gone out.
    proven_rate: f64,
}

/// A link that has taken so many bytes a second carries whole chunks faster than two threads make differences.
const WHOLE_RATE: f64 = 150e6;
/// A decision needs so long a look, or so many plain bytes.
const WINDOW: Duration = Duration::from_millis(40);
const WINDOW_BYTES: u64 = 8 << 20;

impl Gauge {
    pub fn new(threads: usize) -> Gauge {
        Gauge { threads: threads as f64, speeds: SPEEDS, sum: None, link_rate: None, proven_rate: 0.0 }
    }

    /// Bytes a second that the link took when it was the slower side.
    pub fn link_rate(&self) -> Option<f64> {
        self.link_rate
    }

    /// Notes what a frame has cost, and turns `level` once enough is known.
    pub fn note(&mut self, cost: Cost, level: &Level) {
        let current = level.get();
        if cost.effort != current {
            return;
        }
        let sum = match &mut self.sum {
            Some(sum) => {
                sum.plain_bytes += cost.plain_bytes;
                sum.wire_bytes += cost.wire_bytes;
                sum.work += cost.work;
                sum.link_waited += cost.link_waited;
                sum.waited_for_link += cost.waited_for_link;
                sum
            }
            none => none.insert(cost),
        };
        if sum.link_waited + sum.waited_for_link < WINDOW && sum.plain_bytes < WINDOW_BYTES {
            return;
        }
        let sum = *sum;
        self.sum = None;
        let next = self.judge(current, &sum);
        if next != current {
            tracing::debug!(from = current.level(), to = next.level(), "compression level");
            level.set(next);
        }
    }

    fn judge(&mut self, current: Effort, sum: &Cost) -> Effort {
        if sum.work > Duration::ZERO && sum.plain_bytes > 64 * 1024 {
            let speed = &mut self.speeds[usize::from(current.0)];
            *speed = 0.5 * *speed + 0.5 * sum.plain_bytes as f64 / sum.work.as_secs_f64();
        }
        let (idle, full) = (sum.link_waited.as_secs_f64(), sum.waited_for_link.as_secs_f64());
        self.proven_rate = self.proven_rate.max(sum.wire_bytes as f64 / (idle + full).max(1e-3));
        if full > 2.0 * idle {
            let rate = sum.wire_bytes as f64 / (idle + full).max(1e-6);
            self.link_rate = Some(rate);
            let next = current.raised();
            let ratio = sum.wire_bytes as f64 / sum.plain_bytes.max(1) as f64;
            let possible = self.threads * self.speeds[usize::from(next.0)] * ratio;
            return if possible >= rate { next } else { current };
        }
        if idle > 2.0 * full {
            let next = current.lowered(if idle > 8.0 * full { 2 } else { 1 });
            // That a link waits for differences says nothing of how long it would take for the whole.
            return if self.proven_rate < WHOLE_RATE { next.max(Effort::LEAST_BASES).min(current) } else { next };
        }
        current
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Frames of 1 MiB over a link of `rate` bytes a second, made by two threads with the usual speeds.
    fn settle(rate: f64) -> (Effort, f64) {
        let level = Level::new(Effort::FIRST);
        let mut gauge = Gauge::new(2);
        let (mut spent, mut sent) = (0.0, 0.0);
        for _ in 0..400 {
            let effort = level.get();
            let ratio = [0.5, 0.45, 0.4, 0.36, 0.34, 0.33, 0.31, 0.3][usize::from(effort.0)];
            let plain = 1048576.0;
            let work = plain / SPEEDS[usize::from(effort.0)];
            let (make, send) = (work / 2.0, plain * ratio / rate);
            let seconds = |s: f64| Duration::from_secs_f64(s.max(0.0));
            gauge.note(
                Cost {
                    effort,
                    plain_bytes: plain as u64,
                    wire_bytes: (plain * ratio) as u64,
                    work: seconds(work),
                    link_waited: seconds(make - send),
                    waited_for_link: seconds(send - make),
                },
                &level,
            );
            spent += make.max(send);
            sent += plain;
        }
        (level.get(), sent / spent)
    }

    #[test]
    fn the_slower_side_decides() {
        let (slow, _) = settle(0.5e6);
        assert_eq!(slow, Effort::MOST);
        let (fast, plain_rate) = settle(1e9);
        assert!(fast <= Effort(1), "{fast:?}");
        assert!(plain_rate > 400e6, "{plain_rate}");
        // In between, never much slower than the best of the fixed levels.
        for rate in [1.25e6, 12.5e6, 125e6] {
            let (_, found) = settle(rate);
            let fixed = |n: usize| {
                let ratio = [0.5, 0.45, 0.4, 0.36, 0.34, 0.33, 0.31, 0.3][n];
                (rate / ratio).min(2.0 * SPEEDS[n])
            };
            let best = (0..8).map(fixed).fold(0.0, f64::max);
            assert!(found > best * 0.75, "{found} of {best} at {rate}");
        }
    }

    #[test]
    fn differences_are_told_shortly_only_where_there_is_time() {
        let levels = |tell: &dyn Fn(Effort) -> i32| (0..=Effort::MOST.0).map(|n| tell(Effort(n))).collect::<Vec<_>>();
        assert_eq!(levels(&|effort| effort.level_when_known()), [1, 3, 3, 6, 9, 12, 16, 19]);
        assert_eq!(levels(&|effort| effort.level_of_pages(false)), [9, 9, 9, 9, 9, 12, 16, 19]);
        assert_eq!(levels(&|effort| effort.level_of_pages(true)), [1, 3, 3, 6, 6, 6, 6, 6]);
    }

    #[test]
    fn frames_of_another_effort_tell_nothing() {
        let level = Level::new(Effort::FIRST);
        let mut gauge = Gauge::new(2);
        let cost = Cost {
            effort: Effort(0),
            plain_bytes: 1 << 30,
            wire_bytes: 1 << 20,
            work: Duration::from_secs(1),
            link_waited: Duration::from_secs(1),
            waited_for_link: Duration::ZERO,
        };
        gauge.note(cost, &level);
        assert_eq!(level.get(), Effort::FIRST);
    }
}
