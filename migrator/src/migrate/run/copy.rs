//! What goes over while the guest runs: layers, rounds of memory, and the decision to stop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::attr::Time;
use layerfs::error::ErrorClass;
use layerfs::monitor::{Monitor, check};
use layerfs::store::Expect;
use layerfs::{LayerId, LayerName};

use super::super::Downtime;
use super::super::plan::{self, Enough, LinkSpeed, Round, Wish};
use super::super::{Ahead, Rounds, inhibit};
use super::Run;
use crate::error::{Error, Result};
use crate::governor::Priority;
use crate::guest::state;
use crate::node::{Manner, PushOptions};
use crate::progress::TransferReport;
use crate::retry::RetryFor;

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
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Says in front of each phase which part of the migration it belongs to.
pub(super) struct Part {
    pub inner: Arc<dyn Monitor>,
    pub label: String,
    /// Beyond the release nothing is cancelled.
    pub may_cancel: bool,
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

impl Run<'_> {
    pub(super) fn part(&self, label: &str) -> Arc<dyn Monitor> {
        let (inner, label) = (self.monitor.clone(), label.to_owned());
        Arc::new(Part { inner, label, may_cancel: true })
    }

    pub(super) fn push(
        &mut self,
        label: &str,
        names: &[LayerName],
        is_down: bool,
        lazy: bool,
    ) -> Result<TransferReport> {
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
        // Looking for what is alike takes longer than so little takes on the link.
        let is_little = self.report.memory_bytes as f64 / self.link().rate < LITTLE_SECONDS;
        let options = PushOptions { force, lazy, hurry: is_down || is_little, paths, manner, dry_run: false };
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
            // Each move adds a layer or two: from time to time they become one, so that no stack grows for ever.
            if let Err(error) = run.me.0.host.fold(run.name(), &instance, MOST_LAYERS) {
                run.monitor.warn(&format!("the guest's layers are not made one: {error}"));
            }
            bytes += run.push("ahead", &[instance], false, false)?.bytes_sent;
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
        let read = self.report.rounds.last().map_or(0.0, |round| round.read_seconds);
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
                "memory changes about as fast as the link carries, or faster (in a second {rate} went, and the link carries {}); \
                 more rounds would send it again and again",
                mebibytes(link.rate),
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
            let folder = run.me.0.host.scratch(run.name(), run.report.memory_bytes)?;
            let guard = Scratch(folder.clone());
            let written = match run.guest.scan(&folder) {
                Ok(written) => written,
                // The dump will have all of it.
                Err(error) => {
                    run.monitor.warn(&format!("its memory isn't read ahead: {error}"));
                    return Ok(((), 0));
                }
            };
            // It isn't what the destination may hold.
            state::import(run.me.0.guests.store(), &folder, &name, run.previous, run.monitor.as_ref())?;
            drop(guard);
            run.report.memory_bytes = run.report.memory_bytes.max(written.memory_bytes);
            Ok(((), 0))
        })
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
            let guard = Scratch(folder.clone());
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
        let read = rounds.last().map_or(0.0, |round| round.read_seconds);
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
        if self.options.rounds == Rounds::Auto && waited > Duration::from_secs(1) { self.round() } else { Ok(()) }
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

/// A folder that goes when this is dropped.
pub(super) struct Scratch(pub PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "a folder for a state wasn't removed");
        }
    }
}

fn mebibytes(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / (1024.0 * 1024.0))
}
