//! Squashing: a chain of sealed layers becomes one layer with the same tree.
//!
//! Hides which records of the chain still count ([`merge`]). Only tables are read and written: contents are lists of
//! chunks, and the new layer has the same lists. Inode numbers stay, so whatever lies on the chain's top may lie on the
//! squashed layer instead. Its parent is that of the chain's lowest layer. The layers of the chain stay for whoever else
//! refers to them.
//!
//! Order, as everywhere: tables → manifest, durable, then names. The same chain gives the same layer on every host.

mod merge;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::chunk::{ChunkWrite, Class};
use crate::error::{Error, Result};
use crate::id::{ChunkId, LayerId, LayerName};
use crate::manifest::{LayerKind, Manifest};
use crate::monitor::Monitor;
use crate::store::{Expect, NameChange, Session, Store};
use crate::view::View;

/// Which layers of a stack are merged: the uppermost so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The top.
    pub top: LayerId,
    /// How many layers.
    pub layers: usize,
}

impl Chain {
    /// The layers from `top` down to, and without, `onto`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `onto` isn't in the stack of `top`; those of reading manifests.
    pub fn down_to(store: &Store, top: LayerId, onto: LayerId) -> Result<Chain> {
        let layers = Chain::count(store, top, |layer, _| layer != onto)?;
        let stack = Chain::count(store, top, |_, _| true)?;
        if layers == stack {
            return Err(Error::invalid(format!("layer {} doesn't lie on layer {}", top.0.short(), onto.0.short())));
        }
        Ok(Chain { top, layers })
    }

    /// The whole stack of `top`.
    pub fn whole(store: &Store, top: LayerId) -> Result<Chain> {
        Ok(Chain { top, layers: Chain::count(store, top, |_, _| true)? })
    }

    /// The layers from `top` down that are of its kind, without those of a container image: what sealing one mount again
    /// and again, or moving one guest, piles up.
    pub fn of_kind(store: &Store, top: LayerId) -> Result<Chain> {
        let kind = Manifest::load(store, top)?.kind;
        let layers = Chain::count(store, top, |layer, manifest| {
            // The image's own layers are shared with other images that have them.
            manifest.kind == kind && (layer == top || manifest.image.is_none())
        })?;
        Ok(Chain { top, layers })
    }

    fn count(store: &Store, top: LayerId, belongs: impl Fn(LayerId, &Manifest) -> bool) -> Result<usize> {
        let mut layers = 0;
        let mut next = Some(top);
        while let Some(layer) = next {
            let manifest = Manifest::load(store, layer)?;
            if !belongs(layer, &manifest) {
                break;
            }
            layers += 1;
            next = manifest.parent;
        }
        Ok(layers)
    }
}

/// What squashing did, or would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SquashReport {
    /// The top of the chain as it was.
    pub before: LayerId,
    /// The one layer that has the chain's tree.
    pub layer: LayerId,
    /// The layer below it.
    pub parent: Option<LayerId>,
    /// How many layers were merged. 1: there was nothing to do, and `layer` is `before`.
    pub layers: u64,
    /// Inode records in the chain's layers together.
    pub inodes_before: u64,
    /// Inode records in the new layer.
    pub inodes: u64,
    /// Dentry records in the chain's layers together.
    pub dentries_before: u64,
    /// Dentry records in the new layer.
    pub dentries: u64,
    /// Bytes of the chain's tables together.
    pub table_bytes_before: u64,
    /// Bytes of the new layer's tables.
    pub table_bytes: u64,
    /// Plain bytes of the tables and manifest that the store didn't have.
    pub new_bytes: u64,
}

/// Merges `chain`, and sets `names` to the new layer, all at once.
///
/// What `names` expect is that before. Data isn't read; nothing is freed before the old layers' names go.
///
/// # Errors
/// [`Error::Busy`] if a layer of the chain is still on its way, or a name isn't as expected; [`Error::Exists`].
pub fn squash(
    store: &Arc<Store>,
    chain: Chain,
    kind: Option<LayerKind>,
    names: &[(LayerName, Expect)],
    monitor: &dyn Monitor,
) -> Result<SquashReport> {
    let squashed = prepare(store, chain, kind, monitor)?;
    let layer = squashed.report.layer;
    let changes = names.iter().map(|(name, expect)| NameChange { name: name.clone(), layer, expect: *expect });
    store.set_names(&changes.collect::<Vec<_>>())?;
    Ok(squashed.report)
}

/// A squashed layer, durable, which stays while this lives.
#[derive(Debug)]
pub struct Squashed {
    /// What was done.
    pub report: SquashReport,
    _session: Option<Session>,
    _pin: crate::store::Pin,
}

/// Merges `chain` and leaves the names to the caller, who sets them before this is dropped.
///
/// # Errors
/// As [`squash`].
pub fn prepare(store: &Arc<Store>, chain: Chain, kind: Option<LayerKind>, monitor: &dyn Monitor) -> Result<Squashed> {
    let pin = store.pin(chain.top)?;
    let view = open(store, chain)?;
    if chain.layers == 1 && kind.is_none_or(|kind| Some(kind) == view.manifest().map(|manifest| manifest.kind)) {
        return Ok(Squashed { report: unchanged(&view), _session: None, _pin: pin });
    }
    let session = store.session("squash");
    let (layer, manifest) = merge::merge(&view, chain.layers, kind_of(&view, kind)?, &session, monitor)?;
    session.commit()?;
    let pin = store.pin(layer)?;
    let trace = store.trace(chain.top)?;
    if !trace.is_empty()
        && let Err(error) = store.add_trace(layer, &trace)
    {
        tracing::warn!(%error, "the trace of a squashed layer is not kept");
    }
    let report = report(&view, chain.layers, layer, &manifest, session.report().new_plain_bytes);
    Ok(Squashed { report, _session: Some(session), _pin: pin })
}

/// What [`squash`] would do. Nothing is written.
///
/// # Errors
/// As [`squash`], but for names.
pub fn plan(store: &Arc<Store>, chain: Chain, kind: Option<LayerKind>, monitor: &dyn Monitor) -> Result<SquashReport> {
    let _pin = store.pin(chain.top)?;
    let view = open(store, chain)?;
    if chain.layers == 1 && kind.is_none_or(|kind| Some(kind) == view.manifest().map(|manifest| manifest.kind)) {
        return Ok(unchanged(&view));
    }
    let out = Discarded { store, new_bytes: AtomicU64::new(0) };
    let (layer, manifest) = merge::merge(&view, chain.layers, kind_of(&view, kind)?, &out, monitor)?;
    Ok(report(&view, chain.layers, layer, &manifest, out.new_bytes.into_inner()))
}

fn open(store: &Arc<Store>, chain: Chain) -> Result<Arc<View>> {
    let view = View::open(store, chain.top)?;
    let layers = view.layers();
    if chain.layers == 0 || chain.layers > layers.len() {
        return Err(Error::invalid(format!("there are no {} layers above each other to squash", chain.layers)));
    }
    match layers[..chain.layers].iter().find(|layer| store.partial(layer.id).is_some()) {
        None => Ok(view),
        Some(layer) => {
            Err(Error::Busy(format!("layer {} is still on its way; wait until all of it is here", layer.id.0.short())))
        }
    }
}

fn kind_of(view: &View, kind: Option<LayerKind>) -> Result<LayerKind> {
    let top = view.manifest().map(|manifest| manifest.kind);
    kind.or(top).ok_or_else(|| Error::invalid("there is no layer to squash"))
}

fn table_bytes(manifest: &Manifest) -> u64 {
    manifest.inodes.len() + manifest.dentries.len()
}

fn unchanged(view: &View) -> SquashReport {
    let layer = &view.layers()[0];
    report(view, 1, layer.id, &layer.manifest, 0)
}

fn report(view: &View, count: usize, layer: LayerId, manifest: &Manifest, new_bytes: u64) -> SquashReport {
    let chain = &view.layers()[..count];
    let sum = |of: fn(&Manifest) -> u64| chain.iter().map(|layer| of(&layer.manifest)).fold(0, u64::saturating_add);
    SquashReport {
        before: chain[0].id,
        layer,
        parent: manifest.parent,
        layers: count as u64,
        inodes_before: sum(|manifest| manifest.inode_count),
        inodes: manifest.inode_count,
        dentries_before: sum(|manifest| manifest.dentry_count),
        dentries: manifest.dentry_count,
        table_bytes_before: sum(table_bytes),
        table_bytes: table_bytes(manifest),
        new_bytes,
    }
}

/// Keeps nothing of what is written to it, and counts what a store would have to add.
struct Discarded<'s> {
    store: &'s Store,
    new_bytes: AtomicU64,
}

impl ChunkWrite for Discarded<'_> {
    fn put(&self, _: Class, plain: &[u8]) -> Result<ChunkId> {
        let id = ChunkId::of(plain);
        if !self.store.contains(&id)? {
            self.new_bytes.fetch_add(plain.len() as u64, Ordering::Relaxed);
        }
        Ok(id)
    }
}

#[cfg(test)]
mod tests;
