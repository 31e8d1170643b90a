//! Listing folders of a merged tree, and walking all of it in path order.
//!
//! Hides the merge of the layers' sorted runs. Memory: one cursor per layer and open folder, and a bit per folder
//! walked. Invariant: a walk of a malformed stack (a folder in itself, or in two places) ends with an error.

use std::ops::Range;
use std::sync::Arc;

use crate::attr::FileKind;
use crate::error::{Error, Result};
use crate::id::Ino;
use crate::inode::Target;
use crate::table::Table;
use crate::view::{Layer, View};

/// An entry of a merged folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FolderEntry<'v> {
    /// Its name.
    pub name: &'v [u8],
    /// The inode that it refers to.
    pub ino: Ino,
    /// That inode's kind.
    pub kind: FileKind,
}

/// One layer's run of a folder's dentries, with the next one decoded.
struct Cursor<'v> {
    table: &'v Table,
    next: Option<(&'v [u8], Target)>,
    rest: Range<u64>,
}

impl Cursor<'_> {
    fn advance(&mut self) -> Result<()> {
        self.next = match self.rest.next() {
            None => None,
            Some(position) => {
                let dentry = self.table.dentry_at(position)?;
                Some((dentry.name, dentry.target))
            }
        };
        Ok(())
    }
}

/// The entries of one folder of a view, by name.
pub struct FolderIter<'v> {
    /// The top layer's first; only layers that have dentries of the folder.
    cursors: Vec<Cursor<'v>>,
}

impl<'v> FolderIter<'v> {
    pub(crate) fn new(layers: &'v [Arc<Layer>], folder: Ino, after: Option<&[u8]>) -> Result<FolderIter<'v>> {
        let mut cursors = Vec::new();
        for layer in layers {
            let mut rest = layer.table.folder(folder);
            if let Some(after) = after {
                rest.start = layer.table.lower_bound(rest.clone(), after)?;
                if rest.start < rest.end && layer.table.dentry_at(rest.start)?.name == after {
                    rest.start += 1;
                }
            }
            let mut cursor = Cursor { table: &layer.table, next: None, rest };
            cursor.advance()?;
            if cursor.next.is_some() {
                cursors.push(cursor);
            }
        }
        Ok(FolderIter { cursors })
    }

    fn next_entry(&mut self) -> Result<Option<FolderEntry<'v>>> {
        loop {
            let mut first: Option<(&'v [u8], Target)> = None;
            for (name, target) in self.cursors.iter().filter_map(|cursor| cursor.next) {
                if first.is_none_or(|(least, _)| name < least) {
                    first = Some((name, target));
                }
            }
            let Some((name, target)) = first else { return Ok(None) };
            for cursor in &mut self.cursors {
                if cursor.next.is_some_and(|(other, _)| other == name) {
                    cursor.advance()?;
                }
            }
            if let Target::Inode { ino, kind } = target {
                return Ok(Some(FolderEntry { name, ino, kind }));
            }
        }
    }
}

impl<'v> Iterator for FolderIter<'v> {
    type Item = Result<FolderEntry<'v>>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_entry();
        if next.is_err() {
            self.cursors.clear();
        }
        next.transpose()
    }
}

/// Which folders a walk has entered: one bit per inode record of the view.
pub(crate) struct Entered {
    bits: Vec<Vec<u64>>,
}

impl Entered {
    pub(crate) fn new(view: &View) -> Entered {
        let words = |layer: &Arc<Layer>| layer.table.inode_count().div_ceil(64) as usize;
        Entered { bits: view.layers().iter().map(|layer| vec![0; words(layer)]).collect() }
    }

    /// Fails if `folder` has no record, or has been entered before.
    pub(crate) fn enter(&mut self, view: &View, folder: Ino) -> Result<()> {
        let damaged = |detail: &str| Error::corrupt("layer", format!("folder {folder} {detail}"));
        let place = view.place(folder).ok_or_else(|| damaged("has a name but no record"))?;
        let word = &mut self.bits[place.layer][(place.position / 64) as usize];
        let bit = 1 << (place.position % 64);
        if *word & bit != 0 {
            return Err(damaged("lies in two folders"));
        }
        *word |= bit;
        Ok(())
    }
}

/// What a walk meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkEntry<'w> {
    /// Its path from the root, without a leading slash.
    pub path: &'w [u8],
    /// The last component of the path.
    pub name: &'w [u8],
    /// The folder that it is in.
    pub folder: Ino,
    /// Its inode.
    pub ino: Ino,
    /// Its inode's kind.
    pub kind: FileKind,
}

/// Walks a view depth first, siblings by name, each folder before what is in it. The root itself isn't met.
pub struct Walker<'v> {
    view: &'v View,
    entered: Entered,
    /// For each open folder: its number, the rest of its entries, and the length of its path.
    open: Vec<(Ino, FolderIter<'v>, usize)>,
    path: Vec<u8>,
    /// A folder that was returned last and will be entered unless it is skipped.
    pending: Option<Ino>,
}

impl<'v> Walker<'v> {
    /// A walk of all of `view`.
    pub fn new(view: &'v View) -> Walker<'v> {
        Walker::below(view, Ino::ROOT)
    }

    /// A walk of what is in `folder`; paths start there.
    pub fn below(view: &'v View, folder: Ino) -> Walker<'v> {
        let pending = view.place(folder).map(|_| folder);
        Walker { view, entered: Entered::new(view), open: Vec::new(), path: Vec::new(), pending }
    }

    /// The next entry, or none after the last.
    pub fn next_entry(&mut self) -> Result<Option<WalkEntry<'_>>> {
        if let Some(folder) = self.pending.take() {
            self.entered.enter(self.view, folder)?;
            self.open.push((folder, self.view.read_folder(folder, None)?, self.path.len()));
        }
        self.view.step();
        while let Some((folder, entries, path_bytes)) = self.open.last_mut() {
            self.path.truncate(*path_bytes);
            let Some(entry) = entries.next().transpose()? else {
                self.open.pop();
                continue;
            };
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            let name_start = self.path.len();
            self.path.extend_from_slice(entry.name);
            if entry.kind == FileKind::Folder {
                self.pending = Some(entry.ino);
            }
            let (path, name) = (&self.path[..], &self.path[name_start..]);
            return Ok(Some(WalkEntry { path, name, folder: *folder, ino: entry.ino, kind: entry.kind }));
        }
        Ok(None)
    }

    /// Doesn't enter the folder that was returned last.
    pub fn skip_folder(&mut self) {
        self.pending = None;
    }
}

/// What a visitor wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Everything in order.
    Enter,
    /// Not what is in this folder.
    Skip,
    /// Nothing more.
    Stop,
}

impl View {
    /// Shows every entry to `visitor`, depth first, siblings by name, each folder before what is in it.
    pub fn walk(&self, mut visitor: impl FnMut(&WalkEntry<'_>) -> Result<Next>) -> Result<()> {
        let mut walker = Walker::new(self);
        while let Some(entry) = walker.next_entry()? {
            match visitor(&entry)? {
                Next::Enter => {}
                Next::Skip => walker.skip_folder(),
                Next::Stop => return Ok(()),
            }
        }
        Ok(())
    }
}
