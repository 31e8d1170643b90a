//! Helper processes: this program once more, for what a thread of the daemon must not wait for.
//!
//! Who waits for a FUSE filesystem that has read his request, or for pages that it has to take, can't be killed. A daemon that waits so
//! for a filesystem that it serves itself would, killed then, hold its store and its descriptors for ever, and no next daemon could
//! answer. Threads apart don't help: the process waits for all of them. So a process of its own waits: the [`hand`] for the hidden
//! mount, the [`notifier`] for the one that people see. Hides how they are started. Invariant: a helper has nothing of the daemon's but
//! what is handed to it here.

use std::ffi::OsString;
use std::io::{ErrorKind, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};

use super::hidden::hand;
use super::notifier;
use crate::packets::{receive, send};

/// What a helper is for: the first that it hears. Descriptors come along.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Part {
    Hand,
    Notifier(notifier::Spot),
}

static ARGUMENTS: OnceLock<Vec<OsString>> = OnceLock::new();

/// This program, started with `arguments`, is a helper: it calls [`run`] with its standard input. Without such a program files that are
/// copied up by range have no writeback cache, and a process that is killed while it seals may not be able to die. Once for a process.
pub fn is_started_by(arguments: Vec<OsString>) {
    let _ = ARGUMENTS.set(arguments);
}

/// Whether a helper can be started.
pub(super) fn is_possible() -> bool {
    ARGUMENTS.get().is_some()
}

/// The helper's process: does what it is told through `socket` until nobody is at the other end.
///
/// # Errors
/// If it isn't told first what it is for.
pub fn run(socket: OwnedFd) -> Result<()> {
    match receive(socket.as_fd())?.ok_or(ErrorKind::UnexpectedEof)? {
        (Part::Hand, descriptors) => hand::run(socket, descriptors),
        (Part::Notifier(spot), descriptors) => notifier::run(socket, &spot, descriptors),
    }
}

/// Starts a helper. It ends when the socket is closed, and is to be reaped then.
pub(super) fn start(part: &Part, descriptors: &[BorrowedFd<'_>]) -> Result<(OwnedFd, Child)> {
    let arguments = ARGUMENTS.get().ok_or(ErrorKind::Unsupported)?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // The program as it runs, even if its file was replaced since.
    let mut command = Command::new("/proc/self/exe");
    command.args(arguments).current_dir("/").process_group(0);
    let child = command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    // It holds the other end.
    drop(command);
    send(ours.as_fd(), part, descriptors)?;
    Ok((ours, child))
}
