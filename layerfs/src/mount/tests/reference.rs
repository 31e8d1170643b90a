//! Random operations on [`Fs`] and on a folder of the host: both must answer the same, and end up the same.
//! Seals and crashes (the upper is opened again without having been closed) come in between.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use proptest::prelude::*;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno as HostErrno;

use super::*;
use crate::attr::{FileKind, Time};
use crate::chunker::Chunker;
use crate::id::Ino;
use crate::inode::Node;
use crate::mount::caller::Caller;
use crate::mount::errno::{Errno, FsResult, fail};
use crate::mount::fs::{FolderHandle, SetAttr, SetTime, Stat};
use crate::squash::{self, Chain};
use crate::store::ReadSource;

#[derive(Clone, Debug)]
enum Op {
    Mkdir(Path, u32),
    Create(Path, u32),
    Mknod(Path, u32),
    Symlink(Path, String),
    Unlink(Path),
    Rmdir(Path),
    Rename(Path, Path, u32),
    Link(Path, Path),
    Write(Path, u64, usize, u8),
    Truncate(Path, u64),
    Allocate(Path, i32, u64, u64),
    CopyRange(Path, u64, Path, u64, u64),
    Chmod(Path, u32),
    Chown(Path, u32, u32),
    SetMtime(Path, i64, u32),
    SetXattr(Path, u8, Vec<u8>, i32),
    RemoveXattr(Path, u8),
    Open(Path),
    OpenUnnamed(Path, u32),
    WriteOpen(usize, u64, usize, u8),
    LinkOpen(usize, Path),
    Close(usize),
    Seal,
    Squash(usize),
    Crash,
}

type Path = Vec<&'static str>;

fn path() -> impl Strategy<Value = Path> {
    let name = prop::sample::select(vec!["a", "b", "c", "d"]);
    prop::collection::vec(name, 1..4)
}

/// Lengths around the limits that matter: inline content, blocks, chunks.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..20, 500u64..520, 4090u64..4100, 0u64..70_000, 250_000u64..270_000]
}

fn op() -> impl Strategy<Value = Op> {
    let mode = prop::sample::select(vec![0o644, 0o755, 0o600, 0o4755, 0o2755, 0o2644, 0o1777, 0o000]);
    let (modes, more_modes) = (mode.clone(), mode.clone());
    let kinds = prop::sample::select(vec![libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFREG]);
    let flags = prop::sample::select(vec![0, 0, 0, 0, 1, 2, 4]);
    let allocate = prop::sample::select(vec![0, 1, 3, 0x10, 0x11]);
    let length = prop_oneof![1usize..10, 500usize..600, 1usize..40_000];
    let lengths = length.clone();
    prop_oneof![
        4 => (path(), mode.clone()).prop_map(|(p, m)| Op::Mkdir(p, m)),
        4 => (path(), modes).prop_map(|(p, m)| Op::Create(p, m)),
        1 => (path(), kinds).prop_map(|(p, k)| Op::Mknod(p, k | 0o640)),
        1 => (path(), "[a-d/]{1,8}").prop_map(|(p, t)| Op::Symlink(p, t)),
        3 => path().prop_map(Op::Unlink),
        2 => path().prop_map(Op::Rmdir),
        6 => (path(), path(), flags).prop_map(|(p, q, f)| Op::Rename(p, q, f)),
        3 => (path(), path()).prop_map(|(p, q)| Op::Link(p, q)),
        5 => (path(), offset(), length, any::<u8>()).prop_map(|(p, o, n, b)| Op::Write(p, o, n, b)),
        2 => (path(), offset()).prop_map(|(p, n)| Op::Truncate(p, n)),
        2 => (path(), allocate, offset(), 1u64..9000).prop_map(|(p, m, o, n)| Op::Allocate(p, m, o, n)),
        1 => (path(), offset(), path(), offset(), 1u64..9000).prop_map(|(p, o, q, t, n)| Op::CopyRange(p, o, q, t, n)),
        2 => (path(), mode).prop_map(|(p, m)| Op::Chmod(p, m)),
        1 => (path(), 0u32..3, 0u32..3).prop_map(|(p, u, g)| Op::Chown(p, u, g)),
        1 => (path(), -5i64..5, 0u32..1_000_000_000).prop_map(|(p, s, n)| Op::SetMtime(p, s, n)),
        2 => (path(), 0u8..3, prop::collection::vec(any::<u8>(), 0..20), 0i32..3)
            .prop_map(|(p, n, v, f)| Op::SetXattr(p, n, v, f)),
        1 => (path(), 0u8..3).prop_map(|(p, n)| Op::RemoveXattr(p, n)),
        2 => path().prop_map(Op::Open),
        2 => (0usize..4, offset(), lengths, any::<u8>()).prop_map(|(i, o, n, b)| Op::WriteOpen(i, o, n, b)),
        1 => (0usize..4, path()).prop_map(|(i, p)| Op::LinkOpen(i, p)),
        1 => (0usize..4).prop_map(Op::Close),
        1 => Just(Op::Seal),
        1 => (1usize..9).prop_map(Op::Squash),
        1 => Just(Op::Crash),
        1 => (path(), more_modes).prop_map(|(p, m)| Op::OpenUnnamed(p, m)),
    ]
}

fn data(count: usize, seed: u8) -> Vec<u8> {
    (0..count).map(|i| seed.wrapping_mul(31).wrapping_add((i / 7) as u8)).collect()
}

fn xattr_name(number: u8) -> &'static str {
    ["user.one", "user.two", "trusted.three"][number as usize]
}

/// What an operation is told apart by: its errno, or how many bytes it did.
type Outcome = Result<u64, i32>;

struct Host {
    root: OwnedFd,
    open: Vec<Option<OwnedFd>>,
}

struct Ours {
    fs: Fs,
    ranges_from: u64,
    open: Vec<Option<Ino>>,
}

fn host(result: rustix::io::Result<()>) -> Outcome {
    result.map(|()| 0).map_err(HostErrno::raw_os_error)
}

fn ours<T>(result: FsResult<T>) -> Outcome {
    result.map(|_| 0).map_err(|errno| errno.0)
}

fn joined(path: &Path) -> CString {
    CString::new(path.join("/")).unwrap()
}

impl Host {
    fn file(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        rustix::fs::openat(&self.root, joined(path), flags, Mode::empty())
    }

    fn write(&self, fd: impl AsFd, offset: u64, bytes: &[u8]) -> Outcome {
        rustix::io::pwrite(fd, bytes, offset).map(|count| count as u64).map_err(HostErrno::raw_os_error)
    }

    fn apply(&mut self, op: &Op) -> Outcome {
        let at = self.root.as_fd();
        match op {
            Op::Mkdir(p, mode) => host(rustix::fs::mkdirat(at, joined(p), Mode::from_raw_mode(*mode))),
            Op::Create(p, mode) => {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                host(rustix::fs::openat(at, joined(p), flags, Mode::from_raw_mode(*mode)).map(drop))
            }
            Op::Mknod(p, mode) => {
                let kind = FileType::from_raw_mode(*mode);
                let device = if kind == FileType::CharacterDevice { libc::makedev(0, 0) } else { 0 };
                host(rustix::fs::mknodat(at, joined(p), kind, Mode::from_raw_mode(*mode), device))
            }
            Op::Symlink(p, target) => host(rustix::fs::symlinkat(target.as_str(), at, joined(p))),
            Op::Unlink(p) => host(rustix::fs::unlinkat(at, joined(p), AtFlags::empty())),
            Op::Rmdir(p) => host(rustix::fs::unlinkat(at, joined(p), AtFlags::REMOVEDIR)),
            Op::Rename(p, q, flags) => {
                let flags = RenameFlags::from_bits_retain(*flags);
                host(rustix::fs::renameat_with(at, joined(p), at, joined(q), flags))
            }
            Op::Link(p, q) => host(rustix::fs::linkat(at, joined(p), at, joined(q), AtFlags::empty())),
            Op::Write(p, offset, count, seed) => {
                let file = self.file(p).map_err(HostErrno::raw_os_error)?;
                self.write(file, *offset, &data(*count, *seed))
            }
            Op::Truncate(p, size) => host(self.file(p).and_then(|file| rustix::fs::ftruncate(file, *size))),
            Op::Allocate(p, mode, offset, count) => {
                let flags = rustix::fs::FallocateFlags::from_bits_retain(*mode as u32);
                host(self.file(p).and_then(|file| rustix::fs::fallocate(file, flags, *offset, *count)))
            }
            Op::CopyRange(p, from, q, to, count) => {
                let copy = || {
                    let (source, target) = (self.file(p)?, self.file(q)?);
                    let mut buffer = vec![0; *count as usize];
                    let count = rustix::io::pread(source, &mut buffer, *from)?;
                    rustix::io::pwrite(target, &buffer[..count], *to)
                };
                copy().map(|count| count as u64).map_err(HostErrno::raw_os_error)
            }
            Op::Chmod(p, mode) => {
                host(rustix::fs::chmodat(at, joined(p), Mode::from_raw_mode(*mode), AtFlags::empty()))
            }
            Op::Chown(p, uid, gid) => {
                let (uid, gid) = (rustix::fs::Uid::from_raw(*uid), rustix::fs::Gid::from_raw(*gid));
                host(rustix::fs::chownat(at, joined(p), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW))
            }
            Op::SetMtime(p, seconds, nanos) => {
                let time = Timespec { tv_sec: *seconds, tv_nsec: i64::from(*nanos) };
                let times = Timestamps { last_access: time, last_modification: time };
                host(rustix::fs::utimensat(at, joined(p), &times, AtFlags::SYMLINK_NOFOLLOW))
            }
            Op::SetXattr(p, name, value, flags) => {
                let path = self.proc_path(p);
                host(rustix::fs::lsetxattr(path, xattr_name(*name), value, XattrFlags::from_bits_retain(*flags as u32)))
            }
            Op::RemoveXattr(p, name) => host(rustix::fs::lremovexattr(self.proc_path(p), xattr_name(*name))),
            Op::Open(p) => {
                let file = self.file(p).map_err(HostErrno::raw_os_error)?;
                self.open.push(Some(file));
                Ok(0)
            }
            Op::OpenUnnamed(p, mode) => {
                let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::NOFOLLOW;
                let file = rustix::fs::openat(at, joined(p), flags, Mode::from_raw_mode(*mode));
                self.open.push(Some(file.map_err(HostErrno::raw_os_error)?));
                Ok(0)
            }
            Op::WriteOpen(i, offset, count, seed) => match self.open.get(*i).and_then(Option::as_ref) {
                Some(file) => self.write(file, *offset, &data(*count, *seed)),
                None => Ok(0),
            },
            Op::Seal | Op::Squash(_) => Ok(0),
            Op::LinkOpen(i, p) => match self.open.get(*i).and_then(Option::as_ref) {
                Some(file) => host(rustix::fs::linkat(file, "", at, joined(p), AtFlags::EMPTY_PATH)),
                None => Ok(0),
            },
            Op::Close(i) => {
                self.open.get_mut(*i).map(Option::take);
                Ok(0)
            }
            Op::Crash => {
                self.open.clear();
                Ok(0)
            }
        }
    }

    fn proc_path(&self, path: &Path) -> String {
        use std::os::fd::AsRawFd;
        format!("/proc/self/fd/{}/{}", self.root.as_raw_fd(), path.join("/"))
    }
}

/// The mode of `umask(2)` in this process, which the kernel applies on the reference's side.
fn umask() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:")).unwrap();
    u32::from_str_radix(line.trim(), 8).unwrap()
}

impl Ours {
    fn resolve(&self, path: &[&str]) -> FsResult<Stat> {
        let mut at = self.fs.getattr(Ino::ROOT)?;
        for name in path {
            if at.kind != FileKind::Folder {
                return fail(libc::ENOTDIR);
            }
            at = self.fs.lookup(at.ino, name.as_bytes())?.ok_or(Errno(libc::ENOENT))?;
            self.fs.forget(at.ino, 1);
        }
        Ok(at)
    }

    fn parent<'p>(&self, path: &'p Path) -> FsResult<(Ino, &'p [u8])> {
        let (last, folders) = path.split_last().unwrap();
        let folder = self.resolve(folders)?;
        if folder.kind != FileKind::Folder {
            return fail(libc::ENOTDIR);
        }
        Ok((folder.ino, last.as_bytes()))
    }

    /// What `open(O_RDWR | O_NOFOLLOW)` gives.
    fn file(&self, path: &Path) -> FsResult<Ino> {
        let stat = self.resolve(path)?;
        match stat.kind {
            FileKind::Folder => fail(libc::EISDIR),
            FileKind::Symlink => fail(libc::ELOOP),
            FileKind::File => Ok(stat.ino),
            _ => fail(libc::ENXIO),
        }
    }

    fn made(&self, stat: FsResult<Stat>) -> Outcome {
        let stat = stat.map_err(|errno| errno.0)?;
        self.fs.forget(stat.ino, 1);
        Ok(0)
    }

    fn make(&self, p: &Path, mode: u32) -> Outcome {
        let made = self.parent(p).and_then(|(folder, name)| self.fs.make(folder, name, mode, umask(), 0, Caller::ROOT));
        self.made(made)
    }

    fn set(&self, ino: FsResult<Ino>, set: SetAttr) -> Outcome {
        ours(ino.and_then(|ino| self.fs.setattr(ino, set, Caller::ROOT)))
    }

    fn apply(&mut self, op: &Op) -> Outcome {
        let fs = &self.fs;
        let ino = |p: &Path| self.resolve(p).map(|stat| stat.ino);
        match op {
            Op::Mkdir(p, mode) => self.make(p, libc::S_IFDIR | mode),
            Op::Create(p, mode) => self.make(p, libc::S_IFREG | mode),
            Op::Mknod(p, mode) => self.make(p, *mode),
            Op::Symlink(p, target) => {
                let made =
                    self.parent(p).and_then(|(folder, name)| fs.symlink(folder, name, target.as_bytes(), Caller::ROOT));
                self.made(made)
            }
            Op::Unlink(p) => ours(self.parent(p).and_then(|(folder, name)| fs.unlink(folder, name))),
            Op::Rmdir(p) => ours(self.parent(p).and_then(|(folder, name)| fs.rmdir(folder, name))),
            Op::Rename(p, q, flags) => {
                ours(self.parent(p).and_then(|p| fs.rename(p, self.parent(q)?, *flags, Caller::ROOT)))
            }
            Op::Link(p, q) => {
                let link = || {
                    let ino = ino(p)?;
                    let (folder, name) = self.parent(q)?;
                    fs.link(ino, folder, name)
                };
                self.made(link())
            }
            Op::Write(p, offset, count, seed) => {
                let written = self.file(p).and_then(|ino| fs.write(ino, *offset, &data(*count, *seed), None));
                written.map(|written| written.bytes as u64).map_err(|errno| errno.0)
            }
            Op::Truncate(p, size) => self.set(self.file(p), SetAttr { size: Some(*size), ..Default::default() }),
            Op::Allocate(p, mode, offset, count) => {
                ours(self.file(p).and_then(|ino| fs.allocate(ino, *mode, *offset, *count)))
            }
            Op::CopyRange(p, from, q, to, count) => {
                let copy = || {
                    let (source, target) = (self.file(p)?, self.file(q)?);
                    // As the reference does it: all is read before anything is written.
                    let mut buffer = vec![0; *count as usize];
                    let count = fs.read(source, *from, &mut buffer)?;
                    if count == 0 {
                        Ok(0)
                    } else {
                        fs.write(target, *to, &buffer[..count], None).map(|w| w.bytes as u64)
                    }
                };
                copy().map_err(|errno| errno.0)
            }
            Op::Chmod(p, mode) => self.set(ino(p), SetAttr { permissions: Some(*mode as u16), ..Default::default() }),
            Op::Chown(p, uid, gid) => {
                self.set(ino(p), SetAttr { uid: Some(*uid), gid: Some(*gid), ..Default::default() })
            }
            Op::SetMtime(p, seconds, nanos) => {
                let time = Some(SetTime::To(Time { seconds: *seconds, nanos: *nanos }));
                self.set(ino(p), SetAttr { atime: time, mtime: time, ..Default::default() })
            }
            Op::SetXattr(p, name, value, flags) => {
                let name = xattr_name(*name).as_bytes();
                ours(ino(p).and_then(|ino| fs.setxattr(ino, name, value, *flags, Caller::ROOT)))
            }
            Op::RemoveXattr(p, name) => ours(ino(p).and_then(|ino| fs.removexattr(ino, xattr_name(*name).as_bytes()))),
            Op::Open(p) => {
                let (folder, name) = self.parent(p).map_err(|errno| errno.0)?;
                self.file(p).map_err(|errno| errno.0)?;
                let stat = fs.lookup(folder, name).map_err(|errno| errno.0)?.unwrap();
                self.open.push(Some(stat.ino));
                Ok(0)
            }
            Op::OpenUnnamed(p, mode) => {
                let folder = self.resolve(p).map_err(|errno| errno.0)?;
                if folder.kind != FileKind::Folder {
                    return Err(libc::ENOTDIR);
                }
                let stat = fs.make_unnamed(folder.ino, *mode, umask(), Caller::ROOT).map_err(|errno| errno.0)?;
                self.open.push(Some(stat.ino));
                Ok(0)
            }
            Op::WriteOpen(i, offset, count, seed) => match self.open.get(*i).copied().flatten() {
                Some(ino) => {
                    let written = fs.write(ino, *offset, &data(*count, *seed), None);
                    written.map(|written| written.bytes as u64).map_err(|errno| errno.0)
                }
                None => Ok(0),
            },
            Op::LinkOpen(i, p) => match self.open.get(*i).copied().flatten() {
                Some(ino) => {
                    let linked = self.parent(p).and_then(|(folder, name)| fs.link(ino, folder, name));
                    self.made(linked)
                }
                None => Ok(0),
            },
            Op::Close(i) => {
                if let Some(ino) = self.open.get_mut(*i).and_then(Option::take) {
                    fs.release(ino, libc::O_RDONLY, false);
                    fs.forget(ino, 1);
                }
                Ok(0)
            }
            Op::Seal => {
                seal_fs(store(), fs);
                Ok(0)
            }
            Op::Squash(layers) => {
                if let Some(top) = fs.view().top() {
                    let chain = Chain { top, layers: (*layers).min(fs.view().layers().len()) };
                    let squashed = squash::prepare(store(), chain, None, &Silent).unwrap();
                    // It stays where it is if a file without a name needs that.
                    crate::seal::rest_on(store(), fs, &squashed, &[]).unwrap();
                }
                Ok(0)
            }
            Op::Crash => {
                self.open.clear();
                let id = fs.upper().unwrap().id();
                // The old filesystem goes without a word, as when the process dies.
                let view = Arc::new(View::empty(store().clone()));
                drop(std::mem::replace(&mut self.fs, Fs::read_only(view)));
                self.fs = reopen(store(), id).with_ranges_from(self.ranges_from);
                Ok(0)
            }
        }
    }
}

/// All that can be observed of an inode. Times only if they were set.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    nlink: u32,
    owner: (u32, u32),
    size: u64,
    mtime: Option<(i64, u32)>,
    xattrs: BTreeMap<String, Vec<u8>>,
    content: Vec<u8>,
    /// The first path that leads to the same inode.
    same_as: String,
}

fn set_time(seconds: i64, nanos: u32) -> Option<(i64, u32)> {
    (seconds < 1000).then_some((seconds, nanos))
}

fn see_host(host: &Host) -> BTreeMap<String, Seen> {
    let mut seen = BTreeMap::new();
    let mut first: BTreeMap<u64, String> = BTreeMap::new();
    let mut left = vec![String::new()];
    while let Some(path) = left.pop() {
        use std::os::fd::AsRawFd;
        let full = format!("/proc/self/fd/{}/./{path}", host.root.as_raw_fd());
        let stat = rustix::fs::lstat(&full).unwrap();
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut content = Vec::new();
        let mut size = stat.st_size as u64;
        match kind {
            FileType::RegularFile => content = std::fs::read(&full).unwrap(),
            FileType::Symlink => content = rustix::fs::readlink(&full, Vec::new()).unwrap().into_bytes(),
            FileType::Directory => {
                size = 0;
                for entry in std::fs::read_dir(&full).unwrap() {
                    let name = entry.unwrap().file_name().into_string().unwrap();
                    left.push(if path.is_empty() { name } else { format!("{path}/{name}") });
                }
            }
            _ => {}
        }
        let mut xattrs = BTreeMap::new();
        for name in [0, 1, 2].map(xattr_name) {
            let mut value = vec![0; 64];
            if let Ok(count) = rustix::fs::lgetxattr(&full, name, &mut value[..]) {
                value.truncate(count);
                xattrs.insert(name.to_owned(), value);
            }
        }
        seen.insert(
            path.clone(),
            Seen {
                mode: stat.st_mode,
                nlink: stat.st_nlink as u32,
                owner: (stat.st_uid, stat.st_gid),
                size,
                mtime: set_time(stat.st_mtime, stat.st_mtime_nsec as u32),
                xattrs,
                content,
                same_as: first.entry(stat.st_ino).or_insert(path.clone()).clone(),
            },
        );
    }
    normalize(seen)
}

/// Which path is met first depends on the order of listings: take the least.
fn normalize(mut seen: BTreeMap<String, Seen>) -> BTreeMap<String, Seen> {
    let mut least: BTreeMap<String, String> = BTreeMap::new();
    for (path, one) in &seen {
        let entry = least.entry(one.same_as.clone()).or_insert_with(|| path.clone());
        *entry = entry.clone().min(path.clone());
    }
    seen.values_mut().for_each(|one| one.same_as = least[&one.same_as].clone());
    seen
}

fn see_ours(fs: &Fs) -> BTreeMap<String, Seen> {
    let mut seen = BTreeMap::new();
    let mut first: BTreeMap<u64, String> = BTreeMap::new();
    let mut left = vec![(String::new(), Ino::ROOT)];
    while let Some((path, ino)) = left.pop() {
        let stat = fs.getattr(ino).unwrap();
        let mut content = Vec::new();
        let mut size = stat.size;
        match stat.kind {
            FileKind::File => {
                content = vec![0; size as usize + 10];
                let count = fs.read(ino, 0, &mut content).unwrap();
                content.truncate(count);
            }
            FileKind::Symlink => content = fs.readlink(ino).unwrap(),
            FileKind::Folder => {
                size = 0;
                for (name, ino) in list(fs, ino) {
                    left.push((if path.is_empty() { name } else { format!("{path}/{name}") }, ino));
                }
            }
            _ => {}
        }
        let mut xattrs = BTreeMap::new();
        for name in fs.listxattr(ino, Caller::ROOT).unwrap().split(|b| *b == 0).filter(|name| !name.is_empty()) {
            let value = fs.getxattr(ino, name).unwrap();
            xattrs.insert(String::from_utf8(name.to_vec()).unwrap(), value);
        }
        seen.insert(
            path.clone(),
            Seen {
                mode: stat.kind.type_bits() | u32::from(stat.attrs.permissions),
                nlink: stat.nlink,
                owner: (stat.attrs.uid, stat.attrs.gid),
                size,
                mtime: set_time(stat.attrs.mtime.seconds, stat.attrs.mtime.nanos),
                xattrs,
                content,
                same_as: first.entry(ino.0).or_insert(path.clone()).clone(),
            },
        );
    }
    normalize(seen)
}

/// Lists in small pieces, as the kernel does.
fn list(fs: &Fs, folder: Ino) -> Vec<(String, Ino)> {
    let mut names = Vec::new();
    let mut after = 0;
    loop {
        let mut room = 3;
        let before = names.len();
        fs.list(folder, FolderHandle(0), after, false, &mut |item| {
            if room == 0 {
                return false;
            }
            room -= 1;
            after = item.cookie;
            names.push((String::from_utf8(item.name.to_vec()).unwrap(), item.ino));
            true
        })
        .unwrap();
        if names.len() == before {
            names.retain(|(name, _)| name != "." && name != "..");
            return names;
        }
    }
}

/// A symbolic link in the middle of a path is the kernel's affair.
fn leads_through_symlink(host: &Host, path: &Path) -> bool {
    (1..path.len()).any(|count| {
        let prefix = joined(&path[..count].to_vec());
        rustix::fs::statat(&host.root, prefix, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink)
    })
}

fn is_symlink(host: &Host, path: &Path) -> bool {
    rustix::fs::statat(&host.root, joined(path), AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink)
}

fn is_special(host: &Host, path: &Path) -> bool {
    rustix::fs::statat(&host.root, joined(path), AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
        let kind = FileType::from_raw_mode(stat.st_mode);
        !matches!(kind, FileType::RegularFile | FileType::Directory)
    })
}

/// Whether what the kernel does before it asks a filesystem would tell the two apart.
fn is_for_the_kernel(host: &Host, op: &Op) -> bool {
    let paths: Vec<&Path> = match op {
        Op::Mkdir(p, _) | Op::Create(p, _) | Op::Mknod(p, _) | Op::Symlink(p, _) | Op::Unlink(p) | Op::Rmdir(p) => {
            vec![p]
        }
        Op::Rename(p, q, _) | Op::Link(p, q) => vec![p, q],
        Op::Chown(p, ..) | Op::SetMtime(p, ..) | Op::LinkOpen(_, p) | Op::OpenUnnamed(p, _) => vec![p],
        Op::Write(p, ..) | Op::Truncate(p, _) | Op::Allocate(p, ..) | Op::Open(p) => {
            return leads_through_symlink(host, p) || is_special(host, p);
        }
        Op::CopyRange(p, _, q, ..) => {
            return [p, q].into_iter().any(|p| leads_through_symlink(host, p) || is_special(host, p));
        }
        Op::Chmod(p, _) => return leads_through_symlink(host, p) || is_symlink(host, p),
        Op::SetXattr(p, ..) | Op::RemoveXattr(p, _) => return leads_through_symlink(host, p) || is_special(host, p),
        _ => vec![],
    };
    paths.into_iter().any(|path| leads_through_symlink(host, path))
}

fn run(ops: &[Op], ranges_from: u64) -> Result<(), TestCaseError> {
    let folder = tempfile::Builder::new().prefix("layerfs-reference-").tempdir().unwrap();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::chmod(folder.path(), Mode::from_raw_mode(0o755)).unwrap();
    let root = rustix::fs::open(folder.path(), flags, Mode::empty()).unwrap();
    let mut host = Host { root, open: Vec::new() };
    let mut ours = Ours { fs: empty_fs(store()).with_ranges_from(ranges_from), ranges_from, open: Vec::new() };
    for (number, op) in ops.iter().enumerate() {
        if is_for_the_kernel(&host, op) {
            continue;
        }
        let expected = host.apply(op);
        let found = ours.apply(op);
        prop_assert_eq!(found, expected, "operation {}: {:?}", number, op);
        if matches!(op, Op::Seal | Op::Crash) {
            prop_assert_eq!(see_ours(&ours.fs), see_host(&host), "after operation {}: {:?}", number, op);
        }
        for (file, ino) in host.open.iter().zip(&ours.open) {
            if let (Some(file), Some(ino)) = (file, ino) {
                compare_open(&ours.fs, *ino, file, number, op)?;
            }
        }
    }
    prop_assert_eq!(see_ours(&ours.fs), see_host(&host));
    seal_fs(store(), &ours.fs);
    prop_assert_eq!(see_ours(&ours.fs), see_host(&host), "sealed at the end");
    compare_contents(&ours.fs)?;
    let read_only = Fs::read_only(ours.fs.view());
    prop_assert_eq!(see_ours(&read_only), see_host(&host), "as a layer");
    let id = ours.fs.upper().unwrap().id();
    drop(ours);
    crate::upper::remove(store(), id).unwrap();
    Ok(())
}

fn compare_open(fs: &Fs, ino: Ino, file: &OwnedFd, number: usize, op: &Op) -> Result<(), TestCaseError> {
    let expected = rustix::fs::fstat(file).unwrap();
    let found = fs.getattr(ino).unwrap();
    prop_assert_eq!(
        (found.nlink, found.size),
        (expected.st_nlink as u32, expected.st_size as u64),
        "{}: {:?}",
        number,
        op
    );
    let mut wanted = vec![0; expected.st_size as usize + 1];
    let count = rustix::io::pread(file, &mut wanted[..], 0).unwrap();
    let mut read = vec![0; expected.st_size as usize + 1];
    let ours = fs.read(ino, 0, &mut read).unwrap();
    prop_assert_eq!(ours, count);
    prop_assert!(read == wanted, "an open file differs after {}: {:?}", number, op);
    let mut at = 0;
    while at < expected.st_size as u64 {
        let hole = fs.seek(ino, at, false).unwrap();
        let data = match fs.seek(ino, hole, true) {
            Err(Errno(libc::ENXIO)) => expected.st_size as u64,
            found => found.unwrap(),
        };
        prop_assert!(data > at, "no way on from {}: {:?}", at, op);
        prop_assert!(wanted[hole as usize..data as usize].iter().all(|byte| *byte == 0), "data in a hole: {:?}", op);
        at = data;
    }
    Ok(())
}

/// A file that was sealed by its changes has the content that sealing it whole gives.
fn compare_contents(fs: &Fs) -> Result<(), TestCaseError> {
    let mut left = vec![Ino::ROOT];
    while let Some(ino) = left.pop() {
        match fs.view().inode(ino).unwrap().unwrap().node {
            Node::Folder => left.extend(list(fs, ino).into_iter().map(|(_, ino)| ino)),
            Node::File(content) => {
                let mut bytes = vec![0; content.len() as usize];
                fs.read(ino, 0, &mut bytes).unwrap();
                let session = store().session("test");
                let mut whole = None;
                let mut ingest = session.ingest(|(), content| {
                    whole = content;
                    Ok(())
                });
                ingest.file((), Chunker::Tree, &mut ReadSource(&bytes[..])).unwrap();
                ingest.finish().unwrap();
                prop_assert_eq!(Some(content), whole);
            }
            _ => {}
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn does_what_the_host_does(
        ops in prop::collection::vec(op(), 1..80),
        // Copying up whole, all by range, and both.
        ranges_from in prop::sample::select(vec![u64::MAX, 1, 1, 5000, 100_000]),
    ) {
        if !rustix::process::geteuid().is_root() {
            eprintln!("NOT RUN: comparing with the host's filesystem needs the superuser (device nodes, owners)");
            return Ok(());
        }
        run(&ops, ranges_from)?;
    }
}

#[test]
fn reserving_what_shows_through_changes_times_for_good() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("NOT RUN: comparing with the host's filesystem needs the superuser (device nodes, owners)");
        return;
    }
    let file = || vec!["b"];
    let before = [Op::Create(file(), 0o644), Op::Write(file(), 250_000, 1, 0), Op::Seal, Op::SetMtime(file(), 0, 0)];
    let after = [Op::Allocate(file(), 0, 0, 1), Op::Crash];
    let ops: Vec<Op> = before.into_iter().chain(after).collect();
    run(&ops, 1).unwrap();
}
