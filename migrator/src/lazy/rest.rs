//! The second halves of lazy transfers, and connections for single chunks: what a [`Node`] does for partial layers.

use std::sync::Arc;
use std::time::Duration;

use layerfs::LayerId;
use layerfs::monitor::Monitor;
use tokio::task::spawn_blocking;

use crate::attempt::{self, Job};
use crate::error::Result;
use crate::governor::{Controls, Priority, Rate};
use crate::link::Link;
use crate::node::{Manner, Node};
use crate::paths::PathOptions;
use crate::peers::Visible;
use crate::progress::TransferReport;
use crate::receive::Terms;
use crate::retry::RetryFor;
use crate::send::{self, joined};
use crate::transfers::{Entry, Role};
use crate::wanted::Wanted;
use crate::wire::{MAX_ASK, Message};

/// What nobody waits for leaves the way to everything else.
const BACKGROUND: Manner = Manner { limit: None, priority: Priority::Low, urgent: false, id: None };

/// Who calls begins again by himself, and looks first whether there is still reason to.
fn paths() -> PathOptions {
    PathOptions { retry_for: Some(RetryFor::Time(Duration::ZERO)), ..PathOptions::default() }
}

impl Node {
    /// Fetches what `layers`, which are partial here, lack, from the peer called `peer`, behind all other transfers and within the lowest of
    /// their limits; takes their marks off.
    ///
    /// # Errors
    /// Of any kind; the layers stay partial then.
    pub async fn complete(&self, layers: &[LayerId], peer: &str, monitor: Arc<dyn Monitor>) -> Result<TransferReport> {
        let peer = self.peer(peer).await?;
        let limits = layers.iter().filter_map(|layer| self.store().partial(*layer)).map(|partial| partial.limit);
        let limit = limits.filter(|limit| *limit > 0).min().map(Rate::new);
        let entry = self.begin(Role::Receiving, &[], &peer, Manner { limit, ..BACKGROUND }, monitor)?;
        self.name_layers(&entry, layers);
        let terms = Terms { completes: layers.to_vec(), ..Terms::of_pull(self, &peer, &[], false) };
        let job = Job::Pull(Message::Look { names: Vec::new(), layers: layers.to_vec() }, Box::new(terms));
        let result = attempt::transfer(self, &peer, job, paths(), &entry).await;
        entry.end(result)
    }

    /// Sends what `layers`, which were pushed lazily to the peer called `peer`, lack there, and first the traces of
    /// these stacks; behind all other transfers, and within `limit`.
    ///
    /// # Errors
    /// Of any kind; [`layerfs::error::ErrorClass::NotFound`] if nothing is partial there any more.
    pub async fn push_rest(
        &self,
        layers: &[LayerId],
        peer: &str,
        limit: Option<Rate>,
        monitor: Arc<dyn Monitor>,
    ) -> Result<TransferReport> {
        let (store, wanted) = (self.store().clone(), layers.to_vec());
        let prepare = move || {
            let prepared = send::prepare_layers(&store, &wanted, &Visible::All, &Wanted::default())?;
            let mut traces = Vec::new();
            for layer in wanted {
                let ids = store.trace(layer)?;
                traces.extend(ids.chunks(MAX_ASK).map(|ids| Message::Traced { layer, ids: ids.to_vec() }));
            }
            Ok((prepared, traces))
        };
        let (prepared, traces) = joined(spawn_blocking(prepare).await)?;
        let peer = self.peer(peer).await?;
        let entry = self.begin(Role::Sending, &[], &peer, Manner { limit, ..BACKGROUND }, monitor)?;
        self.name_layers(&entry, layers);
        let job = Job::Push(&prepared, &[], traces);
        let result = attempt::transfer(self, &peer, job, paths(), &entry).await;
        entry.end(result)
    }

    /// Lists the names of `layers` with a transfer that moves no names.
    fn name_layers(&self, entry: &Entry, layers: &[LayerId]) {
        let names = self.store().names().unwrap_or_default();
        let of = |layer: &LayerId| {
            let named = names.iter().find(|(_, record)| record.layer == *layer);
            named.map_or_else(|| layer.0.short(), |(name, _)| name.to_string())
        };
        entry.transfer().set_names(layers.iter().map(of));
    }

    /// A connection to the peer called `name`, for single chunks, in front of all other transfers.
    pub(crate) async fn link_to(&self, name: &str) -> Result<Link> {
        let peer = self.peer(name).await?;
        let mut link = self.connect(&peer).await?;
        link.govern(self.transfers().governor().gate(Controls { priority: Priority::High, ..Controls::default() }));
        Ok(link)
    }
}
