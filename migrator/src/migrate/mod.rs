//! Moving guests between hosts: rounds, stop, handover, restore, report.
//!
//! [`Migrations`] drives what [`crate::handover`] decides. As a source ([`depart`]) it copies ahead, stops the guest and
//! hands it over; as a destination ([`arrive`]) it prepares all that can fail, and restores. It knows guests by
//! [`crate::guest::Guest`] only, and sends layers by [`Node::push`].
//!
//! Invariants: what a machine says is done in its order, and nothing after a journal row that wasn't written; a guest has at
//! most one move at a time; what is not over is tried again in the background, and taken up by [`Migrations::recover`] when the
//! program begins anew; but of which it isn't known what its journal says rests until then.

mod arrive;
mod background;
mod changes;
mod control;
mod depart;
mod ending;
mod ground;
pub mod hooks;
pub mod inhibit;
pub mod learnt;
mod memory;
pub mod picture;
pub mod plan;
pub mod report;
mod run;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use layerfs::error::ErrorClass;
use layerfs::store::db::WriteError;
use parking_lot::Mutex;
use tokio::task::spawn_blocking;

use crate::error::{Error, Result};
use crate::governor::Rate;
use crate::guest::{Drivers, GuestName, GuestRecord, Guests, Host};
use crate::handover::MoveId;
use crate::handover::destination::Destination;
use crate::handover::journal::{Journal, Row};
use crate::node::Node;
use crate::paths::PathOptions;
use crate::peers::Peer;
use crate::send::joined;

pub use hooks::{HookFolder, HookPoint, Hooks};
pub use learnt::Downtime;
pub use plan::Rounds;
pub use report::Report;

/// How often it is looked whether all moves rest.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How patient migrations are.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A guest that was announced and of which nothing is heard for so long isn't expected any more; its source says much more
    /// often that it still comes.
    pub lease: Duration,
    /// For how long a request is repeated while the guest runs.
    pub patience: Duration,
    /// For how long, while it stands still and may still go on here.
    pub frozen_patience: Duration,
    /// For how long at least what the stop left may be on its way, as long as the link lives.
    pub sending_patience: Duration,
    /// For how long the destination is asked, once it is the destination's, before that is left to the background.
    pub commit_patience: Duration,
    /// The first and the longest pause between questions in the background.
    pub pauses: (Duration, Duration),
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            lease: Duration::from_secs(600),
            patience: Duration::from_secs(30),
            frozen_patience: Duration::from_secs(10),
            sending_patience: Duration::from_secs(60),
            commit_patience: Duration::from_secs(60),
            pauses: (Duration::from_millis(250), Duration::from_secs(15)),
        }
    }
}

/// Which layers go ahead while the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ahead {
    /// All that are sealed.
    #[default]
    Auto,
    /// The base only: the application goes with the instance, while the guest stands still (two layers).
    Base,
    /// Base and application (three layers).
    Application,
}

/// How a guest is moved.
#[derive(Clone, Copy, Debug)]
pub struct MigrateOptions {
    /// If the downtime would be longer, it isn't moved (or goes by post-copy, if that is allowed).
    pub max_downtime: Option<Duration>,
    /// How many rounds.
    pub rounds: Rounds,
    /// What goes ahead.
    pub ahead: Ahead,
    /// It may run before all of its memory is there.
    pub post_copy: bool,
    /// Only obstacles and costs are to be known.
    pub dry_run: bool,
    /// The most that it may take of the network, while the guest runs.
    pub limit: Option<Rate>,
    /// If the destination can't restore it, it goes back by itself.
    pub gives_back: bool,
    /// The destination's kernel isn't compared with this one.
    pub any_kernel: bool,
    /// For how long the guest may ask not to be stopped.
    pub defer: Duration,
    /// How the network is used.
    pub paths: PathOptions,
}

impl Default for MigrateOptions {
    fn default() -> MigrateOptions {
        MigrateOptions {
            max_downtime: None,
            rounds: Rounds::Auto,
            ahead: Ahead::Auto,
            post_copy: false,
            dry_run: false,
            limit: None,
            gives_back: true,
            any_kernel: false,
            defer: Duration::from_secs(30),
            paths: PathOptions::default(),
        }
    }
}

/// What an operator decides about a move that isn't over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// Run the guest here, whatever the other side does.
    RunHere,
    /// Never run here what this move left or brought.
    GiveUp,
    /// Ask the other side now, and do what it says.
    Ask,
}

/// The moves of a host. Clones share them.
#[derive(Clone)]
pub struct Migrations(Arc<Inner>);

pub(crate) struct Inner {
    node: Node,
    guests: Guests,
    journal: Journal,
    drivers: Arc<dyn Drivers>,
    host: Arc<dyn Host>,
    hooks: Arc<dyn Hooks>,
    timing: Timing,
    runtime: tokio::runtime::Handle,
    /// Held by whoever takes steps for a guest.
    locks: Mutex<HashMap<GuestName, Arc<Mutex<()>>>>,
    /// Guests that are being moved from here by somebody who waits for it.
    leaving: Mutex<HashSet<GuestName>>,
    /// What machines know beyond their rows.
    arriving: Mutex<HashMap<MoveId, Arrival>>,
    /// Moves that the background works on.
    awaited: Mutex<HashSet<MoveId>>,
    /// Moves whose last row may be on disk or not: they rest until the program starts anew.
    unsure: Mutex<HashSet<MoveId>>,
    /// Moves whose guest has gone on here, though that may not be on disk yet: what becomes of it since is its own affair.
    awake: Mutex<HashSet<MoveId>>,
    /// What is known of the disks of guests that are to go on from their states.
    grounds: Mutex<HashMap<MoveId, ground::Ground>>,
    #[cfg(test)]
    faults: tests::Faults,
}

/// A guest that comes here, as far as only this process knows.
struct Arrival {
    machine: Destination,
    /// Where its state can be read, once that is so.
    opened: Option<PathBuf>,
    heard: Instant,
    /// Its memory, as far as it has come.
    kept: Option<Arc<Mutex<memory::Kept>>>,
    /// Its memory as the last state has it.
    memory: Option<crate::guest::memory::Memory>,
}

impl Migrations {
    /// The moves of `node`'s host, whose guests these are. Serves peers from now on. To be called within a runtime.
    pub fn new(
        node: &Node,
        guests: &Guests,
        drivers: Arc<dyn Drivers>,
        host: Arc<dyn Host>,
        hooks: Arc<dyn Hooks>,
        timing: Timing,
    ) -> Migrations {
        let migrations = Migrations(Arc::new(Inner {
            node: node.clone(),
            guests: guests.clone(),
            journal: Journal::new(guests),
            drivers,
            host,
            hooks,
            timing,
            runtime: tokio::runtime::Handle::current(),
            locks: Mutex::default(),
            leaving: Mutex::default(),
            arriving: Mutex::default(),
            awaited: Mutex::default(),
            unsure: Mutex::default(),
            awake: Mutex::default(),
            grounds: Mutex::default(),
            #[cfg(test)]
            faults: tests::Faults::default(),
        }));
        node.serve_guests(Arc::downgrade(&migrations.0));
        migrations
    }

    pub(crate) fn of(inner: &Weak<Inner>) -> Option<Migrations> {
        inner.upgrade().map(Migrations)
    }

    /// The moves on record, the oldest first. Blocks.
    ///
    /// # Errors
    /// Those of the index.
    pub fn moves(&self) -> Result<Vec<Row>> {
        Ok(self.0.journal.list()?)
    }

    /// The move of `guest` that isn't over. Blocks.
    ///
    /// # Errors
    /// [`layerfs::Error::NotFound`] if there is none.
    pub fn open_move(&self, guest: &GuestName) -> Result<Row> {
        let found = self.0.journal.open_of(guest)?;
        Ok(found
            .ok_or_else(|| layerfs::Error::NotFound { what: "unfinished move of guest", name: guest.to_string() })?)
    }

    /// Whether something is under way that must not be cut off lightly.
    pub fn is_busy(&self) -> bool {
        !self.0.leaving.lock().is_empty() || !self.0.awaited.lock().is_empty()
    }

    /// The guests for which a move takes steps right now, be it from here or to here.
    pub fn at_work(&self) -> Vec<GuestName> {
        let locks = self.0.locks.lock();
        locks.iter().filter(|(_, lock)| lock.is_locked()).map(|(name, _)| name.clone()).collect()
    }

    /// Waits until no move takes steps, for `patience` at most; returns whether that is so. Blocks.
    pub fn wait_until_rests(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            if self.at_work().is_empty() {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn lock_of(&self, guest: &GuestName) -> Arc<Mutex<()>> {
        self.0.locks.lock().entry(guest.clone()).or_default().clone()
    }

    /// Fails if the last row of the move `row` may be on disk or not: what to do next, and what to say of it, isn't known then.
    fn must_be_sure(&self, row: &Row) -> Result<()> {
        match self.0.unsure.lock().contains(&row.id) {
            true => {
                let text = "whether its last step was written isn't known; restart the daemon, which reads the journal";
                Err(Error::guest("go on with the move of", row.guest(), text))
            }
            false => Ok(()),
        }
    }

    /// Sees to it that the move `id` goes on, of which a row couldn't be written.
    fn unwritten(&self, id: MoveId, error: WriteError) -> Error {
        match &error {
            WriteError::NotWritten(_) => self.later(id),
            // What is on disk decides when the program starts anew.
            WriteError::Unsure(_) => {
                self.0.unsure.lock().insert(id);
            }
        }
        error.into()
    }

    /// Makes `row` durable.
    fn write(&self, row: &Row) -> Result<(), WriteError> {
        self.journal(|journal| {
            journal.write_changing(row, |record| {
                if let Some(layers) = row.layers {
                    // Names that can't be made were refused when the guest was created.
                    record.instance = row.guest().layer("instance").ok();
                    record.state_layer = row.guest().layer("state").ok();
                    tracing::debug!(guest = %row.guest(), instance = %layers.instance, "journalled");
                }
            })
        })
    }

    /// Makes `row`, the first of a move, durable if the guest's record is as it was `seen`.
    fn write_over(&self, row: &Row, seen: Option<&GuestRecord>) -> Result<(), WriteError> {
        self.journal(|journal| journal.write_over(row, seen))
    }

    fn journal(&self, write: impl FnOnce(&Journal) -> Result<(), WriteError>) -> Result<(), WriteError> {
        #[cfg(test)]
        self.0.faults.journal(false)?;
        write(&self.0.journal)?;
        #[cfg(test)]
        self.0.faults.journal(true)?;
        Ok(())
    }

    /// The other host of the move `row`, whatever it is called now.
    async fn other_side(&self, row: &Row) -> Result<Peer> {
        let Some(key) = row.key else { return self.0.node.peer(&row.peer).await };
        let peers = self.0.node.peers().clone();
        let found = joined(spawn_blocking(move || Ok(peers.by_key(&key)?)).await)?;
        Ok(found.ok_or_else(|| layerfs::Error::NotFound { what: "peer", name: row.peer.clone() })?)
    }
}

/// There is a move of that guest already.
fn busy(message: String) -> Error {
    Error::refused(ErrorClass::Busy, message)
}
