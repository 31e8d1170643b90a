//! Operations on names: making, linking, removing, renaming.

use super::super::caller::Caller;
use super::super::errno::{FsResult, fail};
use super::super::watch::Op;
use super::edit::Edit;
use super::{Fs, Stat, check_name_length, check_new_name};
use crate::attr::{FileKind, MAX_SYMLINK};
use crate::content::Content;
use crate::id::Ino;
use crate::inode::Node;
use crate::patience;

const NOREPLACE: u32 = libc::RENAME_NOREPLACE;
const EXCHANGE: u32 = libc::RENAME_EXCHANGE;
const WHITEOUT: u32 = libc::RENAME_WHITEOUT;

/// A name in a folder.
type Place<'a> = (Ino, &'a [u8]);
/// What a name refers to.
type Found = (Ino, FileKind);

/// The most names an inode can have (ext4's limit).
const LINK_MAX: u32 = 65_000;

impl Fs {
    /// Makes an entry of the kind in `mode`, with `rdev` if it is a device, for `mknod`, `mkdir` and `open`.
    pub fn make(&self, folder: Ino, name: &[u8], mode: u32, umask: u32, rdev: u64, caller: Caller) -> FsResult<Stat> {
        let _seen = self.seen(Op::Make, folder, Some(name));
        let node = match FileKind::from_mode(mode) {
            // `mknod` without a type makes a file.
            None if mode & libc::S_IFMT == 0 => Node::File(Content::empty()),
            None | Some(FileKind::Symlink) => return fail(libc::EINVAL),
            Some(FileKind::File) => Node::File(Content::empty()),
            Some(FileKind::Folder) => Node::Folder,
            Some(FileKind::BlockDevice) => Node::BlockDevice(rdev),
            Some(FileKind::CharDevice) => Node::CharDevice(rdev),
            Some(FileKind::Fifo) => Node::Fifo,
            Some(FileKind::Socket) => Node::Socket,
        };
        // `mkdir` takes no setuid and no setgid: folders inherit the latter.
        let allowed = if node.kind() == FileKind::Folder { 0o1777 } else { 0o7777 };
        self.make_node(folder, name, node, (mode & allowed) as u16, umask as u16, caller)
    }

    /// Makes a symbolic link.
    pub fn symlink(&self, folder: Ino, name: &[u8], target: &[u8], caller: Caller) -> FsResult<Stat> {
        let _seen = self.seen(Op::Symlink, folder, Some(name));
        if target.len() > MAX_SYMLINK {
            return fail(libc::ENAMETOOLONG);
        }
        if target.is_empty() {
            return fail(libc::ENOENT);
        }
        self.make_node(folder, name, Node::Symlink(target.to_vec()), 0o777, 0, caller)
    }

    fn make_node(
        &self,
        folder: Ino,
        name: &[u8],
        node: Node,
        permissions: u16,
        umask: u16,
        caller: Caller,
    ) -> FsResult<Stat> {
        let (upper, _gate) = self.enter()?;
        check_new_name(name)?;
        let mut edit = Edit::new(self, upper);
        let parent = edit.living_folder(folder)?;
        if edit.state.lookup(folder, name)?.is_some() {
            return fail(libc::EEXIST);
        }
        let kind = node.kind();
        let ino = edit.make(&parent, node, permissions, umask & 0o777, caller);
        edit.set_name(folder, name, Some((ino, kind)))?;
        edit.touch_folder(folder, i32::from(kind == FileKind::Folder))?;
        edit.answer_with(ino);
        let state = edit.commit()?;
        self.remember(folder, ino, kind);
        self.stat(&state, ino)
    }

    /// Makes a file of `folder` that has no name yet: [`Fs::link`] gives it one, else it ends when nobody has it open.
    pub fn make_unnamed(&self, folder: Ino, mode: u32, umask: u32, caller: Caller) -> FsResult<Stat> {
        let _seen = self.seen(Op::Make, folder, None);
        let (upper, _gate) = self.enter()?;
        let mut edit = Edit::new(self, upper);
        let parent = edit.living_folder(folder)?;
        let (permissions, umask) = ((mode & 0o7777) as u16, (umask & 0o777) as u16);
        let ino = edit.make(&parent, Node::File(Content::empty()), permissions, umask, caller);
        edit.update(ino, |inode| inode.inode.nlink = 0)?;
        edit.answer_with(ino);
        let state = edit.commit()?;
        self.unnamed.lock().insert(ino);
        self.remember(folder, ino, FileKind::File);
        self.stat(&state, ino)
    }

    /// Gives inode `ino` another name; one that has lost its last name gets none any more.
    pub fn link(&self, ino: Ino, folder: Ino, name: &[u8]) -> FsResult<Stat> {
        let _seen = self.seen(Op::Link, folder, Some(name));
        let (upper, _gate) = self.enter()?;
        check_new_name(name)?;
        let mut edit = Edit::new(self, upper);
        edit.living_folder(folder)?;
        if edit.state.lookup(folder, name)?.is_some() {
            return fail(libc::EEXIST);
        }
        let inode = edit.inode(ino)?;
        let kind = inode.inode.kind();
        match inode.inode.nlink {
            _ if kind == FileKind::Folder => return fail(libc::EPERM),
            // Which are unnamed since they were made a daemon before this one knew; the kernel does.
            0 if !self.is_resumed && !self.unnamed.lock().contains(&ino) => return fail(libc::ENOENT),
            LINK_MAX.. => return fail(libc::EMLINK),
            _ => {}
        }
        edit.update(ino, |inode| inode.inode.nlink += 1)?;
        edit.set_name(folder, name, Some((ino, kind)))?;
        edit.touch_folder(folder, 0)?;
        edit.answer_with(ino);
        let state = edit.commit()?;
        if inode.inode.nlink == 0 {
            self.unnamed.lock().remove(&ino);
        }
        self.remember(folder, ino, kind);
        self.stat(&state, ino)
    }

    /// The answer that [`Fs::make`], [`Fs::symlink`] or [`Fs::link`] gave for `ino` in `folder`, once more: the daemon that
    /// did it died before the kernel heard of it.
    pub fn made_already(&self, folder: Ino, ino: Ino) -> FsResult<Stat> {
        let state = self.state.read();
        let stat = self.stat(&state, ino)?;
        self.remember(folder, ino, stat.kind);
        Ok(stat)
    }

    /// Removes a name of anything but a folder.
    pub fn unlink(&self, folder: Ino, name: &[u8]) -> FsResult<()> {
        let _seen = self.seen(Op::Unlink, folder, Some(name));
        let (upper, _gate) = self.enter()?;
        check_name_length(name)?;
        let mut edit = Edit::new(self, upper);
        let (ino, kind) = match edit.state.lookup(folder, name)? {
            None => return fail(libc::ENOENT),
            Some((_, FileKind::Folder)) => return fail(libc::EISDIR),
            Some(found) => found,
        };
        edit.makes_room();
        edit.drop_link(ino, kind)?;
        edit.set_name(folder, name, None)?;
        edit.touch_folder(folder, 0)?;
        edit.commit().map(drop)
    }

    /// Removes an empty folder.
    pub fn rmdir(&self, folder: Ino, name: &[u8]) -> FsResult<()> {
        let _seen = self.seen(Op::Rmdir, folder, Some(name));
        let (upper, _gate) = self.enter()?;
        check_name_length(name)?;
        match name {
            b"." => return fail(libc::EINVAL),
            b".." => return fail(libc::ENOTEMPTY),
            _ => {}
        }
        let mut edit = Edit::new(self, upper);
        let ino = match edit.state.lookup(folder, name)? {
            None => return fail(libc::ENOENT),
            Some((ino, FileKind::Folder)) => ino,
            Some(_) => return fail(libc::ENOTDIR),
        };
        if !edit.is_empty(ino)? {
            return fail(libc::ENOTEMPTY);
        }
        edit.makes_room();
        edit.drop_link(ino, FileKind::Folder)?;
        edit.set_name(folder, name, None)?;
        edit.touch_folder(folder, -1)?;
        edit.commit().map(drop)
    }

    /// Renames, with the flags of `renameat2`.
    pub fn rename(&self, from: Place<'_>, to: Place<'_>, flags: u32, caller: Caller) -> FsResult<()> {
        let _seen = self.seen(Op::Rename, from.0, Some(from.1));
        let (upper, _gate) = self.enter()?;
        check_name_length(from.1)?;
        check_name_length(to.1)?;
        let both = NOREPLACE | EXCHANGE;
        if flags & !(both | WHITEOUT) != 0
            || flags & both == both
            || flags & (EXCHANGE | WHITEOUT) == EXCHANGE | WHITEOUT
        {
            return fail(libc::EINVAL);
        }
        let edit = Edit::new(self, upper);
        let Some(source) = edit.state.lookup(from.0, from.1)? else { return fail(libc::ENOENT) };
        let target = edit.state.lookup(to.0, to.1)?;
        match target {
            Some(_) if flags & NOREPLACE != 0 => return fail(libc::EEXIST),
            None if flags & EXCHANGE != 0 => return fail(libc::ENOENT),
            _ => {}
        }
        if source.1 == FileKind::Folder && self.is_below(to.0, source.0) {
            return fail(libc::EINVAL);
        }
        if let Some(target) = target.filter(|target| target.1 == FileKind::Folder)
            && self.is_below(from.0, target.0)
        {
            return fail(if flags & EXCHANGE != 0 { libc::EINVAL } else { libc::ENOTEMPTY });
        }
        if target.is_some_and(|target| target.0 == source.0) {
            return Ok(());
        }
        if let (Some(target), true) = (target, flags & EXCHANGE != 0) {
            return self.exchange(edit, (from, source), (to, target));
        }
        check_new_name(to.1)?;
        edit.living_folder(to.0)?;
        if let Some(target) = target {
            check_replacing(&edit, source.1, target)?;
        }
        self.move_name(edit, (from, source), (to, target), flags & WHITEOUT != 0, caller)
    }

    fn move_name(
        &self,
        mut edit: Edit<'_>,
        (from, source): (Place<'_>, Found),
        (to, target): (Place<'_>, Option<Found>),
        leaves_whiteout: bool,
        caller: Caller,
    ) -> FsResult<()> {
        let is_folder = source.1 == FileKind::Folder;
        edit.makes_room();
        let mut owed = None;
        if let Some((ino, kind)) = target {
            if let Some(upper) = self.upper.as_ref().filter(|_| edit.is_backed(ino)) {
                // However new it is: without it and without the new name there would be nothing.
                upper.data().is_counted_on(ino);
            }
            edit.drop_link(ino, kind)?;
            owed = self.upper.as_ref().filter(|upper| edit.is_backed(source.0) && upper.data().owe(source.0));
        }
        edit.set_name(to.0, to.1, Some(source))?;
        if leaves_whiteout {
            let folder = edit.inode(from.0)?;
            let ino = edit.make(&folder, Node::CharDevice(0), 0, 0, caller);
            edit.set_name(from.0, from.1, Some((ino, FileKind::CharDevice)))?;
        } else {
            edit.set_name(from.0, from.1, None)?;
        }
        edit.update(source.0, |_| {})?;
        let replaced_folder = i32::from(target.is_some_and(|target| target.1 == FileKind::Folder));
        edit.touch_folder(from.0, -i32::from(is_folder))?;
        edit.touch_folder(to.0, i32::from(is_folder) - replaced_folder)?;
        let state = edit.commit()?;
        if is_folder {
            self.parents.write().insert(source.0, to.0);
        }
        drop(state);
        if let Some(upper) = owed {
            // Who replaces a file without a sync means to have the old bytes or the new ones, never none.
            patience::waits();
            upper.data().begin_write_back(source.0);
        }
        Ok(())
    }

    fn exchange(
        &self,
        mut edit: Edit<'_>,
        (from, source): (Place<'_>, Found),
        (to, target): (Place<'_>, Found),
    ) -> FsResult<()> {
        edit.set_name(to.0, to.1, Some(source))?;
        edit.set_name(from.0, from.1, Some(target))?;
        let moved = i32::from(source.1 == FileKind::Folder) - i32::from(target.1 == FileKind::Folder);
        edit.touch_folder(from.0, -moved)?;
        edit.touch_folder(to.0, moved)?;
        edit.update(source.0, |_| {})?;
        edit.update(target.0, |_| {})?;
        let _state = edit.commit()?;
        let mut parents = self.parents.write();
        for (moved, folder) in [(source, to.0), (target, from.0)] {
            if moved.1 == FileKind::Folder {
                parents.insert(moved.0, folder);
            }
        }
        Ok(())
    }
}

fn check_replacing(edit: &Edit<'_>, kind: FileKind, target: (Ino, FileKind)) -> FsResult<()> {
    match (kind == FileKind::Folder, target.1 == FileKind::Folder) {
        (true, false) => fail(libc::ENOTDIR),
        (false, true) => fail(libc::EISDIR),
        (true, true) if !edit.is_empty(target.0)? => fail(libc::ENOTEMPTY),
        _ => Ok(()),
    }
}
