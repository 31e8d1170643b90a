//! One change of the namespace or of attributes, from look-up to commit, under the state's lock.
//!
//! Invariant: nothing is visible, in memory or on disk, before [`Edit::commit`], and all of it afterwards.

use parking_lot::RwLockWriteGuard;

use super::super::acl::{self, Acl};
use super::super::caller::Caller;
use super::super::errno::{FsResult, fail};
use super::{Fs, State};
use crate::attr::{Attrs, FileKind, Time};
use crate::id::Ino;
use crate::inode::{Inode, Node, Target};
use crate::upper::Upper;
use crate::upper::table::{Change, Slot, UpperInode};

pub(super) struct Edit<'fs> {
    fs: &'fs Fs,
    upper: &'fs Upper,
    pub(super) state: RwLockWriteGuard<'fs, State>,
    change: Change,
    pub(super) now: Time,
    /// Inodes whose last name goes and that nobody has in use, and the lengths of their data files.
    reaped: Vec<(Ino, Option<u64>)>,
}

impl<'fs> Edit<'fs> {
    pub(super) fn new(fs: &'fs Fs, upper: &'fs Upper) -> Edit<'fs> {
        let state = fs.state.write();
        Edit { fs, upper, state, change: Change::new(), now: Time::now(), reaped: Vec::new() }
    }

    /// The inode as this edit has left it.
    pub(super) fn inode(&self, ino: Ino) -> FsResult<UpperInode> {
        match self.change.pending(ino) {
            Some(inode) => Ok(inode.clone()),
            None => self.state.inode(ino),
        }
    }

    /// Lets the tables know first what was written to file `ino` past us.
    pub(super) fn catch_up(&mut self, ino: Ino) -> FsResult<()> {
        self.fs.catch_up(self.upper, &mut self.state, ino)
    }

    /// A folder that can take new names: one that was removed can't.
    pub(super) fn living_folder(&self, ino: Ino) -> FsResult<UpperInode> {
        let folder = self.inode(ino)?;
        match folder.inode.kind() {
            FileKind::Folder if folder.inode.nlink > 0 => Ok(folder),
            FileKind::Folder => fail(libc::ENOENT),
            _ => fail(libc::ENOTDIR),
        }
    }

    pub(super) fn set(&mut self, inode: UpperInode) {
        self.change.inode(inode);
    }

    /// Changes an inode and sets its ctime, which is after what was written to it past us.
    pub(super) fn update(&mut self, ino: Ino, change: impl FnOnce(&mut UpperInode)) -> FsResult<()> {
        self.catch_up(ino)?;
        let mut inode = self.inode(ino)?;
        inode.inode.attrs.ctime = self.now;
        change(&mut inode);
        self.set(inode);
        Ok(())
    }

    /// A name in `folder` came or went, and `folders` folders with it.
    pub(super) fn touch_folder(&mut self, folder: Ino, folders: i32) -> FsResult<()> {
        let now = self.now;
        self.update(folder, |inode| {
            inode.inode.attrs.mtime = now;
            inode.inode.nlink = inode.inode.nlink.saturating_add_signed(folders);
        })
    }

    /// Makes `name` in `folder` refer to `target`, or to nothing.
    pub(super) fn set_name(&mut self, folder: Ino, name: &[u8], target: Option<(Ino, FileKind)>) -> FsResult<()> {
        let below = self.state.lookup_below(folder, name)?;
        let old = self.state.tables.folder(folder).and_then(|names| names.get(name));
        let slot = match (target, below) {
            (Some(target), Some(below)) if target == below => None,
            (None, None) => None,
            (None, Some(_)) => Some(Slot { target: Target::Whiteout, order: 0 }),
            (Some((ino, kind)), below) => {
                let order = match (below, old) {
                    (Some(_), _) => 0,
                    (None, Some(old)) if old.order != 0 => old.order,
                    (None, _) => self.state.tables.take_order(),
                };
                Some(Slot { target: Target::Inode { ino, kind }, order })
            }
        };
        if slot.is_some() || old.is_some() {
            self.change.dentry(folder, name, slot);
        }
        Ok(())
    }

    /// One name of `ino` goes.
    pub(super) fn drop_link(&mut self, ino: Ino, kind: FileKind) -> FsResult<()> {
        let is_gone = kind == FileKind::Folder || self.inode(ino)?.inode.nlink <= 1;
        let is_forgotten = is_gone && !self.fs.may_be_in_use(ino);
        if !is_forgotten {
            self.catch_up(ino)?;
        }
        let mut inode = self.inode(ino)?;
        inode.inode.attrs.ctime = self.now;
        inode.inode.nlink = if is_gone { 0 } else { inode.inode.nlink - 1 };
        if kind == FileKind::Folder {
            // What the upper says of its names (all gone) doesn't matter any more.
            let names: Vec<Box<[u8]>> = self
                .state
                .tables
                .folder(ino)
                .into_iter()
                .flat_map(|names| names.iter())
                .map(|(name, _)| name.into())
                .collect();
            names.iter().for_each(|name| self.change.dentry(ino, name, None));
        }
        if is_forgotten {
            self.change.forget(ino);
            self.reaped.push((ino, inode.backed.map(|backed| backed.bytes)));
        } else {
            if is_gone && inode.backed.is_some() {
                self.fs.orphans.removed(ino);
            }
            self.set(inode);
        }
        Ok(())
    }

    /// Whether `folder` has no entries.
    pub(super) fn is_empty(&self, folder: Ino) -> FsResult<bool> {
        let names = self.state.tables.folder(folder);
        if names.is_some_and(|names| names.iter().any(|(_, slot)| slot.target != Target::Whiteout)) {
            return Ok(false);
        }
        if folder >= self.state.view.next_ino() {
            return Ok(true);
        }
        for entry in self.state.view.read_folder(folder, None)? {
            let name = entry?.name;
            if names.is_none_or(|names| names.get(name).is_none()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes an inode of a new entry of `folder`, with what it inherits. `permissions` are those that were asked
    /// for.
    pub(super) fn make(
        &mut self,
        folder: &UpperInode,
        node: Node,
        permissions: u16,
        umask: u16,
        caller: Caller,
    ) -> Ino {
        let ino = self.upper.take_ino();
        let kind = node.kind();
        // What is written to a file past us gets its time from the host's filesystem: it must not be before this one.
        let now = if kind == FileKind::File { Time::of_last_tick() } else { self.now };
        let mut attrs = Attrs::imported(u32::from(permissions), caller.uid, caller.gid, now);
        let mut xattrs = Vec::new();
        if folder.inode.attrs.permissions & libc::S_ISGID as u16 != 0 {
            attrs.gid = folder.inode.attrs.gid;
            if kind == FileKind::Folder {
                attrs.permissions |= libc::S_ISGID as u16;
            }
        }
        let default = folder.inode.xattr(acl::DEFAULT).filter(|_| kind != FileKind::Symlink);
        match default.and_then(|value| Some((value, Acl::decode(value)?))) {
            None if kind == FileKind::Symlink => {}
            None => attrs.permissions &= !umask,
            Some((value, mut list)) => {
                attrs.permissions = list.inherit(attrs.permissions);
                if !list.is_minimal() {
                    xattrs.push((acl::ACCESS.to_vec(), list.encode()));
                }
                if kind == FileKind::Folder {
                    xattrs.push((acl::DEFAULT.to_vec(), value.to_vec()));
                }
            }
        }
        let nlink = if kind == FileKind::Folder { 2 } else { 1 };
        self.set(UpperInode::sealed(Inode { ino, nlink, attrs, xattrs, node }));
        ino
    }

    /// Whether `ino` has a data file.
    pub(super) fn is_backed(&self, ino: Ino) -> bool {
        self.state.tables.inode(ino).is_some_and(|inode| inode.backed.is_some())
    }

    /// Whether the upper has inode `ino` already: a change takes no further room then.
    pub(super) fn is_there(&self, ino: Ino) -> bool {
        self.state.tables.inode(ino).is_some()
    }

    /// It is to be done though the disk is full.
    pub(super) fn makes_room(&mut self) {
        self.change.makes_room();
    }

    /// The same, as long as removals have enough.
    pub(super) fn takes_no_room(&mut self) {
        self.change.takes_no_room();
    }

    /// The answer to whoever asked for this is about inode `ino`.
    pub(super) fn answer_with(&mut self, ino: Ino) {
        self.change.answer_with(ino);
    }

    /// Makes it all happen.
    pub(super) fn commit(mut self) -> FsResult<RwLockWriteGuard<'fs, State>> {
        self.upper.commit(&mut self.state.tables, self.change)?;
        for (ino, bytes) in self.reaped {
            self.fs.removed(self.upper, ino, bytes);
        }
        Ok(self.state)
    }
}
