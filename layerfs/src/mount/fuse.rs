//! The FUSE library: mounting, greeting the kernel, telling it what it can't know, and requests read from the device. Thin:
//! it converts, and calls [`Front`].
//!
//! Everything is cached by the kernel without limit of time, entries that aren't there too: whatever changes this
//! filesystem comes through this mount, so that the kernel knows. What it can't know (a write cleared setuid; a seal)
//! is notified. A read-only mount answers OPEN and OPENDIR with ENOSYS: warm, it sends nothing at all.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Config, CopyFileRangeFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, MountOption, Notifier, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, SessionACL, TimeOrNow, WriteFlags,
};

use super::Transport;
use super::caller::Caller;
use super::descriptor;
use super::errno::{Errno, FsResult};
use super::front::{Asked, Front, Opened, Value, encoded_device};
use super::fs::{FolderHandle, Fs, SetAttr, SetTime, Stat};
use super::uring::{self, Memory};
use crate::attr::{FileKind, Time};
use crate::error::{Error, Result};
use crate::id::Ino;

/// Longer than any mount lives.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
const GENERATION: Generation = Generation(0);
const MAX_WRITE: u32 = 1 << 20;
const MAX_BACKGROUND: u16 = 64;

/// How to mount.
#[derive(Clone, Debug)]
pub(super) struct FuseOptions {
    pub dir: PathBuf,
    pub source: String,
    pub allow_other: bool,
    pub is_root: bool,
    pub threads: usize,
    pub transport: Transport,
    /// Where the store is: for `statfs` of a read-only mount.
    pub store_folder: PathBuf,
}

/// A mount that isn't served yet.
pub(super) struct Session {
    session: fuser::Session<Heard>,
    front: Arc<Front>,
    kernel: Kernel,
    /// Where requests come by io_uring, if they do.
    memory: Option<Arc<Memory>>,
}

/// The way to tell the kernel what it can't know.
#[derive(Clone, Debug)]
pub(super) struct Kernel(Notifier);

impl Session {
    /// Mounts.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if io_uring is asked for and not to be had.
    pub fn mount(fs: Arc<Fs>, options: &FuseOptions) -> Result<Session> {
        let memory = match options.transport {
            Transport::Read => None,
            Transport::Auto => {
                Memory::new(options.threads).inspect_err(|why| tracing::debug!(%why, "no io_uring")).ok()
            }
            Transport::Uring => Some(Memory::new(options.threads)?),
        };
        let front = Arc::new(Front::new(fs, options));
        let config = options.config(front.fs.is_writable());
        let heard = Heard { front: front.clone(), wants_ring: memory.is_some(), has_ring: Arc::default() };
        let has_ring = heard.has_ring.clone();
        let session = fuser::Session::new(heard, &options.dir, &config);
        let session = session.map_err(|e| Error::file("mount on", &options.dir, e))?;
        let memory = memory.filter(|_| has_ring.load(Ordering::Relaxed));
        if options.transport == Transport::Uring && memory.is_none() {
            return Err(uring::unsupported("this kernel doesn't offer it (Linux 6.14 does)"));
        }
        Ok(Session::new(session, front, memory.map(Arc::new)))
    }

    /// Goes on with the mount that `kept` is what a daemon that died had of it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if this kernel can't send requests again.
    pub fn resume(fs: Arc<Fs>, options: &FuseOptions, kept: &[OwnedFd]) -> Result<Session> {
        let failed = |error: std::io::Error| match error.raw_os_error() {
            Some(libc::EINVAL) => {
                let detail = "it needs Linux 6.9 to send requests again".to_owned();
                Error::Unsupported { what: "taking over a mount", detail }
            }
            _ => Error::file("take over the mount on", &options.dir, error),
        };
        let (device, memory) = kept.split_first().ok_or_else(|| failed(std::io::ErrorKind::UnexpectedEof.into()))?;
        let memory = memory.first().map(|memory| Memory::left(memory).map_err(failed)).transpose()?;
        let front = Arc::new(Front::new(fs, options));
        let config = options.config(front.fs.is_writable());
        let heard = Heard { front: front.clone(), wants_ring: memory.is_some(), has_ring: Arc::default() };
        let (ours, kernels) = descriptor::greeting().map_err(failed)?;
        let session = fuser::Session::from_fd(heard, ours, config.acl, config).map_err(failed)?;
        descriptor::replace(session.as_fd(), kernels, device).map_err(failed)?;
        Ok(Session::new(session, front, memory.map(Arc::new)))
    }

    fn new(session: fuser::Session<Heard>, front: Arc<Front>, memory: Option<Arc<Memory>>) -> Session {
        let kernel = Kernel(session.notifier());
        let _ = front.kernel.set(kernel.clone());
        Session { session, front, kernel, memory }
    }

    /// Another descriptor of the connection to the kernel.
    pub fn device(&self) -> Result<OwnedFd> {
        self.session.as_fd().try_clone_to_owned().map_err(|e| Error::io("duplicating a descriptor", e))
    }

    /// What a daemon after this one needs to go on: other descriptors of the connection to the kernel, which is there as long as one
    /// is open, and of the memory for requests, if they come by io_uring.
    pub fn descriptors(&self) -> Result<Vec<OwnedFd>> {
        let all = std::iter::once(self.session.as_fd()).chain(self.memory.as_deref().map(AsFd::as_fd));
        let copies: std::io::Result<Vec<_>> = all.map(|one| one.try_clone_to_owned()).collect();
        copies.map_err(|e| Error::io("duplicating a descriptor", e))
    }

    /// The way to the kernel.
    pub fn kernel(&self) -> Kernel {
        self.kernel.clone()
    }

    /// How requests come.
    pub fn transport(&self) -> Transport {
        if self.memory.is_some() { Transport::Uring } else { Transport::Read }
    }

    /// Where requests come by io_uring, if they do.
    pub fn memory(&self) -> Option<Arc<Memory>> {
        self.memory.clone()
    }

    /// Serves until it is unmounted from `dir`.
    pub fn serve(self, dir: &Path) -> std::io::Result<()> {
        let Some(memory) = self.memory else { return self.session.run() };
        // The session is dropped at the end, as it unmounts then.
        uring::serve(&self.front, &memory, self.session.as_fd(), dir)
    }
}

impl FuseOptions {
    fn config(&self, is_writable: bool) -> Config {
        let mut config = Config::default();
        let mut mount_options = vec![
            MountOption::FSName(self.source.clone()),
            MountOption::CUSTOM("subtype=layerfs".to_owned()),
            MountOption::DefaultPermissions,
        ];
        if self.is_root {
            mount_options.extend([MountOption::Dev, MountOption::Suid]);
        }
        mount_options.push(if is_writable { MountOption::RW } else { MountOption::RO });
        config.mount_options = mount_options;
        config.acl = if self.allow_other { SessionACL::All } else { SessionACL::Owner };
        config.n_threads = Some(self.threads);
        // A clone takes the requests that it has read along when it is closed, as when the daemon dies. All threads read
        // the one descriptor that outlives it.
        config.clone_fd = false;
        config
    }
}

impl Kernel {
    /// What the kernel has cached of `ino`'s attributes is out of date.
    pub fn attributes_changed(&self, ino: Ino) {
        self.send(self.0.inval_inode(INodeNo(ino.0), -1, 0));
    }

    /// What the kernel has cached of the attributes and the listing of `folder` is out of date.
    pub fn listing_changed(&self, folder: Ino) {
        self.send(self.0.inval_inode(INodeNo(folder.0), 0, 0));
    }

    /// Makes the kernel send what programs wrote to `ino` through mappings, and waits for it; it drops its pages.
    pub fn fetch_written(&self, ino: Ino) {
        self.send(self.0.inval_inode(INodeNo(ino.0), 0, 0));
    }

    fn send(&self, result: std::io::Result<()>) {
        if let Err(error) = result {
            tracing::debug!(%error, "the kernel didn't take a notification");
        }
    }
}

/// What the library calls.
struct Heard {
    front: Arc<Front>,
    /// Whether requests may come by io_uring, and whether the kernel has agreed.
    wants_ring: bool,
    has_ring: Arc<AtomicBool>,
}

impl std::ops::Deref for Heard {
    type Target = Front;

    fn deref(&self) -> &Front {
        &self.front
    }
}

impl From<Errno> for fuser::Errno {
    fn from(errno: Errno) -> fuser::Errno {
        fuser::Errno::from_i32(errno.0)
    }
}

fn ino(number: INodeNo) -> Ino {
    Ino(number.0)
}

fn asked(request: &Request) -> Asked {
    let caller = Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() };
    Asked { number: request.unique().0, caller }
}

fn system_time(time: Time) -> SystemTime {
    let whole = if time.seconds >= 0 {
        UNIX_EPOCH.checked_add(Duration::from_secs(time.seconds as u64))
    } else {
        UNIX_EPOCH.checked_sub(Duration::from_secs(time.seconds.unsigned_abs()))
    };
    whole.and_then(|whole| whole.checked_add(Duration::from_nanos(u64::from(time.nanos)))).unwrap_or(UNIX_EPOCH)
}

/// The library turns -2 s + 0.8 s, as the kernel sends it, into 2.8 s before the epoch: this turns it back.
fn time(system: SystemTime) -> Time {
    match system.duration_since(UNIX_EPOCH) {
        Ok(after) => Time { seconds: after.as_secs() as i64, nanos: after.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            Time { seconds: -(before.as_secs() as i64), nanos: before.subsec_nanos() }
        }
    }
}

fn set_time(time_or_now: TimeOrNow) -> SetTime {
    match time_or_now {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(system) => SetTime::To(time(system)),
    }
}

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Folder => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
    }
}

fn file_attr(stat: &Stat) -> FileAttr {
    FileAttr {
        ino: INodeNo(stat.ino.0),
        size: stat.size,
        blocks: stat.blocks,
        atime: system_time(stat.attrs.atime),
        mtime: system_time(stat.attrs.mtime),
        ctime: system_time(stat.attrs.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(stat.kind),
        perm: stat.attrs.permissions,
        nlink: stat.nlink,
        uid: stat.attrs.uid,
        gid: stat.attrs.gid,
        rdev: encoded_device(stat.rdev),
        blksize: 4096,
        flags: 0,
    }
}

/// The reply for a name that isn't there: cached too.
fn no_entry() -> FileAttr {
    let attrs = crate::attr::Attrs::default();
    file_attr(&Stat {
        ino: Ino(0),
        kind: FileKind::File,
        nlink: 0,
        attrs,
        size: 0,
        blocks: 0,
        rdev: 0,
        may_change: false,
    })
}

/// How long the kernel may go by what it is told.
fn ttl(stat: &Stat) -> Duration {
    if stat.may_change { Duration::ZERO } else { FOREVER }
}

fn reply_entry(result: FsResult<Stat>, reply: ReplyEntry) {
    match result {
        Ok(stat) => reply.entry(&ttl(&stat), &file_attr(&stat), GENERATION),
        Err(errno) => reply.error(errno.into()),
    }
}

fn reply_attr(result: FsResult<Stat>, reply: ReplyAttr) {
    match result {
        Ok(stat) => reply.attr(&ttl(&stat), &file_attr(&stat)),
        Err(errno) => reply.error(errno.into()),
    }
}

fn reply_empty(result: FsResult<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno.into()),
    }
}

fn reply_written(result: FsResult<u64>, reply: ReplyWrite) {
    match result {
        Ok(bytes) => reply.written(bytes as u32),
        Err(errno) => reply.error(errno.into()),
    }
}

fn reply_value(result: FsResult<Value>, reply: ReplyXattr) {
    match result {
        Ok(Value::Size(size)) => reply.size(size),
        Ok(Value::Bytes(value)) => reply.data(&value),
        Err(errno) => reply.error(errno.into()),
    }
}

fn open_flags(flags: u32) -> FopenFlags {
    FopenFlags::from_bits_retain(flags)
}

fn reply_opened(result: FsResult<Opened>, reply: ReplyOpen) {
    match result {
        Ok(Opened { handle, flags, backing: None }) => reply.opened(FileHandle(handle), open_flags(flags)),
        Ok(Opened { handle, flags, backing: Some(backing) }) => {
            // SAFETY: the number is this session's, and closed only after the file's last descriptor.
            #[allow(unsafe_code)]
            let backing = unsafe { reply.wrap_backing(backing.0) };
            reply.opened_passthrough(FileHandle(handle), open_flags(flags), &backing);
            let _ = backing.into_raw();
        }
        Err(errno) => reply.error(errno.into()),
    }
}

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Filesystem for Heard {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_POSIX_ACL,
            InitFlags::FUSE_DONT_MASK,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_NO_OPEN_SUPPORT,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
            InitFlags::FUSE_PASSTHROUGH,
        ];
        // With it the kernel leaves out who asks, and `fuser` would turn the owner of a private mount away. Only root
        // can map the ids of a mount.
        let mapped = self.for_all.then_some(InitFlags::FUSE_ALLOW_IDMAP);
        for flag in wanted.into_iter().chain(mapped) {
            if let Err(missing) = config.add_capabilities(flag) {
                tracing::debug!(?missing, "this kernel lacks a feature of FUSE");
            }
        }
        // An overlay may lie over the mount.
        let _ = config.set_max_stack_depth(1);
        let mut max_write = MAX_WRITE;
        if self.wants_ring && config.add_capabilities(InitFlags::FUSE_OVER_IO_URING).is_ok() {
            self.has_ring.store(true, Ordering::Relaxed);
            max_write = uring::PAYLOAD_BYTES as u32;
            let _ = config.set_max_readahead(max_write);
        }
        let _ = config.set_max_write(max_write);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.fs.lookup(ino(parent), name.as_bytes()) {
            Ok(Some(stat)) => reply.entry(&ttl(&stat), &file_attr(&stat), GENERATION),
            Ok(None) => reply.entry(&FOREVER, &no_entry(), GENERATION),
            Err(errno) => reply.error(errno.into()),
        }
    }

    fn forget(&self, _: &Request, number: INodeNo, count: u64) {
        self.fs.forget(ino(number), count);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply_attr(self.fs.getattr(ino(number)), reply);
    }

    fn setattr(
        &self,
        request: &Request,
        number: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let permissions = mode.map(|mode| (mode & 0o7777) as u16);
        let (atime, mtime) = (atime.map(set_time), mtime.map(set_time));
        let set = SetAttr { permissions, uid, gid, size, atime, mtime };
        reply_attr(self.fs.setattr(ino(number), set, asked(request).caller), reply);
    }

    fn readlink(&self, _: &Request, number: INodeNo, reply: ReplyData) {
        match self.fs.readlink(ino(number)) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(errno.into()),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        reply_entry(self.make(asked(request), ino(parent), name.as_bytes(), mode, umask, rdev), reply);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        reply_entry(self.make_folder(asked(request), ino(parent), name.as_bytes(), mode, umask), reply);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(Front::unlink(self, asked(request), ino(parent), name.as_bytes()), reply);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(Front::rmdir(self, asked(request), ino(parent), name.as_bytes()), reply);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = target.as_os_str().as_bytes();
        reply_entry(Front::symlink(self, asked(request), ino(parent), name.as_bytes(), target), reply);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = ((ino(parent), name.as_bytes()), (ino(new_parent), new_name.as_bytes()));
        reply_empty(Front::rename(self, asked(request), from, to, flags.bits()), reply);
    }

    fn link(&self, request: &Request, number: INodeNo, new_parent: INodeNo, new_name: &OsStr, reply: ReplyEntry) {
        reply_entry(Front::link(self, asked(request), ino(number), ino(new_parent), new_name.as_bytes()), reply);
    }

    fn open(&self, request: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        reply_opened(Front::open(self, asked(request), ino(number), flags.0), reply);
    }

    fn read(
        &self,
        request: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        BUFFER.with_borrow_mut(|buffer| {
            let size = size as usize;
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            match Front::read(self, asked(request), ino(number), offset, &mut buffer[..size]) {
                Ok(count) => reply.data(&buffer[..count]),
                Err(errno) => reply.error(errno.into()),
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let clear_bits = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        reply_written(Front::write(self, asked(request), ino(number), offset, data, clear_bits), reply);
    }

    fn release(
        &self,
        request: &Request,
        number: INodeNo,
        _: FileHandle,
        flags: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        Front::release(self, asked(request), ino(number), flags.0);
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn fsync(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply_empty(self.fs.fsync(ino(number)), reply);
    }

    fn opendir(&self, _: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply_opened(self.open_folder(ino(number)), reply);
    }

    fn readdir(&self, _: &Request, number: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.fs.list(ino(number), FolderHandle(handle.0), offset, false, &mut |item| {
            !reply.add(INodeNo(item.ino.0), item.cookie, file_type(item.kind), OsStr::from_bytes(item.name))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno.into()),
        }
    }

    fn readdirplus(
        &self,
        _: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = self.fs.list(ino(number), FolderHandle(handle.0), offset, true, &mut |item| {
            // Of `.` and `..` the kernel takes the number and the kind only.
            let attr = match &item.stat {
                Some(stat) => file_attr(stat),
                None => FileAttr { ino: INodeNo(item.ino.0), kind: file_type(item.kind), ..no_entry() },
            };
            let ttl = item.stat.as_ref().map_or(FOREVER, ttl);
            !reply.add(attr.ino, item.cookie, OsStr::from_bytes(item.name), &ttl, &attr, GENERATION)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno.into()),
        }
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.fs.release_folder(FolderHandle(handle.0));
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, number: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply_empty(self.fs.fsync(ino(number)), reply);
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        match self.space() {
            Ok(s) => reply.statfs(
                s.f_blocks,
                s.f_bfree,
                s.f_bavail,
                s.f_files,
                s.f_ffree,
                s.f_bsize as u32,
                crate::attr::MAX_NAME as u32,
                s.f_frsize as u32,
            ),
            Err(errno) => reply.error(errno.into()),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        number: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        reply_empty(Front::setxattr(self, asked(request), ino(number), name.as_bytes(), value, flags), reply);
    }

    fn getxattr(&self, _: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        reply_value(Front::getxattr(self, ino(number), name.as_bytes(), size), reply);
    }

    fn listxattr(&self, request: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        reply_value(Front::listxattr(self, asked(request), ino(number), size), reply);
    }

    fn removexattr(&self, request: &Request, number: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(Front::removexattr(self, asked(request), ino(number), name.as_bytes()), reply);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        match Front::create(self, asked(request), ino(parent), name.as_bytes(), (mode, umask), flags) {
            Ok((stat, opened)) => {
                let (ttl, attr, flags) = (ttl(&stat), file_attr(&stat), open_flags(opened.flags));
                let handle = FileHandle(opened.handle);
                let Some(backing) = opened.backing else {
                    return reply.created(&ttl, &attr, GENERATION, handle, flags);
                };
                // SAFETY: the number is this session's, and closed only after the file's last descriptor.
                #[allow(unsafe_code)]
                let backing = unsafe { reply.wrap_backing(backing.0) };
                reply.created_passthrough(&ttl, &attr, GENERATION, handle, flags, &backing);
                let _ = backing.into_raw();
            }
            Err(errno) => reply.error(errno.into()),
        }
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(fuser::Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        reply_empty(self.fs.allocate(ino(number), mode, offset, length), reply);
    }

    fn lseek(&self, _: &Request, number: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        match self.seek(ino(number), offset, whence) {
            Ok(found) => reply.offset(found as i64),
            Err(errno) => reply.error(errno.into()),
        }
    }

    fn copy_file_range(
        &self,
        _: &Request,
        ino_in: INodeNo,
        _: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _: FileHandle,
        offset_out: u64,
        length: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply_written(self.copy_range((ino(ino_in), offset_in), (ino(ino_out), offset_out), length), reply);
    }
}
