//! Chunks whose stored copy was found damaged, by a read or a scrub.
//!
//! Hides how a damaged chunk heals by itself: whoever adds chunks asks here too, so that a suspect counts as lacking
//! and its next good copy (an import of the same content, a transfer) is stored instead of being left out. In memory
//! only, and bounded: what is forgotten here is found again by the next read or scrub.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;

use crate::error::{Error, Result};
use crate::id::ChunkId;

/// About 2 MiB of ids.
const LIMIT: usize = 32 * 1024;

#[derive(Debug, Default)]
pub(crate) struct Suspects {
    /// How many there are, so that nobody locks anything in a healthy store.
    count: AtomicUsize,
    ids: RwLock<HashSet<ChunkId>>,
}

impl Suspects {
    /// Remembers the chunk that `result` says is damaged.
    pub fn note<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(Error::ChunkDamaged { id, .. }) = &result {
            self.add(*id);
        }
        result
    }

    pub fn add(&self, id: ChunkId) {
        let mut ids = self.ids.write();
        if ids.len() < LIMIT {
            ids.insert(id);
        }
        self.count.store(ids.len(), Ordering::Release);
    }

    pub fn contains(&self, id: &ChunkId) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.ids.read().contains(id)
    }

    /// The index refers to good copies of these now.
    pub fn clear<'a>(&self, healed: impl IntoIterator<Item = &'a ChunkId>) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut ids = self.ids.write();
        for id in healed {
            ids.remove(id);
        }
        self.count.store(ids.len(), Ordering::Release);
    }
}
