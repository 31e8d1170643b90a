//! Extended attributes; POSIX access control lists are two of them that the mode depends on.

use super::super::acl::{self, Acl};
use super::super::caller::Caller;
use super::super::errno::{Errno, FsResult, fail};
use super::super::watch::Op;
use super::Fs;
use super::attrs::SGID;
use super::edit::Edit;
use crate::attr::{FileKind, MAX_XATTR_NAME, MAX_XATTR_VALUE, Xattrs};
use crate::id::Ino;

/// File capabilities.
pub(super) const CAPABILITY: &[u8] = b"security.capability";
/// The most bytes that the names of an inode's attributes take in a list (Linux's limit).
const LIST_MAX: usize = 65536;

pub(super) fn put(xattrs: &mut Xattrs, name: &[u8], value: Vec<u8>) {
    match xattrs.binary_search_by(|(other, _)| other.as_slice().cmp(name)) {
        Ok(found) => xattrs[found].1 = value,
        Err(place) => xattrs.insert(place, (name.to_vec(), value)),
    }
}

pub(super) fn take(xattrs: &mut Xattrs, name: &[u8]) -> bool {
    let found = xattrs.binary_search_by(|(other, _)| other.as_slice().cmp(name));
    found.map(|found| xattrs.remove(found)).is_ok()
}

/// The namespaces that ext4 has.
fn check_namespace(name: &[u8]) -> FsResult<()> {
    let namespace = [&b"user."[..], b"trusted.", b"security."].into_iter().find(|prefix| name.starts_with(prefix));
    match namespace {
        _ if name.len() > MAX_XATTR_NAME => fail(libc::ERANGE),
        _ if is_list(name) => Ok(()),
        Some(namespace) if name.len() == namespace.len() => fail(libc::EINVAL),
        Some(_) => Ok(()),
        None => fail(libc::EOPNOTSUPP),
    }
}

/// Whether the attribute is an access control list.
fn is_list(name: &[u8]) -> bool {
    name == acl::ACCESS || name == acl::DEFAULT
}

impl Fs {
    /// The value of an attribute.
    pub fn getxattr(&self, ino: Ino, name: &[u8]) -> FsResult<Vec<u8>> {
        let _seen = self.seen(Op::Getxattr, ino, None);
        check_namespace(name)?;
        if let (CAPABILITY, Some(upper)) = (name, &self.upper)
            && (upper.data().known(ino).is_some() || self.is_hidden(ino))
        {
            let _gate = self.changes();
            self.catch_up(upper, &mut self.state.write(), ino)?;
        }
        let state = self.state.read();
        if state.tables.inode(ino).is_none() && state.view.stat(ino)?.is_some_and(|stat| !stat.has_xattrs) {
            return fail(libc::ENODATA);
        }
        let inode = state.inode(ino)?.inode;
        inode.xattr(name).map(<[u8]>::to_vec).ok_or(Errno(libc::ENODATA))
    }

    /// The names of all attributes that `caller` may know of, each with a NUL behind it.
    pub fn listxattr(&self, ino: Ino, caller: Caller) -> FsResult<Vec<u8>> {
        let _seen = self.seen(Op::Listxattr, ino, None);
        let state = self.state.read();
        if state.tables.inode(ino).is_none() && state.view.stat(ino)?.is_some_and(|stat| !stat.has_xattrs) {
            return Ok(Vec::new());
        }
        let inode = state.inode(ino)?.inode;
        let mut list = Vec::new();
        for (name, _) in &inode.xattrs {
            if !name.starts_with(b"trusted.") || caller.is_administrator() {
                list.extend_from_slice(name);
                list.push(0);
            }
        }
        Ok(list)
    }

    /// Sets an attribute, with the flags of `setxattr`.
    pub fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], flags: i32, caller: Caller) -> FsResult<()> {
        let _seen = self.seen(Op::Setxattr, ino, None);
        let (upper, _gate) = self.enter()?;
        check_namespace(name)?;
        if value.len() > MAX_XATTR_VALUE {
            return fail(libc::E2BIG);
        }
        let mut edit = Edit::new(self, upper);
        edit.catch_up(ino)?;
        let mut inode = edit.inode(ino)?;
        let list_bytes: usize = inode.inode.xattrs.iter().map(|(name, _)| name.len() + 1).sum();
        match inode.inode.xattr(name) {
            Some(_) if flags & libc::XATTR_CREATE != 0 => return fail(libc::EEXIST),
            None if flags & libc::XATTR_REPLACE != 0 => return fail(libc::ENODATA),
            None if list_bytes + name.len() >= LIST_MAX => return fail(libc::ENOSPC),
            _ => {}
        }
        let before = inode.clone();
        let mut is_kept = true;
        if is_list(name) {
            let list = Acl::decode(value).ok_or(Errno(libc::EINVAL))?;
            let kind = inode.inode.kind();
            if kind == FileKind::Symlink || (name == acl::DEFAULT && kind != FileKind::Folder) {
                return fail(if kind == FileKind::Symlink { libc::EOPNOTSUPP } else { libc::EACCES });
            }
            if name == acl::ACCESS {
                let attrs = &mut inode.inode.attrs;
                attrs.permissions = attrs.permissions & !0o777 | list.permissions();
                if attrs.permissions & SGID != 0 && !caller.is_in_group(attrs.gid) {
                    attrs.permissions &= !SGID;
                }
                is_kept = !list.is_minimal();
            }
        }
        if is_kept {
            put(&mut inode.inode.xattrs, name, value.to_vec());
        } else {
            take(&mut inode.inode.xattrs, name);
        }
        if !inode.inode.fits_record() {
            return fail(libc::ENOSPC);
        }
        // As on ext4, setting what is set changes nothing, not even the ctime.
        if inode == before {
            return Ok(());
        }
        inode.inode.attrs.ctime = edit.now;
        edit.set(inode);
        edit.commit().map(drop)
    }

    /// Removes an attribute.
    pub fn removexattr(&self, ino: Ino, name: &[u8]) -> FsResult<()> {
        let _seen = self.seen(Op::Removexattr, ino, None);
        let (upper, _gate) = self.enter()?;
        check_namespace(name)?;
        let mut edit = Edit::new(self, upper);
        edit.catch_up(ino)?;
        let mut inode = edit.inode(ino)?;
        inode.inode.attrs.ctime = edit.now;
        if !take(&mut inode.inode.xattrs, name) {
            // Removing a list means that the mode says all, which it does already.
            return if is_list(name) { Ok(()) } else { fail(libc::ENODATA) };
        }
        edit.set(inode);
        edit.commit().map(drop)
    }
}
