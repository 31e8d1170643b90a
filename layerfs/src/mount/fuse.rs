//! The FUSE library: mounting, greeting the kernel, and telling it what it can't know.
//!
//! Requests it never sees: they are read, or come by io_uring, beside it.
//!
//! Everything is cached by the kernel without limit of time, entries that aren't there too: whatever changes this
//! filesystem comes through this mount, so that the kernel knows. What it can't know (a write cleared setuid; a seal)
//! is notified. A read-only mount answers OPEN and OPENDIR with ENOSYS: warm, it sends nothing at all.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{Config, Filesystem, INodeNo, InitFlags, KernelConfig, MountOption, Notifier, Request, SessionACL};

use super::front::Front;
use super::fs::{Fs, Pages};
use super::uring::{self, Memory};
use super::{Flags, Transport, descriptor, device};
use crate::error::{Error, Result};
use crate::id::Ino;

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
    /// What the kernel shall keep of it from the first moment, as far as the library knows it.
    pub flags: Flags,
    /// Where the store is: for `statfs` of a read-only mount.
    pub store_folder: PathBuf,
}

/// A mount that isn't served yet.
pub(super) struct Session {
    session: fuser::Session<Heard>,
    front: Arc<Front>,
    kernel: Kernel,
    /// How many threads read, at most.
    threads: usize,
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
    /// [`Error::Platform`] if io_uring is asked for and not to be had.
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
        Ok(Session::new(session, front, options.threads, memory.map(Arc::new)))
    }

    /// Goes on with the mount that `kept` is what a daemon that died had of it.
    ///
    /// # Errors
    /// [`Error::Platform`] if this kernel can't send requests again.
    pub fn resume(fs: Arc<Fs>, options: &FuseOptions, kept: &[OwnedFd]) -> Result<Session> {
        let failed = |error: std::io::Error| match error.raw_os_error() {
            Some(libc::EINVAL) => {
                let detail = "it needs Linux 6.9 to send requests again".to_owned();
                Error::Platform { what: "taking over a mount", detail }
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
        Ok(Session::new(session, front, options.threads, memory.map(Arc::new)))
    }

    fn new(session: fuser::Session<Heard>, front: Arc<Front>, threads: usize, memory: Option<Arc<Memory>>) -> Session {
        let kernel = Kernel(session.notifier());
        let _ = front.kernel.set(kernel.clone());
        Session { session, front, kernel, threads, memory }
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
        let served = match &self.memory {
            Some(memory) => uring::serve(&self.front, memory, self.session.as_fd(), dir),
            None => device::serve(&self.front, self.session.as_fd(), self.threads),
        };
        // The session is dropped here, and unmounts what it takes for its own.
        served.and(descriptor::hang_up(self.session.as_fd()))
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
        // An ordinary user's has neither devices nor setuid anyway.
        let either = |flag, set, unset| if self.flags.contains(flag) { Some(set) } else { unset };
        let unset = |option| self.is_root.then_some(option);
        mount_options.extend(either(Flags::NO_DEV, MountOption::NoDev, unset(MountOption::Dev)));
        mount_options.extend(either(Flags::NO_SUID, MountOption::NoSuid, unset(MountOption::Suid)));
        mount_options.extend(either(Flags::NO_EXEC, MountOption::NoExec, None));
        mount_options.extend(either(Flags::NO_ATIME, MountOption::NoAtime, None));
        mount_options.push(if is_writable { MountOption::RW } else { MountOption::RO });
        config.mount_options = mount_options;
        config.acl = if self.allow_other { SessionACL::All } else { SessionACL::Owner };
        config
    }
}

impl Pages for Kernel {
    fn store(&self, ino: Ino, bytes: &[u8]) {
        self.send(self.0.store(INodeNo(ino.0), 0, bytes));
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

/// What the library calls, once.
struct Heard {
    front: Arc<Front>,
    /// Whether requests may come by io_uring, and whether the kernel has agreed.
    wants_ring: bool,
    has_ring: Arc<AtomicBool>,
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
            InitFlags::FUSE_EXPORT_SUPPORT,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_NO_OPEN_SUPPORT,
            InitFlags::FUSE_NO_OPENDIR_SUPPORT,
            InitFlags::FUSE_PASSTHROUGH,
        ];
        // With it the kernel leaves out who asks, which a private mount looks at. Only root can map the ids of a mount.
        let mapped = self.front.owner.is_none().then_some(InitFlags::FUSE_ALLOW_IDMAP);
        for flag in wanted.into_iter().chain(mapped) {
            if let Err(missing) = config.add_capabilities(flag) {
                tracing::debug!(?missing, "this kernel lacks a feature of FUSE");
            }
        }
        // An overlay may lie over the mount.
        let _ = config.set_max_stack_depth(1);
        let mut max_write = device::DATA_BYTES as u32;
        if self.wants_ring && config.add_capabilities(InitFlags::FUSE_OVER_IO_URING).is_ok() {
            self.has_ring.store(true, Ordering::Relaxed);
            max_write = uring::PAYLOAD_BYTES as u32;
            let _ = config.set_max_readahead(max_write);
        }
        let _ = config.set_max_write(max_write);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }
}
