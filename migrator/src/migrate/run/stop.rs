//! While the guest stands still: dump, pack, send, stage, and the destination's word.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use layerfs::LayerId;
use layerfs::error::ErrorClass;
use layerfs::monitor::check;
use layerfs::store::Expect;

use super::super::control::Said;
use super::super::hooks::LONGEST_AT_A_POINT;
use super::super::plan;
use super::super::report::Stage;
use super::super::{Ahead, Downtime, HookPoint};
use super::Run;
use super::copy::Part;
use super::patience::{Limit, Patience, TIMES_EXPECTED};
use crate::error::{Error, Result};
use crate::guest::{self, Activity, Scratch};
use crate::handover::Fate;
use crate::handover::journal::Layers;
use crate::handover::source::Event;
use crate::wire::Message;

/// The slowest that a destination may read a memory that has come, in bytes.
const READ_IN_A_SECOND: u64 = 64 << 20;

impl Run<'_> {
    /// From the stop to the destination's last word.
    pub(super) fn hand_over(&mut self, lazily: bool) -> Result<()> {
        // The guest shall not stand still for what others have to write.
        self.me.0.guests.store().db().pay();
        let stopped = Instant::now();
        let bytes_before = self.report.bytes;
        let guard = Scratch::new(&self.me.0.host, self.name(), self.report.memory_bytes)?;
        let folder = guard.path().to_owned();
        let dumped = self.stage("dump", true, |run| {
            let (guest, monitor, decisions) = (&*run.guest, &*run.monitor, &mut run.report.decisions);
            let again = |error: &Error| decisions.push(format!("the dump was tried again: {error}"));
            Ok((guest::dump(guest, &folder, monitor, again)?, 0))
        });
        // What has ended with its dump, which may have failed later, goes on from these files if nothing comes of the move. They go
        // when it is over.
        let guard = match &dumped {
            Ok(written) if !written.has_ended => Some(guard),
            _ => {
                guard.leave();
                None
            }
        };
        let written = dumped?;
        let frozen = stopped.elapsed().saturating_sub(written.frozen);
        let stopped = if written.frozen.is_zero() { stopped } else { stopped + frozen };
        self.me.0.hooks.run(HookPoint::AfterStop, &self.row)?;
        let (instance, state) = self.stage("pack", true, |run| Ok((run.pack(&folder)?, 0)))?;
        if let Some(known) = &self.known {
            // What it has read since the rounds began.
            known.add(self.me.0.guests.store().trace(instance)?);
        }
        self.row.layers = Some(Layers { instance, state, lazily });
        self.stage("send", true, |run| {
            let (me, row) = (run.me.clone(), run.row.clone());
            // If this host dies, the guest goes on from the layers.
            let noted = std::thread::spawn(move || me.write(&row).map_err(Error::from));
            let pushed = run.send(lazily);
            // In any case: what is journalled next comes after this.
            let panicked = |_| Err(Error::guest("journal", run.name(), "writing panicked"));
            noted.join().unwrap_or_else(panicked)?;
            Ok(((), pushed?))
        })?;
        self.stage("stage", true, |run| {
            let said = run.ask_to_stage(&Message::Stage { id: run.row.id, instance, state, lazily })?;
            match said.fate {
                Fate::Staged => Ok(((), 0)),
                _ => Err(run.turned_down(&said)),
            }
        })?;
        check(self.monitor.as_ref())?;
        if !written.has_ended {
            self.must_stand_still()?;
        }
        self.stage("restore", true, |run| run.depart(Event::Staged).map(|()| ((), 0)))?;
        // Not before: giving back so much memory takes a while.
        drop(guard);
        if let Some((at, said)) = self.talk.committed.take() {
            self.split_restore(at, said.took);
            if said.fate == Fate::Restored && !said.text.is_empty() {
                self.report.decisions.push(said.text.clone());
            }
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

    /// Asks for staging, which takes as long as the hooks there and the reading of the memory do. A destination that is out of reach
    /// meanwhile isn't waited for longer than anywhere else.
    fn ask_to_stage(&mut self, message: &Message) -> Result<Said> {
        let (me, id, monitor) = (self.me, self.row.id, self.monitor.clone());
        let reachable = me.0.timing.frozen_patience;
        let reading = Duration::from_secs(self.report.memory_bytes / READ_IN_A_SECOND);
        let patience = reachable + LONGEST_AT_A_POINT + reading;
        let mut other = me.control(self.peer.clone());
        let out_of_reach = async {
            loop {
                tokio::time::sleep(reachable / 4).await;
                if let Err(error) = other.inquire(id, reachable * 3 / 4).await {
                    return error;
                }
                if let Err(cancelled) = check(monitor.as_ref()) {
                    return cancelled.into();
                }
            }
        };
        me.0.runtime.block_on(async {
            tokio::select! {
                said = self.talk.control.fate(message, patience) => said,
                error = out_of_reach => Err(error),
            }
        })
    }

    /// Fails if it doesn't stand still any more, as after the end of what holds it: then its state is an old one, and no other may go on
    /// from that. What has ended with its dump doesn't go on by itself.
    fn must_stand_still(&self) -> Result<()> {
        let why = match self.guest.status()?.activity {
            Activity::Frozen => return Ok(()),
            Activity::Running => "it runs again, as if what held it had ended; migrate it again",
            Activity::Absent => "it has ended meanwhile; `layerctl guest show` says what became of it",
        };
        Err(Error::guest("release", self.name(), why))
    }

    /// Sends what the stop left; returns the bytes.
    fn send(&mut self, lazily: bool) -> Result<u64> {
        let (instance, state) = (self.name().layer("instance")?, self.name().layer("state")?);
        let patience = Arc::new(Patience::new(self.me.0.node.transfers().clone(), self.longest_send()));
        let mut bytes = 0;
        if self.options.ahead == Ahead::Base {
            // Alone: its name may be somebody else's there, while the guest's own are there from earlier moves and are replaced.
            let stack = [self.row.spec.stack.clone()];
            bytes += self.push("stopped", &stack, Some(&patience), false)?.bytes_sent;
        }
        if !lazily {
            return Ok(bytes + self.push("stopped", &[instance, state], Some(&patience), false)?.bytes_sent);
        }
        bytes += self.push("stopped", &[instance], Some(&patience), false)?.bytes_sent;
        Ok(bytes + self.push("stopped", &[state], Some(&patience), true)?.bytes_sent)
    }

    /// How long what the stop left may be on its way.
    fn longest_send(&self) -> Limit {
        let predicted = self.report.predicted.unwrap_or_default();
        let allowed = self.options.max_downtime.unwrap_or_default().as_secs_f64();
        Limit {
            least: self.me.0.timing.sending_patience,
            expected: Downtime { seconds: predicted.seconds.max(allowed), ..predicted },
            rate: plan::pace(&self.report.rounds, self.link()).rate,
        }
    }

    /// It was on its way for that long.
    pub(super) fn too_slow(&self, patience: &Patience) -> Error {
        let text = format!(
            "what it left was not at {} after {:.0} s, while it stood still; `layerctl transfers` shows what holds the link up, and \
             --max-downtime allows for {TIMES_EXPECTED} times its time",
            self.peer.name,
            patience.elapsed().as_secs_f64(),
        );
        Error::guest("send", self.name(), text)
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
            let monitor = Arc::new(Part { inner, label, may_cancel: false, patience: None });
            let layers = [state];
            let push = run.me.0.node.push_rest(&layers, run.peer.name.as_str(), None, monitor);
            Ok(((), run.me.0.runtime.block_on(push)?.bytes_sent))
        });
        match sent {
            Ok(()) => {}
            // It fetched all of it meanwhile.
            Err(error) if error.class() == ErrorClass::NotFound => {}
            Err(error) => {
                let text = format!("the rest of the memory is fetched by the destination: {error}");
                self.monitor.warn(&text);
                self.report.decisions.push(text);
            }
        }
    }
}
