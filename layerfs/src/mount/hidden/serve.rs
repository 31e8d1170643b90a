//! Serves the hidden mount: what the kernel reads and writes back.
//!
//! Threads of its own, which wait in `read` and are woken one at a time. They wait for the filesystem's locks, and for nothing that
//! waits for them. Memory: a thread has room for one request and one answer, half a MiB.
//! That for requests is resident from the start.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use super::DATA_BYTES;
use super::hand::HOLD_NAME;
use super::nodes::{Known, Nodes};
use crate::attr::{Attrs, FileKind};
use crate::id::Ino;
use crate::mount::abi::{self, Answer, Operation, Request, Short, answer_header};
use crate::mount::caller::Caller;
use crate::mount::errno::{Errno, FsResult, fail};
use crate::mount::fs::{Fs, SetAttr, SetTime, Stat};
use crate::upper::table::Stamp;

const HEADERS_BYTES: usize = 4096;
const ROOT: u64 = 1;
const SET_SIZE: u32 = 1 << 3;
const SET_MTIME: u32 = 1 << 5;
/// Where the answer to a look-up tells for how long the name is valid.
const NAME_TTL: std::ops::Range<usize> = 16..24;
const PR_SET_IO_FLUSHER: i32 = 57;

/// What a thread works with.
pub(super) struct Served {
    nodes: Arc<Nodes>,
    device: Arc<OwnedFd>,
    fs: Weak<Fs>,
    /// The hand's process.
    hand: Arc<AtomicU32>,
}

/// How a request ends.
enum End {
    Answered,
    /// Nobody waits for an answer, or it comes later.
    Silent,
}

/// Answers a request that waited for the end of a hold.
pub(super) fn let_go(device: &OwnedFd, number: u64) {
    write(device, number, libc::EBUSY, &[]);
}

fn write(device: &OwnedFd, number: u64, errno: i32, data: &[u8]) {
    let header = answer_header(number, errno, data.len());
    match rustix::io::writev(device, &[IoSlice::new(&header), IoSlice::new(data)]) {
        // Who asked has gone, or the mount.
        Ok(_) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV) => {}
        Err(error) => tracing::warn!(%error, "the kernel didn't take an answer"),
    }
}

impl Served {
    pub fn new(nodes: Arc<Nodes>, device: Arc<OwnedFd>, fs: Weak<Fs>, hand: Arc<AtomicU32>) -> Served {
        Served { nodes, device, fs, hand }
    }

    /// Serves until the mount ends.
    pub fn work(&self) {
        // What it allocates must not wait for what it has to write back. Without the right to say so it works too.
        // SAFETY: this request takes numbers, and changes only how this thread's memory is allocated.
        #[allow(unsafe_code)]
        let _ = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
        // Resident from the start: a thread that is killed while the kernel waits for a page would fail the request that it reads.
        let mut request = vec![1; DATA_BYTES + HEADERS_BYTES];
        let mut room = vec![0; DATA_BYTES];
        loop {
            let bytes = match rustix::io::read(&self.device, &mut request) {
                Ok(bytes) => bytes,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT | rustix::io::Errno::AGAIN) => continue,
                Err(_) => return,
            };
            match (Request::whole(&request[..bytes]), self.fs.upgrade()) {
                (Ok(request), Some(fs)) => self.answer(&fs, &request, &mut room),
                // It has ended, and its last files are just being closed.
                (Ok(request), None) => self.refuse(&request),
                (Err(Short), _) => {
                    if let Ok(number) = abi::long(&request[..bytes], 8) {
                        write(&self.device, number, libc::EINVAL, &[]);
                    }
                }
            }
        }
    }

    fn refuse(&self, request: &Request<'_>) {
        let errno = match request.operation {
            Operation::Forget | Operation::BatchForget => return,
            Operation::Flush | Operation::Other => libc::ENOSYS,
            _ => libc::EIO,
        };
        write(&self.device, request.asked.number, errno, &[]);
    }

    fn answer(&self, fs: &Fs, request: &Request<'_>, room: &mut [u8]) {
        let mut answer = Answer::new(room);
        let perform = AssertUnwindSafe(|| {
            fs.with_room(request.operation.takes_room(), || self.perform(fs, request, &mut answer))
        });
        let performed = catch_unwind(perform);
        let (errno, bytes) = match performed {
            Ok(Ok(End::Silent)) => return,
            Ok(Ok(End::Answered)) => (0, answer.bytes()),
            Ok(Err(errno)) => {
                if matches!(request.operation, Operation::Read | Operation::Write | Operation::Setattr) {
                    let (node, what) = (request.ino.0, request.operation);
                    tracing::warn!(node, ?what, ?errno, "a hidden file can't be read or written back");
                }
                (errno.0, 0)
            }
            // A mistake of ours shall cost one request, not the mount.
            Err(_) => (libc::EIO, 0),
        };
        write(&self.device, request.asked.number, errno, &room[..bytes]);
    }

    fn perform(&self, fs: &Fs, request: &Request<'_>, answer: &mut Answer<'_>) -> FsResult<End> {
        let number = request.ino.0;
        match request.operation {
            Operation::Forget => {
                self.nodes.forget(number, request.long(0));
                return Ok(End::Silent);
            }
            Operation::BatchForget => {
                let (pairs, _) = request.rest().as_chunks::<16>();
                for pair in pairs.iter().take(request.word(0) as usize) {
                    let [node, count] = [0, 8].map(|at| abi::long(pair, at).unwrap_or(0));
                    self.nodes.forget(node, count);
                }
                return Ok(End::Silent);
            }
            Operation::Lookup => {
                let name = request.name()?.0;
                let node = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok()).unwrap_or(0);
                let known = self.nodes.look_up(node).ok_or(Errno(libc::ENOENT))?;
                // The name is good for one look: so the kernel forgets the file as soon as nobody uses it.
                let mut entry = [0; 128];
                let mut filled = Answer::new(&mut entry);
                let has_room = filled.entry(&shown(node, known.born));
                entry[NAME_TTL].fill(0);
                return answered(has_room && answer.put(&entry));
            }
            Operation::Getattr if number == ROOT => return answered(answer.attr(&root())),
            Operation::Setxattr => {
                let is_hold = request.name()?.0 == HOLD_NAME.as_bytes();
                if is_hold && self.nodes.hold(number, request.asked.number) {
                    return Ok(End::Silent);
                }
                return fail(libc::EBUSY);
            }
            Operation::Destroy => return Ok(End::Answered),
            _ => {}
        }
        let known = self.nodes.get(number).ok_or(Errno(libc::ESTALE))?;
        self.perform_on(fs, request, (number, known), answer)
    }

    /// Whether the hand that there is now asks. One that a daemon before us had may come late with what was done again since.
    fn is_of_hand(&self, request: &Request<'_>) -> bool {
        let (thread, hand) = (request.asked.caller.pid, self.hand.load(Ordering::Acquire));
        thread == 0 || Path::new(&format!("/proc/{hand}/task/{thread}")).exists()
    }

    fn perform_on(
        &self,
        fs: &Fs,
        request: &Request<'_>,
        (number, known): (u64, Known),
        answer: &mut Answer<'_>,
    ) -> FsResult<End> {
        let ino = known.ino;
        let has_room = match request.operation {
            Operation::Getattr => answer.attr(&shown(number, known.born)),
            Operation::Setattr if request.word(0) & SET_SIZE != 0 && !self.is_of_hand(request) => {
                return fail(libc::ESTALE);
            }
            Operation::Fallocate if !self.is_of_hand(request) => return fail(libc::ESTALE),
            Operation::Setattr => {
                let stamp = set(fs, request, known)?;
                answer.attr(&shown(number, stamp))
            }
            Operation::Read if known.is_dead => true,
            Operation::Read => {
                let (offset, size) = (request.long(8), request.word(16) as usize);
                let room = answer.room(size);
                // Whoever asked first isn't the only one who wants the page: so nobody gives up.
                let bytes = fs.read(ino, offset, room)?;
                answer.filled(bytes);
                true
            }
            Operation::Write => {
                let (offset, size) = (request.long(8), request.word(16) as usize);
                let data = request.rest().get(..size).ok_or(Short)?;
                let bytes = if known.is_dead { size } else { fs.write_back(ino, offset, data)? };
                answer.count(bytes as u32)
            }
            Operation::Fsync if known.is_dead => true,
            Operation::Fsync => fs.fsync(ino).map(|()| true)?,
            Operation::Fallocate => {
                let (offset, bytes, mode) = (request.long(8), request.long(16), request.word(24) as i32);
                fs.allocate(ino, mode, offset, bytes).map(|()| true)?
            }
            // Opening, closing and attributes are nothing to us: the kernel doesn't ask again.
            _ => return fail(libc::ENOSYS),
        };
        answered(has_room)
    }
}

fn answered(has_room: bool) -> FsResult<End> {
    if has_room { Ok(End::Answered) } else { fail(libc::EIO) }
}

/// Sets what the kernel says of a file: its length, and the time of its last change, if nobody looks at the file for that. Returns
/// what it is to hear.
fn set(fs: &Fs, request: &Request<'_>, known: Known) -> FsResult<Stamp> {
    let mut stamp = known.born;
    let given = |bit: u32| request.word(0) & bit != 0;
    let (sets_size, sets_mtime) = (given(SET_SIZE), given(SET_MTIME));
    let mut wanted = SetAttr::default();
    if sets_size {
        stamp.bytes = request.long(16);
        wanted.size = Some(stamp.bytes);
    }
    if sets_mtime {
        stamp.mtime = request.time(40, 60);
        if sets_size || !known.is_looked_at {
            wanted.mtime = Some(SetTime::To(stamp.mtime));
        }
    }
    if wanted != SetAttr::default() && !known.is_dead {
        fs.setattr(known.ino, wanted, Caller::ROOT)?;
    }
    Ok(stamp)
}

fn shown(number: u64, stamp: Stamp) -> Stat {
    let attrs = Attrs { permissions: 0o600, mtime: stamp.mtime, ctime: stamp.mtime, ..Attrs::default() };
    let (ino, size, blocks) = (Ino(number), stamp.bytes, stamp.bytes.div_ceil(512));
    Stat { ino, kind: FileKind::File, nlink: 1, attrs, size, blocks, rdev: 0, may_change: false }
}

fn root() -> Stat {
    let attrs = Attrs { permissions: 0o700, ..Attrs::default() };
    Stat { ino: Ino(ROOT), kind: FileKind::Folder, nlink: 2, attrs, size: 0, blocks: 0, rdev: 0, may_change: false }
}
