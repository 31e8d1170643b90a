//! Pushing to and pulling from OCI registries.
//!
//! It hides the distribution protocol (the crate `oci-client` speaks it), retries, and what lies in a registry for a
//! stack. Invariants: nothing that comes from a registry is used before its digest was compared; what goes there is
//! uploaded only if it isn't there; a tag appears when everything that it needs is there, and a name likewise.

mod address;
mod client;
mod image;
mod parcels;

use std::sync::Arc;

use layerfs::import::ImportReport;
use layerfs::monitor::Monitor;
use layerfs::platform::Platform;
use layerfs::store::{Expect, Store};
use layerfs::{LayerId, LayerName};
use serde::Serialize;

pub use address::Address;

use crate::error::{Error, Result};
use client::Remote;

/// How to reach a registry.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Who one is there; nobody if not said.
    pub login: Option<Login>,
    /// Without TLS: for registries on this machine and for tests.
    pub plain_http: bool,
}

/// A user's name and password (or token) for a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The user's name.
    pub username: String,
    /// The password.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Login({}, …)", self.username)
    }
}

/// What a push did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Pushed {
    /// The digest of the manifest that the tag refers to.
    pub digest: String,
    /// Blobs that were uploaded.
    pub blobs_sent: u64,
    /// Blobs that were there already.
    pub blobs_reused: u64,
    /// The bytes of those that were uploaded.
    pub bytes_sent: u64,
}

/// What a pull did.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The digest of the image's manifest.
    pub digest: String,
    /// The layer that the name refers to.
    pub layer: LayerId,
    /// Layers of the stack.
    pub layers: u64,
    /// Blobs that were downloaded.
    pub blobs_received: u64,
    /// Their bytes.
    pub bytes_received: u64,
    /// How the image became a stack; none for one that was pushed as packs.
    pub import: Option<ImportReport>,
}

/// How to push.
#[derive(Clone, Debug)]
pub struct PushTo {
    /// Where to; with a tag.
    pub address: Address,
    /// How to get there.
    pub access: Access,
    /// What to make of the stack.
    pub form: Form,
}

/// What a stack becomes in a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// An image that every container engine can run: an archive for each layer, compressed so.
    Image(layerfs::export::Compression),
    /// An artifact of our own: its chunks in packs, of which only those with lacking chunks go either way.
    Packs,
}

/// How to pull.
#[derive(Clone, Debug)]
pub struct PullFrom {
    /// Where from.
    pub address: Address,
    /// How to get there.
    pub access: Access,
    /// The platform of an image; this machine's if not said.
    pub platform: Option<Platform>,
    /// The name that the layer gets.
    pub name: LayerName,
    /// What that name must be before.
    pub expect: Expect,
}

/// Pushes the stack with top `layer`.
///
/// # Errors
/// [`Error::Registry`]; those of the store.
pub async fn push(store: &Arc<Store>, layer: LayerId, to: &PushTo, monitor: Arc<dyn Monitor>) -> Result<Pushed> {
    to.address.check_tag()?;
    if to.form == Form::Packs && !store.partials_of_stack(layer)?.is_empty() {
        return Err(Error::refused(
            layerfs::error::ErrorClass::Busy,
            "not all chunks of the stack are here yet; try again when `layerctl list` says that it is whole",
        ));
    }
    let remote = Remote::open(&to.address, &to.access, monitor.clone(), client::Right::Push).await?;
    match to.form {
        Form::Image(compression) => image::push(store, layer, compression, &remote, monitor).await,
        Form::Packs => parcels::push(store, layer, &remote, monitor).await,
    }
}

/// Pulls an image, or a stack that was pushed as packs, and gives it a name.
///
/// # Errors
/// [`Error::Registry`]; [`layerfs::Error::Exists`] if the name is taken; those of an import.
pub async fn pull(store: &Arc<Store>, from: &PullFrom, monitor: Arc<dyn Monitor>) -> Result<Pulled> {
    if from.expect == Expect::Absent && store.name(&from.name)?.is_some() {
        return Err(layerfs::Error::Exists { what: "layer", name: from.name.to_string() }.into());
    }
    let remote = Remote::open(&from.address, &from.access, monitor.clone(), client::Right::Pull).await?;
    let found = image::find(&remote, from.platform.as_ref()).await?;
    if found.is_stack() {
        return parcels::pull(store, from, found, &remote, monitor).await;
    }
    image::pull(store, from, found, &remote, monitor).await
}

/// Runs what blocks on a thread for that.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Error::refused(layerfs::error::ErrorClass::Io, format!("a thread of the transfer died: {error}")))
    })
}
