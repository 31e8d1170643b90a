//! How long a guest will stand still, by what its past moves took. Pure.
//!
//! Hides how much of the past is believed: a few of the latest moves, of which the middle counts, and of two the shorter, as what goes
//! wrong on a machine makes things longer. Invariant: a prediction needs no past; it only gets better with it.

use serde::{Deserialize, Serialize};

use super::plan::{self, LinkSpeed};
use super::report::{Report, Stage};

/// Reports that are learnt from.
const LEARNT: usize = 5;
/// A machine is believed to be so many times as slow or fast as in past moves, at most.
const PACE: f64 = 2.0;
/// Reading that took less than so many seconds tells nothing of the machine's pace.
const TELLING_SECONDS: f64 = 0.05;
/// What was left to be sent is believed to be so many times what it seemed, at most.
const MORE: f64 = 4.0;
/// Less left than so many bytes tells nothing of that.
const TELLING_BYTES: f64 = 64.0 * 1024.0;

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
/// Those of them that read or write all of the memory at the source: as fast as reading it in the rounds was.
const PACED: [&str; 2] = ["dump", "pack"];

/// A past move.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    /// Seconds of each of [`DOWN_STAGES`]; of sending, those beyond its bytes.
    stages: [Option<f64>; 5],
    /// How long the first round took to read the memory, if that is telling: later ones find most of it in the store, and are not in
    /// every move.
    read: Option<f64>,
    /// By how much the downtime differs from the sum of its stages: a guest runs on while its dump is being prepared.
    apart: Option<f64>,
    /// How many times as much was sent as its rounds let expect.
    more: Option<f64>,
}

/// What past migrations tell of the next one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Learnt {
    seen: Vec<Seen>,
    /// How many of the same guest were learnt from.
    pub reports: usize,
    /// Whether its memory is a file, of which the destination has most before.
    pub has_memory_file: bool,
}

/// The middle one; of two in the middle the smaller.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

impl Seen {
    /// What `report` tells, of a guest with `scale` times its memory.
    fn of(report: &Report, scale: f64) -> Seen {
        let seconds = |name: &str| report.stage(name).map(|stage: &Stage| stage.seconds * scale);
        let send = report.stage("send");
        let mut stages = DOWN_STAGES.map(seconds);
        stages[2] = send.and_then(|send| Some((send.seconds - send.bytes as f64 / report.link?.rate).max(0.0)));
        let read = report.rounds.first().map(|round| round.read_seconds).filter(|read| *read > TELLING_SECONDS);
        let down = report.stages.iter().filter(|stage| stage.is_down).map(|stage| stage.seconds).sum::<f64>();
        let expected = report.stage("dump").map_or(0.0, |dump| plan::bytes_left(&report.rounds, dump.at));
        let more = send.filter(|_| expected > TELLING_BYTES).map(|send| send.bytes as f64 / expected);
        Seen { stages, read, apart: report.downtime.map(|downtime| downtime.seconds - down), more }
    }
}

impl Learnt {
    /// From `reports`, the latest last: those of this guest, or else of guests with this driver, scaled by memory.
    pub fn from(reports: &[Report], guest: &str, driver: &str, memory_bytes: u64) -> Learnt {
        // One that was in doubt for a while tells how long that was.
        let is_good = |report: &&Report| report.has_moved() && report.downtime.is_some() && report.driver == driver;
        let mut chosen: Vec<&Report> = reports.iter().filter(is_good).filter(|report| report.guest == guest).collect();
        let own = chosen.len();
        if own == 0 {
            chosen = reports.iter().filter(is_good).collect();
        }
        let seen = |report: &Report| match own {
            0 if report.memory_bytes > 0 => {
                let scale = (memory_bytes.max(1) as f64 / report.memory_bytes as f64).clamp(0.1, 10.0);
                Seen { read: None, apart: None, more: None, ..Seen::of(report, scale) }
            }
            _ => Seen::of(report, 1.0),
        };
        Learnt { seen: chosen.into_iter().rev().take(LEARNT).map(seen).collect(), reports: own, has_memory_file: false }
    }

    fn middle(&self, of: impl Fn(&Seen) -> Option<f64>) -> Option<f64> {
        median(self.seen.iter().filter_map(of))
    }

    /// How long the stage at `at` took, at the machine's pace of now.
    fn stage(&self, at: usize, read_seconds: f64) -> Option<f64> {
        let is_paced = PACED.contains(&DOWN_STAGES[at]) && read_seconds > TELLING_SECONDS;
        let pace = |seen: &Seen| seen.read.map_or(1.0, |read| (read_seconds / read).clamp(1.0 / PACE, PACE));
        self.middle(|seen| Some(seen.stages[at]? * if is_paced { pace(seen) } else { 1.0 }))
    }

    /// What stopping now would cost, with `bytes` left to be sent as it seems. `read_seconds` is how long the first round took to read
    /// the memory.
    pub fn predict(&self, bytes: f64, memory_bytes: u64, read_seconds: f64, link: LinkSpeed) -> Downtime {
        let memory = memory_bytes as f64;
        // Without reports: what was measured of containers of 53 to 162 MB and machines of 240 to 533 MB, and what this one did in the
        // rounds. What these have read is only read and compared then.
        let pack = if read_seconds > 0.0 { (read_seconds / 10.0).max(memory / 4e9) } else { memory / 1e9 };
        let (dump, restore) = match self.has_memory_file {
            true => (0.05 + memory / 2.5e9, 0.2 + memory / 4e9),
            false => (0.15 + memory / 2e9, 0.3 + memory / 1e9),
        };
        let (send, stage) = (3.0 * link.round_trip + 0.02, 2.0 * link.round_trip + 0.02);
        let guess = [dump, pack, send, stage, restore + link.round_trip];
        let bytes = bytes * self.middle(|seen| seen.more).map_or(1.0, |more| more.clamp(1.0 / MORE, MORE));
        let stages = (0..DOWN_STAGES.len()).map(|at| self.stage(at, read_seconds).unwrap_or(guess[at]));
        let apart = self.middle(|seen| seen.apart).unwrap_or(0.0);
        let seconds = (bytes / link.rate + stages.sum::<f64>() + apart).max(link.round_trip);
        Downtime { seconds, bytes: bytes as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Round;
    use super::*;

    const LINK: LinkSpeed = LinkSpeed { rate: 12.5e6, round_trip: 0.001 };

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

    #[test]
    fn a_first_move_is_foretold_by_what_common_machines_do() {
        // Memory in MB, how long the round took to read it, and the downtime without what was sent: as measured, of machines and containers.
        for (memory, read, seconds) in [(533, 2.93, 1.55), (344, 0.90, 1.34), (240, 0.48, 0.82), (53, 0.12, 0.68)] {
            let foretold = Learnt::default().predict(0.0, memory * 1_000_000, read, LINK).seconds;
            assert!(
                (foretold - seconds).abs() < 0.15_f64.max(0.3 * seconds),
                "{memory} MB: {foretold} for {seconds} s"
            );
        }
    }

    #[test]
    fn a_machine_whose_memory_is_a_file_stands_still_for_less() {
        let learnt = Learnt { has_memory_file: true, ..Learnt::default() };
        for (memory, read, seconds) in [(344, 0.90, 0.86), (240, 0.48, 0.5)] {
            let foretold = learnt.predict(0.0, memory * 1_000_000, read, LINK).seconds;
            assert!(
                (foretold - seconds).abs() < 0.15_f64.max(0.3 * seconds),
                "{memory} MB: {foretold} for {seconds} s"
            );
        }
    }

    /// A move whose rounds let `left` bytes expect, and read the memory in `read` seconds.
    fn busy(seconds: [f64; 5], read: f64, left: u64, sent: u64) -> Report {
        let mut report = report("web", seconds, sent);
        let round = |at: f64, bytes: u64| {
            let memory_bytes = 330 << 20;
            Round { at, read_seconds: read, send_seconds: 1.0, bytes, memory_bytes, left: None }
        };
        report.rounds = vec![round(0.0, 100 * left), round(10.0, 10 * left)];
        // A tenth of the last round's bytes: a second after it began, when they changed in ten.
        report.stages.iter_mut().for_each(|stage| stage.at = 11.0);
        report
    }

    #[test]
    fn what_is_left_is_corrected_by_what_was() {
        let down = [0.2, 0.1, 0.5, 0.0, 0.4];
        let reports = [busy(down, 0.4, 1_000_000, 3_000_000), busy(down, 0.4, 1_000_000, 3_000_000)];
        let learnt = Learnt::from(&reports, "web", "process", 1);
        assert_eq!(learnt.predict(2e6, 1, 0.4, LINK).bytes, 6_000_000);
        // Nothing is believed without end, and a guest's own past says nothing of another's.
        let reports = [busy(down, 0.4, 1_000_000, 90_000_000)];
        assert_eq!(Learnt::from(&reports, "web", "process", 1).predict(2e6, 1, 0.4, LINK).bytes, 8_000_000);
        assert_eq!(Learnt::from(&reports, "new", "process", 1).predict(2e6, 1, 0.4, LINK).bytes, 2_000_000);
    }

    #[test]
    fn one_slow_move_spoils_no_prediction_and_a_slow_machine_is_seen() {
        // As moves of 330 MiB to and fro were: one of them, on a machine that was busy, took twice as long in all stages.
        let (usual, slow) = ([0.41, 0.3, 0.21, 0.03, 0.8], [0.82, 0.6, 0.42, 0.06, 1.6]);
        let reports = [busy(usual, 0.4, 1_500_000, 1_500_000), busy(slow, 0.8, 1_500_000, 1_500_000)];
        let learnt = Learnt::from(&reports, "web", "process", 1);
        let sum = |seconds: [f64; 5]| seconds.iter().sum::<f64>() - 0.1;
        let near =
            |predicted: f64, actual: f64| (predicted - actual).abs() < 0.15 || (predicted / actual - 1.0).abs() < 0.3;
        let predicted = |read: f64| learnt.predict(1.5e6, 1, read, LINK).seconds;
        assert!(near(predicted(0.4), sum(usual)), "{}", predicted(0.4));
        // What the source does takes as much longer as reading its memory did.
        assert!(predicted(0.8) > predicted(0.4) + 0.6, "{}", predicted(0.8));
    }
}
