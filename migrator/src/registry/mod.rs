//! Pushing to and pulling from OCI registries.
//!
//! It hides the distribution protocol (the crate `oci-client` speaks it), retries, and what lies in a registry for a
//! stack. Both ways are transfers of the node, with its limits and priorities. Invariants: nothing that comes from a registry is used before its digest was compared; what goes there is
//! uploaded only if it isn't there; a tag appears when everything that it needs is there, and a name likewise.

mod address;
mod client;
mod image;
mod parcels;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use layerfs::import::ImportReport;
use layerfs::monitor::Monitor;
use layerfs::platform::Platform;
use layerfs::store::Expect;
use layerfs::{LayerId, LayerName};
use serde::Serialize;

pub use address::Address;

use crate::error::{Error, Result};
use crate::governor::Controls;
use crate::node::Node;
use crate::transfers::{Entry, Origin, Plan, Role};
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
    /// What the layer is called here, for the list of transfers.
    pub name: String,
    /// Where to; with a tag.
    pub address: Address,
    /// How to get there.
    pub access: Access,
    /// What to make of the stack.
    pub form: Form,
    /// How it is to go.
    pub controls: Controls,
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
    /// How it is to go.
    pub controls: Controls,
}

/// Pushes the stack with top `layer` of `node`'s store.
///
/// # Errors
/// [`Error::Registry`]; those of the store.
pub async fn push(node: &Node, layer: LayerId, to: &PushTo, monitor: Arc<dyn Monitor>) -> Result<Pushed> {
    let store = node.store();
    to.address.check_tag()?;
    if to.form == Form::Packs && !store.partials_of_stack(layer)?.is_empty() {
        return Err(Error::refused(
            layerfs::error::ErrorClass::Busy,
            "not all chunks of the stack are here yet; try again when `layerctl list` says that it is whole",
        ));
    }
    let entry = begin(node, Role::Sending, &to.name, &to.address, to.controls, monitor)?;
    let pushed = async {
        let transfer = entry.transfer();
        let remote = Remote::open(&to.address, &to.access, transfer.clone(), client::Right::Push).await?;
        match to.form {
            Form::Image(compression) => image::push(store, layer, compression, &remote, entry.monitor()).await,
            Form::Packs => parcels::push(store, layer, &remote, entry.monitor()).await,
        }
    };
    let pushed = pushed.await;
    entry.end(pushed)
}

/// Pulls an image, or a stack that was pushed as packs, into `node`'s store and gives it a name.
///
/// # Errors
/// [`Error::Registry`]; [`layerfs::Error::Exists`] if the name is taken; those of an import.
pub async fn pull(node: &Node, from: &PullFrom, monitor: Arc<dyn Monitor>) -> Result<Pulled> {
    let store = node.store();
    if from.expect == Expect::Absent && store.name(&from.name)?.is_some() {
        return Err(layerfs::Error::Exists { what: "layer", name: from.name.to_string() }.into());
    }
    let entry = begin(node, Role::Receiving, &from.name.to_string(), &from.address, from.controls, monitor)?;
    let pulled = async {
        let transfer = entry.transfer();
        let remote = Remote::open(&from.address, &from.access, transfer.clone(), client::Right::Pull).await?;
        let found = image::find(&remote, from.platform.as_ref()).await?;
        if found.is_stack() {
            return parcels::pull(store, from, found, &remote, entry.monitor()).await;
        }
        image::pull(store, from, found, &remote, entry.monitor()).await
    };
    let pulled = pulled.await;
    entry.end(pulled)
}

fn begin(
    node: &Node,
    role: Role,
    name: &str,
    address: &Address,
    controls: Controls,
    monitor: Arc<dyn Monitor>,
) -> Result<Entry> {
    let names = vec![name.to_owned()];
    let plan = Plan { role, origin: Origin::Here, peer: address.to_string(), names, controls, id: None };
    node.transfers().begin(plan, monitor)
}

/// Runs what blocks on a thread for that.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Error::refused(layerfs::error::ErrorClass::Io, format!("a thread of the transfer died: {error}")))
    })
}
