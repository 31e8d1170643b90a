//! What goes on with nobody waiting for it: asking what became of moves, trying again what failed, and taking up after a
//! restart what was under way.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::task::{JoinHandle, spawn_blocking};

use super::{Migrations, Resolution, busy};
use crate::error::Result;
use crate::guest::{GuestName, GuestState};
use crate::handover::journal::{Row, Side};
use crate::handover::{Fate, MoveId, destination, source};
use crate::peers::Peer;
use crate::send::joined;

/// What moves call the layers of a guest, after `guest/NAME/`.
const PARTS: [&str; 5] = ["base", "instance", "state", "round-0", "round-1"];
/// Those that count only as what the next move's are like.
const PASSING: [&str; 3] = ["state", "round-0", "round-1"];
/// How long one question in the background may take.
const QUESTION: Duration = Duration::from_secs(5);
/// So often in the time of a lease it is looked whether anything was heard, and said that the guest still comes.
const LOOKS: u32 = 20;

/// Says to a destination again and again that its guest still comes, until this is dropped.
pub(super) struct Announced(JoinHandle<()>);

impl Drop for Announced {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Migrations {
    /// Takes up every move that isn't over: finishes it, takes it back, or begins to ask. Blocks.
    ///
    /// # Errors
    /// Those of the index; what can't be finished now goes on in the background.
    pub fn recover(&self) -> Result<()> {
        for row in self.0.journal.list()?.into_iter().filter(|row| !row.is_ended()) {
            tracing::info!(guest = %row.guest(), id = %row.id, fate = ?row.fate(), "takes up an unfinished move");
            let taken_up = match row.side {
                Side::Source { .. } => self.depart_on(row.id, source::Event::Restarted),
                Side::Destination { .. } => self.arrive_on(row.id, destination::Event::Restarted).map(drop),
            };
            if let Err(error) = taken_up {
                tracing::warn!(guest = %row.guest(), %error, "an unfinished move couldn't be taken up; it is tried again");
                self.later(row.id);
            }
        }
        self.note_ends()?;
        Ok(self.0.journal.prune()?)
    }

    /// Removes the names of the layers that moves of `guest` have left here. Nothing that is mounted goes. Blocks.
    ///
    /// # Errors
    /// Those of the index.
    pub fn forget_layers(&self, guest: &GuestName) -> Result<()> {
        self.forget_parts(guest, &PARTS)
    }

    fn forget_parts(&self, guest: &GuestName, parts: &[&str]) -> Result<()> {
        let store = self.0.guests.store();
        for part in parts {
            match store.remove_name(&guest.layer(part)?) {
                Ok(_) | Err(layerfs::Error::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Does so for guests that went away or never came and whose last move began longer ago than `age`, and removes the states of
    /// those that are here. Until then what they left makes their way back short. Calls `remove_folders` for guests that there are
    /// none of any more, also for those of `folders` that nobody knows: asking whether a guest may come makes some. Forgets the oldest moves, if there are many. Blocks.
    ///
    /// # Errors
    /// Those of the index.
    pub fn expire(&self, age: Duration, folders: Vec<GuestName>, remove_folders: impl Fn(&GuestName)) -> Result<()> {
        let rows = self.0.journal.list()?;
        let since = layerfs::attr::Time::now().seconds.saturating_sub_unsigned(age.as_secs());
        let known = self.0.guests.list()?.into_iter().map(|record| record.spec.name);
        let guests: BTreeSet<GuestName> =
            known.chain(rows.iter().map(|row| row.guest().clone())).chain(folders).collect();
        for name in &guests {
            let lock = self.lock_of(name);
            // Whoever has it takes steps of a move.
            let Some(_held) = lock.try_lock() else { continue };
            let mut moves = rows.iter().filter(|row| row.guest() == name).peekable();
            let has_moved = moves.peek().is_some();
            // A row that can't be read may be of a move that isn't over.
            if !moves.all(|row| row.began < since) || !matches!(self.0.journal.open_of(name), Ok(None)) {
                continue;
            }
            match self.0.guests.find(name)?.map(|record| record.state) {
                None => {
                    // Names that no move has left are somebody else's.
                    self.forget_parts(name, if has_moved { &PARTS } else { &[] })?;
                    remove_folders(name);
                }
                Some(GuestState::Away) => self.forget_parts(name, &PARTS)?,
                // It has gone on from that state since, and its layers lie below its mount or its upper.
                Some(GuestState::Running | GuestState::Created) if has_moved => {
                    self.forget_parts(name, &PASSING)?;
                    let state = name.layer("state")?;
                    self.0.guests.update(name, |record| {
                        record.state_layer.take_if(|layer| *layer == state);
                        Ok(())
                    })?;
                }
                Some(_) => {}
            }
        }
        // A host that is only moved to ends no move by itself.
        Ok(self.0.journal.prune()?)
    }

    /// Does what the operator says about the move of `guest` that isn't over. Blocks.
    ///
    /// # Errors
    /// If there is none, or what follows from it failed.
    pub fn resolve(&self, guest: &GuestName, resolution: Resolution) -> Result<Row> {
        let row = self.open_move(guest)?;
        if self.0.leaving.lock().contains(guest) {
            return Err(busy(format!("guest {guest} is being moved right now; cancel that instead")));
        }
        if resolution == Resolution::Ask {
            self.0.runtime.block_on(self.ask_once(row.id))?;
        } else {
            match row.side {
                Side::Source { .. } => {
                    let event = match resolution {
                        Resolution::RunHere => source::Event::RunHere,
                        _ => source::Event::GiveUp,
                    };
                    self.depart_on(row.id, event)?;
                }
                Side::Destination { .. } => {
                    let event = match resolution {
                        Resolution::RunHere => destination::Event::RunHere,
                        _ => destination::Event::GiveUp,
                    };
                    self.arrive_on(row.id, event)?;
                }
            }
        }
        Ok(self.0.journal.get(row.id)?.unwrap_or(row))
    }

    /// Works on the move `id` in the background until it is over.
    pub(super) fn later(&self, id: MoveId) {
        if !self.0.awaited.lock().insert(id) {
            return;
        }
        // A program that ends needn't wait: the journal says what is left to do.
        let weak = std::sync::Arc::downgrade(&self.0);
        let (mut pause, longest) = self.0.timing.pauses;
        self.0.runtime.spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
                let Some(me) = Migrations::of(&weak) else { return };
                match me.ask_once(id).await {
                    Ok(true) => {
                        me.0.awaited.lock().remove(&id);
                        return;
                    }
                    Ok(false) => {}
                    Err(error) => tracing::info!(%id, %error, "an unfinished move is still so"),
                }
            }
        });
    }

    /// Tries once to get on with the move `id`; returns whether there is nothing left for the background.
    async fn ask_once(&self, id: MoveId) -> Result<bool> {
        let (me, journal) = (self.clone(), self.0.journal.clone());
        let row = joined(spawn_blocking(move || Ok(journal.get(id)?)).await)?;
        let Some(row) = row.filter(|row| !row.is_ended()) else { return Ok(true) };
        if matches!(row.side, Side::Source { .. }) && self.0.leaving.lock().contains(row.guest()) {
            return Ok(false);
        }
        // Only those that are in doubt have something to ask; the others try again what failed.
        let asks =
            row.is_in_doubt() || matches!(row.side, Side::Destination { phase: destination::Phase::Committed, .. });
        let told = if asks { self.what_became_of(&row).await } else { None };
        let is_source = matches!(row.side, Side::Source { .. });
        joined(
            spawn_blocking(move || match (is_source, told) {
                (true, Some(fate)) => me.depart_on(id, source::Event::Told(fate)),
                (true, None) if row.is_in_doubt() => me.depart_on(id, source::Event::Silence),
                (true, None) => me.depart_on(id, source::Event::Restarted),
                (false, Some(fate)) => me.arrive_on(id, destination::Event::Told(fate)).map(drop),
                (false, None) if asks => me.arrive_on(id, destination::Event::Silence).map(drop),
                (false, None) => me.arrive_on(id, destination::Event::Again).map(drop),
            })
            .await,
        )?;
        let journal = self.0.journal.clone();
        let row = joined(spawn_blocking(move || Ok(journal.get(id)?)).await)?;
        Ok(row.is_none_or(|row| row.is_ended()))
    }

    async fn what_became_of(&self, row: &Row) -> Option<Fate> {
        let peer = self.other_side(row).await.ok()?;
        let mut control = self.control(peer);
        let said = control.inquire(row.id, QUESTION).await;
        control.close().await;
        match said {
            Ok(said) => {
                tracing::debug!(guest = %row.guest(), id = %row.id, fate = ?said.fate, "what the other side says of a move");
                Some(said.fate)
            }
            Err(error) => {
                tracing::debug!(guest = %row.guest(), %error, "the other side didn't say what became of a move");
                None
            }
        }
    }

    /// Lets the destination `peer` expect the guest of `row` for as long as the result lives: many can't ask this host, as it has no
    /// address for them.
    pub(super) fn announce(&self, row: &Row, peer: &Peer) -> Announced {
        let (id, pause) = (row.id, self.0.timing.lease / LOOKS);
        let mut control = self.control(peer.clone());
        Announced(self.0.runtime.spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                // What it answers is asked for before the guest stops.
                let _ = control.inquire(id, QUESTION).await;
            }
        }))
    }

    /// A guest that was announced is forgotten when nothing is heard of it for the time of the lease; one that could be
    /// restored is asked after much sooner.
    pub(super) fn watch_lease(&self, id: MoveId) {
        let weak = std::sync::Arc::downgrade(&self.0);
        let lease = self.0.timing.lease;
        self.0.runtime.spawn(async move {
            loop {
                tokio::time::sleep(lease / LOOKS).await;
                let Some(me) = Migrations::of(&weak) else { return };
                let journal = me.0.journal.clone();
                let row = match joined(spawn_blocking(move || Ok(journal.get(id)?)).await) {
                    Ok(Some(row)) => row,
                    Ok(None) => return,
                    // It is watched as long as nobody knows that it is over.
                    Err(error) => {
                        tracing::warn!(%id, %error, "the row of a guest that is expected can't be read");
                        continue;
                    }
                };
                let heard = me.0.arriving.lock().get(&id).map(|arrival| arrival.heard.elapsed());
                match row.side {
                    Side::Destination { phase: destination::Phase::Staged, .. } => {
                        if heard.is_none_or(|silence| silence > lease / LOOKS) {
                            me.later(id);
                            return;
                        }
                    }
                    Side::Destination { phase: destination::Phase::Arriving, .. } => {
                        if heard.is_some_and(|silence| silence > lease) && me.forget(&row).await {
                            return;
                        }
                    }
                    _ => return,
                }
            }
        });
    }

    /// Forgets a guest that was only announced, unless the source still means to send it.
    async fn forget(&self, row: &Row) -> bool {
        if self.what_became_of(row).await == Some(Fate::Pending) {
            if let Some(arrival) = self.0.arriving.lock().get_mut(&row.id) {
                arrival.heard = std::time::Instant::now();
            }
            return false;
        }
        let (me, id) = (self.clone(), row.id);
        let expired = spawn_blocking(move || me.arrive_on(id, destination::Event::Expired).map(drop));
        if let Err(error) = joined(expired.await) {
            tracing::warn!(%id, %error, "a guest that never came couldn't be forgotten");
        }
        true
    }
}
