//! What keeps layers besides names: pins in memory, and others' records (uppers) through root sources.
//!
//! Invariant: a layer that is pinned, with all below it, isn't collected until the pin is dropped.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::Result;
use crate::id::LayerId;
use crate::store::Store;

/// Yields layers that must stay.
pub type RootSource = Box<dyn Fn() -> Result<Vec<LayerId>> + Send + Sync>;

#[derive(Default)]
pub(crate) struct Roots {
    pins: Arc<Mutex<HashMap<LayerId, usize>>>,
    sources: Mutex<Vec<RootSource>>,
}

impl std::fmt::Debug for Roots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Roots").field("pins", &self.pins).finish_non_exhaustive()
    }
}

/// Keeps a layer and all below it while it exists.
#[derive(Debug)]
pub struct Pin {
    pins: Arc<Mutex<HashMap<LayerId, usize>>>,
    layer: LayerId,
}

impl Pin {
    /// The layer.
    pub fn layer(&self) -> LayerId {
        self.layer
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.pins.lock();
        if let Some(count) = pins.get_mut(&self.layer) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.layer);
            }
        }
    }
}

impl Store {
    /// Keeps `layer` and all below it until the pin is dropped.
    ///
    /// # Errors
    /// [`crate::Error::LayerMissing`] if it isn't here (any more).
    pub fn pin(&self, layer: LayerId) -> Result<Pin> {
        *self.roots.pins.lock().entry(layer).or_default() += 1;
        let pin = Pin { pins: self.roots.pins.clone(), layer };
        self.require_layer(layer)?;
        Ok(pin)
    }

    /// Registers a source of layers that must stay: it is asked at each garbage collection and check.
    pub fn add_root_source(&self, source: RootSource) {
        self.roots.sources.lock().push(source);
    }

    /// Every layer that something refers to: names, pins, root sources. Without the layers below them.
    pub fn roots(&self) -> Result<Vec<LayerId>> {
        let mut roots: BTreeSet<LayerId> = self.named_layers()?.into_iter().collect();
        roots.extend(self.in_use()?);
        Ok(roots.into_iter().collect())
    }

    pub(crate) fn named_layers(&self) -> Result<Vec<LayerId>> {
        Ok(self.names()?.into_iter().map(|(_, record)| record.layer).collect())
    }

    /// Every layer that something other than a name refers to. Without the layers below them.
    pub fn in_use(&self) -> Result<BTreeSet<LayerId>> {
        let pinned: Vec<LayerId> = self.roots.pins.lock().keys().copied().collect();
        // Somebody may be about to learn that what he wants to pin isn't here any more.
        let is_here = self.contains_many(&pinned.iter().map(|layer| layer.0).collect::<Vec<_>>())?;
        let mut layers: BTreeSet<LayerId> =
            pinned.into_iter().zip(is_here).filter(|(_, is_here)| *is_here).map(|(layer, _)| layer).collect();
        for source in self.roots.sources.lock().iter() {
            layers.extend(source()?);
        }
        Ok(layers)
    }
}
