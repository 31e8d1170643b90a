//! What we are out for, beside the paper's method in the same run, with the application found: pure arithmetic on two records.

use crate::cell::{App, Cell, Kind};
use crate::record::Record;

/// A share of the paper's figure that ours may have.
const DOWNTIME: f64 = 0.25;
const DOWNTIME_HARD: f64 = 0.1;
const BYTES: f64 = 0.5;
const BYTES_NEW_MEMORY: f64 = 1.05;
const TOTAL: f64 = 0.5;
/// Seconds that a small container may stand still beyond dump and restore.
const SMALL: f64 = 0.3;
/// Seconds that a machine may stand still beyond what its changed memory takes on the link.
const MACHINE: f64 = 1.0;
/// The part of the RAM simulation's memory that may be sent while it stands still.
const STOPPED: f64 = 0.05;

/// One goal.
#[derive(Clone, Debug, PartialEq)]
pub struct Goal {
    /// What it is about.
    pub what: &'static str,
    /// Ours, the most that it may be, and their unit, for people.
    pub text: String,
    /// Whether it is so.
    pub is_met: bool,
}

fn at_most(what: &'static str, ours: f64, most: f64, unit: &str) -> Goal {
    Goal { what, text: format!("{ours:.2} of at most {most:.2} {unit}"), is_met: ours <= most }
}

/// The goals of a cell.
pub fn goals(cell: Cell, paper: &Record, ours: &Record) -> Vec<Goal> {
    let is_ram = matches!(cell.app, App::Ram(_));
    let is_hard = is_ram || cell.kind == Kind::Kvm;
    let rate = f64::from(cell.megabits) * 125_000.0;
    let share = if is_hard { DOWNTIME_HARD } else { DOWNTIME };
    let mut goals = vec![at_most("downtime beyond the tools", ours.beyond_tools(), share * paper.beyond_tools(), "s")];
    let share = if is_ram { BYTES_NEW_MEMORY } else { BYTES };
    goals.push(at_most("bytes", ours.wire_bytes as f64 / 1e6, share * paper.wire_bytes as f64 / 1e6, "MB"));
    let half = TOTAL * paper.total_seconds;
    // What it sends beyond what it may is no excuse.
    let alone = (ours.wire_bytes as f64).min(share * paper.wire_bytes as f64) / rate;
    let mut total = at_most("total time", ours.total_seconds, half, "s");
    if !total.is_met && alone > half {
        total.text.push_str(&format!("; bytes that may be sent take {alone:.2} s"));
        total.is_met = true;
    }
    goals.push(total);
    if cell.kind != Kind::Kvm && matches!(cell.app, App::None | App::Game) {
        let most = ours.dump_seconds + ours.restore_seconds + SMALL;
        goals.push(at_most("downtime of a small container", ours.downtime_seconds, most, "s"));
    }
    let stopped = ours.stopped_bytes.unwrap_or_default() as f64;
    if cell.kind == Kind::Kvm {
        goals.push(at_most("downtime of a machine", ours.downtime_seconds, MACHINE + stopped / rate, "s"));
    }
    if let App::Ram(megabytes) = cell.app {
        let most = STOPPED * f64::from(megabytes) * 1.048576;
        goals.push(at_most("bytes while it stands still", stopped / 1e6, most, "MB"));
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cell::{Case, Method};

    fn record(total: f64, megabytes: u64, down: f64, tools: f64) -> Record {
        Record {
            cell: String::new(),
            total_seconds: total,
            wire_bytes: megabytes * 1_000_000,
            downtime_seconds: down,
            first_program_seconds: down,
            noise_seconds: 0.0,
            busy: 0.0,
            dump_seconds: tools,
            restore_seconds: 0.0,
            stopped_bytes: Some(0),
            memory_bytes: None,
            stages: Vec::new(),
            notes: Vec::new(),
            machine: String::new(),
            day: String::new(),
            build: String::new(),
        }
    }

    #[test]
    fn goals_are_shares_of_what_the_paper_takes() {
        let cell = Cell::of_table(Kind::Lxc, App::Face, Case::Found, Method::Ours);
        let met = |ours: &Record| {
            goals(cell, &record(10.0, 10, 5.0, 1.0), ours).iter().map(|goal| goal.is_met).collect::<Vec<_>>()
        };
        assert_eq!(met(&record(5.0, 5, 2.0, 1.0)), [true, true, true]);
        assert_eq!(met(&record(5.1, 6, 2.1, 1.0)), [false, false, false]);
        // More bytes than the link carries in half the time: no more can be asked.
        let slow = Cell { megabits: 1, ..cell };
        assert!(goals(slow, &record(10.0, 10, 5.0, 1.0), &record(40.0, 5, 2.0, 1.0))[2].is_met);
        let ram = Cell { app: App::Ram(330), ..cell };
        assert!(!goals(ram, &record(10.0, 100, 5.0, 1.0), &record(5.0, 100, 2.0, 1.0))[0].is_met);
    }
}
