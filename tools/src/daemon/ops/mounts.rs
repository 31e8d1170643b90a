//! The mounts.

use std::sync::Arc;

use layerfs::store::Store;

use crate::failure::Result;

/// The daemon's mounts.
#[derive(Debug)]
pub struct Mounts;

impl Mounts {
    /// None yet.
    pub fn new(_: &Arc<Store>) -> Result<Mounts> {
        Ok(Mounts)
    }

    /// Mounts again what was mounted when the last daemon died.
    pub fn bring_back(&self, _: &Arc<Store>) {}

    /// How many there are.
    pub fn count(&self) -> usize {
        0
    }

    /// The layer and the path in it of something in a mount.
    pub fn locate(&self, path: &std::path::Path) -> Result<(layerfs::LayerId, Vec<u8>)> {
        Err(layerfs::Error::NotFound { what: "mount of", name: path.display().to_string() }.into())
    }

    /// Unmounts all; `lazy` detaches what is in use.
    pub fn unmount_all(&self, _lazy: bool) -> Result<()> {
        Ok(())
    }
}
