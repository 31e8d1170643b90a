//! What differs between two merged trees, path by path, as a stream.
//!
//! Hides how parts that both stacks share are passed over: where they share layers, only folders that the other
//! layers touch, directly or below, are opened ([`touched`]). Memory: the cursors of one path, a bit per folder, and
//! at most a million numbers of touched inodes.

mod touched;

use serde::Serialize;

use crate::attr::FileKind;
use crate::error::Result;
use crate::id::Ino;
use crate::inode::{Inode, Node};
use crate::view::View;
use crate::walk::{Entered, FolderEntry, FolderIter};
use touched::Touched;

/// In what an inode differs from its predecessor at the same path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Differences {
    /// Another kind: a file became a folder.
    pub kind: bool,
    /// The bytes of a file, the target of a link, the number of a device.
    pub content: bool,
    /// The permission bits.
    pub mode: bool,
    /// User or group.
    pub owner: bool,
    /// The time of the last modification.
    pub mtime: bool,
    /// The extended attributes, access control lists among them.
    pub xattrs: bool,
    /// The hard links: how many there are, or which paths share the inode.
    pub links: bool,
}

impl Differences {
    /// Whether there is any.
    pub fn any(&self) -> bool {
        *self != Differences::default()
    }

    /// Whether anything but the time of modification differs.
    pub fn beyond_mtime(&self) -> bool {
        Differences { mtime: false, ..*self }.any()
    }

    fn between(old: &Inode, new: &Inode, same_numbers: bool) -> Differences {
        let kind = old.kind() != new.kind();
        let linked = old.kind() != FileKind::Folder && !kind;
        let regrouped = same_numbers && old.ino != new.ino && old.nlink.max(new.nlink) > 1;
        Differences {
            kind,
            content: !kind && old.node != new.node,
            mode: old.attrs.permissions != new.attrs.permissions,
            owner: (old.attrs.uid, old.attrs.gid) != (new.attrs.uid, new.attrs.gid),
            mtime: old.attrs.mtime != new.attrs.mtime,
            xattrs: old.xattrs != new.xattrs,
            links: linked && (old.nlink != new.nlink || regrouped),
        }
    }
}

/// What happened to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Only the second tree has it.
    Added,
    /// Only the first tree has it.
    Removed,
    /// Both have it, and it differs.
    Modified(Differences),
}

/// A path that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The path, without a leading slash; empty for the root.
    pub path: Vec<u8>,
    /// What happened to it.
    pub what: What,
    /// Its inode in the first tree. Paths of one inode number are hard links of one file.
    pub old: Option<Inode>,
    /// Its inode in the second tree.
    pub new: Option<Inode>,
}

impl Change {
    /// Its size in the first tree, in bytes; 0 if it isn't there.
    pub fn old_bytes(&self) -> u64 {
        file_bytes(self.old.as_ref())
    }

    /// Its size in the second tree, in bytes; 0 if it isn't there.
    pub fn new_bytes(&self) -> u64 {
        file_bytes(self.new.as_ref())
    }
}

fn file_bytes(inode: Option<&Inode>) -> u64 {
    match inode.map(|inode| &inode.node) {
        Some(Node::File(content)) => content.len(),
        _ => 0,
    }
}

/// What differs between the trees `old` and `new`: every path, in path order, a folder before what is in it.
/// Access and change times don't count.
pub fn diff<'v>(old: &'v View, new: &'v View) -> Diff<'v> {
    Diff::new(old, new, true)
}

/// What turns the tree `parent` into the tree `view`, for exporters: as [`diff`], but of a removed folder, or one
/// that something else has replaced, only the folder itself is told, not what was in it. A removed path is a
/// whiteout. If an inode has more or fewer hard links than before, all its paths are among the changes; if only their
/// names differ, just those.
pub fn layer_changes<'v>(parent: &'v View, view: &'v View) -> Diff<'v> {
    Diff::new(parent, view, false)
}

/// A folder's entries, with the next one in view.
struct Side<'v> {
    entries: Option<FolderIter<'v>>,
    next: Option<FolderEntry<'v>>,
}

impl<'v> Side<'v> {
    fn new(view: &'v View, folder: Option<Ino>) -> Result<Side<'v>> {
        let entries = folder.map(|folder| view.read_folder(folder, None)).transpose()?;
        let mut side = Side { entries, next: None };
        side.take()?;
        Ok(side)
    }

    /// Takes the next entry.
    fn take(&mut self) -> Result<Option<FolderEntry<'v>>> {
        let following = self.entries.as_mut().and_then(Iterator::next).transpose()?;
        Ok(std::mem::replace(&mut self.next, following))
    }
}

/// The same folder of both trees, or one that only one tree has.
struct Frame<'v> {
    old: Side<'v>,
    new: Side<'v>,
    path_bytes: usize,
}

/// The changes between two trees; made by [`diff`] and [`layer_changes`].
pub struct Diff<'v> {
    old: &'v View,
    new: &'v View,
    removed_too: bool,
    touched: Option<Touched>,
    entered: (Entered, Entered),
    open: Vec<Frame<'v>>,
    path: Vec<u8>,
    /// What to open next.
    pending: (Option<Ino>, Option<Ino>),
    started: bool,
    ended: bool,
}

impl<'v> Diff<'v> {
    fn new(old: &'v View, new: &'v View, removed_too: bool) -> Diff<'v> {
        Diff {
            old,
            new,
            removed_too,
            touched: None,
            entered: (Entered::new(old), Entered::new(new)),
            open: Vec::new(),
            path: Vec::new(),
            pending: (None, None),
            started: false,
            ended: old.top() == new.top(),
        }
    }

    fn next_change(&mut self) -> Result<Option<Change>> {
        if !std::mem::replace(&mut self.started, true) {
            self.touched = Some(Touched::between(self.old, self.new)?);
            let root = |view: &View| {
                view.place(Ino::ROOT).map(|_| FolderEntry { name: b"", ino: Ino::ROOT, kind: FileKind::Folder })
            };
            if let Some(change) = self.compare(root(self.old), root(self.new))? {
                return Ok(Some(change));
            }
        }
        loop {
            self.open_pending()?;
            let Some(frame) = self.open.last_mut() else { return Ok(None) };
            self.path.truncate(frame.path_bytes);
            let (old, new) = match (frame.old.next, frame.new.next) {
                (None, None) => {
                    self.open.pop();
                    continue;
                }
                (Some(old), Some(new)) if old.name == new.name => (frame.old.take()?, frame.new.take()?),
                (Some(old), Some(new)) if new.name < old.name => (None, frame.new.take()?),
                (None, Some(_)) => (None, frame.new.take()?),
                (Some(_), _) => (frame.old.take()?, None),
            };
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(old.or(new).map_or(&[], |entry| entry.name));
            if let Some(change) = self.compare(old, new)? {
                return Ok(Some(change));
            }
        }
    }

    fn open_pending(&mut self) -> Result<()> {
        let (old, new) = std::mem::take(&mut self.pending);
        if old.is_none() && new.is_none() {
            return Ok(());
        }
        if let Some(folder) = old {
            self.entered.0.enter(self.old, folder)?;
        }
        if let Some(folder) = new {
            self.entered.1.enter(self.new, folder)?;
        }
        let (old, new) = (Side::new(self.old, old)?, Side::new(self.new, new)?);
        self.open.push(Frame { old, new, path_bytes: self.path.len() });
        Ok(())
    }

    /// Compares what stands at the current path, and sets what is to be opened next.
    fn compare(&mut self, old: Option<FolderEntry<'v>>, new: Option<FolderEntry<'v>>) -> Result<Option<Change>> {
        let touched = self.touched.as_ref();
        if let (Some(old), Some(new)) = (old, new)
            && old.ino == new.ino
            && touched.is_some_and(|touched| !touched.contains(new.ino))
        {
            return Ok(None);
        }
        let folder = |entry: Option<FolderEntry<'v>>| entry.filter(|e| e.kind == FileKind::Folder).map(|e| e.ino);
        self.pending = (folder(old), folder(new));
        if !self.removed_too && self.pending.1.is_none() {
            self.pending.0 = None;
        }
        if let (Some(old), Some(new)) = (old, new)
            && self.is_same_record(old.ino, new.ino)?
        {
            return Ok(None);
        }
        let same_numbers = touched.is_some_and(Touched::has_shared_layers);
        let old = old.map(|entry| self.old.expect_inode(entry.ino)).transpose()?;
        let new = new.map(|entry| self.new.expect_inode(entry.ino)).transpose()?;
        let what = match (&old, &new) {
            (Some(old), Some(new)) => What::Modified(Differences::between(old, new, same_numbers)),
            (Some(_), None) => What::Removed,
            (None, _) => What::Added,
        };
        let differs = !matches!(what, What::Modified(differences) if !differences.any());
        Ok(differs.then(|| Change { path: self.path.clone(), what, old, new }))
    }

    fn is_same_record(&self, old: Ino, new: Ino) -> Result<bool> {
        let (Some(at), Some(to)) = (self.old.place(old), self.new.place(new)) else { return Ok(false) };
        let bytes =
            |view: &'v View, place: crate::view::Place| view.layers()[place.layer].table.inode_bytes_at(place.position);
        Ok(old == new && bytes(self.old, at)? == bytes(self.new, to)?)
    }
}

impl Iterator for Diff<'_> {
    type Item = Result<Change>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.next_change().transpose();
        self.ended = !matches!(next, Some(Ok(_)));
        next
    }
}
