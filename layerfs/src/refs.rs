//! Who refers to what: the layers of a stack and who holds them, the layers and paths behind a chunk, where a path
//! comes from.
//!
//! Memory: a manifest per layer, what a [walk](crate::closure) takes, and the inodes that were found to hold a chunk.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use serde::Serialize;

use crate::attr::FileKind;
use crate::chunk::ChunkRead;
use crate::closure::{Role, walk_layer};
use crate::error::{Error, Result};
use crate::id::{ChunkId, Ino, LayerId, LayerName};
use crate::inode::Stat;
use crate::manifest::{LayerKind, Manifest};
use crate::monitor::{self, Monitor};
use crate::store::Store;
use crate::view::{MAX_LAYERS, View};
use crate::walk::Next;

/// So many files that hold a chunk are told per layer.
const MOST_FILES: usize = 10_000;

/// The layers of the stack whose top is `top`, the top first.
pub fn stack(chunks: &dyn ChunkRead, top: LayerId) -> Result<Vec<(LayerId, Manifest)>> {
    let mut layers: Vec<(LayerId, Manifest)> = Vec::new();
    let mut next = Some(top);
    while let Some(id) = next {
        if layers.len() == MAX_LAYERS {
            return Err(Error::Unsupported { what: "stack", detail: format!("with more than {MAX_LAYERS} layers") });
        }
        let manifest = Manifest::load(chunks, id)?;
        next = manifest.parent;
        layers.push((id, manifest));
    }
    Ok(layers)
}

/// The layers that something in a store holds on to, and the names that do.
#[derive(Debug, Default)]
pub struct Held {
    /// Every layer of every stack, with its manifest.
    pub layers: BTreeMap<LayerId, Manifest>,
    /// The names whose stacks have the layer.
    pub names: HashMap<LayerId, BTreeSet<LayerName>>,
    /// The layers that mounts, uppers or transfers hold, whatever their names.
    pub in_use: BTreeSet<LayerId>,
}

impl Held {
    /// What `store` holds now.
    pub fn of(store: &Store) -> Result<Held> {
        let mut held = Held::default();
        for (name, record) in store.names()? {
            held.add(store, record.layer, |held, layer| {
                held.names.entry(layer).or_default().insert(name.clone());
            })?;
        }
        for root in store.in_use()? {
            held.add(store, root, |held, layer| {
                held.in_use.insert(layer);
            })?;
        }
        Ok(held)
    }

    fn add(&mut self, chunks: &dyn ChunkRead, top: LayerId, mut tell: impl FnMut(&mut Held, LayerId)) -> Result<()> {
        let mut next = Some(top);
        while let Some(layer) = next {
            let manifest = match self.layers.get(&layer) {
                Some(manifest) => manifest.clone(),
                None => Manifest::load(chunks, layer)?,
            };
            next = manifest.parent;
            self.layers.insert(layer, manifest);
            tell(self, layer);
        }
        Ok(())
    }

    /// The names whose stacks have `layer`.
    pub fn names_of(&self, layer: LayerId) -> Vec<LayerName> {
        self.names.get(&layer).into_iter().flatten().cloned().collect()
    }
}

/// One layer of a stack's history.
#[derive(Clone, Debug, Serialize)]
pub struct LogEntry {
    /// The layer.
    pub layer: LayerId,
    /// What it is for.
    pub kind: LayerKind,
    /// How many layers lie below.
    pub depth: u32,
    /// The names that refer to this very layer.
    pub names: Vec<LayerName>,
    /// Inode records: what it adds or changes.
    pub inode_count: u64,
    /// Dentry records, whiteouts included.
    pub dentry_count: u64,
    /// The sizes of the regular files among the records, in bytes.
    pub file_bytes: u64,
}

/// The history of the stack whose top is `top`: its layers, the top first.
pub fn log(store: &Store, top: LayerId) -> Result<Vec<LogEntry>> {
    let names = store.names()?;
    let entries = stack(store, top)?.into_iter().map(|(layer, manifest)| LogEntry {
        layer,
        kind: manifest.kind,
        depth: manifest.depth,
        names: names.iter().filter(|(_, record)| record.layer == layer).map(|(name, _)| name.clone()).collect(),
        inode_count: manifest.inode_count,
        dentry_count: manifest.dentry_count,
        file_bytes: manifest.file_bytes,
    });
    Ok(entries.collect())
}

/// Somebody who refers to a chunk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChunkReference {
    /// The layer.
    pub layer: LayerId,
    /// The names whose stacks have the layer.
    pub names: Vec<LayerName>,
    /// What the chunk is for there.
    pub role: Role,
    /// The paths of a file in the tree of which the layer is the top; none if a higher name can't reach it.
    pub paths: Vec<Vec<u8>>,
}

/// Who refers to chunk `id`: told layer by layer to `found`. Reads the metadata of every layer.
pub fn why_chunk(
    store: &Arc<Store>,
    id: &ChunkId,
    monitor: &dyn Monitor,
    found: &mut dyn FnMut(ChunkReference) -> Result<()>,
) -> Result<()> {
    let held = Held::of(store)?;
    for layer in held.layers.keys() {
        monitor::check(monitor)?;
        monitor.items(1);
        let mut roles = BTreeSet::new();
        walk_layer(&**store, *layer, &mut |chunk| {
            if chunk.id == *id && roles.len() < MOST_FILES {
                roles.insert(chunk.role);
            }
            Ok(chunk.role != Role::Dentries)
        })?;
        let files: HashSet<Ino> =
            roles.iter().filter_map(|role| if let Role::File(ino) = role { Some(*ino) } else { None }).collect();
        let mut paths = if files.is_empty() { HashMap::new() } else { paths_of(&*View::open(store, *layer)?, &files)? };
        for role in roles {
            let paths = if let Role::File(ino) = role { paths.remove(&ino).unwrap_or_default() } else { Vec::new() };
            found(ChunkReference { layer: *layer, names: held.names_of(*layer), role, paths })?;
        }
    }
    Ok(())
}

/// All paths in `view` that lead to each of `inos`, found by one walk.
pub fn paths_of(view: &View, inos: &HashSet<Ino>) -> Result<HashMap<Ino, Vec<Vec<u8>>>> {
    let mut paths: HashMap<Ino, Vec<Vec<u8>>> = HashMap::new();
    view.walk(|entry| {
        if inos.contains(&entry.ino) {
            paths.entry(entry.ino).or_default().push(entry.path.to_vec());
        }
        Ok(Next::Enter)
    })?;
    Ok(paths)
}

/// Where a path comes from.
#[derive(Clone, Debug)]
pub struct PathOrigin {
    /// Its inode.
    pub ino: Ino,
    /// Its kind.
    pub kind: FileKind,
    /// The layer that gave the inode this name; none for the root.
    pub named_by: Option<LayerId>,
    /// The layers that have a record of the inode, the top first, and what it said: the first one counts.
    pub records: Vec<(LayerId, Stat)>,
    /// All paths of the inode, if it has more than one.
    pub links: Vec<Vec<u8>>,
    /// The names whose trees have the inode as this one has it, under whatever path.
    pub names: Vec<LayerName>,
}

/// Where `path` in the tree of layer `top` comes from, and who shares it. A link in last place isn't followed.
pub fn why_path(store: &Arc<Store>, top: LayerId, path: &[u8]) -> Result<PathOrigin> {
    let view = View::open(store, top)?;
    let (ino, kind) = view.resolve(path, false)?;
    let mut records = Vec::new();
    for layer in view.layers() {
        if let Some(position) = layer.table.inode_position(ino) {
            records.push((layer.id, layer.table.stat_at(position)?));
        }
    }
    let Some((record_of, stat)) = records.first() else {
        return Err(Error::corrupt("layer", format!("inode {ino} has a name but no record")));
    };
    let links = if kind != FileKind::Folder && stat.nlink > 1 {
        paths_of(&view, &HashSet::from([ino]))?.remove(&ino).unwrap_or_default()
    } else {
        Vec::new()
    };
    let named_by = named_by(&view, path)?;
    let mut names = Vec::new();
    for (name, record) in store.names()? {
        let other = View::open(store, record.layer)?;
        let its_record = other.place(ino).map(|place| other.layers()[place.layer].id);
        if its_record == Some(*record_of) && other.path_of(ino)?.is_some() {
            names.push(name);
        }
    }
    Ok(PathOrigin { ino, kind, named_by, links, names, records })
}

/// The layer whose dentry makes `path` what it is.
fn named_by(view: &View, path: &[u8]) -> Result<Option<LayerId>> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let split = path.iter().rposition(|byte| *byte == b'/');
    let (folder, name) = split.map_or((&b""[..], path), |at| (&path[..at], &path[at + 1..]));
    let (folder, _) = view.resolve(folder, true)?;
    for layer in view.layers() {
        if layer.table.lookup(folder, name)?.is_some() {
            return Ok(Some(layer.id));
        }
    }
    Ok(None)
}
