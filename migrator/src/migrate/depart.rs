//! The source: what its machine's steps do, with or without somebody who waits for it.

use std::time::{Duration, Instant};

use layerfs::store::db::WriteError;

use super::control::{Control, Said};
use super::ground::Laid;
use super::{HookPoint, Migrations};
use crate::error::{Error, Result, chain};
use crate::guest::{Activity, Guest, GuestState, memory};
use crate::handover::journal::{Layers, Row, Side};
use crate::handover::source::{Event, Outcome, Phase, Source, Step};
use crate::handover::{Fate, MoveId};
use crate::wire::Message;

/// That an abort arrives is a courtesy: the other side asks if it doesn't.
const COURTESY: Duration = Duration::from_secs(3);
/// What is said of a guest that died before it was known from what to go on.
pub(super) const LOST: &str =
    "is lost here: it ended before its state was kept; `layerctl guest start` begins it anew from its disk";
/// What is said of one that had gone on and ended before that was written.
const ENDED: &str = "is lost here: it had gone on from its state and has ended since, and its disk is newer than that state; \
                     `layerctl guest start` begins it anew from its disk";
/// What is said of one that an operator has given up before it was released.
const GIVEN_UP: &str = "what was left of it here was given up; `layerctl guest start` begins it anew from its disk";
/// How often a guest that doesn't go on at once is told to.
const ATTEMPTS: usize = 3;

/// The conversation with the destination.
pub(super) struct Talk {
    pub control: Control,
    /// What the destination said to Commit, and when.
    pub committed: Option<(Instant, Said)>,
}

/// What came of letting it go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resumed {
    /// It goes on, or there was nothing to go on from.
    Runs,
    /// It had gone on before, which isn't on record, and has ended since.
    Over,
}

impl Talk {
    pub fn new(control: Control) -> Talk {
        Talk { control, committed: None }
    }
}

impl Migrations {
    /// Does what follows from `event`, with a connection of its own.
    pub(super) fn depart_on(&self, id: MoveId, event: Event) -> Result<()> {
        let row = self.0.journal.get(id)?;
        let mut row = row.ok_or_else(|| layerfs::Error::NotFound { what: "move", name: id.to_string() })?;
        let peer = self.0.runtime.block_on(self.other_side(&row));
        let mut talk = peer.ok().map(|peer| Talk::new(self.control(peer)));
        let done = self.depart(&mut row, event, talk.as_mut());
        if let Some(mut talk) = talk {
            self.0.runtime.block_on(talk.control.close());
        }
        done
    }

    /// Does what follows from `event`. Without `talk` the destination is as if it were out of reach.
    pub(super) fn depart(&self, row: &mut Row, event: Event, mut talk: Option<&mut Talk>) -> Result<()> {
        let lock = self.lock_of(row.guest());
        let _held = lock.lock();
        self.must_be_sure(row)?;
        // Somebody else may have had the lock.
        if let Some(now) = self.0.journal.get(row.id)? {
            row.side = now.side;
        }
        let Side::Source { phase } = row.side else {
            return Err(Error::protocol(&row.peer, "it asks the destination to be the source"));
        };
        // It isn't brought back from a state that it has left behind, nor ended: only the row is missing.
        let event = match event {
            Event::Failed | Event::Restarted | Event::RunHere | Event::GiveUp
                if self.0.awake.lock().contains(&row.id) =>
            {
                Event::Resumed
            }
            event => event,
        };
        let mut machine = Source::new(phase);
        let mut todo = machine.on(event);
        while !todo.is_empty() {
            #[cfg(test)]
            self.0.faults.alive()?;
            let next = match todo.remove(0) {
                Step::Journal(phase) => {
                    match self.step(row, phase) {
                        Ok(()) => None,
                        // The guest is still ours.
                        Err(WriteError::NotWritten(error)) if phase == Phase::Released => {
                            row.note = chain(&error);
                            machine = Source::new(Phase::Stopping);
                            todo.clear();
                            Some(Event::Failed)
                        }
                        Err(error) => return Err(self.unwritten(row.id, error)),
                    }
                }
                Step::Resume => {
                    let resumed = self.again(row, Self::resume)?;
                    self.0.awake.lock().insert(row.id);
                    self.forget_ground(row);
                    self.note_lost(row, resumed);
                    Some(Event::Resumed)
                }
                Step::Discard => match self.again(row, Self::discard) {
                    Ok(()) => Some(Event::Discarded),
                    // The guest is the destination's: that something of it is left here is no failure of the move.
                    Err(error) if machine.phase == Phase::Gone => {
                        row.note = chain(&error);
                        None
                    }
                    Err(error) => return Err(error),
                },
                Step::End => {
                    self.again(row, Self::end)?;
                    row.note = GIVEN_UP.to_owned();
                    Some(Event::Ended)
                }
                Step::Abort => {
                    self.say_abort(row, talk.as_deref_mut());
                    None
                }
                Step::Commit => Some(self.commit(row, talk.as_deref_mut())),
                Step::AskLater => {
                    self.later(row.id);
                    None
                }
            };
            if let Some(event) = next {
                todo.extend(machine.on(event));
            }
        }
        Ok(())
    }

    /// Makes it durable that `phase` holds, and does what comes with it and may fail without harm.
    ///
    /// # Errors
    /// That it couldn't be written; `row` is as before then.
    fn step(&self, row: &mut Row, phase: Phase) -> Result<(), WriteError> {
        // Before it stops a state of it is none of this move's.
        let had_stopped = !matches!(row.side, Side::Source { phase: Phase::Moving });
        // As long as the move isn't over nothing else writes one.
        if phase.is_ended()
            && had_stopped
            && let Err(error) = self.0.host.remove_scratches(row.guest())
        {
            tracing::warn!(guest = %row.guest(), %error, "a state that nobody needs wasn't removed");
        }
        let before = std::mem::replace(&mut row.side, Side::Source { phase });
        if let Err(error) = self.write(row) {
            row.side = before;
            return Err(error);
        }
        if phase.is_ended() {
            self.0.awake.lock().remove(&row.id);
            self.forget_ground(row);
        }
        let point = match phase {
            Phase::Ended(Outcome::Aborted | Outcome::Returned) => HookPoint::Abort,
            Phase::Ended(Outcome::Moved) => HookPoint::AfterLeave,
            Phase::Gone | Phase::Ended(Outcome::GivenUp) => {
                self.note_end(row);
                return Ok(());
            }
            _ => return Ok(()),
        };
        if point == HookPoint::Abort && self.is_absent(row) {
            let updated = self.0.guests.update(row.guest(), |record| {
                record.state = GuestState::Created;
                Ok(())
            });
            if let Err(error) = updated {
                tracing::warn!(guest = %row.guest(), %error, "that nothing of it runs wasn't recorded");
            }
        }
        self.note_end(row);
        if let Err(error) = self.0.hooks.run(point, row) {
            tracing::warn!(guest = %row.guest(), %error, "a hook failed");
        }
        Ok(())
    }

    /// Says so if nothing of it is left to go on.
    fn note_lost(&self, row: &mut Row, resumed: Resumed) {
        if self.is_absent(row) {
            let why = if resumed == Resumed::Over { ENDED } else { LOST };
            tracing::error!(guest = %row.guest(), "it {why}");
            let before = if row.note.is_empty() { String::new() } else { format!(" ({})", row.note) };
            row.note = format!("it {why}{before}");
        }
    }

    /// Whether it is known that nothing of it is here.
    fn is_absent(&self, row: &Row) -> bool {
        let status = self.guest_of(row).and_then(|guest| guest.status());
        status.is_ok_and(|status| status.activity == Activity::Absent)
    }

    /// Tries something several times, and leaves it to the background if it doesn't work.
    fn again<T>(&self, row: &mut Row, work: fn(&Migrations, &Row) -> Result<T>) -> Result<T> {
        let mut tries = 1;
        loop {
            match work(self, row) {
                Ok(done) => return Ok(done),
                Err(error) if tries >= ATTEMPTS => {
                    tracing::error!(guest = %row.guest(), %error, "a guest's move can't be finished now; it is tried again");
                    self.later(row.id);
                    return Err(error);
                }
                Err(_) => tries += 1,
            }
        }
    }

    pub(super) fn guest_of(&self, row: &Row) -> Result<std::sync::Arc<dyn Guest>> {
        self.0.drivers.guest(&self.0.guests.get(row.guest())?, self.0.host.clone())
    }

    /// Lets it go on: from its frozen copy, or from its state if that can't, or died with the machine.
    fn resume(&self, row: &Row) -> Result<Resumed> {
        let guest = self.guest_of(row)?;
        let activity = guest.status()?.activity;
        if activity != Activity::Absent {
            self.forget_ground(row);
        }
        match activity {
            Activity::Running => guest.resume()?,
            Activity::Frozen => match (self.wake(row, &*guest), row.layers) {
                // It has never gone on: the state is as good as it was.
                (Err(error), Some(layers)) if guest.status()?.activity == Activity::Frozen => {
                    tracing::warn!(guest = %row.guest(), %error, "a frozen copy can't go on; its state is taken instead");
                    guest.discard()?;
                    self.is_untouched(row);
                    self.may_be_spoilt(row);
                    return self.take_back(row, layers, &*guest);
                }
                (resumed, _) => resumed?,
            },
            Activity::Absent => {
                return row.layers.map_or(Ok(Resumed::Runs), |layers| self.take_back(row, layers, &*guest));
            }
        }
        Ok(Resumed::Runs)
    }

    /// Lets its frozen copy go on, unless the mount below it has ended and there is a state to begin with anew.
    fn wake(&self, row: &Row, guest: &dyn Guest) -> Result<()> {
        if row.layers.is_some() && !guest.has_its_root() {
            return Err(Error::guest("resume", row.guest(), "the mount of its root has ended"));
        }
        guest.resume()
    }

    /// Lets it go on from the layers that it was to move with, unless it has done so before.
    fn take_back(&self, row: &Row, layers: Layers, guest: &dyn Guest) -> Result<Resumed> {
        if self.lay_ground(row, layers)? == Laid::Newer {
            return Ok(Resumed::Over);
        }
        let restored = self.restore_from(row, layers, guest);
        if restored.is_err() {
            let is_gone = guest.status().is_ok_and(|status| status.activity == Activity::Absent);
            if !is_gone || !self.may_be_spoilt(row) {
                self.forget_ground(row);
            }
        }
        restored?;
        self.forget_ground(row);
        self.0.host.close_layer(row.guest())?;
        Ok(Resumed::Runs)
    }

    fn restore_from(&self, row: &Row, layers: Layers, guest: &dyn Guest) -> Result<()> {
        self.0.host.mount(row.guest(), layers.instance)?;
        self.0.host.close_layer(row.guest())?;
        let path = self.0.host.open_layer(row.guest(), layers.state)?;
        memory::restore(guest, self.0.guests.store(), (layers.state, &path), None)
    }

    /// Removes what is left of it here.
    fn discard(&self, row: &Row) -> Result<()> {
        let guest = self.guest_of(row)?;
        guest.discard()?;
        self.must_be_absent(row, &*guest)?;
        self.0.host.unmount(row.guest(), true)
    }

    /// Ends what is left of it here; its disk stays.
    fn end(&self, row: &Row) -> Result<()> {
        let guest = self.guest_of(row)?;
        guest.stop()?;
        self.must_be_absent(row, &*guest)
    }

    fn must_be_absent(&self, row: &Row, guest: &dyn Guest) -> Result<()> {
        if guest.status()?.activity != Activity::Absent {
            return Err(Error::guest("remove what is left of", row.guest(), "something of it is still here"));
        }
        // One that came here by post-copy, or was being taken back, has kept its state open.
        self.0.host.close_layer(row.guest())
    }

    fn say_abort(&self, row: &Row, talk: Option<&mut Talk>) {
        let Some(talk) = talk else { return };
        let said = self.0.runtime.block_on(talk.control.fate(&Message::Abort { id: row.id }, COURTESY));
        if let Err(error) = said {
            tracing::info!(guest = %row.guest(), %error, "the destination doesn't know yet that the guest stays");
        }
    }

    fn commit(&self, row: &mut Row, talk: Option<&mut Talk>) -> Event {
        let Some(talk) = talk else { return Event::Silence };
        #[cfg(test)]
        if self.0.faults.alive().is_err() {
            return Event::Silence;
        }
        let message = Message::Commit { id: row.id };
        match self.0.runtime.block_on(talk.control.fate(&message, self.0.timing.commit_patience)) {
            // What it has staged was told it; that it still only has that is no answer.
            Ok(said) if said.fate == Fate::Staged => Event::Silence,
            Ok(said) => {
                row.note = said.text.clone();
                let fate = said.fate;
                talk.committed = Some((Instant::now(), said));
                Event::Told(fate)
            }
            Err(error) => {
                row.note = chain(&error);
                tracing::warn!(guest = %row.guest(), %error, "the destination hasn't said whether the guest runs there");
                Event::Silence
            }
        }
    }
}
