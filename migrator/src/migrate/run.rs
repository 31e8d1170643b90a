//! One migration from its pre-flight to its report, as the one who asked for it follows it.

mod copy;
mod patience;
mod stop;

use std::sync::Arc;
use std::time::Instant;

use layerfs::error::ErrorClass;
use layerfs::monitor::{Monitor, check};
use layerfs::{ChunkId, LayerId};

use super::control::Said;
use super::depart::Talk;
use super::learnt::Learnt;
use super::report::{self, Report, Stage};
use super::{HookPoint, MigrateOptions, Migrations, busy};
use crate::error::{Error, Result, chain};
use crate::guest::{Activity, Guest, GuestName, GuestState, Obstacle, Scratch, Side as GuestSide};
use crate::handover::journal::{Row, Side};
use crate::handover::source::{Event, Phase};
use crate::handover::{Fate, MoveId};
use crate::node::PushOptions;
use crate::peers::Peer;
use crate::similar::Similar;
use crate::wire::{Message, Prepare};

/// A guest's place among those that are leaving.
struct Leaving<'a>(&'a Migrations, GuestName);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.0.leaving.lock().remove(&self.1);
    }
}

impl Migrations {
    /// Moves the guest called `name` to the peer called `peer`. Blocks; not to be called where that isn't allowed.
    ///
    /// # Errors
    /// Of any kind. The message says where the guest runs; it does, unless it says that the move is in doubt.
    pub fn migrate(
        &self,
        name: &GuestName,
        peer: &str,
        options: MigrateOptions,
        monitor: Arc<dyn Monitor>,
    ) -> Result<Report> {
        if !self.0.leaving.lock().insert(name.clone()) {
            return Err(busy(format!("guest {name} is being moved already")));
        }
        let _leaving = Leaving(self, name.clone());
        let record = self.0.guests.get(name)?;
        if self.0.journal.open_of(name)?.is_some() {
            let text = format!("guest {name} has an unfinished move; see `layerctl guest resolve {name}`");
            return Err(busy(text));
        }
        if record.state != GuestState::Running {
            let text = format!("guest {name} is {}; only a running one can be migrated", record.state.as_str());
            return Err(busy(text));
        }
        let peer = self.0.runtime.block_on(self.0.node.peer(peer))?;
        let guest = self.0.drivers.guest(&record, self.0.host.clone())?;
        let id = MoveId::random()?;
        let row = Row::source(id, &record, &peer)?;
        let store = self.0.guests.store();
        let not_found = || {
            let text =
                format!("its layer's name {} is gone; `layerctl tag` gives it to the layer again", record.spec.stack);
            Error::guest("migrate", name, text)
        };
        let stack = store.name(&record.spec.stack)?.ok_or_else(not_found)?.layer;
        let report = Report::new(&id.to_string(), name.as_str(), &record.spec.driver, peer.name.as_str());
        let talk = Talk::new(self.control(peer.clone()));
        let mut run = Run {
            me: self,
            guest,
            peer,
            options,
            monitor,
            row,
            stack,
            previous: record.state_layer.as_ref().and_then(|name| store.name(name).ok()?).map(|record| record.layer),
            talk,
            report,
            began: Instant::now(),
            learnt: Learnt::default(),
            look: None,
            known: None,
            traces: Vec::new(),
        };
        run.all()
    }
}

struct Run<'a> {
    me: &'a Migrations,
    guest: Arc<dyn Guest>,
    peer: Peer,
    options: MigrateOptions,
    monitor: Arc<dyn Monitor>,
    row: Row,
    stack: LayerId,
    /// The latest state that the destination may hold.
    previous: Option<LayerId>,
    talk: Talk,
    report: Report,
    began: Instant,
    learnt: Learnt,
    /// The memory as it was looked at last, and when, in seconds since the migration began.
    look: Option<(Scratch, f64)>,
    /// What it has read of its stack, which may lie in its memory, and is there.
    known: Option<Arc<Similar>>,
    /// What is to be told of layers with the next transfer.
    traces: Vec<(LayerId, Vec<ChunkId>)>,
}

impl Run<'_> {
    fn all(&mut self) -> Result<Report> {
        let result = self.preflight();
        if self.options.dry_run || !self.report.obstacles.is_empty() {
            self.me.0.runtime.block_on(self.talk.control.close());
            result?;
            return if self.options.dry_run { self.forecast() } else { Err(self.in_the_way()) };
        }
        let result = result.and_then(|()| self.begin_move()).and_then(|()| self.copy_and_hand_over());
        let result = match result {
            Ok(()) => Ok(()),
            Err(error) => self.back_out(error),
        };
        self.me.0.runtime.block_on(self.talk.control.close());
        self.conclude(result)
    }

    fn name(&self) -> &GuestName {
        self.row.guest()
    }

    fn elapsed(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// Does `work` as a stage of the report; it returns its bytes on the wire.
    fn stage<T>(&mut self, name: &str, is_down: bool, work: impl FnOnce(&mut Self) -> Result<(T, u64)>) -> Result<T> {
        let at = self.elapsed();
        self.monitor.phase(name, None);
        let done = work(self);
        let bytes = done.as_ref().map_or(0, |(_, bytes)| *bytes);
        let seconds = self.elapsed() - at;
        self.report.bytes += bytes;
        self.report.stages.push(Stage { name: name.to_owned(), at, seconds, bytes, is_down });
        done.map(|(value, _)| value)
    }

    fn prepare_message(&self, dry_run: bool) -> Result<Message> {
        let spec =
            serde_json::to_string(&self.row.spec).map_err(|e| Error::guest("describe", self.name(), e.to_string()))?;
        if spec.len() > crate::wire::MAX_SPEC {
            return Err(Error::guest("describe", self.name(), "its options are too long to be sent"));
        }
        let (id, epoch, stack) = (self.row.id, self.row.epoch, self.stack);
        let (gives_back, post_copy) = (self.options.gives_back, self.options.post_copy);
        let mut surroundings = self.guest.surroundings()?;
        if self.options.any_kernel {
            // What isn't known isn't compared.
            surroundings.kernel = None;
        }
        let surroundings = serde_json::to_string(&surroundings).unwrap_or_default();
        let prepare = Prepare { id, epoch, dry_run, gives_back, post_copy, stack, spec, surroundings };
        Ok(Message::Prepare(Box::new(prepare)))
    }

    fn ask_to_prepare(&mut self, dry_run: bool) -> Result<Vec<Obstacle>> {
        let message = self.prepare_message(dry_run)?;
        let patience = self.me.0.timing.patience;
        match self.me.0.runtime.block_on(self.talk.control.ask(&message, patience))? {
            Message::Prepared { obstacles } => Ok(obstacles),
            other => {
                Err(Error::protocol(self.peer.name.as_str(), format!("{} as the answer to Prepare", other.kind())))
            }
        }
    }

    fn preflight(&mut self) -> Result<()> {
        self.stage("preflight", false, |run| {
            // The other side looks at its own things meanwhile.
            let guest = run.guest.clone();
            let (here, there) = std::thread::scope(|scope| {
                let here = scope.spawn(|| Ok((guest.status()?, guest.preflight(GuestSide::Source)?)));
                let there = run.ask_to_prepare(true);
                let panicked = |_| Err(Error::guest("look at", run.name(), "looking panicked"));
                (here.join().unwrap_or_else(panicked), there)
            });
            let (status, obstacles) = here?;
            if status.activity != Activity::Running {
                let text = "it doesn't run; `layerctl guest show` says what it does";
                return Err(Error::guest("migrate", run.name(), text));
            }
            run.report.memory_bytes = status.memory_bytes.unwrap_or_default();
            run.report.obstacles = obstacles;
            run.report.obstacles.extend(there?);
            let reports = report::load(run.me.0.guests.store())?;
            let (guest, driver) = (run.name().to_string(), run.row.spec.driver.clone());
            run.learnt = Learnt::from(&reports, &guest, &driver, run.report.memory_bytes);
            run.learnt.has_memory_file = run.guest.has_memory_file();
            Ok(((), 0))
        })
    }

    fn in_the_way(&self) -> Error {
        let lines = self.report.obstacles.iter().map(|obstacle| format!("{}; {}", obstacle.what, obstacle.fix));
        let text = format!("guest {} can't be moved: {}", self.name(), lines.collect::<Vec<_>>().join(" | "));
        Error::refused(ErrorClass::Unsupported, text)
    }

    /// What it would be like.
    fn forecast(&mut self) -> Result<Report> {
        let names = [self.row.spec.stack.clone()];
        let options = PushOptions { dry_run: true, paths: self.options.paths, ..PushOptions::default() };
        let monitor = self.part("ahead");
        let pushed = self.me.0.runtime.block_on(self.me.0.node.push(&names, self.peer.name.as_str(), options, monitor));
        let ahead = pushed.map_or(0, |pushed| pushed.would_send_bytes);
        let link = self.link();
        // Half of a memory is what the rest of its compression leaves, as a rule; what changes is a small part.
        let memory = self.report.memory_bytes as f64 / 2.0;
        let predicted = self.learnt.predict(memory / 50.0, self.report.memory_bytes, 0.0, link);
        self.report.bytes = ahead + memory as u64 + predicted.bytes;
        self.report.seconds = self.report.bytes as f64 / link.rate + predicted.seconds;
        self.report.predicted = Some(predicted);
        self.report.link = Some(link);
        self.report.outcome = "dry run".to_owned();
        Ok(self.report.clone())
    }

    /// From here on there is something to be taken back.
    fn begin_move(&mut self) -> Result<()> {
        if self.options.any_kernel {
            self.report.decisions.push("the destination's kernel was not compared, as was asked for".to_owned());
        }
        // Before its row, so that none has no report.
        self.me.keep(&self.report);
        self.me.write(&self.row)?;
        let obstacles = self.ask_to_prepare(false)?;
        if obstacles.is_empty() {
            return Ok(());
        }
        self.report.obstacles = obstacles;
        Err(self.in_the_way())
    }

    fn copy_and_hand_over(&mut self) -> Result<()> {
        let _announced = self.me.announce(&self.row, &self.peer);
        self.look();
        self.ahead()?;
        self.rounds()?;
        self.defer()?;
        let lazily = self.decide()?;
        self.must_be_expected()?;
        self.monitor.phase("stopping", None);
        self.me.0.hooks.run(HookPoint::BeforeStop, &self.row)?;
        check(self.monitor.as_ref())?;
        self.me.keep(&self.report);
        self.depart(Event::Stop)?;
        self.hand_over(lazily)
    }

    /// A destination that has given the guest up meanwhile is found before it stops.
    fn must_be_expected(&mut self) -> Result<()> {
        let asked = self.talk.control.inquire(self.row.id, self.me.0.timing.patience);
        let said = self.me.0.runtime.block_on(asked)?;
        if said.fate == Fate::Arriving { Ok(()) } else { Err(self.turned_down(&said)) }
    }

    /// What the destination `said` of the guest, which isn't what should be.
    fn turned_down(&self, said: &Said) -> Error {
        let why = match said.text.as_str() {
            "" if said.fate == Fate::Unknown => "it knows nothing of this move",
            "" => "it doesn't expect the guest any more",
            text => text,
        };
        Error::guest("prepare", self.name(), format!("{}: {why}", self.peer.name))
    }

    fn depart(&mut self, event: Event) -> Result<()> {
        self.me.depart(&mut self.row, event, Some(&mut self.talk))
    }

    fn phase(&self) -> Phase {
        match self.row.side {
            Side::Source { phase } => phase,
            Side::Destination { .. } => Phase::Moving,
        }
    }

    /// Something failed. Before the release the guest goes on here.
    fn back_out(&mut self, error: Error) -> Result<()> {
        if self.row.note.is_empty() {
            self.row.note = chain(&error);
        }
        self.monitor.phase("taking it back", None);
        if let Err(second) = self.depart(Event::Failed) {
            tracing::error!(guest = %self.name(), error = %second, "a migration couldn't be taken back yet");
            // Whatever failed, be it only the reading of the row. One that isn't sure of its row rests.
            if self.me.must_be_sure(&self.row).is_ok() {
                self.me.later(self.row.id);
            }
        }
        Err(error)
    }

    /// The report, and what the one who asked hears.
    fn conclude(&mut self, result: Result<()>) -> Result<Report> {
        self.report.seconds = self.elapsed();
        // Whoever died leaves what was kept before.
        #[cfg(test)]
        self.me.0.faults.alive()?;
        if let Ok(Some(row)) = self.me.0.journal.get(self.row.id) {
            self.row.side = row.side;
        }
        let (outcome, text) = self.me.outcome_of(&self.row);
        self.report.outcome = outcome.to_owned();
        if self.phase() == Phase::Gone {
            let text =
                format!("what is left of it here isn't removed yet ({}); that is tried again and again", self.row.note);
            self.monitor.warn(&text);
            self.report.decisions.push(text);
        }
        self.report.error = match &result {
            Err(error) => Some(chain(error)),
            Ok(()) => text.clone(),
        };
        self.me.keep(&self.report);
        if let Err(error) = self.me.0.journal.prune() {
            tracing::warn!(%error, "the records of old moves weren't removed");
        }
        match (result, text) {
            (Ok(()), None) => Ok(self.report.clone()),
            (Ok(()), Some(text)) => Err(Error::guest("migrate", self.name(), text)),
            (Err(error), None) => Err(error),
            (Err(error), Some(text)) => Err(Error::refused(error.class(), format!("{error}; {text}"))),
        }
    }
}
