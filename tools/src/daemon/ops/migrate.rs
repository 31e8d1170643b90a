//! Moving guests: migrate, reports, and what an operator decides about moves that aren't over.

use std::sync::Arc;
use std::time::Duration;

use layerfs::error::ErrorClass;
use migrator::Migrations;
use migrator::guest::{GuestName, HostDrivers};
use migrator::handover::journal::{Row, Side};
use migrator::handover::{destination, source};
use migrator::migrate::plan::Rounds;
use migrator::migrate::{Ahead, HookFolder, MigrateOptions, Report, Resolution, Timing, report};
use parking_lot::Mutex;

use super::guests::{DaemonHost, remove_folders, with_folders};
use super::transfers::rate;
use crate::api::Empty;
use crate::api::migrate::{Layers, MigrateRequest, MoveInfo, ReportList, ReportRequest, ResolveAction, ResolveRequest};
use crate::daemon::Daemon;
use crate::daemon::http::Context;
use crate::failure::{Class, Failure, Result};

/// Where the operator's hooks are, in the store's folder.
const HOOKS: &str = "hooks";
/// What guests that went away left here makes their way back short for so long.
const EXPIRES_AFTER: Duration = Duration::from_secs(24 * 3600);
const EXPIRE_EVERY: Duration = Duration::from_secs(3600);
/// How long guests rest that couldn't be woken, at first and at most.
const WAKE_EVERY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// The daemon's moves of guests; empty before it serves and after it has stopped.
#[derive(Default)]
pub struct Moves(Mutex<Option<Migrations>>);

impl Moves {
    /// Serves peers from now on, and takes up what isn't over. To be called within a runtime.
    pub fn start(daemon: &Arc<Daemon>) {
        let drivers = HostDrivers { programs: daemon.guests.drivers().programs.clone() };
        let migrations = Migrations::new(
            daemon.peering.node(),
            daemon.guests.records(),
            Arc::new(drivers),
            Arc::new(DaemonHost::new(daemon.clone())),
            Arc::new(HookFolder(daemon.settings.store.join(HOOKS))),
            Timing::default(),
        );
        *daemon.moves.0.lock() = Some(migrations.clone());
        let (expiring, recovering) = (Arc::downgrade(daemon), Arc::downgrade(daemon));
        tokio::spawn(async move {
            let mut ticker = tokio::time::interval(EXPIRE_EVERY);
            loop {
                ticker.tick().await;
                let Some(daemon) = expiring.upgrade() else { return };
                let Ok(moves) = daemon.moves.get() else { return };
                let expire =
                    move || moves.expire(EXPIRES_AFTER, with_folders(&daemon), |name| remove_folders(&daemon, name));
                let expired = tokio::task::spawn_blocking(expire).await;
                if let Ok(Err(error)) = expired {
                    tracing::warn!(%error, "what moved guests left couldn't be removed");
                }
            }
        });
        tokio::spawn(async move {
            let recovered = tokio::task::spawn_blocking(move || migrations.recover()).await;
            if let Ok(Err(error)) = recovered {
                tracing::error!(%error, "unfinished moves of guests can't be taken up");
            }
            let (mut pause, longest) = WAKE_EVERY;
            loop {
                let Some(daemon) = recovering.upgrade() else { return };
                if !matches!(tokio::task::spawn_blocking(move || super::guests::wake(&daemon)).await, Ok(false)) {
                    return;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
        });
    }

    /// Whether an operation may change guest `name`.
    ///
    /// # Errors
    /// [`Class::Busy`] if a move of it isn't over: it decides. Any other if that can't be found out.
    pub fn require_settled(&self, name: &GuestName) -> Result<()> {
        match self.get()?.open_move(name) {
            Ok(row) => {
                let text = format!("guest {name} has an unfinished move ({})", row.peer);
                Err(Failure::new(Class::Busy, text).hint(format!("`layerctl guest resolve {name}` tells about it")))
            }
            Err(error) if error.class() == ErrorClass::NotFound => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes what moves of guest `name` have left here.
    pub fn forget(&self, name: &GuestName) -> Result<()> {
        Ok(self.get()?.forget_layers(name)?)
    }

    /// Lets go of the daemon.
    pub fn stop(&self) {
        *self.0.lock() = None;
    }

    /// Whether one is under way, or isn't over.
    pub fn is_busy(&self) -> bool {
        self.0.lock().as_ref().is_some_and(Migrations::is_busy)
    }

    /// The guests that are being stopped, restored or given back right now.
    pub fn at_work(&self) -> Vec<GuestName> {
        self.0.lock().as_ref().map(Migrations::at_work).unwrap_or_default()
    }

    /// Waits until none is, for `patience` at most; returns whether that is so. Blocks.
    pub fn wait_until_rests(&self, patience: Duration) -> bool {
        let moves = self.0.lock().clone();
        moves.is_none_or(|moves| moves.wait_until_rests(patience))
    }

    fn get(&self) -> Result<Migrations> {
        self.0
            .lock()
            .clone()
            .ok_or_else(|| Failure::new(Class::Busy, "the daemon is about to exit; try again in a moment"))
    }
}

/// `/v1/migrate`.
pub fn migrate(context: &Context, request: MigrateRequest) -> Result<Report> {
    let daemon = &context.daemon;
    let name = GuestName::new(&request.name)?;
    context.label(format!("move guest {name} to {}", request.peer));
    let _taken = daemon.guests.take(&name)?;
    let options = MigrateOptions {
        max_downtime: request.max_downtime.map(Duration::from_millis),
        rounds: request.rounds.map_or(Rounds::Auto, Rounds::Exactly),
        ahead: match request.layers {
            Layers::Auto => Ahead::Auto,
            Layers::Two => Ahead::Base,
            Layers::Three => Ahead::Application,
        },
        post_copy: request.post_copy,
        dry_run: request.dry_run,
        limit: rate(request.limit.unwrap_or(0))?,
        gives_back: !request.no_give_back,
        any_kernel: request.force_kernel,
        defer: request.defer.map_or(MigrateOptions::default().defer, Duration::from_secs),
        ..MigrateOptions::default()
    };
    let moved = daemon.moves.get()?.migrate(&name, &request.peer, options, context.reporter.clone());
    moved.map_err(|error| super::peers::with_peers_hint(error.into()))
}

/// `/v1/reports`.
pub fn reports(context: &Context, _: Empty) -> Result<ReportList> {
    Ok(ReportList { reports: report::load(&context.daemon.store)? })
}

/// `/v1/report`.
pub fn report(context: &Context, request: ReportRequest) -> Result<Report> {
    report::find(&context.daemon.store, &request.id).map_err(|error| match error {
        layerfs::Error::NotFound { .. } if request.id.is_empty() => {
            Failure::new(Class::NotFound, "there are no reports yet; each migration from here leaves one")
        }
        error => Failure::from(error).hint("`layerctl report` lists them"),
    })
}

/// `/v1/guest-resolve`.
pub fn resolve(context: &Context, request: ResolveRequest) -> Result<MoveInfo> {
    let daemon = &context.daemon;
    let name = GuestName::new(&request.name)?;
    let moves = daemon.moves.get()?;
    let with_hint = |error: migrator::Error| {
        let failure = Failure::from(error);
        match failure.class {
            Class::NotFound => failure.hint(format!(
                "there is nothing to decide: `layerctl guest show {name}` says how the guest stands, `layerctl report` which moves there were"
            )),
            _ => failure,
        }
    };
    let resolution = match request.action {
        ResolveAction::Show => return Ok(info(&moves.open_move(&name).map_err(with_hint)?)),
        ResolveAction::Ask => Resolution::Ask,
        ResolveAction::RunHere => Resolution::RunHere,
        ResolveAction::GiveUp => Resolution::GiveUp,
    };
    context.label(format!("decide about the move of guest {name}"));
    let _taken = daemon.guests.take(&name)?;
    Ok(info(&moves.resolve(&name, resolution).map_err(with_hint)?))
}

/// How a word of the migrator's is written in JSON.
fn word<T: serde::Serialize>(value: T) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn info(row: &Row) -> MoveInfo {
    let (side, phase) = match &row.side {
        Side::Source { phase } => ("source", word(phase)),
        Side::Destination { phase, .. } => ("destination", word(phase)),
    };
    MoveInfo {
        id: row.id.to_string(),
        guest: row.guest().to_string(),
        peer: row.peer.clone(),
        side: side.to_owned(),
        phase,
        epoch: row.epoch,
        is_ended: row.is_ended(),
        is_in_doubt: row.is_in_doubt(),
        began: row.began,
        note: row.note.clone(),
        advice: advice(row),
    }
}

/// What an operator should know.
fn advice(row: &Row) -> String {
    let (guest, peer) = (row.guest(), &row.peer);
    match &row.side {
        Side::Source { phase: source::Phase::Released } => format!(
            "guest {guest} is {peer}'s; a frozen copy is kept here until {peer} says that it runs there. Look there: `layerctl guest \
             show {guest}`. If {peer} has it, or will come back, leave it to {peer}. --run-here lets the copy here go on: if it runs \
             on {peer} too, there are two with one address, and what clients were told by one the other doesn't know. --give-up \
             removes the copy here: if {peer} has lost it, it is gone"
        ),
        Side::Source { phase: source::Phase::Stopping } => format!(
            "guest {guest} isn't released: what doesn't go to {peer} goes on here, and is put on record, which is tried again and again. \
             If it stands still, --give-up ends what is left of it here: its memory is gone, and `layerctl guest start {guest}` begins it anew from its disk"
        ),
        Side::Source { phase: source::Phase::Returned } => format!(
            "guest {guest} is this host's again and is to go on, which is tried again and again. If it doesn't, --give-up removes what is left of it \
             here, its disk too: if {peer} has refused or lost it, it is gone"
        ),
        Side::Destination { phase: destination::Phase::Staged, .. } => format!(
            "guest {guest} can be restored here, but {peer} hasn't said whether it has released it. Look there: `layerctl guest show \
             {guest}`. --run-here restores it: if it goes on on {peer} too, there are two with one address. --give-up forgets what \
             came here: if {peer} had released it and is lost, it is gone"
        ),
        Side::Destination { phase: destination::Phase::Committed, .. } => format!(
            "guest {guest} is this host's and doesn't run yet: it couldn't be restored, or the daemon began anew and {peer} hasn't said \
             again that it released it, or it had gone on here and has died, which is noted then. Look there: `layerctl guest show {guest}`. \
             --run-here restores it, or, if it had gone on here, leaves it here to be started from its disk: if it was taken back on \
             {peer}, there are two with one address. --give-up removes it here, its disk too, and gives it back to {peer}, where it goes on \
             as it was when it stopped there"
        ),
        _ if row.is_ended() => String::new(),
        _ => format!("what is left to do for guest {guest} is tried again and again; nothing has to be decided"),
    }
}
