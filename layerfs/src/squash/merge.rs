//! The merge itself: a chain's tables become one layer's.
//!
//! Hides how it is known what of the chain nobody can reach any more. Files that came and went within the chain are
//! dropped with all that they refer to; so are copies of lower files whose last name the chain took away. When in doubt
//! (a folder that the chain moved into one that it removed) something stays that does no harm.
//!
//! Memory: a bit for each inode record of the chain, and a few dozen bytes for each name of the layers below that the chain
//! takes away. Tables are read in order, three times.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use crate::attr::FileKind;
use crate::chunk::ChunkWrite;
use crate::error::Result;
use crate::id::{Ino, LayerId};
use crate::inode::{Dentry, Node, Target};
use crate::manifest::{LayerKind, LayerWriter, Manifest};
use crate::monitor::{Monitor, check};
use crate::table::{KEPT_BYTES, RELEASE_EVERY, Table};
use crate::view::View;

/// Records between two looks at whether the work was cancelled.
const CHECK_EVERY: u64 = 4096;

/// The top `count` layers of `view` as one layer, written to `out`.
pub(super) fn merge(
    view: &View,
    count: usize,
    kind: LayerKind,
    out: &dyn ChunkWrite,
    monitor: &dyn Monitor,
) -> Result<(LayerId, Manifest)> {
    let chain = Chain { view, above: view.part(..count), below: view.part(count..) };
    monitor.phase("looking", None);
    let living = chain.living(monitor)?;
    monitor.phase("merging", None);
    let mut writer = LayerWriter::new(out);
    chain.dentries(monitor, &mut |folder, name, target| {
        if living.folder(&chain, folder)? && chain.says_anything(folder, name, target)? {
            writer.dentry(&Dentry { folder, name: name.to_vec(), target })?;
        }
        Ok(())
    })?;
    chain.write_inodes(&living, &mut writer, monitor)?;
    let image = chain.above.layers().iter().find_map(|layer| layer.manifest.image.clone());
    if let Some(image) = image {
        writer.image(image);
    }
    let parent = chain.below.top().zip(chain.below.manifest());
    writer.finish(kind, parent, view.next_ino())
}

struct Chain<'v> {
    view: &'v View,
    /// What is merged.
    above: View,
    /// What it lies on.
    below: View,
}

/// What of the chain's inodes can be reached.
struct Living {
    /// Inodes that the chain made and that have a name: a bit for each record, by layer.
    made: Vec<Vec<u64>>,
    /// Folders of the layers below that are gone.
    gone_folders: HashSet<Ino>,
    /// By how many names an inode of the layers below, which the chain has a record of, has more (or fewer) than below.
    names: HashMap<Ino, i64>,
}

impl Living {
    /// Marks an inode that the chain made. Returns whether it wasn't yet.
    fn mark(&mut self, chain: &Chain<'_>, ino: Ino) -> bool {
        let Some(place) = chain.above.place(ino) else { return false };
        let word = &mut self.made[place.layer][(place.position / 64) as usize];
        let bit = 1 << (place.position % 64);
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }

    fn is_marked(&self, chain: &Chain<'_>, ino: Ino) -> bool {
        let place = chain.above.place(ino);
        place.is_some_and(|place| {
            self.made[place.layer][(place.position / 64) as usize] >> (place.position % 64) & 1 == 1
        })
    }

    fn folder(&self, chain: &Chain<'_>, folder: Ino) -> Result<bool> {
        Ok(if chain.is_below(folder) { !self.gone_folders.contains(&folder) } else { self.is_marked(chain, folder) })
    }

    /// Whether a record of `ino` is still of use.
    fn inode(&self, chain: &Chain<'_>, ino: Ino) -> Result<bool> {
        let Some(below) = chain.below.stat(ino)? else { return Ok(self.is_marked(chain, ino)) };
        if below.kind == FileKind::Folder {
            return Ok(!self.gone_folders.contains(&ino));
        }
        Ok(self.names.get(&ino).is_none_or(|difference| i64::from(below.nlink) + difference > 0))
    }
}

/// Shown each name of the merged chain.
type OnDentry<'a> = dyn FnMut(Ino, &[u8], Target) -> Result<()> + 'a;

impl Chain<'_> {
    fn is_below(&self, ino: Ino) -> bool {
        self.below.place(ino).is_some()
    }

    /// Shows all that the chain says of names, by folder and name, the topmost layer's word for each.
    fn dentries(&self, monitor: &dyn Monitor, show: &mut OnDentry<'_>) -> Result<()> {
        let tables: Vec<&Table> = self.above.layers().iter().map(|layer| &layer.table).collect();
        let mut heads = BinaryHeap::new();
        let push = |heads: &mut BinaryHeap<_>, index: usize, position: u64| -> Result<()> {
            if position < tables[index].dentry_count() {
                let dentry = tables[index].dentry_at(position)?;
                heads.push(Reverse((dentry.folder, dentry.name, index, position)));
            }
            Ok(())
        };
        for index in 0..tables.len() {
            push(&mut heads, index, 0)?;
        }
        let mut last: Option<(Ino, &[u8])> = None;
        let mut steps = 0u64;
        while let Some(Reverse((folder, name, index, position))) = heads.pop() {
            push(&mut heads, index, position + 1)?;
            self.step(&mut steps, monitor)?;
            if last.replace((folder, name)) != Some((folder, name)) {
                show(folder, name, tables[index].dentry_at(position)?.target)?;
            }
        }
        Ok(())
    }

    fn step(&self, steps: &mut u64, monitor: &dyn Monitor) -> Result<()> {
        *steps += 1;
        if steps.is_multiple_of(CHECK_EVERY) {
            check(monitor)?;
        }
        if steps.is_multiple_of(RELEASE_EVERY) && self.view.mapped_bytes() > KEPT_BYTES {
            self.view.layers().iter().for_each(|layer| layer.table.release_pages());
        }
        Ok(())
    }

    /// Whether what the chain says of a name isn't what the layers below say anyway.
    fn says_anything(&self, folder: Ino, name: &[u8], target: Target) -> Result<bool> {
        let below = self.below.lookup(folder, name)?;
        Ok(match target {
            Target::Whiteout => below.is_some(),
            Target::Inode { ino, kind } => below != Some((ino, kind)),
        })
    }

    /// What the chain itself says of a name.
    fn said(&self, folder: Ino, name: &[u8]) -> Result<Option<Target>> {
        for layer in self.above.layers() {
            if let Some(target) = layer.table.lookup(folder, name)? {
                return Ok(Some(target));
            }
        }
        Ok(None)
    }

    fn living(&self, monitor: &dyn Monitor) -> Result<Living> {
        let words = |count: u64| count.div_ceil(64) as usize;
        let made = self.above.layers().iter().map(|layer| vec![0; words(layer.table.inode_count())]).collect();
        let mut living = Living { made, gone_folders: HashSet::new(), names: HashMap::new() };
        self.find_gone(&mut living, monitor)?;
        let mut open = Vec::new();
        if !self.is_below(Ino::ROOT) && living.mark(self, Ino::ROOT) {
            open.push(Ino::ROOT);
        }
        self.dentries(monitor, &mut |folder, name, target| {
            if self.is_below(folder) && !living.gone_folders.contains(&folder) {
                let target = if self.says_anything(folder, name, target)? { target } else { Target::Whiteout };
                self.reach(&mut living, target, &mut open)?;
            }
            while let Some(folder) = open.pop() {
                for entry in self.above.read_folder(folder, None)? {
                    let entry = entry?;
                    self.reach(&mut living, Target::Inode { ino: entry.ino, kind: entry.kind }, &mut open)?;
                }
            }
            Ok(())
        })?;
        Ok(living)
    }

    /// A living name that the layers below don't have leads to `target`.
    fn reach(&self, living: &mut Living, target: Target, open: &mut Vec<Ino>) -> Result<()> {
        let Target::Inode { ino, kind } = target else { return Ok(()) };
        if self.is_below(ino) {
            self.count_name(living, ino, kind, 1);
        } else if living.mark(self, ino) && kind == FileKind::Folder {
            open.push(ino);
        }
        Ok(())
    }

    fn count_name(&self, living: &mut Living, ino: Ino, kind: FileKind, by: i64) {
        // Of others the chain has nothing that could be dropped.
        if kind != FileKind::Folder && self.above.place(ino).is_some() {
            *living.names.entry(ino).or_default() += by;
        }
    }

    /// Finds the folders of the layers below that the chain removed, and counts the names that went.
    fn find_gone(&self, living: &mut Living, monitor: &dyn Monitor) -> Result<()> {
        let mut moved = HashSet::new();
        self.dentries(monitor, &mut |folder, name, target| {
            let below = self.below.lookup(folder, name)?;
            let now = if let Target::Inode { ino, kind } = target { Some((ino, kind)) } else { None };
            if below == now {
                return Ok(());
            }
            match below {
                Some((ino, FileKind::Folder)) => drop(living.gone_folders.insert(ino)),
                Some((ino, kind)) => self.count_name(living, ino, kind, -1),
                None => {}
            }
            if let Some((ino, FileKind::Folder)) = now
                && self.is_below(ino)
            {
                moved.insert(ino);
            }
            Ok(())
        })?;
        living.gone_folders.retain(|ino| !moved.contains(ino));
        // A folder that is removed is empty, but a layer doesn't say so of each of its names.
        let mut open: Vec<Ino> = living.gone_folders.iter().copied().collect();
        while let Some(folder) = open.pop() {
            for entry in self.below.read_folder(folder, None)? {
                let entry = entry?;
                check(monitor)?;
                let said = self.said(folder, entry.name)?;
                if said.is_some_and(|target| target != Target::Inode { ino: entry.ino, kind: entry.kind }) {
                    continue;
                }
                if entry.kind != FileKind::Folder {
                    self.count_name(living, entry.ino, entry.kind, -1);
                } else if !moved.contains(&entry.ino) && living.gone_folders.insert(entry.ino) {
                    open.push(entry.ino);
                }
            }
        }
        Ok(())
    }

    /// Writes the topmost record of each inode that lives and isn't below in just the same way.
    fn write_inodes(&self, living: &Living, writer: &mut LayerWriter<'_>, monitor: &dyn Monitor) -> Result<()> {
        let tables: Vec<&Table> = self.above.layers().iter().map(|layer| &layer.table).collect();
        let mut heads = BinaryHeap::new();
        let push = |heads: &mut BinaryHeap<_>, index: usize, position: u64| {
            if position < tables[index].inode_count() {
                heads.push(Reverse((tables[index].ino_at(position), index, position)));
            }
        };
        (0..tables.len()).for_each(|index| push(&mut heads, index, 0));
        let (mut last, mut steps) = (None, 0);
        while let Some(Reverse((ino, index, position))) = heads.pop() {
            push(&mut heads, index, position + 1);
            self.step(&mut steps, monitor)?;
            if last.replace(ino) == Some(ino) || !living.inode(self, ino)? {
                continue;
            }
            if let Some(place) = self.below.place(ino)
                && self.below.layers()[place.layer].table.inode_bytes_at(place.position)?
                    == tables[index].inode_bytes_at(position)?
            {
                continue;
            }
            let inode = tables[index].inode_at(position)?;
            if let Node::File(content) = &inode.node {
                monitor.advance(content.len());
            }
            writer.inode(&inode)?;
            monitor.items(1);
        }
        Ok(())
    }
}
