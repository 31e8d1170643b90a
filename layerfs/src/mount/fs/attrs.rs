//! Changing mode, owner, size and times.

use super::super::acl::{self, Acl};
use super::super::caller::Caller;
use super::super::errno::FsResult;
use super::super::watch::Op;
use super::edit::Edit;
use super::{Fs, Stat, xattrs};
use crate::attr::{FileKind, Time};
use crate::content::Content;
use crate::id::Ino;
use crate::inode::Node;
use crate::upper::table::UpperInode;

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The current time.
    Now,
    /// This one.
    To(Time),
}

/// What `chmod`, `chown`, `truncate` and `utimensat` change; what is none stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits.
    pub permissions: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length in bytes.
    pub size: Option<u64>,
    /// Time of last access.
    pub atime: Option<SetTime>,
    /// Time of last change of the data.
    pub mtime: Option<SetTime>,
}

pub(super) const SUID: u16 = libc::S_ISUID as u16;
pub(super) const SGID: u16 = libc::S_ISGID as u16;
const GROUP_EXECUTE: u16 = libc::S_IXGRP as u16;

impl Fs {
    /// Changes attributes, all or none.
    ///
    /// A call that sets nothing is how the kernel asks to clear setuid and setgid, before `fallocate` for example.
    pub fn setattr(&self, ino: Ino, set: SetAttr, caller: Caller) -> FsResult<Stat> {
        let _seen = self.seen(Op::Setattr, ino, None);
        let (upper, _gate) = self.enter()?;
        let _stripe = self.stripe(ino).lock();
        if let Some(size) = set.size {
            let had_bytes = size == 0 && self.stat(&self.state.read(), ino)?.size > 0;
            self.truncate_data(upper, ino, size)?;
            if had_bytes {
                upper.data().was_emptied(ino);
            }
        }
        let mut edit = Edit::new(self, upper);
        edit.catch_up(ino)?;
        let now = edit.now;
        let mut inode = edit.inode(ino)?;
        inode.inode.attrs.ctime = now;
        if set.size.is_some() {
            edit.makes_room();
        } else if edit.is_there(ino) {
            edit.takes_no_room();
        }
        if let Some(size) = set.size {
            if let Some(backed) = &mut inode.backed {
                backed.bytes = size;
                backed.base_bytes = backed.base_bytes.min(size);
                if backed.base_bytes == 0 {
                    inode.inode.node = Node::File(Content::empty());
                }
            }
            inode.inode.attrs.mtime = now;
        }
        change_owner_and_mode(&mut inode, set, caller);
        let time = |set| match set {
            SetTime::Now => now,
            SetTime::To(time) => time,
        };
        if let Some(atime) = set.atime {
            inode.inode.attrs.atime = time(atime);
        }
        if let Some(mtime) = set.mtime {
            inode.inode.attrs.mtime = time(mtime);
        }
        let is_whole = inode.backed.is_some_and(|backed| backed.base_bytes == 0);
        let stat = self.stat_upper(&inode)?;
        edit.set(inode);
        let _state = edit.commit()?;
        if is_whole && set.size.is_some() {
            upper.data().forget_map(ino);
        }
        Ok(stat)
    }
}

fn change_owner_and_mode(inode: &mut UpperInode, set: SetAttr, caller: Caller) {
    let is_file = inode.inode.kind() != FileKind::Folder;
    let changes_owner = set.uid.is_some() || set.gid.is_some();
    let permissions = inode.inode.attrs.permissions;
    if changes_owner && is_file {
        // Even the superuser's `chown` clears them.
        let group = inode.inode.attrs.gid;
        clear_privileges(inode, || true);
        if permissions & SGID != 0 && permissions & GROUP_EXECUTE == 0 && !caller.is_in_group(group) {
            inode.inode.attrs.permissions &= !SGID;
        }
    }
    if set.size.is_some() {
        clear_privileges(inode, || !caller.keeps_privileges());
    }
    if set == SetAttr::default() && is_file {
        clear_privileges(inode, || true);
    }
    if set.size.is_some() || (set == SetAttr::default() && is_file) {
        clear_foreign_sgid(inode, caller);
    }
    inode.inode.attrs.uid = set.uid.unwrap_or(inode.inode.attrs.uid);
    inode.inode.attrs.gid = set.gid.unwrap_or(inode.inode.attrs.gid);
    if let Some(permissions) = set.permissions {
        inode.inode.attrs.permissions = permissions & 0o7777;
        if let Some(mut list) = inode.inode.xattr(acl::ACCESS).and_then(Acl::decode) {
            list.chmod(permissions);
            xattrs::put(&mut inode.inode.xattrs, acl::ACCESS, list.encode());
        }
    }
}

/// Clears what makes a file run with other rights than its caller's: file capabilities always, setuid and setgid if
/// `and_bits` says so (asked only if there are any). Returns whether anything changed.
pub(super) fn clear_privileges(inode: &mut UpperInode, and_bits: impl FnOnce() -> bool) -> bool {
    let had_capability = xattrs::take(&mut inode.inode.xattrs, xattrs::CAPABILITY);
    let permissions = &mut inode.inode.attrs.permissions;
    let before = *permissions;
    if unprivileged(before) != before && and_bits() {
        *permissions = unprivileged(before);
    }
    had_capability || *permissions != before
}

/// Who changes the data of a file of another group clears its setgid, also where that is no privilege. Returns whether it was set.
pub(super) fn clear_foreign_sgid(inode: &mut UpperInode, caller: Caller) -> bool {
    let attrs = &mut inode.inode.attrs;
    let goes = attrs.permissions & SGID != 0 && !caller.is_in_group(attrs.gid);
    if goes {
        attrs.permissions &= !SGID;
    }
    goes
}

/// Whether a write may take something from its mode.
pub(super) fn may_lose_bits(inode: &UpperInode) -> bool {
    inode.inode.attrs.permissions & SGID != 0 || is_privileged(inode)
}

/// The bits `permissions` without those that are cleared when a file is written to.
pub(super) fn unprivileged(permissions: u16) -> u16 {
    permissions & !SUID & if has_effective_sgid(permissions) { !SGID } else { !0 }
}

/// Whether the file runs with other rights than its caller's.
pub(super) fn is_privileged(inode: &UpperInode) -> bool {
    let permissions = inode.inode.attrs.permissions;
    permissions & SUID != 0 || has_effective_sgid(permissions) || inode.inode.xattr(xattrs::CAPABILITY).is_some()
}

/// Setgid without execution for the group is not a privilege (it once meant mandatory locking).
fn has_effective_sgid(permissions: u16) -> bool {
    permissions & (SGID | GROUP_EXECUTE) == SGID | GROUP_EXECUTE
}
