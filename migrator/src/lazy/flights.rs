//! Chunks that somebody waits for: each is on its way once, however many want it.
//!
//! Invariant: a flight ends, with the chunk or without, or its readers stop waiting by themselves; nothing of a failed
//! one is kept.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use layerfs::ChunkId;
use parking_lot::{Condvar, Mutex};

/// A chunk on its way to those who wait for it.
#[derive(Debug, Default)]
pub(super) struct Flight {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    outcome: Option<Option<Bytes>>,
    readers: usize,
    /// Sources that don't have it.
    refused: HashSet<String>,
}

impl Flight {
    /// What came, or `None` after `time`; inside: the chunk, or that no source has it.
    pub fn wait(&self, time: Duration) -> Option<Option<Bytes>> {
        let mut state = self.state.lock();
        if state.outcome.is_none() {
            self.changed.wait_for(&mut state, time);
        }
        state.outcome.clone()
    }
}

/// All flights.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<ChunkId, Arc<Flight>>>);

impl Flights {
    /// Joins the flight of `id`; says whether it is a new one. Leave it with [`Flights::leave`].
    pub fn join(&self, id: &ChunkId) -> (Arc<Flight>, bool) {
        let mut flights = self.0.lock();
        let is_new = !flights.contains_key(id);
        let flight = flights.entry(*id).or_default().clone();
        flight.state.lock().readers += 1;
        (flight, is_new)
    }

    /// A reader waits no longer.
    pub fn leave(&self, id: &ChunkId, flight: &Arc<Flight>) {
        let mut flights = self.0.lock();
        let mut state = flight.state.lock();
        state.readers -= 1;
        if state.readers == 0 && flights.get(id).is_some_and(|known| Arc::ptr_eq(known, flight)) {
            flights.remove(id);
        }
    }

    /// Whether somebody waits for `id`.
    pub fn is_awaited(&self, id: &ChunkId) -> bool {
        self.0.lock().contains_key(id)
    }

    /// Those that somebody waits for.
    pub fn awaited(&self) -> Vec<ChunkId> {
        self.0.lock().keys().copied().collect()
    }

    /// Chunk `id` has come.
    pub fn land(&self, id: &ChunkId, plain: &Bytes) {
        self.end(id, Some(plain.clone()));
    }

    /// `source` doesn't have `id`; returns whether one of `sources` may still have it.
    pub fn refuse(&self, id: &ChunkId, source: &str, sources: &[String]) -> bool {
        let Some(flight) = self.0.lock().get(id).cloned() else { return false };
        let is_over = {
            let mut state = flight.state.lock();
            state.refused.insert(source.to_owned());
            sources.iter().all(|source| state.refused.contains(source))
        };
        if is_over {
            self.end(id, None);
        }
        !is_over
    }

    fn end(&self, id: &ChunkId, outcome: Option<Bytes>) {
        let Some(flight) = self.0.lock().remove(id) else { return };
        flight.state.lock().outcome = Some(outcome);
        flight.changed.notify_all();
    }
}
