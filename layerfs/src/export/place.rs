//! Where an export is made until it is whole: beside its destination, under a temporary name.
//!
//! Decision hidden here: how something appears under the destination's name at once, or not at all. A file goes
//! through [`crate::durable`]. A folder is made in a *workspace*, a folder of mode 0700 beside the destination,
//! and renamed; where that is impossible (the destination is a mount point, or its parent is read-only), the
//! workspace lies inside the destination, and its entries are moved out at the end. Invariants: as long as the
//! workspace exists nobody else can enter it, so that no name in it leads anywhere else; dropping it without
//! [`Workspace::commit`] removes it. A folder is not synced to disk, like one that `cp` or `tar` made.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Dir, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use crate::durable;
use crate::error::{Error, Result};

/// Lets `fill` write the file at `path`, which mustn't exist, and puts it there when that succeeds. A pipe or a
/// device that exists is written as it is.
pub fn new_file<T>(path: &Path, fill: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    match fs::metadata(path) {
        Ok(found) if found.file_type().is_fifo() || found.file_type().is_char_device() => {
            let mut file = File::options().write(true).open(path).map_err(|e| Error::file("open", path, e))?;
            return fill(&mut file);
        }
        Ok(_) => return Err(super::taken(path, "file")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::file("look at", path, e)),
    }
    require_parent(path)?;
    let (mut file, temporary) = durable::create_temporary(path, 0o666)?;
    let filled = fill(&mut file).and_then(|value| durable::persist(&file, &temporary, path).map(|()| value));
    if filled.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    filled
}

/// How a finished tree gets to its destination.
enum Way {
    /// One rename onto the destination, which is absent or an empty folder.
    Rename,
    /// Entry by entry into the destination, which is this open folder.
    MoveInto(OwnedFd),
}

/// A private folder in which a tree is made.
pub struct Workspace {
    destination: PathBuf,
    path: PathBuf,
    folder: OwnedFd,
    way: Way,
    /// The tree's root.
    pub root: OwnedFd,
    /// A folder for names that are needed while the tree is made.
    pub links: OwnedFd,
    /// Permission bits that creation keeps (the umask's complement).
    pub kept_mode: u32,
    /// Owner and group that new files get.
    pub owner: (u32, u32),
    is_committed: bool,
}

const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::RDONLY);
const PRIVATE: Mode = Mode::RWXU;

impl Workspace {
    /// Makes a workspace for a tree at `destination`, which must be absent or an empty folder.
    pub fn create(destination: &Path) -> Result<Workspace> {
        let (destination, exists) = match destination.canonicalize() {
            Ok(found) => (found, true),
            Err(e) if e.kind() == io::ErrorKind::NotFound && destination.symlink_metadata().is_err() => {
                (destination.to_owned(), false)
            }
            Err(e) => return Err(Error::file("look at", destination, e)),
        };
        if exists {
            check_empty(&destination)?;
        }
        require_parent(&destination)?;
        let parent = parent_of(&destination);
        if !(exists && is_mount_point(&destination)) {
            match make_private(parent) {
                Ok(path) => return Workspace::open(destination, path, Way::Rename),
                Err((_, errno)) if exists && matches!(errno, Errno::ACCESS | Errno::PERM | Errno::ROFS) => {}
                Err((path, errno)) => return Err(Error::file("create folder", path, errno)),
            }
        }
        let path = make_private(&destination).map_err(|(path, errno)| Error::file("create folder", path, errno))?;
        let into = rustix::fs::open(&destination, FOLDER, Mode::empty());
        let into = into.map_err(|e| Error::file("open", &destination, e))?;
        Workspace::open(destination, path, Way::MoveInto(into))
    }

    fn open(destination: PathBuf, path: PathBuf, way: Way) -> Result<Workspace> {
        let opened = Workspace::open_parts(&path);
        if opened.is_err() {
            let _ = fs::remove_dir_all(&path);
        }
        let (folder, root, links) = opened.map_err(|e| Error::file("prepare folder", &path, e))?;
        let stat = rustix::fs::fstat(&links).map_err(|e| Error::file("look at", &path, e))?;
        let (kept_mode, owner) = (stat.st_mode & 0o777, (stat.st_uid, stat.st_gid));
        Ok(Workspace { destination, path, folder, way, root, links, kept_mode, owner, is_committed: false })
    }

    fn open_parts(path: &Path) -> Result<(OwnedFd, OwnedFd, OwnedFd), Errno> {
        let folder = rustix::fs::open(path, FOLDER, Mode::empty())?;
        // Neither the parent's default ACL nor its setgid bit shall reach what is made inside.
        for acl in ["system.posix_acl_default", "system.posix_acl_access"] {
            match rustix::fs::fremovexattr(&folder, acl) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(errno) => return Err(errno),
            }
        }
        rustix::fs::fchmod(&folder, PRIVATE)?;
        rustix::fs::mkdirat(&folder, "root", PRIVATE)?;
        rustix::fs::mkdirat(&folder, "links", Mode::from_raw_mode(0o777))?;
        let root = rustix::fs::openat(&folder, "root", FOLDER, Mode::empty())?;
        let links = rustix::fs::openat(&folder, "links", FOLDER, Mode::empty())?;
        Ok((folder, root, links))
    }

    /// Where the tree is until it is committed.
    pub fn root_path(&self) -> PathBuf {
        self.path.join("root")
    }

    /// Where the tree will be.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Puts the tree in its place and returns its root, whose attributes are still to be set.
    pub fn commit(mut self) -> Result<OwnedFd> {
        self.move_tree()?;
        self.is_committed = true;
        if let Err(errno) = remove_tree(&self.folder) {
            tracing::warn!("cannot remove {}: {errno}", self.path.display());
        }
        let _ = fs::remove_dir(&self.path);
        match &self.way {
            Way::Rename => rustix::io::dup(&self.root),
            Way::MoveInto(destination) => rustix::io::dup(destination),
        }
        .map_err(|e| Error::file("open", &self.destination, e))
    }

    fn move_tree(&self) -> Result<()> {
        let failed = |errno: Errno| match errno {
            Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR => super::taken(&self.destination, "folder"),
            errno => Error::file("create", &self.destination, errno),
        };
        match &self.way {
            Way::Rename => {
                rustix::fs::renameat(&self.folder, "root", rustix::fs::CWD, &self.destination).map_err(failed)
            }
            Way::MoveInto(destination) => {
                for name in names(&self.root).map_err(failed)? {
                    move_entry(&self.root, &name, destination).map_err(failed)?;
                }
                Ok(())
            }
        }
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if self.is_committed {
            return;
        }
        if let Err(errno) = remove_tree(&self.folder) {
            tracing::warn!("cannot remove {}: {errno}", self.path.display());
        }
        let _ = fs::remove_dir(&self.path);
    }
}

/// A private folder for what isn't whole yet; removed when dropped.
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes one inside `folder`.
    pub fn inside(folder: &Path) -> Result<Scratch> {
        let made = make_private(folder).map_err(|(path, errno)| Error::file("create folder", path, errno));
        made.map(|path| Scratch { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Fails if the folder that `path` is to be made in isn't there: nobody knows the temporary names in it.
fn require_parent(path: &Path) -> Result<()> {
    let parent = parent_of(path);
    fs::metadata(parent).map(drop).map_err(|e| Error::file("look into", parent, e))
}

/// Fails unless `folder` is a folder without entries. The `lost+found` of a new filesystem doesn't count.
fn check_empty(folder: &Path) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => return Err(super::taken(folder, "file")),
        Err(e) => return Err(Error::file("read folder", folder, e)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| Error::file("read folder", folder, e))?;
        if entry.file_name() != "lost+found" {
            return Err(super::taken(folder, "a non-empty folder"));
        }
    }
    Ok(())
}

fn is_mount_point(path: &Path) -> bool {
    let found = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::empty());
    found.is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Makes a folder of mode 0700 with a name of its own in `parent`.
fn make_private(parent: &Path) -> Result<PathBuf, (PathBuf, Errno)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let pid = rustix::process::getpid().as_raw_nonzero();
    loop {
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!(".layerfs-export.{pid}.{count}.tmp"));
        match rustix::fs::mkdir(&path, PRIVATE) {
            Ok(()) => return Ok(path),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err((path, errno)),
        }
    }
}

fn names(folder: impl AsFd) -> Result<Vec<std::ffi::CString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_owned();
        if name.as_c_str() != c"." && name.as_c_str() != c".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// Moves an entry to another folder. A folder that its owner mustn't write can be moved by root alone: then it may
/// be written for a moment.
fn move_entry(from: &OwnedFd, name: &std::ffi::CStr, to: &OwnedFd) -> Result<(), Errno> {
    let moved = rustix::fs::renameat(from, name, to, name);
    if moved != Err(Errno::ACCESS) {
        return moved;
    }
    let folder = rustix::fs::openat(from, name, FOLDER, Mode::empty())?;
    let mode = Mode::from_raw_mode(rustix::fs::fstat(&folder)?.st_mode & 0o7777);
    rustix::fs::fchmod(&folder, mode.union(Mode::WUSR))?;
    rustix::fs::renameat(from, name, to, name)?;
    rustix::fs::fchmod(&folder, mode)
}

/// Removes what is in `top`. Needs two descriptors and no recursion however deep the tree is: a folder that isn't
/// empty is moved to the top first.
fn remove_tree(top: &OwnedFd) -> Result<(), Errno> {
    let mut count = 0u64;
    loop {
        let names = names(top)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in names {
            empty_entry(top, top, &name, &mut count)?;
        }
    }
}

/// Removes `name` in `folder`, or what is in it but for folders, which go to `top`.
fn empty_entry(top: &OwnedFd, folder: &OwnedFd, name: &std::ffi::CStr, count: &mut u64) -> Result<(), Errno> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other,
    }
    if rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR).is_ok() {
        return Ok(());
    }
    // It may be closed to its owner, who isn't root then; it isn't a link, or it would be gone now.
    rustix::fs::chmodat(folder, name, PRIVATE, AtFlags::empty())?;
    let inner = rustix::fs::openat(folder, name, FOLDER, Mode::empty())?;
    for child in names(&inner)? {
        match rustix::fs::unlinkat(&inner, &child, AtFlags::empty()) {
            Ok(()) => continue,
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(errno) => return Err(errno),
        }
        if rustix::fs::unlinkat(&inner, &child, AtFlags::REMOVEDIR).is_ok() {
            continue;
        }
        rustix::fs::chmodat(&inner, &child, PRIVATE, AtFlags::empty())?;
        *count += 1;
        rustix::fs::renameat(&inner, &child, top, format!("removed.{count}"))?;
    }
    rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR)
}
