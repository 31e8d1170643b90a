//! What each request of the kernel means, whichever way it comes.
//!
//! [`device`](super::device) reads requests, [`uring`](super::uring) gets them by io_uring; for both
//! [`requests`](super::requests) decodes them and calls what is here. Hides what a request means beyond [`Fs`]: how one
//! that was sent twice is done once, what a read-only mount refuses so that the kernel stops asking, what is notified. Invariant:
//! it knows nothing of how requests and answers look.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use super::caller::Caller;
use super::descriptor;
use super::errno::{FsResult, fail};
use super::fs::{FolderHandle, Fs, SetAttr, Stat};
use super::fuse::{FuseOptions, Kernel};
use super::hidden::hand::Order;
use super::watch::Op;
use crate::id::Ino;
use crate::patience;
use crate::upper::opens::Backing;

/// What the kernel is told of what is opened (`FOPEN_…` in `linux/fuse.h`).
const KEEP_CACHE: u32 = 1 << 1;
const CACHE_DIR: u32 = 1 << 3;
const NOFLUSH: u32 = 1 << 5;
/// Everything stays cached across opening; closing needs no word to us.
const OPEN_FLAGS: u32 = KEEP_CACHE | NOFLUSH;
/// Of a file that is passed through nothing is cached here.
const PASSED_FLAGS: u32 = NOFLUSH;
const FOLDER_FLAGS: u32 = KEEP_CACHE | CACHE_DIR;

/// Permission bits that a write clears.
const PRIVILEGED: u16 = (libc::S_ISUID | libc::S_ISGID) as u16;

/// Who asks, and the request's number; of one that is sent for the second time with the bit for that.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub number: u64,
    pub caller: Caller,
}

/// The answer to what opens a file or a folder.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opened {
    pub handle: u64,
    /// The kernel's flags, but for the one that says that there is a backing.
    pub flags: u32,
    /// What the kernel reads and writes without asking.
    pub backing: Option<Backing>,
}

impl Opened {
    fn file(backing: Option<Backing>) -> Opened {
        let flags = if backing.is_some() { PASSED_FLAGS } else { OPEN_FLAGS };
        Opened { handle: 0, flags, backing }
    }

    /// Closing a file that the kernel has bytes of tells whether they could be written.
    fn telling(self, tells: bool) -> Opened {
        Opened { flags: if tells { self.flags & !NOFLUSH } else { self.flags }, ..self }
    }
}

/// The answer to what asks for an attribute, or for their names.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// Asked with size 0: how long it is.
    Size(u32),
    /// The value.
    Bytes(Vec<u8>),
}

/// What answers the requests of one mount.
pub(super) struct Front {
    pub fs: Arc<Fs>,
    pub kernel: OnceLock<Kernel>,
    pub store_folder: PathBuf,
    /// Who may use it, if not all users may.
    pub owner: Option<u32>,
}

impl std::fmt::Debug for Front {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Front").field("fs", &self.fs).finish_non_exhaustive()
    }
}

impl Front {
    pub fn new(fs: Arc<Fs>, options: &FuseOptions) -> Front {
        let store_folder = options.store_folder.clone();
        let owner = (!options.allow_other).then(|| rustix::process::geteuid().as_raw());
        Front { fs, kernel: OnceLock::new(), store_folder, owner }
    }

    /// Does what `asked` asks for, in a way that it isn't done twice. If a daemon before this one did it, `again` makes
    /// the answer from the inode that it was about.
    fn once<T>(
        &self,
        asked: Asked,
        change: impl FnOnce() -> FsResult<T>,
        again: impl FnOnce(Ino) -> FsResult<T>,
    ) -> FsResult<T> {
        let Some(upper) = self.fs.upper() else { return change() };
        let first = descriptor::sent_again(asked.number);
        match first.and_then(|first| upper.journal().done(first)) {
            Some(about) => again(about),
            None => upper.journal().answering(first.unwrap_or(asked.number), change),
        }
    }

    /// [`Front::once`] for what makes an entry of `folder`.
    pub fn make_once(&self, asked: Asked, folder: Ino, change: impl FnOnce() -> FsResult<Stat>) -> FsResult<Stat> {
        self.once(asked, change, |made| self.fs.made_already(folder, made))
    }

    /// [`Front::once`] for what has no answer but success.
    pub fn do_once(&self, asked: Asked, change: impl FnOnce() -> FsResult<()>) -> FsResult<()> {
        self.once(asked, change, |_| Ok(()))
    }

    /// Makes anything but a symbolic link. `rdev` is the kernel's 32-bit form of a device number.
    pub fn make(&self, asked: Asked, folder: Ino, name: &[u8], mode: u32, umask: u32, rdev: u32) -> FsResult<Stat> {
        let make = || self.fs.make(folder, name, mode, umask, device(rdev), asked.caller);
        self.make_once(asked, folder, make)
    }

    pub fn make_folder(&self, asked: Asked, folder: Ino, name: &[u8], mode: u32, umask: u32) -> FsResult<Stat> {
        self.make(asked, folder, name, mode & 0o7777 | libc::S_IFDIR, umask, 0)
    }

    pub fn symlink(&self, asked: Asked, folder: Ino, name: &[u8], target: &[u8]) -> FsResult<Stat> {
        self.make_once(asked, folder, || self.fs.symlink(folder, name, target, asked.caller))
    }

    pub fn link(&self, asked: Asked, ino: Ino, folder: Ino, name: &[u8]) -> FsResult<Stat> {
        self.make_once(asked, folder, || self.fs.link(ino, folder, name))
    }

    pub fn unlink(&self, asked: Asked, folder: Ino, name: &[u8]) -> FsResult<()> {
        self.do_once(asked, || self.fs.unlink(folder, name))
    }

    pub fn rmdir(&self, asked: Asked, folder: Ino, name: &[u8]) -> FsResult<()> {
        self.do_once(asked, || self.fs.rmdir(folder, name))
    }

    pub fn rename(&self, asked: Asked, from: (Ino, &[u8]), to: (Ino, &[u8]), flags: u32) -> FsResult<()> {
        self.do_once(asked, || self.fs.rename(from, to, flags, asked.caller))
    }

    pub fn setxattr(&self, asked: Asked, ino: Ino, name: &[u8], value: &[u8], flags: i32) -> FsResult<()> {
        self.fs.let_time_pass(ino);
        self.do_once(asked, || self.fs.setxattr(ino, name, value, flags, asked.caller))
    }

    pub fn removexattr(&self, asked: Asked, ino: Ino, name: &[u8]) -> FsResult<()> {
        self.do_once(asked, || self.fs.removexattr(ino, name))
    }

    /// Opens a file. After ENOSYS, which a read-only mount says, the kernel opens without asking.
    pub fn open(&self, asked: Asked, ino: Ino, flags: i32) -> FsResult<Opened> {
        let _seen = self.fs.seen(Op::Open, ino, None);
        if !self.fs.is_writable() {
            return fail(libc::ENOSYS);
        }
        if flags & libc::O_TRUNC != 0 {
            self.setattr(asked, ino, SetAttr { size: Some(0), ..SetAttr::default() })?;
        }
        let opened = self.fs.open(ino, flags & !libc::O_TRUNC, asked.caller);
        self.count_again(asked, ino);
        let backing = opened?;
        self.sync_way(ino, backing.as_ref(), flags)?;
        // What is stored through a mapping changes times without the kernel's knowledge: what it knows of them must not hold for ever.
        if backing.is_some()
            && flags & libc::O_ACCMODE == libc::O_RDWR
            && let Some(kernel) = self.kernel.get()
        {
            kernel.attributes_changed(ino);
        }
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        Ok(Opened::file(backing).telling(writes && self.fs.is_hidden(ino)))
    }

    /// Changes attributes.
    pub fn setattr(&self, asked: Asked, ino: Ino, set: SetAttr) -> FsResult<Stat> {
        let _turn = set.size.map(|size| self.fs.truncate_hidden(ino, size)).transpose()?;
        if set.mtime.is_some() || set.permissions.is_some_and(|bits| bits & PRIVILEGED != 0) {
            self.fs.let_time_pass(ino);
        }
        self.fs.setattr(ino, set, asked.caller)
    }

    /// A descriptor of a file that the kernel may have bytes of is closed.
    pub fn flush(&self, ino: Ino) -> FsResult<()> {
        let _seen = self.fs.seen(Op::Flush, ino, None);
        if self.fs.hidden().is_none() {
            // Where files aren't opened by us nothing else says that closing them is nothing to tell: the kernel asks no more.
            return fail(libc::ENOSYS);
        }
        self.fs.order_hidden(ino, Order::Flush).unwrap_or(Ok(()))
    }

    /// Makes a file's data durable: what goes by the hidden mount comes back here from there.
    pub fn fsync(&self, ino: Ino) -> FsResult<()> {
        self.fs.order_hidden(ino, Order::Sync).unwrap_or_else(|| self.fs.fsync(ino))
    }

    pub fn allocate(&self, ino: Ino, mode: i32, offset: u64, bytes: u64) -> FsResult<()> {
        let ordered = self.fs.order_hidden(ino, Order::Allocate { mode, offset, bytes });
        ordered.unwrap_or_else(|| self.fs.allocate(ino, mode, offset, bytes))
    }

    pub fn create(
        &self,
        asked: Asked,
        folder: Ino,
        name: &[u8],
        (mode, umask): (u32, u32),
        flags: i32,
    ) -> FsResult<(Stat, Opened)> {
        // That alone is done again for want of room. Once there is the file it would be found to be there already.
        let make = || self.make(asked, folder, name, mode & 0o7777 | libc::S_IFREG, umask, 0);
        let stat = self.fs.with_room(true, make)?;
        let opened = self.opened_new(asked, stat, flags);
        let ino = opened.0.ino;
        // Of what failed the kernel forgets nothing.
        self.sync_way(ino, opened.1.backing.as_ref(), flags).inspect_err(|_| self.fs.forget(ino, 1))?;
        Ok(opened)
    }

    /// Makes a file without a name (`O_TMPFILE`), and opens it.
    pub fn make_unnamed(
        &self,
        asked: Asked,
        folder: Ino,
        (mode, umask): (u32, u32),
        flags: i32,
    ) -> FsResult<(Stat, Opened)> {
        let make = || self.fs.make_unnamed(folder, mode, umask, asked.caller);
        let stat = self.make_once(asked, folder, make)?;
        Ok(self.opened_new(asked, stat, flags))
    }

    /// Of what is written to a file that is passed through the kernel makes the bytes durable by itself, if that was asked for; that there
    /// is such a file must be so before.
    fn sync_way(&self, ino: Ino, backing: Option<&Backing>, flags: i32) -> FsResult<()> {
        let Some(upper) = self.fs.upper().filter(|_| backing.is_some() && flags & libc::O_DSYNC != 0) else {
            return Ok(());
        };
        upper.data().is_counted_on(ino);
        let synced = upper.sync();
        if synced.is_err() {
            // The kernel won't close what wasn't opened.
            self.fs.release(ino, flags, false);
        }
        Ok(synced?)
    }

    /// What opens `ino` was asked for. If that is for the second time, a daemon before this one may have counted it.
    fn count_again(&self, asked: Asked, ino: Ino) {
        if descriptor::sent_again(asked.number).is_some() {
            self.fs.may_be_miscounted(ino);
        }
    }

    fn opened_new(&self, asked: Asked, stat: Stat, flags: i32) -> (Stat, Opened) {
        let backing = self.fs.opened_new(stat.ino, flags);
        self.count_again(asked, stat.ino);
        // What is passed through and can be mapped changes without the kernel's knowledge.
        let may_change = backing.is_some() && flags & libc::O_ACCMODE == libc::O_RDWR;
        (Stat { may_change, ..stat }, Opened::file(backing))
    }

    pub fn release(&self, asked: Asked, ino: Ino, flags: i32) {
        let _seen = self.fs.seen(Op::Release, ino, None);
        self.fs.release(ino, flags, descriptor::sent_again(asked.number).is_some());
    }

    pub fn read(&self, asked: Asked, ino: Ino, offset: u64, buffer: &mut [u8]) -> FsResult<usize> {
        patience::on_behalf_of(asked.caller.pid, || self.fs.read(ino, offset, buffer))
    }

    /// What the kernel `writes_back` it can't write later: all of it is written, or it is an error.
    pub fn write(
        &self,
        asked: Asked,
        ino: Ino,
        offset: u64,
        data: &[u8],
        clear_bits: bool,
        writes_back: bool,
    ) -> FsResult<u64> {
        let write = || self.fs.write(ino, offset, data, clear_bits.then_some(asked.caller));
        let written = patience::on_behalf_of(asked.caller.pid, write)?;
        if let (true, Some(failure)) = (writes_back, written.failure) {
            return Err(failure);
        }
        if written.cleared_privileges
            && let Some(kernel) = self.kernel.get()
        {
            kernel.attributes_changed(ino);
        }
        Ok(written.bytes as u64)
    }

    /// Opens a folder; as [`Front::open`].
    pub fn open_folder(&self, ino: Ino) -> FsResult<Opened> {
        let _seen = self.fs.seen(Op::Opendir, ino, None);
        if !self.fs.is_writable() {
            return fail(libc::ENOSYS);
        }
        // In this order: whoever still hears that listings are kept is there already when the switch freezes them.
        let FolderHandle(handle) = self.fs.open_folder(ino);
        let flags = if self.fs.keeps_listings() { FOLDER_FLAGS } else { 0 };
        Ok(Opened { handle, flags, backing: None })
    }

    pub fn release_folder(&self, ino: Ino, handle: u64) {
        let _seen = self.fs.seen(Op::Releasedir, ino, None);
        self.fs.release_folder(FolderHandle(handle));
    }

    pub fn space(&self) -> FsResult<rustix::fs::StatVfs> {
        match self.fs.upper() {
            Some(upper) => Ok(upper.space()?),
            None => Ok(rustix::fs::statvfs(&self.store_folder)?),
        }
    }

    pub fn getxattr(&self, ino: Ino, name: &[u8], size: u32) -> FsResult<Value> {
        Value::fitting(self.fs.getxattr(ino, name)?, size)
    }

    pub fn listxattr(&self, asked: Asked, ino: Ino, size: u32) -> FsResult<Value> {
        Value::fitting(self.fs.listxattr(ino, asked.caller)?, size)
    }

    pub fn seek(&self, ino: Ino, offset: i64, whence: i32) -> FsResult<u64> {
        // What the kernel has is no hole any more.
        self.fs.order_hidden(ino, Order::WriteBack).transpose()?;
        match (u64::try_from(offset), whence) {
            (Err(_), _) => fail(libc::ENXIO),
            (Ok(offset), libc::SEEK_DATA) => self.fs.seek(ino, offset, true),
            (Ok(offset), libc::SEEK_HOLE) => self.fs.seek(ino, offset, false),
            _ => fail(libc::EINVAL),
        }
    }

    pub fn copy_range(&self, from: (Ino, u64), to: (Ino, u64), bytes: u64) -> FsResult<u64> {
        if self.fs.is_hidden(from.0) || self.fs.is_hidden(to.0) {
            // The kernel has bytes of it: it copies them itself then.
            return fail(libc::EXDEV);
        }
        // The answer has 32 bits.
        self.fs.copy_range(from, to, bytes.min(1 << 30))
    }
}

impl Value {
    fn fitting(value: Vec<u8>, size: u32) -> FsResult<Value> {
        match size {
            0 => Ok(Value::Size(value.len() as u32)),
            size if value.len() > size as usize => fail(libc::ERANGE),
            _ => Ok(Value::Bytes(value)),
        }
    }
}

/// The kernel's 32-bit form of a device number as `dev_t`.
fn device(encoded: u32) -> u64 {
    let minor = encoded & 0xff | (encoded >> 12) & 0xf_ff00;
    libc::makedev((encoded & 0xf_ff00) >> 8, minor)
}

/// A `dev_t` in the kernel's 32-bit form.
pub(super) fn encoded_device(number: u64) -> u32 {
    let (major, minor) = (libc::major(number), libc::minor(number));
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}
