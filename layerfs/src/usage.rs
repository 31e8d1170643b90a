//! What layers and names cost: apparent, unique and shared bytes, and what removing names would free.
//!
//! Hides how chunks are attributed: the (chunk, layer) pairs of all layers are sorted on disk, so that each chunk is
//! met once with all layers that use it. Memory: [`SORT_BYTES`], a batch of chunks, and a row per layer and name.
//! Only chunks that a name, a mount or a transfer holds are counted; garbage is `stat`'s.

mod sorter;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::Serialize;

use crate::attr::FileKind;
use crate::closure::{Role, walk_layer};
use crate::error::{Error, Result};
use crate::id::{ChunkId, Ino, LayerId, LayerName};
use crate::manifest::LayerKind;
use crate::monitor::{self, Monitor};
use crate::refs::Held;
use crate::store::{Store, Uncached};
use crate::view::View;
use crate::walk::Next;
use sorter::Sorter;

/// Bytes of memory that the sort takes.
const SORT_BYTES: usize = 16 * 1024 * 1024;
/// Chunks whose sizes are looked up at once.
const BATCH: usize = 1024;

/// How much a set of chunks is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// Chunks.
    pub chunks: u64,
    /// Their plain bytes.
    pub plain_bytes: u64,
    /// Their compressed bytes, as they lie in packs.
    pub stored_bytes: u64,
}

impl Amount {
    fn add(&mut self, other: &Amount) {
        self.chunks += other.chunks;
        self.plain_bytes += other.plain_bytes;
        self.stored_bytes += other.stored_bytes;
    }
}

/// What a tree seems to hold to whoever looks at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TreeSize {
    /// Regular files; hard links of one file count once.
    pub files: u64,
    /// Folders.
    pub folders: u64,
    /// Everything else.
    pub others: u64,
    /// The files' sizes, in bytes.
    pub apparent_bytes: u64,
    /// The files' sizes without their holes, in bytes.
    pub data_bytes: u64,
}

/// What one layer costs.
#[derive(Clone, Debug, Serialize)]
pub struct LayerUsage {
    /// The layer.
    pub layer: LayerId,
    /// What it is for.
    pub kind: LayerKind,
    /// The layer below.
    pub parent: Option<LayerId>,
    /// The names whose stacks have it.
    pub names: Vec<LayerName>,
    /// The sizes of the files that it adds or changes, in bytes.
    pub apparent_bytes: u64,
    /// All of its chunks: manifest, tables and files.
    pub total: Amount,
    /// Those that no other layer has.
    pub unique: Amount,
    /// Those that other layers have too.
    pub shared: Amount,
}

/// What one name costs.
#[derive(Clone, Debug, Serialize)]
pub struct NameUsage {
    /// The name.
    pub name: LayerName,
    /// Its layer.
    pub layer: LayerId,
    /// How many layers its stack has.
    pub layer_count: u32,
    /// Its tree.
    pub tree: TreeSize,
    /// All chunks of its stack.
    pub total: Amount,
    /// Those that nothing else holds: what removing the name, then a collection, frees.
    pub unique: Amount,
    /// Those that other names or mounts hold too.
    pub shared: Amount,
}

/// What everything costs.
#[derive(Clone, Debug, Serialize)]
pub struct Usage {
    /// Each layer that a name or a mount holds, by id.
    pub layers: Vec<LayerUsage>,
    /// Each name.
    pub names: Vec<NameUsage>,
    /// All chunks, each once.
    pub total: Amount,
    /// What removing the names that were asked for, all together, frees.
    pub freed: Amount,
}

/// Layers and names by number, for the sort and the sums.
struct Owners {
    held: Held,
    layers: Vec<LayerId>,
    names: Vec<(LayerName, LayerId)>,
    /// For each layer, the numbers of the names that have it; and whether something else holds it.
    names_of: Vec<(Vec<u32>, bool)>,
    removed: BTreeSet<u32>,
}

/// What the layers of `store` and its names cost, and what removing the names in `remove` together would free.
///
/// # Errors
/// [`Error::NotFound`] if one of `remove` isn't a name; those of the store.
pub fn usage(store: &Arc<Store>, remove: &[LayerName], monitor: &dyn Monitor) -> Result<Usage> {
    let owners = Owners::of(store, remove)?;
    let mut sorter = Sorter::new(&store.tmp_folder(), SORT_BYTES);
    monitor.phase("reading layers", None);
    for (number, layer) in owners.layers.iter().enumerate() {
        monitor::check(monitor)?;
        walk_layer(&Uncached(store), *layer, &mut |chunk| {
            sorter.push(chunk.id, number as u32)?;
            Ok(chunk.role != Role::Dentries)
        })?;
        monitor.items(1);
    }
    monitor.phase("adding up", None);
    let sums = add_up(store, &owners, sorter, monitor)?;
    report(store, owners, &sums)
}

impl Owners {
    fn of(store: &Store, remove: &[LayerName]) -> Result<Owners> {
        let held = Held::of(store)?;
        let layers: Vec<LayerId> = held.layers.keys().copied().collect();
        let names: Vec<(LayerName, LayerId)> = {
            let names = store.names()?.into_iter().map(|(name, record)| (name, record.layer));
            // A name that came after `held` was made is left out.
            names.filter(|(_, layer)| held.layers.contains_key(layer)).collect()
        };
        let number: HashMap<&LayerName, u32> =
            names.iter().zip(0..).map(|((name, _), number)| (name, number)).collect();
        let missing = |name: &LayerName| Error::NotFound { what: "layer", name: name.to_string() };
        let removed = remove.iter().map(|name| number.get(name).copied().ok_or_else(|| missing(name)));
        let removed = removed.collect::<Result<_>>()?;
        let names_of = layers.iter().map(|layer| {
            let numbers = held.names.get(layer).into_iter().flatten().filter_map(|name| number.get(name).copied());
            (numbers.collect(), held.in_use.contains(layer))
        });
        let names_of = names_of.collect();
        Ok(Owners { layers, names_of, removed, names, held })
    }
}

#[derive(Default)]
struct Sums {
    layers: Vec<(Amount, Amount)>,
    names: Vec<(Amount, Amount)>,
    total: Amount,
    freed: Amount,
}

impl Sums {
    /// Adds chunks that exactly `layers` use.
    fn add(&mut self, owners: &Owners, layers: &[u32], amount: &Amount) {
        self.total.add(amount);
        for layer in layers {
            let (total, unique) = &mut self.layers[*layer as usize];
            total.add(amount);
            if layers.len() == 1 {
                unique.add(amount);
            }
        }
        let of = || layers.iter().map(|layer| &owners.names_of[*layer as usize]);
        let names: BTreeSet<u32> = of().flat_map(|(names, _)| names).copied().collect();
        let in_use = of().any(|(_, in_use)| *in_use);
        for name in &names {
            let (total, unique) = &mut self.names[*name as usize];
            total.add(amount);
            if names.len() == 1 && !in_use {
                unique.add(amount);
            }
        }
        if !in_use && !names.is_empty() && names.is_subset(&owners.removed) {
            self.freed.add(amount);
        }
    }
}

fn add_up(store: &Store, owners: &Owners, sorter: Sorter, monitor: &dyn Monitor) -> Result<Sums> {
    let zeros = |count: usize| vec![<(Amount, Amount)>::default(); count];
    let mut sums = Sums { layers: zeros(owners.layers.len()), names: zeros(owners.names.len()), ..Sums::default() };
    let mut batch: Vec<(ChunkId, Vec<u32>)> = Vec::with_capacity(BATCH);
    let mut add_batch = |batch: &mut Vec<(ChunkId, Vec<u32>)>| -> Result<()> {
        monitor::check(monitor)?;
        let ids: Vec<ChunkId> = batch.iter().map(|(id, _)| *id).collect();
        // Most chunks of a batch have the same few sets of layers.
        let mut by_layers: BTreeMap<Vec<u32>, Amount> = BTreeMap::new();
        for ((id, layers), info) in batch.drain(..).zip(store.info_many(&ids)?) {
            let info = match info {
                Some(info) => info,
                // What of a partial layer isn't here takes no space.
                None if store.has_partials() => continue,
                None => return Err(Error::ChunkMissing(id)),
            };
            by_layers.entry(layers).or_default().add(&Amount {
                chunks: 1,
                plain_bytes: u64::from(info.plain_bytes),
                stored_bytes: u64::from(info.stored_bytes),
            });
        }
        by_layers.iter().for_each(|(layers, amount)| sums.add(owners, layers, amount));
        Ok(())
    };
    sorter.groups(|id, layers| {
        batch.push((id, layers.to_vec()));
        if batch.len() == BATCH { add_batch(&mut batch) } else { Ok(()) }
    })?;
    add_batch(&mut batch)?;
    Ok(sums)
}

fn report(store: &Arc<Store>, owners: Owners, sums: &Sums) -> Result<Usage> {
    let rest = |total: &Amount, unique: &Amount| Amount {
        chunks: total.chunks - unique.chunks,
        plain_bytes: total.plain_bytes - unique.plain_bytes,
        stored_bytes: total.stored_bytes - unique.stored_bytes,
    };
    let layers = owners.layers.iter().zip(&sums.layers).map(|(layer, (total, unique))| {
        let manifest = &owners.held.layers[layer];
        LayerUsage {
            layer: *layer,
            kind: manifest.kind,
            parent: manifest.parent,
            names: owners.held.names_of(*layer),
            apparent_bytes: manifest.file_bytes,
            total: *total,
            unique: *unique,
            shared: rest(total, unique),
        }
    });
    let mut trees: HashMap<LayerId, TreeSize> = HashMap::new();
    let mut names = Vec::new();
    for ((name, layer), (total, unique)) in owners.names.iter().zip(&sums.names) {
        let tree = match trees.get(layer) {
            Some(tree) => *tree,
            None => *trees.entry(*layer).or_insert(tree_size(&*View::open(store, *layer)?)?),
        };
        names.push(NameUsage {
            name: name.clone(),
            layer: *layer,
            layer_count: owners.held.layers[layer].depth + 1,
            tree,
            total: *total,
            unique: *unique,
            shared: rest(total, unique),
        });
    }
    Ok(Usage { layers: layers.collect(), names, total: sums.total, freed: sums.freed })
}

/// What the tree of `view` seems to hold. Memory: a set of the files that have several links.
pub fn tree_size(view: &View) -> Result<TreeSize> {
    let mut size = TreeSize::default();
    let mut linked: std::collections::HashSet<Ino> = std::collections::HashSet::new();
    view.walk(|entry| {
        match entry.kind {
            FileKind::Folder => size.folders += 1,
            FileKind::File => {
                let stat = view.stat(entry.ino)?;
                let stat = stat.ok_or_else(|| Error::corrupt("layer", format!("inode {} has no record", entry.ino)))?;
                if stat.nlink <= 1 || linked.insert(entry.ino) {
                    size.files += 1;
                    size.apparent_bytes = size.apparent_bytes.saturating_add(stat.size);
                    size.data_bytes = size.data_bytes.saturating_add(stat.data_bytes);
                }
            }
            _ => size.others += 1,
        }
        Ok(Next::Enter)
    })?;
    Ok(size)
}

#[cfg(test)]
mod tests;
