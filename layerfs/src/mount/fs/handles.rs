//! Inodes by number alone: what file handles (`open_by_handle_at`, a kernel's NFS server) refer to.
//!
//! A handle is an inode's number, which is the same on every mount of the stack and never used again. The kernel asks for `.` and
//! `..` of a number that it doesn't know. Invariant: no number leads to what has no name any more. There is no index from inodes to
//! names: for a sealed inode all names are searched, with changes held back meanwhile.

use super::super::errno::{Errno, FsResult};
use super::{Fs, Stat, State};
use crate::id::Ino;
use crate::inode::Target;

/// Deeper folders can't be named by any path.
const STEPS_MAX: usize = 4096;

impl Fs {
    /// Inode `ino`, if it has a name. The kernel remembers it until [`Fs::forget`].
    pub(super) fn by_number(&self, ino: Ino) -> FsResult<Stat> {
        let state = self.state.read();
        if !state.is_named(ino)? {
            return Err(Errno(libc::ESTALE));
        }
        let stat = self.stat(&state, ino)?;
        if self.upper.is_some() {
            self.lookups.add(ino);
        }
        Ok(stat)
    }

    /// The folder that folder `ino` is in, as [`Fs::by_number`] gives it.
    pub(super) fn parent_by_number(&self, ino: Ino) -> FsResult<Stat> {
        let known = self.parents.read().get(&ino).copied();
        let parent = match known {
            Some(parent) => parent,
            None => {
                let state = self.state.read();
                let parent = state.folder_of(ino, 0)?.ok_or(Errno(libc::ESTALE))?;
                self.parents.write().insert(ino, parent);
                parent
            }
        };
        self.by_number(parent)
    }
}

impl State {
    /// Whether a path leads to `ino`.
    fn is_named(&self, ino: Ino) -> FsResult<bool> {
        match self.tables.inode(ino) {
            Some(inode) => Ok(inode.inode.nlink > 0),
            None => Ok(self.folder_of(ino, 0)?.is_some()),
        }
    }

    /// A folder that has a name for `ino`, and to which a path leads; the root is in itself.
    fn folder_of(&self, ino: Ino, steps: usize) -> FsResult<Option<Ino>> {
        if ino == Ino::ROOT {
            return Ok(Some(ino));
        }
        if steps > STEPS_MAX || self.tables.inode(ino).is_some_and(|inode| inode.inode.nlink == 0) {
            return Ok(None);
        }
        let leads_there = |target| matches!(target, Target::Inode { ino: target, .. } if target == ino);
        for (folder, names) in self.tables.folders() {
            if names.iter().any(|(_, slot)| leads_there(slot.target)) && self.folder_of(folder, steps + 1)?.is_some() {
                return Ok(Some(folder));
            }
        }
        if ino >= self.view.next_ino() {
            return Ok(None);
        }
        for layer in self.view.layers() {
            for dentry in layer.table.dentries() {
                let dentry = dentry?;
                let is_there = leads_there(dentry.target)
                    && self.lookup(dentry.folder, dentry.name)?.is_some_and(|(found, _)| found == ino);
                // It may stand in a folder that was removed.
                if is_there && self.folder_of(dentry.folder, steps + 1)?.is_some() {
                    return Ok(Some(dentry.folder));
                }
            }
        }
        Ok(None)
    }
}
