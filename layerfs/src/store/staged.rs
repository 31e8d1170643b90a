//! What transfers that haven't ended well have brought: kept from collection for a while, so that they can go on.
//!
//! Hides how that is remembered: which packs hold chunks that came for which layer, from when on. Invariants: a row is
//! there before the index knows the first chunk that it keeps; rows go when the layer has come whole, and by
//! themselves after [`KEPT_FOR`]. A manifest isn't kept: one that is there says that its layer is. FORMAT.md, "Index
//! database".

use std::collections::HashSet;
use std::time::Duration;

use crate::attr::Time;
use crate::codec::{Put, Reader};
use crate::error::Result;
use crate::id::LayerId;
use crate::store::db::{Batch, Cf, Sync};
use crate::store::{PackId, Store};

const PREFIX: &[u8] = b"staged/";

/// So long chunks wait for the rest of their layer.
pub const KEPT_FOR: Duration = Duration::from_secs(24 * 60 * 60);

fn prefix_of(layer: LayerId) -> Vec<u8> {
    [PREFIX, &layer.0.0[..]].concat()
}

fn key(layer: LayerId, pack: PackId) -> Vec<u8> {
    [&prefix_of(layer)[..], &pack.0.to_be_bytes()].concat()
}

impl Store {
    /// Chunks for `layer` will come to `pack`.
    pub(crate) fn stage(&self, layer: LayerId, pack: PackId) -> Result<()> {
        let mut since = Vec::new();
        since.put_i64(Time::now().seconds);
        let mut batch = Batch::new();
        batch.put(Cf::Transfers, key(layer, pack), since);
        // Written before the index rows that matter, it survives whatever they survive.
        self.db().write(batch, Sync::No)
    }

    /// `layers` have come whole, or won't: nothing is kept for them any more.
    ///
    /// # Errors
    /// Those of the database.
    pub fn unstage(&self, layers: &[LayerId]) -> Result<()> {
        let mut batch = Batch::new();
        for layer in layers {
            for row in self.db().iter(Cf::Transfers, &prefix_of(*layer))? {
                batch.delete(Cf::Transfers, row?.0);
            }
        }
        if batch.is_empty() { Ok(()) } else { self.db().write(batch, Sync::No) }
    }

    /// The packs that hold chunks for layers that are still to come. Rows that are too old at `now`, or damaged, go.
    pub(crate) fn staged_packs(&self, now: Time) -> Result<HashSet<PackId>> {
        let mut packs = HashSet::new();
        let mut old = Batch::new();
        for row in self.db().iter(Cf::Transfers, PREFIX)? {
            let (key, value) = row?;
            let since = Reader::new("staged record", &value).i64().unwrap_or(i64::MIN);
            let pack = key.last_chunk::<8>().map(|pack| PackId(u64::from_be_bytes(*pack)));
            // Of a clock that was put back nothing is to be feared but that it takes longer.
            match pack.filter(|_| now.seconds.saturating_sub(since) < KEPT_FOR.as_secs() as i64) {
                Some(pack) => drop(packs.insert(pack)),
                None => old.delete(Cf::Transfers, key),
            }
        }
        if !old.is_empty() && self.check_writable().is_ok() {
            self.db().write(old, Sync::No)?;
        }
        Ok(packs)
    }
}
