//! Sets what an inode carries besides its data, and remembers what could not be set.
//!
//! Order: owner, extended attributes, permissions, ACLs, times. A change of owner drops capabilities and set-id
//! bits; a file that may not be written takes no attribute of an ordinary user; an ACL is part of the permissions.
//! Invariant: what an unprivileged user cannot set never stops an export; a set-id bit is left away with its owner.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::acl;
use crate::attr::{FileKind, Time};
use crate::error::{Error, Result};
use crate::inode::Inode;
use crate::monitor::Monitor;

/// What is being set up: an open file or folder, or a name in an open folder (links, devices).
#[derive(Clone, Copy)]
pub enum Subject<'a> {
    /// It is open.
    Open(BorrowedFd<'a>),
    /// It is this name in this folder.
    Named(BorrowedFd<'a>, &'a [u8]),
}

/// What couldn't be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Loss {
    /// A user may not give files away.
    Owner,
    /// A namespace or a filesystem that takes no such attribute.
    Xattr,
    /// A user may not make devices.
    Device,
    /// Tar has no sockets.
    Socket,
}

/// Counts what was lost, to say it once per kind.
#[derive(Debug, Default)]
pub struct Losses {
    seen: Mutex<BTreeMap<Loss, (u64, String)>>,
}

impl Losses {
    /// One more; `what` describes the first.
    pub fn add(&self, loss: Loss, what: impl FnOnce() -> String) {
        self.seen.lock().entry(loss).and_modify(|(count, _)| *count += 1).or_insert_with(|| (1, what()));
    }

    /// Tells `monitor`, and returns the same lines.
    pub fn report(&self, monitor: &dyn Monitor) -> Vec<String> {
        let line = |(loss, (count, first)): (&Loss, &(u64, String))| match loss {
            Loss::Owner => {
                format!("owners of {count} entries were not set, {first} first: only root may give files away")
            }
            Loss::Xattr => {
                format!("{count} extended attributes were not set, {first} first: the system refuses them here")
            }
            Loss::Device => format!("{count} device nodes were not made, {first} first: only root may make them"),
            Loss::Socket => format!("{count} sockets were left out, {first} first: a tar cannot hold them"),
        };
        let lines: Vec<String> = self.seen.lock().iter().map(line).collect();
        lines.iter().for_each(|line| monitor.warn(line));
        lines
    }
}

/// Sets attributes; knows what new files have already.
pub struct Setter {
    /// Permission bits that creation keeps.
    pub kept_mode: u32,
    /// Owner and group of new files.
    pub owner: (u32, u32),
    /// What couldn't be set.
    pub losses: Losses,
}

impl Setter {
    /// The mode to create a file with so that [`Setter::apply`] need not change it: given second. The first says
    /// whether that is possible.
    pub fn creation_mode(&self, inode: &Inode) -> (bool, Mode) {
        let mode = u32::from(inode.attrs.permissions);
        let is_final = mode & !self.kept_mode == 0 && inode.xattrs.is_empty();
        (is_final, if is_final { Mode::from_raw_mode(mode) } else { Mode::RUSR | Mode::WUSR })
    }

    /// Gives `subject` the attributes of `inode`; `path` tells its path for messages.
    pub fn apply(
        &self,
        subject: Subject<'_>,
        inode: &Inode,
        is_mode_set: bool,
        path: &dyn Fn() -> PathBuf,
    ) -> Result<()> {
        let failed = |action| move |errno: Errno| Error::file(action, path(), errno);
        let is_owned = self.set_owner(subject, inode, path)?;
        let is_acl = |name: &[u8]| name == acl::ACCESS || name == acl::DEFAULT;
        for (name, value) in inode.xattrs.iter().filter(|(name, _)| !is_acl(name)) {
            self.set_xattr(subject, name, value, path)?;
        }
        let keeps_set_id = is_owned || inode.attrs.permissions & 0o6000 == 0;
        if inode.kind() != FileKind::Symlink && !is_mode_set {
            let mode = u32::from(inode.attrs.permissions) & if keeps_set_id { 0o7777 } else { 0o1777 };
            let mode = Mode::from_raw_mode(mode);
            match subject {
                Subject::Open(fd) => rustix::fs::fchmod(fd, mode),
                // A device, pipe or socket that was just made here: no link that could be followed.
                Subject::Named(folder, name) => rustix::fs::chmodat(folder, name, mode, AtFlags::empty()),
            }
            .map_err(failed("set the mode of"))?;
        }
        for (name, value) in inode.xattrs.iter().filter(|(name, _)| is_acl(name)) {
            self.set_xattr(subject, name, value, path)?;
        }
        let times =
            Timestamps { last_access: timespec(inode.attrs.atime), last_modification: timespec(inode.attrs.mtime) };
        match subject {
            Subject::Open(fd) => rustix::fs::futimens(fd, &times),
            Subject::Named(folder, name) => rustix::fs::utimensat(folder, name, &times, AtFlags::SYMLINK_NOFOLLOW),
        }
        .map_err(failed("set the times of"))
    }

    fn set_owner(&self, subject: Subject<'_>, inode: &Inode, path: &dyn Fn() -> PathBuf) -> Result<bool> {
        let (uid, gid) = (inode.attrs.uid, inode.attrs.gid);
        if (uid, gid) == self.owner {
            return Ok(true);
        }
        // The highest number means "leave as it is" to the system: nobody can own anything by it.
        let set = if uid == u32::MAX || gid == u32::MAX {
            Err(Errno::INVAL)
        } else {
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            match subject {
                Subject::Open(fd) => rustix::fs::fchown(fd, uid, gid),
                Subject::Named(folder, name) => rustix::fs::chownat(folder, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW),
            }
        };
        match set {
            Ok(()) => Ok(true),
            Err(Errno::PERM | Errno::INVAL) => {
                self.losses.add(Loss::Owner, || path().display().to_string());
                Ok(false)
            }
            Err(errno) => Err(Error::file("set the owner of", path(), errno)),
        }
    }

    fn set_xattr(&self, subject: Subject<'_>, name: &[u8], value: &[u8], path: &dyn Fn() -> PathBuf) -> Result<()> {
        let set = match subject {
            Subject::Open(fd) => rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()),
            Subject::Named(folder, file) => {
                // There is no lsetxattrat before Linux 6.13; the last component isn't followed.
                let mut link = format!("/proc/self/fd/{}/", folder.as_fd().as_raw_fd()).into_bytes();
                link.extend_from_slice(file);
                rustix::fs::lsetxattr(&link[..], name, value, XattrFlags::empty())
            }
        };
        match set {
            Ok(()) => Ok(()),
            Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP | Errno::INVAL) => {
                let what = || format!("{} of {}", name.escape_ascii(), path().display());
                self.losses.add(Loss::Xattr, what);
                Ok(())
            }
            Err(errno) => Err(Error::file("set an extended attribute of", path(), errno)),
        }
    }
}

fn timespec(time: Time) -> Timespec {
    Timespec { tv_sec: time.seconds, tv_nsec: time.nanos.into() }
}

/// `path` below `folder`, for messages.
pub fn below(folder: &Path, path: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    folder.join(std::ffi::OsStr::from_bytes(path))
}
