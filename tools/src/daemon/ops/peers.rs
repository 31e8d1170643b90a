//! Peers, the listener, push and pull.

use std::sync::Arc;

use layerfs::store::Store;

use crate::config::Listen;
use crate::failure::Result;

/// The daemon's side of the network.
#[derive(Debug)]
pub struct Peering {
    listen: Listen,
}

/// Where the listener is.
#[derive(Clone, Debug, Default)]
pub struct ListenStatus {
    /// Its address.
    pub listening: Option<String>,
    /// Why there is none though there should be.
    pub error: Option<String>,
}

impl Peering {
    /// No listener yet.
    pub fn new(_: &Arc<Store>, listen: Listen) -> Result<Peering> {
        Ok(Peering { listen })
    }

    /// Listens, if there is reason to.
    pub async fn start(&self) -> Result<()> {
        tracing::debug!(listen = ?self.listen, "peering");
        Ok(())
    }

    /// Stops to listen.
    pub async fn stop(&self) {}

    /// Whether it listens.
    pub fn is_listening(&self) -> bool {
        self.status().listening.is_some()
    }

    /// Where it listens.
    pub fn status(&self) -> ListenStatus {
        ListenStatus::default()
    }
}
