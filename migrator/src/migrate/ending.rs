//! How a move from here ends, and that its report says so, also if nobody follows the move any more.
//!
//! Invariant: as soon as a row says that a move is over, so does its report; what a program that died couldn't write the next one does.

use layerfs::Result;
use layerfs::attr::Time;

use super::Migrations;
use super::depart::LOST;
use super::report::{self, IN_DOUBT, RUNNING, Report};
use crate::guest::GuestState;
use crate::handover::MoveId;
use crate::handover::journal::{Row, Side};
use crate::handover::source::{Outcome, Phase};

/// What a report says that lacks what only the program knew that made it.
const CUT_OFF: &str = "this host's daemon ended before the move did; what it didn't see is missing here";

impl Migrations {
    /// How the move `row`, from here, ended, and where its guest is, if not where it should be.
    pub(super) fn outcome_of(&self, row: &Row) -> (&'static str, Option<String>) {
        let (name, peer, note) = (row.guest(), &row.peer, &row.note);
        if let Err(error) = self.must_be_sure(row) {
            return (IN_DOUBT, Some(error.to_string()));
        }
        let phase = match row.side {
            Side::Source { phase } => phase,
            Side::Destination { .. } => Phase::Moving,
        };
        // There is nothing of it to go on.
        let is_lost = || self.0.guests.get(name).is_ok_and(|record| record.state == GuestState::Created);
        match phase {
            Phase::Gone | Phase::Ended(Outcome::Moved) => ("moved", None),
            Phase::Ended(Outcome::Aborted) if is_lost() => ("aborted", Some(format!("guest {name} {LOST}"))),
            Phase::Ended(Outcome::Aborted) => ("aborted", Some(format!("guest {name} runs on here"))),
            Phase::Ended(Outcome::Returned) => (
                "given-back",
                Some(format!("{peer} couldn't restore it and gave it back ({note}); it runs here again")),
            ),
            Phase::Ended(Outcome::GivenUp) => ("given-up", Some(format!("guest {name} was given up here"))),
            Phase::Released => {
                let text = format!(
                    "guest {name} is {peer}'s, which hasn't said that it runs there ({note}); it is asked again and again, and \
                     `layerctl guest resolve {name}` tells more"
                );
                (IN_DOUBT, Some(text))
            }
            Phase::Moving | Phase::Stopping | Phase::Returned => {
                let text =
                    format!("guest {name} stays here, but doesn't go on yet ({note}); that is tried again and again");
                (IN_DOUBT, Some(text))
            }
        }
    }

    /// Keeps `report`; without it only what it tells is missing.
    pub(super) fn keep(&self, report: &Report) {
        if let Err(error) = report::save(self.0.guests.store(), report) {
            tracing::warn!(%error, "a report wasn't kept");
        }
    }

    /// Has the report of the move `row` say what has become of it, unless that says already how it ended.
    pub(super) fn note_end(&self, row: &Row) {
        match report::find(self.0.guests.store(), &row.id.to_string()) {
            Ok(report) if report.is_open() => self.end_report(report, Some(row)),
            Ok(_) | Err(layerfs::Error::NotFound { .. }) => {}
            Err(error) => tracing::warn!(guest = %row.guest(), %error, "a report can't be read"),
        }
    }

    /// The same for all reports of moves that nobody follows.
    pub(super) fn note_ends(&self) -> Result<()> {
        for report in report::load(self.0.guests.store())?.into_iter().filter(Report::is_open) {
            if self.0.leaving.lock().iter().any(|guest| guest.as_str() == report.guest) {
                continue;
            }
            let Ok(id) = report.id.parse::<MoveId>() else { continue };
            match self.0.journal.get(id) {
                Ok(row) if row.is_some() || report.outcome == RUNNING => self.end_report(report, row.as_ref()),
                Ok(_) => {}
                Err(error) => tracing::warn!(guest = report.guest, %error, "the record of a move can't be read"),
            }
        }
        Ok(())
    }

    /// Without a row nothing has begun.
    fn end_report(&self, mut report: Report, row: Option<&Row>) {
        if report.outcome == RUNNING {
            report.decisions.push(CUT_OFF.to_owned());
        }
        let (outcome, text) = row.map_or(("aborted", None), |row| self.outcome_of(row));
        let note = row.map(|row| row.note.as_str()).unwrap_or_default();
        report.outcome = outcome.to_owned();
        report.error = text.map(|text| match note.is_empty() || text.contains(note) {
            true => text,
            false => format!("{note}; {text}"),
        });
        report.seconds = (Time::now().seconds.saturating_sub(report.began)).max(0) as f64;
        self.keep(&report);
    }
}
