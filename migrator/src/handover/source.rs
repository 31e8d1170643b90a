//! The source's side of a handover: what follows from what has happened. No I/O.
//!
//! Whoever drives it does its [`Step`]s in order, each before the next, and tells it of what came of those that can
//! fail. A [`Step::Journal`] is done when it is durable; if it can't be written, [`Source::on`] isn't told and the driver
//! forgets this machine: the journal says what holds.

use serde::{Deserialize, Serialize};

use super::Fate;

/// How a move ended, for the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs at the destination.
    Moved,
    /// The guest runs on here: it was never released.
    Aborted,
    /// The guest runs here again: the destination gave it back, or an operator took it.
    #[serde(rename = "given-back")]
    Returned,
    /// An operator gave up this side's copy.
    GivenUp,
}

/// What the source's journal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The guest runs, layers go ahead.
    Moving,
    /// The guest is being dumped, or stands still.
    Stopping,
    /// The commit: the guest is the destination's.
    Released,
    /// The destination runs it; what is left here goes.
    Gone,
    /// It is this host's again, and goes on.
    Returned,
    /// Over.
    #[serde(untagged)]
    Ended(Outcome),
}

impl Phase {
    /// What is answered to a destination that asks.
    pub fn fate(self) -> Fate {
        match self {
            Phase::Moving | Phase::Stopping => Fate::Pending,
            Phase::Released | Phase::Gone => Fate::Released,
            Phase::Returned | Phase::Ended(Outcome::Aborted | Outcome::Returned) => Fate::Aborted,
            Phase::Ended(Outcome::Moved | Outcome::GivenUp) => Fate::Released,
        }
    }

    /// Whether it is over.
    pub fn is_ended(self) -> bool {
        matches!(self, Phase::Ended(_))
    }
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Layers are ahead: the guest is to stop now.
    Stop,
    /// The destination has staged what the dump gave.
    Staged,
    /// Anything failed or was cancelled before the release, or the destination said no.
    Failed,
    /// The destination told of the move.
    Told(Fate),
    /// The destination couldn't be asked, or gave no answer.
    Silence,
    /// The guest goes on.
    Resumed,
    /// The frozen copy is gone.
    Discarded,
    /// Nothing of it is here but its disk.
    Ended,
    /// This program has been started anew.
    Restarted,
    /// An operator: run it here, whatever the other side does.
    RunHere,
    /// An operator: it is gone or the destination's; forget it here.
    GiveUp,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Make it durable that this holds.
    Journal(Phase),
    /// Let the guest go on; [`Event::Resumed`] when it does. Tried again and again.
    Resume,
    /// Remove the frozen copy; [`Event::Discarded`] when it is gone. Tried again and again once it is the destination's; else that
    /// is for the operator to say again.
    Discard,
    /// End what is left of it, whether it stands still or runs; [`Event::Ended`] then. If it fails it is for the operator to say
    /// again.
    End,
    /// Tell the destination that nothing comes of it. It doesn't matter whether that arrives.
    Abort,
    /// Tell the destination that the guest is its own now, and hear what comes of it.
    Commit,
    /// Ask the destination after a while what became of it.
    AskLater,
}

/// The machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// What the journal says, once all steps so far are done.
    pub phase: Phase,
}

impl Source {
    /// One whose journal says `phase`.
    pub fn new(phase: Phase) -> Source {
        Source { phase }
    }

    /// What follows from `event`.
    pub fn on(&mut self, event: Event) -> Vec<Step> {
        match (self.phase, event) {
            (Phase::Moving, Event::Stop) => vec![self.journal(Phase::Stopping)],
            (Phase::Moving, Event::Failed | Event::Restarted | Event::GiveUp | Event::RunHere) => self.aborted(),
            (Phase::Stopping, Event::Failed | Event::Restarted | Event::RunHere) => vec![Step::Resume],
            // What can't go on here may not keep the guest from being started anew.
            (Phase::Stopping, Event::GiveUp) => vec![Step::End],
            (Phase::Stopping, Event::Resumed | Event::Ended) => self.aborted(),
            (Phase::Stopping, Event::Staged) => vec![self.journal(Phase::Released), Step::Commit],

            (Phase::Released, Event::Told(Fate::Restored)) => vec![self.journal(Phase::Gone), Step::Discard],
            (Phase::Released, Event::Told(Fate::Refused)) => vec![self.journal(Phase::Returned), Step::Resume],
            (Phase::Released, Event::Told(Fate::Staged)) => vec![Step::Commit],
            // It works on it, has lost it, or doesn't answer: only it, or an operator, can tell.
            (Phase::Released, Event::Told(_) | Event::Silence | Event::Restarted) => vec![Step::AskLater],
            (Phase::Released, Event::RunHere) => vec![self.journal(Phase::Returned), Step::Resume],
            (Phase::Released, Event::GiveUp) => vec![self.journal(Phase::Gone), Step::Discard],

            (Phase::Gone, Event::Discarded) => vec![self.journal(Phase::Ended(Outcome::Moved))],
            (Phase::Gone, Event::Restarted | Event::GiveUp) => vec![Step::Discard],
            (Phase::Returned, Event::Resumed) => vec![self.journal(Phase::Ended(Outcome::Returned))],
            (Phase::Returned, Event::Restarted | Event::RunHere) => vec![Step::Resume],
            // From the row on the destination may run it: nothing may be left here then, be it frozen or half awake.
            (Phase::Returned, Event::GiveUp) => vec![Step::Discard],
            (Phase::Returned, Event::Discarded) => vec![self.journal(Phase::Ended(Outcome::GivenUp))],
            // Late, repeated, or of no meaning here.
            _ => Vec::new(),
        }
    }

    fn journal(&mut self, phase: Phase) -> Step {
        self.phase = phase;
        Step::Journal(phase)
    }

    fn aborted(&mut self) -> Vec<Step> {
        vec![self.journal(Phase::Ended(Outcome::Aborted)), Step::Abort]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 11] = [
        Event::Stop,
        Event::Staged,
        Event::Failed,
        Event::Silence,
        Event::Resumed,
        Event::Discarded,
        Event::Ended,
        Event::Restarted,
        Event::Told(Fate::Staged),
        Event::Told(Fate::Committed),
        Event::Told(Fate::Unknown),
    ];

    #[test]
    fn a_released_guest_isnt_touched_until_the_destination_has_spoken() {
        for event in EVENTS {
            let mut source = Source::new(Phase::Released);
            let steps = source.on(event);
            assert_eq!(source.phase, Phase::Released, "{event:?}");
            let is_harmless = |step: &Step| matches!(step, Step::Commit | Step::AskLater);
            assert!(steps.iter().all(is_harmless), "{event:?}: {steps:?}");
        }
    }

    #[test]
    fn what_has_ended_stays_as_it_is() {
        for outcome in [Outcome::Moved, Outcome::Aborted, Outcome::Returned, Outcome::GivenUp] {
            for event in EVENTS.into_iter().chain(Fate::ALL.map(Event::Told)).chain([Event::RunHere, Event::GiveUp]) {
                let mut source = Source::new(Phase::Ended(outcome));
                assert_eq!((source.on(event), source.phase), (Vec::new(), Phase::Ended(outcome)));
            }
        }
    }

    #[test]
    fn nothing_is_left_of_what_was_given_up_when_that_is_told() {
        let mut source = Source::new(Phase::Returned);
        assert_eq!((source.on(Event::GiveUp), source.phase.fate()), (vec![Step::Discard], Fate::Aborted));
        assert_eq!(source.on(Event::Discarded), [Step::Journal(Phase::Ended(Outcome::GivenUp))]);
        let mut source = Source::new(Phase::Stopping);
        assert_eq!((source.on(Event::GiveUp), source.phase.fate()), (vec![Step::End], Fate::Pending));
        assert_eq!(source.on(Event::Ended), [Step::Journal(Phase::Ended(Outcome::Aborted)), Step::Abort]);
    }

    #[test]
    fn phases_are_written_as_words() {
        let words = |phase: Phase| serde_json::to_string(&phase).unwrap();
        assert_eq!(words(Phase::Released), "\"released\"");
        assert_eq!(words(Phase::Ended(Outcome::Moved)), "\"moved\"");
        for phase in [Phase::Moving, Phase::Returned, Phase::Ended(Outcome::Returned), Phase::Ended(Outcome::GivenUp)] {
            let back: Phase = serde_json::from_str(&words(phase)).unwrap();
            assert_eq!(back, phase);
        }
    }
}
