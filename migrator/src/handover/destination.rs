//! The destination's side of a handover: what follows from what has happened. No I/O.
//!
//! Driven as [`super::source`] is. A [`Step::Reply`] answers the message that is being dealt with, if there is one.

use serde::{Deserialize, Serialize};

use super::Fate;

/// What the destination's journal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// A guest is expected.
    Arriving,
    /// All that can fail before the restore is done; whether it may be restored is the source's to say.
    Staged,
    /// The guest is this host's.
    Committed,
    /// It runs here, or did.
    Restored,
    /// What this move brought never runs here; what is left of it goes.
    Refused,
    /// The same, and nothing is left.
    Cleared,
}

impl Phase {
    /// What is answered to the source.
    pub fn fate(self) -> Fate {
        match self {
            Phase::Arriving => Fate::Arriving,
            Phase::Staged => Fate::Staged,
            Phase::Committed => Fate::Committed,
            Phase::Restored => Fate::Restored,
            Phase::Refused | Phase::Cleared => Fate::Refused,
        }
    }

    /// Whether it is over.
    pub fn is_ended(self) -> bool {
        matches!(self, Phase::Restored | Phase::Cleared)
    }
}

/// What the guest does here, when a restore has ended or this program is started anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Found {
    /// It runs.
    Running,
    /// Nothing of it is here.
    Nothing,
    /// Nothing of it is here but a disk that is newer than its state: it has gone on before, and has ended.
    WentOn,
    /// It can't be told.
    Unknown,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The source says what to stage.
    Stage,
    /// Staging is done, or has failed.
    Made(bool),
    /// The source has released it.
    Commit,
    /// The source runs it on.
    Abort,
    /// The source asks.
    Inquire,
    /// A restore has been tried, or looked for: so it stands.
    Tried(Found),
    /// Whether nothing of it runs here and its mounts are gone.
    Cleared(bool),
    /// Nothing was heard of the source for the time of the lease.
    Expired,
    /// The source was asked, and says so.
    Told(Fate),
    /// The source couldn't be asked.
    Silence,
    /// It is time to try again what failed.
    Again,
    /// This program has been started anew.
    Restarted,
    /// An operator: run it here, whatever the other side does.
    RunHere,
    /// An operator: never run it here.
    GiveUp,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Make it durable that this holds.
    Journal(Phase),
    /// Do all that can fail before the restore; then [`Event::Made`].
    Make,
    /// Restore it unless it runs already; then [`Event::Tried`].
    Restore,
    /// See to it that nothing of it runs, and remove its mounts; then [`Event::Cleared`].
    Clear,
    /// Tell the source.
    Reply(Fate),
    /// Ask the source after a while.
    AskLater,
    /// Come back with [`Event::Again`] after a while.
    AgainLater,
}

/// The machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    /// What the journal says, once all steps so far are done.
    pub phase: Phase,
    /// Whether a guest that can't be restored goes back to the source.
    pub gives_back: bool,
    /// Its restore has failed: it is being given back.
    is_giving_back: bool,
    /// An operator wants it here, be it from its disk alone.
    is_wanted: bool,
}

impl Destination {
    /// One whose journal says `phase`.
    pub fn new(phase: Phase, gives_back: bool) -> Destination {
        Destination { phase, gives_back, is_giving_back: false, is_wanted: false }
    }

    /// What follows from `event`.
    pub fn on(&mut self, event: Event) -> Vec<Step> {
        // It holds for the restore that follows from it.
        let was_wanted = std::mem::replace(&mut self.is_wanted, event == Event::RunHere);
        match (self.phase, event) {
            (Phase::Arriving, Event::Stage) => vec![Step::Make],
            (Phase::Arriving, Event::Made(true)) => vec![self.journal(Phase::Staged), self.reply()],
            (Phase::Arriving, Event::Made(false)) => vec![self.reply()],
            (Phase::Arriving, Event::Abort) => vec![self.journal(Phase::Refused), self.reply(), Step::Clear],
            (Phase::Arriving, Event::Expired | Event::Restarted | Event::Again | Event::GiveUp) => {
                vec![self.journal(Phase::Refused), Step::Clear]
            }

            (Phase::Staged, Event::Commit | Event::Told(Fate::Released) | Event::RunHere) => {
                vec![self.journal(Phase::Committed), Step::Restore]
            }
            (Phase::Staged, Event::Abort) => vec![self.journal(Phase::Refused), self.reply(), Step::Clear],
            (Phase::Staged, Event::Told(Fate::Aborted) | Event::GiveUp) => {
                vec![self.journal(Phase::Refused), Step::Clear]
            }
            (Phase::Staged, Event::Told(_) | Event::Silence | Event::Restarted | Event::Expired) => {
                vec![Step::AskLater]
            }

            // Ours: it was released, and what was begun is finished. But whoever begins anew asks first.
            (Phase::Committed, Event::Restarted) => vec![Step::AskLater],
            (Phase::Committed, Event::Told(Fate::Aborted) | Event::GiveUp) => {
                self.is_giving_back = true;
                vec![Step::Clear]
            }
            (Phase::Committed, Event::Commit) if self.is_giving_back => vec![self.reply()],
            // The source doesn't know yet that it is to have it again: this is no new leave to run it.
            (Phase::Committed, Event::Told(Fate::Released)) if self.is_giving_back => vec![Step::Clear],
            (Phase::Committed, Event::Commit | Event::Told(Fate::Released) | Event::RunHere) => {
                self.is_giving_back = false;
                vec![Step::Restore]
            }
            (Phase::Committed, Event::Again | Event::Silence | Event::Told(_)) if self.is_giving_back => {
                vec![Step::Clear]
            }
            // An operator may have taken it back at the source meanwhile: any other answer isn't leave to run it. A source that
            // knows nothing of the move may have forgotten just that.
            (Phase::Committed, Event::Again | Event::Silence | Event::Told(_)) => vec![Step::AskLater],
            (Phase::Committed, Event::Tried(Found::Running)) => vec![self.journal(Phase::Restored), self.reply()],
            (Phase::Committed, Event::Tried(Found::Nothing)) if self.gives_back => {
                self.is_giving_back = true;
                vec![Step::Clear]
            }
            (Phase::Committed, Event::Tried(Found::Nothing)) => vec![self.reply()],
            // Its disk has what the state, and the copy at the source, haven't: it isn't for us to choose between them.
            (Phase::Committed, Event::Tried(Found::WentOn)) if was_wanted => {
                vec![self.journal(Phase::Restored), self.reply()]
            }
            (Phase::Committed, Event::Tried(Found::WentOn)) => vec![self.reply(), Step::AgainLater],
            (Phase::Committed, Event::Tried(Found::Unknown)) => vec![self.reply(), Step::AgainLater],
            (Phase::Committed, Event::Cleared(true)) if self.is_giving_back => {
                vec![self.journal(Phase::Refused), self.reply(), Step::Clear]
            }
            (Phase::Committed, Event::Cleared(false)) => vec![self.reply(), Step::AgainLater],

            (Phase::Refused, Event::Restarted | Event::Again) => vec![Step::Clear],
            (Phase::Refused, Event::Cleared(true)) => vec![self.journal(Phase::Cleared)],
            (Phase::Refused, Event::Cleared(false)) => vec![Step::AgainLater],

            // Whatever the source says again, late or out of turn is answered with what holds.
            (_, Event::Stage | Event::Commit | Event::Abort | Event::Inquire) => vec![self.reply()],
            _ => Vec::new(),
        }
    }

    fn journal(&mut self, phase: Phase) -> Step {
        self.phase = phase;
        Step::Journal(phase)
    }

    fn reply(&self) -> Step {
        Step::Reply(self.phase.fate())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sources_word_or_an_operators_starts_a_staged_guest() {
        let all = [
            Event::Stage,
            Event::Made(true),
            Event::Abort,
            Event::Inquire,
            Event::Tried(Found::Nothing),
            Event::Cleared(true),
            Event::Expired,
            Event::Silence,
            Event::Restarted,
            Event::GiveUp,
        ];
        let told = Fate::ALL.into_iter().filter(|fate| *fate != Fate::Released).map(Event::Told);
        for event in all.into_iter().chain(told) {
            let mut side = Destination::new(Phase::Staged, true);
            assert!(!side.on(event).contains(&Step::Restore), "{event:?}");
        }
    }

    #[test]
    fn a_committed_guest_isnt_restored_anew_without_the_sources_word_or_an_operators() {
        let told =
            Fate::ALL.into_iter().filter(|fate| !matches!(fate, Fate::Released | Fate::Aborted)).map(Event::Told);
        for event in [Event::Restarted, Event::Silence, Event::Again].into_iter().chain(told) {
            let mut side = Destination::new(Phase::Committed, true);
            assert_eq!(side.on(event), [Step::AskLater], "{event:?}");
        }
        for event in [Event::Commit, Event::Told(Fate::Released), Event::RunHere] {
            let mut side = Destination::new(Phase::Committed, true);
            assert_eq!(side.on(event), [Step::Restore], "{event:?}");
        }
    }

    #[test]
    fn what_was_refused_never_runs() {
        for phase in [Phase::Refused, Phase::Cleared] {
            for event in [Event::Stage, Event::Commit, Event::RunHere, Event::Restarted, Event::Told(Fate::Released)] {
                let mut side = Destination::new(phase, true);
                let steps = side.on(event);
                assert!(!steps.contains(&Step::Restore) && !steps.contains(&Step::Make), "{phase:?} {event:?}");
                assert_eq!(side.phase.fate(), Fate::Refused);
            }
        }
    }

    #[test]
    fn only_an_operator_decides_about_a_guest_that_has_gone_on_here_and_ended() {
        for event in [Event::Commit, Event::Told(Fate::Released)] {
            let mut side = Destination::new(Phase::Committed, true);
            assert_eq!(side.on(event), [Step::Restore]);
            assert_eq!(side.on(Event::Tried(Found::WentOn)), [Step::Reply(Fate::Committed), Step::AgainLater]);
        }
        let mut side = Destination::new(Phase::Committed, true);
        assert_eq!(side.on(Event::RunHere), [Step::Restore]);
        let last = [Step::Journal(Phase::Restored), Step::Reply(Fate::Restored)];
        assert_eq!(side.on(Event::Tried(Found::WentOn)), last);
        let mut side = Destination::new(Phase::Committed, false);
        assert_eq!(side.on(Event::GiveUp), [Step::Clear]);
    }

    #[test]
    fn a_guest_that_cant_be_restored_goes_back_only_when_nothing_of_it_runs() {
        let mut side = Destination::new(Phase::Committed, true);
        assert_eq!(side.on(Event::Tried(Found::Nothing)), [Step::Clear]);
        assert_eq!(side.on(Event::Cleared(false)), [Step::Reply(Fate::Committed), Step::AgainLater]);
        for event in [Event::Told(Fate::Released), Event::Silence, Event::Again] {
            assert_eq!(side.on(event), [Step::Clear], "{event:?}");
        }
        let last = [Step::Journal(Phase::Refused), Step::Reply(Fate::Refused), Step::Clear];
        assert_eq!(side.on(Event::Cleared(true)), last);
        let mut side = Destination::new(Phase::Committed, false);
        assert_eq!(side.on(Event::Tried(Found::Nothing)), [Step::Reply(Fate::Committed)]);
        // An operator changes his mind.
        assert_eq!(side.on(Event::GiveUp), [Step::Clear]);
        assert_eq!(side.on(Event::RunHere), [Step::Restore]);
        assert_eq!(side.on(Event::Told(Fate::Released)), [Step::Restore]);
    }
}
