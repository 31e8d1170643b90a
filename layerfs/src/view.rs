//! The merged, read-only tree of a stack of sealed layers.
//!
//! Hides that there are several layers: a look-up asks them from the top and takes the first answer, a listing
//! merges their sorted runs. Invariants: a view never changes; it holds no memory per entry; two views of the same
//! layer share its mapped tables. Numbers of inodes are those of the layers, on every host and in every view.

use std::cell::Cell;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::iter::successors;
use std::ops::RangeBounds;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Weak};

use parking_lot::Mutex;

use crate::attr::FileKind;
use crate::chunk::ChunkRead;
use crate::content;
use crate::error::{Error, Result};
use crate::id::{Ino, LayerId};
use crate::inode::{DentryRef, Inode, Node, Stat, Target};
pub use crate::manifest::MAX_LAYERS;
use crate::manifest::Manifest;
use crate::store::Store;
use crate::table::{KEPT_BYTES, RELEASE_EVERY, Table};
use crate::walk::FolderIter;

/// The most symbolic links that are followed in one path (Linux's limit).
const MAX_LINKS_FOLLOWED: u32 = 40;
/// The deepest folder that [`View::path_of`] names.
const MAX_STEPS_UP: usize = 1000;

/// A sealed layer, open.
#[derive(Debug)]
pub struct Layer {
    /// Its id.
    pub id: LayerId,
    /// Its manifest.
    pub manifest: Manifest,
    /// Its tables.
    pub table: Table,
}

/// The layers that are open somewhere in this process, by their tables' folder and id.
static OPEN: LazyLock<Mutex<OpenLayers>> = LazyLock::new(Mutex::default);
type OpenLayers = HashMap<(PathBuf, LayerId), Weak<Layer>>;

impl Layer {
    /// Opens layer `id`, whose mapped table lies in the folder `tables` or is built there. A layer that is open
    /// already is shared.
    ///
    /// # Errors
    /// [`Error::LayerMissing`], [`Error::Corrupt`], and those of `chunks`.
    pub fn open(chunks: &dyn ChunkRead, tables: &Path, id: LayerId) -> Result<Arc<Layer>> {
        let key = (tables.to_owned(), id);
        if let Some(layer) = OPEN.lock().get(&key).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let manifest = Manifest::load(chunks, id)?;
        let table = Table::open(chunks, tables, id, &manifest)?;
        let layer = Arc::new(Layer { id, manifest, table });
        let mut open = OPEN.lock();
        open.retain(|_, layer| layer.strong_count() > 0);
        // Somebody else may have opened it meanwhile: then there is one too many until that is dropped.
        open.insert(key, Arc::downgrade(&layer));
        Ok(layer)
    }
}

/// The merged tree of a stack.
#[derive(Clone)]
pub struct View {
    chunks: Arc<dyn ChunkRead>,
    /// The top first.
    layers: Vec<Arc<Layer>>,
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View").field("top", &self.top()).field("layers", &self.layers.len()).finish()
    }
}

/// Where an inode's record stands in a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The index of the layer, 0 for the top.
    pub layer: usize,
    /// The record's position in that layer's table.
    pub position: u64,
}

impl View {
    /// The view of the stack in `store` whose top is `top`.
    ///
    /// # Errors
    /// As [`View::from_chunks`].
    pub fn open(store: &Arc<Store>, top: LayerId) -> Result<Arc<View>> {
        Ok(Arc::new(View::from_chunks(store.clone(), &store.tables_folder(), top)?))
    }

    /// The view of the stack whose top is `top`; the mapped tables lie in the folder `tables`, or are built there.
    ///
    /// # Errors
    /// [`Error::LayerMissing`], [`Error::Corrupt`], and those of `chunks`.
    pub fn from_chunks(chunks: Arc<dyn ChunkRead>, tables: &Path, top: LayerId) -> Result<View> {
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        let mut next = Some(top);
        while let Some(id) = next {
            let layer = Layer::open(&*chunks, tables, id)?;
            if let Some(above) = layers.last() {
                check_parent(&above.manifest, &layer.manifest)?;
            }
            if layer.manifest.depth as usize >= MAX_LAYERS {
                let detail = format!("with more than {MAX_LAYERS} layers");
                return Err(Error::Unsupported { what: "stack", detail });
            }
            next = layer.manifest.parent;
            layers.push(layer);
        }
        Ok(View { chunks, layers })
    }

    /// A view of no layer at all: not even a root.
    pub fn empty(chunks: Arc<dyn ChunkRead>) -> View {
        View { chunks, layers: Vec::new() }
    }

    /// The view of what lies below the top layer; the empty view if there is nothing.
    pub fn below(&self) -> View {
        View { chunks: self.chunks.clone(), layers: self.layers.get(1..).unwrap_or_default().to_vec() }
    }

    /// A view of some of the layers only, the top being number 0: what they say, whatever lies below.
    pub(crate) fn part(&self, range: impl RangeBounds<usize>) -> View {
        let range = (range.start_bound().cloned(), range.end_bound().cloned());
        let layers = self.layers.get(range).unwrap_or_default().to_vec();
        View { chunks: self.chunks.clone(), layers }
    }

    /// The top layer's id; none for the empty view.
    pub fn top(&self) -> Option<LayerId> {
        self.layers.first().map(|layer| layer.id)
    }

    /// The top layer's manifest; none for the empty view.
    pub fn manifest(&self) -> Option<&Manifest> {
        self.layers.first().map(|layer| &layer.manifest)
    }

    /// The layers, the top first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// Where the data is read from.
    pub fn chunks(&self) -> &Arc<dyn ChunkRead> {
        &self.chunks
    }

    /// The number of the next new inode above this stack.
    pub fn next_ino(&self) -> Ino {
        self.manifest().map_or(Ino::FIRST, |manifest| manifest.next_ino)
    }

    /// Bytes of the mapped tables.
    pub fn mapped_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.table.mapped_bytes()).sum()
    }

    /// Counts a step of this thread, and now and then gives the pages of large tables back.
    pub(crate) fn step(&self) {
        thread_local! {
            static STEPS: Cell<u64> = const { Cell::new(0) };
        }
        let steps = STEPS.get().wrapping_add(1);
        STEPS.set(steps);
        if steps.is_multiple_of(RELEASE_EVERY) && self.mapped_bytes() > KEPT_BYTES {
            self.layers.iter().for_each(|layer| layer.table.release_pages());
        }
    }

    /// What `name` in `folder` refers to.
    pub fn lookup(&self, folder: Ino, name: &[u8]) -> Result<Option<(Ino, FileKind)>> {
        self.step();
        for layer in &self.layers {
            match layer.table.lookup(folder, name)? {
                None => {}
                Some(Target::Inode { ino, kind }) => return Ok(Some((ino, kind))),
                Some(Target::Whiteout) => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Where the record of inode `ino` stands: in the topmost layer that has one.
    pub fn place(&self, ino: Ino) -> Option<Place> {
        self.step();
        let mut layers = self.layers.iter().enumerate();
        layers.find_map(|(layer, open)| open.table.inode_position(ino).map(|position| Place { layer, position }))
    }

    /// The inode at `place`, which this view gave.
    pub fn inode_at(&self, place: Place) -> Result<Inode> {
        self.layers[place.layer].table.inode_at(place.position)
    }

    /// Inode `ino`, whether or not a path leads to it still.
    pub fn inode(&self, ino: Ino) -> Result<Option<Inode>> {
        self.place(ino).map(|place| self.inode_at(place)).transpose()
    }

    /// What `stat` tells of inode `ino`, without allocating.
    pub fn stat(&self, ino: Ino) -> Result<Option<Stat>> {
        self.place(ino).map(|place| self.layers[place.layer].table.stat_at(place.position)).transpose()
    }

    /// Inode `ino`, which a dentry refers to and which must therefore be there.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it isn't.
    pub fn expect_inode(&self, ino: Ino) -> Result<Inode> {
        self.inode(ino)?.ok_or_else(|| Error::corrupt("layer", format!("inode {ino} has a name but no record")))
    }

    /// The entries of `folder` by name, from the first after `after` on; no `.` and `..`. Empty for anything that
    /// isn't a folder.
    pub fn read_folder(&self, folder: Ino, after: Option<&[u8]>) -> Result<FolderIter<'_>> {
        FolderIter::new(&self.layers, folder, after)
    }

    /// Up to `buffer.len()` bytes of file `ino` at `offset`; returns how many there were.
    pub fn read_at(&self, ino: Ino, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        match self.expect_inode(ino)?.node {
            Node::File(content) => content::read_at(&*self.chunks, &content, offset, buffer),
            _ => Err(Error::invalid(format!("inode {ino} is not a regular file"))),
        }
    }

    /// What `path` leads to from the root. Leading, trailing and double slashes don't matter; `.`, `..` and symbolic
    /// links work as in a process whose root is the view's; a link in last place is followed if `follow` is set.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Invalid`] for a component that is no folder, or too many links.
    pub fn resolve(&self, path: &[u8], follow: bool) -> Result<(Ino, FileKind)> {
        let missing = || Error::NotFound { what: "path", name: String::from_utf8_lossy(path).into_owned() };
        if self.place(Ino::ROOT).is_none() {
            return Err(missing());
        }
        let mut trail = vec![Ino::ROOT];
        let mut last = (Ino::ROOT, FileKind::Folder);
        let mut left: Vec<Vec<u8>> = Vec::new();
        push_parts(&mut left, path);
        let mut links = 0;
        while let Some(part) = left.pop() {
            if last.1 != FileKind::Folder {
                let path = path.escape_ascii();
                return Err(Error::invalid(format!("\"{path}\" leads through something that is not a folder")));
            }
            if part == b".." {
                if trail.len() > 1 {
                    trail.pop();
                }
                last = (trail.last().copied().unwrap_or(Ino::ROOT), FileKind::Folder);
                continue;
            }
            let found = self.lookup(last.0, &part)?.ok_or_else(missing)?;
            match found.1 {
                FileKind::Symlink if follow || !left.is_empty() => {
                    links += 1;
                    let Node::Symlink(target) = self.expect_inode(found.0)?.node else { return Err(missing()) };
                    if links > MAX_LINKS_FOLLOWED {
                        return Err(Error::invalid(format!("too many symbolic links in \"{}\"", path.escape_ascii())));
                    }
                    if target.first() == Some(&b'/') {
                        trail.truncate(1);
                        last = (Ino::ROOT, FileKind::Folder);
                    }
                    push_parts(&mut left, &target);
                }
                kind => {
                    if kind == FileKind::Folder {
                        trail.push(found.0);
                    }
                    last = found;
                }
            }
        }
        Ok(last)
    }

    /// A path that leads to inode `ino`, if one does; without a leading slash, empty for the root. There is no
    /// index for this: each step up reads the dentries of all layers, for all folders of that step at once.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a folder that lies in itself, and for too deep ones.
    pub fn path_of(&self, ino: Ino) -> Result<Option<Vec<u8>>> {
        let mut ways = WaysDown::new();
        let mut step = HashSet::from([ino]);
        for _ in 0..=MAX_STEPS_UP {
            if step.contains(&Ino::ROOT) {
                let names = successors(ways.get(&Ino::ROOT), |(below, _)| ways.get(below)).map(|(_, name)| *name);
                return Ok(Some(names.collect::<Vec<_>>().join(&b'/')));
            }
            if step.is_empty() {
                return Ok(None);
            }
            step = self.folders_above(&step, &mut ways)?;
        }
        Err(Error::corrupt("layer", format!("inode {ino} lies more than {MAX_STEPS_UP} folders deep")))
    }

    /// The folders in which those of `below` lie, but for the ones that are in `ways` already; only the root, if that is
    /// one.
    fn folders_above<'v>(&'v self, below: &HashSet<Ino>, ways: &mut WaysDown<'v>) -> Result<HashSet<Ino>> {
        let mut above = HashSet::new();
        for layer in &self.layers {
            for dentry in layer.table.dentries() {
                let DentryRef { folder, name, target } = dentry?;
                let Target::Inode { ino, .. } = target else { continue };
                if !below.contains(&ino) || self.lookup(folder, name)?.is_none_or(|(found, _)| found != ino) {
                    continue;
                }
                if successors(Some(ino), |at| ways.get(at).map(|(below, _)| *below)).any(|at| at == folder) {
                    return Err(Error::corrupt("layer", format!("folder {folder} lies in itself")));
                }
                if folder == Ino::ROOT {
                    ways.insert(folder, (ino, name));
                    return Ok(HashSet::from([folder]));
                }
                // A name may stand in a folder that was removed, so all that have one are gone through; but once each,
                // as there may be any number of ways that lead nowhere.
                if let Entry::Vacant(way) = ways.entry(folder) {
                    way.insert((ino, name));
                    above.insert(folder);
                }
            }
        }
        Ok(above)
    }
}

/// For folders above some inode: the entry through which a way leads down to it.
type WaysDown<'v> = HashMap<Ino, (Ino, &'v [u8])>;

/// Pushes the components of `path` in reverse, so that the first is popped first.
fn push_parts(left: &mut Vec<Vec<u8>>, path: &[u8]) {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    left.extend(parts.rev().map(<[u8]>::to_vec));
}

fn check_parent(child: &Manifest, parent: &Manifest) -> Result<()> {
    if child.depth == parent.depth.saturating_add(1) && child.next_ino >= parent.next_ino {
        return Ok(());
    }
    Err(Error::corrupt("manifest", "its depth or its next inode number doesn't fit its parent"))
}

impl AsRef<View> for View {
    fn as_ref(&self) -> &View {
        self
    }
}

#[cfg(test)]
mod tests;
