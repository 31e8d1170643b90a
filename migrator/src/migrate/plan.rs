//! What to do next while a guest is copied, and what its downtime will be. Pure.
//!
//! Invariants: rounds end; another one is made only if it would make the downtime noticeably shorter.

use serde::{Deserialize, Serialize};

use super::report::{Report, Stage};

/// Never more rounds than this.
pub const MAX_ROUNDS: usize = 12;
/// A round has to shorten the downtime by so many seconds, or by this part of it, whichever is more.
const WORTHWHILE_SECONDS: f64 = 0.02;
const WORTHWHILE_PART: f64 = 0.05;
/// A round that sends at least this part of what the one before has sent gains nothing.
const SATURATED: f64 = 0.9;
/// After one that sends at most this part of it, the next is believed to gain as much: rates are noisy, this isn't.
const SHRINKING: f64 = 0.7;
/// Reports that are learnt from.
const LEARNT: usize = 5;

/// A round: the memory was read, and what the destination lacked was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// When it began, in seconds since the migration did.
    pub at: f64,
    /// How long reading the memory and making a layer of it took.
    pub read_seconds: f64,
    /// How long sending took.
    pub send_seconds: f64,
    /// Bytes on the wire.
    pub bytes: u64,
    /// Bytes of memory that were read.
    pub memory_bytes: u64,
}

impl Round {
    /// How long it took.
    pub fn seconds(&self) -> f64 {
        self.read_seconds + self.send_seconds
    }
}

/// How many rounds there are to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rounds {
    /// As many as make the downtime shorter.
    #[default]
    Auto,
    /// This many.
    Exactly(u8),
}

/// What a link does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkSpeed {
    /// Bytes per second.
    pub rate: f64,
    /// Seconds of a round trip.
    pub round_trip: f64,
}

/// How fast memory changes, in bytes on the wire per second; none before two rounds.
pub fn dirty_rate(rounds: &[Round]) -> Option<f64> {
    let [.., before, last] = rounds else { return None };
    let since = last.at - before.at;
    (since > 0.0).then(|| last.bytes as f64 / since)
}

/// What would be sent if the guest stopped at `now`, in bytes.
pub fn bytes_left(rounds: &[Round], now: f64) -> f64 {
    let Some(last) = rounds.last() else { return 0.0 };
    match dirty_rate(rounds) {
        // What changes again and again is sent once: it is never more than the whole memory.
        Some(rate) => (rate * (now - last.at)).min(most(rounds)),
        // One round tells nothing of the rate: a tenth of it is a common guess.
        None => last.bytes as f64 * 0.1,
    }
}

/// The most that a round has sent, which is about what all of the memory takes.
fn most(rounds: &[Round]) -> f64 {
    rounds.iter().map(|round| round.bytes).max().unwrap_or_default() as f64
}

/// Whether memory changes about as fast as this link carries it, or faster. How much faster can't be seen: a round sends what has
/// changed while the one before was sent, so it is never seen to send more in a time than the link carries.
pub fn is_too_fast(rounds: &[Round], link: LinkSpeed) -> bool {
    let [.., before, last] = rounds else { return false };
    let is_telling = last.bytes as f64 / link.rate > WORTHWHILE_SECONDS;
    let stays = last.bytes as f64 > before.bytes as f64 * SATURATED;
    is_telling && stays && dirty_rate(rounds).is_some_and(|rate| rate > link.rate / 2.0)
}

/// Whether another round is to be made.
pub fn another(rounds: &[Round], wanted: Rounds, link: LinkSpeed) -> bool {
    match wanted {
        Rounds::Exactly(count) => rounds.len() < usize::from(count),
        Rounds::Auto if rounds.is_empty() => true,
        Rounds::Auto if rounds.len() >= MAX_ROUNDS => false,
        Rounds::Auto => {
            let last = rounds[rounds.len() - 1];
            let now = bytes_left(rounds, last.at + last.seconds());
            let Some(rate) = dirty_rate(rounds) else {
                // The second one tells the rate. It isn't worth it if the first took no time.
                return last.seconds() > 2.0 * WORTHWHILE_SECONDS;
            };
            let seconds = last.read_seconds + now / link.rate + 2.0 * link.round_trip;
            if is_too_fast(rounds, link) {
                return false;
            }
            let before = rounds[rounds.len() - 2].bytes as f64;
            let shrinks = (last.bytes as f64) < before * SHRINKING;
            if shrinks && last.bytes as f64 * (1.0 - SHRINKING) / link.rate > WORTHWHILE_SECONDS {
                return true;
            }
            let then = (rate * seconds).min(most(rounds));
            let gained = (now - then) / link.rate;
            gained > WORTHWHILE_SECONDS.max(now / link.rate * WORTHWHILE_PART)
        }
    }
}

/// What a migration is expected to do, or did, while the guest stands still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// From the guest's last step at the source to its first at the destination, in seconds.
    pub seconds: f64,
    /// Bytes on the wire in that time.
    pub bytes: u64,
}

/// The stages while the guest stands still, in order.
pub const DOWN_STAGES: [&str; 5] = ["dump", "pack", "send", "stage", "restore"];

/// What past migrations tell of the stages that don't depend on what has changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Learnt {
    /// Seconds of each of [`DOWN_STAGES`], and the memory bytes with them, if known.
    stages: [Option<f64>; 5],
    /// What the send stage took beyond its bytes.
    send_overhead: Option<f64>,
    /// By how much the downtime differs from the sum of its stages: a guest runs on while its dump is being prepared.
    apart: Option<f64>,
    /// How many of the same guest were learnt from.
    pub reports: usize,
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

impl Learnt {
    /// From `reports`, the latest last: those of this guest, or else of guests with this driver, scaled by memory.
    pub fn from(reports: &[Report], guest: &str, driver: &str, memory_bytes: u64) -> Learnt {
        let is_good = |report: &&Report| report.has_moved() && report.driver == driver;
        let mut chosen: Vec<&Report> = reports.iter().filter(is_good).filter(|report| report.guest == guest).collect();
        let own = chosen.len();
        if own == 0 {
            chosen = reports.iter().filter(is_good).collect();
        }
        let latest: Vec<&Report> = chosen.into_iter().rev().take(LEARNT).collect();
        let scale = |report: &Report| match own {
            0 if report.memory_bytes > 0 => (memory_bytes.max(1) as f64 / report.memory_bytes as f64).clamp(0.1, 10.0),
            _ => 1.0,
        };
        let stage = |name: &str| {
            let seconds = |report: &&Report| report.stage(name).map(|stage: &Stage| stage.seconds * scale(report));
            median(latest.iter().filter_map(seconds).collect())
        };
        let overhead = |report: &&Report| {
            let send = report.stage("send")?;
            Some((send.seconds - send.bytes as f64 / report.link?.rate).max(0.0))
        };
        let apart = |report: &&Report| {
            let stages = report.stages.iter().filter(|stage| stage.is_down).map(|stage| stage.seconds);
            Some(report.downtime?.seconds - stages.sum::<f64>())
        };
        Learnt {
            stages: DOWN_STAGES.map(stage),
            send_overhead: median(latest.iter().filter_map(overhead).collect()),
            apart: if own > 0 { median(latest.iter().filter_map(apart).collect()) } else { None },
            reports: own,
        }
    }

    /// What stopping now would cost. `read_seconds` is how long the last round took to read the memory.
    pub fn predict(&self, bytes: f64, memory_bytes: u64, read_seconds: f64, link: LinkSpeed) -> Downtime {
        let memory = memory_bytes as f64;
        // Without reports: what common machines do, and what this one did in the rounds.
        let guess = [
            0.1 + memory / 2e9,
            read_seconds.max(memory / 1e9),
            3.0 * link.round_trip + 0.02,
            2.0 * link.round_trip + 0.02,
            0.1 + memory / 2e9 + link.round_trip,
        ];
        let mut seconds = bytes / link.rate;
        for (at, name) in DOWN_STAGES.iter().enumerate() {
            let known = if *name == "send" { self.send_overhead } else { self.stages[at] };
            seconds += known.unwrap_or(guess[at]);
        }
        seconds = (seconds + self.apart.unwrap_or(0.0)).max(link.round_trip);
        Downtime { seconds, bytes: bytes as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: LinkSpeed = LinkSpeed { rate: 12.5e6, round_trip: 0.001 };

    /// What a guest does that changes `rate` bytes per second, `memory` at first, until the planner has enough.
    fn run(memory: f64, rate: f64, read: f64) -> Vec<Round> {
        let mut rounds: Vec<Round> = Vec::new();
        while another(&rounds, Rounds::Auto, LINK) {
            let at = rounds.last().map_or(0.0, |last| last.at + last.seconds());
            let bytes = rounds.last().map_or(memory, |last| (rate * (at - last.at)).min(memory));
            let (bytes, memory_bytes) = (bytes as u64, memory as u64);
            let send_seconds = bytes as f64 / LINK.rate;
            rounds.push(Round { at, read_seconds: read, send_seconds, bytes, memory_bytes });
            assert!(rounds.len() <= MAX_ROUNDS);
        }
        rounds
    }

    #[test]
    fn rounds_go_on_while_they_help() {
        // 330 MB, 2 MB/s: a round or two more, until reading the memory takes longer than sending what changed.
        let rounds = run(330e6, 2e6, 0.4);
        assert!((3..=6).contains(&rounds.len()), "{}", rounds.len());
        let last = rounds[rounds.len() - 1];
        assert!(bytes_left(&rounds, last.at + last.seconds()) < 2e6);
    }

    #[test]
    fn a_guest_that_is_faster_than_the_link_ends_soon() {
        assert!(run(330e6, 60e6, 0.4).len() <= 3);
        assert!(run(330e6, LINK.rate, 0.4).len() <= 3);
    }

    #[test]
    fn one_that_is_about_as_fast_as_the_link_ends_soon_and_is_told_from_others() {
        for part in [0.93, 0.97, 1.0, 1.5, 10.0] {
            let rounds = run(16e6, LINK.rate * part, 0.05);
            assert!(rounds.len() <= 3 && is_too_fast(&rounds, LINK), "{part}: {rounds:?}");
        }
        for part in [0.0, 0.1, 0.5, 0.7] {
            let rounds = run(16e6, LINK.rate * part, 0.05);
            assert!(!is_too_fast(&rounds, LINK), "{part}: {rounds:?}");
        }
        // The first round found most of it there; the others send all of the memory.
        let round =
            |at: f64, bytes: u64| Round { at, read_seconds: 0.05, send_seconds: 6.5, bytes, memory_bytes: 18 << 20 };
        let slow = LinkSpeed { rate: 2.3e6, round_trip: 0.001 };
        assert!(!another(&[round(0.0, 12_211_110), round(5.1, 15_354_687)], Rounds::Auto, slow));
        // A busy machine: the link seems slow, but each round is much smaller than the last.
        assert!(another(
            &[round(0.0, 347_130_022), round(14.0, 50_797_529)],
            Rounds::Auto,
            LinkSpeed { rate: 4.0e6, ..slow }
        ));
    }

    #[test]
    fn an_idle_guest_takes_two_rounds_and_a_tiny_one_takes_one() {
        assert_eq!(run(330e6, 0.0, 0.4).len(), 2);
        assert_eq!(run(1e5, 0.0, 0.01).len(), 1);
    }

    #[test]
    fn a_number_is_obeyed() {
        let round = Round::default();
        assert!(!another(&[], Rounds::Exactly(0), LINK));
        assert!(another(&[round; 2], Rounds::Exactly(3), LINK) && !another(&[round; 3], Rounds::Exactly(3), LINK));
    }

    fn report(guest: &str, seconds: [f64; 5], send_bytes: u64) -> Report {
        let mut report = Report::new("x", guest, "process", "edge");
        report.memory_bytes = 100_000_000;
        report.link = Some(LINK);
        for (name, seconds) in DOWN_STAGES.iter().zip(seconds) {
            let bytes = if *name == "send" { send_bytes } else { 0 };
            report.stages.push(Stage { name: (*name).to_owned(), at: 0.0, seconds, bytes, is_down: true });
        }
        // A tenth of a second of the dump was preparation.
        report.downtime = Some(Downtime { seconds: seconds.iter().sum::<f64>() - 0.1, bytes: send_bytes });
        report.outcome = "moved".to_owned();
        report
    }

    #[test]
    fn what_was_measured_is_predicted() {
        let down = [0.2, 0.3, 1.05, 0.05, 0.4];
        let mut reports = vec![report("other", [9.0; 5], 0)];
        for _ in 0..6 {
            let mut next = report("web", down, 12_500_000);
            let learnt = Learnt::from(&reports, "web", "process", 100_000_000);
            next.predicted = Some(learnt.predict(12.5e6, 100_000_000, 0.3, LINK));
            reports.push(next);
        }
        let learnt = Learnt::from(&reports, "web", "process", 100_000_000);
        assert_eq!(learnt.reports, 6);
        let same = learnt.predict(12.5e6, 100_000_000, 0.3, LINK).seconds;
        assert!((same - 1.9).abs() < 0.01, "{same}");
        let twice = learnt.predict(25e6, 100_000_000, 0.3, LINK).seconds;
        assert!((twice - 2.9).abs() < 0.01, "{twice}");
    }

    #[test]
    fn other_guests_of_the_driver_are_scaled_by_their_memory() {
        let reports = [report("web", [1.0, 1.0, 0.0, 0.0, 1.0], 0)];
        let learnt = Learnt::from(&reports, "new", "process", 50_000_000);
        assert_eq!((learnt.reports, learnt.predict(0.0, 50_000_000, 0.1, LINK).seconds), (0, 1.5));
        assert_eq!(Learnt::from(&reports, "new", "qemu", 1), Learnt::default());
    }
}
