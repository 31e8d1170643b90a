//! A guest's memory at its destination: kept as each round brings it, so that only what changed last is read while the guest stands
//! still.
//!
//! For guests whose states have a file of memory ([`Memory`]). It goes with this process, or becomes the guest's own.

use std::sync::{Arc, Weak};
use std::time::Duration;

use layerfs::LayerId;
use layerfs::store::Store;
use parking_lot::Mutex;
use tokio::task::spawn_blocking;

use super::Migrations;
use crate::error::{Error, Result};
use crate::guest::memory::{self, Memory};
use crate::guest::{GuestName, Host, mebibytes};

/// The names of rounds' states, after `guest/NAME/`, which are used in turn.
const ROUNDS: [&str; 2] = ["round-0", "round-1"];
/// So often it is looked whether a round has come.
const LOOKS: Duration = Duration::from_millis(100);

/// The memory of a guest that is on its way.
#[derive(Default)]
pub(super) struct Kept {
    memory: Option<Memory>,
    /// The last state is there: nothing more is to be brought here.
    is_over: bool,
}

impl Kept {
    /// The memory of `state`, the last one, if any was kept. It isn't here any more.
    pub fn finish(&mut self, store: &Arc<Store>, state: LayerId) -> Option<Memory> {
        self.is_over = true;
        let made = Memory::of(store, state, Some(self.memory.take()?));
        made.unwrap_or_else(|error| {
            tracing::warn!(%state, %error, "memory that was kept is read once more");
            None
        })
    }
}

impl Migrations {
    /// Has the memory of guest `name` follow its rounds as long as there is what is returned.
    pub(super) fn keep_memory(&self, name: &GuestName) -> Arc<Mutex<Kept>> {
        let kept = Arc::new(Mutex::new(Kept::default()));
        let (weak, me, name) = (Arc::downgrade(&kept), Arc::downgrade(&self.0), name.clone());
        let mut seen = rounds_of(self.0.guests.store(), &name);
        self.0.runtime.spawn(async move {
            loop {
                tokio::time::sleep(LOOKS).await;
                let Some(store) = Migrations::of(&me).map(|me| me.0.guests.store().clone()) else { return };
                let there = rounds_of(&store, &name);
                let new = there.into_iter().flatten().find(|layer| !seen.contains(&Some(*layer)));
                seen = there;
                let weak = weak.clone();
                if spawn_blocking(move || follow(&weak, &store, new)).await.unwrap_or(true) {
                    return;
                }
            }
        });
        kept
    }
}

/// The states of the last rounds of guest `name`.
fn rounds_of(store: &Store, name: &GuestName) -> [Option<LayerId>; 2] {
    ROUNDS.map(|round| store.name(&name.layer(round).ok()?).ok()?.map(|record| record.layer))
}

/// Brings what is kept to what `layer` has. Returns whether that was the last time.
fn follow(kept: &Weak<Mutex<Kept>>, store: &Arc<Store>, layer: Option<LayerId>) -> bool {
    let Some(kept) = kept.upgrade() else { return true };
    let mut kept = kept.lock();
    if let (Some(layer), false) = (layer, kept.is_over) {
        let last = kept.memory.take();
        match brought(store, layer, last) {
            Ok(memory) => kept.memory = memory,
            Err(error) => tracing::warn!(%layer, %error, "the memory of a guest that comes isn't kept"),
        }
    }
    kept.is_over
}

/// The memory of `layer`, if it has any and there is room for twice as much.
fn brought(store: &Arc<Store>, layer: LayerId, last: Option<Memory>) -> Result<Option<Memory>> {
    match Memory::bytes_of(store, layer)? {
        Some(bytes) if last.is_some() || has_room(2 * bytes) => Memory::of(store, layer, last),
        _ => Ok(None),
    }
}

/// Fails if `host` can't give a guest the memory of `state`, of which `kept` is here already.
///
/// # Errors
/// That, with both figures; those of the store.
pub(super) fn must_fit(
    host: &dyn Host,
    store: &Arc<Store>,
    (name, state): (&GuestName, LayerId),
    kept: Option<&Memory>,
) -> Result<()> {
    let Some(free) = host.memory() else { return Ok(()) };
    let room = free.saturating_add(kept.map_or(0, Memory::held_bytes));
    match memory::exceeds(store, state, room)? {
        None => Ok(()),
        Some(bytes) => {
            let detail = format!(
                "it has {}, and this host has only {} for it; end something here, or move it with --postcopy",
                mebibytes(bytes),
                mebibytes(room)
            );
            Err(Error::guest("restore", name, detail))
        }
    }
}

/// Whether so much memory is free.
fn has_room(bytes: u64) -> bool {
    memory::available().is_some_and(|available| available > bytes)
}
