//! What a guest, and whoever moves one, needs of the host: mounts and layers.
//!
//! Mounts belong to the daemon; tests put plain folders behind this.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use layerfs::{LayerId, LayerName};

use super::GuestName;
use crate::error::Result;

/// What a host does for its guests. All calls block.
pub trait Host: Send + Sync {
    /// Where the guest's root is mounted, or would be.
    fn root(&self, guest: &GuestName) -> PathBuf;

    /// A folder for what the guest's driver keeps of it (process numbers, sockets, logs). It is there, survives the
    /// daemon, and goes with the guest.
    ///
    /// # Errors
    /// If it can't be made.
    fn run_folder(&self, guest: &GuestName) -> Result<PathBuf>;

    /// A new folder for a state that is being written, on memory if there is enough of it. It goes by [`Host::remove_scratch`] or
    /// [`Host::remove_scratches`] and, but for those, survives the daemon: a guest that has ended with its dump may have nothing else.
    ///
    /// # Errors
    /// If it can't be made.
    fn scratch(&self, guest: &GuestName, bytes: u64) -> Result<PathBuf>;

    /// Removes what [`Host::scratch`] has made at `path`, and the folders above it that nothing else is in.
    ///
    /// # Errors
    /// If it can't be removed.
    fn remove_scratch(&self, guest: &GuestName, path: &Path) -> Result<()>;

    /// Removes all that [`Host::scratch`] has made for the guest. Fine if there is nothing.
    ///
    /// # Errors
    /// If it can't be removed.
    fn remove_scratches(&self, guest: &GuestName) -> Result<()>;

    /// How much memory a guest can get here, in bytes, if that is known.
    fn memory(&self) -> Option<u64>;

    /// Mounts the stack whose top is `stack` at [`Host::root`], with the guest's own upper, which is made if there is none.
    /// Fine if it is mounted so.
    ///
    /// # Errors
    /// Those of mounting; [`layerfs::Error::Busy`] if the upper lies on another stack.
    fn mount(&self, guest: &GuestName, stack: LayerId) -> Result<PathBuf>;

    /// Whether the disk of the guest, which doesn't run, isn't any more as `stack` has it. It is mounted then as by [`Host::mount`], unless its
    /// upper lies on another stack already. What has changed may be made a layer meanwhile, the upper's new base.
    ///
    /// # Errors
    /// Those of mounting and of sealing.
    fn has_changed(&self, guest: &GuestName, stack: LayerId) -> Result<bool>;

    /// Makes what the guest's upper holds a layer called `name`, whatever that name was before; the mount goes on over it.
    /// Returns the layer on top of which the mount is now: the one below if the upper held nothing.
    ///
    /// # Errors
    /// Those of sealing; nothing has changed then.
    fn seal(&self, guest: &GuestName, name: &LayerName) -> Result<LayerId>;

    /// Makes the guest's instance layers one, of the name `name` which refers to the top, if they are more than `past`; the mount
    /// goes on over that. Returns it if so.
    ///
    /// # Errors
    /// Those of squashing; nothing has changed then.
    fn fold(&self, guest: &GuestName, name: &LayerName, past: usize) -> Result<Option<LayerId>>;

    /// Unmounts the guest's root, and drops its upper with all that isn't sealed if `discard`. Fine if it isn't mounted.
    ///
    /// # Errors
    /// [`layerfs::Error::Busy`].
    fn unmount(&self, guest: &GuestName, discard: bool) -> Result<()>;

    /// Makes the files of a layer readable: mounts it read-only. Data may still be on its way.
    ///
    /// # Errors
    /// Those of mounting.
    fn open_layer(&self, guest: &GuestName, layer: LayerId) -> Result<PathBuf>;

    /// Ends what [`Host::open_layer`] began. Fine if there is nothing.
    ///
    /// # Errors
    /// [`layerfs::Error::Busy`].
    fn close_layer(&self, guest: &GuestName) -> Result<()>;
}

/// A folder of [`Host::scratch`], which goes when this is dropped.
pub struct Scratch {
    host: Arc<dyn Host>,
    guest: GuestName,
    path: PathBuf,
}

impl Scratch {
    /// An empty one for a state of `guest` of about so many `bytes`.
    ///
    /// # Errors
    /// Those of [`Host::scratch`].
    pub fn new(host: &Arc<dyn Host>, guest: &GuestName, bytes: u64) -> Result<Scratch> {
        Ok(Scratch { path: host.scratch(guest, bytes)?, host: host.clone(), guest: guest.clone() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets it stay, for somebody who removes it. Returns where it is.
    pub fn leave(mut self) -> PathBuf {
        std::mem::take(&mut self.path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        if let Err(error) = self.host.remove_scratch(&self.guest, &self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a folder for a state wasn't removed");
        }
    }
}
