//! The notifier: a [`helper`] that fetches what programs wrote through mappings, for the moment of a seal.
//!
//! The kernel sends a mapped file's pages when it is told that what it has of the file is out of date, and whoever tells it waits
//! until all of them are answered. This process waits instead of the daemon: killed then, that dies, and the next one answers. To tell the
//! kernel takes the device, and while somebody has that open the kernel keeps the connection, also for whom nobody answers. Invariants:
//!
//! - The process lives while a seal fetches, and no longer. It has the device and nothing else of the daemon's.
//! - Once neither the daemon is there nor the keeper, it ends the connection: what it waits for ends with that.
//! - What it is told may be done twice: another is told again if it dies.

use std::ffi::OsStr;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Child;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use serde::{Deserialize, Serialize};

use super::abi::{self, answer_header};
use super::helper::{self, Part};
use super::{descriptor, device, point};
use crate::error::io_errno;
use crate::id::Ino;
use crate::packets::{receive, send};

/// So many notifiers may die of one seal.
const TRIES: usize = 5;
const INVALIDATE_INODE: i32 = 2;

/// Which mount it is, as the notifier's process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Spot {
    /// Its folder's path.
    dir: Vec<u8>,
    /// Its device number, if that is known.
    number: Option<u64>,
}

/// A mount that pages are fetched of.
#[derive(Debug)]
pub(super) struct Target {
    spot: Spot,
    device: OwnedFd,
    keeper: Option<OwnedFd>,
}

/// What the notifier does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Order {
    /// Has the kernel begin to send what it has of all files.
    Sync,
    /// Has it send what it has of this one, and drop its pages.
    Fetch(u64),
}

/// What came of an order: 0 if all went well.
#[derive(Debug, Serialize, Deserialize)]
struct Done {
    errno: i32,
}

impl Target {
    /// The mount on `dir` with device number `number`, whose connection is `device`. `keeper` stands for the process that keeps it beyond
    /// this one's end.
    pub fn new(dir: &Path, number: Option<u64>, device: OwnedFd, keeper: Option<OwnedFd>) -> Target {
        Target { spot: Spot { dir: dir.as_os_str().as_bytes().to_vec(), number }, device, keeper }
    }

    /// Has the kernel send what programs wrote to `files` through mappings; all of it has been answered when this returns.
    ///
    /// # Errors
    /// Those of starting a process; one that ends again and again.
    pub fn fetch_written(&self, files: &[Ino]) -> Result<()> {
        for _ in 0..TRIES {
            let notifier = Notifier::start(self)?;
            let fetched = notifier.tell_all(files);
            if notifier.end(fetched) {
                return Ok(());
            }
        }
        Err(Error::new(
            ErrorKind::BrokenPipe,
            "the process that fetches what was written to files ends again and again",
        ))
    }
}

/// The daemon's side.
struct Notifier {
    socket: OwnedFd,
    child: Child,
}

impl Notifier {
    fn start(target: &Target) -> Result<Notifier> {
        let daemon = pidfd_open(getpid(), PidfdFlags::empty())?;
        let descriptors = [&target.device, &daemon].into_iter().chain(&target.keeper).map(AsFd::as_fd);
        let part = Part::Notifier(target.spot.clone());
        let (socket, child) = helper::start(&part, &descriptors.collect::<Vec<_>>())?;
        Ok(Notifier { socket, child })
    }

    fn tell_all(&self, files: &[Ino]) -> Result<()> {
        // All at once first: the kernel sends those of one file page by page.
        let fetch = files.iter().map(|ino| Order::Fetch(ino.0));
        std::iter::once(Order::Sync).chain(fetch).try_for_each(|order| self.tell(order))
    }

    /// Fails if the notifier's process does.
    fn tell(&self, order: Order) -> Result<()> {
        send(self.socket.as_fd(), &order, &[])?;
        let (Done { errno }, _) = receive(self.socket.as_fd())?.ok_or(ErrorKind::UnexpectedEof)?;
        match errno {
            // The kernel has forgotten the file: all of it is written back.
            0 | libc::ENOENT => {}
            errno => tracing::debug!(?order, errno, "the kernel didn't fetch what was written"),
        }
        Ok(())
    }

    /// Lets it end. Returns whether all was done.
    fn end(mut self, fetched: Result<()>) -> bool {
        drop(self.socket);
        // One that died has; another has nothing left to wait for.
        let _ = self.child.wait();
        fetched.inspect_err(|error| tracing::warn!(%error, "a notifier has died")).is_ok()
    }
}

/// The notifier's process: does what it is told through `socket` until nobody is at the other end. It is handed the device, what
/// stands for the daemon's process, and perhaps for the keeper's.
///
/// # Errors
/// If it isn't; no more threads.
pub(super) fn run(socket: OwnedFd, spot: &Spot, descriptors: Vec<OwnedFd>) -> Result<()> {
    let mut descriptors = descriptors.into_iter();
    let (Some(device), Some(daemon)) = (descriptors.next(), descriptors.next()) else {
        return Err(ErrorKind::InvalidData.into());
    };
    let (watched, number) = (device.try_clone()?, spot.number);
    let watch = move || {
        // Each of them could answer, or start who answers.
        std::iter::once(daemon).chain(descriptors).for_each(|process| until_ended(process.as_fd()));
        end_connection(&watched, number);
    };
    // It ends with the process.
    std::thread::Builder::new().name("notifier-watch".to_owned()).spawn(watch)?;
    while let Ok(Some((order, _))) = receive::<Order>(socket.as_fd()) {
        let done = match order {
            Order::Sync => point::sync(Path::new(OsStr::from_bytes(&spot.dir)), spot.number),
            Order::Fetch(ino) => fetch(&device, ino),
        };
        let errno = done.map_or_else(|error| io_errno(&error), |()| 0);
        if send(socket.as_fd(), &Done { errno }, &[]).is_err() {
            break;
        }
    }
    Ok(())
}

/// Tells the kernel that all that it has of `ino` is out of date: it writes back what is dirty first.
fn fetch(device: &OwnedFd, ino: u64) -> Result<()> {
    let words = [ino, 0, 0].map(u64::to_ne_bytes).concat();
    let mut notification = answer_header(0, -INVALIDATE_INODE, words.len()).to_vec();
    notification.extend(words);
    rustix::io::write(device, &notification)?;
    Ok(())
}

fn until_ended(process: BorrowedFd<'_>) {
    let mut polled = [PollFd::new(&process, PollFlags::IN)];
    while poll(&mut polled, None) == Err(rustix::io::Errno::INTR) {}
}

/// Ends a connection that nobody answers any more.
fn end_connection(device: &OwnedFd, number: Option<u64>) {
    if !number.is_some_and(|number| point::cut(device.as_fd(), number)) {
        refuse_all(device);
    }
}

/// Answers all that the kernel asks, and has asked who is gone, until the connection ends: there is nobody.
fn refuse_all(device: &OwnedFd) {
    // Kernels that can't send again are asked for what is new at least.
    let _ = descriptor::resend(device);
    let mut request = vec![0; device::REQUEST_BYTES];
    loop {
        let mut polled = [PollFd::new(device, PollFlags::IN)];
        let _ = poll(&mut polled, None);
        match rustix::io::read(device, &mut request) {
            Ok(bytes) => {
                if let Ok(number) = abi::long(&request[..bytes], 8) {
                    // What waits for no answer doesn't get one.
                    let _ = rustix::io::write(device, &answer_header(number, libc::ENOTCONN, 0));
                }
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT | rustix::io::Errno::AGAIN) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::print_stderr)] // a test that can't run says so

    use std::sync::mpsc::channel;
    use std::time::Duration;

    use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, statx};
    use rustix::io::Errno;

    use super::*;
    use crate::mount::hidden::place::Place;

    #[test]
    fn what_nobody_answers_is_refused() {
        let Ok(Place { device, root }) = Place::make() else {
            eprintln!("NOT RUN: a mount in no folder can't be had");
            return;
        };
        // Else it would wait here for the answer.
        let found = statx(&root, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::empty()).unwrap();
        let number = libc::makedev(found.stx_dev_major, found.stx_dev_minor);
        let (send, receive) = channel();
        let look = std::thread::spawn(move || {
            for name in ["read and not answered", "asked later"] {
                let opened = openat(&root, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
                send.send(opened.map(drop)).unwrap();
            }
        });
        assert!(rustix::io::read(&device, &mut vec![0; device::REQUEST_BYTES]).unwrap() > 0);
        let twin = device.try_clone().unwrap();
        // It ends with the connection.
        let refusing = std::thread::spawn(move || refuse_all(&device));
        let refused: Vec<_> = (0..2).map(|_| receive.recv_timeout(Duration::from_secs(30))).collect();
        if refused.iter().any(std::result::Result::is_err) {
            point::cut(twin.as_fd(), number);
        }
        look.join().unwrap();
        refusing.join().unwrap();
        assert_eq!(refused, [Ok(Err(Errno::NOTCONN)); 2]);
    }
}
