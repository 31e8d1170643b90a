//! One migration from its pre-flight to its report, as the one who asked for it follows it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::attr::Time;
use layerfs::error::ErrorClass;
use layerfs::monitor::{Monitor, check};
use layerfs::store::Expect;
use layerfs::{LayerId, LayerName};

use super::depart::Talk;
use super::plan::{self, Downtime, Learnt, LinkSpeed, Round};
use super::report::{self, Report, Stage};
use super::{Ahead, HookPoint, MigrateOptions, Migrations, Rounds, busy, inhibit};
use crate::error::{Error, Result, chain};
use crate::governor::Priority;
use crate::guest::{Activity, Guest, GuestName, GuestState, Obstacle, Side as GuestSide, state};
use crate::handover::journal::{Layers, Row, Side};
use crate::handover::source::{Event, Outcome, Phase};
use crate::handover::{Fate, MoveId};
use crate::node::{Manner, PushOptions};
use crate::peers::Peer;
use crate::progress::TransferReport;
use crate::retry::RetryFor;
use crate::wire::{Message, Prepare};

/// What is assumed of a link that was never measured, in bytes per second.
const UNKNOWN_RATE: f64 = 12.5e6;
/// A transfer tells the link's rate if it was so large, in bytes.
const TELLING: u64 = 512 * 1024;
/// Post-copy is worth it if it saves so many seconds.
const POST_COPY_SECONDS: f64 = 0.3;
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Says in front of each phase which part of the migration it belongs to.
struct Part {
    inner: Arc<dyn Monitor>,
    label: String,
    /// Beyond the release nothing is cancelled.
    may_cancel: bool,
}

impl Monitor for Part {
    fn phase(&self, name: &str, total_bytes: Option<u64>) {
        self.inner.phase(&format!("{}: {name}", self.label), total_bytes);
    }
    fn advance(&self, bytes: u64) {
        self.inner.advance(bytes);
    }
    fn items(&self, count: u64) {
        self.inner.items(count);
    }
    fn warn(&self, message: &str) {
        self.inner.warn(message);
    }
    fn is_cancelled(&self) -> bool {
        self.may_cancel && self.inner.is_cancelled()
    }
}

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
        let row = Row::source(id, &record, peer.name.as_str());
        let store = self.0.guests.store();
        let not_found = || layerfs::Error::NotFound { what: "layer", name: record.spec.stack.to_string() };
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
            previous: record.state_layer.and_then(|name| store.name(&name).ok()?).map(|record| record.layer),
            talk,
            report,
            began: Instant::now(),
            learnt: Learnt::default(),
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
        let (id, epoch, gives_back) = (self.row.id, self.row.epoch, self.options.gives_back);
        Ok(Message::Prepare(Prepare { id, epoch, dry_run, gives_back, stack: self.stack, spec }))
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
            let status = run.guest.status()?;
            if status.activity != Activity::Running {
                let text = "it doesn't run; `layerctl guest show` says what it does";
                return Err(Error::guest("migrate", run.name(), text));
            }
            run.report.memory_bytes = status.memory_bytes.unwrap_or_default();
            run.report.obstacles = run.guest.preflight(GuestSide::Source)?;
            let there = run.ask_to_prepare(true)?;
            run.report.obstacles.extend(there);
            let reports = report::load(run.me.0.guests.store())?;
            let (guest, driver) = (run.name().to_string(), run.row.spec.driver.clone());
            run.learnt = Learnt::from(&reports, &guest, &driver, run.report.memory_bytes);
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
        self.me.write(&self.row)?;
        let obstacles = self.ask_to_prepare(false)?;
        if obstacles.is_empty() {
            return Ok(());
        }
        self.report.obstacles = obstacles;
        Err(self.in_the_way())
    }

    fn copy_and_hand_over(&mut self) -> Result<()> {
        self.ahead()?;
        self.rounds()?;
        self.defer()?;
        let lazily = self.decide()?;
        self.monitor.phase("stopping", None);
        self.me.0.hooks.run(HookPoint::BeforeStop, &self.row)?;
        check(self.monitor.as_ref())?;
        self.depart(Event::Stop)?;
        self.hand_over(lazily)
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

    fn part(&self, label: &str) -> Arc<dyn Monitor> {
        let (inner, label) = (self.monitor.clone(), label.to_owned());
        Arc::new(Part { inner, label, may_cancel: true })
    }

    fn push(&mut self, label: &str, names: &[LayerName], is_down: bool, lazy: bool) -> Result<TransferReport> {
        let mut paths = self.options.paths;
        if is_down {
            paths.retry_for = Some(RetryFor::Time(self.me.0.timing.frozen_patience));
        }
        let manner = match is_down {
            true => Manner { priority: Priority::High, ..Manner::default() },
            false => Manner { limit: self.options.limit, ..Manner::default() },
        };
        // A guest's own names are this host's to set; the stack's may be somebody else's.
        let force = names.iter().all(|name| *name != self.row.spec.stack);
        let options = PushOptions { force, lazy, paths, manner, dry_run: false };
        let monitor = self.part(label);
        let began = Instant::now();
        let push = self.me.0.node.push(names, self.peer.name.as_str(), options, monitor);
        let pushed = self.me.0.runtime.block_on(push)?;
        let seconds = began.elapsed().as_secs_f64();
        if pushed.bytes_sent >= TELLING && seconds > 0.0 {
            let mut link = self.link();
            link.rate = pushed.bytes_sent as f64 / seconds;
            self.report.link = Some(link);
        }
        Ok(pushed)
    }

    /// What the link does: as seen in this migration, or else when it was last measured.
    fn link(&self) -> LinkSpeed {
        if let Some(link) = self.report.link {
            return link;
        }
        let measured = self.me.0.runtime.block_on(self.me.0.node.measured(self.peer.name.as_str())).unwrap_or_default();
        LinkSpeed {
            rate: measured.out_rate.map_or(UNKNOWN_RATE, |rate| rate as f64),
            round_trip: measured.round_trip_micros.map_or(0.001, |micros| micros as f64 / 1e6),
        }
    }

    /// Base and application, and what the instance holds already.
    fn ahead(&mut self) -> Result<()> {
        self.stage("ahead", false, |run| {
            let store = run.me.0.guests.store().clone();
            let (instance, base) = (run.name().layer("instance")?, run.name().layer("base")?);
            let stack = run.row.spec.stack.clone();
            if run.options.ahead == Ahead::Base {
                let mut layer = run.stack;
                while let Some(below) = layerfs::manifest::Manifest::load(store.as_ref(), layer)?.parent {
                    layer = below;
                }
                store.set_name(&base, layer, Expect::Any)?;
                let pushed = run.push("ahead", &[base], false, false)?;
                return Ok(((), pushed.bytes_sent));
            }
            let mut bytes = run.push("ahead", &[stack], false, false)?.bytes_sent;
            let sealed = run.me.0.host.seal(run.name(), &instance)?;
            store.set_name(&instance, sealed, Expect::Any)?;
            bytes += run.push("ahead", &[instance], false, false)?.bytes_sent;
            Ok(((), bytes))
        })
    }

    /// Reads the memory of the running guest and sends it, again and again while that helps.
    fn rounds(&mut self) -> Result<()> {
        while plan::another(&self.report.rounds, self.options.rounds, self.link()) {
            self.round()?;
        }
        let rounds = &self.report.rounds;
        let why = match (self.options.rounds, plan::dirty_rate(rounds)) {
            (Rounds::Exactly(_), _) => "as many rounds as were asked for".to_owned(),
            (Rounds::Auto, Some(rate)) if rate > self.link().rate => format!(
                "after round {}: memory changes faster ({}/s) than the link carries",
                rounds.len(),
                mebibytes(rate)
            ),
            (Rounds::Auto, _) => format!("after round {}: another would not make the downtime shorter", rounds.len()),
        };
        self.report.decisions.push(why);
        Ok(())
    }

    fn round(&mut self) -> Result<()> {
        let number = self.report.rounds.len() + 1;
        let label = self.round_label(number);
        self.stage(&format!("round {number}"), false, |run| {
            check(run.monitor.as_ref())?;
            let at = run.elapsed();
            // Two names in turn: while one goes over, the other still says what is there.
            let name = run.name().layer(&format!("round-{}", number % 2))?;
            let folder = run.me.0.host.scratch(run.name(), run.report.memory_bytes)?;
            let guard = Scratch(&folder);
            let written = run.guest.scan(&folder)?;
            run.import(&folder, &name)?;
            drop(guard);
            let read_seconds = run.elapsed() - at;
            run.report.memory_bytes = run.report.memory_bytes.max(written.memory_bytes);
            let pushed = run.push(&label, &[name], false, false)?;
            let send_seconds = run.elapsed() - at - read_seconds;
            let (bytes, memory_bytes) = (pushed.bytes_sent, written.memory_bytes);
            run.report.rounds.push(Round { at, read_seconds, send_seconds, bytes, memory_bytes });
            Ok(((), bytes))
        })
    }

    /// What a person who follows wants to know.
    fn round_label(&self, number: usize) -> String {
        match plan::dirty_rate(&self.report.rounds) {
            None => format!("round {number}"),
            Some(rate) => {
                let predicted = self.predict().seconds;
                format!("round {number}, {}/s change, downtime about {predicted:.2} s", mebibytes(rate))
            }
        }
    }

    fn import(&mut self, folder: &Path, name: &LayerName) -> Result<LayerId> {
        let store = self.me.0.guests.store();
        let (layer, _) = state::import(store, folder, name, self.previous, self.monitor.as_ref())?;
        self.previous = Some(layer);
        Ok(layer)
    }

    fn predict(&self) -> Downtime {
        let rounds = &self.report.rounds;
        let bytes = match rounds.is_empty() {
            true => self.report.memory_bytes as f64 / 2.0,
            false => plan::bytes_left(rounds, self.elapsed()),
        };
        let read = rounds.last().map_or(0.0, |round| round.read_seconds);
        self.learnt.predict(bytes, self.report.memory_bytes, read, self.link())
    }

    /// Waits while the guest asks for it.
    fn defer(&mut self) -> Result<()> {
        let root = self.me.0.host.root(self.name());
        let says_no = |root: &Path| inhibit::ask(root).is_deferring(Time::now().seconds);
        if !says_no(&root) {
            return Ok(());
        }
        let longest = self.options.defer;
        let waited = self.stage("defer", false, |run| {
            let began = Instant::now();
            while says_no(&root) && began.elapsed() < longest {
                check(run.monitor.as_ref())?;
                std::thread::sleep(LOOK_EVERY);
            }
            Ok((began.elapsed(), 0))
        })?;
        let why = if waited >= longest { "and was not waited for any longer" } else { "and then let it stop" };
        self.report.decisions.push(format!("the guest asked to wait, {why} ({:.1} s)", waited.as_secs_f64()));
        // What has changed meanwhile would have to go while it stands still.
        if self.options.rounds == Rounds::Auto && waited > Duration::from_secs(1) { self.round() } else { Ok(()) }
    }

    /// Predicts, and says whether it goes by post-copy.
    fn decide(&mut self) -> Result<bool> {
        let predicted = self.predict();
        self.report.predicted = Some(predicted);
        self.report.link = Some(self.link());
        let most = self.options.max_downtime.map(|most| most.as_secs_f64());
        let is_too_long = most.is_some_and(|most| predicted.seconds > most);
        let sending = predicted.bytes as f64 / self.link().rate;
        if self.options.post_copy && (is_too_long || (most.is_none() && sending > POST_COPY_SECONDS)) {
            let saved = Downtime { seconds: predicted.seconds - sending, bytes: 0 };
            let text = format!("post-copy: {:.2} s less than with all memory sent first", sending);
            self.report.decisions.push(text);
            self.report.predicted = Some(saved);
            return Ok(true);
        }
        if !is_too_long {
            return Ok(false);
        }
        let rate = plan::dirty_rate(&self.report.rounds).unwrap_or_default();
        let text = format!(
            "guest {} would stand still for {:.2} s, longer than --max-downtime: its memory changes at {}/s, and the link \
             carries {}/s; allow more, use --postcopy, or try when it does less",
            self.name(),
            predicted.seconds,
            mebibytes(rate),
            mebibytes(self.link().rate),
        );
        Err(Error::refused(ErrorClass::Busy, text))
    }

    /// From the stop to the destination's last word.
    fn hand_over(&mut self, lazily: bool) -> Result<()> {
        let stopped = Instant::now();
        let bytes_before = self.report.bytes;
        let folder = self.me.0.host.scratch(self.name(), self.report.memory_bytes)?;
        let guard = Scratch(&folder);
        let written = self.stage("dump", true, |run| Ok((run.guest.dump(&folder)?, 0)))?;
        let frozen = stopped.elapsed().saturating_sub(written.frozen);
        let stopped = if written.frozen.is_zero() { stopped } else { stopped + frozen };
        self.me.0.hooks.run(HookPoint::AfterStop, &self.row)?;
        let (instance, state) = self.stage("pack", true, |run| Ok((run.pack(&folder)?, 0)))?;
        drop(guard);
        self.row.layers = Some(Layers { instance, state, lazily });
        self.stage("send", true, |run| {
            let (instance, state) = (run.name().layer("instance")?, run.name().layer("state")?);
            let mut first = vec![instance];
            if run.options.ahead == Ahead::Base {
                first.push(run.row.spec.stack.clone());
            }
            let mut bytes = 0;
            if lazily {
                bytes += run.push("stopped", &first, true, false)?.bytes_sent;
                bytes += run.push("stopped", &[state], true, true)?.bytes_sent;
            } else {
                first.push(state);
                bytes += run.push("stopped", &first, true, false)?.bytes_sent;
            }
            Ok(((), bytes))
        })?;
        self.stage("stage", true, |run| {
            let message = Message::Stage { id: run.row.id, instance, state, lazily };
            let patience = run.me.0.timing.frozen_patience;
            let said = run.me.0.runtime.block_on(run.talk.control.fate(&message, patience))?;
            match said.fate {
                Fate::Staged => Ok(((), 0)),
                _ => Err(Error::guest("prepare", run.name(), format!("{}: {}", run.peer.name, said.text))),
            }
        })?;
        check(self.monitor.as_ref())?;
        self.stage("restore", true, |run| run.depart(Event::Staged).map(|()| ((), 0)))?;
        if let Some((at, said)) = self.talk.committed.take() {
            self.split_restore(at, said.took);
            if said.fate == Fate::Restored {
                let seconds = at.duration_since(stopped).as_secs_f64();
                self.report.downtime = Some(Downtime { seconds, bytes: self.report.bytes - bytes_before });
            }
        }
        if lazily && self.report.downtime.is_some() {
            self.rest(state);
        }
        Ok(())
    }

    /// What came after the destination's word wasn't downtime.
    fn split_restore(&mut self, at: Instant, restored_in: Duration) {
        let text = format!(
            "of the last stage {:.2} s were the restore itself, at {}",
            restored_in.as_secs_f64(),
            self.peer.name
        );
        self.report.decisions.push(text);
        self.report.restore_seconds = Some(restored_in.as_secs_f64());
        let end = at.duration_since(self.began).as_secs_f64();
        let Some(stage) = self.report.stages.last_mut() else { return };
        let rest = (stage.at + stage.seconds - end).max(0.0);
        stage.seconds -= rest;
        let name = "clean up".to_owned();
        self.report.stages.push(Stage { name, at: end, seconds: rest, bytes: 0, is_down: false });
    }

    /// Makes layers of what the stop left: the upper and the state, at the same time.
    fn pack(&mut self, folder: &Path) -> Result<(LayerId, LayerId)> {
        let (instance, state) = (self.name().layer("instance")?, self.name().layer("state")?);
        let me = self.me;
        let guest = self.name().clone();
        std::thread::scope(|scope| {
            let sealing = scope.spawn(|| {
                let sealed = me.0.host.seal(&guest, &instance)?;
                me.0.guests.store().set_name(&instance, sealed, Expect::Any)?;
                Ok(sealed)
            });
            let imported = self.import(folder, &state);
            let sealed = sealing.join().unwrap_or_else(|_| Err(Error::guest("seal", &guest, "sealing panicked")));
            Ok((sealed?, imported?))
        })
    }

    /// After post-copy: the memory that the guest hasn't asked for yet.
    fn rest(&mut self, state: LayerId) {
        let sent = self.stage("rest", false, |run| {
            let (inner, label) = (run.monitor.clone(), "rest".to_owned());
            let monitor = Arc::new(Part { inner, label, may_cancel: false });
            let layers = [state];
            let push = run.me.0.node.push_rest(&layers, run.peer.name.as_str(), monitor);
            Ok(((), run.me.0.runtime.block_on(push)?.bytes_sent))
        });
        match sent {
            Ok(()) => {}
            // It fetched all of it meanwhile.
            Err(error) if error.class() == ErrorClass::NotFound => {}
            Err(error) => self.monitor.warn(&format!("the rest of the memory is fetched by the destination: {error}")),
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
        }
        Err(error)
    }

    /// The report, and what the one who asked hears.
    fn conclude(&mut self, result: Result<()>) -> Result<Report> {
        self.report.seconds = self.elapsed();
        let store = self.me.0.guests.store();
        if let Ok(Some(row)) = self.me.0.journal.get(self.row.id) {
            self.row.side = row.side;
        }
        let (outcome, text) = self.outcome();
        self.report.outcome = outcome.to_owned();
        self.report.error = match &result {
            Err(error) => Some(chain(error)),
            Ok(()) => text.clone(),
        };
        if let Err(error) = report::save(store, &self.report).and_then(|()| self.me.0.journal.prune()) {
            tracing::warn!(%error, "a report wasn't kept");
        }
        match (result, text) {
            (Ok(()), None) => Ok(self.report.clone()),
            (Ok(()), Some(text)) => Err(Error::guest("migrate", self.name(), text)),
            (Err(error), None) => Err(error),
            (Err(error), Some(text)) => Err(Error::refused(error.class(), format!("{error}; {text}"))),
        }
    }

    /// How it ended, and where the guest is, if not where it should be.
    fn outcome(&self) -> (&'static str, Option<String>) {
        let (name, peer, note) = (self.name(), &self.peer.name, &self.row.note);
        match self.phase() {
            Phase::Gone | Phase::Ended(Outcome::Moved) => ("moved", None),
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
                ("in doubt", Some(text))
            }
            Phase::Moving | Phase::Stopping | Phase::Returned => {
                let text =
                    format!("guest {name} stays here, but doesn't go on yet ({note}); that is tried again and again");
                ("in doubt", Some(text))
            }
        }
    }
}

/// A folder that goes when this is dropped.
struct Scratch<'a>(&'a Path);

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(self.0) {
            tracing::debug!(path = %self.0.display(), %error, "a folder for a state wasn't removed");
        }
    }
}

fn mebibytes(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / (1024.0 * 1024.0))
}
