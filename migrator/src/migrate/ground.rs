//! Whether the disk of a guest still is what belongs to its state.
//!
//! A guest that goes on changes its disk. If it then ends, with its machine or by itself, before its row says that it went on, its state
//! is older than its disk: restored, it would find files that it has never written. What this program has seen is kept in mind; of what
//! an earlier one did only the disk itself can tell, for neither a row nor anything else need have been written.
//!
//! Invariants: nothing is restored over a disk that may have changed since its state was made; what a restore that came to nothing has
//! left on the disk goes before the next.

use super::Migrations;
use crate::error::Result;
use crate::handover::journal::{Layers, Row};

/// What is said of a guest that can't go on from its state any more.
pub(super) const WENT_ON: &str =
    "had gone on here from its state and has ended since, or a hook has written, and its disk is newer than that state";

/// What this program knows of a guest's disk. If it knows nothing the disk has to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ground {
    /// The guest hasn't run on it.
    Untouched,
    /// Only a restore that came to nothing was begun on it, of which nobody has seen anything.
    Spoilt,
}

/// What became of a disk that a state is to be restored over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Laid {
    /// It is as it was.
    AsItWas,
    /// It was made anew.
    Anew,
    /// It is newer than the state.
    Newer,
}

impl Migrations {
    /// Sees to it that the disk of the guest of `row`, of which nothing runs, is what belongs to its state, if that can be.
    pub(super) fn lay_ground(&self, row: &Row, layers: Layers) -> Result<Laid> {
        let known = self.0.grounds.lock().get(&row.id).copied();
        let laid = match known {
            Some(Ground::Untouched) => Laid::AsItWas,
            Some(Ground::Spoilt) => {
                self.0.host.unmount(row.guest(), true)?;
                Laid::Anew
            }
            None if self.0.host.has_changed(row.guest(), layers.instance)? => return Ok(Laid::Newer),
            None => Laid::AsItWas,
        };
        self.is_untouched(row);
        Ok(laid)
    }

    /// The guest of `row` hasn't run here from its state.
    pub(super) fn is_untouched(&self, row: &Row) {
        self.0.grounds.lock().insert(row.id, Ground::Untouched);
    }

    /// A restore failed, and nothing of it is left. False if nothing is known of its disk: the failure was to find that out.
    pub(super) fn may_be_spoilt(&self, row: &Row) -> bool {
        self.0.grounds.lock().get_mut(&row.id).map(|ground| *ground = Ground::Spoilt).is_some()
    }

    /// The guest of `row` runs, or may.
    pub(super) fn forget_ground(&self, row: &Row) {
        self.0.grounds.lock().remove(&row.id);
    }
}
