//! What goes over while the guest runs: layers, rounds of memory, and the decision to stop.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::attr::Time;
use layerfs::error::ErrorClass;
use layerfs::manifest::{LayerKind, Manifest};
use layerfs::monitor::{Monitor, check};
use layerfs::store::{Expect, Store};
use layerfs::{ChunkId, LayerId, LayerName};

use super::super::Downtime;
use super::super::plan::{self, Enough, Left, LinkSpeed, Round, Wish};
use super::super::{Ahead, Rounds, changes, inhibit};
use super::Run;
use super::patience::Patience;
use crate::error::{Error, Result};
use crate::governor::Priority;
use crate::guest::{Scratch, state};
use crate::node::{Knowing, Manner, PushOptions};
use crate::progress::TransferReport;
use crate::retry::RetryFor;
use crate::similar::Similar;

/// What is assumed of a link that was never measured, in bytes per second.
const UNKNOWN_RATE: f64 = 12.5e6;
/// A transfer tells the link's rate if it was so large, in bytes.
const TELLING: u64 = 512 * 1024;
/// A guest's stack has so many layers beyond its base and application, and those of one move, at most.
const MOST_LAYERS: usize = 8;
/// Post-copy is worth it if it saves so many seconds.
const POST_COPY_SECONDS: f64 = 0.3;
/// Memory that takes less than so many seconds on the link isn't compared with anything but itself.
const LITTLE_SECONDS: f64 = 0.2;
/// What a guest has read is told if that takes no more than one in so many of its memory's bytes.
const TOLD_PART: u64 = 64;
/// Looking at memory without sending it pays where sending takes so many seconds, of memory of so many bytes at most.
const LOOK_SECONDS: f64 = 0.5;
const LOOK_BYTES: u64 = 4 << 30;
/// Two looks that tell what is written all the time are so far apart: this part of what all of the memory takes, within limits.
const APART: f64 = 0.05;
const LEAST_APART: f64 = 0.1;
const MOST_APART: f64 = 0.5;
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Says in front of each phase which part of the migration it belongs to.
pub(super) struct Part {
    pub inner: Arc<dyn Monitor>,
    pub label: String,
    /// Beyond the release nothing is cancelled.
    pub may_cancel: bool,
    /// Cancelled by itself when that is over.
    pub patience: Option<Arc<Patience>>,
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
        self.may_cancel
            && (self.inner.is_cancelled() || self.patience.as_ref().is_some_and(|patience| patience.is_over()))
    }
}

impl Run<'_> {
    pub(super) fn part(&self, label: &str) -> Arc<dyn Monitor> {
        self.part_with(label, None)
    }

    fn part_with(&self, label: &str, patience: Option<&Arc<Patience>>) -> Arc<dyn Monitor> {
        let (inner, label, patience) = (self.monitor.clone(), label.to_owned(), patience.cloned());
        Arc::new(Part { inner, label, may_cancel: true, patience })
    }

    /// Sends `names`; with `patience` the guest stands still, and goes on here if that ends.
    pub(super) fn push(
        &mut self,
        label: &str,
        names: &[LayerName],
        patience: Option<&Arc<Patience>>,
        lazy: bool,
    ) -> Result<TransferReport> {
        let is_down = patience.is_some();
        let mut paths = self.options.paths;
        if is_down {
            paths.retry_for = Some(RetryFor::Time(self.me.0.timing.frozen_patience));
        }
        let manner = match patience {
            Some(patience) => {
                Manner { priority: Priority::High, urgent: true, id: Some(patience.next()), ..Manner::default() }
            }
            None => Manner { limit: self.options.limit, ..Manner::default() },
        };
        // A guest's own names are this host's to set; the stack's may be somebody else's.
        let force = names.iter().all(|name| *name != self.row.spec.stack);
        let is_little = self.is_little();
        let options = PushOptions { force, lazy, hurry: is_down || is_little, paths, manner, dry_run: false };
        let monitor = self.part_with(label, patience);
        let began = Instant::now();
        let knowing =
            Knowing { known: self.known.clone(), traces: std::mem::take(&mut self.traces), rest_later: false };
        let push = self.me.0.node.push_knowing(names, self.peer.name.as_str(), options, knowing, monitor);
        let pushed = self.me.0.runtime.block_on(push);
        let pushed = pushed.map_err(|error| match (error, patience) {
            (Error::Store(layerfs::Error::Cancelled), Some(patience))
                if patience.has_ended() && !self.monitor.is_cancelled() =>
            {
                self.too_slow(patience)
            }
            (error, _) => error,
        })?;
        if let Some(patience) = patience {
            patience.sent(pushed.bytes_sent);
        }
        let seconds = began.elapsed().as_secs_f64();
        if pushed.bytes_sent >= TELLING && seconds > 0.0 {
            let mut link = self.link();
            let seen = pushed.bytes_sent as f64 / seconds;
            // What had to be made first says only that the link isn't slower.
            link.rate = if pushed.link_was_full { seen } else { seen.max(link.rate) };
            self.report.link = Some(link);
        }
        Ok(pushed)
    }

    /// Looking for what is alike takes longer than its memory takes on the link.
    fn is_little(&self) -> bool {
        self.report.memory_bytes as f64 / self.link().rate < LITTLE_SECONDS
    }

    /// What the link does: as seen in this migration, or else when it was last measured.
    pub(super) fn link(&self) -> LinkSpeed {
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
    pub(super) fn ahead(&mut self) -> Result<()> {
        self.stage("ahead", false, |run| {
            let store = run.me.0.guests.store().clone();
            let (instance, base) = (run.name().layer("instance")?, run.name().layer("base")?);
            let stack = run.row.spec.stack.clone();
            if run.options.ahead == Ahead::Base {
                let lowest = layers_of(&store, run.stack)?.last().map_or(run.stack, |(layer, _)| *layer);
                store.set_name(&base, lowest, Expect::Any)?;
                let pushed = run.push("ahead", &[base], None, false)?;
                return Ok(((), pushed.bytes_sent));
            }
            let mut bytes = run.push("ahead", &[stack], None, false)?.bytes_sent;
            let sealed = run.me.0.host.seal(run.name(), &instance)?;
            store.set_name(&instance, sealed, Expect::Any)?;
            let read = read_of(&store, &layers_of(&store, sealed)?)?;
            // Each move adds a layer or two: from time to time they become one, so that no stack grows for ever.
            if let Err(error) = run.me.0.host.fold(run.name(), &instance, MOST_LAYERS) {
                run.monitor.warn(&format!("the guest's layers are not made one: {error}"));
            }
            let top = store.name(&instance)?.map_or(sealed, |record| record.layer);
            if !read.is_empty() && (read.len() * 32) as u64 <= run.report.memory_bytes / TOLD_PART {
                // It leaves from there with this in its memory still.
                run.traces.push((top, read.clone()));
            }
            bytes += run.push("ahead", std::slice::from_ref(&instance), None, false)?.bytes_sent;
            // All of the layers is there now.
            let held = layers_of(&store, top)?.into_iter().map(|(layer, _)| layer).collect();
            let is_of_use = !run.is_little() && !read.is_empty();
            run.known = is_of_use.then(|| Similar::of_chunks(store, read.into_iter().collect(), held));
            Ok(((), bytes))
        })
    }

    /// Reads the memory of the running guest and sends it, again and again while that helps.
    pub(super) fn rounds(&mut self) -> Result<()> {
        let why = loop {
            match plan::enough(&self.report.rounds, self.wish(), self.fixed_seconds(), self.link()) {
                Some(why) => break why,
                None => self.round()?,
            }
        };
        // It takes as much memory as the guest.
        self.look = None;
        if self.report.rounds.is_empty() && self.options.post_copy {
            self.read_ahead()?;
        }
        let text = self.because(why);
        self.report.decisions.push(text);
        Ok(())
    }

    fn wish(&self) -> Wish {
        let max_downtime = self.options.max_downtime.map(|most| most.as_secs_f64());
        Wish { rounds: self.options.rounds, max_downtime }
    }

    /// For how long the guest would stand still if nothing were left to be sent.
    fn fixed_seconds(&self) -> f64 {
        let read = self.report.rounds.first().map_or(0.0, |round| round.read_seconds);
        self.learnt.predict(0.0, self.report.memory_bytes, read, self.link()).seconds
    }

    /// Why there are no more rounds, for people.
    fn because(&self, why: Enough) -> String {
        let (rounds, link) = (&self.report.rounds, self.link());
        let rate = mebibytes(plan::dirty_rate(rounds).unwrap_or_default());
        let left = plan::bytes_left(rounds, self.elapsed()) / link.rate;
        let text = match why {
            Enough::Asked => return "as many rounds as were asked for".to_owned(),
            Enough::Most => "never more".to_owned(),
            Enough::Little => format!("what is left takes {left:.2} s, little of the downtime"),
            Enough::NoGain => "another would not make the downtime shorter".to_owned(),
            Enough::TooDear => {
                format!("{left:.2} s are left, and another would send more again than it saves ({rate}/s change)")
            }
            Enough::TooFast => format!(
                "memory changes about as fast as it can be sent, or faster (in a second {rate} changed, and {} went); more rounds \
                 would send it again and again",
                mebibytes(plan::pace(rounds, link).rate),
            ),
        };
        format!("after round {}: {text}", rounds.len())
    }

    /// Reads the memory of a guest that may go ahead of it into the store, and sends nothing: what hasn't changed when it stops needn't
    /// be compressed and written while it stands still.
    fn read_ahead(&mut self) -> Result<()> {
        self.stage("read", false, |run| {
            check(run.monitor.as_ref())?;
            let name = run.name().layer("round-0")?;
            let scratch = Scratch::new(&run.me.0.host, run.name(), run.report.memory_bytes)?;
            let written = match run.guest.scan(scratch.path()) {
                Ok(written) => written,
                // The dump will have all of it.
                Err(error) => {
                    run.monitor.warn(&format!("its memory isn't read ahead: {error}"));
                    return Ok(((), 0));
                }
            };
            // It isn't what the destination may hold.
            state::import(run.me.0.guests.store(), scratch.path(), &name, run.previous, run.monitor.as_ref())?;
            drop(scratch);
            run.report.memory_bytes = run.report.memory_bytes.max(written.memory_bytes);
            Ok(((), 0))
        })
    }

    fn round(&mut self) -> Result<()> {
        let number = self.report.rounds.len() + 1;
        let label = self.round_label(number);
        self.stage(&format!("round {number}"), false, |run| {
            check(run.monitor.as_ref())?;
            // Two names in turn: while one goes over, the other still says what is there.
            let name = run.name().layer(&format!("round-{}", number % 2))?;
            let scratch = Scratch::new(&run.me.0.host, run.name(), run.report.memory_bytes)?;
            run.wait_apart();
            let (at, written) = (run.elapsed(), run.guest.scan(scratch.path())?);
            run.leave_out(&scratch);
            run.import(scratch.path(), &name)?;
            let read_seconds = run.elapsed() - at;
            run.report.memory_bytes = run.report.memory_bytes.max(written.memory_bytes);
            let pushed = run.push(&label, &[name], None, false)?;
            let send_seconds = run.elapsed() - at - read_seconds;
            let (bytes, memory_bytes) = (pushed.bytes_sent, written.memory_bytes);
            run.report.rounds.push(Round { at, read_seconds, send_seconds, bytes, memory_bytes, left: None });
            run.look_back(scratch);
            Ok(((), bytes))
        })
    }

    /// Whether it pays to look at the memory beside sending it.
    fn looks(&self) -> bool {
        let (bytes, wish) = (self.report.memory_bytes, self.wish());
        // Who sets a limit wants all to go that can, whatever is sent twice.
        let is_free = wish.rounds == Rounds::Auto && wish.max_downtime.is_none();
        is_free && bytes <= LOOK_BYTES && bytes as f64 / self.link().rate > LOOK_SECONDS
    }

    /// Looks at the memory as it is now. What fails only leaves out what it would have told.
    pub(super) fn look(&mut self) {
        self.look = None;
        if !self.looks() {
            return;
        }
        let at = self.elapsed();
        let looked = Scratch::new(&self.me.0.host, self.name(), self.report.memory_bytes).and_then(|scratch| {
            self.guest.scan(scratch.path())?;
            Ok(scratch)
        });
        match looked {
            Ok(scratch) => self.look = Some((scratch, at)),
            Err(error) => tracing::debug!(guest = %self.name(), %error, "its memory wasn't looked at"),
        }
    }

    /// Waits until a second look tells something.
    fn wait_apart(&self) {
        let Some((_, at)) = &self.look else { return };
        let apart = self.report.memory_bytes as f64 / self.link().rate * APART;
        let rest = at + apart.clamp(LEAST_APART, MOST_APART) - self.elapsed();
        std::thread::sleep(Duration::from_secs_f64(rest.max(0.0)));
    }

    /// Leaves out of what was read for a round the pages that are written all the time, as they would go again: so many as needn't
    /// wait for the stop, which they would make too long.
    fn leave_out(&mut self, scratch: &Scratch) {
        let Some((look, _)) = self.look.take() else { return };
        let most = self.wish().room(self.fixed_seconds()) * self.link().rate;
        match changes::leave_out(look.path(), scratch.path(), most as u64) {
            Ok(bytes) => tracing::debug!(guest = %self.name(), bytes, "left out of a round"),
            Err(error) => tracing::debug!(guest = %self.name(), %error, "what is written all the time isn't known"),
        }
    }

    /// Looks at what has changed since a round's memory was read into `scratch`.
    fn look_back(&mut self, scratch: Scratch) {
        self.look();
        let Some((look, at)) = &self.look else { return };
        match changes::between(scratch.path(), look.path()) {
            Ok(changes) => {
                let left = Left { at: *at, bytes: changes.wire_bytes };
                if let Some(round) = self.report.rounds.last_mut() {
                    round.left = Some(left);
                }
            }
            Err(error) => tracing::debug!(guest = %self.name(), %error, "what has changed isn't known"),
        }
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

    pub(super) fn import(&mut self, folder: &Path, name: &LayerName) -> Result<LayerId> {
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
        let read = rounds.first().map_or(0.0, |round| round.read_seconds);
        self.learnt.predict(bytes, self.report.memory_bytes, read, self.link())
    }

    /// Waits while the guest asks for it.
    pub(super) fn defer(&mut self) -> Result<()> {
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
        if self.options.rounds == Rounds::Auto && waited > Duration::from_secs(1) {
            self.round()?;
            self.look = None;
        }
        Ok(())
    }

    /// Predicts, and says whether it goes by post-copy.
    pub(super) fn decide(&mut self) -> Result<bool> {
        let predicted = self.predict();
        self.report.predicted = Some(predicted);
        self.report.link = Some(self.link());
        let wish = self.wish();
        let is_too_long = wish.max_downtime.is_some_and(|most| predicted.seconds > most);
        let sending = predicted.bytes as f64 / self.link().rate;
        let is_much = wish.max_downtime.is_none() && sending > POST_COPY_SECONDS;
        if self.options.post_copy && (is_too_long || is_much) {
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
}

/// The layers of the stack of `top`, from the top to the lowest, each with its kind.
fn layers_of(store: &Store, top: LayerId) -> Result<Vec<(LayerId, LayerKind)>> {
    let mut layers = Vec::new();
    let mut next = Some(top);
    while let Some(layer) = next {
        let manifest = Manifest::load(store, layer)?;
        layers.push((layer, manifest.kind));
        next = manifest.parent;
    }
    Ok(layers)
}

/// What the guest whose stack is `layers` has read of it: here, as sealing has noted, and where it was before, as came along with one of
/// its own layers. The top layer's trace says all of it from now on.
fn read_of(store: &Store, layers: &[(LayerId, LayerKind)]) -> Result<Vec<ChunkId>> {
    let Some((top, _)) = layers.first() else { return Ok(Vec::new()) };
    for (layer, _) in layers.iter().skip(1).take_while(|(_, kind)| *kind == LayerKind::Instance) {
        let read = store.trace(*layer)?;
        if !read.is_empty() {
            store.extend_trace(*top, &read)?;
        }
    }
    Ok(store.trace(*top)?)
}

fn mebibytes(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / (1024.0 * 1024.0))
}
