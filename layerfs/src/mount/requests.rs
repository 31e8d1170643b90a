//! What answers a request, from bytes to bytes: it decodes, calls [`Front`], encodes.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::abi::{Answer, Dirent, Operation, Request, Short};
use crate::attr::{Attrs, FileKind};
use crate::id::Ino;
use crate::mount::errno::{Errno, FsResult, fail};
use crate::mount::front::{Front, Value};
use crate::mount::fs::{FolderHandle, SetAttr, SetTime, Stat};

/// The bits of what SETATTR sets.
const SET_MODE: u32 = 1 << 0;
const SET_UID: u32 = 1 << 1;
const SET_GID: u32 = 1 << 2;
const SET_SIZE: u32 = 1 << 3;
const SET_ATIME: u32 = 1 << 4;
const SET_MTIME: u32 = 1 << 5;
const SET_ATIME_NOW: u32 = 1 << 7;
const SET_MTIME_NOW: u32 = 1 << 8;
/// The flags of WRITE: the kernel writes back what it has, and a write clears setuid and setgid.
const WRITE_CACHE: u32 = 1 << 0;
const WRITE_CLEARS_BITS: u32 = 1 << 2;

impl From<Short> for Errno {
    fn from(_: Short) -> Errno {
        Errno(libc::EINVAL)
    }
}

/// Performs `request`: the error number of the answer (0: none), and how much of `room` it takes. None if the kernel waits for
/// no answer.
pub(super) fn perform(front: &Front, request: &Request<'_>, room: &mut [u8]) -> Option<(i32, usize)> {
    front.fs.look_again();
    let mut result = Answer::new(room);
    // A mistake of ours shall cost one request, not the mount.
    let performed = catch_unwind(AssertUnwindSafe(|| match request.operation {
        operation if operation.is_forget() => {
            forget(front, request);
            None
        }
        _ if is_refused(front, request) => Some(fail(libc::EACCES)),
        operation => {
            // What is done to a hidden file lets the kernel write back first.
            let can_be_repeated = operation.takes_room() && !front.fs.is_hidden(request.ino);
            Some(front.fs.with_room(can_be_repeated, || answer(front, request, &mut result)))
        }
    }));
    match performed {
        Ok(None) => None,
        Ok(Some(Ok(()))) => Some((0, result.bytes())),
        Ok(Some(Err(errno))) => Some((errno.0, 0)),
        Err(_) if request.operation.is_forget() => None,
        Err(_) => Some((libc::EIO, 0)),
    }
}

/// Whether the mount is somebody else's than whoever asks. The kernel sees to that too, but may be told to let the superuser in. What
/// it does by itself it does in nobody's name.
fn is_refused(front: &Front, request: &Request<'_>) -> bool {
    let by_itself = matches!(
        request.operation,
        Operation::Destroy
            | Operation::Interrupt
            | Operation::Read
            | Operation::Write
            | Operation::Readdir
            | Operation::Readdirplus
            | Operation::Fsync
            | Operation::Fsyncdir
            | Operation::Flush
            | Operation::Release
            | Operation::Releasedir
    );
    !by_itself && front.owner.is_some_and(|owner| owner != request.asked.caller.uid)
}

/// Does what `request` asks for; the answer's payload goes to `answer`.
pub(super) fn answer(front: &Front, request: &Request<'_>, answer: &mut Answer<'_>) -> FsResult<()> {
    let (asked, ino, fs) = (request.asked, request.ino, &front.fs);
    let has_room = match request.operation {
        Operation::Lookup => answer.entry(&fs.lookup(ino, request.name()?.0)?.unwrap_or_else(no_entry)),
        Operation::Getattr => answer.attr(&fs.getattr(ino)?),
        Operation::Setattr => answer.attr(&front.setattr(asked, ino, set_attr(request))?),
        Operation::Readlink => answer.put(&fs.readlink(ino)?),
        Operation::Symlink => {
            let (name, target) = request.names()?;
            answer.entry(&front.symlink(asked, ino, name, target)?)
        }
        Operation::Mknod => {
            let (mode, rdev, umask) = (request.word(0), request.word(4), request.word(8));
            answer.entry(&front.make(asked, ino, request.name()?.0, mode, umask, rdev)?)
        }
        Operation::Mkdir => {
            let made = front.make_folder(asked, ino, request.name()?.0, request.word(0), request.word(4));
            answer.entry(&made?)
        }
        Operation::Unlink => front.unlink(asked, ino, request.name()?.0).map(|()| true)?,
        Operation::Rmdir => front.rmdir(asked, ino, request.name()?.0).map(|()| true)?,
        Operation::Rename | Operation::Rename2 => {
            let (from, to) = request.names()?;
            let flags = if request.operation == Operation::Rename2 { request.word(8) } else { 0 };
            front.rename(asked, (ino, from), (Ino(request.long(0)), to), flags).map(|()| true)?
        }
        Operation::Link => answer.entry(&front.link(asked, Ino(request.long(0)), ino, request.name()?.0)?),
        Operation::Open => answer.opened(&front.open(asked, ino, request.word(0) as i32)?),
        Operation::Create => {
            let (flags, mode, umask) = (request.word(0) as i32, request.word(4), request.word(8));
            let (stat, opened) = front.create(asked, ino, request.name()?.0, (mode, umask), flags)?;
            answer.entry(&stat) && answer.opened(&opened)
        }
        Operation::Tmpfile => {
            let (flags, mode, umask) = (request.word(0) as i32, request.word(4), request.word(8));
            let (stat, opened) = front.make_unnamed(asked, ino, (mode, umask), flags)?;
            answer.entry(&stat) && answer.opened(&opened)
        }
        Operation::Opendir => answer.opened(&front.open_folder(ino)?),
        Operation::Statfs => answer.space(&front.space()?),
        Operation::Release => {
            front.release(asked, ino, request.word(8) as i32);
            true
        }
        Operation::Releasedir => {
            front.release_folder(ino, request.long(0));
            true
        }
        Operation::Fsync => front.fsync(ino).map(|()| true)?,
        Operation::Fsyncdir => fs.fsync(ino).map(|()| true)?,
        Operation::Flush => front.flush(ino).map(|()| true)?,
        Operation::Fallocate => {
            let (offset, bytes, mode) = (request.long(8), request.long(16), request.word(24) as i32);
            front.allocate(ino, mode, offset, bytes).map(|()| true)?
        }
        Operation::Destroy => true,
        // Not to be told again: whether a signal ends who asked is found out otherwise.
        Operation::Interrupt => return fail(libc::ENOSYS),
        Operation::Ioctl => return fail(libc::ENOTTY),
        _ => return answer_data(front, request, answer),
    };
    if has_room { Ok(()) } else { fail(libc::EIO) }
}

/// As [`answer`], for what moves data, attributes and listings.
fn answer_data(front: &Front, request: &Request<'_>, answer: &mut Answer<'_>) -> FsResult<()> {
    let (asked, ino) = (request.asked, request.ino);
    let has_room = match request.operation {
        Operation::Read => {
            let (offset, size) = (request.long(8), request.word(16) as usize);
            let bytes = front.read(asked, ino, offset, answer.room(size))?;
            answer.filled(bytes);
            true
        }
        Operation::Write => {
            let (offset, size, flags) = (request.long(8), request.word(16) as usize, request.word(20));
            let data = request.rest().get(..size).ok_or(Short)?;
            let (clears_bits, writes_back) = (flags & WRITE_CLEARS_BITS != 0, flags & WRITE_CACHE != 0);
            answer.count(front.write(asked, ino, offset, data, clears_bits, writes_back)? as u32)
        }
        Operation::Setxattr => {
            let (size, flags) = (request.word(0) as usize, request.word(4) as i32);
            let (name, rest) = request.name()?;
            let value = rest.get(..size).ok_or(Short)?;
            front.setxattr(asked, ino, name, value, flags).map(|()| true)?
        }
        Operation::Getxattr => value(front.getxattr(ino, request.name()?.0, request.word(0))?, answer),
        Operation::Listxattr => value(front.listxattr(asked, ino, request.word(0))?, answer),
        Operation::Removexattr => front.removexattr(asked, ino, request.name()?.0).map(|()| true)?,
        Operation::Readdir => return list(front, request, false, answer),
        Operation::Readdirplus => return list(front, request, true, answer),
        Operation::Lseek => {
            let found = front.seek(ino, request.long(8) as i64, request.word(16) as i32)?;
            answer.put(&found.to_ne_bytes())
        }
        Operation::CopyFileRange => {
            let from = (ino, request.long(8));
            let to = (Ino(request.long(16)), request.long(32));
            answer.count(front.copy_range(from, to, request.long(40))? as u32)
        }
        // What we don't know the kernel does itself, or does without.
        _ => return fail(libc::ENOSYS),
    };
    if has_room { Ok(()) } else { fail(libc::EIO) }
}

/// The kernel forgets inodes, which it says without waiting for an answer.
pub(super) fn forget(front: &Front, request: &Request<'_>) {
    if request.operation == Operation::Forget {
        return front.fs.forget(request.ino, request.long(0));
    }
    let (pairs, _) = request.rest().as_chunks::<16>();
    for pair in pairs.iter().take(request.word(0) as usize) {
        let [ino, count] = [0, 8].map(|at| super::abi::long(pair, at).unwrap_or(0));
        front.fs.forget(Ino(ino), count);
    }
}

fn list(front: &Front, request: &Request<'_>, with_stat: bool, answer: &mut Answer<'_>) -> FsResult<()> {
    let (handle, after, most) = (request.long(0), request.long(8), request.word(16) as usize);
    front.fs.list(request.ino, FolderHandle(handle), after, with_stat, &mut |item| {
        let format = item.kind.type_bits();
        let dirent = Dirent { ino: item.ino, cookie: item.cookie, format, name: item.name };
        // Of `.` and `..` the kernel takes the number and the kind only.
        let bare = with_stat.then(|| Stat { ino: item.ino, kind: item.kind, ..no_entry() });
        let stat = item.stat.as_ref().or(bare.as_ref()).filter(|_| with_stat);
        answer.dirent(&dirent, stat, most)
    })
}

fn value(value: Value, answer: &mut Answer<'_>) -> bool {
    match value {
        Value::Size(size) => answer.count(size),
        Value::Bytes(bytes) => answer.put(&bytes),
    }
}

fn set_attr(request: &Request<'_>) -> SetAttr {
    let set = request.word(0);
    let given = |bit: u32| set & bit != 0;
    let time = |bit, now, seconds, nanos| {
        given(bit).then(|| if given(now) { SetTime::Now } else { SetTime::To(request.time(seconds, nanos)) })
    };
    SetAttr {
        permissions: given(SET_MODE).then(|| (request.word(68) & 0o7777) as u16),
        uid: given(SET_UID).then(|| request.word(76)),
        gid: given(SET_GID).then(|| request.word(80)),
        size: given(SET_SIZE).then(|| request.long(16)),
        atime: time(SET_ATIME, SET_ATIME_NOW, 32, 56),
        mtime: time(SET_MTIME, SET_MTIME_NOW, 40, 60),
    }
}

/// That a name isn't there, which is cached too.
fn no_entry() -> Stat {
    let attrs = Attrs::default();
    Stat { ino: Ino(0), kind: FileKind::File, nlink: 0, attrs, size: 0, blocks: 0, rdev: 0, may_change: false }
}
