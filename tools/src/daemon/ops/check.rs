//! Keeping the store well: fsck, scrub, gc.

use crate::api::storage::FsckResult;
use crate::commands::Session;
use crate::failure::{Class, Failure, Result};

/// Rebuilds the index from the packs, without a daemon.
pub fn rebuild(_: &Session) -> Result<FsckResult> {
    Err(Failure::new(Class::Unsupported, "rebuilding is not in this build"))
}
