//! The kernel's interface (`linux/fuse.h`, version 7.42): how requests and answers look as bytes.
//!
//! Everything is in the machine's byte order. Hides offsets and sizes. Invariant: whatever bytes come, decoding doesn't fail but
//! by [`Short`]; an answer never outgrows its room.

use crate::attr::Time;
use crate::id::Ino;
use crate::mount::caller::Caller;
use crate::mount::front::{Asked, Opened, encoded_device};
use crate::mount::fs::Stat;

/// Bytes of the header that each request begins with, and of that of an answer.
pub(super) const HEADER_BYTES: usize = 40;
pub(super) const ANSWER_HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 128;
const DIRENT_BYTES: usize = 24;
/// Everything is cached for longer than any mount lives.
const FOREVER_SECONDS: u64 = 100 * 365 * 24 * 3600;
const BLOCK_BYTES: u32 = 4096;
/// That an opened file has a backing.
const OPENED_PASSTHROUGH: u32 = 1 << 7;

/// A request that ends too early, or has a name without an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Short;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Lookup,
    Forget,
    Getattr,
    Setattr,
    Readlink,
    Symlink,
    Mknod,
    Mkdir,
    Unlink,
    Rmdir,
    Rename,
    Link,
    Open,
    Read,
    Write,
    Statfs,
    Release,
    Fsync,
    Setxattr,
    Getxattr,
    Listxattr,
    Removexattr,
    Flush,
    Opendir,
    Readdir,
    Releasedir,
    Fsyncdir,
    Create,
    Interrupt,
    Destroy,
    Ioctl,
    BatchForget,
    Fallocate,
    Readdirplus,
    Rename2,
    Lseek,
    CopyFileRange,
    Tmpfile,
    /// Nothing that we know.
    Other,
}

impl Operation {
    /// Whether the kernel says what it has forgotten; it waits for no answer then.
    pub fn is_forget(self) -> bool {
        matches!(self, Operation::Forget | Operation::BatchForget)
    }

    /// Whether it needs room, and can be done again when it found none: it has changed nothing then. What writes back or syncs isn't
    /// among them: the kernel tells only once that something was lost. Nor is what makes a file and may sync then: that looks for room
    /// by itself, while it has changed nothing.
    pub fn takes_room(self) -> bool {
        matches!(
            self,
            Operation::Symlink
                | Operation::Mknod
                | Operation::Mkdir
                | Operation::Tmpfile
                | Operation::Link
                | Operation::Rename
                | Operation::Rename2
                | Operation::Write
                | Operation::Fallocate
                | Operation::CopyFileRange
                | Operation::Setxattr
        )
    }

    fn of(code: u32) -> (Operation, usize) {
        match code {
            1 => (Operation::Lookup, 0),
            2 => (Operation::Forget, 8),
            3 => (Operation::Getattr, 16),
            4 => (Operation::Setattr, 88),
            5 => (Operation::Readlink, 0),
            6 => (Operation::Symlink, 0),
            8 => (Operation::Mknod, 16),
            9 => (Operation::Mkdir, 8),
            10 => (Operation::Unlink, 0),
            11 => (Operation::Rmdir, 0),
            12 => (Operation::Rename, 8),
            13 => (Operation::Link, 8),
            14 => (Operation::Open, 8),
            15 => (Operation::Read, 40),
            16 => (Operation::Write, 40),
            17 => (Operation::Statfs, 0),
            18 => (Operation::Release, 24),
            20 => (Operation::Fsync, 16),
            21 => (Operation::Setxattr, 8),
            22 => (Operation::Getxattr, 8),
            23 => (Operation::Listxattr, 8),
            24 => (Operation::Removexattr, 0),
            25 => (Operation::Flush, 24),
            27 => (Operation::Opendir, 8),
            28 => (Operation::Readdir, 40),
            29 => (Operation::Releasedir, 24),
            30 => (Operation::Fsyncdir, 16),
            35 => (Operation::Create, 16),
            36 => (Operation::Interrupt, 8),
            38 => (Operation::Destroy, 0),
            39 => (Operation::Ioctl, 32),
            42 => (Operation::BatchForget, 8),
            43 => (Operation::Fallocate, 32),
            44 => (Operation::Readdirplus, 40),
            45 => (Operation::Rename2, 16),
            46 => (Operation::Lseek, 24),
            47 => (Operation::CopyFileRange, 56),
            51 => (Operation::Tmpfile, 16),
            _ => (Operation::Other, 0),
        }
    }
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    pub operation: Operation,
    pub asked: Asked,
    /// The inode that it is about.
    pub ino: Ino,
    fields: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Request<'a> {
    /// A request in three pieces, as io_uring brings it; of `fields` what counts is known by the operation.
    pub fn of_parts(header: &'a [u8], fields: &'a [u8], rest: &'a [u8]) -> Result<Request<'a>, Short> {
        let (operation, bytes) = Operation::of(word(header, 4)?);
        let fields = fields.get(..bytes).ok_or(Short)?;
        let caller = Caller { uid: word(header, 24)?, gid: word(header, 28)?, pid: word(header, 32)? };
        let asked = Asked { number: long(header, 8)?, caller };
        Ok(Request { operation, asked, ino: Ino(long(header, 16)?), fields, rest })
    }

    /// A request in one piece, as the device brings it.
    pub fn whole(bytes: &'a [u8]) -> Result<Request<'a>, Short> {
        let length = word(bytes, 0)? as usize;
        let (header, body) = bytes.get(..length).ok_or(Short)?.split_at_checked(HEADER_BYTES).ok_or(Short)?;
        let (_, fields) = Operation::of(word(header, 4)?);
        let (fields, rest) = body.split_at_checked(fields).ok_or(Short)?;
        Request::of_parts(header, fields, rest)
    }

    /// The 32-bit field at `offset`; 0 beyond what the operation has.
    pub fn word(&self, offset: usize) -> u32 {
        word(self.fields, offset).unwrap_or(0)
    }

    /// The 64-bit field at `offset`.
    pub fn long(&self, offset: usize) -> u64 {
        long(self.fields, offset).unwrap_or(0)
    }

    /// The time whose seconds and nanoseconds are at these offsets.
    pub fn time(&self, seconds: usize, nanos: usize) -> Time {
        Time { seconds: self.long(seconds) as i64, nanos: self.word(nanos) }
    }

    /// What follows the fields.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The name that follows the fields, and what follows it.
    pub fn name(&self) -> Result<(&'a [u8], &'a [u8]), Short> {
        split_name(self.rest)
    }

    /// The two names that follow the fields.
    pub fn names(&self) -> Result<(&'a [u8], &'a [u8]), Short> {
        let (first, rest) = split_name(self.rest)?;
        Ok((first, split_name(rest)?.0))
    }
}

fn split_name(bytes: &[u8]) -> Result<(&[u8], &[u8]), Short> {
    let end = bytes.iter().position(|byte| *byte == 0).ok_or(Short)?;
    Ok((&bytes[..end], &bytes[end + 1..]))
}

pub(super) fn word(bytes: &[u8], offset: usize) -> Result<u32, Short> {
    let found = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    found.map(|found| u32::from_ne_bytes(*found)).ok_or(Short)
}

pub(super) fn long(bytes: &[u8], offset: usize) -> Result<u64, Short> {
    let found = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    found.map(|found| u64::from_ne_bytes(*found)).ok_or(Short)
}

/// The header of an answer to request `number`; `errno` is 0 or positive.
pub(super) fn answer_header(number: u64, errno: i32, payload_bytes: usize) -> [u8; ANSWER_HEADER_BYTES] {
    let mut header = [0; ANSWER_HEADER_BYTES];
    header[..4].copy_from_slice(&((ANSWER_HEADER_BYTES + payload_bytes) as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    header[8..].copy_from_slice(&number.to_ne_bytes());
    header
}

/// An answer's payload, being written.
pub(super) struct Answer<'a> {
    room: &'a mut [u8],
    used: usize,
}

impl<'a> Answer<'a> {
    pub fn new(room: &'a mut [u8]) -> Answer<'a> {
        Answer { room, used: 0 }
    }

    /// How many bytes it has.
    pub fn bytes(&self) -> usize {
        self.used
    }

    /// The room that is left, at most `most` bytes of it; [`Answer::filled`] says how much was used.
    pub fn room(&mut self, most: usize) -> &mut [u8] {
        let room = &mut self.room[self.used..];
        let most = most.min(room.len());
        &mut room[..most]
    }

    pub fn filled(&mut self, bytes: usize) {
        self.used = (self.used + bytes).min(self.room.len());
    }

    /// Appends `bytes`; false if they have no room.
    #[must_use]
    pub fn put(&mut self, bytes: &[u8]) -> bool {
        let Some(room) = self.room[self.used..].get_mut(..bytes.len()) else { return false };
        room.copy_from_slice(bytes);
        self.used += bytes.len();
        true
    }

    #[must_use]
    pub fn attr(&mut self, stat: &Stat) -> bool {
        let mut out = Fields::<104>::new();
        out.long(ttl(stat)).long(0).attr(stat);
        self.put(&out.bytes)
    }

    /// An entry; with inode 0, that there is none.
    #[must_use]
    pub fn entry(&mut self, stat: &Stat) -> bool {
        self.put(&entry(stat))
    }

    #[must_use]
    pub fn opened(&mut self, opened: &Opened) -> bool {
        let mut out = Fields::<16>::new();
        let backing = opened.backing.map_or(0, |backing| backing.0);
        let passed = opened.backing.map_or(0, |_| OPENED_PASSTHROUGH);
        out.long(opened.handle).word(opened.flags | passed).word(backing);
        self.put(&out.bytes)
    }

    /// A count of 32 bits.
    #[must_use]
    pub fn count(&mut self, count: u32) -> bool {
        let mut out = Fields::<8>::new();
        out.word(count).word(0);
        self.put(&out.bytes)
    }

    #[must_use]
    pub fn space(&mut self, space: &rustix::fs::StatVfs) -> bool {
        let mut out = Fields::<80>::new();
        [space.f_blocks, space.f_bfree, space.f_bavail, space.f_files, space.f_ffree].iter().for_each(|count| {
            out.long(*count);
        });
        out.word(space.f_bsize as u32).word(crate::attr::MAX_NAME as u32).word(space.f_frsize as u32);
        self.put(&out.bytes)
    }

    /// An entry of a listing, with what `stat` tells of it if it is given; false if it has no room in `most` bytes of answer.
    #[must_use]
    pub fn dirent(&mut self, item: &Dirent<'_>, stat: Option<&Stat>, most: usize) -> bool {
        let bytes = (DIRENT_BYTES + item.name.len()).next_multiple_of(8);
        let all = bytes + stat.map_or(0, |_| ENTRY_BYTES);
        if self.used + all > most.min(self.room.len()) {
            return false;
        }
        let mut out = Fields::<DIRENT_BYTES>::new();
        out.long(item.ino.0).long(item.cookie).word(item.name.len() as u32).word(item.format >> 12);
        let padding = [0; 8];
        stat.is_none_or(|stat| self.entry(stat))
            && self.put(&out.bytes)
            && self.put(item.name)
            && self.put(&padding[..bytes - DIRENT_BYTES - item.name.len()])
    }
}

/// An entry of a listing.
pub(super) struct Dirent<'a> {
    pub ino: Ino,
    pub cookie: u64,
    pub format: u32,
    pub name: &'a [u8],
}

/// For how many seconds the kernel may go by what it is told.
fn ttl(stat: &Stat) -> u64 {
    if stat.may_change { 0 } else { FOREVER_SECONDS }
}

fn entry(stat: &Stat) -> [u8; ENTRY_BYTES] {
    let mut out = Fields::<ENTRY_BYTES>::new();
    out.long(stat.ino.0).long(0).long(ttl(stat)).long(ttl(stat)).word(0).word(0).attr(stat);
    out.bytes
}

/// A structure of `N` bytes, written in order. What isn't written is zero.
struct Fields<const N: usize> {
    bytes: [u8; N],
    used: usize,
}

impl<const N: usize> Fields<N> {
    fn new() -> Fields<N> {
        Fields { bytes: [0; N], used: 0 }
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
        self
    }

    fn word(&mut self, value: u32) -> &mut Self {
        self.put(&value.to_ne_bytes())
    }

    fn long(&mut self, value: u64) -> &mut Self {
        self.put(&value.to_ne_bytes())
    }

    fn attr(&mut self, stat: &Stat) -> &mut Self {
        let attrs = &stat.attrs;
        let times = [attrs.atime, attrs.mtime, attrs.ctime];
        self.long(stat.ino.0).long(stat.size).long(stat.blocks);
        for time in times {
            self.long(time.seconds as u64);
        }
        for time in times {
            self.word(time.nanos);
        }
        let mode = stat.kind.type_bits() | u32::from(attrs.permissions);
        self.word(mode).word(stat.nlink).word(attrs.uid).word(attrs.gid);
        self.word(encoded_device(stat.rdev)).word(BLOCK_BYTES).word(0)
    }
}
