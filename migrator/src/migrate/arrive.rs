//! The destination: prepares what can fail, restores what it was given, gives back what it can't.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use layerfs::error::ErrorClass;
use layerfs::manifest::Manifest;
use tokio::task::spawn_blocking;

use super::ground::{Laid, WENT_ON};
use super::memory::must_fit;
use super::{Arrival, HookPoint, Migrations, busy};
use crate::error::{Error, Result};
use crate::guest::{
    Activity, Guest, GuestRecord, GuestSpec, GuestState, Manner, Obstacle, Side as GuestSide, Surroundings, memory,
    network_refusal,
};
use crate::handover::destination::{Destination, Event, Found, Phase, Step};
use crate::handover::journal::{Layers, MAX_EPOCH, Row, Side};
use crate::handover::{Fate, MoveId};
use crate::peers::{Peer, Visible};
use crate::send::joined;
use crate::wire::{Message, Prepare};

/// What came of a restore that didn't fail.
enum Tried {
    /// It runs; with what is worth a word all the same.
    Runs(Option<String>),
    /// It has gone on before, and has ended: it can't be restored any more.
    WentOn,
}

/// What came of an event.
#[derive(Clone, Debug)]
pub(super) struct Came {
    pub fate: Fate,
    /// How long the step took that matters to the source.
    pub took: Duration,
    pub text: String,
}

impl Migrations {
    /// Answers a request of `peer` about a guest.
    pub(crate) async fn serve(&self, peer: &Peer, message: Message) -> Result<Message> {
        let starts = matches!(message, Message::Prepare(_) | Message::Stage { .. } | Message::Commit { .. });
        if starts && !(peer.rights.guests && peer.rights.visible == Visible::All) {
            let message = format!(
                "this key may not move guests to this host; its operator can allow it: `layerctl peer set {} \
                 --allow-guests`, and all names",
                peer.name
            );
            return Err(Error::refused(ErrorClass::Denied, message));
        }
        let (me, peer) = (self.clone(), peer.clone());
        let answered = joined(spawn_blocking(move || me.answer(&peer, message)).await);
        #[cfg(test)]
        self.0.faults.alive()?;
        answered
    }

    fn answer(&self, peer: &Peer, message: Message) -> Result<Message> {
        #[cfg(test)]
        self.0.faults.alive()?;
        let (id, event, layers) = match message {
            Message::Prepare(prepare) => return self.prepare(peer, &prepare),
            Message::Stage { id, instance, state, lazily } => {
                (id, Some(Event::Stage), Some(Layers { instance, state, lazily }))
            }
            Message::Commit { id } => (id, Some(Event::Commit), None),
            Message::Abort { id } => (id, Some(Event::Abort), None),
            Message::Inquire { id } => (id, None, None),
            other => return Err(Error::protocol(peer.name.as_str(), format!("{} as a request", other.kind()))),
        };
        let Some(row) = self.0.journal.get(id)?.filter(|row| row.is_with(peer)) else {
            return Ok(Message::fate(Fate::Unknown, 0, ""));
        };
        self.must_be_sure(&row)?;
        if let Some(arrival) = self.0.arriving.lock().get_mut(&id) {
            arrival.heard = Instant::now();
        }
        let is_destination = matches!(row.side, Side::Destination { .. });
        // A question is answered at once from the journal, also while a restore takes its time.
        let Some(event) = event.filter(|_| is_destination) else {
            return Ok(Message::fate(row.fate(), 0, row.note));
        };
        let came = self.arrive_with(id, event, layers)?;
        Ok(Message::fate(came.fate, came.took.as_micros() as u64, came.text))
    }

    fn prepare(&self, peer: &Peer, prepare: &Prepare) -> Result<Message> {
        let spec: GuestSpec = serde_json::from_str(&prepare.spec)
            .map_err(|e| Error::protocol(peer.name.as_str(), format!("a guest's description: {e}")))?;
        if prepare.epoch > MAX_EPOCH {
            return Err(Error::protocol(peer.name.as_str(), format!("epoch {} of guest {}", prepare.epoch, spec.name)));
        }
        let lock = self.lock_of(&spec.name);
        let _held = lock.lock();
        if let Some(row) = self.0.journal.get(prepare.id)? {
            let is_same = row.is_with(peer) && row.spec == spec && row.fate() == Fate::Arriving;
            let over = || busy(format!("the move {} of guest {} is further already", prepare.id, spec.name));
            return if is_same { Ok(Message::prepared(Vec::new())) } else { Err(over()) };
        }
        if !prepare.dry_run {
            self.forget_older(peer, &spec)?;
        }
        if !prepare.dry_run && self.0.journal.open_of(&spec.name)?.is_some() {
            let message = format!(
                "guest {0} has an unfinished move at the destination; there: `layerctl guest resolve {0}`",
                spec.name
            );
            return Err(busy(message));
        }
        let known = self.0.guests.find(&spec.name)?;
        let obstacles = self.obstacles(prepare, &spec, known.as_ref())?;
        if prepare.dry_run || !obstacles.is_empty() {
            return Ok(Message::prepared(obstacles));
        }
        let was_known = known.is_some();
        let mut row = Row::destination(prepare.id, spec, peer, prepare.epoch, prepare.gives_back);
        row.side = Side::Destination { phase: Phase::Arriving, gives_back: prepare.gives_back, was_known };
        // A guest that was made here meanwhile isn't the one that was looked at.
        self.write_over(&row, known.as_ref())?;
        let machine = Destination::new(Phase::Arriving, prepare.gives_back);
        let kept = Some(self.keep_memory(row.guest()));
        let arrival = Arrival { machine, opened: None, heard: Instant::now(), kept, memory: None };
        self.0.arriving.lock().insert(row.id, arrival);
        self.watch_lease(prepare.id);
        Ok(Message::prepared(Vec::new()))
    }

    /// A source has one move of a guest at a time: that it prepares another says that it runs on what the last one left.
    fn forget_older(&self, peer: &Peer, spec: &GuestSpec) -> Result<()> {
        let older = self.0.journal.open_of(&spec.name)?;
        match older.filter(|row| row.is_with(peer) && matches!(row.side, Side::Destination { .. })) {
            Some(row) => self.arrive_locked(row.id, Event::Abort, None).map(drop),
            None => Ok(()),
        }
    }

    fn obstacles(&self, prepare: &Prepare, spec: &GuestSpec, known: Option<&GuestRecord>) -> Result<Vec<Obstacle>> {
        let mut found = Vec::new();
        let name = &spec.name;
        match known {
            Some(record) if record.epoch >= prepare.epoch => {
                let what = format!("the destination knows guest {name} in a later epoch ({})", record.epoch);
                found
                    .push(Obstacle::new(what, "this copy is old and must not run; remove it: `layerctl guest remove`"));
            }
            Some(record) if !matches!(record.state, GuestState::Away) => {
                let what = format!("the destination has a guest called {name}, which is {}", record.state.as_str());
                found.push(Obstacle::new(what, format!("there: `layerctl guest remove {name}`, if it isn't needed")));
            }
            _ => {}
        }
        let named = self.0.guests.store().name(&spec.stack)?;
        if named.is_some_and(|record| record.layer != prepare.stack) {
            let what = format!("the name {} stands for another layer at the destination", spec.stack);
            found.push(Obstacle::new(
                what,
                format!("there: `layerctl tag {0} OTHER-NAME` and `layerctl remove {0}`", spec.stack),
            ));
        }
        let record = GuestRecord { epoch: prepare.epoch, ..GuestRecord::new(spec.clone()) };
        match self.0.drivers.guest(&record, self.0.host.clone()) {
            Ok(guest) => {
                found.extend(guest.preflight(if prepare.post_copy {
                    GuestSide::PostCopy
                } else {
                    GuestSide::Destination
                })?);
                // What isn't understood isn't compared: it may be of a later version.
                let mut there: Surroundings = serde_json::from_str(&prepare.surroundings).unwrap_or_default();
                if prepare.post_copy {
                    // It takes what it touches, when it does.
                    there.memory = None;
                }
                found.extend(guest.surroundings()?.lacks(&there));
            }
            Err(error) => found.push(Obstacle::new(error.to_string(), "use a driver that the destination has")),
        }
        Ok(found)
    }

    /// Does what follows from `event`.
    pub(super) fn arrive_on(&self, id: MoveId, event: Event) -> Result<Came> {
        self.arrive_with(id, event, None)
    }

    fn arrive_with(&self, id: MoveId, event: Event, layers: Option<Layers>) -> Result<Came> {
        let row = self.row(id)?;
        let lock = self.lock_of(row.guest());
        let _held = lock.lock();
        self.arrive_locked(id, event, layers)
    }

    fn row(&self, id: MoveId) -> Result<Row> {
        let row = self.0.journal.get(id)?;
        Ok(row.ok_or_else(|| layerfs::Error::NotFound { what: "move", name: id.to_string() })?)
    }

    fn arrive_locked(&self, id: MoveId, event: Event, layers: Option<Layers>) -> Result<Came> {
        let mut row = self.row(id)?;
        self.must_be_sure(&row)?;
        let Side::Destination { phase, gives_back, .. } = row.side else {
            return Err(Error::protocol(&row.peer, "it asks the source to be the destination"));
        };
        // It isn't ended when only the row is missing, unless the source has taken it back.
        let event = match event {
            Event::GiveUp if phase == Phase::Committed && self.0.awake.lock().contains(&id) => {
                Event::Tried(Found::Running)
            }
            event => event,
        };
        let known = self.0.arriving.lock().remove(&id);
        let mut arrival = known.filter(|known| known.machine.phase == phase).unwrap_or_else(|| Arrival {
            machine: Destination::new(phase, gives_back),
            opened: None,
            heard: Instant::now(),
            kept: None,
            memory: None,
        });
        match (layers, row.layers) {
            (Some(new), Some(old)) if phase != Phase::Arriving && new != old => {
                return Err(Error::protocol(&row.peer, "it stages other layers than before"));
            }
            (Some(new), _) => row.layers = Some(new),
            (None, _) => {}
        }
        if let Some(why) = self.why_not(phase, event, &row) {
            row.note = why;
        }
        let came = self.arrive_steps(&mut row, &mut arrival, event);
        if let (Side::Destination { phase, .. }, false) = (&row.side, row.is_ended()) {
            // It may be ahead of a row that couldn't be written.
            arrival.machine.phase = *phase;
            self.0.arriving.lock().insert(id, arrival);
        }
        came
    }

    fn arrive_steps(&self, row: &mut Row, arrival: &mut Arrival, event: Event) -> Result<Came> {
        let mut came = Came { fate: row.fate(), took: Duration::ZERO, text: String::new() };
        let mut todo = arrival.machine.on(event);
        while !todo.is_empty() {
            #[cfg(test)]
            self.0.faults.alive()?;
            let began = Instant::now();
            let next = match todo.remove(0) {
                Step::Journal(phase) => {
                    self.reach(row, phase)?;
                    match phase {
                        // Nothing is restored before that is written.
                        Phase::Committed => self.is_untouched(row),
                        Phase::Restored => self.note_absence(row),
                        _ => {}
                    }
                    self.told(row, phase);
                    None
                }
                Step::Make => {
                    let made = self.make(row, arrival);
                    came.took = began.elapsed();
                    Some(Event::Made(self.note(row, made)))
                }
                Step::Restore => {
                    // It isn't brought back from a state that it has left behind: only the row is missing.
                    let is_awake = self.0.awake.lock().contains(&row.id);
                    let before = row.note.clone();
                    let found = if is_awake { Found::Running } else { self.restore(row, arrival, event) };
                    match found {
                        Found::Running => drop(self.0.awake.lock().insert(row.id)),
                        // Somebody who decides has to find it on record.
                        Found::WentOn if row.note != before => {
                            tracing::error!(guest = %row.guest(), "{}", row.note);
                            self.write(row).map_err(|error| self.unwritten(row.id, error))?;
                        }
                        _ => {}
                    }
                    came.took = began.elapsed();
                    Some(Event::Tried(found))
                }
                Step::Clear => {
                    // What comes after this may be restored anew.
                    self.0.awake.lock().remove(&row.id);
                    let cleared = self.clear(row, arrival);
                    match &cleared {
                        Ok(()) => self.forget_ground(row),
                        Err(error) => {
                            tracing::warn!(guest = %row.guest(), %error, "what is left of a guest couldn't be removed yet");
                        }
                    }
                    Some(Event::Cleared(cleared.is_ok()))
                }
                Step::Reply(fate) => {
                    (came.fate, came.text) = (fate, row.note.clone());
                    None
                }
                Step::AskLater | Step::AgainLater => {
                    self.later(row.id);
                    None
                }
            };
            if let Some(event) = next {
                let mut steps = arrival.machine.on(event);
                steps.append(&mut todo);
                todo = steps;
            }
        }
        Ok(came)
    }

    /// Makes it durable that `phase` holds. If that fails `row` is as before.
    fn reach(&self, row: &mut Row, phase: Phase) -> Result<()> {
        let before = row.side.clone();
        if let Side::Destination { phase: now, .. } = &mut row.side {
            *now = phase;
        }
        self.write(row).map_err(|error| {
            row.side = before;
            self.unwritten(row.id, error)
        })?;
        if phase.is_ended() {
            self.0.awake.lock().remove(&row.id);
            self.forget_ground(row);
        }
        Ok(())
    }

    /// Puts on record that nothing of it runs, if that is so: one that has gone on may have ended before its row was written.
    fn note_absence(&self, row: &Row) {
        let status = self.guest(row).and_then(|guest| guest.status());
        if !status.is_ok_and(|status| status.activity == Activity::Absent) {
            return;
        }
        // An earlier program may have opened it.
        let _ = self.0.host.close_layer(row.guest());
        let updated = self.0.guests.update(row.guest(), |record| {
            record.state = GuestState::Created;
            Ok(())
        });
        if let Err(error) = updated {
            tracing::warn!(guest = %row.guest(), %error, "that nothing of it runs wasn't recorded");
        }
    }

    /// What a source is told that comes too late, if `event` ends the move.
    fn why_not(&self, phase: Phase, event: Event, row: &Row) -> Option<String> {
        let seconds = self.0.timing.lease.as_secs();
        match (phase, event) {
            (Phase::Arriving, Event::Expired) => Some(format!(
                "nothing was heard of {} for {seconds} s, so the guest wasn't expected any more",
                row.peer
            )),
            (Phase::Arriving, Event::Restarted) => {
                Some("the daemon was started anew while it was on its way".to_owned())
            }
            (Phase::Arriving | Phase::Staged | Phase::Committed, Event::GiveUp) => {
                Some("an operator gave it up there".to_owned())
            }
            _ => None,
        }
    }

    /// Keeps why something failed; says whether it didn't.
    fn note(&self, row: &mut Row, result: Result<()>) -> bool {
        match result {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(guest = %row.guest(), %error, "a guest can't be taken");
                row.note = crate::error::chain(&error);
                false
            }
        }
    }

    /// What comes with a phase and may fail without harm.
    fn told(&self, row: &Row, phase: Phase) {
        let point = match phase {
            Phase::Restored => HookPoint::AfterRestore,
            Phase::Refused => HookPoint::Abort,
            _ => return,
        };
        if let Err(error) = self.0.hooks.run(point, row) {
            tracing::warn!(guest = %row.guest(), %error, "a hook failed");
        }
    }

    fn guest(&self, row: &Row) -> Result<std::sync::Arc<dyn Guest>> {
        let record = self.0.guests.get(row.guest())?;
        self.0.drivers.guest(&GuestRecord { spec: row.spec.clone(), ..record }, self.0.host.clone())
    }

    /// All that can fail before the restore.
    fn make(&self, row: &Row, arrival: &mut Arrival) -> Result<()> {
        let layers = row.layers.ok_or_else(|| Error::guest("stage", row.guest(), "no layers are known"))?;
        let store = self.0.guests.store();
        for (part, layer) in [("instance", layers.instance), ("state", layers.state)] {
            let name = row.guest().layer(part)?;
            if store.name(&name)?.map(|record| record.layer) != Some(layer) {
                return Err(layerfs::Error::LayerMissing(layer).into());
            }
            let mut next = Some(layer);
            while let Some(layer) = next {
                if store.partial(layer).is_some() && !layers.lazily {
                    return Err(layerfs::Error::LayerMissing(layer).into());
                }
                next = Manifest::load(store.as_ref(), layer)?.parent;
            }
        }
        match network_refusal(store, layers.state) {
            Ok(None) => {}
            Ok(Some(why)) => return Err(Error::guest("restore", row.guest(), why)),
            // Not all of it needs to be here.
            Err(error) if layers.lazily => tracing::debug!(guest = %row.guest(), %error, "a state isn't looked at yet"),
            Err(error) => return Err(error),
        }
        self.open(row, layers, arrival)?;
        if let Some(kept) = arrival.kept.take().filter(|_| !layers.lazily) {
            arrival.memory = kept.lock().finish(store, layers.state);
        }
        self.must_fit(row, layers, arrival)?;
        self.0.hooks.run(HookPoint::BeforeRestore, row)
    }

    /// Fails if there is less memory than the guest has, all of which is to be read first: who takes more has others ended.
    fn must_fit(&self, row: &Row, layers: Layers, arrival: &Arrival) -> Result<()> {
        match layers.lazily {
            true => Ok(()),
            false => {
                must_fit(&*self.0.host, self.0.guests.store(), (row.guest(), layers.state), arrival.memory.as_ref())
            }
        }
    }

    fn open(&self, row: &Row, layers: Layers, arrival: &mut Arrival) -> Result<PathBuf> {
        let name = row.guest();
        self.0.host.mount(name, layers.instance)?;
        if let Some(path) = &arrival.opened {
            return Ok(path.clone());
        }
        // What another process has opened is opened anew.
        self.0.host.close_layer(name)?;
        let path = self.0.host.open_layer(name, layers.state)?;
        arrival.opened = Some(path.clone());
        Ok(path)
    }

    fn restore(&self, row: &mut Row, arrival: &mut Arrival, event: Event) -> Found {
        let error = match self.try_restore(row, arrival, event) {
            Ok(Tried::Runs(remark)) => {
                // Nothing has failed, but who asks why it took so long is told.
                row.note = remark.unwrap_or_default();
                self.forget_ground(row);
                self.close(row, arrival);
                return Found::Running;
            }
            Ok(Tried::WentOn) => {
                row.note = format!(
                    "it {WENT_ON}: `layerctl guest resolve` with --run-here leaves it here, where `layerctl guest start` begins it anew from \
                     that disk; with --give-up it goes on at {} as it was when it stopped there",
                    row.peer
                );
                return Found::WentOn;
            }
            Err(error) => error,
        };
        self.note(row, Err(error));
        let looked = self.guest(row).and_then(|guest| guest.status());
        match looked.map(|status| status.activity) {
            // Of one that may have gone on before nothing is known without its disk: it isn't given back.
            Ok(Activity::Absent) if self.may_be_spoilt(row) => Found::Nothing,
            Ok(Activity::Running) => {
                self.forget_ground(row);
                self.close(row, arrival);
                Found::Running
            }
            _ => {
                self.forget_ground(row);
                Found::Unknown
            }
        }
    }

    /// Lets it go on, as follows from `event`.
    fn try_restore(&self, row: &Row, arrival: &mut Arrival, event: Event) -> Result<Tried> {
        let guest = self.guest(row)?;
        match guest.status()?.activity {
            Activity::Running => return Ok(Tried::Runs(None)),
            Activity::Frozen if guest.has_run()? => {
                guest.resume()?;
                return Ok(Tried::Runs(None));
            }
            // A restore that was cut off half-way: it has never answered anybody.
            Activity::Frozen => guest.discard()?,
            Activity::Absent => {}
        }
        let layers = row.layers.ok_or_else(|| Error::guest("restore", row.guest(), "no layers are known"))?;
        match self.lay_ground(row, layers)? {
            Laid::AsItWas => {}
            Laid::Anew => self.furnish(row, layers)?,
            Laid::Newer => return Ok(Tried::WentOn),
        }
        if let Err(error) = self.must_fit(row, layers, arrival) {
            // It is this host's: what is only an estimate keeps it from running here as long as another host waits for it, and not from
            // running at all. An operator who wants it here may do so because there is no other host any more.
            if arrival.machine.gives_back && event != Event::RunHere {
                return Err(error);
            }
            tracing::warn!(guest = %row.guest(), %error, "a guest that is not given back is restored all the same");
        }
        let path = self.open(row, layers, arrival)?;
        let mut remark = None;
        if layers.lazily {
            match guest.restore(&path, Manner::Lazily) {
                Ok(()) => return Ok(Tried::Runs(None)),
                Err(error) if guest.status()?.activity == Activity::Absent => {
                    tracing::warn!(guest = %row.guest(), %error, "restoring it lazily failed; all of it is read first");
                    remark = Some(format!(
                        "its memory was read before it went on, as that failed lazily: {}",
                        crate::error::chain(&error)
                    ));
                    self.may_be_spoilt(row);
                    self.lay_ground(row, layers)?;
                    self.furnish(row, layers)?;
                }
                Err(error) => return Err(error),
            }
        }
        match layers.lazily {
            // Not all of it is here: what is missing comes through the mount.
            true => guest.restore(&path, Manner::Whole)?,
            false => memory::restore(&*guest, self.0.guests.store(), (layers.state, &path), arrival.memory.take())?,
        }
        Ok(Tried::Runs(remark))
    }

    /// Mounts its root, which was made anew, and has hooks do to it what they did to the one before.
    fn furnish(&self, row: &Row, layers: Layers) -> Result<()> {
        let furnished = self.0.host.mount(row.guest(), layers.instance).map(drop);
        let furnished = furnished.and_then(|()| self.0.hooks.run(HookPoint::BeforeRestore, row));
        // Else it would be taken for one that they have been at.
        if furnished.is_err() {
            self.may_be_spoilt(row);
        }
        furnished
    }

    /// Closes the state of a guest that runs. One that came lazily may still be reading: then it stays open until the guest goes.
    fn close(&self, row: &Row, arrival: &mut Arrival) {
        if row.layers.is_some_and(|layers| !layers.lazily) {
            let _ = self.0.host.close_layer(row.guest());
            arrival.opened = None;
        }
    }

    /// Sees to it that nothing of it runs, and removes its mounts.
    fn clear(&self, row: &Row, arrival: &mut Arrival) -> Result<()> {
        if let Ok(record) = self.0.guests.get(row.guest()) {
            let record = GuestRecord { spec: row.spec.clone(), ..record };
            let guest = self.0.drivers.guest(&record, self.0.host.clone())?;
            guest.stop()?;
            if guest.status()?.activity != Activity::Absent {
                return Err(Error::guest("stop", row.guest(), "something of it is still here"));
            }
        }
        self.0.host.close_layer(row.guest())?;
        arrival.opened = None;
        self.0.host.unmount(row.guest(), true)
    }
}
