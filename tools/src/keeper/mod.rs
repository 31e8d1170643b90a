//! The keeper: a small process that holds what the kernel knows a mount by, so that the mount outlives its daemon.
//!
//! A daemon gives each mount's descriptor to the keeper. If the daemon dies, or hangs, the keeper starts another, which
//! takes the descriptors and goes on: programs see a pause. Invariants: the keeper does nothing that can fail or wait
//! for a mount; it ends when it has nothing to keep and no daemon; a keeper and a daemon of different versions
//! understand each other as long as [`PROTOCOL`] is the same.

mod client;
mod process;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use rustix::process::{Flock, FlockType, fcntl_getlk};
use serde::{Deserialize, Serialize};

pub use client::{Asked, Keeping, KeptId, Left};
pub use process::run;

use crate::autostart;
use crate::failure::{Failure, Result};

/// The version of what daemon and keeper say to each other.
const PROTOCOL: u32 = 1;

/// What they say. Each is one packet of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// The daemon's first word, and how to start another like it; nothing if somebody else does that.
    Hello { protocol: u32, pid: u32, restart: Option<Restart> },
    /// The daemon has a new mount. Its descriptors come along.
    Keep { id: u64, dir: Bytes },
    /// A mount has ended.
    Drop { id: u64 },
    /// The daemon wants everything that is kept.
    Take,
    /// One that is kept. Its descriptors come along.
    Kept { id: u64, dir: Bytes },
    /// That was all.
    End,
    /// The keeper asks whether the daemon still works.
    Ping,
    /// It does.
    Pong,
}

/// How to start a daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Restart {
    program: Bytes,
    arguments: Vec<Bytes>,
    log: Bytes,
}

impl Restart {
    fn start(&self) -> std::io::Result<Child> {
        let mut command = Command::new(self.program());
        command.args(self.arguments.iter().map(Bytes::text)).stdin(Stdio::null()).stdout(Stdio::null());
        let log = OpenOptions::new().append(true).open(self.log.path());
        command.stderr(log.map_or_else(|_| Stdio::null(), Stdio::from));
        command.spawn()
    }

    /// The program that is there now: an upgrade may have replaced the file that the last daemon ran.
    fn program(&self) -> PathBuf {
        let bytes = &self.program.0;
        Bytes(bytes.strip_suffix(b" (deleted)").unwrap_or(bytes).to_vec()).path()
    }
}

/// A path or an argument, which need not be UTF-8.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct Bytes(Vec<u8>);

impl<T: AsRef<std::ffi::OsStr>> From<T> for Bytes {
    fn from(text: T) -> Bytes {
        Bytes(text.as_ref().as_bytes().to_vec())
    }
}

impl Bytes {
    fn path(&self) -> PathBuf {
        PathBuf::from(self.text())
    }

    fn text(&self) -> OsString {
        OsString::from_vec(self.0.clone())
    }
}

/// Where the keeper of a store listens, or a symbolic link to it.
fn socket_path(store: &Path) -> PathBuf {
    store.join("keeper.sock")
}

/// What a keeper has locked while it keeps mounts. Whoever calls it on its socket is taken for the next daemon; who asks for the lock
/// bothers nobody, and a keeper that is killed leaves none.
fn lock_path(store: &Path) -> PathBuf {
    store.join("daemon.keeper")
}

/// Says that this process keeps mounts of `store`, until what is returned is dropped.
fn lock(store: &Path) -> std::io::Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(lock_path(store))?;
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// The process of the keeper that keeps mounts of `store`; none if no mount is kept.
pub fn holder(store: &Path) -> Option<i32> {
    let file = File::open(lock_path(store)).ok()?;
    let held = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock)).ok()??;
    Some(held.pid?.as_raw_nonzero().get())
}

fn packet_socket() -> std::io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn address(path: &Path) -> Result<SocketAddrUnix> {
    SocketAddrUnix::new(path).map_err(|e| Failure::file("use as a socket", path, std::io::Error::from(e)))
}

/// Connects to the keeper of `store`, if one runs.
fn connect(store: &Path) -> Result<Option<OwnedFd>> {
    let path = socket_path(store);
    let path = std::fs::read_link(&path).unwrap_or(path);
    // Also a path that is too long for a socket: a keeper would have left a link there.
    if !path.exists() {
        return Ok(None);
    }
    let failed = |e: std::io::Error| Failure::file("connect to the keeper at", &path, e);
    let socket = packet_socket().map_err(failed)?;
    match rustix::net::connect(&socket, &address(&path)?) {
        Ok(()) => Ok(Some(socket)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Listens as the keeper of `store`.
fn listen(store: &Path) -> Result<(OwnedFd, Vec<PathBuf>)> {
    let link = socket_path(store);
    let real = autostart::bindable_path(&link)?;
    let failed = |e: std::io::Error| Failure::file("listen on", &real, e);
    let mut paths = vec![real.clone()];
    paths.iter().chain([&link]).for_each(|path| drop(std::fs::remove_file(path)));
    let socket = packet_socket().map_err(failed)?;
    let old = rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o177));
    let bound = rustix::net::bind(&socket, &address(&real)?);
    rustix::process::umask(old);
    bound.map_err(|e| failed(e.into()))?;
    rustix::net::listen(socket.as_fd(), 8).map_err(|e| failed(e.into()))?;
    if real != link {
        std::os::unix::fs::symlink(&real, &link).map_err(failed)?;
        paths.push(link);
    }
    Ok((socket, paths))
}
