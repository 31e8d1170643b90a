//! Reads a folder of the host.
//!
//! Hides: how to read many files with few system calls: everything is opened relative to its folder, names come
//! sorted, at most [`MAX_OPEN`] folders are open however deep the tree is. Invariants: no symbolic link below
//! the root is followed; nothing but regular files and folders is opened; what vanishes while it is read is left
//! out with a warning, and so is the store's own folder: its key and its index are nobody's content.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

use crate::attr::{Attrs, FileKind, Time};
use crate::error::{Error, Result};
use crate::import::entry::Entry;
use crate::import::feed::Feed;
use crate::import::path::{TreePath, names};
use crate::import::xattrs;
use crate::inode::Node;
use crate::store::{FileSource, Source, SourcePiece, read_some};

/// How many folders are open at once.
const MAX_OPEN: usize = 128;

/// A folder's names, in one buffer.
#[derive(Default)]
struct Names {
    bytes: Vec<u8>,
    entries: Vec<Name>,
}

#[derive(Clone, Copy)]
struct Name {
    start: u32,
    bytes: u16,
    is_folder: bool,
    is_file: bool,
}

impl Names {
    fn get(&self, name: Name) -> &[u8] {
        &self.bytes[name.start as usize..name.start as usize + usize::from(name.bytes)]
    }
}

/// A folder that is being read.
struct Open {
    /// None while too many deeper ones are open.
    fd: Option<OwnedFd>,
    identity: (u64, u64),
    names: Names,
    next: usize,
}

/// Reads the tree at `root`.
pub(super) struct Walk<'f, 'a> {
    root: PathBuf,
    feed: &'f mut Feed<'a>,
    /// Whether folders on other filesystems are taken without what lies in them.
    one_filesystem: bool,
    device: u64,
    /// The folder of the store that the import goes into.
    store: Option<(u64, u64)>,
    path: TreePath,
    open: Vec<Open>,
    /// The first path of each file with several names whose other names are still to come, and how many those are.
    links: HashMap<(u64, u64), (TreePath, u64)>,
    xattrs: xattrs::Reader,
    /// Whether files may be opened without changing their time of access.
    noatime: bool,
}

/// Feeds the tree at `root`, without the folder `store` if that lies below it.
pub(super) fn read(root: &Path, store: &Path, one_filesystem: bool, feed: &mut Feed<'_>) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(root, flags, Mode::empty()).map_err(|e| Error::file("open", root, e))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| Error::file("look at", root, e))?;
    let mut walk = Walk {
        root: root.to_owned(),
        feed,
        one_filesystem,
        device: stat.st_dev,
        store: rustix::fs::stat(store).ok().map(|stat| identity(&stat)),
        path: TreePath::root(),
        open: Vec::new(),
        links: HashMap::new(),
        xattrs: xattrs::Reader::default(),
        noatime: true,
    };
    walk.folder(fd, &stat)?;
    while let Some(top) = walk.open.last_mut() {
        match top.names.entries.get(top.next).copied() {
            Some(name) => {
                top.next += 1;
                walk.child(name)?;
            }
            None => walk.leave()?,
        }
    }
    Ok(())
}

impl Walk<'_, '_> {
    /// The host's path of where the walk is.
    fn host_path(&self) -> PathBuf {
        let mut path = self.root.clone();
        path.extend(names(self.path.key()).map(OsStr::from_bytes));
        path
    }

    fn failed(&self, action: &'static str, error: impl Into<std::io::Error>) -> Error {
        Error::file(action, self.host_path(), error)
    }

    /// Takes the folder `fd` and goes into it.
    fn folder(&mut self, fd: OwnedFd, stat: &Stat) -> Result<()> {
        let xattrs = self.xattrs.of_open(fd.as_fd()).map_err(|e| self.failed("read extended attributes of", e))?;
        let entry = Entry::Node { attrs: attrs(stat), xattrs, node: Node::Folder };
        self.feed.entry(self.path.clone(), entry)?;
        let mut listed = Names::default();
        if !self.one_filesystem || stat.st_dev == self.device {
            list(&fd, &mut listed).map_err(|e| self.failed("list", e))?;
        }
        if let Some(far) = self.open.len().checked_sub(MAX_OPEN) {
            self.open[far].fd = None;
        }
        self.open.push(Open { fd: Some(fd), identity: identity(stat), names: listed, next: 0 });
        Ok(())
    }

    /// Leaves the folder on top; the one above is opened again if it had to be closed.
    fn leave(&mut self) -> Result<()> {
        let Some(left) = self.open.pop() else { return Ok(()) };
        self.path.pop();
        let Some(top) = self.open.last_mut().filter(|top| top.fd.is_none()) else { return Ok(()) };
        let identity_before = top.identity;
        let moved = || Error::Busy("a folder was moved while it was read; import again".to_owned());
        let below = left.fd.ok_or_else(moved)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&below, "..", flags, Mode::empty()).map_err(|e| self.failed("open", e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| self.failed("look at", e))?;
        if identity(&stat) != identity_before {
            return Err(moved());
        }
        if let Some(top) = self.open.last_mut() {
            top.fd = Some(fd);
        }
        Ok(())
    }

    /// Takes what `name` in the folder on top refers to.
    fn child(&mut self, name: Name) -> Result<()> {
        let Some(top) = self.open.last() else { return Ok(()) };
        let bytes = top.names.get(name).to_vec();
        // Moved out for the time, so that the borrow doesn't bind all of the walk.
        let Some(folder) = self.open.last_mut().and_then(|top| top.fd.take()) else { return Ok(()) };
        self.path.push(&bytes)?;
        let depth = self.open.len();
        let result = if name.is_folder {
            self.child_folder(folder.as_fd(), &bytes)
        } else if name.is_file {
            self.child_file(folder.as_fd(), &bytes)
        } else {
            self.child_other(folder.as_fd(), &bytes)
        };
        let may_stay_open = self.open.len() - depth < MAX_OPEN;
        if let Some(open) = self.open.get_mut(depth - 1) {
            open.fd = may_stay_open.then_some(folder);
        }
        if self.open.len() == depth {
            self.path.pop();
        }
        result
    }

    /// Whether `error` means that an entry went away, or became something else, since its folder was listed.
    fn is_gone(&mut self, error: Errno) -> bool {
        let gone = matches!(error, Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO | Errno::STALE);
        if gone {
            let path = self.host_path();
            self.feed.warn(&format!("{} went away while it was read; it is left out", path.display()));
        }
        gone
    }

    fn child_folder(&mut self, folder: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(folder, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(e) if self.is_gone(e) => return Ok(()),
            Err(e) => return Err(self.failed("open", e)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| self.failed("look at", e))?;
        if self.store == Some(identity(&stat)) {
            let path = self.host_path();
            self.feed.warn(&format!("{} is the store that this goes into; it is left out", path.display()));
            return Ok(());
        }
        self.folder(fd, &stat)
    }

    fn child_file(&mut self, folder: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        let mut flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        if self.noatime {
            flags |= OFlags::NOATIME;
        }
        let mut opened = rustix::fs::openat(folder, name, flags, Mode::empty());
        if opened.as_ref().is_err_and(|e| *e == Errno::PERM) && self.noatime {
            self.noatime = false;
            opened = rustix::fs::openat(folder, name, flags - OFlags::NOATIME, Mode::empty());
        }
        let fd = match opened {
            Ok(fd) => fd,
            Err(e) if self.is_gone(e) => return Ok(()),
            Err(e) => return Err(self.failed("open", e)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| self.failed("look at", e))?;
        if FileKind::from_mode(stat.st_mode) != Some(FileKind::File) {
            self.is_gone(Errno::NOENT);
            return Ok(());
        }
        if self.is_known_link(&stat)? {
            return Ok(());
        }
        let xattrs = self.xattrs.of_open(fd.as_fd()).map_err(|e| self.failed("read extended attributes of", e))?;
        let file = File::from(fd);
        self.content(&file, &stat, xattrs)?;
        let after = rustix::fs::fstat(&file).map_err(|e| self.failed("look at", e))?;
        if (after.st_size, after.st_mtime, after.st_mtime_nsec) != (stat.st_size, stat.st_mtime, stat.st_mtime_nsec) {
            let path = self.host_path();
            self.feed.warn(&format!("{} changed while it was read", path.display()));
        }
        Ok(())
    }

    fn content(&mut self, file: &File, stat: &Stat, xattrs: crate::attr::Xattrs) -> Result<()> {
        let bytes = stat.st_size as u64;
        let (path, attrs) = (self.path.clone(), attrs(stat));
        if (stat.st_blocks as u64).saturating_mul(512) >= bytes {
            let host_path = || {
                let mut host = self.root.clone();
                host.extend(names(self.path.key()).map(OsStr::from_bytes));
                host
            };
            let mut source = DenseSource { file, path: &host_path, at: 0, end: bytes };
            self.feed.file(path, attrs, xattrs, &mut source)
        } else {
            let host_path = self.host_path();
            self.feed.file(path, attrs, xattrs, &mut FileSource::new(file, &host_path)?)
        }
    }

    /// Whether the inode has several names and came by already; then this name is taken as a link.
    fn is_known_link(&mut self, stat: &Stat) -> Result<bool> {
        if stat.st_nlink < 2 {
            return Ok(false);
        }
        let identity = identity(stat);
        match self.links.get_mut(&identity) {
            None => {
                self.links.insert(identity, (self.path.clone(), stat.st_nlink - 1));
                Ok(false)
            }
            Some((first, left)) => {
                let entry = Entry::HardLink(first.clone());
                *left -= 1;
                if *left == 0 {
                    self.links.remove(&identity);
                }
                self.feed.entry(self.path.clone(), entry)?;
                Ok(true)
            }
        }
    }

    /// Takes what is neither opened nor entered, or what the listing gives no type of.
    fn child_other(&mut self, folder: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        let stat = match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(e) if self.is_gone(e) => return Ok(()),
            Err(e) => return Err(self.failed("look at", e)),
        };
        let node = match FileKind::from_mode(stat.st_mode) {
            Some(FileKind::Folder) => return self.child_folder(folder, name),
            Some(FileKind::File) => return self.child_file(folder, name),
            Some(FileKind::Symlink) => match rustix::fs::readlinkat(folder, name, Vec::new()) {
                Ok(target) => Node::Symlink(target.into_bytes()),
                Err(e) if self.is_gone(e) => return Ok(()),
                Err(e) => return Err(self.failed("read the link", e)),
            },
            Some(FileKind::BlockDevice) => Node::BlockDevice(stat.st_rdev),
            Some(FileKind::CharDevice) => Node::CharDevice(stat.st_rdev),
            Some(FileKind::Fifo) => Node::Fifo,
            Some(FileKind::Socket) => Node::Socket,
            None => return Err(self.failed("import", Errno::OPNOTSUPP)),
        };
        if self.is_known_link(&stat)? {
            return Ok(());
        }
        let xattrs = match self.xattrs.of_name(folder.as_raw_fd(), name) {
            Ok(xattrs) => xattrs,
            Err(Errno::NOENT) => self.xattrs.of_path(&self.host_path()).unwrap_or_default(),
            Err(e) => return Err(self.failed("read extended attributes of", e)),
        };
        self.feed.entry(self.path.clone(), Entry::Node { attrs: attrs(&stat), xattrs, node })
    }
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn attrs(stat: &Stat) -> Attrs {
    let mtime = Time { seconds: stat.st_mtime, nanos: stat.st_mtime_nsec as u32 };
    Attrs::imported(stat.st_mode, stat.st_uid, stat.st_gid, mtime)
}

/// Lists the open folder `fd`, sorted.
fn list(fd: &OwnedFd, listed: &mut Names) -> rustix::io::Result<()> {
    let mut buffer = [MaybeUninit::uninit(); 32 * 1024];
    let mut entries = RawDir::new(fd, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let start = u32::try_from(listed.bytes.len()).map_err(|_| Errno::OVERFLOW)?;
        listed.bytes.extend_from_slice(name);
        listed.entries.push(Name {
            start,
            bytes: name.len() as u16,
            is_folder: entry.file_type() == FileType::Directory,
            is_file: entry.file_type() == FileType::RegularFile,
        });
    }
    let Names { bytes, entries } = listed;
    let name = |name: &Name| &bytes[name.start as usize..name.start as usize + usize::from(name.bytes)];
    entries.sort_unstable_by(|a, b| name(a).cmp(name(b)));
    Ok(())
}

/// Reads a file without holes, up to the length that it had when it was looked at.
struct DenseSource<'a> {
    file: &'a File,
    path: &'a dyn Fn() -> PathBuf,
    at: u64,
    end: u64,
}

impl Source for DenseSource<'_> {
    fn next(&mut self, buffer: &mut [u8]) -> Result<SourcePiece> {
        let want = (self.end - self.at).min(buffer.len() as u64) as usize;
        if want == 0 {
            return Ok(SourcePiece::End);
        }
        let count = read_some(self.file, &mut buffer[..want], self.at, self.path)?;
        self.at += count as u64;
        Ok(if count == 0 { SourcePiece::End } else { SourcePiece::Data(count) })
    }
}
